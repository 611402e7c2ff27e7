"""Foci: measurements against hand calculation, independence of the grid, physiological uptake; reported lesions as the published code draws them."""
import hashlib, json
from pathlib import Path
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import erf
from petvlm.lesions import LesionError, by_organ, candidates, find_reported, iterative_threshold, liver_center, longest_extent, measure, percist_reference, segment, sphere_kernel
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


# --- analytic spheres ---------------------------------------------------------------------------------------------------------
TOP, S = 20., 12.                            # uptake TOP * exp(-r^2 / 2 S^2), mm

def shell(radius):
    "4 pi times the integral of exp(-r^2 / 2 S^2) r^2 from 0 to `radius`, in mm3."
    return 4*np.pi*(S**3*np.sqrt(np.pi/2)*erf(radius/S/np.sqrt(2)) - S*S*radius*np.exp(-radius**2/2/S**2))

def gaussian(spacing, unit='SUVbw'):
    vol = grid(spacing, 120.); center = vol.world((np.array(vol.shape) - 1)/2 // 1)
    xyz = vol.world(np.stack(np.meshgrid(*map(np.arange, vol.shape), indexing='ij'), -1))
    return vol.replace(data=TOP*np.exp(-((xyz - center)**2).sum(-1)/2/S**2), unit=unit), center

@pytest.mark.parametrize('method, fraction', [('fixed', 4/TOP), ('percent41', .41), ('percent50', .5)])
@pytest.mark.parametrize('spacing', [(2, 2, 2), (3.27, 2.5, 2.5)])
def test_gaussian_focus(method, fraction, spacing):
    vol, center = gaussian(spacing)
    found, = candidates(vol, method)
    radius = S*np.sqrt(-2*np.log(fraction)); ml = 4/3*np.pi*radius**3/1000; r1 = (3000/4/np.pi)**(1/3)
    assert found.suvmax == pytest.approx(TOP) and found.mtv_ml == pytest.approx(ml, rel=.05)               # whole voxels: 1419 of 1477 for 14.1 mm on 2 mm
    assert found.suvmean == pytest.approx(TOP*shell(radius)/ml/1000, rel=.02) and found.tlg == pytest.approx(TOP*shell(radius)/1000, rel=.035)
    assert found.suvpeak == pytest.approx(TOP*shell(r1)/1000, rel=.01)                         # the mean over 1 ml
    assert abs(found.longest_mm - 2*radius) <= max(spacing) and np.allclose(found.center_mm, center, atol=.1)

def test_iterative_threshold_of_every_focus():
    vol = ball(ball(grid((4, 4, 4)), (0, 60, 340), 24, 8.), (60, 120, 420), 24, 16.)
    labels = segment(vol, 'iterative')
    found = measure(vol, labels)
    assert [f.suvmax for f in found] == [16, 8] and all(f.mtv_ml == pytest.approx(np.pi/6*2.4**3, rel=.12) for f in found)       # a sharp edge: every threshold between draws the ball
    flat = ball(grid((4, 4, 4)), (20, 95, 380), 9, 4.4); flat = flat.replace(data=np.where(flat.data < 1, 3.9, flat.data))
    gone = segment(flat, 'iterative', min_ml=0)
    assert not gone.data.any() and '0.9' in gone.meta['dropped'][0]


# --- PERCIST ------------------------------------------------------------------------------------------------------------------
def sul(liver=2., spread=.3, shape=(40, 40, 40), mm=4.):
    "A volume whose slices alternate between `liver` + and - `spread`: mean `liver` and population SD `spread` in every even stack."
    sign = np.where(np.arange(shape[0]) % 2, 1, -1)[:, None, None]
    affine = np.array([[0, 0, mm, -80], [0, mm, 0, -80], [mm, 0, 0, 0], [0, 0, 0, 1.]])
    return Volume(np.broadcast_to(liver + spread*sign, shape), affine, 'SUVlbm')

def test_percist_threshold_by_hand():
    vol = sul()
    liver = percist_reference(vol, vol.world((19.5, 20, 20)))                                   # between two slices: as many of one as of the other
    assert (liver.mean, liver.sd) == (pytest.approx(2), pytest.approx(.3)) and liver.threshold == pytest.approx(1.5*2 + 2*.3) and liver.voxels*.064 == pytest.approx(np.pi/6*27, rel=.05)
    blood = percist_reference(vol, vol.world((19.5, 20, 20)), 'blood')
    assert blood.threshold == pytest.approx(2*2 + 2*.3) and blood.voxels == 6*5                 # slices within 10 mm of the middle: 6 of 4 mm; in the plane the centre and 4 neighbours lie within 5 mm

def test_percist_counts_by_peak():
    vol = sul(spread=0.); data = vol.data.copy()
    xyz = vol.world(np.stack(np.meshgrid(*map(np.arange, vol.shape), indexing='ij'), -1))
    data[np.linalg.norm(xyz - vol.world((10, 10, 10)), axis=-1) <= 12] = 5.; data[30, 30, 30] = 9.
    vol = vol.replace(data=data); reference = percist_reference(vol, vol.world((25, 20, 20)))
    assert reference.threshold == pytest.approx(3)
    found, = candidates(vol, 'percist', reference=reference, min_ml=0)
    peak = 2 + 7*float(sphere_kernel(vol.spacing).max())                                        # of the hot voxel: below 3, so it is no lesion
    assert found.suvmax == 5 and found.unit == 'SUVlbm' and peak < 3 and len(candidates(vol, 'fixed', 3., unit='SUVlbm', min_ml=0)) == 2

def test_percist_refusals():
    vol = sul(); center = vol.world((20, 20, 20)); reference = percist_reference(vol, center)
    for wrong, word in ((lambda: percist_reference(vol.replace(unit='SUVbw'), center), 'SUVlbm'), (lambda: percist_reference(vol, vol.world((1, 20, 20))), 'leaves the scan'), (lambda: percist_reference(vol, center, 'spleen'), 'blood'),
                        (lambda: percist_reference(sul(mm=16.), sul(mm=16.).world((20, 20, 20)), 'blood'), 'at least 8'), (lambda: segment(vol, 'percist'), 'reference'), (lambda: segment(vol, 'fixed', reference=reference, unit='SUVlbm'), 'reference'),
                        (lambda: segment(vol.replace(unit='SUVbw'), 'percist', reference=reference), 'SUVlbm'), (lambda: segment(vol), 'SUVbw'), (lambda: segment(vol, 'iterative', unit='SUVlbm'), 'SUVbw'), (lambda: segment(vol, unit='SUL'), 'SUL')):
        with pytest.raises(LesionError, match=word): wrong()

def test_the_liver_sphere_lies_deep_in_the_right_lobe():
    at = np.indices((40, 40, 40)); right, left = (((at - np.array(c)[:, None, None, None])**2).sum(0) <= r**2 for c, r in (((20, 20, 12), 7), ((20, 20, 30), 9)))
    liver = sul().replace(data=right | left, unit='label')
    assert np.allclose(liver.index(liver_center(liver)), (20, 20, 12), atol=1)                  # not the left part, although it is deeper
    for small in (liver.replace(data=((at - 20)**2).sum(0) <= 9), liver.replace(data=np.zeros_like(liver.data))):
        with pytest.raises(LesionError, match='liver'): liver_center(small)

def test_foci_by_organ():
    vol = ball(ball(grid((4, 4, 4)), (0, 60, 340), 24, 6.), (60, 120, 420), 24, 12.)
    organs = vol.replace(data=np.where(vol.data > 10, 3, np.where(vol.data > 5, 9, 0)), unit='label')
    assert {k: [f.suvmax for f in v] for k, v in by_organ(vol, segment(vol), organs).items()} == {3: [12], 9: [6]}
    part = organs.replace(data=np.where(organs.data == 3, 3, 0))
    assert {k: [f.suvmax for f in v] for k, v in by_organ(vol, segment(vol), part).items()} == {3: [12], 0: [6]}


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


@pytest.mark.parametrize('hot, cool', [(20., 5.), (9., 5.)])
def test_a_cool_focus_beside_a_hot_one_keeps_its_own_maximum(hot, cool):
    "A valley of 3 between them: 41 % of the cool one lies below it, 41 % of the hot one above or below the whole cool one."
    vol = grid((4, 4, 4)); vol = vol.replace(data=np.full(vol.shape, 3.))
    vol = ball(ball(vol, (0, 95, 380), 24, hot), (36, 95, 380), 24, cool)
    for method in ('percent41', 'iterative'):
        found = candidates(vol, method); assert sorted(f.suvmax for f in found) == [cool, hot], (method, found)
        assert len(np.unique(segment(vol, method).data)) == 3
