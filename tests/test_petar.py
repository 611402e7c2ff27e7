"PETAR's tower, its close-up and its projector against the published code, by weights filled in by name."
import pytest, torch
from petvlm.checkpoints import CheckpointError, load_published
from petvlm.petar import global_and_focal
from petvlm.tokens import Tokens
from parity import difference, fixture, tensor, weights

def parts(name: str):
    "The tower and the projector of a fixture, each from its own keys."
    c, w = fixture(name)['config'], weights(fixture(name))
    under = lambda prefix: {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
    tower, audit = load_published('petar.tower', under('vision_tower.'), image_size=c['image_size'], patch_size=c['patch_size'], heads=c['vit']['num_heads'])
    assert audit.sizes['ct'] == 'separate' and not audit.sizes['ct_cls'] and not audit.passed_over and not audit.kept
    return tower, load_published('m3d.spatial_pool', under('mm_projector.'))[0]

@pytest.mark.parametrize('name', ['petar_tower_reduced', pytest.param('petar_tower_full', marks=pytest.mark.slow)])
@torch.no_grad()
def test_tower_close_up_and_projection_equal_the_published_code(name):
    (tower, project), given = parts(name), fixture(name)['input']
    x = {k: tensor(v) for k, v in given.items()}
    whole, focal = [x[k] for k in ('pet', 'mask', 'ct')], [x[f'{k}_focal'] for k in ('pet', 'mask', 'ct')]
    got = {'tower_global': tower(*whole).x, 'tower_focal': tower(*focal).x, 'pet_vit_with_cls': tower.pet.sequence(*whole[:2]),
           'projected_global_plus_focal': project(global_and_focal(tower, whole, focal)).x, 'projected_global_only': project(tower(*whole)).x,
           'tower_global_zero_mask': tower(whole[0], torch.zeros_like(whole[1]), whole[2]).x}
    assert set(got) == set(fixture(name)['outputs'])
    for key, value in got.items(): assert difference(name, key, value).max() < 2e-5, key

def test_half_a_tower_is_refused():
    w = {k.removeprefix('vision_tower.'): v for k, v in weights(fixture('petar_tower_reduced')).items() if k.startswith('vision_tower.')}
    given = dict(image_size=(16, 64, 64), patch_size=(4, 16, 16), heads=4)
    with pytest.raises(CheckpointError, match='nothing in the checkpoint fills it'): load_published('petar.tower', {k: v for k, v in w.items() if 'ct_tower.blocks.0' not in k}, **given)
    with pytest.raises(CheckpointError, match='mask_position'): load_published('petar.tower', {k: v for k, v in w.items() if 'mask' not in k}, **given)
