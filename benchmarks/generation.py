"""Answers to many questions about few images, side by side: one question at a time, in batches, and in batches that read each image once (`petvlm.generate.write`).

    python benchmarks/generation.py                                # phantom scale, and a longer image in a larger language model
    python benchmarks/generation.py --images 8 --questions 12 --tokens 64
    python benchmarks/generation.py --quick

All ways are greedy and keep keys and values (KV cache), as transformers does by default. `per sample`: each question goes through encoders and language model on its own, as the papers' evaluation scripts do. `batched`: left-padded
batches, each image encoded once, its tokens read by the language model once per question (petvlm until 2026-11-26). `petvlm`: the language model reads them once per image, too. The models are freshly initialised, which changes
no time: their answers run to `--tokens` unless they stop. One JSON: CPU seconds of one core, and whether all texts are the same.
"""
import functools, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import harness
from table import line

WORDS = 'Where is the lesion ? What is its SUVmax Is there a nodule in left lung Describe findings of this scan Which organ shows uptake How large'.split()
SIZES = {   # the configuration of a model: the phantom's ViPET-VLM, and one whose image is as long as at published sizes
    'phantom': 'vipet, phantom scale',
    'long': dict(image_size=[64, 64, 64], patch=[8, 8, 8], width=256, layers=4, heads=4)}


def ready(): import torch, petvlm.generate, petvlm.train  # noqa: F401


class Scans:
    "Rows of noise, one patient each."
    def __init__(self, n, shape): self.records, self.shape = [{'region': 'chest', 'patient': f'p{i}'} for i in range(n)], tuple(shape)
    def __len__(self): return len(self.records)
    @functools.cache
    def image(self, i, name):
        import numpy as np
        return np.random.default_rng([i, *name.encode()]).normal(size=self.shape).astype(np.float32)


def made(size):
    "A model, its processor and the shape of its images."
    import torch
    from petvlm.config import resolve
    from petvlm.language import train_tokenizer
    from petvlm.processor import PetVLMProcessor
    from petvlm.train import build
    from petvlm.vlm import PetVLM, PetVLMConfig
    tokenizer = train_tokenizer([' '.join(WORDS)]*20, 400)
    if size == 'phantom':
        cfg = resolve('vipet', 'phantom'); model, shape = build(cfg, tokenizer), cfg.data.shape
    else:
        s = SIZES[size]; torch.manual_seed(0); shape = s['image_size']
        encoder = {'kind': 'ctvit', 'args': dict(patch_size=s['patch'], dim=96, spatial_depth=1, temporal_depth=1, heads=4, dim_head=24, codebook_size=0, peg_scrambled=False)}
        lm = dict(model_type='mistral', vocab_size=len(tokenizer), hidden_size=s['width'], intermediate_size=4*s['width'], num_hidden_layers=s['layers'], num_attention_heads=s['heads'], num_key_value_heads=s['heads'],
                  sliding_window=None, initializer_range=.08, **{k: getattr(tokenizer, k) for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')})
        model = PetVLM(PetVLMConfig(inputs=['ct'], image_size=shape, encode={'ct': encoder}, lm=lm, image_token_id=tokenizer.convert_tokens_to_ids('<im_patch>')))
    return model.eval(), PetVLMProcessor(tokenizer, model.n_image), shape


def questions(images, each, seed=0):
    "`(image, question)`, `each` of different lengths for every image, in a drawn order."
    import numpy as np
    rng = np.random.default_rng(seed)
    asked = [(i, ' '.join(rng.choice(WORDS, rng.integers(3, 16)))) for i in range(images) for _ in range(each)]
    return [asked[k] for k in rng.permutation(len(asked))]


def measured(size, images, each, tokens, batch, repeats):
    "Seconds of all questions every way, and what was written."
    import torch
    from petvlm.generate import write
    model, processor, shape = made(size)
    rows, asked, told = Scans(images, shape), questions(images, each), {}
    how = dict(max_new_tokens=tokens, do_sample=False, eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id)
    shown = lambda which: {n: torch.stack([torch.from_numpy(rows.image(i, n)) for i in which])[:, None] for n in model.reads}
    def per_sample():
        told['per sample'] = [processor.decode(model.generate(**processor.prompts([q]), images=shown([i]), **how))[0] for i, q in asked]
    def batched():
        texts, order = ['']*len(asked), sorted(range(len(asked)), key=lambda k: asked[k][0])
        for part in (order[k:k + batch] for k in range(0, len(order), batch)):
            which = sorted({asked[k][0] for k in part})
            ids = model.generate(**processor.prompts([asked[k][1] for k in part]), images=shown(which), which=torch.tensor([which.index(asked[k][0]) for k in part]), **how)
            for k, text in zip(part, processor.decode(ids)): texts[k] = text
        told['batched'] = texts
    def ours(): told['petvlm'] = write(model, processor, rows, asked, batch=batch, max_new_tokens=tokens, progress=False)
    seconds = harness.interleaved({'per sample': per_sample, 'batched': batched, 'petvlm': ours}, repeats, clock=time.process_time)
    same = {w: sum(a == b for a, b in zip(t, told['per sample']))/len(asked) for w, t in told.items()}
    written = sum(len(ids) for ids in processor.tokenizer(told['per sample'], add_special_tokens=False)['input_ids'])
    return {'seconds': seconds, 'same_texts': same, 'image_tokens': model.n_image, 'written': written, 'texts': len(set(told['per sample'])), 'parameters': sum(p.numel() for p in model.parameters())}


def prefill(size, images, each):
    "Seconds of the first word alone: what reading the prompts costs, per question or per image."
    return measured(size, images, each, 1, images*each, 2)['seconds']


def main(argv=None):
    def add(p):
        for name, default in dict(images=2, questions=6, tokens=16, batch=32).items(): p.add_argument(f'--{name}', type=int, default=default)
        p.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES)); p.set_defaults(repeats=3)
    a = harness.options(__doc__, __file__, argv, quick={'images': 2, 'questions': 3, 'tokens': 6, 'repeats': 2}, add=add)
    same = dict(images=a.images, each=a.questions)
    found = harness.apart(__file__, [call for s in a.sizes for call in (('measured', same | {'size': s, 'tokens': a.tokens, 'batch': a.batch, 'repeats': a.repeats}), ('prefill', same | {'size': s}))])
    rows, lines, limits = [], [], []
    for size, r, first in zip(a.sizes, found[::2], found[1::2]):
        n = a.images*a.questions
        rows += [{'size': size, 'way': w, 'image_tokens': r['image_tokens'], **x, 'first_word_seconds': harness.spread(first[w])['median'], 'same_texts': r['same_texts'][w]} for w, x in harness.against(r['seconds']).items()]
        per = {w: [s/n for s in v] for w, v in r['seconds'].items()}
        job = f"{size}: {a.questions} questions about each of {a.images} images, {r['image_tokens']} image tokens, up to {a.tokens} new ones; per question"
        note = lambda w: f"the same texts as one at a time: {100*r['same_texts'][w]:.0f} % of {n}"
        lines += [line(job, ('per sample', per['per sample']), ('petvlm', per['petvlm']), note=note('petvlm')), line(job, ('batched', per['batched']), ('petvlm', per['petvlm']), note=f"{note('batched')} (batched)"),
                  line(f'{size}: first word only (reading the prompts); per question', ('batched', [s/n for s in first['batched']]), ('petvlm', [s/n for s in first['petvlm']]), note=f'{a.questions} questions share an image: at most {a.questions} times as fast, less what questions cost')]
        limits.append(f"{size}: {r['parameters']/1e6:.1f} million parameters, {r['written']} tokens written one at a time ({r['texts']} different texts of {n}).")
    harness.write(a, 'answers to questions about images', rows, table=lines, limits=limits)
    harness.show(rows, {'size': 's', 'way': 's', 'image_tokens': 'd', 'seconds': '8.3f', 'time_ratio': '6.3f', 'first_word_seconds': '8.3f', 'same_texts': '5.2f'})
    for text in limits: print(text)


if __name__ == '__main__': main()
