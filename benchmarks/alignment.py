"""The alignment loss side by side: a training step with it by indicator channels, the same step without it, and with it by eager attention maps.

    python benchmarks/alignment.py                                   # 512 to 8,192 tokens, 1 and 8 regions, heads 64 and 128 wide
    python benchmarks/alignment.py --quick
    python benchmarks/alignment.py --ways sdpa off wide_many two     # also: the function with the loss off; channels through SDPA; channels in a second call
    python benchmarks/alignment.py --device cuda --dtype bfloat16 --layers 4 --width 4096 --heads 128 --ways sdpa channels many wide two eager

Ways: `sdpa` plain, no loss; `off` the registered function without a recorder; `channels` one region; `many` 8 regions; `eager` the same loss of one region from maps (up to --most-maps tokens);
`wide`, `wide_many` channels through SDPA, padded to a multiple of 8; `beside`, `beside_many` the kernel as it is and masses from its log-sum-exp (what `channels`, `many` are on a GPU from 3,072 tokens on, `wide` below); `two`, `two_many` plain attention and a second call for the channels.

One JSON, a row per head width and length (`--second`: the longest of the second width; above `--alone` tokens each step has a process of its own): seconds of a step (forward, backward; of the one thread's own time where OMP_NUM_THREADS is 1; interleaved rounds: median, fastest, slowest, and ratios to plain SDPA within each round), peak memory of a process that does one step, its rise over the loaded model, both with ratios;
what FLOPs alone would cost (`limit`), and how far loss and gradients lie from the eager ones, which is asserted.
"""

import os, time
from types import SimpleNamespace
import harness

WAYS = {'sdpa': ('sdpa', 0), 'off': ('petvlm_mass', 0), 'channels': ('petvlm_mass', 1), 'many': ('petvlm_mass', 8), 'eager': ('eager', 1),   # way -> attention, regions
        'wide': ('wide', 1), 'wide_many': ('wide', 8), 'two': ('two', 1), 'two_many': ('two', 8), 'beside': ('beside', 1), 'beside_many': ('beside', 8)}
CLOCK = time.process_time if os.environ.get('OMP_NUM_THREADS') == '1' else time.perf_counter    # of one thread: its own time, whatever else the machine does
GAP = {'float32': (1e-4, 1e-5), 'bfloat16': (.06, 5e-3)}    # channels against maps: gradients, in largest ones, and loss; found on an H100 in bfloat16, all three ways alike: 0.036 and 2.1e-3


def ready():
    import torch, transformers, petvlm.alignment  # noqa: F401
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register('two', two); AttentionMaskInterface.register('two', sdpa_mask)
    AttentionInterface.register('beside', beside); AttentionMaskInterface.register('beside', sdpa_mask)
    AttentionInterface.register('wide', wide); AttentionMaskInterface.register('wide', sdpa_mask)


def wide(module, *a, **kw):
    "The registered function where everything rides through SDPA."
    import petvlm.alignment as ours
    return _chosen((), module, *a, **kw)


def beside(module, *a, **kw):
    "The registered function with masses from beside the kernel on every device: what a GPU does."
    return _chosen(('cpu', 'cuda'), module, *a, **kw)


def _chosen(devices, module, *a, **kw):
    import petvlm.alignment as ours
    kept = ours._cpu_kernel, ours.BESIDE
    ours._cpu_kernel, ours.BESIDE = lambda *_, **__: False, dict.fromkeys(devices, 0)
    try: return ours.petvlm_mass(module, *a, **kw)
    finally: ours._cpu_kernel, ours.BESIDE = kept


def two(module, query, key, value, attention_mask, scaling=None, attention_mass=None, **kw):
    "Attention as it is, and a second call whose values are the channels alone."
    from torch.nn import functional as F
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kw)
    channels = attention_mass.channels.to(value).expand(-1, value.shape[1], -1, -1)
    seen, _ = sdpa_attention_forward(module, query, key, F.pad(channels, (0, value.shape[-1] - channels.shape[-1])), attention_mask, scaling=scaling, **kw)
    attention_mass.record(module.layer_idx, attention_mass.average(seen))
    return out, None


def build(s):
    "The model, and one batch: ids, where the image stands, which positions are supervised, regions."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    heads = s.width//s.head
    config = AutoConfig.for_model('mistral', vocab_size=512, hidden_size=s.width, intermediate_size=2*s.width, num_hidden_layers=s.layers, num_attention_heads=heads,
                                  num_key_value_heads=heads//s.group, max_position_embeddings=s.length, sliding_window=None)
    with torch.device(s.device): model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, s.dtype)).train()
    return model, batch(s, s.length)


def batch(s, length):
    import torch
    position = torch.arange(length, device=s.device)[None].expand(s.batch, -1)
    ids = torch.randint(4, 512, (s.batch, length), device=s.device)
    slots = position < s.image_tokens
    regions = torch.rand(s.batch, 8, s.image_tokens, device=s.device)
    return ids, slots, ids.masked_fill(slots, -100), (regions == regions.amax(1, keepdim=True)).float()      # eight that share no token


def masses_from_maps(attentions, slots, queries, regions):
    "What eager attention has to do: equation 10 from the maps, then its sums."
    import torch
    M = torch.stack([m.float().mean(1) for m in attentions]).mean(0)
    M_v = torch.einsum('bqk,bq->bk', M, queries.float()/queries.sum(1, keepdim=True))[slots].unflatten(0, (len(M), -1))
    return (M_v[:, None]*regions).sum(-1), M_v.sum(-1)


def step(way, model, data):
    "Forward and backward of equation 12 (of `L_llm` alone without the loss); returns the loss."
    from petvlm.alignment import alignment_loss, attention_mass, supervised_queries
    from petvlm.losses import lm_loss
    implementation, n = WAYS[way]
    ids, slots, labels, regions = data
    regions, queries = regions[:, :max(n, 1)], supervised_queries(labels)
    with attention_mass(regions, slots, queries) as mass:
        extra = {} if not n else {'output_attentions': True} if implementation == 'eager' else {'attention_mass': mass}
        out = model(ids, use_cache=False, **extra)
    loss = lm_loss(out.logits, labels)
    if n:
        masses = masses_from_maps(out.attentions, slots, queries, regions) if implementation == 'eager' else mass.masses()
        loss = loss + .1*alignment_loss(*masses, 'region', mass.valid).loss
    loss.backward()
    return loss.item()


def prepared(way, model):
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation(WAYS[way][0])


def agree(s, model, data, ways):
    "Loss and gradients of the ways against maps, before anything is timed. `AssertionError` where they differ."
    import torch
    found = {}
    for way in ways:
        prepared(way, model)
        found[way] = step(way, model, data), torch.cat([p.grad.float().flatten() for p in model.parameters()])
    exact = found['eager']
    gaps = {w: {'loss': abs(loss - exact[0]), 'gradient': (g - exact[1]).abs().max().item()} for w, (loss, g) in found.items() if WAYS[w][1] == 1 and w != 'eager'}
    largest = exact[1].abs().max().item()
    gradient, loss = GAP[s.dtype]
    assert all(g['gradient'] < gradient*largest and g['loss'] < loss for g in gaps.values()), gaps
    return {'largest_gradient': largest, **gaps}


def times(s, ways):
    "Seconds per way in every round, and the gaps at this length where maps are among the ways."
    import torch
    s = SimpleNamespace(**s)
    model, data = build(s)
    short = batch(s, min(s.length, 2*s.image_tokens))
    agreed = agree(s, model, data if s.length <= 1024 else short, ways) if 'eager' in ways else None
    for way in ways: prepared(way, model); step(way, model, short)                # every kernel once
    before = lambda way: prepared(way, model)
    sync = torch.cuda.synchronize if s.device == 'cuda' else None
    seconds = harness.interleaved({w: (lambda w=w: step(w, model, data)) for w in ways}, s.repeats, warm=int(s.length <= 2048 or s.device == 'cuda'), before=before, sync=sync, most=s.most, clock=time.perf_counter if sync else CLOCK)
    found = {'seconds': seconds, 'agree': agreed, 'kernel': kernels(s)}
    if s.device == 'cuda':                                                        # the allocator's peak can be set back: no process of its own
        found['peaks'] = {}
        for way in ways:
            prepared(way, model)
            with harness.peak('cuda') as m: step(way, model, data)
            found['peaks'][way] = m
    return found


def kernels(s):
    "What SDPA chooses for heads as wide as they are and 8 wider, and whether the strip is Triton's."
    import torch
    from petvlm.imagemass import by_triton
    from torch.nn.attention import SDPBackend
    q = lambda d: torch.empty(s.batch, s.width//s.head, s.length, d, device=s.device, dtype=getattr(torch, s.dtype), requires_grad=True)
    of = lambda d: SDPBackend(torch._fused_sdp_choice(q(d), q(d), q(d), None, 0., True, scale=1.)).name
    return {'plain': of(s.head), 'wide': of(s.head + 8), 'strip': 'triton' if by_triton(q(s.head), None) else 'torch'}


def memory(s, way):
    "Megabytes: with model and batch loaded, and at the peak of one step."
    s = SimpleNamespace(**s)
    model, data = build(s)
    prepared(way, model)
    with harness.peak(s.device) as m: start = CLOCK(); step(way, model, data); seconds = CLOCK() - start
    return m | {'seconds': seconds}


def products(s):
    "Multiplications of the linear layers, forward and backward, and of one product of attention: a causal half of S x S."
    return 3*s['length']*s['layers']*(4 - 2*(1 - 1/s['group']) + 6)*s['width']**2 + 3*s['length']*512*s['width'], s['layers']*s['length']**2/2*s['width']


def limit_on_card(s, way):
    "What FLOPs alone allow, ratio to plain: `two` doubles attention, `wide` has heads 8 or 16 wider in all 7 products, beside the kernel 5 products of text queries with image tokens are added."
    (linear, product), n = products(s), WAYS[way][1] + 1
    strip = s['layers']*max(s['length'] - s['image_tokens'], 0)*s['image_tokens']*s['width']
    wide = way.startswith('wide') or not way.startswith(('two', 'beside')) and s['length'] < 3072
    more = 7*product if way.startswith('two') else 7*product*8*-(-n//8)/s['head'] if wide else 5*strip
    return 1 + more/(linear + 7*product)


def limit(s, regions):
    "What FLOPs alone allow, ratio to plain: 2 products forward with `regions` + 1 channels more, 5 backward with one more; linear layers thrice."
    linear, product = products(s)
    return (linear + product*(2*(1 + (regions + 1)/s['head']) + 5*(1 + 1/s['head'])))/(linear + 7*product)


def calls(s, ways, alone):
    "What is asked for one row: long sequences are timed where their memory is, in two rounds of processes."
    if s['device'] == 'cuda': return [('times', {'s': s, 'ways': ways})]
    each = [('memory', {'s': s, 'way': w}) for w in ways]
    return each + each[::-1] if s['length'] > alone else [('times', {'s': s, 'ways': ways}), *each]


def row(s, ways, results):
    if 'peaks' in results[0]: timed, peaks = results[0], results[0]['peaks']
    elif len(results) > len(ways) + 1:
        peaks, again = dict(zip(ways, results)), dict(zip(ways, results[::-1]))
        timed = {'seconds': {w: [peaks[w]['seconds'], again[w]['seconds']] for w in ways}, 'agree': None}
    else: timed, peaks = results[0], dict(zip(ways, results[1:]))
    first, found = ways[0], harness.against(timed['seconds'])
    for w in ways:
        found[w] |= {k: v for k, v in peaks[w].items() if k != 'seconds'} | {'memory_ratio': peaks[w]['peak_mb']/peaks[first]['peak_mb'], 'rise_ratio': peaks[w]['rise_mb']/peaks[first]['rise_mb']}
        if s['device'] == 'cuda' and w not in (first, 'eager'): found[w]['limit'] = limit_on_card(s, w)
        elif w in ('channels', 'many'): found[w]['limit'] = limit(s, WAYS[w][1])
    return {'head': s['head'], 'tokens': s['length'], 'ways': found, 'agree': timed['agree'], 'kernel': timed.get('kernel')}


def main(argv=None):
    def add(p):
        for name, default in dict(layers=1, width=512, image_tokens=256, batch=1, group=1, most_maps=2048, alone=4096, second=4096).items(): p.add_argument(f'--{name.replace("_", "-")}', type=int, default=default)
        p.add_argument('--lengths', type=int, nargs='+', default=[512, 1024, 2048, 4096, 8192])
        p.add_argument('--heads', type=int, nargs='+', default=[64, 128], help='widths of a head; the number of heads is width / head')
        p.add_argument('--ways', nargs='+', choices=WAYS, default=['sdpa', 'channels', 'many', 'eager'], help='the first one is what ratios refer to')
        p.add_argument('--most', type=float, default=20., help='seconds after which no new round begins')
        p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu'); p.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    a = harness.options(__doc__, __file__, argv, quick=dict(repeats=2, lengths=[512, 1024], layers=1, heads=[64], most=4.), add=add)
    wanted = []
    for head in a.heads:
        for length in [n for n in a.lengths if head == a.heads[0] or n <= a.second]:
            s = {k: getattr(a, k) for k in ('layers', 'width', 'image_tokens', 'batch', 'group', 'repeats', 'most', 'device', 'dtype')} | {'head': head, 'length': length}
            wanted.append((s, [w for w in a.ways if w != 'eager' or length <= a.most_maps]))
    asked = [calls(s, ways, a.alone) for s, ways in wanted]
    results = iter(harness.apart(__file__, [call for each in asked for call in each]))
    rows = [row(s, ways, [next(results) for _ in each]) for (s, ways), each in zip(wanted, asked)]
    harness.show([{'head': r['head'], 'tokens': r['tokens'], 'way': w, **v} for r in rows for w, v in r['ways'].items()],
                 {'head': 'd', 'tokens': 'd', 'way': 's', 'seconds': '.3f', 'time_ratio': '.3f', 'ratio_min': '.3f', 'ratio_max': '.3f', 'limit': '.3f', 'peak_mb': '.0f', 'memory_ratio': '.3f', 'rise_ratio': '.3f'})
    harness.write(a, 'alignment loss, one training step', rows)


if __name__ == '__main__': main()
