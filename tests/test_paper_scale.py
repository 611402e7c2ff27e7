"Published sizes without published weights: every point at `paper` and `gpu` on the meta device, what moves in each stage, and that frozen means frozen."
import contextlib, dataclasses, functools
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM
from petvlm.config import Part, load_params, resolve
from petvlm.datasets import LABELS
from petvlm.language import train_tokenizer
from petvlm.train import build, set_trainable

PARAMS = load_params()
# The systems, what is taken out of them, and what their code does otherwise. A relative's sizes are the phantom's at every scale (params.yaml says so), and a served model has none.
POINTS = [p for p, spec in (PARAMS['points'] | PARAMS['offered']).items() if not {'encode', 'project', 'lm'} & set(PARAMS['ablations'][spec['ablation']]) and spec['ablation'] != 'concat' or p.endswith('_code') or p == 'smollm2']

# What `hub` would download: the models' own config.json, and how many parameters their cards state.
_llama2 = dict(model_type='llama', vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
LMS = {'mistralai/Mistral-7B-Instruct-v0.2': (dict(model_type='mistral', vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None), 7_241_732_096),
       'Qwen/Qwen2.5-7B-Instruct': (dict(model_type='qwen2', vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4), 7_615_616_512),
       'microsoft/Phi-3-mini-4k-instruct': (dict(model_type='phi3', vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32), 3_821_079_552),
       'meta-llama/Llama-2-7b-hf': (_llama2, 6_738_415_616),
       'smollm2': (dict(model_type='llama', vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True), 134_515_008)}

class Vocabulary:
    "As much of a tokenizer as building a model asks for."
    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    def __init__(self, size: int): self.size = size
    def __len__(self) -> int: return self.size
    def convert_tokens_to_ids(self, token: str) -> int: return self.size - 1

def lm_of(cfg) -> str: return cfg.lm.args['name'] if cfg.lm.kind == 'hub' else cfg.lm.kind

with torch.device('meta'): torch.empty(0)      # torch notes once what a device may place; noted while transformers loads weights, when `linspace` is its own, it would miss that one


def skeleton(cfg):
    "The model of `cfg` on the meta device: shapes, no numbers."
    fields = {'tie_word_embeddings': False} | LMS[lm_of(cfg)][0]
    with torch.device('meta'):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
        return build(cfg, Vocabulary(fields['vocab_size']), labels=len(LABELS) if cfg.scale == 'gpu' else 0, lm=lm)   # at gpu scale labels still teach the encoders

@functools.cache
def built(point: str, scale: str):
    return skeleton(resolve(point, scale))

def count(module) -> int: return sum(p.numel() for p in module.parameters())

@pytest.fixture
def shapes_only(monkeypatch):
    "The meta device knows no autocast."
    monkeypatch.setattr(torch, 'autocast', lambda *a, **kw: contextlib.nullcontext())

# facts.md, section 1 (measured in the published code). CT-ViT counts 23,425,864 in use, of which 8 gammas of 512 (`context_norm`) are never reached; ViT-B/16 has 85,798,656 with 3 colours, here 1, and a vector for each of 2 views.
CTVIT, DCFORMER, MIXER, SPP = 23_425_864 - 8*512, 18_244_800, 47_221_248, 14_161_920
PETAR, PETAR_SHARED, MASK, VIT_B16 = 177_137_664, 89_749_248, 2_360_064, 85_798_656 - 2*768*16*16 + 2*768
LINEAR_512, LINEAR_768 = 512*4096 + 4096, 768*4096 + 4096
SLABS = 150_994_944                                # CT-CLIP: 294,912 -> 512, no bias

PARTS = {  # point -> parts and their parameters, image tokens, lattices of image tokens
    'vipet': ({'encode.pet': CTVIT, 'encode.ct': CTVIT, 'latent.pet.linear': SLABS, 'project': LINEAR_512}, 896, ((14, 8, 8),)),
    'no_fusion': ({'encode.pet': CTVIT, 'encode': CTVIT, 'fuse': 0, 'latent.pet.linear': SLABS, 'project': LINEAR_512}, 896, ((14, 8, 8),)),
    'med3dvlm': ({'encode.ct': DCFORMER, 'project': MIXER, 'latent.ct': 768*768 + 768, 'text.ct.project': 768*768 + 768, 'sigmoid': 2}, 256, ((1, 1, 128), (1, 1, 128))),
    'petar': ({'encode.lesion': PETAR_SHARED, 'encode.lesion.tower.pet.mask_embed': MASK - 2048*768, 'project': SPP}, 256, ((4, 8, 8),)),
    'petar_code': ({'encode.lesion': PETAR, 'encode.lesion.tower.ct': 87_388_416, 'project': SPP}, 256, ((4, 8, 8),)),
    'content_topic': ({'encode.xray': VIT_B16, 'project': LINEAR_768}, 2*14*14 + 8, ((2, 14, 14),))}
PARTS |= {'no_reg': PARTS['vipet'], 'no_fusion_no_reg': PARTS['no_fusion'], 'med3dvlm_code': PARTS['med3dvlm']}

@pytest.mark.parametrize('point', PARTS)
def test_every_part_has_the_published_size(point):
    model, parts = built(point, 'paper'), PARTS[point][0]
    assert {k: count(model.get_submodule(k)) for k in parts} == parts

@pytest.mark.parametrize('point', [p for p in POINTS if resolve(p, 'paper').lm.kind == 'hub'])
def test_the_language_model_has_its_published_size(point):
    assert count(built(point, 'paper').lm) == LMS[lm_of(resolve(point, 'paper'))][1]

@pytest.mark.parametrize('point', PARTS)
@torch.no_grad()
def test_image_tokens_are_as_many_and_as_wide_as_published(point, shapes_only):
    model, (_, n, lattices) = built(point, 'paper').eval(), PARTS[point]
    x = model.image_tokens({k: torch.empty(1, 1, *resolve(point, 'paper').data.shape, device='meta') for k in model.reads}).x
    assert x.shape == (1, n, LMS[lm_of(resolve(point, 'paper'))][0]['hidden_size']) and (model.n_image, model.lattices) == (n, lattices)

@torch.no_grad()
def test_lattices_of_the_published_encoders(shapes_only):
    pet = built('vipet', 'paper').eval().encode['pet'](torch.empty(1, 1, 140, 480, 480, device='meta'))
    ct = built('med3dvlm', 'paper').eval().encode['ct'](torch.empty(1, 1, 128, 256, 256, device='meta'))
    assert (pet.grid, pet.dim) == ((14, 24, 24), 512)                                          # facts.md 6: 14 slabs of 24 x 24 x 512
    assert [(t.x.shape[1:], t.grid) for t in ct.streams] == [((256, 384), (4, 8, 8)), ((32, 768), (2, 4, 4))]   # facts.md 1
    assert built('petar', 'paper').encode['lesion'].grid == (8, 16, 16)                    # facts.md 3: 2,048 tokens

@pytest.mark.parametrize('scale', ['gpu', 'paper'])
@pytest.mark.parametrize('point', POINTS)
@torch.no_grad()
def test_every_point_is_built_without_a_number(point, scale, shapes_only):
    model = built(point, scale)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {'meta'}
    x = model.eval().image_tokens({k: torch.empty(2, 1, *resolve(point, scale).data.shape, device='meta') for k in model.reads}).x
    assert x.shape == (2, model.n_image, model.lm.config.hidden_size) and model.n_image + 1000 < 2048        # the processor cuts at 2,048

@pytest.mark.parametrize('point', POINTS)
def test_at_paper_scale_nothing_stands_in_for_published_weights(point):
    stages, model = resolve(point, 'paper').stages.values(), built(point, 'paper')
    assert {s.images for s in stages} == {'image'} and not any(o.startswith(('sites', 'match')) for s in stages for o, w in s.objective.items() if w)
    assert not hasattr(model, 'heads') and not hasattr(model, 'truth')

EPOCHS = {  # epochs, items, batch of a card, cards (and batches of each): a step is all of them, on however many cards it is taken
    'med3dvlm': {'contrast': (100, 115_000, 64, 8), 'projection': (3, 115_000 + 509_755, 16, 8), 'instruct': (5, 115_000 + 662_000, 8, 8)},        # section 3.4, facts.md 2; its README
    'petar': {'organ_projection': (5, 100_000, 8, 2), 'organ_full': (5, 100_000, 2, 2), 'projection': (5, 11_356 - 1_175, 8, 2), 'full': (5, 11_356 - 1_175, 2, 2)},   # facts.md 4
    'content_topic': {'joint': (5, .7*3_955, 8, 1)}, 'vipet': {'projection': (20, 27_855, 16, 4, 4), 'instruct': (20, 27_855 + 8_271, 8, 4, 4)}}         # its section 3; facts.md 6

@pytest.mark.parametrize('point', EPOCHS)
def test_steps_are_the_published_epochs(point):
    for name, (epochs, items, batch, cards, *accumulate) in EPOCHS[point].items():
        stage = resolve(point, 'paper').stages[name]
        assert stage.batch == batch and stage.accumulate == cards*(*accumulate, 1)[0] and abs(stage.steps - epochs*items/(batch*stage.accumulate)) <= 1, name

# ---- What moves. Parts by name; 'mask' is PETAR's mask embedding, 'lm:...' are kinds of parameters of the language model.
CODE_2, CODE_3 = {'project', 'lm:inputs'}, {'encode', 'project', 'lm:adapters', 'lm:inputs', 'lm:outputs'}
MOVES = {
    # ViPET-VLM, 3.2.1 (each encoder with its text; then the fusion module), 3.2.2 (the projection alone), 3.2.3 (projection and LoRA). ViReportGen's code has the same sets for its two stages (facts.md 6)
    'vipet': {'clip_pet': {'encode.pet', 'text.pet', 'latent.pet'}, 'clip_ct': {'encode.ct', 'text.ct', 'latent.ct'}, 'fusion': {'fuse', 'text.full', 'latent.full'}, 'projection': {'project'}, 'instruct': {'project', 'lm:adapters'}},
    'no_fusion': {'clip_pet': {'encode.pet', 'text.pet', 'latent.pet'}, 'projection': {'project'}, 'instruct': {'project', 'lm:adapters'}},
    # Med3DVLM, 3.2.1 to 3.2.3, "all model weights are frozen except for those in the projector", "only the weights of the multi-modal projector and the LoRA modules"; its code: facts.md 2.4, 2.7
    'med3dvlm': {'contrast': {'encode', 'text', 'latent', 'sigmoid'}, 'projection': {'project'}, 'instruct': {'project', 'lm:adapters'}},
    'med3dvlm_code': {'contrast': {'encode', 'text', 'latent', 'sigmoid'}, 'projection': CODE_2, 'instruct': CODE_3},
    # PETAR: projection head, mask embedding, everything, on organs and again on lesions. Code of the dev fork: LaMed/src/train/train.py, initialize_vision_tokenizer; its mask flag would raise (facts.md 4)
    'petar': {f'{o}{k}': v for o in ('organ_', '') for k, v in {'projection': {'project'}, 'mask': {'mask'}, 'full': {'encode', 'project', 'lm'}}.items()},
    'petar_code': {f'{o}{k}': v for o in ('organ_', '') for k, v in {'projection': CODE_2, 'full': CODE_3}.items()},
    # content/topic, 3.1: content and topic encoders and projection from scratch, LLaMA frozen, ViT from ImageNet (that it moves is our reading: it is not said to be frozen)
    'content_topic': {'joint': {'encode', 'fuse', 'project'}}}

def named(model, parts) -> set[str]:
    "The parameters that `parts` mean, found without patterns."
    names = [n for n, _ in model.named_parameters()]
    mask = {f'encode.lesion.tower.pet.{k}' for k in ('mask_embed.weight', 'mask_embed.bias', 'mask_position')}
    owns = {'lm:adapters': lambda n: n.startswith('lm.') and ('.lora_A.' in n or '.lora_B.' in n), 'lm:inputs': lambda n: n.endswith('.embed_tokens.weight'), 'lm:outputs': lambda n: n.endswith('lm_head.weight'), 'mask': lambda n: n in mask}
    found = {p: {n for n in names if owns.get(p, lambda n: n.startswith(p + '.'))(n)} for p in parts}
    assert all(found.values()), f"nothing in {[p for p, v in found.items() if not v]}"
    return set().union(*found.values())

@functools.cache
def tokenizer(): return train_tokenizer(['Nodule in the left lung, SUVmax 5.2.', 'No abnormality.']*20, 300)

def small(point: str):
    "The stages of the paper on a model of phantom size, embeddings untied as in every published language model here."
    cfg = resolve(point, 'phantom')
    cfg = dataclasses.replace(cfg, stages=resolve(point, 'paper').stages, lm=Part(cfg.lm.kind, cfg.lm.args | {'tie_word_embeddings': False}))
    return cfg, build(cfg, tokenizer(), labels=0)

@pytest.mark.parametrize('point', MOVES)
def test_the_exact_set_of_trainable_names_in_every_stage(point):
    cfg, model = small(point)
    linears = [n for n, m in model.lm.named_modules() if isinstance(m, torch.nn.Linear) and n != 'lm_head']
    assert list(cfg.stages) == list(MOVES[point])
    for name, stage in cfg.stages.items():
        if stage.lora: model.adapt(cfg.lora)
        names = set_trainable(model, stage.train)
        assert set(names) == named(model, MOVES[point][name]) == {n for n, p in model.named_parameters() if p.requires_grad}, name
        if 'lm:adapters' in MOVES[point][name]: assert sum('lora_' in n for n in names) == 2*len(linears)

# At published size: LoRA on every linear layer but the head is 167,772,160 (Mistral, r 64), 40,370,176 (Qwen2.5-7B, r 16), 25,165,824 (Phi-3-mini, r 16); one embedding 152,064 x 3,584 and 32,064 x 3,072.
QWEN, PHI = 152_064*3_584, 32_064*3_072
MOVING = {'vipet': {'projection': LINEAR_512, 'instruct': LINEAR_512 + 167_772_160}, 'med3dvlm': {'projection': MIXER, 'instruct': MIXER + 40_370_176},
          'med3dvlm_code': {'projection': MIXER + QWEN, 'instruct': DCFORMER + MIXER + 40_370_176 + 2*QWEN},
          'petar': {'projection': SPP, 'mask': MASK, 'full': PETAR_SHARED + SPP + 3_821_079_552},
          'petar_code': {'projection': SPP + PHI, 'full': PETAR + SPP + 25_165_824 + 2*PHI}}

@pytest.mark.parametrize('point', MOVING)
def test_as_many_parameters_move_as_published(point):
    cfg = resolve(point, 'paper'); model = skeleton(cfg)
    for name, stage in cfg.stages.items():
        if stage.lora: model.adapt(cfg.lora)
        set_trainable(model, stage.train)
        if name in MOVING[point]: assert sum(p.numel() for p in model.parameters() if p.requires_grad) == MOVING[point][name], name

# ---- Frozen means frozen: buffers too, though `Trainer` calls `train()` on the whole model.
def moved_by(model, stage, run) -> set[str]:
    "The entries of the state dict that one pass in training mode changes."
    before = {k: v.clone() for k, v in model.state_dict().items()}
    set_trainable(model, stage.train); model.train(); run()
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}

def test_batch_statistics_of_a_frozen_encoder_stay():
    cfg, model = small('med3dvlm')
    run = lambda: model.image_tokens({'ct': torch.rand(2, 1, *cfg.data.shape)})
    assert not moved_by(model, cfg.stages['projection'], run)
    norms = sum(isinstance(m, torch.nn.BatchNorm3d) for m in model.encode.modules())
    assert len(moved_by(model, cfg.stages['contrast'], run)) == 3*norms > 0        # mean, variance and count: the check sees what moves
    model.adapt(cfg.lora)
    assert not moved_by(model, cfg.stages['instruct'], run)

def test_codebooks_of_frozen_encoders_stay():
    cfg, _ = small('vipet')
    cfg = dataclasses.replace(cfg, encode={i: Part(p.kind, p.args | {'codebook_size': 16}) for i, p in cfg.encode.items()})
    model = build(cfg, tokenizer(), labels=0)
    run = lambda: model.image_tokens({k: torch.rand(2, 1, *cfg.data.shape) for k in ('pet', 'ct')})
    for name in ('fusion', 'projection'): assert not moved_by(model, cfg.stages[name], run), name
    assert moved_by(model, cfg.stages['clip_pet'], run) == {'encode.pet.codebook.embed', 'encode.pet.codebook.cluster_size'}
    model.adapt(cfg.lora)
    assert not moved_by(model, cfg.stages['instruct'], run)
