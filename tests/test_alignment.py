"""The alignment loss against eager attention maps: values and gradients, over model families, padding, grouped heads, checkpointing and misuse."""
import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM
from petvlm import alignment
from petvlm.alignment import AlignmentError, alignment_loss, attention_mass, mask_to_tokens, on_sequence, region_masks, supervised_queries
from petvlm.losses import IGNORED, lm_loss

FAMILIES = ('mistral', 'llama', 'qwen2', 'phi3')
HEADS = {'grouped': 2, 'one to one': 4}
B, S, N = 3, 40, 12
START = {'none': (0, 0, 0), 'left': (7, 0, 3), 'right': (0, 0, 0)}


def tiny(family, implementation, kv_heads=2, **kw):
    torch.manual_seed(3)
    sizes = dict(vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
                 pad_token_id=0, max_position_embeddings=128, initializer_range=.3) | kw  # a wide initialisation: maps far from uniform
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation=implementation).train()


def batch(padding):
    g = torch.Generator().manual_seed(11)
    ids, attended, slots = torch.randint(3, 50, (B, S), generator=g), torch.ones(B, S, dtype=torch.long), torch.zeros(B, S, dtype=torch.bool)
    for i, start in enumerate(START[padding]):
        attended[i, :start] = 0
        slots[i, start + 2 + i:start + 2 + i + N] = True          # the image stands elsewhere in every sample
    if padding == 'right': attended[0, 33:] = attended[2, 29:] = 0
    labels = ids.masked_fill(slots | (attended == 0), IGNORED)
    labels[:, :26] = IGNORED
    regions = (torch.rand(B, 2, N, generator=g) > .6).float()
    regions[2, 1] = 0                                             # a sample with one region only
    return ids, attended, slots, labels, regions


def eager_masses(attentions, slots, queries, regions):
    "Equation 10 sample by sample, from the maps."
    M = torch.stack(attentions).mean((0, 2))
    M_v = torch.stack([M[i][queries[i]].mean(0)[slots[i]] for i in range(B)])
    return (M_v[:, None]*regions).sum(-1), M_v.sum(-1)


def run(model, data, reading='region', maps=False, **kw):
    ids, attended, slots, labels, regions = data
    queries = supervised_queries(labels)
    with attention_mass(regions, slots, queries) as mass:
        out = model(ids, attention_mask=attended, use_cache=False, **({'output_attentions': True} if maps else {'attention_mass': mass}), **kw)
    masses = eager_masses(out.attentions, slots, queries, regions) if maps else mass.masses()
    align = alignment_loss(*masses, reading, mass.valid).loss
    model.zero_grad()
    (lm_loss(out.logits, labels) + align).backward()              # equation 12 with lambda = 1, so that the alignment's share of the gradient is large
    return masses, align, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(a, b, atol=1e-5):
    assert all(torch.allclose(x, y, atol=atol) for x, y in zip(a[0], b[0])) and torch.allclose(a[1], b[1], atol=atol)
    assert a[2].keys() == b[2].keys()
    for n in a[2]: torch.testing.assert_close(a[2][n], b[2][n], atol=atol, rtol=1e-4, msg=n)


@pytest.mark.parametrize('padding', START)
@pytest.mark.parametrize('kv_heads', HEADS.values(), ids=HEADS)
@pytest.mark.parametrize('family', FAMILIES)
def test_equals_eager_maps(family, kv_heads, padding):
    same(run(tiny(family, 'petvlm_mass', kv_heads), batch(padding)), run(tiny(family, 'eager', kv_heads), batch(padding), maps=True))


def test_union_reading_and_sliding_window():
    kw = dict(sliding_window=16)                                  # some text queries no longer see the whole image
    same(run(tiny('mistral', 'petvlm_mass', **kw), batch('left'), 'union'), run(tiny('mistral', 'eager', **kw), batch('left'), 'union', maps=True))


def test_head_width_that_needs_padding():
    kw = dict(hidden_size=40, head_dim=10)                        # 10 + 3 channels -> 16
    same(run(tiny('mistral', 'petvlm_mass', **kw), batch('right')), run(tiny('mistral', 'eager', **kw), batch('right'), maps=True))


def test_gradient_checkpointing_changes_nothing():
    model = tiny('llama', 'petvlm_mass')
    plain = run(model, batch('left'))
    model.activation_checkpointing_enable()
    same(run(model, batch('left')), plain, atol=1e-8)


def test_reentrant_checkpointing_is_refused():
    model = tiny('llama', 'petvlm_mass')
    model.activation_checkpointing_enable({'use_reentrant': True})
    with pytest.raises(AlignmentError, match='use_reentrant=False'): run(model, batch('none'))


def test_through_lora_adapters():
    peft = pytest.importorskip('peft')
    adapters = peft.LoraConfig(r=8, lora_alpha=1, target_modules='all-linear', init_lora_weights=False, task_type='CAUSAL_LM')
    model, reference = (peft.get_peft_model(tiny('mistral', i), adapters) for i in ('petvlm_mass', 'eager'))
    reference.load_state_dict(model.state_dict())
    same(run(model, batch('left')), run(reference, batch('left'), maps=True))


def test_bfloat16_is_close():
    exact, rough = run(tiny('mistral', 'petvlm_mass'), batch('left')), run(tiny('mistral', 'petvlm_mass').bfloat16(), batch('left'))
    assert rough[0][0].dtype == torch.float32
    assert torch.allclose(exact[0][1], rough[0][1], rtol=.02)


def test_off_is_plain_sdpa_bit_for_bit():
    ids, attended, *_ = batch('left')
    ours, plain = (tiny('mistral', i)(ids, attention_mask=attended).logits for i in ('petvlm_mass', 'sdpa'))
    assert torch.equal(ours, plain)


def test_generation_with_a_cache_is_that_of_sdpa():
    ids, attended, *_ = batch('left')
    ours, plain = (tiny('mistral', i).eval().generate(ids, attention_mask=attended, max_new_tokens=6, do_sample=False) for i in ('petvlm_mass', 'sdpa'))
    assert torch.equal(ours, plain)


def test_no_float_map_is_kept():
    ids, attended, slots, labels, regions = batch('none')
    shapes = []
    model = tiny('mistral', 'petvlm_mass')
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append((x.is_floating_point(), tuple(x.shape[-2:]))) or x, lambda x: x):
        with attention_mass(regions, slots, supervised_queries(labels)) as mass: model(ids, use_cache=False, attention_mass=mass)
    assert len(shapes) > 50 and (True, (S, S)) not in shapes


def test_nested_recorders_and_exceptions_leave_nothing_behind():
    ids, attended, slots, labels, regions = batch('none')
    queries, model = supervised_queries(labels), tiny('mistral', 'petvlm_mass')
    before = model(ids).logits
    with attention_mass(regions, slots, queries) as outer:
        with pytest.raises(RuntimeError, match='mid-flight'), attention_mass(1 - regions, slots, queries) as lost:
            raise RuntimeError('mid-flight')
        with attention_mass(1 - regions, slots, queries) as inner: model(ids, attention_mass=inner, use_cache=False)
        model(ids, attention_mass=outer, use_cache=False)
    assert not lost.open and not lost.records
    (a, whole), (b, _) = outer.masses(), inner.masses()
    assert torch.allclose(a + b, whole[:, None].expand_as(a), atol=1e-6)      # complementary sets share the mass
    assert torch.equal(model(ids).logits, before)


def test_layers_can_be_chosen():
    ids, _, slots, labels, regions = batch('none')
    model = tiny('mistral', 'petvlm_mass')
    with torch.no_grad():
        with attention_mass(regions, slots, supervised_queries(labels)) as every: model(ids, attention_mass=every, use_cache=False)
        with attention_mass(regions, slots, supervised_queries(labels), layers=(1, 2)) as some: model(ids, attention_mass=some, use_cache=False)
    assert set(some.records) == {1, 2} and torch.allclose(some.records[1], every.records[1])


def test_misuse_is_named():
    ids, _, slots, labels, regions = batch('none')
    queries, model = supervised_queries(labels), tiny('mistral', 'petvlm_mass')
    with attention_mass(regions, slots, queries) as mass: model(ids, use_cache=False)
    with pytest.raises(AlignmentError, match='no layer was recorded'): mass.masses()
    with attention_mass(regions, slots, queries) as mass:
        model(ids, attention_mass=mass, use_cache=False)
        with pytest.raises(AlignmentError, match='ran twice'): model(ids, attention_mass=mass, use_cache=False)
    with attention_mass(regions, slots, queries) as mass, pytest.raises(AlignmentError, match='without a cache'): model(ids[:, :9], attention_mass=mass)
    with pytest.raises(AlignmentError, match='placeholders'): on_sequence(regions[..., 1:], slots)
    with pytest.raises(AlignmentError, match='both be'): attention_mass(regions, slots, queries[:, 1:]).__enter__()
    with pytest.raises(AlignmentError, match='no reading'): alignment_loss(torch.ones(1, 1), torch.ones(1), 'mean')


def test_samples_without_regions_or_queries_are_counted_and_teach_nothing():
    mass_in = torch.tensor([[.2, .1], [.3, 0.], [0., 0.]], requires_grad=True)
    mass_all = torch.tensor([.5, .6, 0.], requires_grad=True)                 # the last sample has no supervised query
    valid = torch.tensor([[True, True], [False, False], [True, True]])
    for reading in ('region', 'union'):
        a = alignment_loss(mass_in, mass_all, reading, valid)
        g_in, g_all = torch.autograd.grad(a.loss, (mass_in, mass_all))
        assert a.empty == 2 and torch.isfinite(a.loss) and g_in.isfinite().all() and g_all.isfinite().all()
        assert (g_in[1:] == 0).all() and (g_in[0] != 0).all()
    assert torch.isclose(alignment_loss(mass_in, mass_all, 'region', valid).loss*3, torch.tensor(.6**2 + .8**2))
    assert torch.isclose(alignment_loss(mass_in, mass_all, 'union', valid).loss*3, torch.tensor(2*.4**2))


def test_regions_are_largest_first_diagonals_join_and_the_rest_is_left_out():
    pet = torch.zeros(2, 1, 8, 8, 8)
    pet[0, 0, 0, 0, 0] = 9                                                    # 1 voxel
    pet[0, 0, 4, 4, 4] = pet[0, 0, 5, 5, 5] = 9                               # 2, joined by a corner
    pet[0, 0, 0, 6:, 6:] = 9                                                  # 4
    masks = region_masks(pet, 4., 'region', max_regions=2)
    assert masks.shape == (2, 2, 8, 8, 8) and masks.sum((2, 3, 4)).tolist() == [[4, 2], [0, 0]]
    assert region_masks(pet[1:], 4., 'region').shape == (1, 1, 8, 8, 8)       # nothing hot: one empty region
    assert not region_masks(torch.full((1, 1, 2, 2, 2), 4.), 4.).any()        # above, not at
    with pytest.raises(AlignmentError, match=r'expected \(B, 1, D, H, W\)'): region_masks(pet[:, 0], 4.)
    with pytest.raises(AlignmentError, match='no mode'): region_masks(pet, 4., 'slices')


def test_tokens_follow_the_lattice():
    masks = torch.zeros(1, 1, 4, 6, 8, dtype=torch.bool)
    masks[0, 0, 2, 3, 5] = masks[0, 0, 3, 2, 4] = True                        # box (1, 1, 2) of boxes of 2 x 2 x 2: 2 voxels of 8
    tokens = mask_to_tokens(masks, (2, 3, 4))
    assert tokens.shape == (1, 1, 24) and tokens.nonzero()[:, 2].tolist() == [1*12 + 1*4 + 2]
    assert mask_to_tokens(masks, (2, 3, 4), coverage=True).max() == .25
    assert mask_to_tokens(masks, (2, 3, 4), least=.25).sum() == 1 and mask_to_tokens(masks, (2, 3, 4), least=.3).sum() == 0
    with pytest.raises(AlignmentError, match='does not divide'): mask_to_tokens(masks, (3, 3, 4))


@pytest.fixture
def through_sdpa(monkeypatch): monkeypatch.setattr(alignment, '_cpu_kernel', lambda *a, **kw: False)       # what every device but a CPU does


@pytest.mark.parametrize('padding', START)
@pytest.mark.parametrize('kv_heads', HEADS.values(), ids=HEADS)
def test_channels_through_sdpa_equal_eager_maps(kv_heads, padding, through_sdpa):
    same(run(tiny('mistral', 'petvlm_mass', kv_heads), batch(padding)), run(tiny('mistral', 'eager', kv_heads), batch(padding), maps=True))


def beside(kv_heads, monkeypatch, data, least=0, implementation='petvlm_mass'):
    "As on a GPU: masses from beside the kernel, heads 16 wide (kernels want a multiple of 8)."
    monkeypatch.setattr(alignment, 'BESIDE', {'cpu': least})
    seen, own = [], alignment.with_mass
    monkeypatch.setattr(alignment, 'with_mass', lambda *a: seen.append(a) or own(*a))
    return run(tiny('mistral', implementation, kv_heads, hidden_size=64), data), len(seen)


@pytest.mark.parametrize('kv_heads', HEADS.values(), ids=HEADS)
def test_masses_beside_the_kernel_equal_eager_maps(kv_heads, through_sdpa, monkeypatch):
    ours, layers = beside(kv_heads, monkeypatch, batch('none'))
    assert layers == 3
    same(ours, run(tiny('mistral', 'eager', kv_heads, hidden_size=64), batch('none'), maps=True))


def test_a_mask_keeps_the_channels_in_the_kernel(through_sdpa, monkeypatch):
    ours, layers = beside(2, monkeypatch, batch('left'))
    assert layers == 0
    same(ours, run(tiny('mistral', 'eager', 2, hidden_size=64), batch('left'), maps=True))


@pytest.mark.parametrize('least, layers', [(S, 3), (S + 1, 0)])
def test_short_sequences_keep_the_channels_in_the_kernel(least, layers, through_sdpa, monkeypatch):
    ours, ran = beside(2, monkeypatch, batch('none'), least)
    assert ran == layers
    same(ours, run(tiny('mistral', 'eager', 2, hidden_size=64), batch('none'), maps=True))


def test_beside_the_kernel_an_image_behind_its_questions_is_not_seen(through_sdpa, monkeypatch):
    "Supervised positions before, between and after image tokens: the causal mask cuts the strip."
    ids, attended, slots, labels, regions = batch('none')
    labels = ids.masked_fill(slots, IGNORED)
    data = ids, attended, slots, labels, regions
    ours, layers = beside(4, monkeypatch, data)
    assert layers == 3
    same(ours, run(tiny('mistral', 'eager', 4, hidden_size=64), data, maps=True))


@pytest.mark.parametrize('padding', START)
def test_many_regions_need_one_channel_back(padding, monkeypatch):
    data = batch(padding)
    data = (*data[:4], torch.eye(N)[None, :9].repeat(B, 1, 1))                                             # nine regions of one token: wider than a head's half
    widths, kernel = [], alignment._CPU
    monkeypatch.setattr(alignment, '_CPU', tuple(lambda *a, k=k, **kw: widths.append(a[k].shape[-1]) or kernel[k](*a, **kw) for k in (0, 1)))
    ours = run(tiny('mistral', 'petvlm_mass'), data)
    same(ours, run(tiny('mistral', 'eager'), data, maps=True))
    assert widths == [24]*3 + [16]*3                                                                        # heads are 12 wide: 12 + 10 and 12 + 1, rounded up to 8; three layers


def test_without_the_loss_nothing_is_widened_on_the_way_back(monkeypatch):
    ids, attended, slots, labels, regions = batch('none')
    widths, kernel = [], alignment._CPU
    monkeypatch.setattr(alignment, '_CPU', (kernel[0], lambda *a, **kw: widths.append(a[0].shape[-1]) or kernel[1](*a, **kw)))
    model = tiny('mistral', 'petvlm_mass')
    with attention_mass(regions, slots, supervised_queries(labels)) as mass: loss = lm_loss(model(ids, use_cache=False, attention_mass=mass).logits, labels)
    loss.backward()
    assert widths == [16]*3 and mass.records


def test_little_is_kept_beyond_plain_attention():
    "What autograd keeps, storage by storage: the masses per query and head, no widened query, key, value or output."
    ids, _, slots, labels, regions = batch('none')
    def kept(implementation, **extra):
        model, found = tiny('mistral', implementation, kv_heads=4), {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        def pack(x):
            if (s := x.untyped_storage()).data_ptr() not in own: found[s.data_ptr()] = (x, s.nbytes())       # the tensor itself, so that its place is not used again
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x): out = model(ids, use_cache=False, **extra)
        return sum(n for _, n in found.values()), out
    with attention_mass(regions, slots, supervised_queries(labels)) as mass: ours = kept('petvlm_mass', attention_mass=mass)[0]
    layer = B*S*4*4*3 + 4*(B*S*3 + B*S)                                                                    # (R + 1) masses per query and head; channels and weights once
    assert 0 < ours - kept('sdpa')[0] < 3*layer + 2000
