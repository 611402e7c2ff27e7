"Many questions in one batch, each image read once: the words are those of one question at a time."
import functools
import numpy as np, pytest, torch
from petvlm import generate
from petvlm.config import resolve
from petvlm.generate import GenerateError, answers, heads_first, primed, write
from petvlm.language import train_tokenizer
from petvlm.processor import PetVLMProcessor
from petvlm.train import build
from petvlm.vlm import PetVLM

WORDS = 'Where is the lesion ? What does CT show of liver and lung Is there a nodule'.split()
ASKED = [(0, 'Where ?'), (1, 'What does CT show of liver and lung'), (0, ' '.join(WORDS)), (2, 'Is there a nodule ?'), (1, 'Where ?'), (0, 'the lesion'), (2, ' '.join(WORDS[::-1]*2))]

class Scans:
    def __init__(self, shape): self.records, self.shape = [{'region': 'chest', 'patient': p} for p in 'abc'], shape
    def __len__(self): return 3
    @functools.cache
    def image(self, i, name):
        x = np.random.default_rng([i, *name.encode()]).normal(size=self.shape)
        return (x > 1).astype(np.float32) if name.startswith('mask') else x.astype(np.float32)

@functools.cache
def system(point):
    cfg = resolve(point, 'smoke'); tokenizer = train_tokenizer([' '.join(WORDS)]*20, 300)
    model = build(cfg, tokenizer).eval()
    with torch.no_grad():                                  # fresh weights look at nothing much: make images and words count
        for p in model.project.parameters(): p.mul_(4)
    return model, PetVLMProcessor(tokenizer, model.n_image), Scans(cfg.data.shape)

def prompts(point, asked=ASKED):
    model, processor, rows = system(point)
    images = {n: torch.from_numpy(np.stack([rows.image(i, n) for i in range(3)]))[:, None] for n in model.reads}
    return model, processor.prompts([q for _, q in asked]), images, torch.tensor([i for i, _ in asked])

DECODERS = ('vipet', 'med3dvlm', 'petar', 'content_topic')      # mistral, qwen2, phi3, llama

@pytest.mark.parametrize('point', DECODERS)
@pytest.mark.parametrize('batch', [2, 64])
def test_texts_are_those_of_one_question_at_a_time(point, batch):
    model, processor, rows = system(point)
    say = lambda asked, **kw: write(model, processor, rows, asked, max_new_tokens=8, progress=False, **kw)
    assert say(ASKED, batch=batch) == [say([one])[0] for one in ASKED]

@pytest.mark.parametrize('point', DECODERS)
def test_logits_are_those_of_the_whole_prompt(point):
    model, prompt, images, which = prompts(point)
    told = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=2, eos_token_id=1)
    with torch.no_grad():
        seen = model.image_tokens(images)
        whole = model.lm.generate(inputs_embeds=model.embed(prompt['input_ids'], seen.replace(seen.x[which])), attention_mask=prompt['attention_mask'], **told)
        once = model.lm.generate(**primed(model, **prompt, seen=seen, which=which), **told)
    assert torch.equal(whole.sequences, once.sequences)
    for a, b in zip(whole.logits, once.logits): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    first = once.logits[0]
    assert (first[0] - first[4]).abs().max() > 1e-3 and (first[0] - first[5]).abs().max() > 1e-3      # another image, another question: other logits

def test_the_language_model_reads_each_image_once():
    model, prompt, images, which = prompts('vipet')
    read, shape = [], lambda kw: tuple((kw['input_ids'] if kw.get('inputs_embeds') is None else kw['inputs_embeds']).shape[:2])
    hook = model.lm.register_forward_pre_hook(lambda module, args, kw: read.append(shape(kw)), with_kwargs=True)
    try: answers(model, **prompt, images=images, which=which, max_new_tokens=2, do_sample=False, pad_token_id=2, eos_token_id=1)
    finally: hook.remove()
    head, longest = 1 + model.n_image, prompt['input_ids'].shape[1]
    assert read == [(3, head), (7, longest - head), (7, 1)]

def test_adapters_are_read_through_too():
    model, prompt, images, which = prompts('vipet')
    cfg = resolve('vipet', 'smoke'); torch.manual_seed(1)
    tuned = PetVLM(model.config.__class__.from_dict(model.config.to_dict())); tuned.load_state_dict(model.state_dict()); tuned.adapt(cfg.lora); tuned.eval()
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if 'lora_B' in n: p.normal_(0, .2)
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=2, eos_token_id=1)
    with torch.no_grad():
        once, whole = answers(tuned, **prompt, images=images, which=which, **how), tuned.generate(**prompt, images=images, which=which, **how)
        before = answers(model, **prompt, images=images, which=which, **how)
    assert torch.equal(once, whole) and once.tolist() != before.tolist()

def test_what_cannot_share_goes_the_whole_way(monkeypatch):
    model, prompt, images, which = prompts('vipet')
    monkeypatch.setattr('petvlm.generate.primed', lambda *a, **kw: pytest.fail('an image was shared'))
    how = dict(images=images, max_new_tokens=2, do_sample=False, pad_token_id=2, eos_token_id=1)
    first = {k: v[:2] for k, v in prompt.items()}
    assert len(answers(model, **first, which=which[:2], **how)) == 2                                            # each its own image
    assert len(answers(model, **prompt, which=which, num_beams=2, **how)) == 7
    monkeypatch.setattr(model.lm.config, 'sliding_window', prompt['input_ids'].shape[1])
    assert len(answers(model, **prompt, which=which, **how)) == 7

def test_an_encoder_decoder_reads_question_and_image_together():
    model, processor, rows = system('r2gen')
    say = lambda asked, **kw: write(model, processor, rows, asked, max_new_tokens=6, progress=False, **kw)
    assert say(ASKED) == [say([one])[0] for one in ASKED]

def test_a_killed_call_goes_on_and_nothing_is_answered_twice(tmp_path, monkeypatch):
    model, processor, rows = system('vipet'); made, left, real = [], [2], generate.answers
    def counted(*a, **kw):
        if len(made) == left[0]: raise KeyboardInterrupt
        made.append(len(kw['which'])); return real(*a, **kw)
    say = lambda **kw: write(model, processor, rows, ASKED, batch=2, progress=False, **({'max_new_tokens': 8} | kw))
    whole = say(); monkeypatch.setattr(generate, 'answers', counted)
    with pytest.raises(KeyboardInterrupt): say(keep=tmp_path)
    (path,) = tmp_path.iterdir()
    with open(path, 'a') as f: f.write('[4, ["half a li')
    left[0] = 99; assert say(keep=tmp_path) == whole and made == [2, 2, 2, 1]
    assert say(keep=tmp_path) == whole and len(made) == 4
    for kw in ({'arm': 'noise'}, {'max_new_tokens': 3}, {'seed': 1}): say(keep=tmp_path, **kw)                # other questions, other answers
    assert len(made) == 16 and len([*tmp_path.iterdir()]) == 4

def test_heads_go_before_the_padding():
    ids = torch.tensor([[2, 2, 0, 3, 3, 7, 8], [0, 3, 3, 5, 6, 7, 8], [2, 0, 3, 3, 9, 9, 9]]); mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1]*7, [0] + [1]*6])
    moved, attended, n = heads_first(ids, mask, 3)
    assert n == 3 and moved.tolist() == [[0, 3, 3, 2, 2, 7, 8], [0, 3, 3, 5, 6, 7, 8], [0, 3, 3, 2, 9, 9, 9]]
    assert attended.tolist() == [[1, 1, 1, 0, 0, 1, 1], [1]*7, [1, 1, 1, 0, 1, 1, 1]]

def test_prompts_that_begin_differently_are_refused():
    with pytest.raises(GenerateError, match=r'ends after \[3, 4\] tokens'): heads_first(torch.tensor([[0, 3, 3, 7], [0, 3, 3, 3]]), torch.ones(2, 4, dtype=torch.long), 3)
    model, prompt, images, which = prompts('vipet')
    other = prompt['input_ids'].clone(); other[0, (other[0] == 0).nonzero()[0]] = 5                             # another first token
    with torch.no_grad(), pytest.raises(GenerateError, match='begin differently'): primed(model, other, prompt['attention_mask'], model.image_tokens(images), which)
