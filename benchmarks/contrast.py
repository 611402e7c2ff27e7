"""Contrastive losses of large batches side by side: all pairs in one table, and petvlm's exchange, on one process and on several.

    python benchmarks/contrast.py                               # 1,024 to 8,192 pairs of 512 numbers, one and two processes (gloo)
    python benchmarks/contrast.py --quick
    torchrun --nproc-per-node 8 benchmarks/contrast.py --here --device cuda      # on the GPUs that are there; rank 0 prints

`plain`: embeddings of all processes gathered (with gradient), one table of similarities, autograd. `ours`: `petvlm.exchange`. `pairs` is the global batch; each of P processes has pairs/P. A step is loss and gradient on both embeddings and on what learns beside them.
One JSON, a row per number of processes, pairs and loss: seconds (where OMP_NUM_THREADS is 1 of the one thread's own time, waiting for messages not counted; interleaved rounds, slowest process: median, fastest, slowest, ratios to `plain` within each round), what a step adds to the memory of a process (largest of all), both with ratios, the bytes of one table (`table_mb`), and how far losses and
gradients lie apart (asserted below 1e-5 of the largest entry).
"""
import json, os, sys, tempfile, time
from pathlib import Path
import harness

LOSSES = ('siglip', 'clip')
CLOCK = time.process_time if os.environ.get('OMP_NUM_THREADS') == '1' else time.perf_counter    # of one thread: its own time, whatever else the machine does


def ready(): import torch, torch.distributed, petvlm.exchange  # noqa: F401


def gathered(x):
    "The rows of all processes, through which gradients come home."
    import torch, torch.distributed as dist
    import warnings
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional.all_gather is deprecated", FutureWarning)      # its successors differ between versions of torch
    from torch.distributed.nn.functional import all_gather
    return torch.cat(all_gather(x)) if dist.is_initialized() else x


def inputs(pairs, width, device):
    "This process's share of the global batch, and what learns beside it."
    import torch
    from petvlm.exchange import _world
    rank, size = _world()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(pairs, width, generator=g); y = x + torch.randn(pairs, width, generator=g)
    share = slice(rank*pairs//size, (rank + 1)*pairs//size)
    return [v.to(device).requires_grad_() for v in (x[share].clone(), y[share].clone(), torch.tensor(2.3), torch.tensor(-5.))]


def step(loss, way, given):
    "Loss and gradients, as DDP would average them."
    import torch
    from petvlm import exchange
    from petvlm.losses import clip_loss
    from petvlm.siglip import siglip_loss
    x, y, t, b = given
    if way == 'plain':
        x, y = gathered(x), gathered(y)
        value = siglip_loss(x, y, t, b) if loss == 'siglip' else clip_loss(x, y, 1/t.exp(), symmetric=True)
    else: value = exchange.siglip_across(x, y, t, b) if loss == 'siglip' else exchange.clip_across(x, y, 1/t.exp(), symmetric=True)
    return value.detach(), torch.autograd.grad(value, given if loss == 'siglip' else given[:3])


def difference(found, plain):
    "Of loss and of the gradients on embeddings (those on `t` and `b` are a part of the sum in one way and the whole in the other)."
    pairs = [(found[0], plain[0]), *zip(found[1][:2], plain[1][:2])]
    return max(float((f - p).abs().max()/p.abs().max()) for f, p in pairs)


def measured(loss, pairs, width, repeats, most, device='cpu'):
    "On every process: seconds of both ways, how far apart they are."
    import torch, torch.distributed as dist
    from petvlm.exchange import _world
    several = _world()[1] > 1
    given = inputs(pairs, width, device)
    apart = difference(step(loss, 'ours', given), step(loss, 'plain', given))
    assert apart < 1e-5, f'{loss}, {pairs} pairs: {apart}'
    wait = (lambda: dist.barrier()) if several else torch.cuda.synchronize if device == 'cuda' else None
    return {'seconds': harness.interleaved({w: (lambda w=w: step(loss, w, given)) for w in ('plain', 'ours')}, repeats, warm=0, sync=wait, most=None if several else most, clock=CLOCK if device == 'cpu' else time.perf_counter), 'apart': apart}


def added(loss, pairs, width, way, device='cpu'):
    given = inputs(pairs, width, device)
    if not os.environ.get('WORLD_SIZE'): step(loss, way, inputs(16, 4, device))       # workspaces of the libraries are there before
    with harness.peak(device) as m: step(loss, way, given)
    return m


def joined(rank, size, store, name, kw):
    "`name(**kw)` as one of several processes."
    import torch, torch.distributed as dist
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))//size))
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=size)
    try:
        step('siglip', 'plain', inputs(2*size, 4, 'cpu')); step('siglip', 'ours', inputs(2*size, 4, 'cpu'))     # connections are made before anything is measured
        return globals()[name](**kw)
    finally: dist.destroy_process_group()


def together(size, name, kw):
    "What each of `size` processes finds."
    if size == 1: return [globals()[name](**kw)]
    with tempfile.TemporaryDirectory() as room:
        parts = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    (Path(room)/f'{rank}.json').write_text(json.dumps(joined(rank, size, f'{room}/store', name, kw))); status = 0
                except BaseException:
                    import traceback; traceback.print_exc()
                finally: sys.stderr.flush(); os._exit(status)
            parts.append(child)
        failed = [rank for rank, child in enumerate(parts) if os.waitpid(child, 0)[1]]
        if failed: raise RuntimeError(f'processes {failed} of {size} failed')
        return [json.loads((Path(room)/f'{rank}.json').read_text()) for rank in range(size)]


def row(size, pairs, loss, results):
    timed, peaks = results[0], {'plain': results[1], 'ours': results[2]}
    seconds = {w: [max(each) for each in zip(*(p['seconds'][w] for p in timed))] for w in ('plain', 'ours')}
    found = harness.against(seconds)
    rise = {w: max(p['rise_mb'] for p in peaks[w]) for w in peaks}
    for w in found: found[w] |= {'rise_mb': rise[w], 'memory_ratio': rise[w]/rise['plain']}
    return {'processes': size, 'pairs': pairs, 'loss': loss, 'table_mb': 4*pairs**2/1e6, 'apart': max(p['apart'] for p in timed), 'ways': found}


def here(a):
    "Under torchrun: time and memory on the processes that are there."
    import torch, torch.distributed as dist
    device = 'cuda' if a.device == 'cuda' else 'cpu'
    if device == 'cuda': torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo')
    rows = []
    for pairs in a.pairs:
        for loss in a.losses:
            kw = dict(loss=loss, pairs=pairs, width=a.width, device=device)
            mine = [measured(repeats=a.repeats, most=None, **kw), *(added(way=w, **kw) for w in ('plain', 'ours'))]
            told = [None]*dist.get_world_size()
            dist.all_gather_object(told, json.dumps(mine))
            rows.append(row(dist.get_world_size(), pairs, loss, list(zip(*map(json.loads, told)))))
    if dist.get_rank() == 0: tell(a, rows)
    dist.destroy_process_group()


def tell(a, rows):
    harness.show([{**{k: r[k] for k in ('processes', 'pairs', 'loss', 'apart')}, 'way': w, **v} for r in rows for w, v in r['ways'].items()],
                 {'processes': 'd', 'pairs': 'd', 'loss': 's', 'way': 's', 'seconds': '.3f', 'time_ratio': '.3f', 'ratio_min': '.3f', 'ratio_max': '.3f', 'rise_mb': '.1f', 'memory_ratio': '.3f', 'apart': '.0e'})
    harness.write(a, 'contrastive losses over all pairs of a batch', rows)


def main(argv=None):
    def add(p):
        p.add_argument('--pairs', type=int, nargs='+', default=[1024, 2048, 4096, 8192]); p.add_argument('--width', type=int, default=512); p.add_argument('--processes', type=int, nargs='+', default=[1, 2])
        p.add_argument('--losses', nargs='+', choices=LOSSES, default=list(LOSSES)); p.add_argument('--most', type=float, default=6., help='seconds after which no new round begins')
        p.add_argument('--here', action='store_true', help='under torchrun: on its processes'); p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    a = harness.options(__doc__, __file__, argv, quick=dict(repeats=2, pairs=[512, 1024], most=2.), add=add)
    if a.here: return here(a)
    wanted = [(size, pairs, loss) for size in a.processes for pairs in a.pairs for loss in a.losses]
    calls = []
    for size, pairs, loss in wanted:
        kw = dict(loss=loss, pairs=pairs, width=a.width)
        calls += [('together', {'size': size, 'name': 'measured', 'kw': kw | {'repeats': a.repeats, 'most': a.most}}), *(('together', {'size': size, 'name': 'added', 'kw': kw | {'way': w}}) for w in ('plain', 'ours'))]
    results = iter(harness.apart(__file__, calls))
    tell(a, [row(*w, [next(results) for _ in range(3)]) for w in wanted])


if __name__ == '__main__': main()
