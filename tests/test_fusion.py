"Fusion is equations 5-8 whatever the number of heads; pools and projectors are those of M3D and Med3DVLM; places survive."
import pytest, torch
import torch.nn.functional as F
from parity import difference, fixture, tensor, weights
from petvlm.checkpoints import load_published
from petvlm.fusion import CrossAttentionFusion, FusionError, NoFusion
from petvlm.projectors import LinearProjector, MLPProjector, ProjectorError, SpatialPool
from petvlm.slots import SLOTS, SlotError, build, lattices, streams
from petvlm.tokens import Tokens

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

GRID = (2, 3, 4)
def tokens(dim=16, grid=GRID, seed=0):
    n = grid[0]*grid[1]*grid[2]
    return Tokens(torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed)), grid)

@pytest.mark.parametrize('heads', [1, 2, 4])
def test_fusion_is_equations_5_to_8(heads):
    fuse, pet, ct = CrossAttentionFusion(16, heads), tokens(), tokens(seed=1)
    q, k, v = ((t.x @ w.weight.T).view(2, 24, heads, -1) for t, w in ((pet, fuse.to_q), (ct, fuse.to_k), (ct, fuse.to_v)))
    maps = torch.softmax(torch.einsum('bnhc,bmhc->bhnm', q, k)/(16/heads)**.5, -1)
    z_bar = fuse.to_out(torch.einsum('bhnm,bmhc->bnhc', maps, v).flatten(2))
    z = fuse.norm1(pet.x + z_bar)
    assert torch.allclose(fuse(pet, ct).x, fuse.norm2(z + fuse.ffn(z)), atol=1e-5)

@pytest.mark.parametrize('position', [None, 'learned', 'local'])
def test_every_parameter_of_the_fusion_learns(position):
    fuse = CrossAttentionFusion(16, 4, position=position, n_tokens=24)
    (fuse(tokens(), tokens(seed=1)).x*torch.randn(2, 24, 16)).sum().backward()
    assert not [n for n, p in fuse.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]

def test_pet_keeps_its_lattice_and_ct_may_be_coarser():
    out = CrossAttentionFusion(16, 4, position='local')(tokens(), tokens(grid=(1, 3, 2)))
    assert out.grid == GRID and out.x.shape == (2, 24, 16)

def test_local_positions_start_at_the_same_place():
    pet, ct = tokens(grid=(4, 6, 6)), tokens(grid=(4, 6, 6), seed=1)
    changed = ct.replace(ct.x.clone()); changed.x[:, 50] += 5
    fuse = CrossAttentionFusion(16, 4, position='local')
    torch.nn.init.zeros_(fuse.to_q.weight)                                    # content says nothing: place decides
    moved = (fuse.attend(pet, changed) - fuse.attend(pet, ct)).abs().sum((0, 2))
    assert int(moved.argmax()) == 50

@pytest.mark.parametrize('make', [lambda: CrossAttentionFusion(10, 4), lambda: CrossAttentionFusion(16, 4, position='sine'),
    lambda: CrossAttentionFusion(16, 4, position='learned'), lambda: CrossAttentionFusion(8, 4)(tokens(), tokens()), lambda: NoFusion()(tokens(), tokens()),
    lambda: CrossAttentionFusion(16, 4, position='learned', n_tokens=12)(tokens(), tokens())])
def test_what_cannot_be_fused_says_why(make):
    with pytest.raises(FusionError, match='.{20,}'): make()

@torch.no_grad()
def test_spatial_pool_and_mlp_equal_the_m3d_reference():
    project, _ = load_published('m3d.spatial_pool', weights(fixture('spp_reduced')))
    t = project(Tokens(tensor(fixture('spp_reduced')['input']['x']), (4, 4, 6)))
    assert t.grid == (2, 2, 3) and difference('spp_reduced', 'out', t.x).max() < 1e-6

@torch.no_grad()
def test_mlp_projector_equals_the_med3dvlm_reference():
    w, x = weights(fixture('mlp_projector_reduced')), tensor(fixture('mlp_projector_reduced')['input']['x'])
    project = MLPProjector(48, 64)
    project.load_state_dict({k.replace('mm_projector.0', 'net.0').replace('mm_projector.1.1', 'net.2'): v for k, v in w.items()})
    assert difference('mlp_projector_reduced', 'out', project(Tokens(x, (2, 2, 2))).x).max() < 1e-6

@pytest.mark.parametrize('make', [lambda: SpatialPool(2)(tokens()), lambda: LinearProjector(8, 4)(tokens())])
def test_what_cannot_be_projected_says_why(make):
    with pytest.raises(ProjectorError, match='.{20,}'): make()

# ---- slots
@pytest.mark.parametrize('slot', SLOTS)
def test_an_unknown_kind_is_refused_with_those_there_are(slot):
    with pytest.raises(SlotError, match=sorted(SLOTS[slot])[0]): build(slot, 'no such kind')

def test_lattices_follow_the_tokens_from_encoder_to_language_model():
    enc = build('encode', 'dcformer', image_size=(32, 32, 48), dims=(8, 8, 16, 32), blocks=(1, 1, 1), kernels=(5, 3, 3), stride=2, taps=2)
    t, grids = enc(torch.rand(1, 1, 32, 32, 48)), [g for g, _ in streams(enc)]
    assert [s.grid for s in t.streams] == list(grids) and [s.dim for s in t.streams] == [d for _, d in streams(enc)]
    for kind, kw in (('mixer', dict(low_tokens=(96,), high_tokens=(6,))), ('dual_mlp', {}), ('mlp', {}), ('linear', {})):
        project = build('project', kind, streams=streams(enc), out_dim=20, **kw)
        assert project(t).x.shape[1] == sum(torch.tensor(g).prod().item() for g in lattices(grids, project)), kind
