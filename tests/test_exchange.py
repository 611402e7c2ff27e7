"Contrastive losses over several processes are those of one process with the whole batch: values and gradients, whatever the chunks and the shares."
import os, subprocess, sys
from types import SimpleNamespace
import numpy as np, pytest, torch
from petvlm.contrast import info_nce
from petvlm.exchange import clip_across, info_nce_across, several, siglip_across
from petvlm.losses import LossError, clip_loss
from petvlm.siglip import FORMS, siglip_loss

N, C = 15, 8
LEARNT = {'siglip': (2., -1.5), 'clip': (.3,), 'nce': (.3,)}
CASES = {**{f'siglip {f}': ('siglip', {'form': f}) for f in FORMS}, 'clip': ('clip', {}), 'clip symmetric': ('clip', {'symmetric': True}), 'nce': ('nce', {}), 'nce unmasked': ('nce', {'mask_equal': False})}
PLAIN = {'siglip': siglip_loss, 'clip': clip_loss, 'nce': info_nce}
ACROSS = {'siglip': siglip_across, 'clip': clip_across, 'nce': info_nce_across}


def batch(n=N):
    "Images and texts; texts 1, 7 and 12 are equal but for their length (on one process and on others)."
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(n, C, generator=g), torch.randn(n, C, generator=g)
    y[7], y[12] = 3*y[1], y[1]
    return x, y


def taught(loss, kind, rows=slice(None), **kw):
    "Loss, and gradients on images, texts and what learns beside them."
    given = [x[rows].clone().requires_grad_() for x in batch()] + [torch.tensor(v, requires_grad=True) for v in LEARNT[kind]]
    value = loss(*given, **kw)
    return [value.detach(), *torch.autograd.grad(value, given)]


def same(found, expected, what=''):
    for f, e in zip(found, expected, strict=True): torch.testing.assert_close(f, e, atol=1e-6, rtol=1e-5, msg=lambda m: f'{what}: {m}')


@pytest.mark.parametrize('rows', [1, 4, 15, 100])
@pytest.mark.parametrize('case', CASES)
def test_chunks_change_nothing(case, rows):
    kind, kw = CASES[case]
    same(taught(lambda *a, **k: ACROSS[kind](*a, rows=rows, **k), kind, **kw), taught(PLAIN[kind], kind, **kw))


def test_equal_texts_would_matter():
    assert abs(taught(info_nce_across, 'nce')[0] - taught(info_nce_across, 'nce', mask_equal=False)[0]) > .01


def test_the_loss_of_a_scaled_loss_scales_its_gradients():
    kind, kw = CASES['clip']
    twice = taught(lambda *a, **k: 2*clip_across(*a, **k), kind, **kw)
    same(twice[1:], [2*g for g in taught(clip_loss, kind, **kw)[1:]])


def test_bfloat16_embeddings_are_summed_in_float32():
    x, y = (v.bfloat16().requires_grad_() for v in batch())
    loss = siglip_across(x, y, 2., -1.)
    loss.backward()
    assert loss.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, siglip_loss(x.float(), y.float(), 2., -1.), atol=1e-6, rtol=1e-5)


def test_hard_pairs_stay_finite():
    x = torch.eye(4, C)
    for loss in (clip_across(x, -x, .001, True), clip_across(x, x, .001, True), siglip_across(x, -x, 6., 0.)): assert torch.isfinite(loss)
    assert torch.isclose(clip_across(x, -x, .01, True), clip_loss(x, -x, .01, True))


def test_alone_there_is_nobody_to_exchange_with(): assert not several()


@pytest.mark.parametrize('make, says', [(lambda x, y: clip_across(x, y[:3], .1), r'\(15, 8\) and \(3, 8\)'), (lambda x, y: siglip_across(x, y, 1., 0., 'other'), "'other' is unknown"),
                                        (lambda x, y: siglip_across(x[:0], y[:0], 1., 0.), 'no pair'), (lambda x, y: info_nce_across(x, y, rows=0), 'rows is 0')])
def test_what_is_no_batch_is_refused(make, says):
    with pytest.raises(LossError, match=says): make(*batch())


def test_the_model_takes_them_while_it_trains_on_several(monkeypatch):
    from petvlm import vlm
    (x, y), said = batch(), []
    m = SimpleNamespace(latent={'ct': lambda t: t}, text={'ct': lambda ids, mask: ids}, sigmoid={'ct': {'t_prime': torch.tensor(2.), 'bias': torch.tensor(-1.)}},
                        config=SimpleNamespace(tau=.3, symmetric=True, siglip={'form': 'textbook'}))
    losses = lambda: torch.stack([vlm.LOSSES[k](m, {'text_ct_ids': y, 'text_ct_mask': None}, {('view', 'ct'): x}, 'ct') for k in ('clip', 'siglip')])
    alone = losses()
    for f in (clip_across, siglip_across): monkeypatch.setattr(vlm, f.__name__, lambda *a, f=f, **kw: said.append(f.__name__) or f(*a, **kw))
    monkeypatch.setattr(vlm, 'holders', lambda: 'the ranks that hold a batch')
    torch.testing.assert_close(losses(), alone, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(vlm, 'holders', lambda: None); losses()           # one process alone may evaluate
    assert said == ['clip_across', 'siglip_across']


# ---- real processes

SHARES = {'three': ([0, 1, 2], (5, 5, 5)), 'uneven': ([0, 1, 2], (3, 8, 4)), 'two': ([0, 1], (9, 6))}     # ranks, pairs of each


def shares(counts):
    ends = np.cumsum([0, *counts])
    return [slice(int(a), int(b)) for a, b in zip(ends, ends[1:])]


def worker(rank, room):
    "One of three processes: every case over all of them and over the first two, what it finds into a file."
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{room}/store', rank=rank, world_size=3)
    groups, found = {'three': None, 'uneven': None, 'two': dist.new_group([0, 1])}, {}
    assert several()
    for share, (ranks, counts) in SHARES.items():
        if rank not in ranks: continue
        for case, (kind, kw) in CASES.items():
            out = taught(lambda *a, **k: ACROSS[kind](*a, rows=2, averaged=share != 'two', group=groups[share], **k), kind, shares(counts)[ranks.index(rank)], **kw)
            found |= {f'{share}|{case}|{i}': t.numpy() for i, t in enumerate(out)}
    np.savez(f'{room}/{rank}.npz', **found)
    dist.barrier(); dist.destroy_process_group()


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    "What three processes found."
    room = tmp_path_factory.mktemp('exchange')
    env = os.environ | {'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': 'lo', 'CUDA_VISIBLE_DEVICES': ''}
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(room)], env=env, stderr=subprocess.PIPE, text=True) for rank in range(3)]
    said = [p.communicate(timeout=120)[1] for p in started]
    assert not any(p.returncode for p in started), '\n'.join(said)
    return [dict(np.load(room/f'{rank}.npz')) for rank in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize('share', SHARES)
@pytest.mark.parametrize('case', CASES)
def test_several_processes_equal_one(case, share, processes):
    (kind, kw), (ranks, counts) = CASES[case], SHARES[share]
    expected = taught(PLAIN[kind], kind, **kw)
    found = [[torch.from_numpy(processes[r][f'{share}|{case}|{i}']) for i in range(len(expected))] for r in ranks]
    times = len(ranks) if share != 'two' else 1                           # averaged: DDP divides by the number of processes
    for f in found: same(f[:1], expected[:1], 'loss')
    for i in (1, 2): same([torch.cat([f[i] for f in found])/times], [expected[i]], ('images', 'texts')[i - 1])
    for i in range(3, len(expected)): same([sum(f[i] for f in found)/times], [expected[i]], 'learnt beside')


if __name__ == '__main__': worker(int(sys.argv[1]), sys.argv[2])
