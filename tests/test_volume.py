"""Volumes: place, unit and value survive reorientation, resampling, files and cutting."""
import itertools
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from petvlm.volume import Volume, VolumeError, body_mask, cut, lung_extent, read_nifti, region_bounds, resample, write_nifti

RNG = np.random.default_rng(0)


def upright(shape=(12, 16, 20), spacing=(5., 4., 3.), corner=(-40., -30., -500.), unit='SUVbw', data=None):
    affine = np.zeros((4, 4)); affine[3, 3] = 1
    affine[[2, 1, 0], [0, 1, 2]] = spacing; affine[:3, 3] = corner
    return Volume(RNG.random(shape) if data is None else data, affine, unit)


@pytest.mark.parametrize('order', list(itertools.permutations(range(3))))
@pytest.mark.parametrize('flips', list(itertools.product((1, -1), repeat=3)))
def test_canonical_undoes_every_storage_order(order, flips):
    vol = upright()
    flip = np.eye(4); flip[:3, :3] = np.diag(flips); flip[:3, 3] = [(n-1) if f < 0 else 0 for f, n in zip(flips, vol.shape)]
    data = vol.data[tuple(slice(None, None, f) for f in flips)].transpose(order)
    stored = Volume(data, (vol.affine @ flip)[:, [*order, 3]], 'SUVbw')
    back = stored.canonical()
    np.testing.assert_array_equal(back.data, vol.data)
    np.testing.assert_allclose(back.affine, vol.affine, atol=1e-9)


@pytest.mark.parametrize('bad', [dict(unit='suv'), dict(data=np.zeros((3, 3))), dict(affine=np.zeros((4, 4))), dict(unit='label', data=np.full((2, 2, 2), .5))])
def test_bad_volumes_are_refused(bad):
    with pytest.raises(VolumeError): Volume(**({'data': np.zeros((2, 2, 2)), 'affine': np.eye(4), 'unit': '1'} | bad))


def test_crop_keeps_place_and_refuses_outside():
    vol = upright(); part = vol.crop((2, 3, 4), (10, 9, 8))
    np.testing.assert_allclose(part.world([1, 1, 1]), vol.world([3, 4, 5]))
    for lo, hi in (((-1, 0, 0), (3, 3, 3)), ((0, 0, 0), (13, 1, 1)), ((4, 0, 0), (4, 1, 1))):
        with pytest.raises(VolumeError): vol.crop(lo, hi)


def linear(vol):
    "The volume whose value is a fixed linear function of place."
    xyz = vol.world(np.stack(np.meshgrid(*map(np.arange, vol.shape), indexing='ij'), -1))
    return vol.replace(data=xyz @ [.1, -.2, .05] + 3)


@pytest.mark.parametrize('how', [dict(spacing=7.), dict(spacing=(2.5, 2, 1.5)), dict(shape=(6, 8, 5)), dict(shape=(24, 33, 20)), dict(spacing=(10, 4, 9))])
def test_resample_puts_the_value_of_the_place(how):
    out = resample(linear(upright()), **how)
    inner = tuple(slice(2, -2) if n > 5 else slice(1, -1) for n in out.shape)
    np.testing.assert_allclose(out.data[inner], linear(out).data[inner], atol=.15)   # averaging takes voxels as constant: a tenth of a voxel at most


def test_resample_like_oblique_grid():
    grid = upright((6, 7, 8), (4, 4, 4), (-25, -10, -480)).affine.copy()
    grid[:3, :3] = Rotation.from_euler('xyz', [8, -5, 10], degrees=True).as_matrix() @ grid[:3, :3]
    like = Volume(np.zeros((6, 7, 8)), grid, '1')
    out = resample(linear(upright()), like=like, fill=np.nan)
    seen = np.isfinite(out.data)
    assert seen.mean() > .3
    np.testing.assert_allclose(out.data[seen], linear(like).data[seen], atol=1e-3)


def test_resample_outside_mean_and_labels():
    ct = upright(unit='HU', data=RNG.normal(0, 30, (12, 16, 20)))
    far = ct.affine.copy(); far[0, 3] += 1000
    assert (resample(ct, like=Volume(np.zeros((3, 3, 3)), far, '1')).data == -1000).all()
    assert resample(ct, shape=(4, 4, 5)).data.mean() == pytest.approx(ct.data.mean(), abs=1e-3)
    label = upright(unit='label', data=RNG.integers(0, 9, (12, 16, 20)).astype(np.int16))
    small = resample(label, spacing=(9, 9, 9))
    assert small.data.dtype == np.int16 and set(np.unique(small.data)) <= set(range(9))
    with pytest.raises(VolumeError): resample(ct)


def test_shape_and_spacing_centre_the_grid_on_the_box():
    vol = upright(); out = resample(vol, shape=(30, 30, 30), spacing=(5, 4, 3))
    np.testing.assert_allclose(out.world((np.array(out.shape)-1)/2), vol.world((np.array(vol.shape)-1)/2))
    np.testing.assert_allclose(out.data.sum(), vol.data.sum(), rtol=1e-5)


@pytest.mark.parametrize('unit, data', [('SUVbw', RNG.random((5, 6, 7))), ('label', RNG.integers(0, 300, (5, 6, 7)).astype(np.int16)), ('label', RNG.random((5, 6, 7)) > .5)])
def test_nifti_round_trip_and_bytes(unit, data, tmp_path):
    vol = upright(unit=unit, data=data).replace(meta={'a': [1, 2]})
    first = write_nifti(vol, tmp_path/'x.nii.gz').read_bytes()
    back = read_nifti(tmp_path/'x.nii.gz')
    np.testing.assert_array_equal(back.data, vol.data)
    np.testing.assert_allclose(back.affine, vol.affine, atol=1e-4)
    assert (back.unit, back.meta) == (unit, {'a': [1, 2]})
    assert write_nifti(vol, tmp_path/'x.nii.gz').read_bytes() == first and sorted(p.name for p in tmp_path.iterdir()) == ['x.json', 'x.nii.gz']
    with pytest.raises(VolumeError): read_nifti(tmp_path/'x.nii.gz', 'HU')


def test_nifti_agrees_with_nibabel(tmp_path):
    nib = pytest.importorskip('nibabel')
    vol = upright(); img = nib.load(write_nifti(vol, tmp_path/'x.nii'))
    ras = img.affine @ [1, 2, 3, 1]                      # nifti index (i, j, k) = (w, h, d)
    np.testing.assert_allclose(ras[:3]*[-1, -1, 1], vol.world([3, 2, 1]), atol=1e-4)
    assert img.get_fdata()[1, 2, 3] == pytest.approx(vol.data[3, 2, 1])


def patient(apex=150, base=100, wall=2):
    "A patient on a table, 200 slices of 5 mm, lungs of -800 HU in between."
    D, H, W = np.ogrid[:200, :60, :80]
    hu = np.full((200, 60, 80), -1000.)
    hu[((H-30)/20)**2 + ((W-40)/30)**2 + 0*D < 1] = 30
    for side in (24, 56): hu[(abs(D-(apex+base)/2) <= (apex-base)/2) & (((H-28)/13)**2 + ((W-side)/(11-wall))**2 < 1)] = -800
    hu[:, 55:57] = 100
    return upright((200, 60, 80), (5, 5, 5), unit='HU', data=hu)


@pytest.mark.parametrize('noise', [0, 40])
@pytest.mark.parametrize('spacing', [(5, 5, 5), (3, 4, 4), (10, 10, 10)])
def test_lungs_and_regions(noise, spacing):
    ct = patient(); ct = ct.replace(data=ct.data + RNG.normal(0, noise, ct.shape))
    ct = resample(ct, spacing=spacing)
    lo, hi = lung_extent(ct)
    assert abs(lo*spacing[0] - 500) <= 10 + spacing[0] and abs(hi*spacing[0] - 750) <= 10 + spacing[0]
    bounds = region_bounds(ct, overlap=6)
    assert list(bounds) == ['head_neck', 'chest', 'abdomen_pelvis'] and bounds['head_neck'][1] == ct.shape[0] and bounds['abdomen_pelvis'][0] == 0
    assert bounds['abdomen_pelvis'][1] - bounds['chest'][0] == 6 == bounds['chest'][1] - bounds['head_neck'][0]
    parts = cut(ct, bounds)
    assert all(np.allclose(parts[k].world([0, 0, 0]), ct.world([b[0], 0, 0])) for k, b in bounds.items())


def test_body_without_table_with_lungs():
    mask = body_mask(patient()).data
    assert not mask[:, 55:].any() and mask[125, 28, 24] and .9 < mask[50].sum() / (np.pi*20*30) < 1.1


def test_missing_lungs_warn(caplog):
    ct = patient(); ct = ct.replace(data=np.where(ct.data == -800, 30, ct.data))
    assert lung_extent(ct.replace(data=np.full(ct.shape, -1000.))) is None
    assert region_bounds(ct)['chest'] == (80, 156) and 'no lungs' in caplog.text
    with pytest.raises(VolumeError): region_bounds(ct.replace(unit='SUVbw'))

@pytest.mark.parametrize('unit', ['meter', 'micron'])
def test_nifti_in_metres_is_refused(tmp_path, unit):
    nib = pytest.importorskip('nibabel'); img = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.diag([.004, .004, .004, 1])); img.header.set_xyzt_units(unit); nib.save(img, tmp_path/'x.nii.gz')
    with pytest.raises(VolumeError, match=f'x.nii.gz.*in {unit}s, expected mm'): read_nifti(tmp_path/'x.nii.gz', 'SUVbw')
