"""The slowest stages of the phantom's reproduction, with what was done for them and without: seconds of a step, and of the whole stage.

    dvc repro prepare                # once: what the stages read
    python benchmarks/stages.py

Ways: `plain` items in the order in which they are drawn, convolutions (weights and what they read) as PyTorch lays them, glibc as it is; `petvlm` batches of like length where a language model is taught (`petvlm.trainer.by_length`), convolutions channels-last,
freed memory kept (`petvlm.tasks.HELD`). The items are the same: `--windows` windows of 16 batches, after one that is not counted. Each measure is a process of its own and counts its own time; ways and stages in turn. Stages begin from fresh weights, which cost a step the same.
"""
import csv, dataclasses, json, os, subprocess, sys, tempfile, time
from pathlib import Path
import harness
from table import line

WAYS = ('plain', 'petvlm')


def spent():
    "Seconds of every step of the last `make repro`, slowest first: `{name: seconds}`."
    with open(Path(__file__).parent.parent/'tables/spent-phantom.csv', newline='') as f: return dict(sorted(((r['name'], float(r['seconds'])) for r in csv.DictReader(f)), key=lambda x: -x[1]))

def slowest(n=3): return [k.removeprefix('train-') for k in spent() if k.startswith('train-')][:n]


WHY = ["a language model's step is matrix products (half of it), attention (a sixth), norms and activations, on a CPU without AVX-512 or bfloat16 units; what could be saved was padding: texts of a batch are of like length now. Between windows of 16 batches nothing is moved, so that a stage sees the same items in nearly the same order.",
       "an encoder's step is its stem: three-dimensional convolutions of one channel to a few (two fifths to a half). Channels-last they are worth what the lines say (the first one of 8 volumes of 24 x 32 x 32, forward and back: 59 ms as PyTorch lays it, 22 so). What is left is the number of steps; fewer cost findings (README)."]


def as_laid(model):
    "Convolutions of `model` in the layout that PyTorch gives them, weights and what stems read."
    import torch
    from torch.nn import functional as F
    from petvlm import stem
    def forward(self, x):
        x = torch.cat([x, stem._places(x.shape[2:], x.device).to(x.dtype).expand(len(x), -1, -1, -1, -1)], 1)
        for conv, stride in zip(self.convs, self.strides): x = F.gelu(F.max_pool3d(conv(x), stride))
        return self.out(x.permute(0, 2, 3, 4, 1))
    stem.ConvStem.forward = forward
    for m in model.modules():
        if isinstance(m, torch.nn.Conv3d): m.to(memory_format=torch.contiguous_format)


def measure(node, way, windows):
    "Mean seconds of a step of a stage, and how much of its batches is padding."
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from petvlm.datasets import Items, Rows
    from petvlm.processor import PetVLMProcessor
    from petvlm.train import ask, build, collator, head_lattices, image_count, images_read, paths, plan, resolve, run_stage
    from petvlm.trainer import WINDOW, by_length
    torch.set_num_threads(1)
    where, item, clock, size = paths('phantom'), plan(scale='phantom')[node], [], [0, 0]
    cfg = resolve(item['point'], 'phantom')
    prepared, whole = where.prepared(cfg.data), cfg.stages[item['stage']]
    stage = dataclasses.replace(whole, steps=(windows + 1)*WINDOW)
    tokenizer = AutoTokenizer.from_pretrained(prepared/'tokenizer')
    model = build(cfg, tokenizer)
    if stage.lora: model.adapt(cfg.lora)
    if way == 'plain': as_laid(model)
    processor = PetVLMProcessor(tokenizer, image_count(stage, model))
    images = images_read(model, cfg, stage)
    items = Items(Rows(prepared, stage.split, cfg.data.suv_max), stage.steps*stage.batch, cfg.seed, images, stage.lattice or model.lattices, head_lattices(model, stage), stage.tasks, ask(cfg.data), cfg.data.shift)
    if way == 'petvlm' and stage.objective.get('lm') and not stage.lora: items = torch.utils.data.Subset(items, by_length([items.letters(i) for i in range(len(items))], stage.batch, cfg.seed))
    collate = collator(processor, stage, images)
    def counted(batch):
        out = collate(batch); mask = out.get('attention_mask')
        if mask is not None: size[0] += mask.numel(); size[1] += int(mask.sum())
        return out
    class Clock(TrainerCallback):
        def on_step_end(self, *a, **kw): clock.append(time.process_time())
    with tempfile.TemporaryDirectory() as work: run_stage(model, stage, items, counted, Path(work), cfg.seed, callbacks=[Clock()], save_steps=10**9)
    return {'seconds': (clock[-1] - clock[WINDOW - 1])/(len(clock) - WINDOW), 'steps': whole.steps, 'batch': whole.batch, 'padding': 1 - size[1]/size[0] if size[0] else None}


def apart(node, way, windows):
    "`measure` in a process whose memory is kept, or not, from its start."
    from petvlm.tasks import HELD
    env = {k: v for k, v in os.environ.items() if k not in HELD} | (HELD if way == 'petvlm' else {}) | {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
    done = subprocess.run([sys.executable, __file__, '--measure', node, way, '--windows', str(windows)], env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode: raise SystemExit(f'{node}, {way}: a measure failed (see above)')
    return json.loads(done.stdout.splitlines()[-1])


def wanting(nodes):
    "The prepared folders that are not there."
    from petvlm.config import paths, resolve
    from petvlm.graph import plan
    where, known = paths('phantom'), plan(scale='phantom')
    return sorted({str(p) for n in nodes if not ((p := where.prepared(resolve(known[n]['point'], 'phantom').data))/'tokenizer').is_dir()})


def main(argv=None):
    def add(p):
        p.add_argument('--stages', nargs='+', default=slowest(), help='default: the slowest three of tables/spent-phantom.csv'); p.add_argument('--windows', type=int, default=3, help='of 16 batches'); p.set_defaults(repeats=3)
        p.add_argument('--measure', nargs=2, metavar=('stage', 'way'), help='one measure, in this process')
    a = harness.options(__doc__, __file__, argv, quick={'repeats': 1, 'windows': 1, 'stages': slowest(1)}, add=add)
    if a.measure: return print(json.dumps(measure(*a.measure, a.windows)))
    if gone := wanting(a.stages): print(f"left out, {gone[0]} is not prepared: dvc repro prepare"); raise SystemExit(harness.LEFT_OUT)
    seconds, told = {n: {w: [] for w in WAYS} for n in a.stages}, {}
    for k in range(a.repeats):
        for n in a.stages:
            for w in WAYS[::-1] if k % 2 else WAYS:
                r = told[n, w] = apart(n, w, a.windows)
                seconds[n][w].append(r['seconds']); print(n, w, r, flush=True)
    rows = [{'stage': n, 'way': w, 'steps': told[n, w]['steps'], 'batch': told[n, w]['batch'], 'padding': told[n, w]['padding'], **x} for n in a.stages for w, x in harness.against(seconds[n]).items()]
    lines, whole = [], spent()
    for n in a.stages:
        plain, ours = (told[n, w] for w in WAYS)
        middle = {w: harness.spread(seconds[n][w])['median'] for w in WAYS}
        saved = '' if ours['padding'] is None else f"; padding {100*plain['padding']:.0f} % of a batch before, {100*ours['padding']:.0f} % now"
        took = f"; {whole[f'train-{n}']:.0f} s in the run of tables/spent-phantom.csv" if f'train-{n}' in whole else ''
        lines.append(line(f"a step of {n}, batch {ours['batch']}", ('plain', seconds[n]['plain']), ('petvlm', seconds[n]['petvlm']), note=f"{ours['steps']:,} steps: {plain['steps']*middle['plain']:.0f} s of one core before, {ours['steps']*middle['petvlm']:.0f} now{took}{saved}"))
    limits = [f"a whole `make repro`: {len(whole)} steps, {sum(whole.values())/60:.0f} minutes of one core in two lanes: " + ', '.join(f"{kind} {sum(v for k, v in whole.items() if k.split('-')[0] == kind)/60:.0f}" for kind in dict.fromkeys(k.split('-')[0] for k in whole)) + '. Slowest: ' + ', '.join(f'{k} {v:.0f} s' for k, v in list(whole.items())[:10]) + '.', *WHY]
    harness.write(a, "the slowest stages of the phantom's reproduction", rows, table=lines, limits=limits)
    harness.show(rows, {'stage': 's', 'way': 's', 'steps': 'd', 'seconds': '8.4f', 'time_ratio': '6.3f'})


if __name__ == '__main__': main()
