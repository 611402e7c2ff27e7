"""DICOM to SUVbw and HU: hand-calculated synthetic slices, and the real study and reference objects where ../shared/data is present."""
import tarfile, tracemalloc
from pathlib import Path
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid
from petvlm.config import resolve
from petvlm.dicom import DicomError, GeometryError, SUVError, find_series, pair_pet_ct, read_series
from petvlm.findings import Study
from petvlm.prepare import to_grid
from petvlm.volume import read_nifti

SHARED = Path(__file__).resolve().parents[2]/'shared'/'data'
HALF_LIFE, DOSE, WEIGHT = 6586.2, 368e6, 70.
HOUR = 1000*WEIGHT / (DOSE * 2**(-3600/HALF_LIFE))      # factor one hour after injection


def slice_(folder, name, stored, position, series, modality='PT', tracer=None, private=None, rle=False, **changes):
    "Write one slice of `stored` (H, W); `changes` set tags or remove them (None), `tracer` likewise inside the radiopharmaceutical item."
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.128' if modality == 'PT' else '1.2.840.10008.5.1.4.1.1.2'
    ds = FileDataset(name, {}, file_meta=meta, preamble=b'\0'*128)
    item = pydicom.Dataset()
    item.update({'RadiopharmaceuticalStartTime': '100000', 'RadionuclideTotalDose': DOSE, 'RadionuclideHalfLife': HALF_LIFE, 'Radiopharmaceutical': 'FDG'})
    ds.update(dict(SOPClassUID=meta.MediaStorageSOPClassUID, SOPInstanceUID=generate_uid(), SeriesInstanceUID=series, StudyInstanceUID='1.2.3', FrameOfReferenceUID='1.2.3.4',
                   Modality=modality, SeriesDescription=modality, PatientName='Nguyen^Van^A', PatientID='SECRET', SeriesDate='20250101', SeriesTime='110000',
                   AcquisitionDate='20250101', AcquisitionTime='110000', Rows=stored.shape[0], Columns=stored.shape[1], BitsAllocated=16, BitsStored=16, HighBit=15,
                   PixelRepresentation=1, SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2', PixelSpacing=[4, 5], SliceThickness=9,
                   ImageOrientationPatient=[1, 0, 0, 0, 1, 0], ImagePositionPatient=list(position), RescaleSlope=1, RescaleIntercept=0))
    if modality == 'PT':
        ds.update(dict(Units='BQML', DecayCorrection='START', CorrectedImage=['ATTN', 'DECY'], PatientWeight=WEIGHT, Manufacturer='ACME', RadiopharmaceuticalInformationSequence=[item]))
    for target, values in ((ds, changes), (item, tracer or {})):
        for key, value in values.items():
            setattr(target, key, value) if value is not None else delattr(target, key)
    for tag, (vr, value) in (private or {}).items():
        ds.add_new(tag, vr, value)
    ds.PixelData = stored.astype('<i2').tobytes()
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    if rle: ds.compress(RLELossless)
    ds.save_as(Path(folder)/name, enforce_file_format=True)


def pet(folder, n=4, per_slice=None, **how):
    "`n` PET slices 3 mm apart, all stored values 1000; `per_slice(i)` gives changes of slice i."
    series = generate_uid()
    for i in range(n):
        slice_(folder, f'{n-i}', np.full((6, 8), 1000), (0, 0, 3*i), series, **(how | (per_slice(i) if per_slice else {})))
    return folder


def suv(folder, overrides=None, **how):
    "SUV per slice of `pet(**how)`, divided by the 1000 Bq/ml stored."
    vol = read_series(pet(folder, **how), **(overrides or {}))
    return vol.data[:, 0, 0]/1000, vol.meta['suv']


# --- reference time and factor, by hand ---------------------------------------------------------------------------------------
def mean_rate(duration):
    lam = np.log(2)/HALF_LIFE
    return np.log(lam*duration/(1-np.exp(-lam*duration)))/lam


GE = dict(Manufacturer='GE MEDICAL SYSTEMS')
CASES = {
    'start': ({}, HOUR),
    'administration': (dict(DecayCorrection='ADMIN'), 1000*WEIGHT/DOSE),
    'midnight': (dict(SeriesTime='003000', AcquisitionTime='003000', tracer={'RadiopharmaceuticalStartTime': '233000'}), HOUR),
    'start datetime': (dict(tracer={'RadiopharmaceuticalStartTime': None, 'RadiopharmaceuticalStartDateTime': '20250101100000.00'}), HOUR),
    'start datetime shifted by de-identification': (dict(tracer={'RadiopharmaceuticalStartDateTime': '20200101100000'}), HOUR),
    'series before acquisition': (dict(AcquisitionTime='113000'), HOUR),
    'ge private, later reconstruction': (dict(GE, SeriesTime='180000', AcquisitionTime='113000', private={(0x9, 0x100D): ('DT', '20250101110000.00')}), HOUR),
    'ge private, dates shifted': (dict(GE, AcquisitionTime='110000', private={(0x9, 0x100D): ('DT', '20241209110000.00')}), HOUR),
    'ge private of unknown type': (dict(GE, SeriesTime='180000', private={(0x9, 0x100D): ('UN', b'20250101110000.00 ')}), HOUR),
    'frame times, later reconstruction': (dict(SeriesTime='180000', AcquisitionTime='110500', FrameReferenceTime=1000*(300+mean_rate(300)), ActualFrameDuration=300000), HOUR),
    'colons in time': (dict(SeriesTime='11:00:00', AcquisitionTime='11:00:00'), HOUR),
    'no dates at all': (dict(SeriesDate=None, AcquisitionDate=None), HOUR),
    'gml': (dict(Units='GML'), 1.),
    'philips suv': (dict(Units='CNTS', private={(0x7053, 0x1000): ('DS', '0.0005')}), .0005),
    'philips suv of unknown type': (dict(Units='CNTS', private={(0x7053, 0x1000): ('UN', b'0.0005')}), .0005),
    'philips activity': (dict(Units='CNTS', private={(0x7053, 0x1000): ('DS', '0'), (0x7053, 0x1009): ('DS', '2.5')}), 2.5*HOUR),
    'half-life from the nuclide': (dict(tracer={'RadionuclideHalfLife': None}), HOUR),
}


@pytest.mark.filterwarnings('ignore:Invalid value for VR TM')
@pytest.mark.parametrize('case', CASES)
def test_factor(case, tmp_path):
    how, expected = CASES[case]
    found, record = suv(tmp_path, **how)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert record['rule'] and record['factor'][0] == pytest.approx(expected, rel=2e-5)


def test_no_decay_correction_is_per_slice(tmp_path):
    beds = [0, 0, 300, 300]
    found, record = suv(tmp_path, DecayCorrection='NONE', CorrectedImage=['ATTN'], ActualFrameDuration=300000,
                        per_slice=lambda i: dict(AcquisitionTime=f'11{beds[i]//60:02}00'))
    decay = 3600 + np.array(beds) + mean_rate(300)
    np.testing.assert_allclose(found, 1000*WEIGHT/(DOSE*2**(-decay/HALF_LIFE)), rtol=2e-5)
    assert record['decay_s'] == pytest.approx([decay[0], decay[-1]])


def test_several_acquisition_times_use_the_earliest(tmp_path):
    found, _ = suv(tmp_path, per_slice=lambda i: dict(AcquisitionTime=f'11{5*(3-i):02}00'))
    np.testing.assert_allclose(found, HOUR, rtol=1e-6)


# --- refusals: the tag and the remedy -----------------------------------------------------------------------------------------
REFUSED = {
    'dose in MBq': (dict(tracer={'RadionuclideTotalDose': 368.}), ('RadionuclideTotalDose', 'MBq', 'dose_bq=')),
    'dose in kBq': (dict(tracer={'RadionuclideTotalDose': 368e3}), ('RadionuclideTotalDose', 'dose_bq=')),
    'no dose': (dict(tracer={'RadionuclideTotalDose': None}), ('RadionuclideTotalDose', 'missing', 'dose_bq=')),
    'no weight': (dict(PatientWeight=None), ('PatientWeight', 'missing', 'weight_kg=')),
    'grams': (dict(PatientWeight=70000.), ('PatientWeight', 'weight_kg=')),
    'two weights': (dict(per_slice=lambda i: dict(PatientWeight=70.+i)), ('PatientWeight', 'mixed')),
    'half-life in minutes': (dict(tracer={'RadionuclideHalfLife': 109.77}), ('RadionuclideHalfLife', 'F-18', 'half_life_s=')),
    'unknown tracer, no half-life': (dict(tracer={'RadionuclideHalfLife': None, 'Radiopharmaceutical': 'X'}), ('RadionuclideHalfLife', 'half_life_s=')),
    'zirconium without a date': (dict(tracer={'RadionuclideHalfLife': 282276., 'Radiopharmaceutical': '89Zr-trastuzumab'}), ('RadiopharmaceuticalStartDateTime', 'injection_time=')),
    'no injection time': (dict(tracer={'RadiopharmaceuticalStartTime': None}), ('RadiopharmaceuticalStartTime', 'injection_time=')),
    'clocks disagree': (dict(tracer={'RadiopharmaceuticalStartDateTime': '20250101080000'}), ('RadiopharmaceuticalStartTime', 'injection_time=')),
    'injected after the scan': (dict(tracer={'RadiopharmaceuticalStartTime': '113000'}), ('RadiopharmaceuticalStartTime', 'reference_time=')),
    'proportional counts': (dict(Units='PROPCNTS'), ('Units (0054,1001)', 'PROPCNTS')),
    'surface': (dict(Units='CM2ML'), ('Units', 'CM2ML')),
    'no units': (dict(Units=None), ('Units', 'missing')),
    'counts without factor': (dict(Units='CNTS'), ('Units', '7053,1000', '7053,1009')),
    'lean body mass': (dict(Units='GML', SUVType='LBM'), ('SUVType', 'LBM')),
    'uncorrected': (dict(CorrectedImage=['DECY']), ('CorrectedImage', 'ATTN')),
    'no decay correction given': (dict(DecayCorrection=None), ('DecayCorrection', 'decay_correction=')),
    'decay contradiction': (dict(CorrectedImage=['ATTN']), ('DecayCorrection', 'CorrectedImage', 'decay_correction=')),
    'later reconstruction, nothing else': (dict(SeriesTime='180000'), ('SeriesTime', 'reference_time=')),
    'ge, later reconstruction, private tag gone': (dict(GE, SeriesTime='180000', FrameReferenceTime=0, ActualFrameDuration=300000), ('SeriesTime', 'reference_time=')),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused(case, tmp_path):
    how, words = REFUSED[case]
    with pytest.raises(SUVError) as e: suv(tmp_path, **how)
    for word in words: assert word in str(e.value)
    assert 'Remedy' in str(e.value) and 'SECRET' not in str(e.value)


@pytest.mark.parametrize('how, overrides, expected', [
    (dict(tracer={'RadionuclideTotalDose': 368.}), dict(dose_bq=368e6), HOUR),
    (dict(PatientWeight=None), dict(weight_kg=35), HOUR/2),
    (dict(tracer={'RadiopharmaceuticalStartTime': None}), dict(injection_time='20250101100000'), HOUR),
    (dict(SeriesTime='180000'), dict(reference_time='20250101110000'), HOUR),
    (dict(CorrectedImage=['DECY']), dict(uncorrected=True), HOUR),
    (dict(CorrectedImage=['ATTN']), dict(decay_correction='START'), HOUR),
    (dict(tracer={'RadionuclideHalfLife': 109.77}), dict(half_life_s=HALF_LIFE), HOUR),
])
def test_overrides_are_used_and_recorded(how, overrides, expected, tmp_path):
    found, record = suv(tmp_path, overrides, **how)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert record['overrides'] == list(overrides)


def test_overrides_are_checked(tmp_path):
    with pytest.raises(SUVError, match='dose_bq'): suv(tmp_path, dict(dose_bq=368))
    with pytest.raises(SUVError, match='unknown override'): read_series(tmp_path, weight=70)


def test_provenance_names_nobody(tmp_path):
    text = str(read_series(pet(tmp_path)).meta)
    assert not any(secret in text for secret in ('Nguyen', 'SECRET', '20250101', '1.2.3'))


# --- geometry -----------------------------------------------------------------------------------------------------------------
C, S = np.cos(.2), np.sin(.2)
PLANES = {'axial': [1, 0, 0, 0, 1, 0], 'turned': [-1, 0, 0, 0, -1, 0], 'feet first': [-1, 0, 0, 0, 1, 0], 'coronal': [1, 0, 0, 0, 0, -1],
          'sagittal': [0, 1, 0, 0, 0, -1], 'oblique': [C, S, 0, -S, C, 0]}


@pytest.mark.parametrize('plane', PLANES)
def test_a_voxel_keeps_its_place(plane, tmp_path):
    row, col = np.array(PLANES[plane], float).reshape(2, 3)
    normal, first = np.cross(row, col), np.array([-10., 20., 300.])
    for i in range(5):
        stored = np.zeros((6, 8))
        if i == 3: stored[4, 1] = 500
        slice_(tmp_path, f's{9-i}', stored, (first + 3*i*normal).round(6).tolist(), '1.9', 'CT', ImageOrientationPatient=np.round([*row, *col], 8).tolist())
    place = first + 3*3*normal + 1*5*row + 4*4*col         # PixelSpacing = [between rows 4, between columns 5]
    vol = read_series(tmp_path)
    assert vol.data[tuple(np.rint(vol.index(place)).astype(int))] == 500
    np.testing.assert_allclose(vol.index(place), np.rint(vol.index(place)), atol=1e-3)
    assert (np.diag(vol.affine[::-1][1:, :3]) > .9).all()     # canonical: d up, h back, w left


def test_tilted_gantry_shears_the_affine(tmp_path):
    a = np.radians(15)
    for i in range(5):
        slice_(tmp_path, f'{i}', np.full((6, 8), i), (0, 0, 3*i), '1.9', 'CT', ImageOrientationPatient=[1, 0, 0, 0, round(np.cos(a), 6), round(-np.sin(a), 6)])
    vol = read_series(tmp_path)
    np.testing.assert_allclose(vol.world([2, 0, 0]) - vol.world([0, 0, 0]), [0, 0, 6], atol=1e-6)


@pytest.mark.parametrize('heights, words', [
    ([0, 3, 6, 12, 15], ('after s2 at 6.00 mm', '1 slice(s) missing')), ([0, 3, 6, 9, 13, 16], ('after s3 at 9.00 mm', 'unequal')), ([0], ('only one slice',))])
def test_irregular_slices_are_refused(heights, words, tmp_path):
    for i, z in enumerate(heights): slice_(tmp_path, f's{i}', np.zeros((6, 8)), (0, 0, z), '1.9', 'CT')
    with pytest.raises(GeometryError) as e: read_series(tmp_path)
    for word in words: assert word in str(e.value)


@pytest.mark.parametrize('changes', [dict(ImageOrientationPatient=None), dict(ImagePositionPatient=None), dict(PixelSpacing=None), dict(NumberOfFrames=2),
                                     dict(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])])
def test_unplaceable_slices_are_refused(changes, tmp_path):
    with pytest.raises(GeometryError): read_series(pet(tmp_path, **changes))


def test_duplicates(tmp_path):
    pet(tmp_path)
    series = find_series(tmp_path)[0].uid
    slice_(tmp_path, 'x', np.full((6, 8), 1000), (0, 0, 3), series)
    vol = read_series(tmp_path)
    assert vol.shape[0] == 4 and len(vol.meta['dropped']) == 1 and '3.00 mm' in vol.meta['dropped'][0]
    slice_(tmp_path, 'y', np.full((6, 8), 7), (0, 0, 3), series)
    with pytest.raises(GeometryError, match='different images at one position'): read_series(tmp_path)


# --- values, folders, pairs ---------------------------------------------------------------------------------------------------
def test_slope_and_intercept_per_slice(tmp_path):
    for i in range(3): slice_(tmp_path, f'{i}', np.full((6, 8), 1000), (0, 0, 3*i), '1.9', 'CT', RescaleSlope=i+.5, RescaleIntercept=-100*i)
    np.testing.assert_allclose(read_series(tmp_path).data[:, 0, 0], [500, 1400, 2300])


def test_compressed_and_padding(tmp_path):
    stored = np.arange(48).reshape(6, 8) - 3000
    for i in range(3): slice_(tmp_path, f'{i}', stored + 40*i*i, (0, 0, 3*i), '1.9', 'CT', rle=True, RescaleIntercept=2000)
    np.testing.assert_array_equal(read_series(tmp_path).data[2], np.maximum(stored + 160 + 2000, -1024))


def test_one_folder_many_series(tmp_path):
    (tmp_path/'a'/'b').mkdir(parents=True)
    pet(tmp_path/'a'); pet(tmp_path/'a'/'b', n=3, SeriesDescription='second')
    (tmp_path/'notes.txt').write_text('x'); (tmp_path/'empty.dcm').write_bytes(b'')
    found = find_series(tmp_path)
    assert sorted(map(len, found)) == [3, 4] and sum(found.skipped.values()) == 2
    with pytest.raises(DicomError, match='2 PT or CT series.*second'): read_series(tmp_path)
    assert read_series(found[0]).unit == 'SUVbw'
    (tmp_path/'none').mkdir()
    with pytest.raises(DicomError, match='no DICOM'): find_series(tmp_path/'none')
    with pytest.raises(DicomError, match='not a folder'): find_series(tmp_path/'gone')


def test_overrides_and_types_of_ct(tmp_path):
    for i in range(3): slice_(tmp_path, f'{i}', np.zeros((6, 8)), (0, 0, 3*i), '1.9', 'CT')
    with pytest.raises(DicomError, match='overrides for PET'): read_series(tmp_path, weight_kg=70)
    with pytest.raises(DicomError, match='suv_type'): read_series(tmp_path, suv_type='lbm')


def test_pair(tmp_path):
    def ct(name, heights, **changes):
        uid = generate_uid()
        for i, z in enumerate(heights): slice_(tmp_path, f'{name}{i}', np.zeros((6, 8)), (0, 0, z), uid, 'CT', SeriesDescription=name, **changes)
    pet(tmp_path, n=6)
    ct('same', range(0, 16, 2)); ct('short', range(0, 6, 2)); ct('elsewhere', range(500, 520, 2), FrameOfReferenceUID='1.2.9'); ct('scout', [5], ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])
    uid = generate_uid()
    for i in range(9): slice_(tmp_path, f'nac{i}', np.zeros((6, 8)), (0, 0, 3*i), uid, CorrectedImage=['DECY'], SeriesDescription='nac')
    pair = pair_pet_ct(find_series(tmp_path))
    why = {s.description: reason for s, reason in pair.refused}
    assert pair.pet.description == 'PT' and pair.ct.description == 'same'
    assert 'attenuation' in why['nac'] and 'FrameOfReferenceUID' in why['elsewhere'] and 'single image' in why['scout'] and set(why) == {'nac', 'elsewhere', 'scout', 'short'}


def test_pair_without_a_usable_pet(tmp_path):
    pair = pair_pet_ct(find_series(pet(tmp_path, Units='PROPCNTS')))
    assert pair.pet is None and pair.ct is None and 'PROPCNTS' in pair.refused[0][1]


# --- real data ----------------------------------------------------------------------------------------------------------------
def unpack(archive, folder):
    if not archive.exists(): pytest.skip(f'{archive} is not here (../shared/data)')
    with tarfile.open(archive) as tar: tar.extractall(folder, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))     # Python 3.11.2 has no filters yet
    return folder


@pytest.fixture(scope='module')
def acrin(tmp_path_factory): return find_series(unpack(SHARED/'petct'/'acrin_nsclc_042.tar.xz', tmp_path_factory.mktemp('acrin')))


@pytest.fixture(scope='module')
def ibsi(tmp_path_factory): return unpack(SHARED/'suv'/'ibsi_dro_5.tar.xz', tmp_path_factory.mktemp('ibsi'))


def test_acrin(acrin):
    pair = pair_pet_ct(acrin)
    pet_, ct_ = read_series(pair.pet), read_series(pair.ct)
    assert pet_.data.max() == pytest.approx(51.0933, rel=1e-3)
    assert pet_.meta['suv']['factor'][0] == pytest.approx(.00042111, rel=1e-4)
    assert (pet_.shape, ct_.shape) == ((135, 128, 128), (135, 512, 512)) and ct_.data.min() == -1024
    overlap = np.array([[v.world([-.5]*3), v.world(np.array(v.shape) - .5)] for v in (pet_, ct_)])
    assert abs(overlap[0, :, 2] - overlap[1, :, 2]).max() < 1
    (nac, reason), = pair.refused
    assert nac.attenuation_corrected is False and 'PROPCNTS' in reason
    with pytest.raises(SUVError, match='Units'): read_series(nac)


@pytest.mark.parametrize('name', ['DRO_1_0', 'DRO_2_4', 'DRO_3_1', 'DRO_3_3', 'DRO_4_2'])
def test_ibsi(name, ibsi):
    root = next(ibsi.rglob(name))
    vol, mask = read_series(root), read_nifti(root/'mask'/'DRO_mask.nii.gz', 'label')
    np.testing.assert_allclose(vol.affine, mask.affine, atol=1e-4)
    inside = vol.data[mask.data > 0]
    np.testing.assert_allclose([inside.min(), np.median(inside), inside.max()], [.2, 1, 4], rtol=.02)


@pytest.fixture(scope='module')
def ibsi(tmp_path_factory): return unpack(SHARED/'suv'/'ibsi_dro_5.tar.xz', tmp_path_factory.mktemp('ibsi'))


def test_a_task_needs_less_than_three_volumes(acrin):
    "From headers to the model grid, as a worker of `prepare` does it: at most three times PET and CT as they lie in memory."
    pair = pair_pet_ct(acrin); tracemalloc.start()
    try:
        study = Study('x', {'pet': read_series(pair.pet), 'ct': read_series(pair.ct)}); to_grid(study, resolve('vipet', 'phantom').data)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert peak < 3*sum(v.data.nbytes for v in study.volumes.values())
