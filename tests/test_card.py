"What runs on a card, looked at without one: where models and batches go, who makes batches, how much is read at a time."
import numpy as np, pytest, torch
import petvlm.evaluate as evaluate, petvlm.trainer as trainer, petvlm.vlm as vlm
from petvlm.config import resolve
from petvlm.datasets import stacked
from petvlm.fusion import _apart, distances
from petvlm.language import train_tokenizer
from petvlm.prepare import standards
from petvlm.tokens import Tokens, joined
from petvlm.train import build


class Model:
    def __init__(self): self.where = 'cpu'
    def eval(self): return self
    def to(self, where): self.where = where; return self

@pytest.mark.parametrize('there', [True, False])
def test_a_trained_model_answers_on_the_card(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: there)
    monkeypatch.setattr(evaluate, 'load_point', lambda *a: (Model(), None))
    for name in ('plan', 'lineage', 'last_nodes'): monkeypatch.setattr(evaluate, name, lambda *a, **k: {})
    where = type('Where', (), {'scale': 'smoke', 'prepared': lambda self, data: None})()
    model, _, _ = evaluate.trained(resolve('vipet', 'smoke'), where)
    assert model.where == ('cuda' if there else 'cpu')

@pytest.mark.parametrize('cards, workers', [(0, 0), (1, 12), (4, 3)])
def test_feeders_make_the_batches_of_a_card(monkeypatch, tmp_path, cards, workers):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: cards)
    monkeypatch.setattr('petvlm.datasets.usable', lambda: 16)
    monkeypatch.setattr(trainer, 'get_start_method', lambda: 'fork')
    monkeypatch.setattr(trainer, 'TrainingArguments', lambda folder, **kw: kw)
    given = trainer.arguments(resolve('vipet', 'smoke').stages['instruct'], tmp_path, 0)
    assert given['dataloader_num_workers'] == workers and given['bf16'] == (cards > 0) and given['use_cpu'] == (cards == 0)

@pytest.mark.parametrize('point', ['vipet', 'med3dvlm'])          # DCFormer's tokens have a finer lattice beside them
def test_a_large_batch_is_read_piece_by_piece(monkeypatch, point):
    cfg = resolve(point, 'smoke'); torch.manual_seed(0)
    model = build(cfg, train_tokenizer(['a b c'], 300)).eval()
    images = {i: torch.randn(5, 1, *cfg.data.shape) for i in cfg.inputs}
    sizes = []
    for i in cfg.inputs: model.encode[i].register_forward_pre_hook(lambda m, given: sizes.append(len(given[0])))
    with torch.no_grad(): whole = model.encoded(images)
    monkeypatch.setattr(vlm, 'READ', 2*int(np.prod(cfg.data.shape)))
    with torch.no_grad(): pieces = model.encoded(images)
    assert sizes == [5]*len(cfg.inputs) + [2, 2, 1]*len(cfg.inputs)
    for i in cfg.inputs:
        for a, b in zip(whole[i].streams, pieces[i].streams, strict=True): assert a.grid == b.grid; torch.testing.assert_close(a.x, b.x)
    sizes.clear(); model.encoded(images)                            # with gradients: at once
    assert sizes == [5]*len(cfg.inputs)

def test_joined_keeps_the_order_of_the_batch():
    part = lambda n: Tokens(torch.full((1, 2, 3), n), (1, 1, 2), Tokens(torch.full((1, 4, 3), 10 + n), (1, 2, 2)))
    fine, coarse = joined([part(0.), part(1.)]).streams
    assert coarse.x[:, 0, 0].tolist() == [0, 1] and fine.x[:, 0, 0].tolist() == [10, 11]

def test_distances_are_computed_once_for_a_device():
    cpu = torch.device('cpu')
    assert _apart((2, 2, 2), (2, 2, 2), cpu) is _apart((2, 2, 2), (2, 2, 2), cpu)
    assert torch.equal(_apart((2, 3, 1), (1, 3, 1), cpu), distances((2, 3, 1), (1, 3, 1)))

def test_standards_are_the_same_in_slabs_and_at_once(tmp_path):
    x = np.random.default_rng(0).gamma(1, .1, (6, 8, 5, 7)).astype(np.float16)
    np.save(tmp_path/'pet.npy', x)
    (tmp_path/'rows.jsonl').write_text(''.join(f'{{"row": {i}, "split": "train", "region": "{"chest" if i % 2 else "head_neck"}"}}\n' for i in range(6)))
    once, slabs = standards(tmp_path, ('pet',)), standards(tmp_path, ('pet',), room=4*3*5*7)
    assert sorted(once) == ['pet.chest', 'pet.head_neck'] and all(once[k].tobytes() == slabs[k].tobytes() for k in once)
    expected = np.log(x[1::2].astype(np.float32)*10 + np.float32(.3)).mean(0)
    np.testing.assert_allclose(once['pet.chest'][0], expected, rtol=1e-5)

def test_stacked_keeps_the_order():
    assert stacked(lambda i: np.full(2, i), [3, 1, 2]).tolist() == [[3, 3], [1, 1], [2, 2]]
