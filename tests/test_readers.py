"Readers: lists mapped to our words, agreement counted by hand, errors under their own names, the benchmark without a word of a report."
import dataclasses, importlib.util, json
from pathlib import Path
import numpy as np, pytest
from petvlm.facts import FactError, bootstrap
from petvlm.findings import KINDS, LESIONS, ORGANS, Finding
from petvlm.readers import COUNTS, ERRORS, LEVELS, UNITS, Lesion, ReaderError, agreement, errors, grouped, read_entry, read_list, read_text, reader_counts, within
from petvlm.reports import write_report
from petvlm.wording import ReportError

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent/'shared/data/reports_vi'
spec = importlib.util.spec_from_file_location('parser_benchmark', ROOT/'benchmarks/parser.py')
benchmark = importlib.util.module_from_spec(spec); spec.loader.exec_module(benchmark)
change = dataclasses.replace

def entry(size='Không có', shape='Nốt mờ', place='thùy trên phổi trái', suv='Không có', state='Không có', tone='hoá'):
    return {'Kích thước khối u, tổn thương': size, 'Hình dạng của khối u': shape, 'Vị trí của khối u': place, 'Mức độ FDG': {'SUVmax': suv, f'Tăng chuyển {tone} FDG': state}, 'Xâm lấn': 'Không', f'Giai đoạn chuyển {tone}': ''}

# ---------------------------------------------------------------- mapping

@pytest.mark.parametrize('given, expected', [
    (dict(size='12 x 15 mm', suv='4.5', state='Có tăng'), [('lung', 'left', 'nodule', 15, 4.5, 'increased')]),
    (dict(size='nốt lớn nhất 1,1 cm', suv=0, state='Không tăng', tone='hóa'), [('lung', 'left', 'nodule', 11, None, 'none')]),
    (dict(shape='Vài hạch', place='Cạnh phải khí quản, rốn phổi hai bên', suv=21, state='Cao'), [('hilar_node', 'left', 'node', None, 21, 'increased'), ('hilar_node', 'right', 'node', None, 21, 'increased'), ('mediastinal_node', '', 'node', None, 21, 'increased')]),
    (dict(shape='Hạch', place='Thượng đòn phải', suv=3, state='Không đều'), [('supraclavicular_node', 'right', 'node', None, 3, 'increased')]),
    (dict(shape='Khối mờ', place='thùy dưới phổi phải, dính vào màng phổi và thành ngực', state='Không tăng'), [('lung', 'right', 'mass', None, None, 'none')]),
    (dict(shape='Tăng nhẹ chuyển hóa FDG', place='gan', state='Tăng ít', suv='không có:'), [('liver', '', 'uptake', None, None, 'increased')]),
    (dict(shape='Không có', place='đại tràng', state='Có tăng'), [('colon', '', 'uptake', None, None, 'increased')]),
    (dict(shape='Dày màng phổi', place='màng phổi thành sau phổi trái'), [('pleura', 'left', 'thickening', None, None, 'none')]),
    (dict(shape='Dày màng phổi thành bên phổi trái, vôi hóa', place='màng phổi thành bên phổi trái'), [('pleura', 'left', 'thickening', None, None, 'none')]),
    (dict(shape='Tổn thương dày tổ chức kẽ'), [('lung', 'left', 'opacity', None, None, 'none')]),
    (dict(shape='Hình ảnh hạch nách trái', place='Không có'), [('axillary_node', 'left', 'node', None, None, 'none')]),
    (dict(shape='Dải mờ', place='Thùy trên hai phổi'), [('lung', 'left', 'opacity', None, None, 'none'), ('lung', 'right', 'opacity', None, None, 'none')])])
def test_an_entry_is_mapped(given, expected):
    x = read_entry(entry(**given))
    assert sorted((f.organ, f.side, f.kind, f.size_mm, f.suvmax, f.uptake) for f in x.findings) == expected and x.unmapped == ()

@pytest.mark.parametrize('given, field, kinds', [(dict(place='mông trái'), 'place', ('nodule',)), (dict(shape='Không có', place='phổi hai bên'), 'kind', ()), (dict(suv='cao'), 'suvmax', ('nodule',)), (dict(state='?'), 'uptake', ('nodule',))])
def test_what_cannot_be_mapped_is_named(given, field, kinds):
    x = read_entry(entry(**given))
    assert [name for name, _ in x.unmapped] == [field] and x.kinds == kinds and all(words for _, words in x.unmapped)
    assert bool(x.findings) == (field in ('suvmax', 'uptake'))
    counted = agreement([[entry(**given)]], [[entry(**given)]], n=5)
    assert counted['counts']['lesions_there'] == 1 and sum(counted['unmapped'][field].values()) == 1          # in the denominator, and by name

@pytest.mark.parametrize('wrong, says', [({'Kích thước': '1 mm'}, "'hình dạng'"), (entry() | {'Mức độ FDG': 'cao'}, 'found str'), ({**entry(), 'Mức độ FDG': {'SUVmax': 1}}, "'tăng'")])
def test_an_entry_in_another_format_is_refused(wrong, says):
    with pytest.raises(ReaderError, match=says): read_list([wrong])
    assert issubclass(ReaderError, FactError)

def test_other_languages_and_lengths_are_refused():
    with pytest.raises(ReportError, match="'fr'"): read_entry(entry(), 'fr')
    with pytest.raises(ReaderError, match='2 reports but 1'): agreement(['a', 'b'], [[]])
    with pytest.raises(ReaderError, match='no reports'): agreement([], [])

# ---------------------------------------------------------------- agreement

NODULE = Finding('lung', 'left', 'nodule', 14., 6., 'increased')
def one(*findings): return Lesion(findings, tuple(dict.fromkeys(f.kind for f in findings)))

@pytest.mark.parametrize('said, levels', [
    (NODULE, set(LEVELS)), (change(NODULE, size_mm=14.9), set(LEVELS)), (change(NODULE, size_mm=16.), set(LEVELS) - {'all'}), (change(NODULE, suvmax=None), set(LEVELS) - {'all'}),
    (change(NODULE, uptake='none'), set(LEVELS) - {'all', 'type_site_fdg'}), (change(NODULE, uptake='unknown'), set(LEVELS) - {'all', 'type_site_fdg'}), (change(NODULE, side='right'), {'type', 'place', 'type_place'}),
    (change(NODULE, kind='mass'), {'place', 'site'}), (change(NODULE, organ='rib'), {'type'}), (Finding('liver', '', 'cyst'), set())])
def test_levels_by_hand(said, levels):
    row = dict(zip(COUNTS, reader_counts([one(said)], [one(NODULE)])))
    assert {level for level in LEVELS if row[f'lesions_{level}']} == levels == {level for level in LEVELS if row[f'findings_{level}']}

def test_lesions_are_paired_once_and_as_many_as_possible():
    both, left, right = one(NODULE, change(NODULE, side='right')), one(NODULE), one(change(NODULE, side='right'))
    row = dict(zip(COUNTS, reader_counts([both, left], [left, right])))
    assert (row['lesions_site'], row['findings_said'], row['findings_site']) == (2, 3, 2)               # greedy would give 'both' to 'left' and leave 'right' alone
    row = dict(zip(COUNTS, reader_counts([left, left, left], [left])))
    assert (row['lesions_said'], row['lesions_all']) == (3, 1)
    assert reader_counts([], [left])[:2] == [0, 1] and reader_counts([], [])[:2] == [0, 0]

def test_shares_and_intervals():
    r = agreement([[NODULE], [NODULE, Finding('liver', '', 'mass', span=(0, 1))], []], [[NODULE], [NODULE], [NODULE]], n=400)
    v = {k: x['value'] for k, x in r['findings']['type_site'].items()}
    assert v == pytest.approx({'precision': 2/3, 'recall': 2/3, 'f1': 2/3}) and r['reports'] == 3
    assert all(x['lo'] <= x['value'] <= x['hi'] for unit in UNITS for level in LEVELS for x in r[unit][level].values())
    assert r['errors'] == dict.fromkeys(ERRORS, 0) | {'missed': 1, 'invented': 1} and json.loads(json.dumps(r)) == r
    assert agreement([[NODULE], []], [[NODULE], [NODULE]], n=400)['findings']['site']['recall']['lo'] == 0
    said, there, right = (np.array(x) for x in ([1, 2, 0], [1, 1, 1], [1, 1, 0]))                       # the same draws as everywhere
    assert bootstrap(np.column_stack([said + there, right]), lambda s: 2*s[:, 1]/s[:, 0], n=400) == (r['findings']['site']['f1']['lo'], r['findings']['site']['f1']['hi'])

@pytest.mark.parametrize('language', ['vi', 'en'])
def test_a_written_report_agrees_with_its_findings(language):
    rng, texts, truth = np.random.default_rng(0), [], []
    for seed in range(12):
        found = [Finding(o, 'left' if ORGANS[o].sided else '', k, 12., 5. if u == 'increased' else None, u) for o, k, u in (LESIONS[i] for i in rng.choice(len(LESIONS), 4, replace=False)) if ORGANS[o].region == 'chest']
        report = write_report(found, 'chest', language, seed); texts.append(report.text); truth.append(report.findings)
    r = agreement(texts, truth, language, n=20)
    assert r['findings']['all']['f1']['value'] == 1 and not any(r['errors'].values()) and r['counts']['findings_there'] > 10

NEAR_LIMIT = {'missed': ([], [NODULE]), 'invented': ([NODULE], []), 'side': ([change(NODULE, side='right')], [NODULE]), 'side_missing': ([change(NODULE, side='')], [NODULE]), 'organ': ([change(NODULE, organ='rib')], [NODULE]),
              'kind': ([change(NODULE, kind='mass')], [NODULE]), 'uptake': ([change(NODULE, uptake='none')], [NODULE]), 'size': ([change(NODULE, size_mm=16.)], [NODULE]), 'size_missing': ([change(NODULE, size_mm=None)], [NODULE]),
              'size_added': ([NODULE], [change(NODULE, size_mm=None)]), 'suvmax': ([change(NODULE, suvmax=6.2)], [NODULE]), 'suvmax_missing': ([change(NODULE, suvmax=None)], [NODULE]), 'suvmax_added': ([NODULE], [change(NODULE, suvmax=None)])}

@pytest.mark.parametrize('kind', NEAR_LIMIT)
def test_each_error_has_its_name(kind):
    said, there = NEAR_LIMIT[kind]
    assert [e.kind for e in errors(grouped(said), grouped(there))] == [kind]
    assert not errors(grouped(there), grouped(there)) and set(NEAR_LIMIT) | {'unmapped'} == set(ERRORS)

def test_scope_limits_both_readers():
    liver = Finding('liver', '', 'mass', span=(0, 9))
    lost = Lesion((), ('mass',), 'x', (('place', 'x'),))
    kept = within([one(NODULE, liver), one(liver), lost], lambda f: f.region == 'chest')
    assert [x.findings for x in kept] == [(NODULE,), ()] and kept[0].kinds == ('nodule',)               # what has no place cannot be ruled out
    r = agreement([[NODULE, liver]], [[NODULE]], scope=lambda f: f.region == 'chest', n=5)
    assert r['lesions']['site']['precision']['value'] == 1

def test_lesions_of_a_text_are_its_clauses():
    text = 'Vài hạch nách hai bên 9 mm. Nốt ở phổi trái 14 mm.'
    assert [(len(x.findings), x.words) for x in read_text(text)] == [(2, 'Vài hạch nách hai bên 9 mm'), (1, 'Nốt ở phổi trái 14 mm')]

# ---------------------------------------------------------------- the benchmark

def test_the_halves_are_fixed_disjoint_and_complete():
    ids = [f'patient_{i}' for i in range(31)]
    a = benchmark.halves(ids)
    assert a == benchmark.halves(ids[::-1]) and len(a['tuned']) == 15 and a['tuned'] | a['held out'] == set(ids) and not a['tuned'] & a['held out'] and a != benchmark.halves(ids, 1)

def test_the_benchmark_writes_numbers_only(tmp_path, capsys):
    secret = 'Nốt Zyx ở phổi trái 14 mm, tăng chuyển hóa FDG (SUVmax: 6,1). Khối ở gan 30 mm.'
    pairs = [{'patient_id': f'p{i}', 'ground_truth': secret, 'extracted_ground_truth': [entry('14 mm', 'Nốt', 'phổi trái', '6.1', 'Có tăng'), entry(place='wvu')]*(i > 0)} for i in range(4)]
    (tmp_path/'pairs.json').write_text(json.dumps(pairs)); (tmp_path/'expert_lesions.json').write_text(json.dumps({'p1': [entry('14 mm', 'Nốt', 'phổi trái', 6.1, 'Cao')], 'p9': []}))
    run = lambda *args: benchmark.main(['--data', str(tmp_path), '--out', str(tmp_path/'out.json'), '-n', '20', *args])
    run('--dump', str(tmp_path/'then.json')); run('--before', str(tmp_path/'then.json'))
    made = json.loads((tmp_path/'out.json').read_text()); text = json.dumps(made, ensure_ascii=False).lower()
    assert not any(w in text for w in ('zyx', 'wvu', 'phổi', 'p1"')) and 'zyx' not in capsys.readouterr().out.lower()
    assert made['lists'] == {'experts': 1, 'model': 3, 'model, empty': 1} and 'zyx' not in (tmp_path/'then.json').read_text().lower()
    now, before = (made['comparisons'][f'{who}, model']['whole body']['all'] for who in ('parser', 'before'))
    assert now == before and now['unmapped'] == {'place': 3} and now['lesions']['all']['recall']['value'] == .5
    assert made['comparisons']['parser, experts']['chest']['all']['lesions']['all']['f1']['value'] == 1
    run('--show')
    assert 'wvu' in capsys.readouterr().out and json.loads((tmp_path/'out.json').read_text()) == made

# ---------------------------------------------------------------- real reports

@pytest.mark.skipif(not REAL.exists(), reason='real reports (../shared/data/reports_vi) are not here')
def test_real_reports_are_read_as_people_read_them():
    texts, experts, model = benchmark.load(REAL)
    both = lambda lists: zip(*((texts[i], lists[i]) for i in sorted(texts) if lists.get(i)))
    chest, whole = agreement(*both(experts), scope=benchmark.SCOPES['chest'], n=50), agreement(*both(model), n=50)
    assert chest['reports'] == 7 and chest['lesions']['type_site']['recall']['value'] > .85 and chest['findings']['site']['f1']['value'] > .8
    assert whole['reports'] == 41 and whole['lesions']['type_site']['recall']['value'] > .85 and whole['findings']['type_site']['f1']['value'] > .73
    assert whole['errors']['unmapped'] < .06*whole['counts']['lesions_there'] and chest['errors']['unmapped'] == 0
    everyone = read_list([e for entries in experts.values() for e in entries])
    assert len(everyone) == 99 and sum(bool(x.unmapped) for x in everyone) <= 2
