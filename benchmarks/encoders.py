"""Encoders side by side: DCFormer, CT-ViT and ViT3D, and the published formulas written down plainly in PyTorch, with the same weights.

    python benchmarks/encoders.py                                    # 32 x 64 x 64, 64 x 128 x 128, 128 x 256 x 256 voxels
    python benchmarks/encoders.py --quick
    python benchmarks/encoders.py --encoders dcformer --ways plain ours checkpointing compiled --device cuda

Ways: `plain` three-dimensional convolutions, attention with its maps, one bias per pair of places; `ours` petvlm's encoder; `axes` the same without Triton's kernels; `checkpointing` petvlm's, blocks computed again in the backward pass; `compiled` petvlm's under torch.compile (needs a compiler).

DCFormer as published ('small'); CT-ViT and ViT3D at their published widths with patches of 8 x 16 x 16 and `--depth` layers (published: 4 + 4 and 12; every layer costs the same). Batch 1 (4 at 32 x 64 x 64), float32. One JSON, a row per encoder, size and task (`forward`: inference; `step`: forward and backward in
training mode): seconds (of the one thread's own time where OMP_NUM_THREADS is 1; interleaved rounds: median, fastest, slowest, ratios to `plain` within each round), peak memory of a process that does it once, its rise over the loaded model. Outputs, and in a step gradients of every weight, are compared first: in float64 at 32 x 64 x 64 (asserted, 1e-5 of the largest entry), in float32 at every size (`apart`, given; outputs asserted below 1e-3: sums in another order, through 13 blocks, maxima and batch norms).
In bfloat16 a step's gradients are mostly rounding where batch norms see few values (plain DCFormer on a CPU, batch 4 at 32 x 64 x 64, against float64: 45 %), so every way is held against plain in float32 and may miss it by 1.5 times what plain bfloat16 does (`misses`); outputs differ by less than 0.03 of the largest entry (found on an H100: 0.012), in a step 0.1.
"""
import copy, os, time
from types import SimpleNamespace
import harness

SIZES = [(32, 64, 64), (64, 128, 128), (128, 256, 256)]
CLOCK = time.process_time if os.environ.get('OMP_NUM_THREADS') == '1' else time.perf_counter    # of one thread: its own time, whatever else the machine does
APART = 1e-5     # in float64; CT-ViT's bias is always float32


def ready(): import torch, petvlm.dcformer, petvlm.encoders  # noqa: F401


# ---- the formulas, plainly

def plain_dcformer(m, x):
    "Med3DVLM, section 3.1: three convolutions with their norms, summed; blocks `x + scale*MLP(conv(x))`."
    from petvlm.dcformer import AxialConv
    axial = lambda layer, x: sum(norm(conv(x)) for conv, norm in layer.axes)
    for layer in m.stem: x = axial(layer, x) if isinstance(layer, AxialConv) else layer(x)
    for stage in m.stages:
        for b in stage:
            x = b.down(x)
            x = x + (b.scale*b.mlp(axial(b.conv, x).permute(0, 2, 3, 4, 1))).permute(0, 4, 1, 2, 3)
    return x.flatten(2).transpose(1, 2)


def softmax_attention(q, k, v, scale, bias=None):
    "With its map."
    logits = scale*(q @ k.transpose(-1, -2))
    return (logits if bias is None else logits + bias).softmax(-1) @ v


def pair_bias(m, h, w):
    "The bias MLP once for every pair of places, `(heads, h*w, h*w)`."
    import torch
    from torch.nn import functional as F
    place = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij'), -1).flatten(0, 1).to(m.net[0].weight)
    x = place[:, None] - place[None]
    x = x.sign()*(x.abs() + 1).log()
    for i, linear in enumerate(m.net): x = linear(x if i == 0 else F.leaky_relu(x, .1))
    return x.permute(2, 0, 1)


def plain_ctvit(m, x):
    "CT-ViT as CT-CLIP runs it: patches, attention within slices, then along columns, scrambled positions in the latter."
    import torch
    from torch.nn import functional as F
    (pd, ph, pw), (d, h, w), heads = m.patch_size, m.grid, m.spatial.layers[0]['attn'].heads
    x = x.unfold(2, pd, pd).unfold(3, ph, ph).unfold(4, pw, pw).permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4)       # (B, d, h, w, voxels)
    x, b = m.stem(x), len(x)
    def position(conv, v):                                                                                       # v (B, d, h, w, C)
        return F.conv3d(F.pad(v.permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias, groups=conv.groups).permute(0, 2, 3, 4, 1)
    def attend(a, v, bias):                                                                                      # v (sequences, tokens, C)
        n = F.layer_norm(v, v.shape[-1:], a.norm.gamma, a.norm.beta)
        q, (k, u) = a.to_q(n), a.to_kv(v).chunk(2, -1)
        q, k, u = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, u))
        q, k = F.normalize(q, dim=-1)*a.q_scale, F.normalize(k, dim=-1)*a.k_scale
        return a.to_out(softmax_attention(q, k, u, 8., bias).transpose(1, 2).flatten(2))
    bias = pair_bias(m.bias, h, w)
    for l in m.spatial.layers:
        x = x + position(l['peg'], x)
        x = x + attend(l['attn'], x.reshape(b*d, h*w, -1), bias).reshape(x.shape)
        x = x + l['ff'](x)
    x = m.spatial.norm(x).permute(0, 2, 3, 1, 4).reshape(b*h*w, d, -1)                                           # columns
    for l in m.temporal.layers:
        x = x + position(l['peg'], x.reshape(b, d, h, w, -1)).reshape(x.shape)                                   # scrambled, as published
        x = x + attend(l['attn'], x, None)
        x = x + l['ff'](x)
    return m.temporal.norm(x).reshape(b, h, w, d, -1).permute(0, 3, 1, 2, 4).flatten(1, 3)


def plain_vit3d(m, x):
    "M3D's ViT: patches, positions, class token, pre-norm blocks."
    import torch
    (pd, ph, pw), b = m.patch_size, len(x)
    x = x.unfold(2, pd, pd).unfold(3, ph, ph).unfold(4, pw, pw).permute(0, 2, 3, 4, 5, 6, 7, 1).reshape(b, -1, pd*ph*pw*m.channels)
    x = torch.cat([m.cls.expand(b, -1, -1), m.embed(x) + m.position], 1)
    for block in m.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + block.attn.out(softmax_attention(q, k, v, q.shape[-1]**-.5).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return m.norm(x)[:, 1:]


# ---- what is measured

def make(s):
    "An encoder whose parts all count: layer scale 1, batch norms that have seen something, a class token, position kernels of ordinary size."
    import torch
    from torch import nn
    from petvlm.dcformer import DCFormer
    from petvlm.encoders import CTViT, ViT3D
    torch.manual_seed(0)
    size, patch = tuple(s.size), (8, 16, 16)
    batch = s.batch or (4 if size[0] == 32 else 1)                        # DCFormer's last lattice is one token there: its batch norms need several
    m = {'dcformer': lambda: DCFormer(size, layer_scale=.5), 'ctvit': lambda: CTViT(size, patch, spatial_depth=s.depth, temporal_depth=s.depth, codebook_size=0),
         'vit3d': lambda: ViT3D(size, patch, depth=s.depth)}[s.encoder]()
    for part in m.modules():
        if isinstance(part, nn.BatchNorm3d): nn.init.normal_(part.running_mean, std=.1); nn.init.uniform_(part.running_var, .5, 2.); nn.init.uniform_(part.weight, .5, 1.5)
        if isinstance(part, nn.Conv3d): part.to(memory_format=torch.channels_last_3d) if s.last else None
    x = torch.rand(batch, 1, *size)
    return m.to(s.device), x.to(s.device)


def work(s, way, m, x):
    "A function that runs the encoder once and returns its output; in a step also the gradients of every weight of a weighted sum of it."
    import torch
    import petvlm.dcformer as dc
    cast = torch.autocast(s.device, torch.bfloat16, enabled=s.dtype == 'bfloat16')
    if way == 'plain': forward = lambda: {'dcformer': plain_dcformer, 'ctvit': plain_ctvit, 'vit3d': plain_vit3d}[s.encoder](m, x)
    else:
        dc.KERNELS = way != 'axes'
        run = torch.compile(m) if way == 'compiled' else m
        forward = lambda: run(x).x
    def inference():
        m.eval(); dc.KERNELS = way != 'axes'
        with torch.inference_mode(), cast: return [forward().float()]
    def step():
        m.train(); m.checkpointing = way == 'checkpointing'; dc.KERNELS = way != 'axes'
        m.zero_grad(set_to_none=True)
        with cast: out = forward().float()
        (out*torch.linspace(-1, 1, out.shape[-1], device=out.device)).mean().backward()
        return [out.detach(), *(p.grad for p in m.parameters())]
    return inference if s.task == 'forward' else step


def difference(found, plain):
    "Largest difference of any output or gradient from the plain one. A gradient is measured by the largest entry of its kind (its own, or a thousandth of the largest of all: a bias before a batch norm has none but rounding)."
    least = max(float(p.abs().max()) for p in plain[1:])/1000 if len(plain) > 1 else 0.
    return max(float((f - p).abs().max())/max(float(p.abs().max()), least) for f, p in zip(found, plain))


def same(s, m, x):
    "In float64, where sums in another order hide nothing: outputs and gradients of all ways are the plain ones. `AssertionError` where they are not."
    exact = [t.clone() for t in work(s, s.ways[0], m, x)()]
    apart = {w: difference(work(s, w, m, x)(), exact) for w in s.ways[1:] if w != 'compiled'}
    assert all(d <= APART for d in apart.values()), f'{s.encoder} {s.task}: outputs or gradients differ from the plain ones by {apart}'


def missed(found, exact):
    "|found - exact| / |exact| of the output, and in a step of all gradients together."
    parts = [(found[:1], exact[:1]), (found[1:], exact[1:])][:min(len(found), 2)]
    return [sum(float((f - e).norm())**2 for f, e in zip(*p))**.5/sum(float(e.norm())**2 for e in p[1])**.5 for p in parts]


def times(s):
    import torch
    s = SimpleNamespace(**s)
    m, x = make(s)
    if s.dtype == 'float32' and tuple(s.size) == SIZES[0] and s.device == 'cpu': same(s, copy.deepcopy(m).double(), x.double())
    if s.device == 'cuda': torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    runs = {w: work(s, w, m, x) for w in s.ways}
    exact, apart = [t.clone() for t in runs[s.ways[0]]()], {}
    full = s.dtype == 'bfloat16' and [t.clone() for t in work(SimpleNamespace(**vars(s) | {'dtype': 'float32'}), s.ways[0], m, x)()]
    misses = {s.ways[0]: missed(exact, full)} if full else {}
    for w in s.ways[1:]:
        found = runs[w](); apart[w] = difference(found, exact)
        if full: misses[w] = missed(found, full); assert all(a < 1.5*b for a, b in zip(misses[w], misses[s.ways[0]])), f'{s.encoder} {s.task} {s.size}: {w} misses float32 by more than plain bfloat16 does: {misses}'
        assert difference(found[:1], exact[:1]) < (1e-3 if not full else .03 if s.task == 'forward' else .1), f'{s.encoder} {s.task} {s.size}: outputs of {w} differ'
    sync = torch.cuda.synchronize if s.device == 'cuda' else None
    return {'seconds': harness.interleaved(runs, s.repeats, warm=0, sync=sync, most=s.most, clock=time.perf_counter if sync else CLOCK), 'apart': apart, 'misses': misses} | ({'peaks': {w: peak_of(runs[w]) for w in s.ways}} if sync else {})      # each has run once


def peak_of(run):
    with harness.peak('cuda') as found: run()
    return found


def memory(s, way):
    s = SimpleNamespace(**s)
    m, x = make(s)
    run = work(s, way, m, x)
    with harness.peak(s.device) as found: run()
    return found


def row(s, results):
    timed, peaks, found = results[0], results[0].get('peaks') or dict(zip(s['ways'], results[1:])), harness.against(results[0]['seconds'])
    for w in s['ways']:
        found[w] |= peaks[w] | {'memory_ratio': peaks[w]['peak_mb']/peaks[s['ways'][0]]['peak_mb'], 'rise_ratio': peaks[w]['rise_mb']/peaks[s['ways'][0]]['rise_mb'], 'apart': timed['apart'].get(w)} | ({'misses': timed['misses'][w]} if w in timed.get('misses', ()) else {})
    return {'encoder': s['encoder'], 'size': s['size'], 'task': s['task'], **({'dtype': s['dtype'], 'batch': s['batch']} if s['device'] == 'cuda' else {}), 'ways': found}


def main(argv=None):
    def add(p):
        p.add_argument('--encoders', nargs='+', choices=('dcformer', 'ctvit', 'vit3d'), default=['dcformer', 'ctvit', 'vit3d'])
        p.add_argument('--sizes', type=int, nargs='+', default=[0, 1, 2], choices=range(len(SIZES)), help='; '.join(f'{i}: {" x ".join(map(str, s))}' for i, s in enumerate(SIZES)))
        p.add_argument('--ways', nargs='+', choices=('plain', 'axes', 'ours', 'checkpointing', 'compiled'), default=['plain', 'ours', 'checkpointing'], help='the first one is what the others are compared with; checkpointing in steps only')
        p.add_argument('--depth', type=int, default=1, help='layers of ViT3D, and of either transformer of CT-ViT')
        p.add_argument('--last', action='store_true', help='convolution weights in channels-last order, as petvlm.train.build has them')
        p.add_argument('--most', type=float, default=6., help='seconds after which no new round begins'); p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
        p.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='bfloat16: autocast'); p.add_argument('--batch', type=int, default=0, help='volumes; 0: 4 at 32 x 64 x 64, else 1')
    a = harness.options(__doc__, __file__, argv, quick=dict(repeats=3, sizes=[0], most=1.), add=add)
    wanted = [{'encoder': e, 'size': SIZES[i], 'task': task, 'ways': [w for w in a.ways if task == 'step' or w != 'checkpointing'], **{k: getattr(a, k) for k in ('repeats', 'depth', 'last', 'most', 'device', 'dtype', 'batch')}}
              for e in a.encoders for i in a.sizes for task in ('forward', 'step')]
    own = a.device == 'cpu'                        # a card's peak can be set back, a process's resident memory hardly
    results = iter(harness.apart(__file__, [call for s in wanted for call in (('times', {'s': s}), *(('memory', {'s': s, 'way': w}) for w in s['ways'] if own))]))
    rows = [row(s, [next(results) for _ in range(1 + own*len(s['ways']))]) for s in wanted]
    harness.show([{'encoder': r['encoder'], 'size': ' x '.join(map(str, r['size'])), 'task': r['task'], 'way': w, **v} for r in rows for w, v in r['ways'].items()],
                 {'encoder': 's', 'size': 's', 'task': 's', 'way': 's', 'seconds': '.3f', 'time_ratio': '.3f', 'ratio_min': '.3f', 'ratio_max': '.3f', 'rise_mb': '.0f', 'memory_ratio': '.3f', 'rise_ratio': '.3f', 'apart': '.0e'})
    harness.write(a, 'encoders, forward and training step', rows)


if __name__ == '__main__': main()
