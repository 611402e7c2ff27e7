"One's own studies, from a folder to rows: what is skipped and counted, who is held out, what is refused, and what reports cannot teach."
import csv, dataclasses, functools, json, re, shutil
from pathlib import Path
import numpy as np, pydicom, pytest
from kernels import run
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from petvlm.cli import main
from petvlm.config import ConfigError, Part, Paths, Stage, load_params, merge, resolve
from petvlm.datasets import DatasetError, Items, Rows, truths
from petvlm.dicom import find_series, read_series
from petvlm.items import SOURCES, fits, items_of, needs_truth
from petvlm.own import SPLITS, Load, Row, own_items, own_study, patient_of, pseudonym, read_listing, read_reports, split_of, survey
from petvlm.phantom import write_patient
from petvlm.prepare import PrepareError, prepare, relative, stated, to_grid
from petvlm.rows import prepare_rows
from petvlm.sources import SourceError, drawn_study
from petvlm.volume import region_bounds, write_nifti

ROOT = Path(__file__).parents[1]
VI = 'Nốt phổi trái kích thước 12 mm, tăng chuyển hóa FDG, SUVmax: 5,2.'
HEAD = 'study,region,language,text,patient,split'
KEPT = {k: None for k in ('lm_list', 'lm_report', 'lm', 'pretrain_pet', 'pretrain_ct', 'clip_pet', 'clip_ct', 'fusion', 'instruct')} | {'projection': {'objective': {'match': 0}}}

def point(system='vipet', scale='smoke', stages=KEPT, judged=('report',), **data):
    "A point of `system` on data from outside, as an ablation would make it."
    params = merge(load_params(), {'ablations': {'mine': {'data': data, 'stages': stages, 'evaluation': {'tasks': list(judged)}}}, 'points': {'mine': {'system': system, 'ablation': 'mine'}}})
    return resolve('mine', scale, params)

def own(path, **args): return point(source={'kind': 'own', 'args': {'path': str(path)} | args})

def table(folder: Path, *rows: str, head=HEAD, name='reports.csv', encoding='utf-8') -> Path:
    (folder/name).write_bytes(('\n'.join((head, *rows)) + '\n').encode(encoding))
    return folder/name

def bare_study(folder: Path, patient: str = '') -> None:
    "A folder with one DICOM header, enough to tell who it is."
    folder.mkdir(parents=True)
    meta = FileMetaDataset(); meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = '1.2.840.10008.5.1.4.1.1.128', '1.2.3', '1.2.840.10008.1.2.1'
    ds = FileDataset('x', {}, file_meta=meta, preamble=b'\0'*128)
    ds.PatientID, ds.SeriesInstanceUID, ds.Modality = patient, '1.2.4', 'PT'
    ds.save_as(folder/'a.dcm', enforce_file_format=True)

def without_weight(folder: Path) -> None:
    for file in (folder/'PT').iterdir(): ds = pydicom.dcmread(file); del ds.PatientWeight; ds.save_as(file)

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "Three digital patients as a hospital would hold them."
    root = tmp_path_factory.mktemp('petct')
    for seed, name in ((11, 'study-1'), (12, 'study-2'), (13, 'study-3')): (root/write_patient(seed, root)).rename(root/name)
    return root

@pytest.fixture
def hospital(written, tmp_path):
    "A copy that may be broken."
    return Path(shutil.copytree(written, tmp_path/'petct'))

def skipped(folder: Path) -> dict[str, str]: return {r['study']: r['reason'] for r in csv.DictReader(open(folder/'skipped.csv', encoding='utf-8'))}
def records(folder: Path) -> list[dict]: return [json.loads(line) for line in open(folder/'rows.jsonl', encoding='utf-8')]

# ---- skipped and counted ----

def test_bad_studies_cost_themselves_only_and_are_counted(hospital, tmp_path, caplog):
    shutil.copytree(hospital/'study-1', hospital/'no-weight'); without_weight(hospital/'no-weight')
    shutil.copytree(hospital/'study-2', hospital/'cut-off')
    file = sorted((hospital/'cut-off/CT').iterdir())[3]; file.write_bytes(file.read_bytes()[:-5000])
    shutil.copytree(hospital/'study-3', hospital/'copy')
    (hospital/'unreported').mkdir()
    names = {'study-1': 'train', 'study-2': 'validation', 'study-3': 'test', 'no-weight': 'train', 'cut-off': 'train', 'copy': 'train', 'nobody': 'train'}
    table(hospital, *(f'{n},chest,vi,"{VI}",{n},{s}' for n, s in names.items()))
    cfg = own(hospital)
    folder = prepare_rows(items_of(cfg, Paths(tmp_path, 'smoke')), tmp_path/'p', cfg.data, workers=1)
    why = skipped(folder)
    assert set(why) == set(names) - {'study-1', 'study-2', 'study-3'} | {'unreported'}
    assert 'PatientWeight (0010,1030)' in why['no-weight'] and re.search(r'truncated: [\d,]+ bytes of pixels, expected', why['cut-off']) and why['copy'] == 'the same images as study-3' and 'no such folder' in why['nobody'] and 'no report' in why['unreported']
    assert '5 of 8 studies skipped' in caplog.text and {r['study'] for r in records(folder)} == {'study-1', 'study-2', 'study-3'}
    assert all(r['findings_from'] == 'report' and r['findings'][0]['voxel'] is None and r['patient'] == pseudonym(r['study']) for r in records(folder))
    assert len(np.load(folder/'pet.npy')) == len(records(folder)) == 3

def test_all_bad_is_an_error_and_leaves_no_folder(tmp_path):
    for n in 'abc': bare_study(tmp_path/f'petct/{n}', n)
    table(tmp_path/'petct', *(f'{n},chest,vi,Text.,,{s}' for n, s in zip('abc', SPLITS)))
    cfg = own('petct')
    with pytest.raises(PrepareError, match=r"3 of 3 studies cannot be used, nothing is left for \['test', 'train', 'validation'\]"):
        prepare_rows(items_of(cfg, Paths(tmp_path, 'smoke')), tmp_path/'p', cfg.data, workers=1)
    assert not (tmp_path/'p').exists() and len(skipped(tmp_path/'p.partial')) == 3

def good(i): return [({'pet': np.full((2, 2, 2), i, np.float16), 'ct': np.zeros((2, 2, 2), np.float16)}, {'region': 'chest', 'text': 't'})]
def bug(): raise TypeError('a mistake in the code')
def unreadable(): raise EOFError('compressed file ended')

def test_a_split_that_loses_everything_is_an_error(tmp_path):
    items = [('train', Load('a', 'a', functools.partial(good, 1))), ('validation', Load('b', 'b', unreadable))]
    with pytest.raises(PrepareError, match=r"nothing is left for \['validation'\]: b: SourceError: b: a file cannot be read \(EOFError"): prepare(items, tmp_path/'p', own('x').data, workers=1)

def test_a_mistake_in_the_code_is_not_skipped(tmp_path):
    with pytest.raises(TypeError, match='mistake'): prepare([('train', Load('a', 'a', functools.partial(good, 1))), ('train', Load('b', 'b', bug))], tmp_path/'p', own('x').data, workers=1)

def test_the_phantom_may_have_no_bad_study(tmp_path):
    items = [('train', Load('a', 'a', functools.partial(good, 1))), ('train', Load('b', 'b', unreadable))]
    with pytest.raises(SourceError, match='cannot be read'): prepare(items, tmp_path/'p', resolve('vipet', 'smoke').data, workers=1)
    assert not skipped(prepare(items[:1], tmp_path/'p', resolve('vipet', 'smoke').data, workers=1))

def test_a_report_in_another_language_only_is_a_reason(tmp_path):
    study = dataclasses.replace(drawn_study(3), reports={'chest': {'en': 'No lesion.'}})
    folder = prepare([('train', Load('a', 'a', functools.partial(drawn_study, 2))), ('train', Load('b', 'b', functools.partial(dataclasses.replace, study)))], tmp_path/'p', own('x').data, workers=1)
    assert "reports in 'vi' of []" in skipped(folder)['b']

# ---- who is held out ----

@pytest.mark.parametrize('by', ['header', 'column'])
def test_studies_of_a_patient_stay_together(tmp_path, by):
    rows = []
    for n in range(60):
        who = f'MRN{n//3}'
        bare_study(tmp_path/f's{n}', who if by == 'header' else 'ANONYMOUS')
        rows.append(f's{n},chest,vi,Text.,{who if by == "column" else ""},')
    table(tmp_path, *rows)
    items, sides = own_items(tmp_path, test=.3, validation=.3), {}
    for split, load in items: sides.setdefault(load.patient, set()).add(split)
    assert len(sides) == 20 and all(len(s) == 1 for s in sides.values()) and set.union(*sides.values()) == set(SPLITS)
    assert not any('MRN' in load.patient for _, load in items)
    again = [split for split, _ in own_items(tmp_path, test=.3, validation=.3, seed=1)]
    assert again != [split for split, _ in items] == [split for split, _ in own_items(tmp_path, test=.3, validation=.3)]

def test_a_patient_never_stands_on_two_sides(tmp_path):
    for n in 'ab': bare_study(tmp_path/n, 'MRN-4711')
    path = table(tmp_path, 'a,chest,vi,Text.,,train', 'b,chest,vi,Text.,,test')
    with pytest.raises(SourceError, match=r'1 patients would be in two splits: a \(train\), b \(test\)') as e: own_items(path)
    assert 'MRN-4711' not in str(e.value) and 'column `patient`' in str(e.value)
    table(tmp_path, 'a,chest,vi,Text.,p1,train', 'b,chest,vi,Text.,p2,test')                    # different people under one de-identified PatientID
    assert [s for s, _ in own_items(path)] == ['train', 'test']
    table(tmp_path, 'a,chest,vi,Text.,p1,train', 'b,chest,vi,Text.,p1,test')
    with pytest.raises(SourceError, match='two splits'): own_items(path)

def test_no_split_may_be_empty(tmp_path, caplog):
    for n in 'abcd': bare_study(tmp_path/n, n)
    table(tmp_path, *(f'{n},chest,vi,Text.,,{s}' for n, s in zip('abc', ('train', 'train', 'test'))))
    with pytest.raises(SourceError, match=r"\['validation'\] need one"): items_of(own(tmp_path), Paths(tmp_path, 'smoke'))
    table(tmp_path, *(f'{n},chest,vi,Text.,,{s}' for n, s in zip('abcd', ('train', 'validation', 'test', 'test'))))
    assert len(items_of(own(tmp_path), Paths(tmp_path, 'smoke'))) == 4 and 'one patient is held out' not in caplog.text

def test_shares_leave_something_to_train_on():
    assert {split_of(f'{n}', 0, 0) for n in range(50)} == {'train'}
    with pytest.raises(SourceError, match='leave something'): split_of('a', .5, .5)

def test_patient_of_reads_the_header(tmp_path):
    bare_study(tmp_path/'a', ''); bare_study(tmp_path/'a/deep', 'MRN1'); (tmp_path/'a/0.txt').write_text('no DICOM'); (tmp_path/'b').mkdir()           # a DICOMDIR at the root names no patient
    assert patient_of(tmp_path/'a') == 'MRN1' and patient_of(tmp_path/'b') == ''

# ---- the table ----

@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_tables_in_unicode_are_read(tmp_path, encoding):
    (tmp_path/'a').mkdir()
    assert read_reports(table(tmp_path, f'a,chest,vi,"{VI}",,', encoding=encoding))[0].text == VI

@pytest.mark.parametrize('encoding,text', [('cp1252', 'Nodule à gauche, léger.'), ('cp1258', 'không tăng')])
def test_other_encodings_must_be_named(tmp_path, encoding, text):
    import unicodedata
    (tmp_path/'a').mkdir(); text = unicodedata.normalize('NFD', text).replace('o\u0302', 'ô').replace('a\u0306', 'ă').replace('a\u0300', 'à').replace('e\u0301', 'é')
    path = table(tmp_path, f'a,chest,vi,"{text}",,', encoding=encoding)
    with pytest.raises(SourceError, match="line 2 is not utf-8.*save it as 'CSV UTF-8', or name its encoding"): read_listing(path)
    assert read_reports(path, encoding)[0].text == text
    with pytest.raises(SourceError, match='is unknown'): read_listing(path, encoding='cp99')

def test_letters_lost_on_the_way_are_seen(tmp_path):
    (tmp_path/'a').mkdir()
    path = table(tmp_path, 'a,chest,vi,"Kh?ng th?y t?n thuong.",,')
    assert "'Kh?ng'" in read_listing(path).faults['a'][0]
    assert not read_listing(table(tmp_path, 'a,chest,en,"Metastasis? Follow-up.",,')).faults

def test_faults_belong_to_their_study(tmp_path):
    for n in 'abcdefg': (tmp_path/n).mkdir()
    path = table(tmp_path, 'a,chest,vi,"Text, with a comma.",,', 'b,chest,vi,Twice.,,', 'b,chest,vi,Twice.,,', 'c,thorax,vi,Text.,,', 'd,chest,vi,,,', 'e,chest,vi,Text, not quoted,p,train', '../a,chest,vi,Text.,,', 'f,chest,vi,A.,p,', 'f,head_neck,vi,B.,q,')
    listing = read_listing(path)
    assert list(listing.rows) == ['a'] and set(listing.faults) == {'b', 'c', 'd', 'e', '../a', 'f', 'g'}
    for study, words in {'b': 'reported more than once', 'c': "line 5: region is 'thorax'", 'd': 'line 6: text is empty', 'e': 'not quoted', '../a': 'no such folder', 'f': 'differ in patient', 'g': 'no report in reports.csv'}.items():
        assert words in ' '.join(listing.faults[study]), study
    with pytest.raises(SourceError, match='7 faults'): read_reports(path)

@pytest.mark.parametrize('text,words', [('study,region,text\na,chest,Text.\n', r"lacks \['language'\]"), (HEAD + ',age\na,chest,vi,Text.,,,70\n', r"unknown columns \['age'\]"), (HEAD + '\n', 'holds no rows')])
def test_a_table_that_is_another_is_refused_whole(tmp_path, text, words):
    (tmp_path/'reports.csv').write_text(text, encoding='utf-8')
    with pytest.raises(SourceError, match=words): read_listing(tmp_path/'reports.csv')

def test_json_does_as_well_and_one_table_is_enough(tmp_path):
    bare_study(tmp_path/'a', 'x')
    (tmp_path/'reports.json').write_text(json.dumps([{'study': 'a', 'region': 'chest', 'language': 'vi', 'text': VI, 'split': 'test'}]), encoding='utf-8')
    assert [s for s, _ in own_items(tmp_path)] == ['test']
    table(tmp_path, 'a,chest,vi,Text.,,')
    with pytest.raises(SourceError, match='expected one of reports.csv and reports.json'): own_items(tmp_path)

# ---- what a report does not say ----

def test_silence_is_no_denial():
    asked = [{'kind': 'presence', 'question': '?', 'answer': 'Không.'}, {'kind': 'list', 'question': '?', 'answer': 'Không.'}, {'kind': 'impression', 'question': '?', 'answer': 'Không thấy tổn thương bất thường.'}]
    kept = stated(asked, [], 'Cấu trúc lạ.', 'vi', 0)
    assert [(q['kind'], q['answer']) for q in kept] == [('report', 'Cấu trúc lạ.')]

def small_rows(folder, cfg, study=None):
    load = functools.partial(drawn_study, 5) if study is None else study
    return prepare([('train', Load('a', 'a', load)), ('validation', Load('b', 'b', functools.partial(drawn_study, 6)))], folder, cfg.data, workers=1)

def test_rows_without_places_meet_stages_that_need_them(tmp_path):
    rows = Rows(small_rows(tmp_path/'p', own('x')), 'train')
    plain = Items(rows, 4, 0, ask=lambda rng, record: '?', tasks=('report', 'single', 'multi'))
    assert all(set(plain[i]) == {'pet', 'ct', 'suv', 'dialogue', 'texts'} for i in range(4))
    for needs in (dict(inputs=()), dict(heads=((4, 4, 6),)), dict(truth=True)):
        with pytest.raises(DatasetError, match='it is not known where the findings lie.*images: truth, sites_'): Items(rows, 4, 0, **needs)
    with pytest.raises(DatasetError, match='have no place'): truths(next(r for r in rows.records if r['findings'])['findings'], [(4, 4, 6)], (32, 32, 48), 10., ('chest',))

def test_what_a_source_cannot_teach_is_refused_before_anything_is_read(tmp_path):
    where = Paths(tmp_path, 'smoke')
    with pytest.raises(ConfigError, match=r'mine.stages: lm_list \(images: truth\).*fusion \(sites_full, match\)'): items_of(point(stages={}, scale='phantom', source={'kind': 'own', 'args': {'path': 'x'}}), where)
    assert needs_truth(Stage('x', {'sites_pet': 1, 'match': 0, 'lm': 1}, ('a',), 1., 1, 1)) == ('sites_pet',)
    for data, words in (({'source': {'kind': 'hospital'}}, r"expected one of \['autopet', 'iu'"), 
                        ({'language': 'en', 'source': {'kind': 'vimed', 'args': {'path': 'x', 'spacing': [1, 1, 1]}}}, r"are in \['vi'\]"), ({'source': {'kind': 'own', 'args': {'path': 'x'}}, 'pet_unit': 'relative'}, 'alignment loss'),
                        ({'source': {'kind': 'own', 'args': {'path': 'x'}}, 'pet_unit': 'kBq'}, "'kBq'")):
        with pytest.raises(ConfigError, match=words): items_of(point(**data), where)
    with pytest.raises(ConfigError, match=r"'lesions', from 'own' come \['regions'\]"): fits(dataclasses.replace(resolve('petar', 'smoke'), data=dataclasses.replace(resolve('petar', 'smoke').data, source=Part('own', {'path': 'x'}))))
    for args in ({}, {'path': 'x', 'spaces': 1}):
        with pytest.raises(ConfigError, match='data.source.args: .*known for'): SOURCES['own'](point(source={'kind': 'own', 'args': args}).data, where)

def test_the_phantom_serves_every_point_and_keeps_its_folder():
    params = load_params()
    for name in params['points']: fits(resolve(name, 'phantom', params))
    vipet = resolve('vipet', 'smoke').data
    assert vipet.source == Part('phantom') and vipet.name == 'regions-vi' and own('a').data.name != own('b').data.name != vipet.name

# ---- PET without SUV ----

def test_relative_pet_forgets_its_factor_and_refuses_what_needs_suv(tmp_path):
    study = drawn_study(7); pet = study.volumes['pet']
    stored = dataclasses.replace(study, volumes=study.volumes | {'pet': pet.replace(data=pet.data*np.float32(.0031), unit='1')})
    with pytest.raises(PrepareError, match='set data.pet_unit: relative'): small_rows(tmp_path/'no', own('x'), functools.partial(dataclasses.replace, stored))
    cfg = point(source={'kind': 'own', 'args': {'path': 'x'}}, pet_unit='relative', )
    a, b = (to_grid(s, cfg.data)['chest']['pet'] for s in (study, stored))
    assert a.unit == b.unit == '1' and np.allclose(a.data, b.data, rtol=1e-3, atol=1e-4)
    rows = Rows(small_rows(tmp_path/'p', cfg, functools.partial(dataclasses.replace, stored)), 'train')
    assert rows.records[0]['pet_unit'] == 'relative' and rows.image(0, 'pet').shape == cfg.data.shape
    with pytest.raises(DatasetError, match='PET is relative, not SUVbw'): rows.image(0, 'suv')
    with pytest.raises(PrepareError, match='expected more than nothing'): relative(pet.replace(data=np.zeros_like(pet.data)), study.volumes['ct'])

def vimed(root: Path, exams: dict) -> Path:
    "Exams `{month: seed}` as ViMed-PET lays them out, made of coarse phantoms."
    for month, seed in exams.items():
        study, folder = drawn_study(seed), root/f'PETCT 2019/THANG {month}'
        for name in ('PET', 'CT', 'reports'): (folder/name).mkdir(parents=True, exist_ok=True)
        np.save(folder/'PET/day_1_patient_2.npy', (study.volumes['pet'].data*500).clip(0, 32767).astype(np.int16)); np.save(folder/'CT/day_1_patient_2.npy', study.volumes['ct'].data.astype(np.int16))
        (folder/'reports/day_1_patient_2.json').write_text(json.dumps({'Mô tả hình ảnh': {'Lồng ngực': VI}, 'Kết luận': 'Nốt phổi.'}), encoding='utf-8')
    return root

def test_vimed_is_prepared_knowingly(tmp_path, caplog):
    source, stages = {'kind': 'vimed', 'args': {'path': str(vimed(tmp_path/'vimed', {3: 1, 11: 2, 12: 3})), 'spacing': [5, 5, 5]}}, KEPT | {'projection': {'objective': {'match': 0, 'align': 0}}}
    with pytest.raises(SourceError, match='set data.pet_unit: relative'): items_of(point(source=source, stages=stages), Paths(tmp_path, 'smoke'))
    cfg = point(source=source, stages=stages, pet_unit='relative')
    items = items_of(cfg, Paths(tmp_path, 'smoke'))
    assert [s for s, _ in items] == ['validation', 'test', 'train'] and '1 reports occur word for word in more than one split' in caplog.text
    rows = Rows(prepare_rows(items, tmp_path/'p', cfg.data, workers=1), 'train')
    assert [r['region'] for r in rows.records] == ['chest'] and .3 < float(rows.arrays['pet'][:].astype(np.float32).mean()*cfg.data.suv_max) < 3

# ---- other layouts, to the end ----

def test_autopet_takes_a_table_of_reports(tmp_path):
    rows = []
    for n, split in enumerate(SPLITS):
        study, folder = drawn_study(20 + n), tmp_path/f'PETCT_{n}/2001'
        write_nifti(study.volumes['pet'].replace(meta={}), folder/'SUV.nii.gz'); write_nifti(study.volumes['ct'].replace(meta={}), folder/'CTres.nii.gz')
        rows.append(f'PETCT_{n}/2001,chest,vi,"{VI}",,{split}')
    shutil.copytree(tmp_path/'PETCT_0', tmp_path/'PETCT_9'); file = tmp_path/'PETCT_9/2001/SUV.nii.gz'; file.write_bytes(file.read_bytes()[:20000])
    table(tmp_path, *rows, f'PETCT_9/2001,chest,vi,"{VI}",,train')
    cfg = point(source={'kind': 'autopet', 'args': {'path': str(tmp_path), 'reports': 'reports.csv'}})
    folder = prepare_rows(items_of(cfg, Paths(tmp_path, 'smoke')), tmp_path/'p', cfg.data, workers=1)
    assert [r['patient'] for r in records(folder)] == ['PETCT_0', 'PETCT_1', 'PETCT_2'] and 'cannot be read' in skipped(folder)['PETCT_9/2001']

def test_petar_rows(tmp_path):
    entries = []
    for n in range(4):
        (tmp_path/f'l{n}').mkdir()
        for name in ('pet', 'ct', 'mask', 'pet_focal', 'ct_focal', 'mask_focal'):
            x = np.zeros((1, 8, 40, 40), np.float32); x[0, 2:5, 10:20, 12:20] = (n != 3)*(1 if 'mask' in name else .1 + .2*n)
            np.save(tmp_path/f'l{n}/{name}.npy', x)
        entries.append({k: f'l{n}/{k}.npy' for k in ('pet', 'ct', 'mask', 'pet_focal', 'ct_focal', 'mask_focal')} | {'text': 'Region: Chest. Anatomy: left lung. Finding: nodule. SUVmax: 5.2.'})
    (tmp_path/'data.json').write_text(json.dumps({'train': [entries[0], entries[3]], 'val': entries[1:2], 'test': entries[2:3]}))
    cfg = point('petar', stages={k: None for k in ('lm', 'pretrain', 'organ_projection', 'organ_mask', 'organ_full')} | {'projection': {'objective': {'match': 0}}}, source={'kind': 'petar', 'args': {'path': str(tmp_path/'data.json')}})
    folder = prepare_rows(items_of(cfg, Paths(tmp_path, 'smoke')), tmp_path/'p', cfg.data, workers=1)
    r = records(folder)
    assert [(x['study'], x['split'], x['region'], x['findings'][0]['organ']) for x in r] == [('l0', 'train', 'chest', 'lung'), ('l1', 'validation', 'chest', 'lung'), ('l2', 'test', 'chest', 'lung')]
    assert set(skipped(folder)) == {'l3'} and 'mask' in skipped(folder)['l3']
    arrays = Rows(folder, 'train').arrays
    assert set(arrays) == {'pet', 'ct', 'mask', 'pet_focal', 'ct_focal', 'mask_focal'} and arrays['mask'].dtype == np.uint8 and arrays['mask'][0].any() and arrays['pet'].shape[1:] == cfg.data.shape

def test_m3d_rows_and_their_tasks(tmp_path):
    for n in 'abcd': (tmp_path/n).mkdir(); np.save(tmp_path/f'{n}/1.npy', np.random.default_rng(ord(n)).random((1, 8, 12, 12), np.float32)); (tmp_path/f'{n}/t.txt').write_text('' if n == 'd' else 'A nodule in the left lung.')
    e = lambda n: {'image': f'{n}/1.npy', 'text': f'{n}/t.txt'}
    (tmp_path/'c.json').write_text(json.dumps({'train': [e('a'), e('d')], 'validation': [e('b')], 'test': [e('c')]}))
    left = {'lm_list': None, 'lm_report': None, 'lm': None, 'pretrain_ct': None, 'contrast': {'objective': {'sites_ct': 0}}, 'projection': {'objective': {'match': 0}}}
    make = lambda stages, judged: point('med3dvlm', stages=merge(left, stages), judged=judged, source={'kind': 'm3d', 'args': {'path': str(tmp_path/'c.json')}})
    silent = {k: {'tasks': ['report']} for k in ('projection', 'instruct')}
    with pytest.raises(ConfigError, match=r"tasks \['closed', 'open'\] need questions"): fits(make({}, ['report']))
    with pytest.raises(ConfigError, match=r"evaluation.tasks: \['closed_vqa'\]"): fits(make(silent, ['report', 'closed_vqa']))
    cfg = make(silent, ['report', 'retrieval'])
    folder = prepare_rows(items_of(cfg, Paths(tmp_path, 'smoke')), tmp_path/'p', cfg.data, workers=1)
    assert [r['patient'] for r in records(folder)] == ['a', 'b', 'c'] and 'caption is empty' in skipped(folder)['d/1.npy']
    item = Items(Rows(folder, 'train'), 1, 0, inputs=('ct',), ask=lambda rng, record: '?')[0]
    assert item['ct'].shape == (1, *cfg.data.shape) and item['dialogue'] == [('?', 'A nodule in the left lung.')]

def test_iu_rows(tmp_path):
    cases = {'train': ['a', 'd'], 'val': ['b'], 'test': ['c']}
    for n in 'abc':
        for i in '01': (tmp_path/f'images/{n}').mkdir(parents=True, exist_ok=True); Image.fromarray(np.random.default_rng(ord(n)).integers(0, 255, (80, 70), np.uint8)).save(tmp_path/f'images/{n}/{i}.png')
    (tmp_path/'annotation.json').write_text(json.dumps({s: [{'id': n, 'report': 'There is a nodule in the left lung.', 'image_path': [f'{n}/0.png', f'{n}/1.png']} for n in names] for s, names in cases.items()}))
    cfg = point('content_topic', stages={'lm_list': None, 'lm': None, 'pretrain': None, 'joint': {'objective': {'match': 0}}}, source={'kind': 'iu', 'args': {'path': str(tmp_path/'annotation.json')}})
    folder = prepare_rows(items_of(cfg, Paths(tmp_path, 'smoke')), tmp_path/'p', cfg.data, workers=1)
    assert [(r['study'], r['split'], r['parts']['topic']) for r in records(folder)] == [('a', 'train', 'lung'), ('b', 'validation', 'lung'), ('c', 'test', 'lung')] and 'no such file' in skipped(folder)['d']

# ---- check ----

def test_check_says_what_can_be_used_and_names_nobody(hospital, capsys):
    for file in [*(hospital/'study-1/PT').iterdir(), *(hospital/'study-2/PT').iterdir()]:
        ds = pydicom.dcmread(file); ds.PatientName, ds.PatientID, ds.SeriesDescription = 'Nguyen^Thi^Hoa', 'MRN-4711', 'WB Nguyen Hoa MRN-4711'; ds.save_as(file)
    without_weight(hospital/'study-2')
    table(hospital, f'study-1,chest,vi,"{VI}",,', f'study-2,chest,vi,"{VI}",,')
    assert main(['check', str(hospital)]) == 0
    out = capsys.readouterr().out
    assert 'study-1: usable' in out and 'study-2: REFUSED' in out and 'PatientWeight (0010,1030)' in out and 'study-3: REFUSED, no report' in out and '1 of 3 studies can be used' in out
    assert 'reports in vi: chest' in out and 'CT covers head_neck, chest, abdomen_pelvis' in out and 'SUVbw from BQML' in out
    assert not [w for w in ('Nguyen', 'Hoa', 'MRN-4711') if w in out] and 'WB [removed]' in out

def test_check_fails_where_nothing_can_be_used(tmp_path, capsys):
    assert main(['check', str(tmp_path)]) == 1 and main(['check', str(tmp_path/'none')]) == 1 and main(['check']) == 1
    bare_study(tmp_path/'a', 'x')
    assert main(['check', str(tmp_path)]) == 1 and '0 of 1 studies can be used' in capsys.readouterr().out

def cut_above(study: Path, folder: Path, region: str) -> None:
    "A copy of a study that begins just below `region`."
    ct = read_series(next(s for s in find_series(study) if s.modality == 'CT'))
    lowest = ct.world((region_bounds(ct, 0)[region][0], 0, 0))[2] - 15
    shutil.copytree(study, folder)
    for file in (f for m in ('PT', 'CT') for f in (folder/m).iterdir()):
        if float(pydicom.dcmread(file, stop_before_pixels=True).ImagePositionPatient[2]) < lowest: file.unlink()

def test_a_region_that_the_ct_does_not_cover(written, tmp_path, caplog):
    (tmp_path/'petct').mkdir(); cut_above(written/'study-1', tmp_path/'petct/chest', 'chest'); cut_above(written/'study-2', tmp_path/'petct/head', 'head_neck')
    table(tmp_path/'petct', 'chest,abdomen_pelvis,vi,Text.,,', 'head,head_neck,vi,Text.,,')
    chest, head = survey(tmp_path/'petct')
    assert chest.cover == ('head_neck', 'chest') and "reported are ['abdomen_pelvis'], the CT covers" in chest.why and 'no lungs' in head.why
    items = [(s, Load(n, n, functools.partial(own_study, tmp_path/'petct'/n, (Row(n, r, 'vi', VI), Row(n, 'abdomen_pelvis', 'vi', VI))))) for s, n, r in (('train', 'chest', 'chest'), ('train', 'head', 'head_neck'))]
    folder = prepare(items, tmp_path/'p', own('x').data, workers=1)
    assert [r['region'] for r in records(folder)] == ['chest'] and 'no lungs' in skipped(folder)['head']      # its abdomen was reported and never scanned

# ---- the page for whoever runs the archive ----

def test_the_notebook_from_an_empty_folder_to_a_draft():
    run(ROOT/'nbs/own_data.ipynb')
