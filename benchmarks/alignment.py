"""The alignment loss side by side: plain SDPA, the registered function with the loss off, indicator channels, eager maps.

    python benchmarks/alignment.py                      # 6 layers, 512 wide, 8 heads, 256 image tokens; 1,024 and 2,048 tokens
    python benchmarks/alignment.py --lengths 256 --repeats 2 --layers 2      # a quick look
    python benchmarks/alignment.py --device cuda --dtype bfloat16

One JSON: seconds per step (forward + backward; median of interleaved repeats in one process, the order turning, so that a busy machine slows all ways
alike) and peak memory (a process per way and length), each with its ratio to plain SDPA, and how far loss and gradients lie from the eager ones.
`time_ratio` is the median of the ratios within each round.
"""
import argparse, json, os, platform, resource, statistics, subprocess, sys, time
from datetime import datetime, timezone
from pathlib import Path

WAYS = {'sdpa': 'sdpa', 'off': 'petvlm_mass', 'channels': 'petvlm_mass', 'eager': 'eager'}   # way -> attention implementation


def build(a, length):
    "The model, and one batch: ids, where the image stands, which positions are supervised, regions."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    import petvlm.alignment  # noqa: F401  (registers petvlm_mass)
    torch.manual_seed(0)
    config = AutoConfig.for_model('mistral', vocab_size=512, hidden_size=a.width, intermediate_size=2*a.width, num_hidden_layers=a.layers,
                                  num_attention_heads=a.heads, num_key_value_heads=a.kv_heads or a.heads, max_position_embeddings=length, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, a.dtype)).to(a.device).train()
    position = torch.arange(length, device=a.device)[None].expand(a.batch, -1)
    ids = torch.randint(4, 512, (a.batch, length), device=a.device)
    slots = position < a.image_tokens
    regions = (torch.rand(a.batch, a.regions, a.image_tokens, device=a.device) > .9).float()
    return model, (ids, slots, ids.masked_fill(slots, -100), regions)


def masses_from_maps(attentions, slots, queries, regions):
    "What eager attention has to do: equation 10 from the maps, then its sums."
    import torch
    M = torch.stack([m.float().mean(1) for m in attentions]).mean(0)
    M_v = torch.einsum('bqk,bq->bk', M, queries.float()/queries.sum(1, keepdim=True))[slots].unflatten(0, (len(M), -1))
    return (M_v[:, None]*regions).sum(-1), M_v.sum(-1)


def step(way, model, batch):
    "Forward and backward of equation 12 (of `L_llm` alone for the first two ways); returns the loss."
    from petvlm.alignment import alignment_loss, attention_mass, supervised_queries
    from petvlm.losses import lm_loss
    ids, slots, labels, regions = batch
    queries = supervised_queries(labels)
    with attention_mass(regions, slots, queries) as mass:
        extra = {'channels': {'attention_mass': mass}, 'eager': {'output_attentions': True}}.get(way, {})
        out = model(ids, use_cache=False, **extra)
    loss = lm_loss(out.logits, labels)
    if extra:
        masses = mass.masses() if way == 'channels' else masses_from_maps(out.attentions, slots, queries, regions)
        loss = loss + .1*alignment_loss(*masses, 'region', mass.valid).loss
    loss.backward()
    return loss.item()


def run(way, model, batch):
    "One step from clean gradients: seconds and loss."
    import torch
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation(WAYS[way])
    start = time.perf_counter()
    loss = step(way, model, batch)
    if batch[0].is_cuda: torch.cuda.synchronize()
    return time.perf_counter() - start, loss


def times(a, length):
    "Seconds per way, interleaved after one warm-up round; loss and gradient of channels against eager."
    import torch
    model, batch = build(a, length)
    losses, gradients, seconds = {}, {}, {w: [] for w in a.ways}
    for r in range(a.repeats + 1):
        for w in a.ways[r % len(a.ways):] + a.ways[:r % len(a.ways)]:
            s, losses[w] = run(w, model, batch)
            if r: seconds[w].append(s)
            else: gradients[w] = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    out = {'seconds': seconds}
    if {'channels', 'eager'} <= set(a.ways):
        gap = (gradients['channels'] - gradients['eager']).abs().max().item()
        out['channels_minus_eager'] = {'loss': losses['channels'] - losses['eager'], 'largest_gradient_gap': gap, 'largest_gradient': gradients['eager'].abs().max().item()}
    return out


def memory(a, length):
    "Megabytes: at the start (model and batch loaded) and at the peak of one step, of the only way in `a.ways`."
    import psutil, torch
    model, batch = build(a, length)
    start = torch.cuda.memory_allocated() if a.device == 'cuda' else psutil.Process().memory_info().rss
    run(a.ways[0], model, batch)
    peak = torch.cuda.max_memory_allocated() if a.device == 'cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform == 'darwin' else 1024)
    return {'start_mb': start/1e6, 'peak_mb': peak/1e6}


MEASURES = {'times': times, 'memory': memory}


def child(measure, argv, length, ways):
    "Run one measure in a process of its own: a peak is per process, and this parent never loads torch."
    command = [sys.executable, __file__, *argv, '--measure', measure, '--lengths', str(length), '--ways', *ways]
    # glibc raises its mmap threshold as it goes and then keeps freed blocks: resident memory would depend on luck (measured: 1.0 or 1.2 GB for the same step)
    env = os.environ | ({'MALLOC_MMAP_THRESHOLD_': '262144'} if measure == 'memory' else {})
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout.splitlines()[-1])


def row(a, argv, length):
    "Everything measured at one length, with ratios to plain SDPA."
    timed, peaks = child('times', argv, length, a.ways), {w: child('memory', argv, length, [w]) for w in a.ways}
    seconds, first = timed.pop('seconds'), a.ways[0]
    ways = {w: {'seconds': statistics.median(seconds[w]), 'time_ratio': statistics.median(s/t for s, t in zip(seconds[w], seconds[first])), 'all_seconds': seconds[w],
                **peaks[w], 'memory_ratio': peaks[w]['peak_mb']/peaks[first]['peak_mb']} for w in a.ways}
    return {'tokens': length, 'ways': ways, **timed}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(layers=6, width=512, heads=8, kv_heads=0, image_tokens=256, regions=1, batch=1, repeats=5).items(): p.add_argument(f'--{name.replace("_", "-")}', type=int, default=default)
    p.add_argument('--lengths', type=int, nargs='+', default=[1024, 2048])
    p.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS), help='the first one is what ratios refer to')
    p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    p.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.json'))
    p.add_argument('--measure', choices=MEASURES, help=argparse.SUPPRESS)
    return p.parse_args(argv)


def main(argv):
    a = parse(argv)
    if a.measure: return print(json.dumps(MEASURES[a.measure](a, a.lengths[0])))
    settings = {k: v for k, v in vars(a).items() if k not in ('out', 'measure', 'lengths')}
    rows = [row(a, argv, length) for length in a.lengths]
    machine = {'python': platform.python_version(), 'machine': platform.machine(), 'cpus': os.cpu_count(), 'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS')}
    a.out.write_text(json.dumps({'what': 'alignment loss, one training step', 'when': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'settings': settings, 'machine': machine, 'rows': rows}, indent=1) + '\n')
    for r in rows:
        for w, v in r['ways'].items(): print(f"{r['tokens']:6d} {w:9s} {v['seconds']:8.3f} s x{v['time_ratio']:5.2f} {v['peak_mb']:8.0f} MB x{v['memory_ratio']:5.2f}")
    print(a.out)


if __name__ == '__main__': main(sys.argv[1:])
