"""Prepared volumes to batches, side by side: petvlm's memory-mapped half precision, MONAI's CacheDataset and PersistentDataset.

    python benchmarks/data.py                                       # 4 regions of PET and CT, 128 x 256 x 256, batches of 2
    python benchmarks/data.py --shape 140 480 480 --regions 2       # ViPET-VLM's published size
    python benchmarks/data.py --quick
    python benchmarks/data.py --device cuda --batches 12 --limit 60 # does the card wait? (and --device cpu --card: the same code without a card); 7 to 9 s a line on an H100 with --batches 30

The job: batches of PET and CT `(B, 1, D, H, W)` float32, each voxel as its deviation from what is usual there, moved by up to one voxel. petvlm reads what `prepare` wrote (float16, memory-mapped) and standardises
at every visit. CacheDataset keeps the finished float32 tensors in memory and only moves them; PersistentDataset keeps them on disk, a file a region. Both have MONAI's fastest settings (no copy of the cache) and
move by the same code. `before`: petvlm's own code until 2026-11-26, the formula in one line and every voxel named. `halves`: only reading, moving and stacking float16, what would be left if the device standardised.
All files are in the page cache, as an epoch after the first finds them. Seconds are CPU time of one process.

Waiting: one worker process makes batches ahead while a consumer sleeps for a step's time; how long it waits on top of that. What published sizes ask for is arithmetic (`published`), from their FLOPs.
"""
import functools, importlib.util, json, shutil, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import harness
from table import line

WAYS = ('CacheDataset', 'PersistentDataset', 'petvlm', 'before', 'halves')
INPUTS, SUV_MAX, WINDOW = ('pet', 'ct'), 10., (-1000., 1000.)
PEAK, SHARE = 989e12, .4              # H100 SXM, dense bf16 (NVIDIA's data sheet); what large language models reach of it in training
PUBLISHED = {                         # stage -> voxels of an item, parameters of the language model, tokens of an item, FLOPs per parameter and token (2 forward, 2 back through frozen weights, 2 for gradients of moving ones)
    'vipet instruct (PET, CT and SUV of 140 x 480 x 480; Mistral-7B, LoRA)': (3*140*480*480, 7.24e9, 896 + 200, 4),
    'med3dvlm instruct (CT of 128 x 256 x 256; Qwen2.5-7B, LoRA)': (128*256*256, 7.6e9, 256 + 200, 4),
    'petar full (six images of 32 x 256 x 256; Phi-3-mini, all of it)': (6*32*256*256, 3.8e9, 256 + 150, 6)}


def ready():
    import torch, petvlm.datasets, petvlm.dcformer  # noqa: F401
    if importlib.util.find_spec('monai'): import monai.data, monai.transforms  # noqa: F401  (the card's part has no peer)


# ---- the same regions for all: float16 as `prepare` writes them, float32 in SUV and HU for MONAI

def make(folder, shape, regions, peers=True):
    "Bodies of noise: PET in SUVbw, CT in HU."
    import numpy as np
    from petvlm.prepare import _header
    folder, rng = Path(folder), np.random.default_rng(0)
    (folder/'ours').mkdir(parents=True); (folder/'theirs').mkdir()
    _, h, w = np.ogrid[:shape[0], :shape[1], :shape[2]]
    body = ((h/shape[1] - .5)/.35)**2 + ((w/shape[2] - .5)/.45)**2 < 1
    files = {k: open(folder/f'ours/{k}.npy', 'wb') for k in INPUTS}
    for i in range(regions):
        full = {'pet': np.where(body, rng.standard_exponential(shape, np.float32), np.float32(0)), 'ct': np.where(body, 40 + 120*rng.standard_normal(shape, np.float32), np.float32(-1000))}
        lo, hi = WINDOW
        kept = {'pet': np.clip(full['pet']/SUV_MAX, 0, 3).astype(np.float16), 'ct': np.clip((full['ct'] - lo)/(hi - lo), 0, 1).astype(np.float16)}       # as petvlm.prepare.scaled
        for k in INPUTS:
            if peers: np.save(folder/f'theirs/{k}_{i}.npy', full[k])
            if not i: _header(files[k], kept[k], regions)
            files[k].write(kept[k].data)
    for f in files.values(): f.close()
    np.savez(folder/'ours/standard.npz', **{f'{k}.chest': np.stack([.1*rng.standard_normal(shape, np.float32), .2 + rng.random(shape, np.float32)]) for k in INPUTS})
    record = lambda i: dict(row=i, split='train', region='chest', patient=f'p{i}', text='-', findings=[], findings_from='report')
    (folder/'ours/rows.jsonl').write_text(''.join(json.dumps(record(i)) + '\n' for i in range(regions)), encoding='utf-8')
    return sum(p.stat().st_size for p in (folder/'ours').glob('*.npy'))


# ---- the ways: each a data set of items {'pet', 'ct'}

def prepared(folder, length, shift=1):
    from petvlm.datasets import Items, Rows
    return Items(Rows(Path(folder)/'ours', 'train', SUV_MAX), length, seed=1, inputs=INPUTS, ask=lambda rng, record: '-', shift=shift)

class Mapped:
    "Items of petvlm read by another `image(rows, row, name, by)`."
    def __init__(self, items, image): self.items, self.image = items, image
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        row, by, _ = self.items._drawn(i)
        return {k: self.image(self.items.rows, row, k, by)[None] for k in INPUTS}

def as_before(rows, row, name, by):
    import numpy as np
    from petvlm.prepare import feature
    mean, sd = rows.standard[f'{name}.chest']
    x = np.clip((feature(rows.arrays[name][row], name, SUV_MAX) - mean)/sd, -4, 8)
    return x[np.ix_(*(np.clip(np.arange(n) - b, 0, n - 1) for n, b in zip(x.shape, by)))]

def halves(rows, row, name, by):
    import numpy as np
    from petvlm.datasets import _shift
    return _shift(np.asarray(rows.arrays[name][row]), by)

def monai(way, folder, regions, moved=True):
    "CacheDataset or PersistentDataset over the same regions; the cache is filled when it returns."
    import numpy as np, torch
    from monai.data import CacheDataset, PersistentDataset
    from monai.transforms import Compose, RandomizableTransform, Transform
    from petvlm.datasets import _shift
    from petvlm.prepare import feature
    with np.load(Path(folder)/'ours/standard.npz') as z: usual = {k: z[f'{k}.chest'] for k in INPUTS}
    lo, hi = WINDOW

    class Read(Transform):
        def __call__(self, item):
            x = {k: np.load(item[k]) for k in INPUTS}
            stored = {'pet': np.clip(x['pet']/SUV_MAX, 0, 3), 'ct': np.clip((x['ct'] - lo)/(hi - lo), 0, 1)}
            return {k: torch.from_numpy(np.clip((feature(stored[k], k, SUV_MAX) - usual[k][0])/usual[k][1], -4, 8)[None]) for k in INPUTS}

    class Moved(RandomizableTransform):
        def __call__(self, item):
            by = self.R.randint(-1, 2, 3)
            return {k: torch.from_numpy(_shift(x[0].numpy(), by)[None]) for k, x in item.items()}

    data = [{k: str(Path(folder)/f'theirs/{k}_{i}.npy') for k in INPUTS} for i in range(regions)]
    steps = Compose([Read(), *([Moved()] if moved else [])])
    if way == 'CacheDataset': return CacheDataset(data, steps, progress=False, copy_cache=False)
    kept = PersistentDataset(data, steps, Path(folder)/'cache')
    for i in range(regions): kept[i]
    return kept

def dataset(way, folder, regions, length):
    items = functools.partial(prepared, folder, length)
    return {'petvlm': items, 'before': lambda: Mapped(items(), as_before), 'halves': lambda: Mapped(items(), halves)}.get(way, lambda: monai(way, folder, regions))()

def collate(items):
    import torch
    return {k: torch.stack([torch.as_tensor(x[k]) for x in items]) for k in INPUTS}

def loader(way, folder, regions, batch, batches, **kw):
    from torch.utils.data import DataLoader
    found = dataset(way, folder, regions, batch*batches)
    return DataLoader(found, batch_size=batch, sampler=[i % len(found) for i in range(batch*batches)], collate_fn=collate, **kw)


# ---- what is measured

def differences(folder, regions):
    "How far petvlm's tensors lie from those that MONAI keeps: the loss by half precision, in standard deviations."
    ours, theirs = prepared(folder, regions, shift=0), monai('CacheDataset', folder, regions, moved=False)
    return {k: max(float(abs(ours[i][k] - theirs[ours.row(i)][k].numpy()).max()) for i in range(regions)) for k in INPUTS}

def times(folder, regions, batch, repeats):
    "CPU seconds of all batches of one epoch, every way."
    loaders = {w: loader(w, folder, regions, batch, regions//batch) for w in WAYS}
    def epoch(way):
        for _ in loaders[way]: pass
    return harness.interleaved({w: functools.partial(epoch, w) for w in WAYS}, repeats, clock=time.process_time)

def memory(way, folder, regions, batch):
    with harness.peak() as m:
        for _ in loader(way, folder, regions, batch, regions//batch): pass
    return m

def waiting(way, folder, regions, batch, step, batches):
    "Seconds that a consumer with steps of `step` seconds waits for each batch, with one worker process."
    it, waited = iter(loader(way, folder, regions, batch, batches + 2, num_workers=1, prefetch_factor=2)), []
    next(it); time.sleep(step)                       # the worker's start is not counted
    for _ in range(batches):
        start = time.perf_counter(); next(it); waited.append(time.perf_counter() - start); time.sleep(step)
    return waited


# ---- a card beside which batches are made

FEEDS = (dict(workers=8, pinned=True), dict(workers=8, pinned=True, way='halves'), dict(workers=14, pinned=True), dict(workers=4, pinned=True), dict(workers=8, pinned=False), dict(workers=0, pinned=False))     # what is asked for first: a card's time may end

def fed(batches, device, pinned):
    "Batches on the device. Pinned: the next one is copied by a stream of its own while this one is worked on."
    import torch
    if device == 'cpu' or not pinned:
        for b in batches: yield {k: x.to(device) for k, x in b.items()}
        return
    side, coming = torch.cuda.Stream(), None
    for b in batches:
        with torch.cuda.stream(side): following = {k: x.to(device, non_blocking=True) for k, x in b.items()}
        if coming is not None: yield coming
        torch.cuda.current_stream().wait_stream(side)
        for x in following.values(): x.record_stream(torch.cuda.current_stream())
        coming = following
    if coming is not None: yield coming


def steps_of(step, shape, device):
    "A function of a batch: DCFormer on PET and CT, forward and backward (`encode`), or matrix products for so many seconds an item."
    import torch
    if step == 'encode':
        from petvlm.dcformer import DCFormer
        m = DCFormer(tuple(shape)).to(device).train()
        def encode(b):
            m.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16): loss = sum(m(x.float()).x.float().square().mean() for x in b.values())
            loss.backward()
        return encode
    a = torch.randn(*[4096 if device == 'cuda' else 256]*2, device=device, dtype=torch.bfloat16)
    def product(): return a @ a
    for _ in range(3): product()
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    sync(); start = time.perf_counter()
    for _ in range(50): product()
    sync(); each = (time.perf_counter() - start)/50
    def busy(b):
        for _ in range(max(1, round(step*len(b['pet'])/each))): product()
    return busy


def card(folder, regions, batch, shape, step, batches, device, workers, pinned, way='petvlm'):
    "Seconds of a step and between steps, as the card sees them: from the end of one to the beginning of the next, copies included."
    import torch
    def mark():
        if device == 'cpu': return time.perf_counter()
        e = torch.cuda.Event(enable_timing=True); e.record()
        return e
    between = (lambda a, b: b - a) if device == 'cpu' else lambda a, b: a.elapsed_time(b)/1e3
    work, marks, kw = steps_of(step, shape, device), [], {'num_workers': workers, 'prefetch_factor': 3} if workers else {}
    for b in fed(loader(way, folder, regions, batch, batches + 4, pin_memory=pinned and device == 'cuda', **kw), device, pinned):
        start = mark(); work(b); marks.append((start, mark()))
        if device == 'cuda' and len(marks) > 1: marks[-2][1].synchronize()      # one step ahead of the card, no more
    if device == 'cuda': torch.cuda.synchronize()
    marks = marks[4:]                                                           # workers and kernels have started
    busy, gaps = [between(*m) for m in marks], [between(a[1], b[0]) for a, b in zip(marks, marks[1:])]
    return {'step_seconds': harness.spread(busy)['median'], 'gap_seconds': harness.spread(gaps)['median'], 'gap_most': max(gaps), 'waiting': sum(gaps)/between(marks[0][0], marks[-1][1])}


def main_card(a):
    "What a card waits for, with each way of feeding it."
    shape, room = tuple(a.shape), tempfile.mkdtemp()
    steps = ['encode', *a.card_steps]
    asked = [dict(step=s, **f) for f in FEEDS for s in steps if s == 'encode' or f in FEEDS[:3]]
    asked = [x | {'workers': min(x['workers'], a.workers)} for x in asked]
    base = dict(folder=room, regions=a.regions, batch=a.batch, shape=shape, batches=a.batches, device=a.device)
    try: _, *found = harness.apart(__file__, [('make', {'folder': room, 'shape': shape, 'regions': a.regions, 'peers': False}), *(('card', base | x) for x in asked)], a.limit)
    finally: shutil.rmtree(room)
    rows = [{'way': 'petvlm', **x, **f} for x, f in zip(asked, found) if f]
    if not rows: raise SystemExit(f'nothing was measured within {a.limit} s')
    size = ' x '.join(map(str, shape))
    told = lambda r: f"{r['workers']} workers, {'pinned, copied ahead' if r['pinned'] else 'pageable'}{', standardised on the card' if r['way'] == 'halves' else ''}"
    named = lambda s: 'DCFormer on PET and CT, forward and backward' if s == 'encode' else f'{s:g} s an item of matrix products'
    out = [line(f"{a.batch} PET/CT regions of {size} a step; {named(r['step'])}; {told(r)}", ('step', r['step_seconds']), ('wait', r['gap_seconds']), None, bar='waits at most 2 % of the time' if r['workers'] and r['pinned'] and r['way'] == 'petvlm' else '',
                met=r['waiting'] <= .02 if r['workers'] and r['pinned'] and r['way'] == 'petvlm' else None, note=f"{100*r['waiting']:.1f} % of the time") for r in rows]
    harness.show(rows, {'step': '', 'way': 's', 'workers': 'd', 'pinned': '', 'step_seconds': '.4f', 'gap_seconds': '.5f', 'gap_most': '.4f', 'waiting': '.3f'})
    harness.write(a, 'prepared volumes to a card', rows, table=out, limits=['Files are in the page cache; steps and waits are read from events on the card.' if a.device == 'cuda' else 'Without a card: clock times of one process.'])


def published(voxels_per_second):
    "What a card asks for at published sizes, and how many of these cores feed it."
    out = []
    for name, (voxels, parameters, tokens, per) in PUBLISHED.items():
        seconds = per*parameters*tokens/(PEAK*SHARE)
        out.append({'stage': name, 'card_seconds_per_item': seconds, 'core_seconds_per_item': voxels/voxels_per_second, 'cores_per_card': voxels/voxels_per_second/seconds, 'stored_gb_per_second': 2*voxels/seconds/1e9})
    return out


def table(a, seconds, peaks, waits, wanted):
    volumes, one = len(INPUTS)*a.regions, lambda w: [s/(len(INPUTS)*a.regions) for s in seconds[w]]
    size = ' x '.join(map(str, a.shape))
    out = [line(f'a volume of {size}, stored to batch', (w, one(w)), ('petvlm', one('petvlm')), note=why) for w, why in
           (('CacheDataset', f"keeps every finished volume in memory: {4*a.shape[0]*a.shape[1]*a.shape[2]/1e6:.0f} MB each, 1,000 PET/CT regions {8*a.shape[0]*a.shape[1]*a.shape[2]/1e6:.0f} GB; petvlm computes it again at every visit"),
            ('PersistentDataset', 'reads twice the bytes, and a copy of all data as float32 lies on the disk'), ('before', 'the same numbers, bit for bit'))]
    out += [line('memory that an epoch takes', (w, peaks[w]['rise_mb']), ('petvlm', peaks['petvlm']['rise_mb']), unit='MB', note=f'{volumes} volumes; pages of mapped files are counted, which the kernel may drop') for w in WAYS[:2]]
    for step in a.steps:
        w = {x['way']: x for x in waits if x['step'] == step}
        out.append(line(f'wait for a batch of {a.batch} regions beside steps of {step:g} s, one worker', ('CacheDataset', w['CacheDataset']['median']), ('petvlm', w['petvlm']['median']), None, bar='none (at most 2 % of a step)', met=w['petvlm']['median'] <= .02*step,
                        note=f"CacheDataset, whose worker computes nothing, waits {w['CacheDataset']['median']:.3f} s: handing {len(INPUTS)*4*a.batch*a.shape[0]*a.shape[1]*a.shape[2]/1e6:.0f} MB over and releasing the batch before, beside a card the work of another thread"))
    out += [line(f"a card at 40 % of its peak never waits: {x['stage']}", ('one core, per item', x['core_seconds_per_item']), ('card, per item', x['card_seconds_per_item']), None, bar='worker cores a card needs', note=f"{x['cores_per_card']:.1f} cores; {x['stored_gb_per_second']:.1f} GB/s of float16 from disk or page cache; arithmetic from the measured voxels per second, no card was at hand") for x in wanted]
    return out


def main(argv=None):
    def add(p):
        p.add_argument('--shape', type=int, nargs=3, default=[128, 256, 256]); p.add_argument('--regions', type=int, default=4); p.add_argument('--batch', type=int, default=2)
        p.add_argument('--steps', type=float, nargs='+', default=[.5, 1.], help='seconds of a step beside which batches are made'); p.add_argument('--batches', type=int, default=3, help='batches waited for'); p.set_defaults(repeats=3)
        p.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='cuda: what a card waits for, no peers'); p.add_argument('--card', action='store_true', help='the same on --device cpu')
        p.add_argument('--card-steps', type=float, nargs='*', default=[.035, .08], help='seconds of an item: Med3DVLM and ViPET-VLM as published, on an H100 at 40 %% of its peak'); p.add_argument('--workers', type=int, default=14, help='at most'); p.add_argument('--limit', type=float, help=harness.LIMIT + ' (card)')
    a = harness.options(__doc__, __file__, argv, quick={'shape': [32, 64, 64], 'regions': 4, 'repeats': 2, 'steps': [.05], 'batches': 3}, add=add)
    if a.device == 'cuda' or a.card: return main_card(a)
    shape, room = tuple(a.shape), tempfile.mkdtemp()
    same, sizes = dict(folder=room, regions=a.regions), dict(folder=room, regions=a.regions, batch=a.batch)
    waits = [('waiting', sizes | {'way': w, 'step': s, 'batches': a.batches}) for s in a.steps for w in WAYS[:3]]
    try:
        stored, seconds, off, *rest = harness.apart(__file__, [('make', {'folder': room, 'shape': shape, 'regions': a.regions}), ('times', sizes | {'repeats': a.repeats}), ('differences', same),
                                                               *[('memory', sizes | {'way': w}) for w in WAYS[:3]], *waits])
    finally: shutil.rmtree(room)
    peaks = dict(zip(WAYS, rest[:3]))
    found = [{'way': kw['way'], 'step': kw['step'], **harness.spread(w), 'all': w} for (_, kw), w in zip(waits, rest[3:])]
    voxels = len(INPUTS)*a.regions*shape[0]*shape[1]*shape[2]
    rate = {w: voxels/harness.spread(s)['median'] for w, s in seconds.items()}
    wanted = published(rate['petvlm'])
    rows = [{'way': w, **x, 'voxels_per_second': rate[w], 'float32_gb_per_second': 4*rate[w]/1e9, **({'rise_mb': peaks[w]['rise_mb']} if w in peaks else {})} for w, x in harness.against(seconds).items()]
    limits = [f"stored: {stored/1e6:.0f} MB float16 for {len(INPUTS)*a.regions} volumes; float16 moves the deviations by at most {off['pet']:.4f} (PET) and {off['ct']:.4f} (CT) standard deviations.",
              f"one core makes {rate['petvlm']/1e6:.0f} million voxels a second ({2*rate['petvlm']/1e9:.2f} GB/s read, {4*rate['petvlm']/1e9:.2f} GB/s written); {rate['halves']/1e6:.0f} million if the device standardised. Files are in the page cache: a disk has to give what the table's last column says."]
    harness.write(a, 'prepared volumes to batches', rows, table=table(a, seconds, peaks, found, wanted), waiting=found, published=wanted, differences=off, limits=limits)
    harness.show(rows, {'way': 's', 'seconds': '8.3f', 'time_ratio': '6.2f', 'voxels_per_second': '12.3g', 'rise_mb': '8.0f'})
    harness.show(found, {'way': 's', 'step': '6.2f', 'median': '8.3f', 'max': '8.3f'})
    harness.show(wanted, {'stage': 's', 'card_seconds_per_item': '8.4f', 'core_seconds_per_item': '8.4f', 'cores_per_card': '6.1f', 'stored_gb_per_second': '6.2f'})
    for text in limits: print(text)


if __name__ == '__main__': main()
