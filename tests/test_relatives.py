"The relatives that the papers compare with: their parts, and that every offered point can be built and trained."
import functools
import numpy as np, pytest, torch
from petvlm.cli import plan_text
from petvlm.concat import ConcatFusion
from petvlm.config import load_params, resolve
from petvlm.graph import chain
from petvlm.datasets import FACETS, LABELS
from petvlm.fusion import FusionError
from petvlm.language import train_tokenizer
from petvlm.perceiver import PerceiverProjector
from petvlm.probe import image_count
from petvlm.processor import PetVLMProcessor
from petvlm.projectors import EveryStream, NormProjector, ProjectorError, ReLUProjector
from petvlm.r2gen import R2GenConfig, R2GenLM
from petvlm.regions import RegionEncoder
from petvlm.resnet import ResNetEncoder
from petvlm.slices import SliceEncoder
from petvlm.slots import build as part, lattices, reads, streams
from petvlm.stem import EncoderError
from petvlm.swin import SwinEncoder
from petvlm.tokens import Tokens
from petvlm.train import build, collator, head_lattices, images_read, set_trainable
from petvlm.vlm import PetVLM, VLMError, apart

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def learns(module, *inputs):
    "Every parameter of `module` gets a gradient that is not zero."
    module(*inputs).x.square().sum().backward()
    return [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]

# ---------------------------------------------------------------- parts

VIT = dict(patch_size=(4, 8, 8), dim=32, depth=1, heads=2, mlp_dim=64, cls_token=False)

def test_a_perceiver_gives_its_latents_whatever_comes_in():
    project, t = PerceiverProjector(16, 24, latents=5, depth=2, heads=2, dim_head=8), Tokens(torch.randn(2, 24, 16), (2, 3, 4))
    assert lattices([(2, 3, 4), (1, 1, 2)], project) == ((1, 1, 5),) and project(t).grid == (1, 1, 5) and not learns(project, t)
    far = Tokens(t.x.clone().index_add_(1, torch.tensor([23]), 3*torch.randn(2, 1, 16)), t.grid)
    assert (project(far).x - project(t).x).abs().amax((0, 2)).min() > 1e-4        # every latent may look at every token
    with pytest.raises(ProjectorError, match='made for 16'): project(Tokens(torch.randn(2, 6, 8), (1, 2, 3)))

def test_published_counts():
    with torch.device('meta'): found = {m.__class__.__name__: sum(p.numel() for p in m.parameters()) for m in (NormProjector(1024, 4096), SwinEncoder(channels=3), PerceiverProjector(768, 5120), ResNetEncoder(channels=3), R2GenLM(R2GenConfig(vocab_size=761)))}
    assert found == {'NormProjector': 4_206_592, 'SwinEncoder': 86_743_224, 'PerceiverProjector': 41_739_776, 'ResNetEncoder': 44_549_160 - 2_049_000, 'R2GenLM': 34_924_281}

def test_slices_between_those_read_are_not_seen():
    enc, x = SliceEncoder((12, 16, 24), 3, patch_size=8, dim=32, depth=1, heads=4, mlp_dim=64), torch.rand(2, 1, 12, 16, 24, requires_grad=True)
    enc.vit.view.data.normal_()
    assert not learns(enc, x) and sorted(set(x.grad.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist())) == enc.which == [2, 6, 10]
    assert streams(enc) == (((3, 2, 3), 32),) and SliceEncoder((12, 16, 24), 3, 'max', patch_size=8, dim=32, depth=1, heads=4, mlp_dim=64)(x).grid == (1, 2, 3)
    with pytest.raises(EncoderError, match='pool'): SliceEncoder((12, 16, 24), 3, 'median')

def test_a_region_is_what_its_mask_says():
    enc = RegionEncoder((8, 16, 16), 'ct', 'organs', 2, **VIT)
    image, labels = torch.rand(2, 1, 8, 16, 16), torch.zeros(2, 1, 8, 16, 16)
    labels[:, :, :2, :8, :8] = 1                                       # half of the first patch
    labels[0, :, 4:] = 2; labels[1, 0, 0, 15, 15] = 7                  # the second region is in the first scan only; 7 is no region
    assert reads(enc, 'ct') == ('ct', 'organs') and streams(enc) == (((2, 2, 2), 32), ((1, 1, 2), 32)) and not learns(enc, image, labels)
    share, t = enc.shares(labels), enc(image, labels)
    assert share[0, 0, 0] == .5 and share[:, 0].sum() == 1 and share[0, 1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] and share[1, 1].sum() == 0
    assert torch.allclose(t.x[1, 1], enc.absent + enc.names[1])
    near = image.clone(); near[:, :, :2, 8:, 8:] += 1                  # elsewhere: the mask decides what is pooled, but attention has mixed places before
    plain = RegionEncoder((8, 16, 16), 'ct', 'organs', 2, **{**VIT, 'depth': 0})
    assert torch.equal(plain(near, labels).x[:, 0], plain(image, labels).x[:, 0]) and not torch.equal(plain(near, labels).fine.x, plain(image, labels).fine.x)

def test_swin_averages_its_views():
    enc, x = SwinEncoder((2, 32, 32), embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, drop_path_rate=0.), torch.rand(3, 1, 2, 32, 32)
    assert not learns(enc, x) and streams(enc) == (((1, 4, 4), 32),)
    each = [enc(x[:, :, [i, i]]).x for i in (0, 1)]
    assert torch.allclose(enc(x).x, (each[0] + each[1])/2, atol=1e-5)
    with pytest.raises(EncoderError, match='one of each'): SwinEncoder((2, 32, 32), depths=(1, 1), num_heads=(2,))

def test_resnet_keeps_the_tokens_of_every_view():
    enc, x = ResNetEncoder((2, 32, 32), embedding_size=8, hidden_sizes=(16, 24), depths=(1, 1), layer_type='basic'), torch.rand(3, 1, 2, 32, 32)
    assert not learns(enc, x) and streams(enc) == (((2, 4, 4), 24),)
    lateral = x.clone(); lateral[:, :, 1] = 1 - lateral[:, :, 1]
    with torch.no_grad(): a, b = enc.eval()(x).x, enc(lateral).x
    assert torch.allclose(a[:, :16], b[:, :16], atol=1e-6) and not torch.allclose(a[:, 16:], b[:, 16:], atol=1e-3)
    y = ReLUProjector(24, 8, dropout=0.)(Tokens(a, enc.grid))
    assert y.grid == enc.grid and y.x.shape == (3, 32, 8) and y.x.min() == 0 < y.x.max()

def test_concatenation_keeps_both_lattices_and_mixes_nothing():
    pet, ct = (Tokens(torch.randn(2, 48, 16), (2, 4, 6)) for _ in range(2))
    fuse = part('fuse', 'concat', dim=16, n_tokens=48, pool=2)
    project = part('project', 'streams', streams=[((1, 2, 3), 16)], out_dim=24, depth=2)
    assert lattices([(2, 4, 6)], fuse, part('pool', 'none'), project) == ((1, 2, 3), (1, 2, 3))
    out, changed = project(fuse(pet, ct)), project(fuse(pet, ct.replace(-ct.x)))
    assert out.x.shape == (2, 12, 24) and torch.equal(out.x[:, :6], changed.x[:, :6]) and not torch.equal(out.x[:, 6:], changed.x[:, 6:])
    with pytest.raises(FusionError, match='expected 2 alike'): fuse(pet)
    with pytest.raises(ProjectorError, match='made for 16'): EveryStream(16, 24)(Tokens(torch.randn(2, 6, 8), (1, 2, 3)))

# ---------------------------------------------------------------- points

PARAMS = load_params()
SERVED = [p for p, s in PARAMS['offered'].items() if resolve(p, 'smoke', PARAMS).lm.kind == 'endpoint']
TRAINED = [p for p in PARAMS['offered'] if p not in SERVED and p != 'smollm2']      # smollm2: tests/test_training.py

@functools.cache
def tokenizer(): return train_tokenizer(['Nốt ở phổi trái. Left lung nodule.']*20, 300)

def items(model, cfg, stage, n=2):
    "Items of random numbers, shaped as `petvlm.datasets.Items` gives them."
    rng, shape, wide = np.random.default_rng(0), cfg.data.shape, len(LABELS) + 2 + len(FACETS)
    truth = lambda grids: (rng.random((sum(map(np.prod, grids)), wide)) < .05).astype(np.float32)
    image = lambda k: (rng.random((1, *shape)) < .3).astype(np.float32) if k.startswith('mask') else 8*rng.random((1, *shape), np.float32)
    one = lambda i: {k: image(k) for k in images_read(model, cfg, stage)} | {
        'truth': truth(stage.lattice or model.lattices), 'truth_heads': truth(head_lattices(model, stage)) if head_lattices(model, stage) else truth([(1, 1, 1)]),
        'dialogue': [('What is there?', f'Nodule {i}.')], 'texts': {'full': f'Nodule {i}.', 'content': f'Nodule {i}.', 'topic': f'lung {i}'}}
    return [one(i) for i in range(n)]

def step(model, cfg, stage) -> float:
    "One step of `stage` on random numbers; the loss. Asserts that what shall move gets gradients, and nothing else."
    if stage.lora: model.adapt(cfg.lora)
    moving = set_trainable(model, stage.train)
    processor = PetVLMProcessor(tokenizer(), image_count(stage, model))
    batch = collator(processor, stage, images_read(model, cfg, stage))(items(model, cfg, stage))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss = model.train()(objective={k: w for k, w in stage.objective.items() if w}, **batch)['loss']
    loss.backward(); opt.step()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    parts = {n.split('.')[0] for n in moving}
    assert with_grad <= set(moving) and {n.split('.')[0] for n in with_grad} == parts, f"{cfg.point}.{stage.name}: no gradient in {parts - {n.split('.')[0] for n in with_grad}}"
    model.zero_grad(set_to_none=True)
    return float(loss.detach())

SEEN = {}          # key of a stage -> who tried it: points share stages

@pytest.mark.parametrize('scale', ['phantom', 'smoke'])
@pytest.mark.parametrize('point', PARAMS['offered'])
def test_every_offered_point_resolves(point, scale):
    cfg = resolve(point, scale, PARAMS)
    assert cfg.scale == scale and set(PARAMS['offered'][point].values()) == {cfg.system, cfg.ablation} and (not cfg.stages) == (point in SERVED)

@pytest.mark.parametrize('point', TRAINED)
def test_every_offered_point_builds_and_learns(point):
    cfg = resolve(point, 'phantom', PARAMS); model, keys = build(cfg, tokenizer()), chain(cfg)
    for name, stage in cfg.stages.items():
        if keys[name] not in SEEN or stage.lora: SEEN[keys[name]] = step(model, cfg, stage)
        assert np.isfinite(SEEN[keys[name]]), name
    if 'report' in cfg.evaluation.tasks:
        prompt = PetVLMProcessor(tokenizer(), model.n_image).prompts(['What?']*2)
        images = {k: torch.rand(2, 1, *cfg.data.shape) for k in model.reads}
        assert model.eval().generate(**prompt, images=images, max_new_tokens=2, do_sample=False, pad_token_id=2).shape[0] == 2

@pytest.mark.parametrize('point', TRAINED)
def test_dvc_has_a_place_for_every_offered_point(point):
    text = plan_text({**PARAMS, 'scale': 'phantom', 'points': {point: PARAMS['offered'][point]}})      # raises for four parents or two ends
    assert f'{point}:' in text

def test_swin_survives_saving(tmp_path):
    cfg = resolve('r2gengpt', 'phantom', PARAMS); model = build(cfg, tokenizer()).eval()
    model.save_pretrained(tmp_path)
    again, x = PetVLM.from_pretrained(tmp_path).eval(), {'xray': torch.rand(1, 1, *cfg.data.shape)}
    with torch.no_grad(): assert torch.equal(model.image_tokens(x).x, again.image_tokens(x).x)

# ---------------------------------------------------------------- a language model that is an encoder and a decoder

def spoken(model, *dialogues):
    batch = PetVLMProcessor(tokenizer(), model.n_image)([list(d) for d in dialogues])
    return batch, {k: torch.rand(len(dialogues), 1, *resolve('r2gen', 'phantom', PARAMS).data.shape) for k in model.reads}

def test_prompts_and_answers_apart():
    labels = torch.tensor([[-100, -100, 7, 8, -100], [-100, -100, -100, 5, -100]])
    mask, answer = apart(torch.tensor([[1, 1, 1, 1, 0]]*2), labels)
    assert mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]] and answer.tolist() == [[7, 8], [5, -100]]
    with pytest.raises(VLMError, match='several turns'): apart(torch.ones(1, 5, dtype=torch.long), torch.tensor([[-100, 7, -100, 7, -100]]))

def test_r2gen_learns_the_answers_and_nothing_else():
    model = build(resolve('r2gen', 'phantom', PARAMS), tokenizer()).eval()
    batch, images = spoken(model, [('What?', 'Left lung nodule.')], [('What is there?', 'Lung.')])
    with torch.no_grad(): out = model(**batch, **images)
    answers = [l[l != -100] for l in batch['labels']]
    assert out.logits.shape[:2] == (2, max(map(len, answers)) + 1)
    each = torch.cat([out.logits[i, :len(a)].log_softmax(-1).gather(1, a[:, None])[:, 0] for i, a in enumerate(answers)])       # position t writes word t
    assert torch.allclose(out.loss, -each.mean(), atol=1e-5)
    alone, its = spoken(model, [('What is there?', 'Lung.')])                               # neither padding nor the neighbour matters
    with torch.no_grad(): single = model(**alone, **{k: v[1:] for k, v in images.items()}).logits
    assert torch.allclose(single[0, :len(answers[1])], out.logits[1, :len(answers[1])], atol=1e-4)

def test_r2gen_writes_what_it_was_taught_and_survives_saving(tmp_path):
    model = build(resolve('r2gen', 'phantom', PARAMS), tokenizer())
    batch, images = spoken(model, [('What?', 'Left lung nodule.')], [('What?', 'Nốt ở phổi trái.')])
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60): opt.zero_grad(); model.train()(**batch, **images).loss.backward(); opt.step()
    model.save_pretrained(tmp_path); again = PetVLM.from_pretrained(tmp_path).eval()
    processor = PetVLMProcessor(tokenizer(), model.n_image)
    write = lambda m: processor.decode(m.generate(**processor.prompts(['What?']*2), images=images, max_new_tokens=30, do_sample=False, eos_token_id=tokenizer().eos_token_id, pad_token_id=tokenizer().pad_token_id))
    assert write(model.eval()) == write(again) == ['Left lung nodule.', 'Nốt ở phổi trái.']

def test_what_an_encoder_decoder_cannot_do_is_said():
    model = build(resolve('r2gen', 'phantom', PARAMS), tokenizer())
    batch, images = spoken(model, [('What?', 'Lung.')])
    with pytest.raises(VLMError, match='needs labels'): model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], **images)
    with pytest.raises(VLMError, match='decoder alone'): model(objective={'lm': 1., 'align': .1}, **batch, **images, suv=torch.rand(1, 1, 2, 64, 64))
    many, _ = spoken(model, [('What?', 'Lung.'), ('Where?', 'Left.')])
    with pytest.raises(VLMError, match='several turns'): model(**many, **images)

def test_rows_with_other_points_are_other_configurations():
    same = lambda a, b: chain(resolve(a, 'phantom', PARAMS)) == chain(resolve(b, 'phantom', PARAMS))
    assert same('m3d_rad', 'petar_none')                                     # as the paper's own tables have it
    names = [n for n in TRAINED if n != 'm3d_rad']
    assert not [(a, b) for i, a in enumerate(names) for b in names[:i] if same(a, b)]
