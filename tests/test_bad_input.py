"Damaged and lying files: a sample of `tests/fuzz.py` (which runs 20,000), and one case for each fault that it found."
import io, json, struct, zipfile
from pathlib import Path
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless
import fuzz
from petvlm.bids import BidsError, read_bids
from petvlm.dicom import DicomError, GeometryError, SUVError, find_series, pair_pet_ct, read_series
from petvlm.dicomfile import Pixels, native, read_header, rle_fault
from petvlm.files import read_json
from petvlm.layouts import _array, iu_rows, vimed_reports
from petvlm.own import read_reports
from petvlm.petheaders import value, when
from petvlm.rawheader import BLOCK, NotPlain, raw_header
from petvlm.sources import SourceError, dicom_study
from petvlm.volume import Volume, VolumeError, read_nifti, write_nifti
from test_dicom import HOUR, pet, slice_
from test_dicom_files import plain_pet, recode

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning')


@pytest.mark.parametrize('family', fuzz.FAMILIES)
def test_a_sample_of_the_fuzz_run(family):
    outcomes = [fuzz.case(family, n, seed=5) for n in range(70)]
    assert {o for o, _ in outcomes} == {'right', 'refused'}, [x for x in outcomes if x[0] not in ('right', 'refused')]


def test_the_fuzz_run_sees_what_it_should(monkeypatch):
    "Judged by the same code: a reader that is off by one in a thousand, one that raises what it should not."
    import petvlm.dicom as dicom
    read = dicom.read_series
    monkeypatch.setattr(dicom, 'read_series', lambda folder: (v := read(folder)).replace(data=v.data*np.float32(1.01)))
    assert 'wrong' in {fuzz.case('dicom', n, seed=5)[0] for n in range(30)}
    monkeypatch.setattr(dicom, 'read_series', lambda folder: {}['x'])
    assert {fuzz.case('dicom', n, seed=5)[0] for n in range(3)} == {'crashed'}


# ---- DICOM -------------------------------------------------------------------------------------------------------------------
def same(path) -> bool:
    "Whether the quick header is pydicom's."
    mine, at = raw_header(Path(path).read_bytes()[:BLOCK], str(path)); theirs = pydicom.dcmread(path, stop_before_pixels=True)
    assert Path(path).read_bytes()[at:at + 4] == b'\xe0\x7f\x10\0'
    return mine == theirs and mine.file_meta == theirs.file_meta and [*mine.keys()] == [*theirs.keys()] and mine.original_character_set == theirs.original_character_set


def test_quick_headers_are_pydicoms(tmp_path):
    pet(tmp_path, n=3, SpecificCharacterSet='ISO_IR 192', PatientName='Nguyễn^Thị^Hòa', PatientComments='', private={(0x9, 0x10): ('LO', 'GEMS_PETD_01'), (0x9, 0x100D): ('UN', b'20250101110000.00 ')})
    assert same(tmp_path/'1')
    recode(tmp_path/'2', RLELossless); assert same(tmp_path/'2')
    ds = pydicom.dcmread(tmp_path/'3'); item = Dataset(); item.CodeMeaning = 'đầu'; ds.RequestAttributesSequence = Sequence([item])
    ds['RequestAttributesSequence'].is_undefined_length = True; ds.save_as(tmp_path/'3'); assert same(tmp_path/'3')
    assert same(plain_pet(tmp_path/'enhanced.dcm', n=3))
    for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian):
        recode(tmp_path/'1', syntax)
        with pytest.raises(NotPlain, match='transfer syntax'): raw_header((tmp_path/'1').read_bytes(), 'x')
        assert value(read_header(tmp_path/'1')[0], 'PatientWeight') == 70


@pytest.mark.parametrize('bits,signed', [(16, 1), (16, 0), (12, 0), (12, 1)])
def test_pixels_from_where_they_lie_are_pydicoms(tmp_path, bits, signed):
    stored = np.random.default_rng(bits).integers(-2**(bits - 1) if signed else 0, 2**(bits - signed), (5, 7))
    slice_(tmp_path, 'a', stored, (0, 0, 0), '1.2', BitsStored=bits, HighBit=bits - 1, PixelRepresentation=signed)
    header, wrong = read_header(tmp_path/'a')
    assert wrong is None and np.array_equal(native(tmp_path/'a', header), stored) and np.array_equal(Pixels(tmp_path/'a')[0], stored)


def test_pixels_are_not_taken_for_others(tmp_path):
    pet(tmp_path, n=2); raw = (tmp_path/'1').read_bytes(); at = raw.index(b'\xe0\x7f\x10\0')
    assert native(tmp_path/'1', read_header(tmp_path/'1')[0]) is not None
    twice = raw[:at + 12] + bytes(96) + raw[at:]                          # pixels of zeros before the pixels: the last ones count
    (tmp_path/'1').write_bytes(twice)
    assert native(tmp_path/'1', read_header(tmp_path/'1')[0]) is None and read_series(tmp_path).data.max() == pytest.approx(1000*HOUR)
    ds = pydicom.dcmread(io.BytesIO(raw)); ds.PixelData += b'\1'*64; ds.save_as(tmp_path/'1')
    with pytest.raises(DicomError, match='160 bytes of pixels, expected 96.*transfer syntax'): read_series(tmp_path)


def test_run_length_code_that_falls_short(tmp_path):
    frame = struct.pack('<16L', 2, 64, 66, *[0]*13) + b'\x81\0' + b'\x81\5'              # twice 128 equal bytes
    assert rle_fault(frame, 128, 2) is None and 'makes 128 values' in rle_fault(frame, 256, 2) and 'names 2 planes' in rle_fault(frame, 128, 1)
    pet(tmp_path, n=3, rle=True); raw = bytearray((tmp_path/'2').read_bytes()); at = raw.index(struct.pack('<2L', 2, 64))
    raw[at:at + 4] = struct.pack('<L', 1)
    (tmp_path/'2').write_bytes(bytes(raw))
    with pytest.raises(DicomError, match='2: its run-length code names 1 planes'): read_series(tmp_path)


def test_a_decoder_that_panics_is_an_error(tmp_path, monkeypatch):
    import petvlm.dicomfile as dicomfile
    pet(tmp_path, n=2, rle=True)
    def panic(*a, **kw): raise type('PanicException', (BaseException,), {})('index out of bounds')
    monkeypatch.setattr(dicomfile, 'pixel_array', panic)
    with pytest.raises(DicomError, match='PanicException: index out of bounds'): read_series(tmp_path)
    def stop(*a, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(dicomfile, 'pixel_array', stop)
    with pytest.raises(KeyboardInterrupt): read_series(tmp_path)


@pytest.mark.parametrize('date,time', [('2025010', '110000'), ('202501011', '110000'), ('20250101', '11000'), ('20250101', '9.5'), ('20251301', '110000'), ('20250101', '250000')])
def test_digits_are_not_lent_between_date_and_time(date, time):
    with pytest.raises(SUVError, match='expected YYYYMMDD and HHMMSS'): when(date, time)


def test_dates_and_times_as_they_are_written():
    assert str(when('2025.01.31', '11:05')) == '2025-01-31 11:05:00' and str(when('20250131', '110507.25 ')) == '2025-01-31 11:05:07.250000' and str(when('', '11').time()) == '11:00:00' and when('20250131', '') is None


def test_more_activity_than_was_injected(tmp_path):
    pet(tmp_path, n=3, RescaleSlope=1e9)
    with pytest.raises(SUVError, match='times the activity that was injected, expected at most 5'): read_series(tmp_path)
    (tmp_path/'b').mkdir(); pet(tmp_path/'b', n=3, RescaleSlope=-1)
    with pytest.raises(DicomError, match='activity is not negative'): read_series(tmp_path/'b')
    (tmp_path/'c').mkdir(); pet(tmp_path/'c', n=3, Units='GML', RescaleSlope=1e6)
    with pytest.raises(SUVError, match='activity that was injected'): read_series(tmp_path/'c')


def test_slices_that_move_sideways(tmp_path):
    pet(tmp_path, n=2, per_slice=lambda i: dict(ImagePositionPatient=[0, 9*i, 3*i]))
    with pytest.raises(GeometryError, match='72 degrees off their normal'): read_series(tmp_path)


def test_a_tag_of_another_type(tmp_path):
    "A damaged type makes a number of a text."
    pet(tmp_path, n=3)
    for name in '123':
        ds = pydicom.dcmread(tmp_path/name); del ds.CorrectedImage; ds.add_new(0x00280051, 'US', 7); ds.add_new(0x00080008, 'US', 7); ds.save_as(tmp_path/name)
    with pytest.raises(SUVError, match='7 lacks ATTN|lacks ATTN'): read_series(tmp_path)


def test_a_file_that_lost_its_series_is_damaged(tmp_path):
    pet(tmp_path, n=3); ds = pydicom.dcmread(tmp_path/'1'); del ds.SeriesInstanceUID; ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.1287'; ds.save_as(tmp_path/'1', enforce_file_format=False)
    assert find_series(tmp_path).skipped == {'damaged': 1} and 'damaged DICOM file(s) lay beside' in read_series(tmp_path).meta['notes'][-1]


def test_what_the_headers_lack_may_be_given_where_series_are_chosen(tmp_path):
    (tmp_path/'PT').mkdir(); (tmp_path/'CT').mkdir()
    pet(tmp_path/'PT', PatientWeight=None)
    for i in range(4): slice_(tmp_path/'CT', f'c{i}', np.zeros((6, 8)), (0, 0, 3*i), '1.2.3.5', 'CT')
    assert pair_pet_ct(find_series(tmp_path)).pet is None and 'PatientWeight' in dict((s.modality, why) for s, why in pair_pet_ct(find_series(tmp_path)).refused)['PT']
    assert pair_pet_ct(find_series(tmp_path), weight_kg=70).pet is not None
    assert dicom_study(tmp_path, weight_kg=70).volumes['pet'].data.max() == pytest.approx(1000*HOUR)


# ---- NIfTI, numpy, JSON, CSV ---------------------------------------------------------------------------------------------------
def nifti(folder: Path, suffix='.nii', **fields) -> Path:
    path = write_nifti(Volume(np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.eye(4), 'SUVbw', {}), folder/f'a{suffix}')
    return path


def test_nifti_headers_that_lie(tmp_path):
    path = nifti(tmp_path); raw = bytearray(path.read_bytes())
    for what, words in {(40, struct.pack('<4h', 3, 32767, 32767, 32767)): 'claims 32767 x 32767 x 32767 voxels', (40, struct.pack('<4h', 3, 500, 500, 500)): 'truncated: room for at most 240 bytes',
                        (344, b'nope'): 'not a NIfTI file|expected NIfTI', (280, struct.pack('<f', np.nan)): 'affine|not a NIfTI'}.items():
        bad = bytearray(raw); bad[what[0]:what[0] + len(what[1])] = what[1]; path.write_bytes(bytes(bad))
        with pytest.raises(VolumeError, match=words): read_nifti(path)
    path.write_bytes(bytes(raw[:-8]))
    with pytest.raises(VolumeError, match='a.nii: truncated'): read_nifti(path)
    packed = nifti(tmp_path, '.nii.gz'); packed.write_bytes(packed.read_bytes()[:60])
    with pytest.raises(VolumeError, match='a.nii.gz'): read_nifti(packed)
    (tmp_path/'a.json').write_text('[1]')
    with pytest.raises(VolumeError, match='a.json: holds list, expected dict'): read_nifti(nifti(tmp_path))


def test_voxels_that_are_no_number_are_told(tmp_path):
    data = np.ones((4, 4, 4), np.float32); data[0, 0, :3] = np.nan, np.inf, -np.inf
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path/'x.nii.gz')
    volume = read_nifti(tmp_path/'x.nii.gz', 'HU')
    assert (volume.data == -1000).sum() == 3 and volume.meta['notes'] == ['3 voxels were no number and are read as -1000']
    with pytest.raises(VolumeError, match='invertible'): Volume(data, np.full((4, 4), np.nan), 'HU')


def test_arrays_that_claim_more_than_they_hold(tmp_path):
    out = io.BytesIO(); np.save(out, np.zeros((4, 5, 6), np.int16)); raw = out.getvalue()
    (tmp_path/'x.npy').write_bytes(raw.replace(b'(4, 5, 6)', b'(40000, 50000, 60)'[:18]))
    with pytest.raises(SourceError, match='x.npy: not a plain array'): _array(tmp_path/'x.npy')
    with zipfile.ZipFile(tmp_path/'x.npz', 'w') as z: z.writestr('a.npy', raw.replace(b"(4, 5, 6), }" + b' '*9, b"(40000, 50000, 6), }" + b' '))
    with pytest.raises(SourceError, match='x.npz: (truncated: the header claims|not a plain array)'): _array(tmp_path/'x.npz')
    np.save(tmp_path/'t.npy', np.array([[['a']]]))
    with pytest.raises(SourceError, match='expected 1 to'): _array(tmp_path/'t.npy')


@pytest.mark.parametrize('content,words', [(b'[' * 100_000, 'not JSON'), (b'1' * 5000, 'not JSON'), (b'{"a": "\\ud800"}', 'half a character'), (b'\xff\xfe', 'byte 0 is not UTF-8'), (b'[]', 'expected dict')])
def test_json_of_every_kind(tmp_path, content, words):
    (tmp_path/'x.json').write_bytes(content)
    with pytest.raises(SourceError, match=words): read_json(tmp_path/'x.json', SourceError, dict)


def test_texts_that_are_none(tmp_path):
    row = dict(study='s', region='chest', language='vi', text='Bình thường.'); (tmp_path/'s').mkdir()
    for change, words in (({'text': True}, 'text is True, expected text'), ({'text': '\0'}, 'without a letter'), ({'patient': 1.5}, 'patient is 1.5'), ({'region': ['chest']}, r"region is \['chest'\]")):
        (tmp_path/'r.json').write_text(json.dumps([row | change]))
        with pytest.raises(SourceError, match=words): read_reports(tmp_path/'r.json')
    (tmp_path/'r.json').write_text(json.dumps([row | {'patient': 17}])); assert read_reports(tmp_path/'r.json')[0].patient == '17'
    for entry, words in (({'id': 1, 'report': 'x', 'image_path': []}, "under 'id', expected text"), ({'id': 'a', 'report': 'x', 'image_path': 'a.png'}, 'expected a list of file names'), (['a'], 'no list of objects')):
        (tmp_path/'a.json').write_text(json.dumps({'train': [entry]}))
        with pytest.raises(SourceError, match=words): iu_rows(tmp_path/'a.json')
    with pytest.raises(SourceError, match='expected a text for each region'): vimed_reports({'Mô tả hình ảnh': {'Lồng ngực': 3}})


@pytest.mark.parametrize('change,words', [({'InjectedRadioactivity': 10**400}, 'InjectedRadioactivity is 1000'), ({'ImageDecayCorrected': False, 'FrameTimesStart': ['x']}, 'FrameTimesStart holds'), ({'BodyWeight': True}, 'BodyWeight is True')])
def test_sidecars(tmp_path, change, words):
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4)), tmp_path/'sub-1_pet.nii.gz')
    (tmp_path/'sub-1_pet.json').write_text(json.dumps(fuzz.SIDECAR | change))
    with pytest.raises(BidsError, match=words): read_bids(tmp_path/'sub-1_pet.nii.gz')
