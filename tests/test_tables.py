"Published tables against the paper's text; measured rows from results.json to paper, with their origin."
import json, re
from pathlib import Path
import numpy as np, pandas as pd, pytest
from petvlm import tables
from petvlm.facts import FactError, judge, judge_choices, judge_retrieval, paired_bootstrap, present, statistic_of, sums_of
from petvlm.findings import Finding
from petvlm.metrics import MetricError
from petvlm.retrieval import hits
from petvlm.paper import blocks, printed, to_latex, to_markdown, write_table
from petvlm.tables import FACTS, LABELS, LEVEL, RESULT, SHOWN, TABLES, TableError, compare, difference, load_published, load_results, make_table, rows_of, status

# section 4.2 of the paper, in the order BLEU-4, ROUGE-1, ROUGE-L, BERTScore; the text's ROUGE-1 of no_fusion is the known misprint
TEXT = {'vipet': (55.70, 78.63, 72.04, 89.74), 'no_fusion_no_reg': (53.30, 77.79, 68.60, 88.35), 'no_fusion': (54.02, 77.80, 70.58, 88.36), 'no_reg': (53.72, 77.86, 69.11, 88.44)}
DIFF = {'vipet_table1': (3.1, .9, 2.1, 1.5), 'vipet_table2': (.9, 1.3, 5.4, .9)}
SCORES = ['bleu4', 'rouge1', 'rougeL', 'bertscore']

def test_table_1_says_what_the_text_says_but_for_the_noted_misprint():
    table = load_published('vipet_table1')
    differ = {(row, m) for row, values in TEXT.items() for m, v in zip(SCORES, values) if table.loc[row, m] != v}
    assert differ == {('no_fusion', 'rouge1')} and any('77.80' in n and '77.92' in n for n in table.attrs['notes'])

@pytest.mark.parametrize('name', DIFF)
def test_typed_numbers_give_the_papers_row_diff(name):
    "A slip of the finger in the best or second best row would break the paper's own gains, which are relative to the second best."
    scores = load_published(name)[SCORES].dropna()
    ours, second = scores.loc['vipet'], scores.drop('vipet').max()
    assert tuple((100 * (ours / second - 1)).round(1)) == DIFF[name]

CONTROLS = {'constant', 'shuffled', 'noise'}

@pytest.mark.parametrize('name', TABLES)
def test_rows_compare_with_rows_and_say_what_they_need(name):
    table = load_published(name)
    full, controls = table.attrs['full'], [r for r in table.index if table.loc[r, table.attrs['metrics']].isna().all()]
    assert table.index.is_unique and full in table.index and table['needs'].str.len().gt(0).all() and table['model'].is_unique
    assert set(table['against']) <= set(table.index) and (table['against'] != table.index).all() and set(table.drop(full)['against']) == {full}
    assert all(table.loc[c, 'needs'] == f'arm {c} of point {full}' for c in controls)
    expected = set() if table.attrs['task'] == 'retrieval' else CONTROLS | ({'ct_shuffled', 'pet_only', 'ct_only'} if full in ('vipet', 'petar') else set()) | ({'measured'} if name == 'petar_table1' else set())
    assert set(controls) == expected and all(table.loc[table.loc[r, 'against'], 'needs'] for r in table.index)

@pytest.mark.parametrize('name', TABLES)
def test_the_header_of_a_published_table_is_complete(name):
    table = load_published(name)
    assert {'title', 'task', 'full', 'metrics', 'decimals', 'notes'} <= set(table.attrs) and table.attrs['task'] in RESULT['properties']['task']['enum'] and table.attrs['notes']
    scores = table[table.attrs['metrics']]
    assert scores.max().max() <= 100 and scores.min().min() > 0 and set(table.attrs['metrics']) <= set(SHOWN) and len({LABELS[m] for m in SHOWN}) == len(SHOWN)

def test_every_table_of_the_four_papers_is_there():
    tasks = {name: load_published(name).attrs['task'] for name in TABLES}
    assert tasks == {'content_topic_table1': 'report', 'petar_table1': 'report', 'petar_table2': 'report', 'vipet_table1': 'report', 'vipet_table2': 'vqa'} | {
        f'med3dvlm_table{i}': t for i, t in enumerate(('retrieval', 'report', 'open_vqa', 'closed_vqa', 'retrieval', 'report', 'open_vqa', 'closed_vqa'), 1)}

def test_a_file_whose_columns_are_not_those_announced_is_refused(tmp_path, monkeypatch):
    (tmp_path/'bad.csv').write_text('# title: x\n# task: report\n# full: a\n# metrics: bleu1, bleu4\nrow,model,bleu4,bleu1,against,needs\na,A,1,2,a,x\n')
    monkeypatch.setattr(tables, 'PUBLISHED', tmp_path)
    with pytest.raises(TableError, match='"# metrics:" line asks for'): load_published('bad')

# --- typed numbers against the papers

PAPERS = Path(__file__).parents[2]/'shared/papers'
def lines(paper, start):
    "The lines of a paper's text from `start` on, each as its cells; the numbers of a line are its last cells."
    path = PAPERS/f'{paper}.txt'
    if not path.is_file(): pytest.skip(f'{path} is not beside the checkout')
    text = path.read_text(encoding='utf-8')
    assert text.count(start) == 1
    return [[c.strip() for c in line.split('\t')] for line in text[text.index(start):].splitlines()[1:30]]
def numbers(cells): return [float(c) for c in cells if re.fullmatch(r'\d+(\.\d+)?', c)]

@pytest.mark.parametrize('table', [1, 5])
def test_retrieval_tables_are_the_papers(table):
    published = load_published(f'med3dvlm_table{table}')
    found = [numbers(c) for c in lines('med3dvlm', f'Table {table}:') if any(x.startswith('R@') for x in c)][:6]
    order = [f'{d}.r{k}' for d in ('ir', 'tr') for k in (1, 5, 10)]
    for prefix, row in zip(order, found, strict=True): assert row == [v for r in published.index for v in published.loc[r, [f'{prefix}.n{n}' for n in (100, 500, 1000, 2000)]]]

@pytest.mark.parametrize('table', [3, 7])
def test_open_vqa_tables_are_the_papers(table):
    published = load_published(f'med3dvlm_table{table}')
    real = published.dropna(subset=published.attrs['metrics'])
    found = [numbers(c) for c in lines('med3dvlm', f'Table {table}:') if c[1:2] in (['BLEU'], ['ROUGE'], ['METEOR'], ['BERTScore'])][:4*len(real)]
    typed = [real.loc[r, [f'{g}.{m}' for g in ('plane', 'phase', 'organ', 'abnormality', 'location', 'mean')]].tolist() for r in real.index for m in ('bleu1', 'rouge1', 'meteor', 'bertscore')]
    assert found == typed

@pytest.mark.parametrize('table', [2, 4, 6, 8])
def test_plain_tables_are_the_papers(table):
    published = load_published(f'med3dvlm_table{table}')
    real = published.dropna(subset=published.attrs['metrics'])
    found = [numbers(c) for c in lines('med3dvlm', f'Table {table}:')]
    assert [f for f in found if len(f) == len(published.attrs['metrics'])][:len(real)] == real[published.attrs['metrics']].to_numpy().tolist()

def test_the_x_ray_table_is_the_papers():
    published = load_published('content_topic_table1')
    found = [c[1:] for c in lines('content-topic', '<Table 1>') if c[0].startswith(('BLEU', 'METEOR', 'ROUGE', 'CID')) and len(c) == 4]
    for metric, row in zip(published.attrs['metrics'], found, strict=True):
        assert published.loc[['r2gen', 'r2gengpt', 'content_topic'], metric].tolist() == pytest.approx([np.nan if v == '-' else 100*float(v) for v in row], nan_ok=True)

def test_petar_tables_are_the_papers():
    words = [re.findall(r'(?<![\w-])\d\.\d{3}', ' '.join(c)) for start in ('Model BLEU ROUGE-L', 'Mask CT Focal TS') for c in lines('petar', start)[:4]]
    for name, found in (('petar_table1', words[:4]), ('petar_table2', words[4:])):
        published = load_published(name)
        real = published.dropna(subset=published.attrs['metrics'])[published.attrs['metrics']]
        assert np.allclose(real.to_numpy(), 100*np.array(found, float))

@pytest.mark.parametrize('a,b', [(1, 5), (2, 6), (3, 7), (4, 8)])
def test_the_full_system_has_the_same_numbers_in_both_tables(a, b):
    one, other = (load_published(f'med3dvlm_table{i}') for i in (a, b))
    assert one.attrs['metrics'] == other.attrs['metrics'] and one.loc['med3dvlm', one.attrs['metrics']].equals(other.loc['med3dvlm', other.attrs['metrics']])

@pytest.mark.parametrize('table', [3, 4, 7, 8])
def test_printed_means_are_means_of_the_five_categories(table):
    published = load_published(f'med3dvlm_table{table}')
    for kind in dict.fromkeys(m.split('.')[1] for m in published.attrs['metrics']):
        parts = published[[f'{g}.{kind}' for g in ('plane', 'phase', 'organ', 'abnormality', 'location')]].mean(axis=1)
        assert (parts - published[f'mean.{kind}']).abs().dropna().max() < .011

def test_gains_named_in_the_text():
    gain = lambda table, metric: 100*(load_published(table).loc['med3dvlm', metric]/load_published(table).loc['m3d_lamed_mlp', metric] - 1)
    assert round(gain('med3dvlm_table3', 'mean.meteor'), 1) == 9.5 and round(gain('med3dvlm_table4', 'mean.accuracy'), 1) == 5.2

def test_known_contradictions_are_noted():
    petar, ablation = load_published('petar_table1'), load_published('petar_table2')
    assert ablation.loc['petar_none', ['bleu1', 'cider', 'green']].tolist() == petar.loc['m3d_rad', ['bleu1', 'cider', 'green']].tolist()
    assert ablation.loc['petar', ['bleu1', 'cider', 'green']].tolist() == petar.loc['petar', ['bleu1', 'cider', 'green']].tolist()
    said = {name: ' '.join(load_published(name).attrs['notes']) for name in TABLES}
    assert 'METEOR 0.22' in said['content_topic_table1'] and '7,470 images' in said['content_topic_table1'] and 'Inferred' in said['petar_table2']
    assert all('wrong way round' in said[f'med3dvlm_table{i}'] for i in (1, 5)) and all('BLEU-1 and ROUGE-1 of each sample' in said[f'med3dvlm_table{i}'] for i in (2, 3, 6, 7))

def result(point='vipet', arm='real', right=.9, task='report', seed=0, facts=True, **kw):
    n = 60
    truth = [[Finding('lung', 'left', 'nodule', 10. + i, 5., 'increased')] for i in range(n)]
    texts = [f'Nốt mờ ở phổi trái, kích thước {10 + i} mm, tăng chuyển hóa FDG.' for i in range(n)]
    hit = np.random.default_rng(seed).random(n) < right
    said = [t if h else 'Không thấy tổn thương tăng chuyển hóa FDG.' for t, h in zip(texts, hit)]
    found = ([f if h else [] for f, h in zip(truth, hit)], truth) if facts else ()
    scores = judge(said, texts, [f'p{i // 3}' for i in range(n)], *found, metrics=('bleu4', 'rouge1', 'rougeL'), n=300)
    return {'point': point, 'task': task, 'arm': arm, **scores, 'provenance': {'run': f'{point}-{arm}', 'data_hash': 'd', 'params_hash': 'p', 'revision': 'r'}, **kw}

@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "Results as the evaluation writes them: one file per point."
    folder = tmp_path_factory.mktemp('evaluate')
    points = {'vipet': [result(), result(arm='shuffled', right=.1), result(arm='noise', right=0), result(arm='constant', right=0), result(task='vqa', facts=False)],
              'no_reg': [result('no_reg', right=.5), result('no_reg', 'shuffled', right=.1)], 'no_fusion_no_reg': [result('no_fusion_no_reg', right=.9, seed=1)]}
    for point, found in points.items():
        (folder / point).mkdir()
        (folder / point / 'results.json').write_text(json.dumps(found, allow_nan=False))
    return folder

@pytest.fixture(scope='module')
def table(written): return make_table('vipet_table1', rows_of(load_results(written), 'report'), n=300)

def test_every_measured_cell_leads_to_its_file_and_run(written, table):
    measured = table[table['BLEU-4 measured'].notna()]
    assert list(measured.index) == ['no_fusion_no_reg', 'no_reg', 'vipet', 'constant', 'shuffled', 'noise']
    for row in measured.itertuples():
        source = json.loads((written / row.file).read_text())
        mine = next(r for r in source if (r['point'], r['arm'], r['task']) == (row.point, row.arm, 'report'))
        assert mine['provenance']['run'] == row.run and mine['metrics']['bleu4']['value'] == measured.loc[row.Index, 'BLEU-4 measured']

def test_statuses(table):
    assert table.loc['no_reg', 'status'] == 'reproduced-direction'
    assert table.loc['no_fusion_no_reg', 'status'] == 'within noise'
    assert table.loc['no_fusion', 'status'] == 'not run: needs results of point no_fusion'
    assert table.loc['llava_med', 'status'].startswith('not run: needs point llava_med')
    assert all(table.loc[r, 'status'] == 'control: below the full model (Finding F1)' for r in ('constant', 'shuffled', 'noise'))

def test_rows_that_were_not_run_hold_no_measured_number(table):
    idle = table[table['status'].str.startswith('not run')]
    assert idle[[c for c in table if c.endswith((' measured', ' low', ' high')) or c in ('n', 'run', 'file')]].isna().all(axis=None)

def test_pairing_sees_what_independent_intervals_cannot():
    a, b = result(right=.9), result('no_reg', right=.8)
    bare = [{k: v for k, v in r.items() if k != 'per_patient'} for r in (a, b)]
    paired, loose = difference(a, b, 'rouge1', 300), difference(*bare, 'rouge1')
    assert paired.d == pytest.approx(loose.d) and paired.hi - paired.lo < loose.hi - loose.lo and paired.p <= loose.p < LEVEL
    assert status(1., paired) == 'reproduced-direction' and status(-1., paired) == 'not reproduced' and status(1., difference(a, a, 'rouge1', 300)) == 'within noise'
    assert difference(bare[0], bare[0], 'rouge1').p == 1 and status(1., paired, p=.2) == 'within noise'

def test_p_of_independent_intervals_is_the_normal_one():
    "Two values a unit apart, each known to +- 1: deviation of the difference sqrt(2)/1.96, so z = 1.386 and p = 0.166."
    one, other = ({'metrics': {'rouge1': {'value': v, 'lo': v - 1, 'hi': v + 1}}} for v in (50., 49.))
    assert difference(one, other, 'rouge1') == pytest.approx((1, 1 - 2**.5, 1 + 2**.5, .1658), abs=2e-4)

def made_of(differences: dict) -> tuple:
    "A published table and results without per-patient sums whose p-values are known: full model 50, the rows below it."
    published = pd.DataFrame({'bleu1': {r: 10. for r in differences} | {'full': 20.}, 'against': {r: 'full' for r in differences} | {'full': next(iter(differences))}})
    published.attrs = {'metrics': ['bleu1']}
    at = lambda v: {'metrics': {'bleu1': {'value': v, 'lo': v - 1, 'hi': v + 1}}}
    return published, {'full': at(50.)} | {r: at(50. - d) for r, d in differences.items()}

def test_rows_of_a_table_are_adjusted_together_and_a_shared_pair_counts_once():
    "d = 1.6 alone has z = 2.217, p = 0.0266; with another row without a difference Holm doubles it, since the pair of the full row and `a` is one pair."
    published, results = made_of({'a': 1.6, 'b': 0.})
    found = compare(published, results)
    assert found['a']['bleu1'].found.p == pytest.approx(.0266, abs=2e-4) and found['a']['bleu1'].p == pytest.approx(2*found['a']['bleu1'].found.p)
    assert found['full']['bleu1'].p == found['a']['bleu1'].p and found['full']['bleu1'].found.d == -found['a']['bleu1'].found.d
    alone = compare(*made_of({'a': 1.6}))
    assert alone['a']['bleu1'].p == alone['a']['bleu1'].found.p < LEVEL < found['a']['bleu1'].p

def test_a_metric_that_disagrees_is_named():
    full, part = result(right=.9), result('no_reg', right=.5)
    for key in ('bleu4', 'rouge1'): full['per_patient'][key], part['per_patient'][key] = part['per_patient'][key], full['per_patient'][key]
    assert make_table('vipet_table1', {'vipet': full, 'no_reg': part}, n=300).loc['no_reg', 'status'] == 'not reproduced (BLEU-4, ROUGE-1); reproduced-direction (ROUGE-L)'

def test_a_table_of_nothing_still_stands():
    table = make_table('vipet_table2', {})
    assert table['status'].str.startswith('not run: needs').all() and not any('Finding' in c for c in table)
    assert 'nothing is measured yet' in to_markdown(table)

def test_writers(table, tmp_path):
    paths = write_table(table, tmp_path / 'tables')
    assert [p.suffix for p in paths] == ['.csv', '.md', '.tex']
    pd.testing.assert_series_equal(pd.read_csv(paths[0], index_col='row')['ROUGE-L high'], table['ROUGE-L high'])
    md, tex = paths[1].read_text(), paths[2].read_text()
    assert 'Tokenizer of the measured BLEU and ROUGE: unicode' in md and 'vipet-shuffled' in md and 'Misprint' in md
    rows = [line for line in md.splitlines() if line.startswith('|')]
    assert len(rows) == len(table) + 2 and len({r.count('|') for r in rows}) == 1
    body = [line for line in tex.splitlines() if line.endswith(r'\\')]
    assert len(body) == len(table) + 1 and len({line.replace(r'\&', '').count('&') for line in body}) == 1
    assert r'vipet\_table1' not in tex.split('caption')[0] and '%' not in tex.replace(r'\%', '').replace('{%\n', '')

def test_hostile_text_is_escaped(table):
    bad = table.copy()
    bad.attrs = table.attrs
    bad.loc['vipet', 'run'] = r'a|b_c&d%\input{x}'
    assert r'a\|b_c' in to_markdown(bad) and r'a|b\_c\&d\%\textbackslash{}input\{x\}' in to_latex(bad)

def test_printed_cells(table):
    cells = printed(table)
    assert cells.loc['radfm_pet', 'BLEU-4'] == '0.06 / –' and cells.loc['constant', 'BLEU-4'].startswith('– / ') and '[' in cells.loc['vipet', 'BLEU-4']
    assert set(table.attrs['metrics']) <= set(LABELS)

def test_refusals(written, tmp_path):
    with pytest.raises(TableError, match='no published table'): load_published('table3')
    with pytest.raises(TableError, match='no rows'): make_table('vipet_table2', {'radfm': result()})
    with pytest.raises(TableError, match='two results for row'): rows_of([result(), result()], 'report')
    with pytest.raises(TableError, match='different tokenizers'): make_table('vipet_table1', {'vipet': result(), 'no_reg': result('no_reg', tokenizer='13a')})
    named = lambda variant: {'variants': {'meteor': f'METEOR ({variant})'}}
    rows = {p: result(p) | named(v) for p, v in (('petar', 'exact+stem'), ('m3d_rad', 'exact+stem+synonyms'))}
    assert 'the measured METEOR (exact+stem)' in make_table('petar_table1', {'petar': rows['petar']}).attrs['caption']
    with pytest.raises(TableError, match='different variants'): make_table('petar_table1', rows)
    (tmp_path / 'results.json').write_text('[{"point": "vipet"}]')
    with pytest.raises(TableError, match='results.json'): load_results(tmp_path)

# --- categories, choices, retrieval

TEXTS = [f'nốt mờ ở phổi {"trái" if i % 3 else "phải"} {10 + i} mm' for i in range(48)]
SAID = [x if i % 4 else 'không rõ' for i, x in enumerate(TEXTS)]

def test_a_group_judged_with_others_is_the_group_judged_alone():
    "Value and interval, though half of the patients were never asked for the size."
    patients, groups = [f'p{i // 2}' for i in range(48)], ['size' if i < 20 else 'plane' if i % 2 else 'organ' for i in range(48)]
    all_of_them, metrics = judge(SAID, TEXTS, patients, metrics=('bleu1', 'rouge1'), n=300, groups=groups), ('bleu1', 'rouge1')
    for g in ('size', 'plane', 'organ'):
        rows = [i for i in range(48) if groups[i] == g]
        alone = judge([SAID[i] for i in rows], [TEXTS[i] for i in rows], [patients[i] for i in rows], metrics=metrics, n=300)
        for m in metrics: assert all_of_them['metrics'][f'{g}.{m}'] == pytest.approx(alone['metrics'][m])
    for m in metrics: assert all_of_them['metrics'][f'mean.{m}'] == all_of_them['metrics'][m]
    assert present(sums_of('size.bleu1', all_of_them['per_patient'])).sum() == 10 and len(all_of_them['per_patient']['size.bleu1']) == 24

def test_groups_change_nothing_of_the_whole_and_fit_the_schema(tmp_path):
    facts = [[Finding('lung', 'left', 'nodule', 10. + i, 5., 'increased')] for i in range(48)]
    kw = dict(patients=[f'p{i // 2}' for i in range(48)], predicted=[f if i % 4 else [] for i, f in enumerate(facts)], truth=facts, metrics=('rouge1',), n=100)
    bare, grouped = judge(SAID, TEXTS, **kw), judge(SAID, TEXTS, **kw, groups=['odd' if i % 2 else 'even' for i in range(48)])
    assert {m: grouped['metrics'][m] for m in bare['metrics']} == bare['metrics'] and {k: grouped['per_patient'][k] for k in bare['per_patient']} == bare['per_patient']
    assert grouped['metrics']['odd.finding_f1']['value'] == 1 and grouped['metrics']['even.finding_recall']['value'] == .5
    (tmp_path/'results.json').write_text(json.dumps([{'point': 'a', 'task': t, 'arm': 'real', **grouped, 'provenance': {k: 'x' for k in ('run', 'data_hash', 'params_hash', 'revision')}} for t in ('open_vqa', 'closed_vqa', 'retrieval')], allow_nan=False))
    assert len(load_results(tmp_path)) == 3

def test_choices_by_category():
    correct, groups = [True, False, True, True], ['plane', 'plane', 'organ', 'organ']
    found = judge_choices(correct, ['a', 'b', 'a', 'a'], groups, n=100)
    assert {m: e['value'] for m, e in found['metrics'].items()} == {'plane.accuracy': 50, 'organ.accuracy': 100, 'mean.accuracy': 75}
    assert found['per_patient'] == {'patients': ['a', 'b'], 'plane.accuracy': [[1, 1], [0, 1]], 'organ.accuracy': [[2, 2], [0, 0]], 'mean.accuracy': [[3, 3], [0, 1]]} and found['n_patients'] == 2

def test_retrieval_of_a_known_matrix():
    "Three images (rows) and texts (columns): text 0 fits image 1 better than its own; image 2 cannot tell its texts apart."
    s = np.array([[.8, .1, .1], [.9, .95, .2], [.3, .3, .3]])
    found = judge_retrieval(s, ['a', 'b', 'b'], sizes=(3, 100), ks=(1, 2), n=100)
    assert {m: round(e['value'], 6) for m, e in found['metrics'].items()} == {'ir.r1.n3': round(200/3, 6), 'ir.r2.n3': 100, 'tr.r1.n3': round(100*(1 + 1 + 1/3)/3, 6), 'tr.r2.n3': round(100*(2 + 2/3)/3, 6)}
    assert np.allclose(found['per_patient']['tr.r1.n3'], [[1, 1], [4/3, 2]]) and found['n'] == 3

def test_retrieval_of_smaller_sets_keeps_sums_and_falls_with_size():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(40, 5)); s = image @ (image + rng.normal(size=(40, 5))).T
    found = judge_retrieval(s, [f'p{i // 2}' for i in range(40)], sizes=(10, 40), ks=(1,), n=100, repeats=30)
    value = {m: e['value'] for m, e in found['metrics'].items()}
    assert value['ir.r1.n40'] == pytest.approx(100*hits(s.T, 1).mean()) and value['tr.r1.n40'] == pytest.approx(100*hits(s, 1).mean()) and value['ir.r1.n10'] > value['ir.r1.n40']
    for m, e in found['metrics'].items(): assert statistic_of(m)(sums_of(m, found['per_patient']).sum(0)) == pytest.approx(e['value'])
    assert judge_retrieval(s, [f'p{i // 2}' for i in range(40)], sizes=(10, 40), ks=(1,), n=100, repeats=30) == found
    alone = judge_retrieval(s, list(map(str, range(40))), sizes=(39,), ks=(1,), n=10, repeats=1)       # one pair is in no draw: it has no sums
    assert (~present(sums_of('ir.r1.n39', alone['per_patient']))).sum() == 1
    chance = judge_retrieval(np.ones((40, 40)), ['p'] * 40, sizes=(20,), ks=(5,), n=10)['metrics']
    assert chance['ir.r5.n20']['value'] == pytest.approx(25)

@pytest.mark.parametrize('call', [lambda: judge(['a'], ['a'], ['p'], metrics=('rouge1',), groups=['x', 'y']), lambda: judge(['a'], ['a'], ['p'], metrics=('rouge1',), groups=['mean']),
                                  lambda: judge_choices([True], ['p'], ['a.b']), lambda: judge_choices([.5], ['p'], ['a']), lambda: judge_choices([], [], []),
                                  lambda: judge_retrieval(np.ones((3, 3)), ['p'] * 3, sizes=(100,)), lambda: judge_retrieval(np.ones((3, 3)), ['p'] * 2, sizes=(3,)),
                                  lambda: statistic_of('organ.bleu9'), lambda: statistic_of('ir.n100'), lambda: statistic_of('n100'), lambda: sums_of('organ.rouge1', {'patients': [], 'rouge1': []})])
def test_judges_refuse(call):
    with pytest.raises(FactError): call()

def test_a_matrix_that_cannot_be_ranked_is_refused():
    with pytest.raises(MetricError, match='not finite'): judge_retrieval(np.full((3, 3), np.nan), ['p'] * 3, sizes=(3,))

# --- tables of other systems

def wrap(point, task, scores, arm='real'): return {'point': point, 'task': task, 'arm': arm, **scores, 'provenance': {'run': f'{point}-{arm}', 'data_hash': 'd', 'params_hash': 'p', 'revision': 'r'}}
def retrieved(point, noise, sizes=(20, 60)):
    image = np.random.default_rng(5).normal(size=(60, 8)); text = image + noise*np.random.default_rng(6).normal(size=image.shape)
    found = judge_retrieval(image @ text.T, [f'p{i // 2}' for i in range(60)], sizes=sizes, n=200)
    renamed = lambda d: {k.replace('n20', 'n100'): v for k, v in d.items()}     # as if a hundred pairs had been drawn
    return wrap(point, 'retrieval', found | {'metrics': renamed(found['metrics']), 'per_patient': renamed(found['per_patient'])})
def chosen(point, right, arm='real'): return wrap(point, 'closed_vqa', judge_choices(np.random.default_rng(2).random(150) < right, [f'p{i // 5}' for i in range(150)], [('plane', 'phase', 'organ', 'abnormality', 'location')[i % 5] for i in range(150)], n=200), arm)
def answered(point, every, arm='real'):
    said = [x if i % every else 'không rõ' for i, x in enumerate(TEXTS)]
    return wrap(point, 'open_vqa', judge(said, TEXTS, [f'p{i // 4}' for i in range(48)], metrics=('bleu1', 'rouge1'), groups=[('plane', 'size')[i % 2] for i in range(48)], n=200), arm)

@pytest.fixture(scope='module')
def everything(): return [retrieved('med3dvlm', .3), retrieved('vit3d_clip', 1.5), retrieved('m3d_clip', .3), chosen('med3dvlm', .9), chosen('m3d_lamed_mlp', .4), chosen('med3dvlm', .2, 'shuffled'),
                          chosen('vipet', .9, 'shuffled'), answered('med3dvlm', 7), answered('project_2xmlp', 2), answered('med3dvlm', 1, 'noise'), result(), result('no_reg', right=.5)]

@pytest.mark.parametrize('name', TABLES)
def test_every_table_is_made_of_all_results(name, everything, tmp_path):
    "Results of other systems and tasks are no error; every row is either measured or says what it needs."
    table = make_table(name, everything, n=200)
    paths, needed = write_table(table, tmp_path), load_published(name)['needs']
    for row in table.index: assert (table.loc[row, 'status'] == f'not run: needs {needed[row]}') == pd.isna(table.loc[row, 'n']), row
    assert all(p.stat().st_size > 500 for p in paths) and len(pd.read_csv(paths[0])) == len(table)

def test_retrieval_rows(everything):
    table = make_table('med3dvlm_table5', everything, n=200)
    assert table.loc['vit3d_clip', 'status'] == table.loc['med3dvlm', 'status'] == 'reproduced-direction' and table.loc['dcformer_clip', 'status'].endswith('results of point dcformer_clip')
    assert table.loc['med3dvlm', 'IR R@1 n=60 measured'] == everything[0]['metrics']['ir.r1.n60']['value'] and 'IR R@1 n=60 published' not in table
    assert table.attrs['metrics'][:5] == ['ir.r1.n60', 'ir.r1.n100', 'ir.r1.n500', 'ir.r1.n1000', 'ir.r1.n2000'] and 'Tokenizer' not in table.attrs['caption']
    assert 'to the variant with ViT3D and the CLIP loss' in table.attrs['caption']

def test_a_tie_of_the_paper_has_no_direction(everything):
    "R@5 at 100 is 95.00 for both in table 1: it neither holds nor fails."
    table = make_table('med3dvlm_table1', everything, n=200)
    assert 'R@5' not in table.loc['m3d_clip', 'status'] and table.loc['m3d_clip', 'status'] == 'within noise'
    assert 'R@5' not in make_table('med3dvlm_table1', [everything[0], retrieved('m3d_clip', 2.)], n=200).loc['m3d_clip', 'status']

def test_choices_and_their_controls(everything):
    table = make_table('med3dvlm_table4', everything, n=200)
    assert table.loc['m3d_lamed_mlp', 'status'] == 'reproduced-direction' and table.loc['shuffled', 'status'] == 'control: below the full model (Mean accuracy)'
    assert make_table('med3dvlm_table8', everything, n=200).loc['med3dvlm', 'status'] == 'not compared: needs results of point project_2xmlp'

def test_categories_of_the_phantom_stand_beside_the_papers_and_the_mean_last(everything):
    table = make_table('med3dvlm_table7', everything, n=200)
    assert list(blocks(table)) == ['Plane', 'Phase', 'Organ', 'Abnormality', 'Location', 'Size', 'Mean', 'Status']
    assert list(blocks(table)['Size'].columns) == ['Model', 'BLEU-1', 'ROUGE-1'] and list(blocks(table)['Size'].index) == ['project_2xmlp', 'med3dvlm', 'noise']
    assert table.loc['noise', 'status'] == 'control: below the full model (Mean BLEU-1)' and table.loc['project_2xmlp', 'status'] == 'reproduced-direction'

def test_a_paired_difference_of_a_category_is_over_the_patients_that_have_it():
    patients, groups = [f'p{i // 2}' for i in range(48)], ['size' if i < 20 else 'plane' for i in range(48)]
    a, b = ({'per_patient': judge(s, TEXTS, patients, metrics=('bleu1',), n=50, groups=groups)['per_patient']} for s in (TEXTS, SAID))
    alone = [judge(s[:20], TEXTS[:20], patients[:20], metrics=('bleu1',), n=50)['per_patient']['bleu1'] for s in (TEXTS, SAID)]
    expected = paired_bootstrap(*map(np.array, alone), statistic_of('bleu1'), 200)
    assert difference(a, b, 'size.bleu1', 200) == pytest.approx(tuple(expected[k] for k in ('difference', 'lo', 'hi', 'p')))

def test_many_metrics_are_counted_in_the_status(everything):
    published = load_published('med3dvlm_table5')
    metrics = {m: {'value': 50. if i % 3 else 10., 'lo': 49. if i % 3 else 9., 'hi': 51. if i % 3 else 11.} for i, m in enumerate(published.attrs['metrics'])}
    other = {m: {'value': 20., 'lo': 19., 'hi': 21.} for m in metrics}
    status_ = make_table('med3dvlm_table5', [wrap('med3dvlm', 'retrieval', {'n': 2000, 'n_patients': 2000, 'metrics': metrics}), wrap('vit3d_clip', 'retrieval', {'n': 2000, 'n_patients': 2000, 'metrics': other})]).loc['vit3d_clip', 'status']
    compared = [i for i, m in enumerate(metrics) if published.loc['med3dvlm', m] > published.loc['vit3d_clip', m]]
    right, of = sum(i % 3 > 0 for i in compared), len(compared)
    assert of == 24 and status_ == f'not reproduced ({of - right} of {of} metrics); reproduced-direction ({right} of {of} metrics)'

@pytest.mark.parametrize('name', ['med3dvlm_table5', 'med3dvlm_table7', 'petar_table1'])
def test_pieces_of_a_printed_table_are_rectangular(name, everything):
    table = make_table(name, everything, n=200)
    tex, md = to_latex(table).splitlines(), to_markdown(table).splitlines()
    assert sum(x.startswith(r'\begin{tabular}') for x in tex) == sum(x.startswith(r'\end{tabular}') for x in tex) == sum(x.startswith('| Model') for x in md) == len(blocks(table))
    starts = [i for i, x in enumerate(tex) if x.startswith(r'\begin{tabular}')]
    for i in starts:
        columns, body = re.search(r'{tabular}{(\w+)}', tex[i])[1], tex[i + 1:tex.index(r'\end{tabular}}', i)]
        assert {x.replace(r'\&', '').count('&') + 1 for x in body if x.endswith(r'\\')} == {len(columns)}
    assert ''.join(tex).count('{') == ''.join(tex).count('}')

def test_decimals_are_those_of_the_paper():
    assert printed(make_table('petar_table2', {})).loc['petar', 'CIDEr'] == '45.7 / –' and printed(make_table('med3dvlm_table6', {})).loc['med3dvlm', 'METEOR'] == '36.42 / –'

def test_two_results_of_one_row_are_refused_but_only_of_the_tables_rows(everything):
    with pytest.raises(TableError, match='two results for row'): make_table('med3dvlm_table4', [*everything, chosen('med3dvlm', .5)])
    assert make_table('vipet_table1', [*everything, chosen('med3dvlm', .5), chosen('other', .5), chosen('other', .5)], n=50).loc['vipet', 'n'] == 60
    assert set(rows_of(everything, 'closed_vqa', 'med3dvlm')) == {'med3dvlm', 'm3d_lamed_mlp', 'shuffled'} and set(rows_of(everything, 'closed_vqa', 'med3dvlm', ['shuffled'])) == {'shuffled'}

def test_names_on_paper():
    assert LABELS['ir.r10.n180'] == 'IR R@10 n=180' and LABELS['size.bleu1'] == 'Size BLEU-1' and LABELS['mean.accuracy'] == 'Mean accuracy' and LABELS['green'] == 'GREEN'
    with pytest.raises(TableError, match='no name on paper'): LABELS['organ.bleu9']
    assert set(FACTS) <= set(LABELS)
