"""DCFormer's three depthwise convolutions, their batch norms and their sum, layer by layer: as published, in two dimensions or by matrices, and by Triton's kernel.

    python benchmarks/axial.py --device cuda --limit 60             # the four stages of the published 'small' at 128 x 256 x 256 voxels, float32 and bfloat16
    python benchmarks/axial.py --check                              # outputs and gradients only

Ways: `plain` three-dimensional convolutions; `axes` petvlm's without Triton; `ours` (forward only) Triton's kernel on a GPU (or, without one, under TRITON_INTERPRET=1). bfloat16 under autocast.
Outputs, gradients of the input and of every weight are compared with `plain` in float64 first: |a - b| / |b| of each, asserted below 1e-5 in float32, and in bfloat16 below 1.5 times what plain bfloat16 misses them by (found on an H100: 5e-7; 0.5 to 0.9 times).
One JSON, a row per stage, type and task (`forward`: inference; `step`: forward and backward in training mode). A layer and type is one process: three (check 4.0 s, forward 1.2, step 4.3 on an H100) were 24 in all, which 80 s did not hold.
"""
import copy, os, time
from types import SimpleNamespace
import harness

STAGES = {1: (96, 13, (16, 32, 32)), 2: (192, 11, (8, 16, 16)), 3: (384, 9, (4, 8, 8)), 4: (768, 7, (2, 4, 4))}     # width, kernel, lattice
TASKS = 'forward', 'step'
CLOCK = time.process_time if os.environ.get('OMP_NUM_THREADS') == '1' else time.perf_counter


def ready(): import torch, petvlm.dcformer  # noqa: F401


def make(s):
    import torch
    from torch import nn
    from petvlm.dcformer import AxialConv
    torch.manual_seed(0)
    width, kernel, size = STAGES[s.stage]
    if s.shrink: width, size = 4, tuple(min(n, 6) for n in size)
    m = AxialConv(width, width, kernel, depthwise=True).to(s.device)
    for _, norm in m.axes: nn.init.normal_(norm.running_mean, std=.1); nn.init.uniform_(norm.running_var, .5, 2.); nn.init.uniform_(norm.weight, .5, 1.5); nn.init.normal_(norm.bias, std=.1)
    x = torch.randn(s.batch, width, *size, device=s.device).to(getattr(torch, s.dtype))
    return m, x.requires_grad_(), torch.randn(s.batch, width, *size, device=s.device).to(x.dtype)


def work(s, way, m, x, g, task):
    "A function that returns the output, and in a step the gradients of the input and of every weight and bias but those that a norm takes away."
    import torch
    import petvlm.dcformer as dc
    cast = lambda: torch.autocast(s.device, torch.bfloat16, enabled=x.dtype == torch.bfloat16)
    forward = (lambda: sum(norm(conv(x)) for conv, norm in m.axes)) if way == 'plain' else lambda: m(x)
    def inference():
        m.eval(); dc.KERNELS = way != 'axes'
        with torch.inference_mode(), cast(): return [forward()]
    def step():
        m.train(); dc.KERNELS = way != 'axes'
        m.zero_grad(set_to_none=True); x.grad = None
        with cast(): y = forward()
        y.backward(g.to(y.dtype))
        return [y.detach(), x.grad, *(p.grad for conv, norm in m.axes for p in (conv.weight, norm.weight, norm.bias))]
    return inference if task == 'forward' else step


def gaps(found, exact): return [float((f.double() - e.double()).norm()/e.double().norm()) for f, e in zip(found, exact)]


def ways_of(s, task): return [w for w in s.ways if task == 'forward' or w != 'ours']     # a step has no kernel


def check(s):
    "Largest |a - b| / |b| of outputs and gradients, per task and way. `AssertionError` where Triton's are not equal."
    import torch
    s = SimpleNamespace(**s)
    if s.device == 'cuda': torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    m, x, g = make(s)
    with torch.no_grad(): out = {'triton': m.fused(x)}
    for task in ('forward', 'step'):
        exact = work(s, 'plain', copy.deepcopy(m).double(), x.detach().double().requires_grad_(), g.double(), task)()
        exact = [t.clone() for t in exact]
        each = {w: gaps([t.clone() for t in work(s, w, copy.deepcopy(m), x, g, task)()], exact) for w in ways_of(s, task)}
        most = 1e-5 if s.dtype == 'float32' else 1.5*max(each['plain'])
        assert all(v <= most for w in each for v in each[w] if w != 'plain'), f'stage {s.stage}, {s.dtype}, {task}: {each}'
        out[task] = {w: max(v) for w, v in each.items()}
    return out


def times(s, task):
    import torch
    s = SimpleNamespace(**s)
    if s.device == 'cuda': torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    m, x, g = make(s)
    runs = {w: work(s, w, m, x, g, task) for w in ways_of(s, task)}
    def several(run):
        def each():
            for _ in range(s.inner): run()
        return each
    sync = torch.cuda.synchronize if s.device == 'cuda' else None
    seconds = harness.interleaved({w: several(r) for w, r in runs.items()}, s.repeats, warm=2, sync=sync, clock=time.perf_counter if sync else CLOCK)
    found = {'seconds': {w: [t/s.inner for t in v] for w, v in seconds.items()}, 'peaks': {}}
    for w in runs if sync else ():
        m.zero_grad(set_to_none=True); x.grad = None
        with harness.peak('cuda') as p: runs[w]()
        found['peaks'][w] = p
    return found


def measure(s, timed):
    "All of one layer and type."
    return check(s), [times(s, t) for t in TASKS] if timed else []


def main(argv=None):
    def add(p):
        p.add_argument('--stages', type=int, nargs='+', default=[*STAGES], choices=STAGES); p.add_argument('--batch', type=int, default=8)
        p.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'], choices=('float32', 'bfloat16')); p.add_argument('--inner', type=int, default=5, help='runs a round')
        p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu'); p.add_argument('--check', action='store_true', help='compare, time nothing, write nothing'); p.add_argument('--shrink', action='store_true', help='four channels, six voxels a side at most'); p.add_argument('--limit', type=float, help=harness.LIMIT)
    a = harness.options(__doc__, __file__, argv, quick=dict(repeats=1, batch=2, inner=1, shrink=True), add=add)
    wanted = [{'stage': n, 'dtype': d, 'ways': ['plain', 'axes', 'ours'], **{k: getattr(a, k) for k in ('batch', 'repeats', 'inner', 'device', 'shrink')}} for d in a.dtypes for n in a.stages]
    rows = []
    for s, found in zip(wanted, harness.apart(__file__, [('measure', {'s': s, 'timed': not a.check}) for s in wanted], a.limit)):
        if found is None: continue
        same, timed = found; print(s['stage'], s['dtype'], same, flush=True)
        for task, found in zip(TASKS, timed):
            ways = harness.against(found['seconds'])
            for w, p in found['peaks'].items(): ways[w] |= p
            width, kernel, size = STAGES[s['stage']]
            rows.append({'layer': f"depthwise, stage {s['stage']}", 'channels': width, 'kernel': kernel, 'lattice': list(size), 'batch': s['batch'], 'type': s['dtype'], 'task': task, 'ways': ways, 'apart': same[task], 'triton': same['triton']})
    if a.check: return
    if not rows: raise SystemExit(f'nothing was measured within {a.limit} s')
    harness.show([{'stage': r['layer'][-1], 'type': r['type'], 'task': r['task'], 'way': w, **v} for r in rows for w, v in r['ways'].items()],
                 {'stage': 's', 'type': 's', 'task': 's', 'way': 's', 'seconds': '.6f', 'time_ratio': '.3f', 'ratio_min': '.3f', 'ratio_max': '.3f', 'rise_mb': '.1f'})
    harness.write(a, "DCFormer's depthwise convolutions, layer by layer", rows)


if __name__ == '__main__': main()
