"""De-identified DICOM and report texts: nothing left of the patient wherever it stood, every voxel and every finding as it was."""
import io, json, re, shutil, unicodedata
from pathlib import Path
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings, strategies as st
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from petvlm.deidentify import DeidentifyError, Key, clean, deidentify, profile, refusal, shifted
from petvlm.deidproof import ProofError, prove
from petvlm.dicom import read_series
from petvlm.reports import parse, write_report
from petvlm.scrub import Known, known_from, scrub
from test_dicom import CASES, SHARED, pet, slice_, unpack

KEY = Key(b'0123456789abcdef-test')
REPORTS = SHARED/'reports_vi'/'pairs.json'
PT = '1.2.840.10008.5.1.4.1.1.128'
pytestmark = pytest.mark.filterwarnings('ignore')


def run(tmp_path, key=KEY, out='out'):
    return deidentify(tmp_path/'in', tmp_path/out, key)


def source(tmp_path, **how):
    (tmp_path/'in').mkdir(exist_ok=True)
    return pet(tmp_path/'in', **how)


# --- SUV ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('case', CASES)
def test_suv_is_the_same_in_every_case(case, tmp_path):
    how, expected = CASES[case]
    source(tmp_path, n=2, **how)
    report = run(tmp_path)
    assert report['written'] == 2 and report['left_out'] == 0
    np.testing.assert_allclose(read_series(tmp_path/'out').data, 1000*expected, rtol=2e-5)
    proof = prove(tmp_path/'in', tmp_path/'out')
    assert (proof.series, proof.refused_alike, proof.voxels) == (1, 0, 2*6*8)


def test_a_trial_number_is_no_word(tmp_path):
    "The net and the proof take 'FDG' out of no tracer because a trial put it into its numbers."
    source(tmp_path, n=2, PatientName='TRIAL-FDG-PET-042', PatientID='TRIAL-FDG-PET-042'); run(tmp_path)
    ds = pydicom.dcmread(next((tmp_path/'out').rglob('*.dcm')))
    assert ds.RadiopharmaceuticalInformationSequence[0].Radiopharmaceutical == 'FDG' and prove(tmp_path/'in', tmp_path/'out').series == 1


@pytest.mark.slow
def test_a_real_study(tmp_path):
    "GE Discovery ST, two PETs and a CT, 24 slices of each, some 130 private tags a slice."
    from collections import defaultdict
    archive = SHARED/'petct'/'acrin_nsclc_042.tar.xz'
    unpack(archive, tmp_path/'all'); (tmp_path/'in').mkdir(); series = defaultdict(list)
    for p in (tmp_path/'all').rglob('*'):
        if p.is_file() and p.suffix not in ('.gz', '.json'): ds = pydicom.dcmread(p, stop_before_pixels=True); series[ds.SeriesInstanceUID].append((float(ds.ImagePositionPatient[2]), p))
    for i, found in enumerate(series.values()):
        for z, p in sorted(found)[40:64]: shutil.copy(p, tmp_path/'in'/f'{i}_{z:.2f}')
    report, proof = run(tmp_path), prove(tmp_path/'in', tmp_path/'out')
    assert (report['written'], report['left_out'], report['series']) == (72, 0, 3) and (proof.series, proof.refused_alike, proof.files) == (2, 1, 72)


def test_what_is_refused_before_is_refused_after(tmp_path):
    source(tmp_path, n=2, Units='PROPCNTS'); run(tmp_path)
    proof = prove(tmp_path/'in', tmp_path/'out')
    assert (proof.series, proof.refused_alike) == (0, 1)


def test_ge_attenuation_flag_survives_with_its_creator(tmp_path):
    source(tmp_path, n=2, Manufacturer='GE MEDICAL SYSTEMS', private={(0x9, 0x10): ('LO', 'GEMS_PETD_01'), (0x9, 0x1005): ('DT', '20250101'), (0x9, 0x100D): ('DT', '20250101110000.00'), (0x9, 0x108C): ('SL', 0)})
    run(tmp_path)
    ds = pydicom.dcmread(next((tmp_path/'out').rglob('*.dcm')))
    assert [e.tag for e in ds if e.tag.is_private] == [0x00090010, 0x0009100D, 0x0009108C] and ds[0x0009108C].value == 0
    assert prove(tmp_path/'in', tmp_path/'out').refused_alike == 1      # uncorrected: SUVError on both sides


def test_compressed_pixels_are_not_touched(tmp_path):
    (tmp_path/'in').mkdir()
    for i in range(2): slice_(tmp_path/'in', f'{i}', np.arange(48).reshape(6, 8)*(i+1), (0, 0, 3*i), '1.9', rle=True)
    run(tmp_path)
    pixels = lambda folder: {pydicom.dcmread(p).PixelData for p in folder.rglob('*') if p.suffix != '.json' and p.is_file()}
    assert pixels(tmp_path/'in') == pixels(tmp_path/'out') and prove(tmp_path/'in', tmp_path/'out').series == 1


# --- identifiers everywhere ---------------------------------------------------------------------------------------------------
SECRETS = ['Yamada', 'Tarou', '山田', '太郎', 'やまだ', 'HN-88231', 'ACC55121', 'Kowalska', 'Mercy General', '17 Elm Lane', '0912345678', 'PACS_EAST', 'SN-777001', 'Duc Anh',
           '20240307', '19810519', '1.2.826.77.1', '1.2.826.77.2', '1.2.826.77.3', 'OLD-NAME', 'GANTRY7']


def spread(path):
    "Put every secret into one file of `path`, in all the places that were thought of."
    ds = pydicom.dcmread(path)
    ds.SpecificCharacterSet = ['', 'ISO 2022 IR 87']
    ds.update(dict(PatientName='Yamada^Tarou=山田^太郎=やまだ^たろう', PatientID='HN-88231', AccessionNumber='ACC55121', ReferringPhysicianName='Kowalska^Ewa', InstitutionName='Mercy General', InstitutionAddress='17 Elm Lane',
                   PatientBirthDate='19810519', StudyDate='20240307', SeriesDate='20240307', AcquisitionDate='20240307', ContentDate='20240307', StudyInstanceUID='1.2.826.77.1', FrameOfReferenceUID='1.2.826.77.2',
                   PatientComments='Yamada called from 0912345678', PatientTelephoneNumbers='0912345678', StationName='GANTRY7', DeviceSerialNumber='SN-777001', ConvolutionKernel='KERNEL yamada', PatientAge='043Y', PatientSize='1.61',
                   OtherPatientNames='OLD-NAME^X', StudyID='HN-88231', ProtocolName='for Tarou', OperatorsName=['Duc Anh', 'Kowalska'], RetrieveAETitle='PACS_EAST', PatientSex='F'))
    leaf, item = Dataset(), Dataset()
    leaf.update(dict(PersonName='Kowalska^Ewa', InstitutionName='Mercy General', ReferencedSOPInstanceUID='1.2.826.77.3', PatientID='HN-88231', ScheduledProcedureStepStartDate='20240307'))
    leaf.add_new(0x00290010, 'LO', 'SIEMENS CSA HEADER'); leaf.add_new(0x00291010, 'UN', b'Yamada^Tarou')
    item.update(dict(ReferencedImageSequence=[leaf], PatientName='Yamada^Tarou', RequestedProcedureDescription='Yamada', ScheduledStationAETitle='PACS_EAST'))
    ds.update(dict(RequestAttributesSequence=[item], ReferencedImageSequence=[leaf], OtherPatientIDsSequence=[leaf], OriginalAttributesSequence=[item], RadiopharmaceuticalCodeSequence=[leaf]))
    ds.RadiopharmaceuticalInformationSequence[0].update(dict(RadiopharmaceuticalStartDateTime='20240307100000.00', ContactURI='mailto:Kowalska', RadionuclideCodeSequence=[leaf]))
    for tag, vr, value in ((0x00090010, 'LO', 'ACME 1.1'), (0x00091001, 'LO', 'Yamada'), (0x00091002, 'PN', 'Yamada^Tarou'), (0x00091003, 'UN', 'HN-88231 太郎'.encode()), (0x00091004, 'DA', '20240307'),
                           (0x00091005, 'SQ', Sequence([item])), (0x70530010, 'LO', 'Philips PET Private Group'), (0x70531000, 'DS', '0.25'), (0x70531003, 'LO', 'Yamada'), (0x00089998, 'LO', 'Tarou'),
                           (0x00321032, 'UN', b'Kowalska^Ewa'), (0x60003000, 'OW', b'Yamada'), (0x60004000, 'LT', 'Yamada'), (0x50003000, 'OW', b'Yamada'), (0x00400A13, 'UN', b'GANTRY7 ')):
        ds.add_new(tag, vr, value)
    ds.file_meta.SourceApplicationEntityTitle = 'PACS_EAST'; ds.file_meta.PrivateInformationCreatorUID = '1.2.826.77.3'; ds.file_meta.PrivateInformation = b'Yamada'
    ds.preamble = b'Yamada^Tarou'.ljust(128, b'\0')
    ds.save_as(path)


def spread_study(tmp_path):
    for p in source(tmp_path, n=2).iterdir(): spread(p)


def test_nothing_is_left_wherever_it_stood(tmp_path):
    spread_study(tmp_path)
    original = b''.join(p.read_bytes() for p in (tmp_path/'in').iterdir())
    forms = lambda s: {s.encode(c) for c in ('utf-8', 'iso2022_jp', 'shift_jis')}
    assert all(any(f in original for f in forms(s)) for s in SECRETS)
    report = run(tmp_path)
    found = list((tmp_path/'out').rglob('*.dcm'))
    for text in [*(p.read_bytes() for p in found), json.dumps(report).encode(), '\n'.join(map(str, (tmp_path/'out').rglob('*'))).encode().replace(str(tmp_path).encode(), b'')]:
        assert not [s for s in SECRETS for f in forms(s) if f.lower() in text.lower()]
    proof = prove(tmp_path/'in', tmp_path/'out')
    assert proof.series == 1 and proof.private == 2*2 and proof.identifiers >= 15
    ds = pydicom.dcmread(found[0])
    assert (ds.PatientWeight, ds.PatientSize, ds.PatientSex, ds.PatientAge, ds[0x70531000].value) == (70, 1.61, 'F', '043Y', .25)
    assert ds.PatientIdentityRemoved == 'YES' and ds.LongitudinalTemporalInformationModified == 'MODIFIED' and ds.PatientBirthDate == '' and ds.PatientName == ds.PatientID
    assert {c.CodeValue for c in ds.DeidentificationMethodCodeSequence} == {'113100', '113107', '113108', '113111'}
    assert ds.RadiopharmaceuticalInformationSequence[0].RadiopharmaceuticalStartDateTime == shifted('20240307100000.00', KEY.shift('HN-88231')) and ds.SeriesTime == '110000'
    assert ds.ReferencedImageSequence[0].ReferencedSOPInstanceUID == KEY.uid('1.2.826.77.3') and ds.StudyInstanceUID == KEY.uid('1.2.826.77.1')


TEXTS = sorted((tag, vr) for tag, (vr, _, _, _, keyword) in DicomDictionary.items() if vr in ('AE', 'LO', 'SH', 'ST', 'LT', 'UT', 'UC', 'PN', 'UR')
               and tag >> 16 >= 8 and keyword not in ('Manufacturer', 'Radiopharmaceutical', 'AttenuationCorrectionMethod', 'RescaleType', 'CodingSchemeDesignator', 'CodeValue'))
PLACES = st.lists(st.tuples(st.sampled_from(TEXTS), st.integers(0, 3), st.sampled_from(['Quenby', 'QUENBY', 'seen Quenby, today', 'Zvi^Quenby'])), min_size=1, max_size=8)


def test_the_dictionary_is_large():
    assert len(TEXTS) > 700


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(PLACES, st.integers(0, 2**32 - 1))
def test_a_name_in_any_text_of_the_standard_is_gone(places, number):
    ds = Dataset(); ds.update(dict(SOPClassUID=PT, SOPInstanceUID='1.2.3.4.5', PatientID=f'ID{number:010}', PatientName='Zvi^Quenby', Modality='PT'))
    for (tag, vr), depth, text in places:
        where = ds
        for _ in range(depth):
            if 'RequestAttributesSequence' not in where: where.RequestAttributesSequence = [Dataset()]
            where = where.RequestAttributesSequence[0]
        if tag not in (0x00100020,): where.add_new(tag, vr, text)
    ds.file_meta = pydicom.dataset.FileMetaDataset(); ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    clean(ds, KEY)
    out = io.BytesIO(); ds.save_as(out, enforce_file_format=True)
    assert b'quenby' not in out.getvalue().lower() and f'{number:010}'.encode() not in out.getvalue() and b'1.2.3.4.5' not in out.getvalue()


# --- the table ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('tag, action', [
    ('00100010', 'Z'), ('00100020', 'Z/D'), ('00080050', 'Z'), ('0020000D', 'U'), ('00080018', 'U'), ('00100030', 'Z'), ('00080090', 'Z'), ('00080080', 'X/Z/D'), ('00081010', 'X/Z/D'), ('0008103E', 'X'), ('00181030', 'X/D'),
    ('00104000', 'X'), ('00101040', 'X'), ('00081140', 'X/Z/U*'), ('00080020', 'C'), ('00080031', 'C'), ('00181078', 'C'), ('00080201', 'C'), ('00101030', 'K'), ('00100040', 'K'), ('00101010', 'K'), ('00101020', 'K'), ('00102110', 'X'), ('0040A730', 'D')])
def test_actions_of_the_standard(tag, action):
    assert profile()[tag] == action


@pytest.mark.parametrize('value, expected', [
    ('20240301', '20240229'), ('20240101', '20231231'), ('2024.03.01', '20240229'), ('20240301120000.5+0700', '20240229120000.5+0700'), ('20240301 ', '20240229'), ('', ''), ('2024', ''), ('202403', ''), ('20241301', ''),
    ('20240101-20240201', ''), ('Yamada', ''), ('00010101', ''), ('20240301Yamada', '')])
def test_dates_move_by_whole_days(value, expected):
    assert shifted(value, -1) == expected


# --- keys ---------------------------------------------------------------------------------------------------------------------
def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_the_key_decides_everything(tmp_path):
    source(tmp_path, n=2)
    for out, key in (('a', KEY), ('b', Key(KEY.secret)), ('c', Key(b'another-key-of-16+bytes'))): run(tmp_path, key, out)
    a, b, c = (content(tmp_path/x) for x in 'abc')
    assert a == b and len(a) == 3 and not set(a) & set(c) - {'report.json'} and a['report.json'] != c['report.json']


def test_a_patient_keeps_one_pseudonym_and_one_shift(tmp_path):
    for day, patient in (('20250101', 'P1'), ('20250131', 'P1'), ('20250101', 'P2')):
        (tmp_path/'in'/f'{day}{patient}').mkdir(parents=True)
        pet(tmp_path/'in'/f'{day}{patient}', n=2, PatientID=patient, SeriesDate=day, AcquisitionDate=day)
    assert run(tmp_path)['patients'] == 2
    dates = {}
    for p in (tmp_path/'out').rglob('*.dcm'): ds = pydicom.dcmread(p); dates.setdefault(ds.PatientID, set()).add(ds.SeriesDate)
    assert dates == {KEY.pseudonym('P1'): {shifted(d, KEY.shift('P1')) for d in ('20250101', '20250131')}, KEY.pseudonym('P2'): {shifted('20250101', KEY.shift('P2'))}} and KEY.shift('P1') != KEY.shift('P2')
    with pytest.raises(ProofError, match='one patient at a time'): prove(tmp_path/'in', tmp_path/'out')      # the two have the same pixels


def test_shifts_stay_within_bounds_and_keys_are_checked(tmp_path):
    key = Key(b'x'*16, days=(-40, -31))
    assert {key.shift(str(i)) for i in range(300)} == set(range(-40, -30))
    for bad in (dict(secret=b'short'), dict(secret=b'x'*16, days=(-5, 5)), dict(secret=b'x'*16, days=(5, 1))):
        with pytest.raises(DeidentifyError): Key(**bad)
    (tmp_path/'key').write_bytes(b'0123456789abcdef-test\n')
    assert Key.read(tmp_path/'key') == KEY
    with pytest.raises(DeidentifyError, match='no key file'): Key.read(tmp_path/'gone')


# --- refusals -----------------------------------------------------------------------------------------------------------------
IMAGE = '1.2.840.10008.5.1.4.1.1.'
REFUSED = {
    'burned in': (dict(BurnedInAnnotation='YES'), 'is YES'), 'secondary capture': (dict(SOPClassUID=IMAGE+'7'), 'secondary capture'), 'ultrasound': (dict(SOPClassUID=IMAGE+'6.1'), 'ultrasound'),
    'ultrasound by modality': (dict(Modality='US'), 'modality US'), 'screen': (dict(ImageType=['DERIVED', 'SECONDARY', 'SCREEN SAVE']), 'ImageType'), 'dose': (dict(SeriesDescription='Dose Report'), 'SeriesDescription'),
    'colour': (dict(SamplesPerPixel=3), 'colour'), 'converted': (dict(ConversionType='WSD'), 'converted'), 'report': (dict(SOPClassUID=IMAGE+'88.11'), 'structured report'), 'pdf': (dict(SOPClassUID=IMAGE+'104.1'), 'encapsulated'),
    'presentation': (dict(SOPClassUID=IMAGE+'11.1'), 'presentation state'), 'private class': (dict(SOPClassUID='1.3.12.2.1107.5.9.1'), 'not handled'), 'nobody': (dict(PatientID=''), 'no PatientID'), 'radiograph': (dict(SOPClassUID=IMAGE+'1.1'), 'projection')}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_by_name(case):
    changes, words = REFUSED[case]
    ds = Dataset(); ds.update(dict(SOPClassUID=PT, Modality='PT', PatientID='SECRET', PatientName='Nguyen^Van^A') | changes)
    assert words in refusal(ds) and 'SECRET' not in refusal(ds)
    with pytest.raises(DeidentifyError): clean(ds, KEY)


@pytest.mark.parametrize('changes', [{}, dict(SOPClassUID=IMAGE+'7', BurnedInAnnotation='NO'), dict(SOPClassUID=IMAGE+'2', ImageType=['DERIVED', 'SECONDARY', 'REFORMATTED']), dict(BurnedInAnnotation='NO', Modality='US')])
def test_accepted(changes):
    ds = Dataset(); ds.update(dict(SOPClassUID=PT, Modality='PT', PatientID='SECRET') | changes)
    assert refusal(ds) is None


def test_what_cannot_be_handled_is_left_out_and_counted(tmp_path):
    folder = source(tmp_path, n=3)
    (folder/'Nguyen notes.txt').write_text('hello'); (folder/'empty').write_bytes(b'')
    whole = (folder/'1').read_bytes(); (folder/'2').write_bytes(whole); (folder/'broken').write_bytes(whole[:300])
    ds = pydicom.dcmread(folder/'3'); ds.BurnedInAnnotation = 'YES'; ds.save_as(folder/'3')
    report = run(tmp_path)
    assert report['written'] == 1 and report['left_out'] == 5 and sum(report['reasons'].values()) == 5 and 'Nguyen' not in json.dumps(report)
    assert report['reasons']['not DICOM'] == 2 and report['reasons']['this SOPInstanceUID was written already'] == 1 and report == json.loads((tmp_path/'out'/'report.json').read_text())
    assert len({e['file'] for e in report['files_left_out']}) == 5


def test_folders_are_checked(tmp_path):
    source(tmp_path, n=2)
    (tmp_path/'full').mkdir(); (tmp_path/'full'/'x').write_text('')
    for a, b, words in (('in', 'in/out', 'in one another'), ('in', 'in', 'in one another'), ('in', '.', 'in one another'), ('in', 'full', 'not empty'), ('gone', 'out', 'not a folder')):
        with pytest.raises(DeidentifyError, match=words): deidentify(tmp_path/a, tmp_path/b, KEY)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['full', 'in'] and len(list((tmp_path/'in').iterdir())) == 2


def test_nothing_is_half_written(tmp_path, monkeypatch):
    source(tmp_path, n=3)
    done, save = [], Dataset.save_as
    def failing(self, path, **how):
        if len(done) == 1: Path(path).write_bytes(b'half'); raise OSError(28, 'No space left on device')
        done.append(path); save(self, path, **how)
    monkeypatch.setattr(pydicom.dataset.FileDataset, 'save_as', failing)
    with pytest.raises(OSError): run(tmp_path)
    left = [p for p in (tmp_path/'out').rglob('*') if p.is_file()]
    assert len(left) == 1 and left[0].suffix == '.dcm' and pydicom.dcmread(left[0]).PatientIdentityRemoved == 'YES'


# --- the proof can fail -------------------------------------------------------------------------------------------------------
def private(ds): ds.add_new(0x00090010, 'LO', 'ACME'); ds.add_new(0x00091001, 'LO', 'fine')
def hidden(ds): ds.add_new(0x00209222, 'SQ', [Dataset()]); ds[0x00209222].value[0].add_new(0x00080100, 'SH', '1.2.826.77.1')
def preamble(ds): ds.preamble = b'Yamada'.ljust(128, b'\0')
def overlay(ds): ds.add_new(0x60003000, 'OW', b'\0\0')
def dated(ds): ds.SeriesDate = '20240307'
def strange(ds): ds.add_new(0x00080012, 'DA', '20240308')
def kanji(ds): ds.SpecificCharacterSet = 'ISO_IR 192'; ds.ConvolutionKernel = '太郎'
def bright(ds): ds.RescaleSlope = '1.001'
def moved(ds): ds.PixelSpacing = [4, 5.01]
def pixels(ds): ds.PixelData = bytes(len(ds.PixelData))
def renamed(ds): ds.PatientID = 'another'
def undeclared(ds): del ds.PatientIdentityRemoved
SPOILS = [private, hidden, preamble, overlay, dated, strange, kanji, bright, moved, pixels, renamed, undeclared]


@pytest.fixture(scope='module')
def proven(tmp_path_factory):
    room = tmp_path_factory.mktemp('proven'); spread_study(room); run(room); prove(room/'in', room/'out')
    return room


@pytest.mark.parametrize('spoil', SPOILS, ids=lambda s: s.__name__)
def test_the_proof_finds(spoil, proven, tmp_path):
    shutil.copytree(proven/'out', tmp_path/'out')
    path = sorted((tmp_path/'out').rglob('*.dcm'))[0]
    ds = pydicom.dcmread(path); spoil(ds); ds.save_as(path)
    with pytest.raises(ProofError) as e: prove(proven/'in', tmp_path/'out')
    assert not [s for s in SECRETS if s in str(e.value)]


# --- report texts -------------------------------------------------------------------------------------------------------------
SCRUBBED = [
    ('Bệnh nhân: Nguyễn Văn A, nam', 'Bệnh nhân: [NAME], nam'), ('BN: TRẦN THỊ HẠNH 65 tuổi', 'BN: [NAME] 65 tuổi'), ('Họ và tên: LÊ VĂN BÌNH Tuổi: 61 Giới: Nam', 'Họ và tên: [NAME] Tuổi: 61 Giới: Nam'),
    ('BN Đặng Thị Tâm vào viện', 'BN [NAME] vào viện'), ('ông Tâm đau ngực', 'ông [NAME] đau ngực'), ('Bà Trần Lan có hạch', 'Bà [NAME] có hạch'), ('Người bệnh: Hoàng Anh.', 'Người bệnh: [NAME].'), ('BN: Lý Văn Nam', 'BN: [NAME]'),
    ('BS. Nguyễn Minh Đức', 'BS. [NAME]'), ('ThS.BS. Trần Hùng ký', 'ThS.BS. [NAME] ký'), ('PGS.TS Lê Ngọc Hà', 'PGS.TS [NAME]'), ('BSCKII. Vũ Thu', 'BSCKII. [NAME]'), ('Bác sĩ đọc kết quả: Phạm Quang', 'Bác sĩ đọc kết quả: [NAME]'),
    ('bác sĩ Tuấn đọc', 'bác sĩ [NAME] đọc'), ('Hạch cổ.\nNguyễn Thị Mai\n', 'Hạch cổ.\n[NAME]\n'), ('có Phạm Thị Hoa đi cùng', 'có [NAME] đi cùng'), ('benh nhan: Nguyen Van An', 'benh nhan: [NAME]'),
    ('Mr. Smith and Mrs Jane Doe', 'Mr. [NAME] and Mrs [NAME]'), ('Referring physician: John Carter', 'Referring physician: [NAME]'), ('Reported by Anna Kowalska', 'Reported by [NAME]'), ('Patient name: DOE, JOHN', 'Patient name: [NAME]'),
    ('Name: Smith, Age: 60', 'Name: [NAME], Age: 60'), ('Dr. House', 'Dr. [NAME]'),
    ('ngày 12 tháng 3 năm 2024', 'ngày [DATE]'), ('Chụp ngày 12/03/2024, so với 2023-11-05', 'Chụp ngày [DATE], so với [DATE]'), ('PET/CT tháng 6/2023)', 'PET/CT tháng [DATE])'), ('tháng 6 năm 2023', 'tháng [DATE]'), ('ngày 5/11', 'ngày [DATE]'),
    ('March 12, 2024; 5 Nov 2023; June 2022.', '[DATE]; [DATE]; [DATE].'), ('12.03.2024', '[DATE]'), ('20240312', '[DATE]'), ('12/03/24', '[DATE]'), ('năm sinh: 1934', 'năm sinh: [DATE]'), ('PET/CT 01/2018).', 'PET/CT [DATE]).'),
    ('Mã BN: 24-00123.', 'Mã BN: [ID].'), ('số hồ sơ 556677', 'số hồ sơ [ID]'), ('MRN 0012345; Accession No: A-991', 'MRN [ID]; Accession No: [ID]'), ('CCCD 001099012345', 'CCCD [ID]'), ('thẻ DN4010112345678', 'thẻ [ID]'),
    ('UID 1.2.840.113619.2.55.3', 'UID [ID]'), ('ID: HN-88231', 'ID: [ID]'),
    ('SĐT: 0912 345 678', 'SĐT: [PHONE]'), ('gọi 0987654321', 'gọi [PHONE]'), ('Tel +84 24 3869 3731', 'Tel [PHONE]'), ('Điện thoại: (024) 38.693.731', 'Điện thoại: [PHONE]'), ('a.b@hospital.vn', '[EMAIL]'),
    ('Địa chỉ: số 5 ngõ 10 phố Huế, Hà Nội\nChẩn đoán', 'Địa chỉ: [ADDRESS]\nChẩn đoán'), ('xã Hòa Bình, huyện Kim Bảng, tỉnh Hà Nam', 'xã [ADDRESS], huyện [ADDRESS], tỉnh [ADDRESS]'), ('lives at 221 Baker Street', 'lives at [ADDRESS]'),
    ('93 tuổi', '[AGE] tuổi'), ('aged 91', 'aged [AGE]'), ('a 92-year-old man', 'a [AGE]-year-old man')]
KEPT = ['SUVmax: 5,3', 'SUVmax 12.4', 'kích thước 12 x 8 mm', '12x8x7 mm', '12/8/10 mm', 'Số: 12 mm', 'L4/5', 'C7', 'T1-T12', 'D4 D6', 'nhóm IIB, III', 'G 68 Ga', '68Ga-PSMA-11', 'F-18 FDG 370 MBq', 'Y90', 'ảnh 112/350', 'series 3, image 45', 'Deauville 4/5',
        'năm 2019', '65 tuổi', '89 tuổi', 'Bệnh nhân nam 65 tuổi', 'BN nữ', 'BN K phổi trái', 'BN HCC đã TACE', 'Bệnh nhân: Nam', 'Bệnh nhân Nam', 'TS: viêm gan B', 'TS Viêm gan', 'hình ảnh Hạch cổ', 'Hinh anh Hach co trai', 'ống mật chủ', 'chú ý', 'bà mẹ',
        '1/3 trên thực quản', 'tỉ lệ 3/10', '10-12 mm', 'Patient History: none', 'patient no acute disease', 'Bệnh nhân: Hạch cổ trái 10 mm', 'ĐỈNH PHỔI\nĐỘNG MẠCH CHỦ\nTHẬN TRÁI\nTÁ TRÀNG', 'HU: -120 đến 45', '3.5-4.2', '120 kV, 45 mAs', 'T2N1M0',
        'hạch 10R, 4L', 'Gleason 4+3', 'PSA 12,45 ng/ml', '0,35 g', 'C34.1', 'vị trí 12 giờ', 'sau 12 tháng', '3 tháng trước', '6 đợt hóa trị', 'nốt số ba 10 mm', 'Số lượng 3', 'liều 0.0912 mSv', 'SUVmax: 3,1) ở hố nách', 'BS: bổ sung']


@pytest.mark.parametrize('text, expected', SCRUBBED)
def test_scrubbed(text, expected):
    assert scrub(text).text == expected


def test_measurements_survive():
    assert {t: scrub(t).text for t in KEPT} == {t: t for t in KEPT}


def test_names_known_from_headers():
    ds, item = Dataset(), Dataset()
    ds.SpecificCharacterSet = 'ISO_IR 192'
    item.PersonName = 'Kowalska^Ewa'
    ds.update(dict(PatientName='Đặng^Tâm^Thị', PatientID='HN-88231', InstitutionName='Mercy General', PersonIdentificationCodeSequence=[item]))
    known = known_from([ds])
    text = 'DANG THI TAM (HN-88231), Thị Tâm Đặng, tâm thất và trung tâm. Hôm nay Tâm mổ. Ewa Kowalska, Mercy General. Hạch đang to, thị lực tốt.'
    assert scrub(text, known).text == '[NAME] ([ID]), [NAME], tâm thất và trung tâm. Hôm nay [NAME] mổ. [NAME], [ADDRESS]. Hạch đang to, thị lực tốt.'


@pytest.mark.parametrize('text, expected', [
    ('ngày 01 tháng 03 năm 2024', 'ngày 29 tháng 02 năm 2024'), ('1/3/2024', '29/2/2024'), ('2024-03-01', '2024-02-29'), ('tháng 3/2024', 'tháng 3/2024'), ('March 1, 2024', '29 February 2024'), ('31/02/2024', '[DATE]'), ('ngày 5/11', 'ngày [DATE]'),
    ('sinh năm 1934', 'sinh năm [DATE]'), ('01/01/24', '31/12/23')])
def test_dates_of_a_report_move_with_the_images(text, expected):
    assert scrub(text, days=-1).text == expected


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(st.integers(0, 10**6), st.sampled_from(['vi', 'en']), st.booleans())
def test_findings_are_read_as_before(seed, language, loose):
    from petvlm.findings import Finding
    rng = np.random.default_rng(seed)
    findings = [Finding('lung', 'left', 'nodule', float(rng.uniform(8, 40)), float(rng.uniform(2.5, 20)), 'increased'), Finding('pleura', 'right', 'effusion', float(rng.uniform(8, 40)), None, 'none')]
    body = write_report(findings, 'chest', language, seed).text
    text = f'Bệnh nhân: Trần Thị Hạnh\nMã BN: 24-00123, ngày 12/03/2024\n{body}\nBS. Lê Văn Bình'
    if loose: text = unicodedata.normalize('NFD', text)
    done = scrub(text)
    facts = lambda t: sorted((f.organ, f.side, f.kind, f.size_mm or -1, f.suvmax or -1, f.uptake) for f in parse(unicodedata.normalize('NFC', t), language))
    assert done.counts == {'DATE': 1, 'ID': 1, 'NAME': 2} and len(facts(done.text)) == 2 and facts(done.text) == facts(text)
    for s in done.spans: assert text[s.start:s.end] and s.text == f'[{s.label}]'
    where = done.text.index(unicodedata.normalize('NFD', body) if loose else body)
    assert text[done.original(where):].startswith(unicodedata.normalize('NFD', body) if loose else body)


def test_real_reports_keep_every_finding():
    if not REPORTS.exists(): pytest.skip('../shared/data/reports_vi is not here')
    texts = [x['ground_truth'] for x in json.loads(REPORTS.read_text(encoding='utf-8'))]
    # parts of these names are everyday words of anatomy
    known = Known(names=(('Trung', 'Hạnh', 'Tâm'), ('Nguyễn', 'Thị', 'Phổi'), ('Đỗ', 'Nam'), ('Hà', 'Bình')))
    facts = lambda t: [(f.organ, f.side, f.kind, f.size_mm, f.suvmax, f.uptake) for f in parse(t, 'vi')]
    done = [scrub(t, known) for t in texts]
    assert len(texts) == 46 and sum((d.counts.get('DATE', 0) for d in done)) == 8 and all(set(d.counts) <= {'DATE'} for d in done)
    assert all(re.fullmatch(r'\d{1,2}/20\d\d', t[s.start:s.end]) for t, d in zip(texts, done) for s in d.spans)
    assert [facts(d.text) for d in done] == [facts(t) for t in texts]


def test_the_command_proves_what_it_writes(tmp_path, capsys):
    from petvlm.cli import main
    pet(folder := tmp_path/'in' if (tmp_path/'in').mkdir() is None else None)
    (tmp_path/'key').write_bytes(b'k'*32)
    assert main(['deidentify', str(folder), '--out', str(tmp_path/'out'), '--key', str(tmp_path/'key')]) == 0
    said = capsys.readouterr().out
    assert '4 files written, 0 left out' in said and 'proven: 1 series equal' in said
    assert main(['deidentify', str(folder)]) == 1 and '--key' in capsys.readouterr().err
    assert main(['deidentify', str(folder), '--out', str(tmp_path/'out2'), '--key', str(tmp_path/'none')]) == 1 and 'no key file' in capsys.readouterr().err

@pytest.mark.parametrize('text, moved', [('Comparison: 05/28/2024.', 'Comparison: 05/27/2024.'), ('12/31/2024', '12/30/2024'), ('05-28-2024', '05-27-2024'), ('seen 2024-05-28T10:30:00+07:00', 'seen 2024-05-27T10:30:00+07:00'), ('2024-05-28T10:30', '2024-05-27T10:30')])
def test_months_that_stand_first_and_iso_times_are_dates(text, moved):
    assert scrub(text, days=-1).text == moved and scrub(text).text == text.replace(next(w for w in text.split() if w[0].isdigit()).rstrip('.'), '[DATE]')
