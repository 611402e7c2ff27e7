"Audits of splits: what is on two sides is found and counted, what is not is not; nothing that names a patient comes out; every source can be audited before it is prepared."
import dataclasses, json, shutil
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from petvlm.cli import main, twins
from petvlm.config import Data, Part, Paths, resolve
from petvlm.datasets import DatasetError
from petvlm.leakage import AuditError, LeakageError, Sample, audit, audit_items, audit_samples, audit_source, leaks, own_loads, refuse, row_samples, told, write_audit
from petvlm.likeness import content, deviations, nearest, nearest_texts, normalised, sketch
from petvlm.own import own_items
from petvlm.phantom import write_patient
from petvlm.sources import SourceError
from petvlm.volume import Volume, write_nifti

SHAPE = (8, 8, 8)
HEALTHY = 'Không thấy bất thường tăng chuyển hóa.'
STATED = 'Nốt thùy trên phổi {side} kích thước {size} mm, tăng chuyển hóa FDG, SUVmax 5,2, không thay đổi so với lần chụp trước; hạch trung thất không to, màng phổi hai bên không có dịch, tim không to, thực quản bình thường'
FINDING = {'organ': 'lung', 'side': 'left', 'kind': 'nodule'}

def images(seed: int) -> dict: return {k: np.random.default_rng([seed, i]).random(SHAPE).astype(np.float16) for i, k in enumerate(('pet', 'ct'))}

def row(split: str, patient: str, seed: int, text: str = '', findings=(FINDING,), **more) -> tuple[dict, dict]:
    "A row of random images; its text is unlike any other unless it is given."
    words = np.random.default_rng(seed).integers(0, 10**6, 12)
    return images(seed), dict(split=split, patient=patient, region='chest', text=text or ' '.join(f'w{w}' for w in words), findings=list(findings)) | more

def write(folder: Path, *rows) -> Path:
    folder.mkdir()
    for k in rows[0][0]: np.save(folder/f'{k}.npy', np.stack([a[k] for a, _ in rows]))
    np.savez(folder/'standard.npz')
    (folder/'rows.jsonl').write_text(''.join(json.dumps({'row': i} | r, ensure_ascii=False) + '\n' for i, (_, r) in enumerate(rows)), encoding='utf-8')
    return folder

CLEAN = [row('train', f'p{i}', i) for i in range(6)] + [row('validation', 'p6', 6), row('test', 'p7', 7), row('test', 'p8', 8)]

def found(table: pd.DataFrame, check: str, split: str = 'test', against: str = 'train') -> tuple[int, int, str]:
    line, = table[(table['check'] == check) & (table['split'] == split) & (table['against'] == against)].itertuples()
    return line.number, line.of, line.examples

# ---- patients and images ----

def test_a_clean_split_is_clean(tmp_path):
    table = audit(write(tmp_path/'p', *CLEAN))
    refuse(table)
    assert not table['number'].any() and {(a, b) for a, b in zip(table['split'], table['against']) if b} == {('validation', 'train'), ('test', 'train'), ('test', 'validation')}
    assert table['data_hash'].nunique() == 1 and len(table['data_hash'][0]) == 12

def test_a_patient_on_two_sides_is_a_leak(tmp_path):
    table = audit(write(tmp_path/'p', *CLEAN, row('test', 'p2', 20)))
    assert found(table, 'same patient') == (1, 3, '9~2') and found(table, 'same images') == (0, 3, '')
    with pytest.raises(LeakageError, match=r'same patient: 1 of 3 of test are in train too \(rows 9~2\)'): refuse(table)

def test_validation_patients_leak_too(tmp_path):
    table = audit(write(tmp_path/'p', *CLEAN, row('validation', 'p8', 20)))
    assert found(table, 'same patient', 'test', 'validation')[:2] == (1, 2) and len(leaks(table)) == 1

@pytest.mark.parametrize('kept', [('pet',), ('ct',), ('pet', 'ct')])
def test_one_image_under_another_name_is_a_leak(tmp_path, kept):
    arrays, record = row('test', 'p9', 30)
    table = audit(write(tmp_path/'p', *CLEAN, (arrays | {k: images(4)[k] for k in kept}, record)))
    assert found(table, 'same images') == (1, 3, '9~4') and found(table, 'same patient')[0] == 0
    with pytest.raises(LeakageError, match='same images: 1 of 3'): refuse(table)

def test_blank_images_prove_nothing(tmp_path):
    blank = lambda split, p, seed: (lambda a, r: (a | {'ct': np.zeros(SHAPE, np.float16)}, r))(*row(split, p, seed))
    assert leaks(audit(write(tmp_path/'p', *CLEAN, blank('train', 'a', 40), blank('test', 'b', 41)))).empty

def test_masks_are_no_images(tmp_path):
    mask = lambda a, r: (a | {'mask': np.eye(8, dtype=np.uint8)[None].repeat(8, 0)}, r)
    assert leaks(audit(write(tmp_path/'p', *(mask(*r) for r in CLEAN)))).empty

def test_organs_are_rows_of_training_patients(tmp_path):
    refuse(audit(write(tmp_path/'a', *CLEAN, row('organs', 'p0', 50, findings=()))))
    table = audit(write(tmp_path/'b', *CLEAN, row('organs', 'p8', 50, findings=())))
    assert found(table, 'same patient') == (1, 2, '8~9')

def test_copies_inside_a_split_are_noted(tmp_path):
    arrays, record = row('train', 'p0', 0)
    table = audit(write(tmp_path/'p', *CLEAN, (arrays, record), (arrays, record | {'patient': 'other'})))
    refuse(table)
    assert found(table, 'images repeated', 'train', '')[:2] == (2, 8) and found(table, 'images of two patients', 'train', '') == (1, 8, '10~0') and found(table, 'report repeated, with findings', 'train', '')[0] == 2

def test_a_copy_with_noise_is_near_and_a_stranger_is_not(tmp_path):
    arrays, record = row('test', 'p9', 60)
    noise = np.random.default_rng(1)
    copy = {k: (x + noise.normal(0, .005, SHAPE)).astype(np.float16) for k, x in images(3).items()}
    table = audit(write(tmp_path/'p', *CLEAN, (copy, record)))
    assert found(table, 'near images') == (1, 3, '9~3') and leaks(table).empty

def test_nothing_is_near_where_nobody_knows_what_is_usual(tmp_path):
    copy = {k: x + np.float16(.001) for k, x in images(0).items()}
    few = [row('train', 'a', 0), row('train', 'b', 1), (copy, row('test', 'c', 2)[1])]
    assert found(audit(write(tmp_path/'p', *few)), 'near images')[0] == 0

def test_regions_are_compared_with_their_own_kind(tmp_path):
    copy = {k: x + np.float16(.001) for k, x in images(3).items()}
    table = audit(write(tmp_path/'p', *CLEAN, (copy, row('test', 'p9', 60)[1] | {'usual': 'chest.coronal'})))
    assert found(table, 'near images')[0] == 0

@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(1, 20)]*3), st.integers(0, 9))
def test_a_sketch_is_made_of_means(shape, seed):
    x = np.random.default_rng(seed).random(shape)
    parts = sketch(x).reshape(8, 8, 8)
    cut = lambda n, i: slice(i*n//8, max((i + 1)*n//8, i*n//8 + 1))
    expected = [x[cut(shape[0], i), cut(shape[1], j), cut(shape[2], k)].mean() for i, j, k in ((0, 0, 0), (3, 5, 7), (7, 7, 7), (4, 0, 6))]
    assert np.allclose([parts[0, 0, 0], parts[3, 5, 7], parts[7, 7, 7], parts[4, 0, 6]], expected, atol=1e-5)

def test_deviations_stand_firm_against_outliers_and_copies():
    rng = np.random.default_rng(0)
    x = rng.normal(5, 2, (21, 512)); x[20] = 1e6
    z = deviations(x)
    assert np.abs(z[20]).max() == 4 and .8 < z[:20].std() < 1.3
    copies = np.repeat(rng.normal(size=(1, 512)), 6, 0); copies[5] += 1
    index, far = nearest(deviations(copies)[:2], deviations(copies)[2:])
    assert far.max() == 0 and not np.isnan(deviations(np.ones((5, 512)))).any()

def test_nearest_in_blocks_is_nearest():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(17, 30)), rng.normal(size=(23, 30))
    full = np.sqrt(((a[:, None] - b)**2).mean(-1))
    for room in (1, 100, 10**6):
        index, far = nearest(a, b, room)
        assert (index == full.argmin(1)).all() and np.allclose(far, full.min(1))

def test_another_shape_or_type_is_another_image():
    x = np.arange(8.).reshape(2, 2, 2)
    assert len({content(x), content(x.reshape(1, 2, 4)), content(x.astype(np.float32)), content(x[::-1])}) == 4 and content(x) == content(np.asfortranarray(x))

# ---- reports ----

def test_twins_of_reports_are_counted_by_what_they_state(tmp_path):
    rows = [row('train', 'a', 0, STATED.format(side='trái', size=12)), row('train', 'b', 1, HEALTHY, ())] + [row('train', f't{i}', 2 + i) for i in range(4)]
    rows += [row('test', 'c', 10, STATED.format(side='trái', size=12).upper() + '.'), row('test', 'd', 11, STATED.format(side='trái', size=14)), row('test', 'e', 12), row('test', 'f', 13),
             row('test', 'g', 14, HEALTHY, ()), row('test', 'h', 15, HEALTHY, ())]
    table = audit(write(tmp_path/'p', *rows))
    n = len(normalised(STATED.format(side='trái', size=12)).split()) - 2
    assert (n - 3)/(n + 3) > .8                                             # one number in a text of n runs touches three of them
    assert found(table, 'same report, with findings') == (1, 4, '6~0') and found(table, 'near report, with findings') == (2, 4, '6~0 7~0')
    assert found(table, 'same report, without findings') == (2, 2, '10~1 11~1') and found(table, 'report repeated, without findings', 'test', '') == (1, 2, '11~10')
    share = table.set_index(['check', 'split', 'against'])['share']
    assert share['same report, with findings', 'test', 'train'] == .25 and share['near report, with findings', 'test', 'train'] == .5 and leaks(table).empty

def test_radiographs_state_by_their_topic(tmp_path):
    picture = lambda split, p, seed, topic: row(split, p, seed, 'The heart is enlarged.', (), kind='radiograph', parts={'topic': topic})
    table = audit(write(tmp_path/'p', picture('train', 'a', 0, 'heart'), picture('test', 'b', 1, 'heart'), picture('test', 'c', 2, 'normal')))
    assert found(table, 'same report, with findings')[:2] == (1, 1) and found(table, 'same report, without findings')[:2] == (1, 1)

WORDS = st.lists(st.sampled_from('abcde'), min_size=1, max_size=12).map(' '.join)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(WORDS, min_size=1, max_size=6), st.lists(WORDS, min_size=1, max_size=6), st.sampled_from((1, 7, 10**6)))
def test_the_nearest_text_is_that_of_plain_sets(a, b, room):
    def runs(t): w = t.split(); return {tuple(w[i:i + 3]) for i in range(len(w) - 2)} or {tuple(w)}
    jaccard = lambda x, y: len(runs(x) & runs(y))/len(runs(x) | runs(y))
    index, alike = nearest_texts(a, b, room)
    for x, i, j in zip(a, index, alike): assert abs(j - max(jaccard(x, y) for y in b)) < 1e-6 and abs(jaccard(x, b[i]) - j) < 1e-6

# ---- questions ----

def test_questions_that_need_no_image(tmp_path):
    q = lambda **said: {'single': [{'question': k, 'answer': v} for k, v in said.items()]}
    rows = [row('train', f'p{i}', i, **q(plane='axial', liver='no', side='left' if i < 3 else 'right', **({'rare': 'yes'} if i < 2 else {}))) for i in range(5)]
    rows += [row('test', 'p8', 8, **q(plane='axial', liver='yes', side='left', rare='yes', unseen='no')), row('test', 'p9', 9, **q(side='right', plane='axial'))]
    table = audit(write(tmp_path/'p', *rows))
    assert found(table, 'answer decided by the question (single)') == (2, 7, '5 6')                # plane, twice; the rare one was asked twice only
    assert found(table, 'answer guessed from the question (single)') == (4, 7, '5 5 5')            # plane twice, side once, rare

# ---- what comes out ----

def test_nothing_names_a_patient_or_tells_a_text(tmp_path):
    text = STATED.format(side='trái', size=12)
    q = {'single': [{'question': 'Bên nào?', 'answer': 'Bên trái.'}]}
    rows = [row('train', 'NguyenThiHoa', 0, text, **q), row('train', 'MRN-4711', 1, **q), row('train', 'c', 2, **q), row('test', 'NguyenThiHoa', 0, text, **q)]
    table = audit(write(tmp_path/'p', *rows))
    written = write_audit(table, tmp_path/'audits/smoke/x.csv').read_text(encoding='utf-8')
    with pytest.raises(LeakageError) as e: refuse(table)
    for word in ('Nguyen', 'Hoa', '4711', 'trái', 'phổi', 'Bên'): assert word not in written + str(e.value)
    again = pd.read_csv(tmp_path/'audits/smoke/x.csv')
    assert list(again) == ['check', 'severity', 'split', 'against', 'number', 'of', 'share', 'examples', 'data_hash'] and len(again) == len(table) and not list((tmp_path/'audits/smoke').glob('.*'))

def test_what_cannot_be_audited_says_so(tmp_path):
    with pytest.raises(DatasetError, match='run the prepare stage first'): audit(tmp_path)
    with pytest.raises(AuditError, match="split 'dev': expected one of"): audit_samples([dataclasses.replace(row_samples(write(tmp_path/'p', *CLEAN))[0], split='dev')])
    assert audit_samples([]).empty

# ---- before anything is prepared ----

def source(kind: str, system: str, data: Data, **args): return dataclasses.replace(resolve(system, 'smoke'), data=dataclasses.replace(data, source=Part(kind, args)))

def check_source(cfg, root, **expected) -> pd.DataFrame:
    "The audit of a source whose leaks are `expected`, check -> number."
    table, unread = audit_source(cfg, Paths(root, 'smoke'))
    assert not unread and {c.replace(' ', '_'): n for c, n in leaks(table).groupby('check')['number'].sum().items()} == expected
    return table

SCANS = Data('scans', 'en', 0, 0, 0, 0, (4, 6, 6), 10., 0, 10., (-1000., 1000.))

def m3d(root: Path, images: dict[str, int]) -> None:
    for name, seed in images.items():
        (root/name).mkdir(parents=True); np.save(root/name/'1.npy', np.random.default_rng(seed).random((1, 8, 12, 12), np.float32))
        (root/name/'t.txt').write_text(f'A {10 + seed} mm nodule in the left lung, seen as often as {seed} times.')
    entry = lambda n: {'image': f'{n}/1.npy', 'text': f'{n}/t.txt'}
    a, b, *c = images
    (root/'c.json').write_text(json.dumps({'train': [entry(a)], 'validation': [entry(b)], 'test': list(map(entry, c))}))

def test_m3d_before_preparation(tmp_path):
    m3d(tmp_path/'clean', {'a': 1, 'b': 2, 'c': 3}); m3d(tmp_path/'copied', {'a': 1, 'b': 2, 'c': 3, 'd': 1})
    check_source(source('m3d', 'med3dvlm', SCANS, path='c.json'), tmp_path/'clean')
    table = check_source(source('m3d', 'med3dvlm', SCANS, path='c.json'), tmp_path/'copied', same_images=1)
    assert found(table, 'same images') == (1, 2, '3~0') and found(table, 'same report, with findings')[:2] == (1, 2)

def test_petar_before_preparation(tmp_path):
    entries = []
    for n, seed in enumerate((1, 2, 3, 1)):                              # the last: another lesion of the first scan, in another split
        (tmp_path/f'p{n % 3}_{n}').mkdir()
        for k in ('pet', 'ct', 'mask', 'pet_focal', 'ct_focal', 'mask_focal'):
            x = np.random.default_rng([seed, len(k)] if 'focal' not in k else [n, len(k)]).random((1, 8, 20, 20)).astype(np.float32)
            if 'mask' in k: x[:] = 0; x[0, 2:4, 3 + n:9 + n, 4:9] = 1
            np.save(tmp_path/f'p{n % 3}_{n}/{k}.npy', x)
        entries.append({k: f'p{n % 3}_{n}/{k}.npy' for k in ('pet', 'ct', 'mask', 'pet_focal', 'ct_focal', 'mask_focal')} | {'text': f'Region: Chest. Anatomy: left lung. Finding: nodule. SUVmax: {5 + n}.2.'})
    data = Data('lesions', 'en', 0, 0, 0, 0, (8, 20, 20), 10., 0, 12., (-300., 400.))
    write_listing = lambda *test: (tmp_path/'data.json').write_text(json.dumps({'train': entries[:1], 'val': entries[1:2], 'test': list(test)}))
    cfg = source('petar', 'petar', data, path='data.json')
    write_listing(entries[2]); check_source(cfg, tmp_path)
    write_listing(entries[2], entries[3]); check_source(cfg, tmp_path, same_images=1)
    table, _ = audit_source(cfg, Paths(tmp_path, 'smoke'), who=lambda study: study.partition('_')[0])
    assert leaks(table)['check'].tolist() == ['same patient', 'same images'] and found(table, 'same patient') == (1, 2, '3~0')

def vimed(root: Path, seeds: dict[int, int], texts: dict[int, str] = {}) -> None:
    for month, seed in seeds.items():
        folder, rng = root/f'PETCT 2019/THANG {month}', np.random.default_rng(seed)
        for name in ('PET', 'CT', 'reports'): (folder/name).mkdir(parents=True)
        np.save(folder/'PET/day_1_patient_2.npy', rng.integers(0, 32767, (6, 8, 8)).astype(np.int16)); np.save(folder/'CT/day_1_patient_2.npy', rng.integers(-1000, 1000, (6, 8, 8)).astype(np.int16))
        (folder/'reports/day_1_patient_2.json').write_text(json.dumps({'Mô tả hình ảnh': {'Lồng ngực': texts.get(month, f'Nốt phổi trái {month} mm.')}}, ensure_ascii=False), encoding='utf-8')

def test_vimed_before_preparation(tmp_path):
    data = dataclasses.replace(resolve('vipet', 'smoke').data, pet_unit='relative')
    vimed(tmp_path/'clean', {3: 1, 11: 2, 12: 3}); vimed(tmp_path/'copied', {3: 1, 11: 2, 12: 1}, {3: 'Nốt phổi trái 9 mm.', 12: 'nốt phổi trái 9 mm'})
    check_source(source('vimed', 'vipet', data, path='.', spacing=[5, 5, 5]), tmp_path/'clean')
    table = check_source(source('vimed', 'vipet', data, path='.', spacing=[5, 5, 5]), tmp_path/'copied', same_images=1)
    assert found(table, 'same report, with findings')[:2] == (1, 1)

def test_iu_x_ray_before_preparation(tmp_path):
    def case(n, seed, report):
        (tmp_path/f'images/{n}').mkdir(parents=True)
        for i in (0, 1): Image.fromarray(np.random.default_rng([seed, i]).integers(0, 255, (80, 70), np.uint8)).save(tmp_path/f'images/{n}/{i}.png')
        return {'id': n, 'report': report, 'image_path': [f'{n}/0.png', f'{n}/1.png']}
    lists = {'train': [case('a', 1, 'The heart is enlarged.'), case('b', 2, 'Lungs are clear.')], 'val': [case('c', 3, 'There is a scar in the left lung.')], 'test': [case('d', 4, 'The heart is enlarged'), case('e', 5, 'The lungs are clear without effusion.')]}
    data = Data('radiographs', 'en', 0, 0, 0, 0, (2, 64, 64), 10., 0, 10., (-1000., 1000.))
    cfg = source('iu', 'content_topic', data, path='annotation.json')
    (tmp_path/'annotation.json').write_text(json.dumps(lists))
    table = check_source(cfg, tmp_path)
    assert found(table, 'same report, with findings')[:2] == (1, 1) and found(table, 'same report, without findings')[:2] == (0, 1)
    lists['test'].append(case('f', 2, 'No acute disease.'))
    (tmp_path/'annotation.json').write_text(json.dumps(lists))
    assert found(check_source(cfg, tmp_path, same_images=1), 'same images') == (1, 3, '5~1')

def test_autopet_before_preparation(tmp_path):
    affine = np.diag([3., 3., 3., 1.])[[2, 1, 0, 3]]
    for n, seed in enumerate((1, 2, 3, 1)):
        rng, folder = np.random.default_rng(seed), tmp_path/f'PETCT_{n}/2001'; folder.mkdir(parents=True)
        for name, unit in (('SUV', 'SUVbw'), ('CTres', 'HU')): write_nifti(Volume(rng.random((4, 6, 8), np.float32), affine, unit), folder/f'{name}.nii.gz')
    (tmp_path/'reports.csv').write_text('study,region,language,text,split\n' + ''.join(f'PETCT_{n}/2001,chest,vi,Nốt phổi trái {n} mm.,{s}\n' for n, s in enumerate(('train', 'validation', 'test', 'test'))), encoding='utf-8')
    table = check_source(source('autopet', 'vipet', resolve('vipet', 'smoke').data, path='.', reports='reports.csv'), tmp_path, same_images=1)
    assert found(table, 'same images') == (1, 2, '3~0')

def test_items_that_cannot_be_read_are_counted(tmp_path):
    m3d(tmp_path, {'a': 1, 'b': 2, 'c': 3, 'd': 1}); (tmp_path/'d/1.npy').write_bytes(b'no array')
    table, unread = audit_source(source('m3d', 'med3dvlm', SCANS, path='c.json'), Paths(tmp_path, 'smoke'))
    assert unread == [3] and leaks(table).empty
    def broken(): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): audit_items([('train', broken)])          # a mistake in the code is no bad study

# ---- one's own folder ----

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "Two digital patients, and a copy of the first under another name."
    root = tmp_path_factory.mktemp('petct')
    for seed, name in ((11, 'study-1'), (12, 'study-2')): (root/write_patient(seed, root)).rename(root/name)
    shutil.copytree(root/'study-1', root/'study-9')
    return root

HEAD = 'study,region,language,text,patient,split\n'
ROWS = {'study-1': 'Nốt phổi trái 12 mm.', 'study-2': 'Nốt phổi phải 8 mm.', 'study-9': 'Gan bình thường.'}
def table_of(root: Path, **who) -> None: (root/'reports.csv').write_text(HEAD + ''.join(f'{s},chest,vi,{text},{",".join(who[s.replace("-", "")])}\n' for s, text in ROWS.items()), encoding='utf-8')

def test_check_tells_of_a_copied_study(written, capsys):
    table_of(written, study1=('Hoa-4711', 'train'), study2=('Lan-4712', 'validation'), study9=('Mai-4713', 'test'))
    assert main(['check', str(written)]) == 1
    out = capsys.readouterr().out
    assert 'LEAK: same images: 1 of 1 of test against train: study-9 = study-1' in out and '3 of 3 studies can be used' in out
    assert not [w for w in ('Hoa', 'Lan', '4711', '4713') if w in out]

def test_check_tells_of_a_patient_on_two_sides_where_training_refuses(written, capsys):
    table_of(written, study1=('Hoa-4711', 'train'), study2=('Hoa-4711', 'test'), study9=('Hoa-4711', 'train'))
    with pytest.raises(SourceError, match='1 patients would be in two splits'): own_items(written)
    assert twins(str(written))
    out = capsys.readouterr().out
    assert 'LEAK: same patient: 1 of 1 of test against train: study-2 = study-1' in out and 'note: images repeated: 1 of 2 of train: study-9 = study-1' in out and 'Hoa' not in out

def test_check_is_content_with_what_is_there_once(written, capsys):
    table_of(written, study1=('a', 'train'), study2=('b', 'test'), study9=('a', 'train'))
    assert not twins(str(written)) and 'LEAK' not in capsys.readouterr().out

def test_the_audit_sees_the_splits_that_training_sees(written):
    table_of(written, study1=('', ''), study2=('b', ''), study9=('', ''))
    plain = lambda items: [(split, load.study, load.patient) for split, load in items]
    assert plain(own_loads(written)) == plain(own_items(written)) and plain(own_loads(written/'reports.csv', test=.4)) == plain(own_items(written/'reports.csv', test=.4))
    (written/'reports.csv').unlink()
    bare = own_loads(written)
    assert [load.study for _, load in bare] == ['study-1', 'study-2', 'study-9'] and bare[0][1].patient == bare[2][1].patient       # the DICOM files say who it is
