"""What the viewer shows is what the affine says: every orientation, every letter, every plane, projection, outline and measurement against truths worked out by hand or by another way."""
from itertools import permutations, product
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from petvlm.findings import Finding, Study
from petvlm.lesions import measure
from petvlm.scene import around, blank, distance, plane_of, scene_of
from petvlm.screen import MAPS, SceneError, colours, columns, letters, outline, project, views, window_of
from petvlm.volume import Volume, resample

SHAPE, SPACING = (6, 8, 7), (5., 4., 4.5)
UPRIGHT = np.array([[0, 0, 4.5, -11], [0, 4, 0, -30], [5, 0, 0, -500], [0, 0, 0, 1.]])       # x <- w, y <- h, z <- d


def rotation(x, y, z):
    "Rotations in degrees about x, then y, then z."
    out = np.eye(3)
    for axis, deg in enumerate((x, y, z)):
        c, s = np.cos(np.deg2rad(deg)), np.sin(np.deg2rad(deg)); i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3); turn[i, i] = turn[j, j] = c; turn[i, j], turn[j, i] = (-s, s) if axis != 1 else (s, -s)
        out = turn @ out
    return out


def marked(affine, shape=SHAPE):
    "A marker in each corner: 1 + (left ? 1) + (posterior ? 2) + (head ? 4), by where the corner lies in the patient, seen from the middle."
    data, middle = np.zeros(shape), affine @ [*(np.array(shape) - 1)/2, 1]
    for corner in product(*[(0, n-1) for n in shape]):
        x, y, z = (affine @ [*corner, 1] - middle)[:3] > 0
        data[corner] = 1 + x + 2*y + 4*z
    return Volume(data, affine, 'SUVbw')


def said(sides, row, col, other):
    "The marker that letters promise at a corner of a picture: `row` 0 top, 1 bottom, `col` 0 left, 1 right; `other`: the letter of the slice."
    letters_there = sides[2 + row][0] + sides[col][0] + other
    return 1 + ('L' in letters_there) + 2*('P' in letters_there) + 4*('H' in letters_there)


def stored_ways(vol):
    "`vol` stored in all 48 orders and directions of its axes; the same voxels at the same places."
    for order, flips in product(permutations(range(3)), product((1, -1), repeat=3)):
        data, affine = vol.data.transpose(order), vol.affine[:, (*order, 3)].copy()
        for a, f in enumerate(flips):
            if f < 0: data = np.flip(data, a); affine[:3, 3] += affine[:3, a]*(data.shape[a] - 1); affine[:3, a] *= -1
        yield Volume(data, affine, vol.unit)


@pytest.mark.parametrize('turn', [(0, 0, 0), (18, 0, 0), (0, -15, 0), (0, 0, 20), (12, -9, 14)])
def test_the_letters_on_the_edges_are_true_in_every_orientation(turn):
    affine = UPRIGHT.copy(); affine[:3, :3] = rotation(*turn) @ affine[:3, :3]
    for stored in stored_ways(marked(affine)):
        scene = scene_of(Study('x', {'pet': stored}))
        for (name, view), (low, high) in zip(scene.views.items(), ('FH', 'AP', 'RL')):
            assert view.sides[0][0] + view.sides[1][0] == ('AP' if name == 'sagittal' else 'RL') and view.sides[2][0] + view.sides[3][0] == ('AP' if name == 'axial' else 'HF')
            for index, other in ((0, low), (scene.frame.shape[view.axis] - 1, high)):
                pixels = scene.cut('pet', name, index)
                for row, col in product((0, 1), (0, 1)): assert pixels[-row, -col] == said(view.sides, row, col, other), (name, row, col)


def test_letters_of_a_tilted_gantry_say_both():
    assert letters((0, -np.sin(np.deg2rad(20)), np.cos(np.deg2rad(20)))) == 'HA' and letters((-1, .15, 0)) == 'R' and letters((3, 3.1, 0)) == 'PL'


@pytest.mark.parametrize('plane, mm', [('axial', (4., 4.5)), ('coronal', (5., 4.5)), ('sagittal', (5., 4.))])
def test_pixels_have_the_spacing_of_their_axes(plane, mm):
    frame = blank(SHAPE, UPRIGHT); v = views(frame)[plane]
    assert (frame.spacing[v.rows], frame.spacing[v.cols]) == mm


ANGLE = st.sampled_from([-20., -11., 7., 16.])       # less than that, and whole and plane may disagree on whether a tilt counts
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.tuples(ANGLE, ANGLE, ANGLE), st.tuples(*[st.floats(1.5, 9)]*3), st.tuples(*[st.floats(-9, 9)]*3), st.booleans(), st.sampled_from(['axial', 'coronal', 'sagittal']), st.integers(0, 8))
def test_a_plane_equals_that_plane_of_the_whole_volume_resampled(turn, spacing, shift, straight, plane, index):
    vol = Volume(np.random.default_rng(3).random((12, 14, 13)), np.array([[0, 0, 3, 0], [0, 3.5, 0, 0], [4, 0, 0, 0], [0, 0, 0, 1.]]), 'HU')
    affine = np.eye(4); affine[:3, :3] = (np.eye(3) if straight else rotation(*turn)) @ np.fliplr(np.diag(spacing[::-1])); affine[:3, 3] = shift
    frame = blank((9, 10, 11), affine); view = views(frame)[plane]
    whole = np.take(resample(vol, like=frame).data, index, view.axis)
    assert np.allclose(plane_of(vol, frame, view, index), whole[::-1] if view.flip else whole, atol=1e-3)


def test_a_plane_that_the_volume_does_not_reach_is_air_or_nothing():
    far = blank((3, 3, 3), np.array([[0, 0, 1, 900], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.]]))
    near = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1.]])
    for unit, fill in (('HU', -1000), ('SUVbw', 0), ('label', 0)):
        assert (plane_of(Volume(np.ones((4, 4, 4), int), near, unit), far, views(far)['axial'], 1) == fill).all()


def body(pet_shape=(20, 24, 22), spot=(40., -20., 130.)):
    "CT of 4 x 2 x 2 mm and PET of 5 x 6 x 6.5 mm (stored flipped) with one hot voxel that holds `spot`, and its mask on the CT's grid."
    ct = Volume(np.full((25, 60, 70), -1000.), np.array([[0, 0, 2, -60], [0, 2, 0, -60], [4, 0, 0, 80], [0, 0, 0, 1.]]), 'HU')
    ct.data[:, 8:52, 10:60] = 40
    affine = np.array([[0, 0, -6.5, 70], [0, 6, 0, -70], [-5, 0, 0, 178], [0, 0, 0, 1.]])
    pet = Volume(np.ones(pet_shape), affine, 'SUVbw'); pet.data[tuple(np.rint(pet.index(spot)).astype(int))] = 9
    mask = ct.replace(data=np.zeros(ct.shape, np.uint8), unit='label'); mask.data[tuple(slice(i-1, i+2) for i in np.rint(ct.index(spot)).astype(int))] = 1
    return Study('x', {'pet': pet, 'ct': ct, 'lesions': mask}, (Finding('lung', 'left', 'nodule'),))


def test_pet_lies_on_the_ct_where_the_patient_has_it():
    study = body(); scene, spot = scene_of(study), (40., -20., 130.)
    at = scene.frame.index(spot); there = study.volumes['pet'].world(np.rint(study.volumes['pet'].index(spot)))
    for name, view in scene.views.items():
        pixels = scene.cut('pet', name, int(np.rint(at[view.axis])))
        row, col = np.unravel_index(pixels.argmax(), pixels.shape)
        index = np.rint(at); index[view.rows] = scene.frame.shape[view.rows] - 1 - row if view.flip else row; index[view.cols] = col
        apart = abs(scene.frame.world(index) - there); apart[2 - view.axis] = 0
        assert (apart <= np.array(scene.frame.spacing)[::-1]/2 + 1e-6).all(), name


def test_a_reading_is_what_the_scanners_gave():
    scene = scene_of(body()); r = scene.read((40., -20., 130.))
    assert r.values == {'ct': 40., 'pet': 9.} and r.labels == {'lesions': '1: left lung nodule'} and r.place == 'L 40.0  A 20.0  H 130.0 mm'
    assert scene.read((-59., -59., 81.)).values == {'ct': -1000., 'pet': 1.} and scene.name('lesions', 4) == 'lesion 4' and scene.name('lesions', 0) == ''


def test_the_side_is_the_patients_and_counted_from_the_middle_of_the_body():
    affine = np.array([[0, 0, 8, 100], [0, 8, 0, -150], [10, 0, 0, 0], [0, 0, 0, 1.]])          # a body whose middle lies at x = 260: x > 0 everywhere
    ct = np.full((30, 40, 41), -1000.); ct[:, 8:32, 8:33] = 40
    scene = scene_of(Study('x', {'ct': Volume(ct, affine, 'HU'), 'pet': Volume(np.ones((30, 40, 41)), affine, 'SUVbw')}))
    assert scene.side((200, 0, 100)).startswith('right, 6') and scene.side((320, 0, 100)).startswith('left, 6') and scene.side((262, 0, 100)) == 'midline'
    assert scene_of(Study('x', {'pet': scene.volumes['pet']})).side((200, 0, 100)) == ''


def test_a_position_outside_comes_to_the_edge_and_nonsense_is_refused():
    scene = scene_of(body()); inside = (10.3, 4.7, 99.9)
    assert scene.clip(inside) == inside and np.allclose(scene.clip((1e6, 0, 100))[0], scene.frame.world(np.array(scene.frame.shape) - 1)[0])
    for bad in ((1, 2), (1, 2, float('nan')), 'abc', None, ((1, 2, 3),)):
        with pytest.raises(SceneError, match='three numbers'): scene.clip(bad)


def test_the_frame_grows_by_whole_voxels_to_hold_uptake_beyond_the_ct():
    ct = Volume(np.zeros((10, 10, 10)), np.array([[0, 0, 2, 0], [0, 2, 0, 0], [3, 0, 0, 0], [0, 0, 0, 1.]]), 'HU')
    pet = Volume(np.zeros((10, 10, 10)), np.array([[0, 0, 4, -20], [0, 4, 0, -20], [6, 0, 0, -12], [0, 0, 0, 1.]]), 'SUVbw'); pet.data[0, 6, 0] = 5; pet.data[9, 6, 6] = .4
    frame = scene_of(Study('x', {'pet': pet, 'ct': ct})).frame
    assert np.allclose(frame.world((0, 0, 0)), (-20, 0, -12)) and frame.shape == (14, 10, 20) and frame.spacing == (3, 2, 2)
    assert scene_of(Study('x', {'pet': pet, 'ct': ct}), on='pet').frame.shape == (10, 10, 10)
    assert around(blank(ct.shape, ct.affine), [(0, 0, 0)]).shape == ct.shape


# ---------- projections ----------
def uptake(places, shape=(6, 20, 24), spacing=(5., 5., 5.)):
    affine = np.zeros((4, 4)); affine[[2, 1, 0], [0, 1, 2]] = spacing; affine[3, 3] = 1; affine[:3, 3] = -60, -50, 0
    data = np.zeros(shape); data[:, 2:18, 2:22] = 1
    for at, v in places.items(): data[at] = v
    return Volume(data, affine, 'SUVbw')

def test_from_the_front_and_from_the_left_the_projection_is_the_maximum_along_an_axis():
    pet = uptake({}).replace(data=np.random.default_rng(0).uniform(.6, 9, (6, 20, 24)))
    c = columns(pet)
    front, side = project(c, 0)[0], project(c, 90)[0]
    at = (c.bins - 24)//2; assert np.array_equal(front[:, at:at+24], pet.data.max(1)[::-1]) and not front[:, :at].any()
    shown = side[:, np.flatnonzero(side.any(0))]
    assert np.array_equal(shown, pet.data.max(2)[::-1])            # seen from the left: anterior on the left of the picture

@pytest.mark.parametrize('angle', [0, 10, 33, 45, 90, 120, 180, 200, 275, 359])
def test_no_angle_loses_the_hottest_voxel_and_a_click_finds_it(angle):
    pet = uptake({(4, 5, 17): 9.}); scene = scene_of(Study('x', {'pet': pet}))
    image, _ = scene.mip(angle); row, col = np.unravel_index(image.argmax(), image.shape)
    assert image.max() == 9 and np.abs(np.subtract(scene.mip_place(angle, row, col), pet.world((4, 5, 17)))).max() <= 2.5 + 1e-3

def test_half_a_turn_is_the_mirror_image():
    pet = uptake({}).replace(data=np.random.default_rng(1).uniform(.6, 9, (6, 20, 24))); c = columns(pet)
    for angle in (0, 20, 70):
        (a, da), (b, db) = project(c, angle), project(c, angle + 180)
        assert np.array_equal(a, b[:, ::-1]) and (np.abs(da + db[:, ::-1])[a > 0] < .01).mean() > .99

def test_sides_of_the_projection():
    scene = scene_of(Study('x', {'pet': uptake({})}))
    assert [scene.mip_sides(a)[:2] for a in (0, 90, 180, 270)] == [('R', 'L'), ('A', 'P'), ('L', 'R'), ('P', 'A')] and scene.mip_sides(45)[1] == 'LP' and scene.mip_sides(0)[2:] == ('H', 'F')

def test_pooling_keeps_the_maximum_and_its_place():
    pet = uptake({(3, 9, 13): 50.}, spacing=(2., 2., 2.)); c = columns(pet)
    assert c.values.max() == 50 and (c.dz, c.mm) == (4., 4.) and c.values.shape[1] == 3


# ---------- outlines, windows, spheres ----------
def test_an_outline_runs_between_pixels_that_differ():
    labels = np.zeros((3, 4), int); labels[1, 1] = 2; labels[1, 2] = 5
    lines = {k: {tuple(map(int, l)) for l in v} for k, v in outline(labels).items()}
    assert lines[5] == {(2, 1, 3, 1), (2, 2, 3, 2), (3, 1, 3, 2), (2, 1, 2, 2)} and lines[2] == {(1, 1, 2, 1), (1, 2, 2, 2), (1, 1, 1, 2)}
    assert outline(np.ones((3, 3), int)) == {} and outline(np.zeros((1, 1), int)) == {}

@pytest.mark.parametrize('bad', [(5, 5), (7, 0), (0, float('nan')), (0, float('inf')), (0,), 'ab', None])
def test_a_window_that_does_not_rise_is_refused(bad):
    with pytest.raises(SceneError, match='window'): window_of(bad)

def test_colour_maps_have_their_ends_where_readers_expect_them():
    assert set(MAPS) >= {'inverted grey', 'grey', 'hot'} and colours_ends('inverted grey') == [[255]*3, [0]*3] and colours_ends('grey') == [[0]*3, [255]*3]
    with pytest.raises(SceneError, match='expected one of'): colours_ends('jet')

def colours_ends(name): return colours(name)[[0, 255]].tolist()

def test_a_sphere_is_measured_like_a_lesion_of_the_whole_scan():
    pet = Volume(np.random.default_rng(5).gamma(2, 2, (30, 26, 28)), np.array([[0, 0, 3, -40], [0, 3.5, 0, -45], [4, 0, 0, 0], [0, 0, 0, 1.]]), 'SUVbw')
    scene = scene_of(Study('x', {'pet': pet}))
    for xyz, radius in (((0., 0., 60.), 9.), ((-38., -44., 3.), 14.)):
        far = ((pet.world(np.stack(np.indices(pet.shape), -1)) - xyz)**2).sum(-1)
        whole, = measure(pet, pet.replace(data=far <= radius**2, unit='label')); s = scene.sphere(xyz, radius)
        assert np.allclose([s.suvmax, s.suvpeak, s.suvmean, s.ml], [whole.suvmax, whole.suvpeak, whole.suvmean, whole.mtv_ml], rtol=1e-5) and np.allclose(s.at, pet.world(whole.peak))
    with pytest.raises(SceneError, match='no PET voxel'): scene.sphere((1.5, 1.7, 62.), .1)
    with pytest.raises(SceneError, match='radius'): scene.sphere((0, 0, 60), 0)

def test_distance_in_mm(): assert distance((1, 2, 3), (4, 6, 3)) == 5


# ---------- what is refused, what is listed ----------
def test_a_study_that_cannot_be_shown_says_why():
    vol = Volume(np.zeros((2, 2, 2)), UPRIGHT, 'SUVbw')
    for volumes, said in (({}, "expected 'pet' or 'ct'"), ({'pet': vol.replace(unit='Bq/ml')}, 'SUVbw'), ({'ct': vol}, 'HU'), ({'pet': vol, 'organs': vol.replace(data=np.full((2, 2, 2), 300), unit='label')}, '0 to 255')):
        with pytest.raises(SceneError, match=said): scene_of(Study('x', volumes))
    scene = scene_of(Study('x', {'pet': vol}))
    for layer, plane, index in (('ct', 'axial', 0), ('pet', 'oblique', 0), ('pet', 'axial', 2), ('pet', 'axial', -1)):
        with pytest.raises(SceneError): scene.cut(layer, plane, index)
    with pytest.raises(SceneError, match='no PET'): scene_of(Study('x', {'ct': vol.replace(unit='HU')})).mip(0)

def test_lesions_are_listed_hottest_first_and_a_mask_of_all_is_taken_apart():
    pet = uptake({(2, 8, 8): 5., (4, 12, 15): 7.}); mask = np.zeros(pet.shape, np.uint8); mask[2, 8, 8] = mask[4, 12, 15] = 1
    scene = scene_of(Study('x', {'pet': pet, 'lesions': pet.replace(data=mask, unit='label')}))
    assert [s.suvmax for s in scene.spots] == [7, 5] and {s.label for s in scene.spots} == {1, 2} and np.allclose(scene.start(), pet.world((4, 12, 15)))
    ct = scene_of(Study('x', {'ct': pet.replace(unit='HU'), 'lesions': pet.replace(data=mask, unit='label')}))
    assert all(s.suvmax is None and ct.read(s.mm).labels['lesions'] == s.name for s in ct.spots) and len(ct.spots) == 2
