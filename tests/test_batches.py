"From stored halves to batches: the numbers of the formula bit for bit, whatever the slab; moved as if every voxel had been named."
import json
import numpy as np, pytest, torch
from petvlm import prepare
from petvlm.datasets import Items, Rows, _shift
from petvlm.prepare import standardise

def formula(x, name, standard, suv_max):
    "`standardise` as it is written in one line."
    x = x.astype(np.float32)
    return np.clip(((np.log(x*suv_max + .3) if name == 'pet' else x) - standard[0])/standard[1], -4, 8)

def named(x, by): return x[np.ix_(*(np.clip(np.arange(n) - b, 0, n - 1) for n, b in zip(x.shape, by)))]

@pytest.mark.parametrize('slab', [1, 7*40*30, 2**16, 2**30])
@pytest.mark.parametrize('name,suv_max', [('pet', 10.), ('pet', 12.), ('ct', 10.), ('xray', 10.)])
def test_the_bits_of_the_formula(monkeypatch, slab, name, suv_max):
    monkeypatch.setattr(prepare, 'SLAB', slab)
    rng = np.random.default_rng(3)
    x = np.clip(rng.gamma(.6, .3, (23, 40, 30)), 0, 3).astype(np.float16); x[0], x[1] = 0, 3
    standard = np.stack([rng.normal(0, 1, x.shape), rng.uniform(.05, 1, x.shape)]).astype(np.float32)
    for stored in (x, x.astype(np.float32)):
        found = standardise(stored, name, standard, suv_max)
        assert found.dtype == np.float32 and found.tobytes() == formula(stored, name, standard, suv_max).tobytes()

def test_every_half_that_is_stored_is_looked_up_right():
    x = np.arange(0x4201, dtype=np.uint16).view(np.float16).reshape(1, 1, -1)                      # 0 to 3, all of them
    standard = np.stack([np.zeros(x.shape), np.ones(x.shape)]).astype(np.float32)
    assert x.max() == 3 and np.array_equal(standardise(x, 'pet', standard, 10.), formula(x, 'pet', standard, 10.)) and np.array_equal(standardise(x, 'ct', standard, 10.)[0], x[0].astype(np.float32))

@pytest.mark.parametrize('shape', [(1, 1, 1), (2, 5, 4), (3, 2, 7), (6, 6, 6)])
def test_moving_by_blocks_is_naming_every_voxel(shape):
    x = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    for by in np.ndindex(9, 9, 9):
        by = np.array(by) - 4
        assert np.array_equal(_shift(x, by), named(x, by))

def test_what_moves_is_a_copy_and_what_stays_is_not():
    x = np.zeros((3, 3, 3), np.float16)
    assert _shift(x, (0, 0, 0)) is x and not np.shares_memory(_shift(x, (0, 1, 0)), x) and _shift(x, (0, 1, 0)).dtype == np.float16

def test_items_are_the_formula_of_the_files(tmp_path):
    "End to end, from hand-written files, by the definition."
    rng, shape = np.random.default_rng(6), (5, 8, 9)
    stored = {k: np.clip(rng.gamma(1, .2, (3, *shape)), 0, 3).astype(np.float16) for k in ('pet', 'ct')}
    usual = {k: np.stack([rng.normal(0, 1, shape), rng.uniform(.1, 1, shape)]).astype(np.float32) for k in ('pet', 'ct')}
    for k, x in stored.items(): np.save(tmp_path/f'{k}.npy', x)
    np.savez(tmp_path/'standard.npz', **{f'{k}.chest': v for k, v in usual.items()})
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(dict(row=i, split='train', region='chest', patient=f'p{i}', text='-', findings=[], findings_from='report')) + '\n' for i in range(3)))
    items = Items(Rows(tmp_path, 'train', 10.), 12, seed=2, ask=lambda rng, record: '?')
    shifts = set()
    for i in range(12):
        row, by, _ = items._drawn(i); shifts.add(tuple(by)); item = items[i]
        for k in ('pet', 'ct'): assert np.array_equal(item[k][0], named(formula(stored[k][row], k, usual[k], 10.), by))
        assert np.array_equal(item['suv'][0], named(stored['pet'][row].astype(np.float32)*10., by)) and item['suv'].dtype == np.float32
        torch.from_numpy(item['suv'])
    assert len(shifts) > 4
