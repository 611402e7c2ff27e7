"What others drew and what we hand on: RTSTRUCT and SEG as label volumes, SEG and structured reports written and read back, BIDS-PET. Hand-made files, and the IBSI objects where ../shared/data is present."
import copy, json, tarfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path
import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings, strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage
from scipy import ndimage as ndi
from petvlm.bids import BidsError, read_bids, suv_factors, write_bids
from petvlm.dicom import find_series, read_series
from petvlm.dicomwrite import Exam, write_series
from petvlm.findings import KINDS, ORGANS, Finding
from petvlm.lesions import Lesion, measure, segment
from petvlm.masks import MaskError, _on_grid, as_labels, even_odd, read_rtstruct, read_seg
from petvlm.structured import NUMBERS, SCHEME, Entry, StructuredError, read_sr, write_seg, write_sr
from petvlm.volume import Volume, read_nifti, resample

SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'


# --- polygons ----------------------------------------------------------------------------------------------------------------
def by_ray(polygon, shape):
    "Even-odd with a ray along +h, pixel by pixel: another direction and another formula than the code's."
    inside = np.zeros(shape, bool)
    for h, w in np.ndindex(*shape):
        for (h0, w0), (h1, w1) in zip(polygon, np.roll(polygon, -1, 0)):
            if (w0 > w) != (w1 > w) and h < h0 + (w - w0)*(h1 - h0)/(w1 - w0): inside[h, w] ^= True
    return inside


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 9))
def test_even_odd_agrees_with_a_ray_in_another_direction(seed, n):
    polygon = np.random.default_rng(seed).uniform(-3, 11, (n, 2))          # corners beyond the image and crossing outlines included
    np.testing.assert_array_equal(even_odd(polygon, (8, 9)), by_ray(polygon, (8, 9)))


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=7, max_size=7))
def test_outlines_that_share_an_edge_share_no_voxel_and_leave_none_out(cut):
    middle = [(h, w) for h, w in zip((0, 1, 2, 4, 5, 7, 8), cut)]         # a crooked line through voxel centres
    left, right = even_odd([(0, 0), *middle, (8, 0)], (9, 9)), even_odd([(0, 8), *middle, (8, 8)], (9, 9))
    assert not (left & right).any() and (left | right)[:8, :8].all() and (left | right).sum() == 64


# --- RTSTRUCT ----------------------------------------------------------------------------------------------------------------
def item(**tags):
    d = Dataset(); d.update(tags)
    return d


def rtstruct(path, rois, kind='CLOSED_PLANAR', frame='1.2.3'):
    "`rois`: name -> contours (n, 3) mm, or (kind, contour) pairs."
    meta = FileMetaDataset(); meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ExplicitVRLittleEndian, RTStructureSetStorage, '1.2.3.4'
    pairs = lambda cs: [c if isinstance(c, tuple) else (kind, c) for c in cs]
    ds = item(SOPClassUID=RTStructureSetStorage, SOPInstanceUID='1.2.3.4', Modality='RTSTRUCT', PatientName='Do^Not^Keep',
              StructureSetROISequence=[item(ROINumber=i, ROIName=n.split('|')[0], ReferencedFrameOfReferenceUID=frame) for i, n in enumerate(rois, 1)],
              ROIContourSequence=[item(ReferencedROINumber=i, ContourSequence=[item(ContourGeometricType=k, ContourData=[f'{v:.6f}' for v in np.ravel(c)]) for k, c in pairs(cs)]) for i, cs in enumerate(rois.values(), 1)])
    ds.file_meta = meta; ds.save_as(path, enforce_file_format=True)
    return path


AFFINE = np.array([[0, 0, 2, -10], [0, 2, 0, -12], [3, 0, 0, 50], [0, 0, 0, 1.]])
IMAGE = Volume(np.zeros((6, 12, 14)), AFFINE, 'SUVbw')


def box(d, h0, h1, w0, w1, vol=IMAGE): return vol.world([(d, h, w) for h, w in ((h0, w0), (h0, w1), (h1, w1), (h1, w0))])


def test_a_hole_drawn_in_three_ways_is_the_same_hole(tmp_path):
    outer, inner = box(2, .5, 9.5, .5, 9.5), box(2, 3.5, 6.5, 4.5, 6.5)
    keyhole = np.concatenate([outer, outer[:1], inner[:1], inner[[3, 2, 1, 0]]])
    masks = [read_rtstruct(rtstruct(tmp_path/f'{i}.dcm', {'a': c}, k), IMAGE, '1.2.3')['a'] for i, (c, k) in enumerate((([outer, inner], 'CLOSED_PLANAR'), ([outer, inner], 'CLOSEDPLANAR_XOR'), ([keyhole], 'CLOSED_PLANAR')))]
    by_hand = np.zeros(IMAGE.shape, int); by_hand[2, 1:10, 1:10] = 1; by_hand[2, 4:7, 5:7] = 0
    for m in masks: np.testing.assert_array_equal(m.data, by_hand)
    assert '1.2.3' not in str(masks[0].meta) and 'Keep' not in str(masks[0].meta) and masks[0].meta['frame'] == 'checked'


def test_partial_overlap_is_refused_with_numbers_until_settled(tmp_path):
    path = rtstruct(tmp_path/'a.dcm', {'a': [box(1, .5, 4.5, .5, 4.5), box(1, 2.5, 6.5, 2.5, 6.5)]})        # 16 voxels each, 4 shared
    with pytest.raises(MaskError, match='overlap in 4 of 16 and 16 voxels'): read_rtstruct(path, IMAGE, None)
    assert [int(read_rtstruct(path, IMAGE, None, overlap=o)['a'].data.sum()) for o in ('union', 'xor')] == [28, 24]
    same = rtstruct(tmp_path/'b.dcm', {'a': [box(1, .5, 4.5, .5, 4.5)]*2})                                   # drawn twice: nothing, or once?
    with pytest.raises(MaskError, match='16 of 16 and 16'): read_rtstruct(same, IMAGE, None)
    stated = rtstruct(tmp_path/'c.dcm', {'a': [box(1, .5, 4.5, .5, 4.5), box(1, 2.5, 6.5, 2.5, 6.5)]}, 'CLOSEDPLANAR_XOR')
    assert read_rtstruct(stated, IMAGE, None)['a'].data.sum() == 24


CASES = {
    'beside the slice': (dict(rois={'a': [box(1, 1, 4, 1, 4), box(2.3, 1, 4, 1, 4)]}), {}, ('1 of 2 contours', '0.90 mm', '0.1 mm')),
    'across the slices': (dict(rois={'a': [IMAGE.world([(1, 1, 1), (2, 1, 6), (2.5, 6, 6)])]}), {}, ('rise by up to 4.50 mm', 'drawn on')),
    'two planes on one slice': (dict(rois={'a': [box(1.9, 1, 4, 1, 4), box(2.2, 5, 7, 1, 4)]}), dict(tolerance_mm=1.5), ('0.90 mm apart', 'slice (2)')),
    'outside in plane': (dict(rois={'a': [box(1, 1, 4, 10, 15)]}), {}, ('1 of 1 contours leave the grid', 'clip=True')),
    'outside in height': (dict(rois={'a': [box(1, 1, 4, 1, 5), box(6, 1, 4, 1, 5)]}), {}, ('1 of 2 contours leave the grid',)),
    'another frame': (dict(rois={'a': [box(1, 1, 4, 1, 5)]}, frame='1.2.77'), dict(frame='1.2.3'), ('FrameOfReferenceUID', 'frame=None')),
    'mixed kinds': (dict(rois={'a': [box(1, 1, 4, 1, 5), ('OPEN_PLANAR', box(1, 1, 4, 1, 5))]}), {}, ('mixes CLOSED_PLANAR, OPEN_PLANAR',)),
    'absent': (dict(rois={'a': [box(1, 1, 4, 1, 5)]}), dict(rois=['b']), ("no ROI ['b']", "found ['a']")),
    'asked for, but points': (dict(rois={'a': [('POINT', box(1, 1, 4, 1, 5)[:1])]}), dict(rois=['a']), ('POINT', 'encloses nothing')),
    'only lines': (dict(rois={'a': [box(1, 1, 4, 1, 5)[:2]]}), {}, ('three points',)),
}


@pytest.mark.parametrize('case', CASES)
def test_rtstruct_refused(case, tmp_path):
    how, options, words = CASES[case]
    with pytest.raises(MaskError) as e: read_rtstruct(rtstruct(tmp_path/'a.dcm', **how), IMAGE, **({'frame': None} | options))
    for word in words: assert word in str(e.value)
    assert '1.2.' not in str(e.value)


def test_what_encloses_nothing_is_passed_over_with_the_reason(tmp_path):
    masks = read_rtstruct(rtstruct(tmp_path/'a.dcm', {'a': [box(1, .5, 4.5, .5, 4.5), box(1, 6, 6, 1, 1)[:2]], 'iso': [('POINT', box(1, 1, 4, 1, 5)[:1])], 'none': [], 'a|': [box(2, 0, 3, 0, 2)]}), IMAGE, None)
    assert list(masks) == ['a', 'a #4'] and masks['a'].data.sum() == 16 and masks['a'].meta['degenerate'] == 1 and masks['a #4'].data.sum() == 6
    assert 'POINT' in masks.skipped['iso'] and masks.skipped['none'] == 'no contours'
    assert as_labels(masks).data.max() == 2
    clipped = read_rtstruct(rtstruct(tmp_path/'b.dcm', {'a': [box(1, .5, 4.5, 9.5, 20), box(9, 1, 4, 1, 5)]}), IMAGE, None, clip=True)['a']
    assert clipped.data.sum() == 16 and clipped.meta['clipped'] == 2


@pytest.mark.parametrize('turned', ['sagittal', 'oblique', 'sheared'])
def test_contours_of_another_plane_are_found(turned, tmp_path):
    turn = np.array([[.8, -.6, 0], [.6, .8, 0], [0, 0, 1]])
    matrix = {'sagittal': np.diag([3., 2, 2])[:, [0, 1, 2]], 'oblique': turn @ AFFINE[:3, :3], 'sheared': AFFINE[:3, :3] + np.array([[0, 0, 0], [.8, 0, 0], [0, 0, 0]])}[turned]
    affine = np.eye(4); affine[:3, :3] = matrix; affine[:3, 3] = 5, 6, 7
    own = Volume(np.zeros((6, 12, 14), int), affine, 'label')
    read = read_rtstruct(rtstruct(tmp_path/'a.dcm', {'a': [box(3, .5, 4.5, 1.5, 8.5, own), box(4, 2.5, 3.5, 1.5, 8.5, own)]}), own.canonical(), None)['a']
    by_hand = own.data.astype(int); by_hand[3, 1:5, 2:9] = 1; by_hand[4, 3:4, 2:9] = 1
    expected = own.replace(data=by_hand).canonical()
    np.testing.assert_array_equal(read.data, expected.data)


@pytest.fixture(scope='module')
def ibsi(tmp_path_factory):
    archive = SHARED/'suv'/'ibsi_dro_5.tar.xz'
    if not archive.exists(): pytest.skip(f'{archive} is not here (../shared/data)')
    folder = tmp_path_factory.mktemp('ibsi')
    with tarfile.open(archive) as tar: tar.extractall(folder, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))     # Python 3.11.2 has no filters yet
    return folder


@pytest.mark.parametrize('name', ['DRO_1_0', 'DRO_2_4', 'DRO_3_1', 'DRO_3_3', 'DRO_4_2'])
def test_ibsi_rtstruct_against_its_nifti(name, ibsi):
    """The structure set is a smoothed outline of the mask: it has 16 of the mask's 18 slices (the outermost two have no contour), and runs about 1.4 voxels (5.5 mm) inside the outermost voxel centres.

    So no voxel may lie outside the mask, and what the mask has more is its two end slices (2 x 11,289 voxels) and a rim of at most two voxels (5,934, 3.3 %). The phantom's values are the same in both."""
    root = next(ibsi.rglob(name))
    series = next(s for s in find_series(root) if s.modality == 'PT')
    pet, nifti = read_series(series), read_nifti(root/'mask'/'DRO_mask.nii.gz', 'label').data > 0
    region = read_rtstruct(next((root/'RS').glob('*.dcm')), pet, series)['region_1']
    drawn, more = region.data > 0, (nifti & ~(region.data > 0)).sum((1, 2))
    assert not (drawn & ~nifti).any() and region.meta['slices'] == 16 and region.meta['off_slice_mm'] == 0 and region.meta['frame'] == 'checked'
    assert more[[0, 1, 18, 19]].tolist() == [0, 11289, 11289, 0] and more[2:18].sum() == 5934
    core = ndi.binary_erosion(nifti, np.pad(ndi.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0))), iterations=2)
    assert not (core & ~drawn)[2:18].any()
    np.testing.assert_allclose([pet.data[drawn].min(), np.median(pet.data[drawn]), pet.data[drawn].max()], [.2, 1, 4], rtol=.02)


# --- SEG ---------------------------------------------------------------------------------------------------------------------
EXAM = Exam('masks', 'F', '19600101', 160., 70., 368e6, datetime(2025, 1, 2, 9), datetime(2025, 1, 2, 10))


@pytest.fixture(scope='module')
def scan(tmp_path_factory):
    "A PET series with two hot spots, 5 x 4 x 4.5 mm, its volume, labels and lesions."
    suv = np.ones((8, 14, 16)); suv[2:5, 3:7, 4:8] = 8; suv[5:7, 9:12, 10:14] = 5.5; suv[3, 4, 6] = 11
    affine = np.array([[0, 0, 4.5, -31.15], [0, 4, 0, -27.5], [5, 0, 0, -212.3], [0, 0, 0, 1.]])
    folder = tmp_path_factory.mktemp('scan')
    series = find_series(write_series(Volume(suv, affine, 'SUVbw'), EXAM, folder, 'PT'))[0]
    pet = read_series(series); labels = segment(pet)
    return series, pet, labels, sorted(measure(pet, labels), key=lambda l: l.label)


def highdicom_seg(path, scan, pixels, kind, n, vol=None, **how):
    "A SEG by highdicom, independent of write_seg."
    series, pet, *_ = scan
    describe = [hd.seg.SegmentDescription(i, f's{i}', codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Mass, 'MANUAL') for i in range(1, n + 1)]
    volume = hd.Volume(pixels, (vol or pet).affine, coordinate_system='PATIENT', frame_of_reference_uid=series.frame, **({'channels': {'SegmentNumber': list(range(1, n + 1))}} if pixels.ndim == 4 else {}))
    seg = hd.seg.Segmentation(list(series.headers), volume, kind, describe, '1.2.5', 1, '1.2.6', 1, 'a', 'b', 'c', 'd', **how)
    return seg, path


def saved(seg, path): seg.save_as(path); return path


def shuffled(seg, order):
    "The same SEG with its frames in another order."
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)[order]
    seg.PerFrameFunctionalGroupsSequence = [seg.PerFrameFunctionalGroupsSequence[i] for i in order]
    bits = np.packbits(pixels.ravel(), bitorder='little').tobytes()
    seg.PixelData = bits + b'\0'*(len(bits) % 2)
    return seg


def test_seg_frames_are_placed_by_their_own_positions(scan, tmp_path):
    series, pet, *_ = scan
    pixels = (np.random.default_rng(0).random((*pet.shape, 2)) < .2).astype(np.uint8)
    pixels[[1, 6]] = 0; pixels[3, ..., 1] = 0                                     # these frames will be absent
    seg, path = highdicom_seg(tmp_path/'a.dcm', scan, pixels, 'BINARY', 2)
    n = int(seg.NumberOfFrames)
    assert n == 6 + 5
    path = saved(shuffled(seg, np.random.default_rng(1).permutation(n)), path)
    masks = read_seg(path, pet, series)
    for i in (0, 1): np.testing.assert_array_equal(masks[f's{i+1}'].data, pixels[..., i])
    assert masks['s1'].meta['property'] == ['4147007', 'SCT', 'Mass'] and masks['s1'].meta['resampled'] == '' and series.frame not in str(masks['s1'].meta)
    turned = Volume(pet.data.transpose(1, 2, 0)[:, ::-1], np.column_stack([pet.affine[:, 1], -pet.affine[:, 2], pet.affine[:, 0], pet.affine[:, 3] + pet.affine[:, 2]*15]), 'SUVbw')
    np.testing.assert_array_equal(read_seg(path, turned, series)['s1'].canonical().data, pixels[..., 0])     # turned and flipped: still voxel for voxel
    with pytest.raises(MaskError, match='FrameOfReferenceUID') as e: read_seg(path, pet, '1.2.3')
    assert series.frame not in str(e.value)
    with pytest.raises(MaskError, match='voxels of frame .* outside the grid'): read_seg(path, pet.crop((0, 0, 0), (8, 14, 9)), series)
    with pytest.raises(MaskError, match='expected RTSTRUCT'): read_rtstruct(path, pet, series)


def test_a_pixel_spacing_that_drifts_by_a_whole_voxel_is_another_grid():
    "201 columns, each half a percent too wide: the last corner lands on a voxel again, the wrong one."
    wide = Volume(np.zeros((2, 3, 202)), AFFINE, 'SUVbw')
    frame = lambda step: np.column_stack([[0, 2, 0], [step, 0, 0], AFFINE[:3, 3]])[None]
    assert _on_grid(frame(2.), 3, 201, wide) is not None and _on_grid(frame(2.0002), 3, 201, wide) is not None and _on_grid(frame(2*(1 + 1/200)), 3, 201, wide) is None


def test_seg_on_another_grid_takes_the_nearest_voxel_and_says_so(scan, tmp_path, caplog):
    series, pet, *_ = scan
    pixels = np.zeros(pet.shape, np.uint8); pixels[2, 3:7, 4:8] = 1; pixels[5, 3:7, 4:8] = 1       # planes 3 and 4 are absent: the step is written
    path = saved(*highdicom_seg(tmp_path/'a.dcm', scan, pixels, 'BINARY', 1))
    fine = resample(pet, shape=(16, 28, 32))
    mask = read_seg(path, fine, series)['s1']
    np.testing.assert_array_equal(mask.data, pixels.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    assert 'nearest voxel, from 14 x 16 pixels of 4 x 4.5 mm' in mask.meta['resampled'] and 'another grid' in caplog.text


def test_fractional_and_label_map(scan, tmp_path):
    series, pet, labels, _ = scan
    occupied = np.random.default_rng(0).integers(0, 5, (*pet.shape, 1))/4        # 0, .25, .5, .75, 1; stored as 0, 25, 50, 75, 100
    path = saved(*highdicom_seg(tmp_path/'f.dcm', scan, occupied, 'FRACTIONAL', 1, fractional_type='OCCUPANCY', max_fractional_value=100))
    for cut in (.5, .75, 1.): np.testing.assert_array_equal(read_seg(path, pet, series, threshold=cut)['s1'].data, occupied[..., 0] >= cut)
    path = saved(*highdicom_seg(tmp_path/'l.dcm', scan, labels.data.astype(np.uint8), 'LABELMAP', 2))
    np.testing.assert_array_equal(as_labels(read_seg(path, pet, series)).data, labels.data)
    ds = pydicom.dcmread(path); ds.SegmentSequence = [s for s in ds.SegmentSequence if s.SegmentNumber != 2]; ds.save_as(path)
    with pytest.raises(MaskError, match=r'segments \[2\]'): read_seg(path, pet, series)


def test_labels_that_overlap_are_not_joined():
    a = IMAGE.replace(data=np.ones(IMAGE.shape, int), unit='label')
    with pytest.raises(MaskError, match="'b' overlaps 'a' in 1008 voxels"): as_labels({'a': a, 'b': a})
    with pytest.raises(MaskError, match='another grid'): as_labels({'a': a, 'b': a.crop((0, 0, 0), (2, 2, 2))})


# --- SEG and SR written ------------------------------------------------------------------------------------------------------
FINDINGS = [Finding('lung', 'left', 'nodule', 14.25, 10.9, 'increased', 3, (10, 31), (1.1, -2.2, 3.3)), Finding('mesenteric_node', '', 'node', uptake='increased')]


@pytest.mark.parametrize('kind', ['BINARY', 'LABELMAP'])
def test_written_seg_reads_back_equal(kind, scan, tmp_path):
    series, pet, labels, _ = scan
    path = write_seg(labels, series, tmp_path/'a.dcm', ['one', 'two'], FINDINGS, kind=kind)
    masks = read_seg(path, pet, series)
    np.testing.assert_array_equal(as_labels(masks).data, labels.data)
    assert masks['one'].meta['regions'] == [['39607008', 'SCT', 'Lung', ['7771000', 'SCT', 'Left']]] and masks['one'].meta['property'][0] == '27925004' and masks['two'].meta['regions'][0][1] == SCHEME
    seg = hd.seg.segread(path)                                                      # and by highdicom's own reader
    volume = seg.get_volume(combine_segments=True)
    volume = Volume(volume.array.astype(int), volume.affine, 'label').canonical()    # it sorts slices the other way
    lo = np.rint(labels.index(volume.affine[:3, 3])).astype(int)
    np.testing.assert_allclose(volume.affine[:3, :3], labels.affine[:3, :3], atol=1e-4)
    np.testing.assert_allclose(volume.affine[:3, 3], labels.world(lo), atol=1e-4)
    hi = lo + volume.shape
    np.testing.assert_array_equal(volume.data, labels.data[lo[0]:hi[0], lo[1]:hi[1], lo[2]:hi[2]])
    assert (labels.data > 0).sum() == (volume.data > 0).sum()
    assert str(seg.PatientName) == 'Phantom^masks' and seg.StudyInstanceUID == series.study and seg.SeriesDate == seg.InstanceCreationDate == series.headers[0].SeriesDate
    assert path.read_bytes() == write_seg(labels, series, tmp_path/'b.dcm', ['one', 'two'], FINDINGS, kind=kind).read_bytes()
    other = labels.data.copy(); other[0, 0, 0] = 1
    assert pydicom.dcmread(write_seg(labels.replace(data=other), series, tmp_path/'c.dcm', kind=kind)).SOPInstanceUID != seg.SOPInstanceUID


@pytest.mark.parametrize('kind', ['BINARY', 'LABELMAP'])
def test_structured_report_round_trip(kind, scan, tmp_path):
    series, pet, labels, lesions = scan
    seg = write_seg(labels, series, tmp_path/'seg.dcm', ['one', 'two'], kind=kind)
    entries = [Entry('cyst', finding=Finding('kidney', 'right', 'cyst', 1/3, uptake='none')), Entry('two', lesions[1], FINDINGS[1]), Entry('one', lesions[0]), Entry('both', replace(lesions[0], suvmax=1/3), FINDINGS[0])]
    path = write_sr(entries, series, tmp_path/'sr.dcm', seg)
    assert read_sr(path) == entries                                                 # dataclass equality: every float to the last bit, in order
    ds = pydicom.dcmread(path)
    assert ds.VerificationFlag == 'UNVERIFIED' and str(ds.PatientName) == 'Phantom^masks'
    report = hd.sr.srread(path).content                                             # what highdicom's reader makes of it
    groups = report.get_volumetric_roi_measurement_groups()
    assert len(groups) == 3 and len(report.get_image_measurement_groups()) == 1
    two = next(g for g in groups if g.tracking_identifier == 'two')
    stored = pydicom.dcmread(seg)
    assert two.referenced_segment.referenced_sop_instance_uid == stored.SOPInstanceUID and two.tracking_uid == next(x for x in stored.SegmentSequence if x.SegmentNumber == 2).TrackingUID
    told = {(m.name.value, m.derivation.value if m.derivation else '', m.unit.value): m.value for m in two.get_measurements()}
    l = lesions[1]
    expected = {('126401', '56851009', 'g/ml{SUVbw}'): l.suvmax, ('126401', '126031', 'g/ml{SUVbw}'): l.suvpeak, ('126401', '373098007', 'g/ml{SUVbw}'): l.suvmean,
                ('126032', '', 'cm3'): l.mtv_ml, ('126033', '', 'g'): l.tlg, ('L0JK', '', 'mm'): l.longest_mm}
    assert {k: told[k] for k in expected} == expected and l.mtv_ml == pytest.approx(2*3*4*5*4*4.5/1000)


def test_ibsi_mask_written_and_read_back(ibsi, tmp_path):
    "The reference object's own mask as SEG and as a measurement, on headers that another program wrote."
    root = next(ibsi.rglob('DRO_1_0'))
    series = next(s for s in find_series(root) if s.modality == 'PT')
    pet, mask = read_series(series), read_nifti(root/'mask'/'DRO_mask.nii.gz', 'label')
    labels = pet.replace(data=mask.data.astype(np.uint8), unit='label')
    seg = write_seg(labels, series, tmp_path/'seg.dcm', ['region 1'])
    back = read_seg(seg, pet, series)['region 1']
    np.testing.assert_array_equal(back.data, mask.data); np.testing.assert_allclose(back.affine, mask.affine, atol=1e-4)
    assert back.meta['resampled'] == '' and back.meta['frames'] == 18
    lesion, = measure(pet, labels)
    assert read_sr(write_sr([Entry('region 1', lesion)], series, tmp_path/'sr.dcm', seg)) == [Entry('region 1', lesion)] and lesion.suvmax == pytest.approx(4, rel=.02)


def test_every_word_of_the_vocabulary_round_trips(scan, tmp_path):
    series, *_ = scan
    entries = [Entry(f'o{i}', finding=Finding(o, 'right' if ORGANS[o].sided else '', 'mass')) for i, o in enumerate(ORGANS)] + [Entry(f'k{i}', finding=Finding('liver', '', k)) for i, k in enumerate(KINDS)]
    path = write_sr(entries, series, tmp_path/'sr.dcm')
    assert read_sr(path) == entries
    ds = pydicom.dcmread(tmp_path/'sr.dcm')
    assert [s.CodingSchemeDesignator for s in ds.CodingSchemeIdentificationSequence] == [SCHEME]


def test_no_standard_code_is_invented():
    "Every code outside the private scheme stands in pydicom's dictionary of PS3.16, with its meaning; UCUM's g is the one exception."
    from pydicom.sr._concepts_dict import concepts
    from petvlm.structured import KIND_CODES, ORGAN_CODES, UPTAKE_CODES
    known = {(scheme, value) for scheme, words in concepts.items() for terms in words.values() for value in terms}
    used = [*ORGAN_CODES.values(), *KIND_CODES.values(), *UPTAKE_CODES.values(), *(c for row in NUMBERS.values() for c in row if c)]
    assert {(c.scheme_designator, c.value) for c in used if c.scheme_designator != SCHEME} - known == {('UCUM', 'g')}
    assert all(len(c.value) <= 16 and len(c.meaning) <= 64 for c in used)


def test_names_in_any_script_and_headers_without_names(tmp_path, scan, recwarn):
    "A Vietnamese name, no caret in it, arrives whole and in no warning; tags that were taken away are there and empty; the same input gives the same bytes."
    series, pet, labels, lesions = scan
    named = [copy.deepcopy(h) for h in series.headers]
    for h in named: h.SpecificCharacterSet = 'ISO_IR 192'; h.PatientName = 'Nguyễn Văn Ánh'; del h.PatientBirthDate, h.AccessionNumber
    source = replace(series, headers=tuple(named))
    seg = write_seg(labels.replace(data=(labels.data == 1).astype(np.uint8)), source, tmp_path/'seg.dcm')       # one lesion only: its number stands in the shared group
    assert read_seg(seg, pet, source)['lesion 1'].data.sum() == (labels.data == 1).sum()
    paths = [write_sr([Entry('u hạch', lesions[0])], source, tmp_path/f'{i}.dcm', seg) for i in range(2)]
    for p in (seg, paths[0]):
        ds = pydicom.dcmread(p)
        assert str(ds.PatientName) == 'Nguyễn Văn Ánh' and ds.PatientBirthDate == '' and ds.SpecificCharacterSet == 'ISO_IR 192'
    assert paths[0].read_bytes() == paths[1].read_bytes() and read_sr(paths[0])[0].name == 'u hạch' and 'PatientBirthDate' not in named[0]
    assert not [w for w in recwarn if 'Ánh' in str(w.message)]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(scan, tmp_path, monkeypatch):
    series, pet, labels, lesions = scan
    seg, out = write_seg(labels, series, tmp_path/'seg.dcm'), tmp_path/'out'
    undated = replace(series, headers=tuple(Dataset({k: v for k, v in h.items() if not h[k].keyword.endswith('Date')}) for h in series.headers))
    attempts = {'grid of the source': lambda p: write_seg(labels.crop((0, 0, 0), (8, 14, 15)), series, p), 'without a gap': lambda p: write_seg(labels.replace(data=labels.data*2), series, p), "expected 'label'": lambda p: write_seg(pet, series, p),
                '1 names': lambda p: write_seg(labels, series, p, ['a']), "'FRACTIONAL'": lambda p: write_seg(labels, series, p, kind='FRACTIONAL'), 'StudyDate': lambda p: write_seg(labels, undated, p),
                'no SEG given': lambda p: write_sr([Entry('a', lesions[0])], series, p), "entries ['a']": lambda p: write_sr([Entry('a', replace(lesions[0], label=3))], series, p, seg),
                '0 entries': lambda p: write_sr([], series, p), '1 different': lambda p: write_sr([Entry('a', lesions[0]), Entry('a', lesions[1])], series, p, seg),
                'another study': lambda p: write_sr([Entry('a', lesions[0])], replace(series, study='1.2'), p, seg)}
    for words, attempt in attempts.items():
        with pytest.raises(StructuredError) as e: attempt(out/'x.dcm')
        assert words in str(e.value) and 'Phantom' not in str(e.value)
    def half(self, path, **how): Path(path).write_bytes(b'half'); raise OSError('disk full')
    monkeypatch.setattr(pydicom.Dataset, 'save_as', half)
    with pytest.raises(OSError): write_seg(labels, series, out/'x.dcm')
    assert not out.exists() or not list(out.iterdir())


def test_reports_of_other_programs_are_refused_by_what_they_lack(scan, tmp_path):
    series, _, labels, lesions = scan
    seg = write_seg(labels, series, tmp_path/'seg.dcm')
    path = write_sr([Entry('a', lesions[0], FINDINGS[0])], series, tmp_path/'sr.dcm', seg)
    def changed(change):
        ds = pydicom.dcmread(path)
        group = next(g for i in ds.ContentSequence for g in i.get('ContentSequence') or [] if g.ConceptNameCodeSequence[0].CodeValue == '125007')
        change(group); ds.save_as(tmp_path/'changed.dcm')
        return tmp_path/'changed.dcm'
    def without(code): return lambda g: setattr(g, 'ContentSequence', [i for i in g.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue != code])
    def added(g): g.ContentSequence.append(hd.sr.NumContentItem(codes.SCT.Area, 1., codes.UCUM.SquareMillimeter, relationship_type='CONTAINS'))
    def renamed(g): next(i for i in g.ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == '121071').ConceptCodeSequence[0].CodeValue = '1'
    with pytest.raises(StructuredError, match='lacks Metabolic Volume'): read_sr(changed(without('126032')))
    with pytest.raises(StructuredError, match='kind'): read_sr(changed(renamed))
    assert read_sr(changed(added)) == read_sr(path)
    with pytest.raises(StructuredError, match='is SEG'): read_sr(seg)
    with pytest.raises(StructuredError, match='neither'): Entry('a')


# --- BIDS --------------------------------------------------------------------------------------------------------------------
HALF, HOUR = 6586.2, 70_000/(368e6*2**(-3600/6586.2))
SIDE = dict(Units='Bq/mL', TracerRadionuclide='F18', InjectedRadioactivity=368, InjectedRadioactivityUnits='MBq', ModeOfAdministration='bolus', TimeZero='10:00:00', ScanStart=3600, InjectionStart=0, FrameTimesStart=[3600], FrameDuration=[600],
            ImageDecayCorrected=True, ImageDecayCorrectionTime=3600, AttenuationCorrection='CT', BodyWeight=70)
LAM = np.log(2)/HALF
MIDDLE = np.log(LAM*600/(1 - np.exp(-LAM*600)))/LAM      # when the mean rate of a 600 s frame occurs

FACTORS = {
    'corrected to scan start': ({}, HOUR), 'corrected to injection': (dict(ImageDecayCorrectionTime=0), 70_000/368e6), 'kilo': (dict(Units='kBq/mL'), 1000*HOUR), 'small l': (dict(Units='Bq/ml'), HOUR),
    'time zero at scan start': (dict(ScanStart=0, InjectionStart=-3600, ImageDecayCorrectionTime=0, FrameTimesStart=[0]), HOUR), 'GBq': (dict(InjectedRadioactivity=.368, InjectedRadioactivityUnits='GBq'), HOUR),
    'capitals of the specification': (dict(InjectedRadioactivityUnits=None, InjectedRadioActivityUnits='MBq'), HOUR), 'written 18F': (dict(TracerRadionuclide='[18F]'), HOUR),
    'not corrected': (dict(ImageDecayCorrected=False, ImageDecayCorrectionTime='n/a'), 70_000/(368e6*2**(-(3600 + MIDDLE)/HALF))),
    'carbon': (dict(TracerRadionuclide='C11', ImageDecayCorrectionTime=1221.8), 70_000*2/368e6), 'scan starts before injection': (dict(ImageDecayCorrectionTime=-120), 70_000/(368e6*2**(120/HALF))),
    "scanner's half-life": (dict(RadionuclideHalfLife=6588), 70_000/(368e6*2**(-3600/6588)))}


@pytest.mark.parametrize('case', FACTORS)
def test_bids_factor_by_hand(case):
    change, expected = FACTORS[case]
    found = suv_factors(SIDE | change, 'sub-01_pet.nii.gz')
    assert found.factor[0] == pytest.approx(expected, rel=1e-12) and found.weight_kg == 70 and found.rule


BIDS_REFUSED = {
    'Units': dict(Units='counts'), 'Units ': dict(Units='mBq/mL'), 'TracerRadionuclide': dict(TracerRadionuclide='FDG'), 'InjectedRadioactivityUnits': dict(InjectedRadioactivityUnits='mCi'), 'InjectedRadioactivity ': dict(InjectedRadioactivity='n/a'),
    'InjectedRadioactivity is 368 Bq': dict(InjectedRadioactivityUnits='Bq'), 'ModeOfAdministration': dict(ModeOfAdministration='infusion'), 'ImageDecayCorrectionTime': dict(ImageDecayCorrectionTime=None),
    'ImageDecayCorrected is missing': dict(ImageDecayCorrected=None), 'InjectionStart is missing': dict(InjectionStart=None), 'InjectionStart lies': dict(InjectionStart=9000), 'body_weight': dict(BodyWeight=None), 'BodyWeight': dict(BodyWeight=70_000),
    'FrameDuration': dict(ImageDecayCorrected=False, FrameDuration=[1, 2]), 'AttenuationCorrection': dict(AttenuationCorrection='none'), 'RadionuclideHalfLife': dict(RadionuclideHalfLife=109.77), 'number': dict(InjectionStart='10:00:00')}


@pytest.mark.parametrize('field', BIDS_REFUSED)
def test_bids_refusal_names_the_field(field):
    with pytest.raises(BidsError) as e: suv_factors(SIDE | BIDS_REFUSED[field], 'sub-01_pet.nii.gz')
    assert field.strip() in str(e.value) and 'Remedy' in str(e.value)


def test_bids_overrides_are_used_and_recorded():
    record = suv_factors(SIDE | dict(BodyWeight=None, ModeOfAdministration='infusion', TracerRadionuclide='n/a', AttenuationCorrection='none'), 'sub-01_pet.nii.gz', weight_kg=70, dose_bq=368e6, half_life_s=HALF, uncorrected=True)
    assert record.factor[0] == pytest.approx(HOUR) and record.overrides == ('dose_bq', 'half_life_s', 'uncorrected', 'weight_kg')
    with pytest.raises(BidsError, match='rec- entity'): suv_factors(SIDE, 'sub-01_rec-nacdyn_pet.nii.gz')
    with pytest.raises(BidsError, match='unknown override'): suv_factors(SIDE, 'sub-01_pet.nii.gz', dose=1)


def bids(folder, frames, **change):
    folder = folder/'sub-07'/'ses-b'/'pet'; folder.mkdir(parents=True, exist_ok=True)
    path = folder/'sub-07_ses-b_trc-18FFDG_pet.nii.gz'
    data = np.stack([np.full((4, 5, 6), v, np.float32)*(1 + np.arange(6, dtype=np.float32)) for v in frames], -1)
    nib.save(nib.Nifti1Image(data[..., 0] if len(frames) == 1 else data, np.array([[-2., 0, 0, 9], [0, -3, 0, 8], [0, 0, 4, 7], [0, 0, 0, 1]])), path)
    (folder/path.name.replace('.nii.gz', '.json')).write_text(json.dumps(SIDE | change))
    return path


def test_bids_frames_and_place(tmp_path):
    path = bids(tmp_path, (1000, 3000), FrameTimesStart=[3600, 3660], FrameDuration=[60, 180])
    with pytest.raises(BidsError, match="holds 2 frames.*frame='mean'"): read_bids(path)
    with pytest.raises(BidsError, match='frame is 2'): read_bids(path, frame=2)
    for frame, value in ((0, 1000), (1, 3000), ('mean', 2500)):
        vol = read_bids(path, frame=frame)
        np.testing.assert_allclose(vol.data[:, 2, 1], value*HOUR*(1 + np.arange(6)), rtol=1e-6)
    assert vol.unit == 'SUVbw' and vol.shape == (6, 5, 4) and vol.meta['frame'] == 'mean'
    np.testing.assert_allclose(vol.affine, [[0, 0, 2, -9], [0, 3, 0, -8], [4, 0, 0, 7], [0, 0, 0, 1]])
    late = read_bids(bids(tmp_path, (1000, 3000), FrameTimesStart=[0, 3600], FrameDuration=[600, 600], ImageDecayCorrected=False), frame='mean')     # each frame by its own moment
    assert late.data[0, 0, 0] == pytest.approx((1000*70_000/(368e6*2**(-MIDDLE/HALF)) + 3000*70_000/(368e6*2**(-(3600 + MIDDLE)/HALF)))/2, rel=1e-6)


def test_bids_weight_from_the_tables(tmp_path):
    path = bids(tmp_path, (1000,), BodyWeight='n/a')
    table = tmp_path/'participants.tsv'
    table.write_text('participant_id\tage\tbody_weight\nsub-06\t50\t58\nsub-07\t60\t70\n')
    assert read_bids(path).data[0, 0, 0] == pytest.approx(1000*HOUR, rel=1e-6)
    (tmp_path/'sub-07'/'sub-07_sessions.tsv').write_text('session_id\tbody_weight\nses-a\t60\nses-b\t35\n')
    vol = read_bids(path)
    assert vol.data[0, 0, 0] == pytest.approx(500*HOUR, rel=1e-6) and vol.meta['suv']['notes'] == ['body_weight in sub-07_sessions.tsv'] or 'sub-07' not in str(vol.meta)
    (tmp_path/'sub-07'/'sub-07_sessions.tsv').unlink()
    (tmp_path/'participants.json').write_text(json.dumps({'body_weight': {'Units': 'lb'}}))
    with pytest.raises(BidsError, match='body_weight in participants.tsv is in lb'): read_bids(path)
    table.write_text('participant_id\tage\nsub-07\t60\n')
    with pytest.raises(BidsError, match='body_weight'): read_bids(path)


@pytest.mark.parametrize('mode', ['START', 'ADMIN', 'NONE'])
def test_dicom_to_bids_and_back_gives_the_same_suv(mode, tmp_path):
    affine = np.array([[0, 0, 4., -30], [0, 4, 0, -20], [60, 0, 0, -200], [0, 0, 0, 1.]])
    pet = Volume(np.random.default_rng(0).gamma(1, 2, (6, 7, 8)), affine, 'SUVbw')
    folder = write_series(pet, EXAM, tmp_path/'pt', 'PT')                                  # two bed positions, 150 s each
    for f in folder.iterdir():
        ds = pydicom.dcmread(f); ds.DecayCorrection = mode
        if mode == 'NONE': ds.CorrectedImage = ['ATTN']
        ds.save_as(f)
    series = find_series(folder)[0]
    vol = read_series(series)
    path = write_bids(vol, tmp_path/'sub-01_pet.nii.gz', series)
    back, side = read_bids(path), json.loads((tmp_path/'sub-01_pet.json').read_text())
    np.testing.assert_allclose(back.data, vol.data, rtol=1e-6); np.testing.assert_allclose(back.affine, vol.affine, atol=1e-4)
    assert side['TimeZero'] == '09:00:00' and side['FrameDuration'] == [300] and side['ScanStart'] == 3600 and side['ImageDecayCorrectionTime'] == (3600 if mode == 'START' else 0)
    if mode == 'START': np.testing.assert_allclose(nib.load(path).get_fdata(), (vol.data/vol.meta['suv']['factor'][0]).transpose(2, 1, 0), rtol=1e-6)     # the very Bq/ml of the series
    assert 'Phantom' not in json.dumps(side) and '2025' not in json.dumps(side)


def test_what_cannot_become_bids_is_refused(tmp_path):
    pet = Volume(np.ones((2, 3, 4)), AFFINE, 'SUVbw', {'suv': {'rule': 'GML', 'dose_bq': None}})
    with pytest.raises(BidsError, match='dose_bq.*GML'): write_bids(pet, tmp_path/'sub-01_pet.nii.gz', None)
    with pytest.raises(BidsError, match='_pet.nii.gz'): write_bids(pet, tmp_path/'pet.nii.gz', None)
    with pytest.raises(BidsError, match='sidecar'): read_bids(tmp_path/'sub-01_pet.nii.gz')
    assert not list(tmp_path.iterdir())

def test_bids_voxels_that_are_no_number_are_told(tmp_path):
    path = bids(tmp_path, (1000,)); img = nib.load(path); data = np.asarray(img.dataobj, np.float32).copy(); data.flat[:7] = np.nan; data.flat[7] = np.inf
    nib.save(nib.Nifti1Image(data, img.affine), path); vol = read_bids(path)
    assert np.isfinite(vol.data).all() and (vol.data == 0).sum() == 8 and vol.meta['notes'] == ['8 voxels were no number and are read as 0']
