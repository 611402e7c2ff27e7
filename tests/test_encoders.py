"CT-ViT and ViT3D are numerically those of the reference implementations; frozen codebooks stay; odd shapes work."
import pytest, torch, torch.nn.functional as F
from parity import difference, expected, fixture, tensor, weights
from petvlm.checkpoints import load_published
from petvlm.codebook import CosineCodebook
from petvlm.dcformer import AxialConv, DCFormer, band
from petvlm.encoders import CTViT, EncoderError, ViT3D

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

def reference_ctvit(name: str) -> CTViT:
    meta = fixture(name); c = meta['config']
    size, p = c['image_size'], c['patch_size']
    model, audit = load_published('ctclip.ctvit', weights(meta), image_size=(meta['input']['video']['shape'][2], size, size), patch_size=(c['temporal_patch_size'], p, p))
    assert {k: audit.sizes[k] for k in ('dim', 'heads', 'dim_head', 'codebook_size', 'spatial_depth', 'temporal_depth')} == {k: c[k] for k in ('dim', 'heads', 'dim_head', 'codebook_size', 'spatial_depth', 'temporal_depth')}
    assert list(audit.kept) == ['codebook.cluster_size'] and not any(k.startswith('enc_') and 'null_kv' not in k and 'context_norm' not in k for k in audit.passed_over)
    return model

def tapped(modules: dict, run) -> dict:
    "The outputs of named `modules` while `run` is called."
    seen = {}
    hooks = [m.register_forward_hook(lambda _, __, y, k=k: seen.__setitem__(k, y)) for k, m in modules.items()]
    seen['result'] = run()
    for h in hooks: h.remove()
    return seen

@pytest.mark.parametrize('name', ['ctvit_reduced', 'ctvit_reduced_beta0', 'ctvit_full_20frames'])
@torch.no_grad()
def test_ctvit_equals_the_ct_clip_reference(name):
    model, meta = reference_ctvit(name), fixture(name)
    seen = tapped({'patch_tokens': model.stem, 'spatial_bias': model.bias, 'after_spatial': model.spatial}, lambda: model.features(tensor(meta['input']['video'])))
    seen |= {'after_spatial': seen['after_spatial'].flatten(2, 3).flatten(0, 1), 'pre_vq': seen['result'].x}
    for k in ('patch_tokens', 'spatial_bias', 'after_spatial', 'pre_vq'):
        if k in meta['outputs']: assert difference(name, k, seen[k]).max() < 2e-5, k
    ids = model.codebook(seen['pre_vq']).ids.view(1 if 'full' in name else 2, *model.grid)
    clear = expected(name)['vq_top2_margin'].reshape(-1) > 1e-5            # near a tie the last bit decides
    assert clear.mean() > .99 and not difference(name, 'codebook_ids', ids)[clear].any()

@torch.no_grad()
def test_ctvit_tokens_are_codes():
    model, meta = reference_ctvit('ctvit_reduced'), fixture('ctvit_reduced')
    t = model(tensor(meta['input']['video']))
    assert difference('ctvit_reduced', 'tokens', t.x.unflatten(1, model.grid)).max() < 1e-6
    assert difference('ctvit_reduced', 'time_mean_tokens', t.lattice().mean(2).permute(0, 2, 3, 1)).max() < 1e-6

@pytest.mark.parametrize('name', ['m3d_vit_reduced', pytest.param('m3d_vit_full', marks=pytest.mark.slow)])
@torch.no_grad()
def test_vit3d_equals_the_m3d_reference(name):
    meta = fixture(name); c = meta['config']
    model, audit = load_published('m3d.vit', weights(meta), image_size=c['img_size'], patch_size=c['patch_size'], heads=c['num_heads'])
    assert not audit.passed_over and not audit.kept
    hidden = {k: model.blocks[int(k.removeprefix('hidden'))] for k in meta['outputs'] if k.startswith('hidden')}
    seen = tapped(hidden, lambda: model.sequence(tensor(meta['input']['x'])))
    for k in hidden: assert difference(name, k, seen[k]).max() < 1e-4, k
    assert difference(name, 'out', seen['result']).max() < 2e-5

def test_codebook_learns_as_the_reference_does():
    meta, name = fixture('vq_train_step'), 'vq_train_step'
    book = CosineCodebook(64, 256)
    book.embed.copy_(weights(meta)['_codebook.embed'][0])
    x, cotangent = tensor(meta['input']['x']).requires_grad_(), tensor(meta['input']['cotangent'])
    still = book(x)
    out = book(x, learn=True)
    straight, = torch.autograd.grad((out.x*cotangent).sum(), x, retain_graph=True)
    commit, = torch.autograd.grad(out.commitment, x)
    got = {'quantized': out.x, 'ids': out.ids, 'commit_loss': out.commitment[None], 'grad_straight_through': straight, 'grad_commit': commit,
           'after:_codebook.cluster_size': book.cluster_size[None], 'after:_codebook.embed': book.embed[None], 'eval_quantized': still.x, 'eval_ids': still.ids}
    for k, v in got.items(): assert difference(name, k, v).max() < 1e-6, k

def test_a_frozen_codebook_survives_train():
    model = CTViT((4, 8, 12), (2, 4, 4), dim=16, spatial_depth=1, temporal_depth=1, heads=2, dim_head=8, codebook_size=16).freeze_codebook()
    before = {k: v.clone() for k, v in model.named_buffers()}
    model.train(); model(torch.randn(2, 1, 4, 8, 12)).x.sum().backward()
    assert all(torch.equal(before[k], v) for k, v in model.named_buffers())
    model.freeze_codebook(False)(torch.randn(2, 1, 4, 8, 12))
    assert not torch.equal(before['codebook.embed'], model.codebook.embed)

OPTIONS = [{}, {'peg_scrambled': False, 'kv_normed': True}, {'patch_norm': False, 'patch_mlp': 12, 'position': 'learned'}, {'codebook_size': 16}]

@pytest.mark.parametrize('kw', OPTIONS, ids=str)
def test_every_option_runs_on_odd_shapes_and_reaches_every_parameter(kw):
    model = CTViT((6, 10, 21), (2, 5, 3), channels=2, dim=16, spatial_depth=1, temporal_depth=1, heads=2, dim_head=8, **{'codebook_size': 0} | kw)
    t = model(torch.randn(2, 2, 6, 10, 21)); (t.x*torch.randn_like(t.x)).sum().backward()
    assert t.grid == model.grid == (3, 2, 7) and t.x.shape == (2, 42, 16)
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]

def test_a_token_sees_the_volume_at_its_place():
    model = ViT3D((4, 8, 12), (2, 4, 4), dim=16, depth=0, heads=2, mlp_dim=32)
    x = torch.zeros(1, 1, 4, 8, 12); y = x.clone(); y[0, 0, 3, 5, 9] = 1                       # patch (1, 1, 2)
    assert (model(y).lattice() - model(x).lattice()).abs().sum(1).nonzero().tolist() == [[0, 1, 1, 2]]

@pytest.mark.parametrize('make', [lambda: CTViT((4, 8, 9), (2, 4, 4)), lambda: CTViT((4, 8), (2, 4, 4)),
                                  lambda: CTViT((4, 8, 8), (2, 4, 4), position='sine'), lambda: ViT3D((4, 8, 8), (2, 4, 4), dim=10, heads=4)])
def test_what_cannot_be_built_says_why(make):
    with pytest.raises(EncoderError, match=r'.{20,}'): make()

def test_bfloat16_autocast_agrees_with_float32():
    model, x = CTViT((4, 16, 16), (2, 4, 4), dim=32, spatial_depth=1, temporal_depth=1, heads=2, dim_head=16, codebook_size=0), torch.randn(1, 1, 4, 16, 16)
    with torch.autocast('cpu', dtype=torch.bfloat16): low = model(x).x
    assert (low.float() - model(x).x).abs().max() < .15

ENCODERS = {'ctvit': lambda **kw: CTViT((4, 8, 12), (2, 4, 4), dim=16, spatial_depth=2, temporal_depth=2, heads=2, dim_head=8, codebook_size=0, **kw),
            'vit3d': lambda **kw: ViT3D((4, 8, 12), (2, 4, 4), dim=16, depth=3, heads=2, mlp_dim=32, **kw),
            'dcformer': lambda **kw: DCFormer((4, 8, 12), dims=(4, 8, 12), blocks=(2, 1), kernels=(5, 3), stride=2, layer_scale=.5, **kw)}

@pytest.mark.parametrize('name', ENCODERS)
def test_checkpointing_changes_no_number_and_keeps_less(name):
    found, x = [], torch.randn(2, 1, 4, 8, 12)
    for on in (False, True):
        torch.manual_seed(1)
        model, kept = ENCODERS[name](checkpointing=on).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t): y = model(x).x
        (y*torch.linspace(-1, 1, y.shape[-1])).mean().backward()
        found.append((sum(kept), [y.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]))     # batch norms count a batch once
    (much, plain), (little, again) = found
    assert little < much/2 and len(plain) == len(again) and all(torch.equal(a, b) for a, b in zip(plain, again))

@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('depthwise', [False, True])
def test_axial_convolutions_are_three_conv3d_in_both_modes_and_directions(depthwise, stride):
    layer, x = AxialConv(6, 6, 7, stride, depthwise), torch.randn(2, 6, 8, 13, 12, requires_grad=True)             # 1,248 voxels: by matrices where depthwise
    for _, norm in layer.axes: torch.nn.init.normal_(norm.weight); torch.nn.init.normal_(norm.running_mean); torch.nn.init.uniform_(norm.running_var, .5, 2)
    for mode in (True, False):
        layer.train(mode)
        plain = sum(F.batch_norm(conv(x), norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias, mode) for conv, norm in layer.axes)
        ours, pull = layer(x), torch.randn_like(plain)
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
        for a, b in zip(*(torch.autograd.grad((y*pull).sum(), (x, *layer.parameters())) for y in (ours, plain))): torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)

@pytest.mark.parametrize('n', [1, 2, 5, 12])
def test_a_band_is_the_convolution_of_a_row(n):
    kernel, x = torch.tensor([[1., 2., 3., 4., 5.]]), torch.arange(1., n + 1)
    by_hand = [sum(kernel[0, j - i + 2]*x[j] for j in range(n) if abs(j - i) <= 2) for i in range(n)]
    torch.testing.assert_close(band(kernel, n)[0] @ x, torch.stack(by_hand))
