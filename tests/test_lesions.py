"""Foci: measurements against hand calculation, independence of the grid, physiological uptake; reported lesions as the published code draws them."""
import hashlib, json
from pathlib import Path
import numpy as np
import pytest
from safetensors.numpy import load_file
from petvlm.lesions import LesionError, candidates, find_reported, iterative_threshold, longest_extent, measure, segment, sphere_kernel
from petvlm.volume import Volume

HERE = Path(__file__).parent/'fixtures'


def grid(spacing, mm=160.):
    shape = tuple(int(mm/s) for s in spacing)
    affine = np.zeros((4, 4)); affine[3, 3] = 1; affine[[2, 1, 0], [0, 1, 2]] = spacing; affine[:3, 3] = (-50, 20, 300)
    return Volume(np.full(shape, .5), affine, 'SUVbw')


def ball(vol, center_mm, diameter, value):
    xyz = vol.world(np.stack(np.meshgrid(*map(np.arange, vol.shape), indexing='ij'), -1))
    return vol.replace(data=np.where(np.linalg.norm(xyz - center_mm, axis=-1) <= diameter/2, value, vol.data))


@pytest.mark.parametrize('spacing', [(2, 2, 2), (5, 4, 4), (3.27, 4.6875, 4.6875)])
def test_ball(spacing):
    center = np.array([20., 95., 380.])
    found, = candidates(ball(grid(spacing), center, 30, 8.))
    assert (found.suvmax, round(found.suvmean, 5)) == (8, 8) and found.suvpeak == pytest.approx(8, rel=1e-4)
    assert found.mtv_ml == pytest.approx(np.pi/6*27, rel=.05) and found.tlg == pytest.approx(8*found.mtv_ml)
    np.testing.assert_allclose(found.center_mm, center, atol=.7)
    assert abs(found.longest_mm - 30) <= max(spacing)


def test_peak_by_hand():
    vol = grid((2, 2, 2)); data = vol.data.copy(); data[40, 40, 40] = 100; data[40, 40, 41] = 50
    found, = candidates(vol.replace(data=data), min_ml=0)
    k = sphere_kernel((2, 2, 2)); c = k.shape[0]//2
    assert found.suvpeak == pytest.approx(.5 + k[c, c, c]*99.5 + k[c, c, c+1]*49.5, rel=1e-4) and found.peak == (40, 40, 40)


def test_two_foci_are_sorted_and_small_ones_left_out():
    vol = ball(ball(grid((4, 4, 4)), (0, 60, 340), 20, 6.), (60, 120, 420), 20, 12.)
    vol = ball(vol, (60, 60, 420), 5, 30.)
    assert [f.suvmax for f in candidates(vol)] == [12, 6] and len(candidates(vol, min_ml=.05)) == 3
    assert candidates(vol, threshold=40.) == []


def test_percent_follows_the_maximum():
    vol = ball(ball(grid((4, 4, 4)), (20, 95, 380), 40, 5.), (20, 95, 380), 16, 20.)
    core, = candidates(vol, 'percent41')
    assert core.mtv_ml == pytest.approx(np.pi/6*1.6**3, rel=.3) and candidates(vol)[0].mtv_ml > 25


def test_touching_foci_do_not_overlap_after_redrawing():
    vol = ball(ball(grid((4, 4, 4)), (0, 95, 380), 24, 30.), (32, 95, 380), 24, 6.)
    labels = segment(vol, 'percent41')
    assert len(measure(vol, labels)) == 2


def test_physiological_by_hottest_voxel_or_majority():
    vol = ball(ball(grid((4, 4, 4)), (0, 60, 340), 24, 6.), (60, 120, 420), 24, 12.)
    usual = vol.replace(data=vol.data > 10, unit='label')
    assert [f.suvmax for f in candidates(vol, physiological=usual)] == [6]
    coarse = Volume(np.ones((4, 4, 4), np.uint8), np.array([[0, 0, 40, -30], [0, 40, 0, 40], [40, 0, 0, 320], [0, 0, 0, 1.]]), 'label')
    assert candidates(vol, physiological=coarse) == []


def test_refusals():
    vol = grid((8, 8, 8))
    for wrong in (lambda: candidates(vol.replace(unit='HU')), lambda: candidates(vol, 'magic'), lambda: candidates(vol, threshold=0),
                  lambda: measure(vol, vol.slab(1, 4).replace(data=np.zeros((3, *vol.shape[1:]), int), unit='label'))):
        with pytest.raises(LesionError): wrong()


def test_longest_of_a_single_voxel_is_its_width(): assert longest_extent([[0, 0, 0]], (5, 4, 4)) == pytest.approx(5, rel=.01)


def synthetic(case):
    "A fixture's volume by its written rule, as (D, H, W): its slices run along the last axis, counted from the far end."
    noise = np.random.Generator(np.random.PCG64(case['seed'])).standard_normal(tuple(case['shape']), dtype=np.float32).astype(float)
    v, at = np.clip(case['bg'] + case['sigma']*noise, 0, None), np.indices(case['shape']).astype(float)
    for lesion in case['lesions']:
        d = np.sqrt(sum(((at[a] - lesion['c'][a])/lesion['r'][a])**2 for a in range(3)))
        v = np.maximum(v, case['bg'] + (lesion['peak'] - case['bg'])/(1 + np.exp((d - 1)*lesion['edge'])))
    v = np.round(v*64)/64
    assert hashlib.sha256((v*64).astype('<i4').tobytes()).hexdigest() == case['sha256']
    return Volume(v.transpose(2, 1, 0), np.diag([*case['voxel_mm'][::-1], 1.])[[2, 1, 0, 3]], 'SUVbw')


ITM = json.loads((HERE/'huemann_itm.json').read_text(encoding='utf-8'))

@pytest.mark.parametrize('case', ITM['cases'], ids=lambda c: c['name'])
def test_reported_lesions_are_found_and_drawn_as_published(case):
    pet, masks = synthetic(case), load_file(HERE/'huemann_itm.safetensors')
    found = [(row['Label_Name'], p[::-1]) for row in case['rows'] for p in find_reported(pet, row['SUV'], row['Slice'])]
    assert found == [(c['Label_Name'], (c['i'], c['j'], c['k'])) for c in case['candidates']]
    written = 0
    for want in case['itm']:
        got = iterative_threshold(pet, want['suv'], want['start'][::-1], voxel_ml=want['voxel_ml'])
        if 'IndexError' in str(want['result']): continue                       # the published code ran over the border
        np.testing.assert_allclose(got.passes, [(s['volume_ml'], s['background'], s['threshold']) for s in want['steps']], rtol=1e-12)
        assert got.first_background == pytest.approx(want['first_background'], rel=1e-12)
        if got.dropped: assert 'dropped' in want['result']; continue
        mask = np.unpackbits(masks[f"{case['name']}__{written}"])[:got.labels.data.size].reshape(case['shape'])
        assert (got.labels.data.transpose(2, 1, 0) == mask).all() and got.labels.data.sum() == want['result']
        written += 1
    assert written == len(case['masks'])
