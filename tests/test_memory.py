"What a stage holds and computes, against sums made by hand; what does not fit is refused with the number and a way out; scale `gpu` on paper and, slowly, for real."
import dataclasses, functools, json, multiprocessing
import pytest, torch
from torch import nn
from petvlm.config import ConfigError, Part, find_root, load_params, resolve
from petvlm.memory import HEADROOM, Footprint, Tally, TooLarge, Vocabulary, checkpointed, fits, footprint, made_up, remedies, skeleton, smaller, try_steps
from petvlm.peak import measured
from petvlm.train import build, run_stage, set_trainable

SYSTEMS = [p for p, spec in load_params()['points'].items() if spec['ablation'] == 'none']
GIB = 2**30

@functools.cache
def of(point: str, scale: str): return resolve(point, scale)

def test_what_autograd_keeps_of_a_small_net():
    "Linear keeps its input, GELU what goes into it, the last Linear what comes out of GELU; weights are not counted, a second use of a tensor neither."
    with torch.device('meta'): net, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)), torch.empty(10, 32)
    tally = Tally(net)
    with tally, torch.autograd.graph.saved_tensors_hooks(tally.keep, lambda t: t): y = net(x).sum() + net[0](x).sum()
    assert sum(tally.kept.values()) == 4*10*(32 + 64 + 64) and tally.largest == 4*10*64
    assert tally.flops == 2*10*(32*64*2 + 64*8)
    with tally: y.backward()
    assert tally.flops == 2*10*(32*64*2 + 64*8) + 2*10*(2*32*64 + 2*64*8)              # of the first Linear the weight alone (twice), of the last weight and input

def test_what_a_part_makes_that_does_not_move_passes_through():
    "Nobody keeps what frozen layers make; it has to lie somewhere all the same, beside what it was made of. Measured on a card: fusion's frozen encoders."
    with torch.device('meta'): net, x = nn.Sequential(nn.Linear(32, 1024), nn.GELU(), nn.Linear(1024, 8), nn.Linear(8, 4)), torch.empty(10, 32)
    net[:3].requires_grad_(False); tally = Tally(net)
    with tally, torch.autograd.graph.saved_tensors_hooks(tally.keep, lambda t: t): net(x).sum()
    assert sum(tally.kept.values()) == 4*10*8 and tally.high == 2*4*10*1024

def test_a_frozen_layer_computes_no_gradient_of_its_weight():
    with torch.device('meta'): net, x = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)), torch.empty(10, 32)
    net[1].requires_grad_(False); tally = Tally(net)
    with tally: net(x).sum().backward()
    assert tally.flops == 2*10*(32*64 + 64*8) + 2*10*(32*64 + 64*8)                    # back: the first's weight, the second's input

@pytest.mark.parametrize('groups', [1, 16])
def test_a_convolution_of_many_groups(groups):
    with torch.device('meta'): conv, x = nn.Conv3d(16, 16, 3, padding=1, groups=groups), torch.empty(2, 16, 4, 5, 6, requires_grad=True)
    tally = Tally(conv); each = 2*2*4*5*6*16*(16//groups)*27
    with tally: y = conv(x); assert tally.flops == each; y.sum().backward()
    assert tally.flops == 3*each

def test_a_language_models_operations_are_two_a_weight_and_token():
    cfg, text = of('vipet', 'phantom'), 100
    stage = dataclasses.replace(cfg.stages['lm'], batch=3)
    f, model = footprint(cfg, stage, amp=False, text=text), build(cfg, Vocabulary())
    n = text + 60                                                                       # the lattice of the truth, 4 x 3 x 5
    linear = sum(m.weight.numel() for m in model.lm.modules() if isinstance(m, nn.Linear))
    by_hand = 2*3*n*linear + 4*(2*2*3*n*n*4*32) + 2*3*60*model.truth.weight.numel()     # 4 layers: queries x keys, weights x values, 4 heads of 32
    assert f.forward == pytest.approx(by_hand, rel=2e-3) and f.backward == pytest.approx(2*by_hand, rel=.02) and f.tokens == n

def test_weights_gradients_and_moments():
    cfg = of('vipet', 'phantom'); model = build(cfg, Vocabulary())
    every, projector = (sum(p.numel() for p in m.parameters()) for m in (model, model.project))
    f = footprint(cfg, dataclasses.replace(cfg.stages['projection'], batch=2), amp=False, text=50)
    assert (f.weights, f.gradients, f.optimizer, f.copies) == (4*every, 4*projector, 8*projector, 0)

def test_a_skeleton_has_no_numbers_after_a_load(monkeypatch):
    "torch notes at the first device context which functions a device may place. Loading a model with transformers is one, and replaces `linspace` meanwhile."
    noted = torch.utils._device._device_constructors
    with monkeypatch.context() as m:
        m.setattr(torch, 'linspace', lambda *a, **kw: None); noted.cache_clear()
        with torch.device('meta'): torch.empty(0)
    try: assert {p.device.type for p in skeleton(of('vipet', 'phantom')).parameters()} == {'meta'}
    finally: noted.cache_clear()

@pytest.mark.slow
def test_a_hubs_language_model_lies_in_two_bytes_and_adapters_in_four():
    cfg = of('med3dvlm', 'paper')
    f = footprint(cfg, dataclasses.replace(cfg.stages['instruct'], batch=1), text=64)
    assert f.gradients == 4*(47_221_248 + 40_370_176)                                  # the mixer and LoRA of rank 16, as tests/test_paper_scale.py has them
    assert 2*7_615_616_512 < f.weights < 2*7_615_616_512 + 4*400e6

def test_twice_the_batch_twice_the_activations():
    cfg = of('petar', 'phantom'); one, two = (footprint(cfg, dataclasses.replace(cfg.stages['full'], batch=b), amp=False, text=80) for b in (4, 8))
    assert two.activations == pytest.approx(2*one.activations, rel=.01) and two.forward == pytest.approx(2*one.forward, rel=.01) and two.weights == one.weights

@pytest.mark.slow
def test_ranks_take_their_share():
    cfg = of('content_topic', 'paper'); stage = cfg.stages['joint']
    one, four = (footprint(cfg, stage, ranks=n, text=64) for n in (1, 4))
    assert (one.batch, four.batch) == (8, 2) and four.forward == pytest.approx(one.forward/4, rel=.01)

def test_the_highest_point_of_a_step():
    f = Footprint(weights=10, copies=1, gradients=50, optimizer=100, activations=30, lm=20, workspace=5, forward=0, backward=0, batch=4, tokens=9)
    assert f.total == 10 + 1 + 100 + 50 and f._replace(activations=60).total == 111 + 65 and f._replace(accumulate=2).total == 111 + 35 + 50
    half = smaller(f, 2)
    assert (half.activations, half.workspace, half.accumulate, half.batch) == (15, 2, 2, 2)

@pytest.mark.parametrize('point,name,ways', [('content_topic', 'joint', ('batch 4, accumulate 2', 'QLoRA', 'sharded')), pytest.param('med3dvlm', 'instruct', ('batch 4, accumulate 2', 'checkpointing', 'QLoRA', 'sharded'), marks=pytest.mark.slow)])
def test_what_does_not_fit_is_refused_with_the_number_and_ways_out(point, name, ways):
    cfg = of(point, 'paper'); stage, model = cfg.stages[name], skeleton(cfg)
    with pytest.raises(TooLarge) as caught: fits(cfg, stage, 24, model=model, text=256)
    e, text = caught.value, str(caught.value)
    assert e.needed > e.there == int(24*GIB*(1 - HEADROOM)) and f'{e.needed/GIB:.1f} GiB' in text and f'{e.there/GIB:.1f} GiB' in text
    assert all(way in text for way in (*ways, 'all of these'))
    f = fits(cfg, stage, 4*e.needed/GIB, text=256, model=model)
    assert f.total == e.needed and all(g.total < f.total for g in remedies(f, cfg, stage, model).values())

@pytest.mark.slow
def test_a_fully_trained_language_model_is_not_offered_four_bits():
    cfg = of('petar', 'paper'); model = skeleton(cfg); f = footprint(cfg, cfg.stages['full'], text=64, model=model)
    ways = remedies(f, cfg, cfg.stages['full'], model)
    assert not any('QLoRA' in w for w in ways) and any('checkpointing' in w for w in ways)

def test_an_unknown_language_model_is_named():
    cfg = dataclasses.replace(of('vipet', 'paper'), lm=Part('hub', {'name': 'some/model'}))
    with pytest.raises(ConfigError, match='some/model'): skeleton(cfg)

@pytest.mark.slow
@pytest.mark.parametrize('point,name', [(p, s) for p in SYSTEMS for s in of(p, 'phantom').stages])
def test_the_shapes_of_a_stage_are_those_of_its_losses(point, name):
    "One real step at phantom scale runs on made-up numbers: what is counted is what is trained."
    cfg = of(point, 'phantom'); torch.manual_seed(0); model = build(cfg, Vocabulary())
    assert footprint(cfg, dataclasses.replace(cfg.stages[name], batch=2), amp=False, text=40).total > 0
    (loss,) = try_steps(model, cfg, cfg.stages[name], 2, 40)
    assert loss == loss

# --- checkpointing, as offered

def test_checkpointed_layers_give_the_same_gradients(tmp_path):
    cfg = of('vipet', 'smoke'); stage = dataclasses.replace(cfg.stages['instruct'], batch=2)
    def gradients(checkpointing):
        torch.manual_seed(0); model = build(cfg, Vocabulary()); model.adapt(cfg.lora)
        for n, p in model.named_parameters():
            if 'lora_B' in n: nn.init.normal_(p, std=.02)
        set_trainable(model, stage.train)
        if checkpointing: model.lm.activation_checkpointing_enable(activation_checkpointing_kwargs={'use_reentrant': False})
        model.train(); kept = [0]
        def count(t): kept[0] += t.numel(); return t
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t): loss = model(objective={'lm': 1., 'align': .1}, **made_up(model, cfg, stage, 2, 60))['loss']
        loss.backward()
        return kept[0], {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    (many, plain), (few, again) = gradients(False), gradients(True)
    assert few < .6*many and all(torch.allclose(g, again[n], atol=1e-6) for n, g in plain.items())

# --- scale `gpu`: real resolution, SmolLM2, one card of 24 GB

def refused(cfg, stage, model) -> bool:
    try: fits(cfg, stage, 24, model=model)
    except TooLarge: return True
    return False

@pytest.mark.slow
@pytest.mark.parametrize('point', SYSTEMS)
def test_scale_gpu_fits_a_card_of_24_gb(point):
    cfg = of(point, 'gpu'); model = skeleton(cfg)
    assert not [s.name for s in cfg.stages.values() if refused(cfg, s, model)]

@pytest.mark.slow
@pytest.mark.parametrize('point,name', [('vipet', 'pretrain_ct'), ('petar', 'full'), ('content_topic', 'joint'), ('med3dvlm', 'projection')])
def test_scale_gpu_makes_steps_on_a_cpu(point, name):
    "Published encoders at full resolution and a language model of SmolLM2's size (its shapes, no weights): two steps of one item."
    cfg = of(point, 'gpu'); torch.manual_seed(0)
    from transformers import AutoConfig, AutoModelForCausalLM
    from petvlm.memory import SIZES
    model = build(cfg, Vocabulary(49152), lm=AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES['smollm2'])))
    losses = try_steps(model, cfg, cfg.stages[name], 1, 32, steps=2)
    assert len(losses) == 2 and all(0 < x < 1e4 for x in losses)

# --- what one card did

def test_the_howto_tells_what_was_measured():
    "Memory and seconds of `nbs/howto/gpu.md` are those of `tables/steps-gpu.json`, its minutes those of the steps of `params.yaml`."
    told, text = json.loads((find_root()/'tables/steps-gpu.json').read_text(encoding='utf-8')), (find_root()/'nbs/howto/gpu.md').read_text(encoding='utf-8')
    for name, r in told['run'].items():
        if r['card_mib']: assert f"{r['card_mib']:,}" in text, name
    alone = {n: r['step_s'] for n, r in told['alone'].items()} | {'vipet.instruct': round(told['run']['vipet.instruct']['step_s'], 2)}
    minutes = 0
    for s in of('vipet', 'gpu').stages.values():
        seconds = alone[f"vipet.{s.name.replace('_ct', '_pet')}"]
        assert f'| `{s.name}` | {s.steps:,} | {seconds:g}' in text and f'| {s.steps*seconds/60:.1f} |' in text, s.name
        minutes += s.steps*seconds/60
    assert f'**{minutes:.0f}**' in text
