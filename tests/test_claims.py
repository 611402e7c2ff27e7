"Claims and verdicts: each verdict from a made-up result, changed results, many comparisons, hostile texts, and what is committed against what it was made of."
import json, re
from pathlib import Path
import numpy as np, pandas as pd, pytest, yaml
from petvlm.believe import holm
from petvlm.claims import CLAIMS, COLUMNS, ClaimError, claims_markdown, in_print, load_claims, load_papers, needed, plain, read_verdicts, table_markdown, verdicts, write_verdicts
from petvlm.facts import judge, judge_choices
from petvlm.findings import Finding
from petvlm.summary import counts, curves_of, looking, metrics_of, origins, points_of, summary_page, write_summary
from petvlm.paper import write_table
from petvlm.tables import LABELS, TABLES, difference, load_published, make_table, rows_of

ROOT = Path(__file__).parents[1]
ALL = load_claims()
BY_ID = {c['id']: c for c in ALL}
PATIENTS = [f'p{i:02d}' for i in range(60)]

TRUTH = [[Finding('lung', 'left', 'nodule', 10. + i, None, 'increased')] for i in range(60)]
TEXTS = [f'A nodule in the left lung, {10 + i} mm, hypermetabolic.' for i in range(60)]

def wrap(point, arm, task, scores, revision='r1'):
    return {'point': point, 'task': task, 'arm': arm, **scores, 'file': f'runs/x/{point}/results.json', 'provenance': {'run': f'{point}.last', 'data_hash': 'd1', 'params_hash': 'p1', 'revision': revision}}

def right(share, seed=0): return np.random.default_rng(seed).random(60) < share     # the same patients first, whatever the share

def result(point, share, arm='real', seed=0, revision='r1'):
    "Reports of sixty patients, that share of them right, the others empty."
    hit = right(share, seed)
    return wrap(point, arm, 'report', judge([t if h else 'Nothing found.' for t, h in zip(TEXTS, hit)], TEXTS, PATIENTS, [f if h else [] for f, h in zip(TRUTH, hit)], TRUTH, metrics=('bleu4',), n=50), revision)

def choices(point, share, arm='real', seed=0): return wrap(point, arm, 'closed_vqa', judge_choices(right(share, seed), PATIENTS, ['plane']*60, n=50))
def own(paper): return [c for c in ALL if c['paper'] == paper]
def one(claim, results, **kw): return verdicts([BY_ID[claim]], results, 300, **kw).loc[claim]

# --- every kind of verdict

@pytest.mark.parametrize('a, b, verdict', [(.9, .4, 'reproduced direction'), (.4, .9, 'not reproduced'), (.6, .6, 'within noise')])
def test_a_comparison_has_the_direction_of_its_difference(a, b, verdict):
    row = one('med3dvlm-closed', [choices('med3dvlm', a), choices('m3d_lamed_mlp', b)])
    assert row['verdict'] == verdict and row['published'] == pytest.approx(79.75 - 75.78) and np.sign(row['measured']) == np.sign(a - b)
    assert 'med3dvlm.last' in row['evidence'] and 'm3d_lamed_mlp.last' in row['evidence'] and 'runs/x/med3dvlm/results.json' in row['evidence']

def test_a_claim_of_less_is_met_by_less():
    lower = BY_ID['med3dvlm-closed'] | {'direction': 'lower'}
    assert verdicts([lower], [choices('med3dvlm', .4), choices('m3d_lamed_mlp', .9)], 300)['verdict'].item() == 'reproduced direction'

@pytest.mark.parametrize('claim, results, verdict', [
    ('med3dvlm-closed', [], 'needs training: point med3dvlm'), ('med3dvlm-closed', [choices('med3dvlm', .9)], 'needs training: point m3d_lamed_mlp'),
    ('med3dvlm-grounded', [result('med3dvlm', .9)], 'needs training: point med3dvlm'),                            # the arm of a point
    ('vipet-m3d', [result('vipet', .9)], 'needs training: point m3d'), ('vipet-gpt4o', [result('vipet', .9)], 'needs endpoint'), ('petar-medgemma', [result('petar', .9)], 'needs weights'),
    ('petar-green', [result('petar', .9), result('petar_none', .2)], 'needs weights'), ('petar-focal', [result('petar_focal', .9), result('petar_none', .2)], 'needs metric: CIDEr'),
    ('med3dvlm-first', [], 'holds in print'), ('med3dvlm-abstract-accuracy', [], 'fails in print'), ('vipet-absolute-gain', [], 'fails in print'), ('vipet-pairs', [], 'holds in print'),
    ('med3dvlm-vit3d', [], 'code differs'), ('vipet-scores', [], 'no public code'), ('petar-data', [], 'needs data'), ('vipet-clinical', [], 'needs physicians'),
    ('content-topic-contrast', [], 'needs training: a point without the contrastive loss')])
def test_the_other_verdicts(claim, results, verdict):
    row = one(claim, results)
    assert row['verdict'] == verdict and row['evidence'] and np.isnan(row['measured'])

def test_needs_in_words_that_nobody_foresaw(): assert needed('a licence from the moon') == 'needs a licence from the moon' and needed('point x moved from offered to points, or its published weights') == 'needs training: point x'

# --- numbers

def test_the_difference_is_that_of_the_tables():
    results = [choices('med3dvlm', .9), choices('m3d_lamed_mlp', .5, seed=3)]
    rows = rows_of(results, 'closed_vqa', 'med3dvlm')
    d = difference(rows['med3dvlm'], rows['m3d_lamed_mlp'], 'mean.accuracy', 300)
    row = one('med3dvlm-closed', results)
    assert (row['measured'], row['low'], row['high'], row['p']) == (d.d, d.lo, d.hi, d.p)
    assert row['measured'] == pytest.approx(100*(right(.9).mean() - right(.5, 3).mean()))

def test_p_is_adjusted_over_the_papers_comparisons_and_only_those():
    results = [result('vipet', .8), result('no_reg', .68), result('no_fusion', .75), result('no_fusion_no_reg', .6), result('petar', .9), result('petar_none', .1)]
    found = verdicts(ALL, results, 300)
    for paper in ('vipet', 'petar'):
        tested = found[(found['paper'] == paper) & found['p'].notna()]
        assert tested['p_holm'].to_dict() == pytest.approx(holm(tested['p'].to_dict())) and len(tested) >= 1
    assert found.loc[found['p'].isna(), 'p_holm'].isna().all()
    alone = verdicts([BY_ID['vipet-reg-fused']], results, 300).loc['vipet-reg-fused']
    assert alone['p_holm'] == alone['p'] < found.loc['vipet-reg-fused', 'p_holm']

def test_holm_can_turn_a_claim_into_noise():
    results = [result('vipet', .8), result('no_reg', .68), result('no_fusion', .75), result('no_fusion_no_reg', .8)]
    alone, among = one('vipet-reg-fused', results), verdicts(own('vipet'), results, 300).loc['vipet-reg-fused']
    assert alone['p'] == among['p'] and among['p_holm'] > alone['p_holm'] and (among['verdict'] == 'within noise') == (among['p_holm'] >= .05)

def test_a_changed_result_changes_the_verdict():
    before = [choices('med3dvlm', .9), choices('m3d_lamed_mlp', .4)]
    after = [choices('med3dvlm', .3), choices('m3d_lamed_mlp', .4)]
    assert one('med3dvlm-closed', before)['verdict'] == 'reproduced direction' and one('med3dvlm-closed', after)['verdict'] == 'not reproduced'

def test_the_same_results_give_the_same_bytes(tmp_path):
    results = [choices('med3dvlm', .9), choices('m3d_lamed_mlp', .4), result('vipet', .7)]
    pages = []
    for k in (1, 2):
        write_summary(verdicts(ALL, results, 300), results, tmp_path/str(k), 'demo', tmp_path/'none')
        pages.append({p.name: p.read_bytes() for p in (tmp_path/str(k)).iterdir()})
    assert pages[0] == pages[1] and set(pages[0]) == {'verdicts.csv', 'summary.md', 'summary.html', 'metrics.json', 'points.csv', 'curves.csv'}

# --- checks of printed numbers, counted by hand

@pytest.mark.parametrize('check, holds, seen', [
    ({'check': 'number', 'table': 'med3dvlm_table4', 'row': 'med3dvlm', 'metric': 'mean.accuracy', 'value': 79.75}, True, 'table: 79.75; text: 79.75'),
    ({'check': 'gain', 'table': 'med3dvlm_table4', 'a': 'med3dvlm', 'b': 'm3d_lamed_mlp', 'metric': 'mean.accuracy', 'value': 5.2, 'relative': True}, True, '3.97 percent points, 5.2 % of the other'),
    ({'check': 'gain', 'table': 'med3dvlm_table4', 'a': 'med3dvlm', 'b': 'm3d_lamed_mlp', 'metric': 'mean.accuracy', 'value': 5.2, 'relative': False}, False, '3.97 percent points, 5.2 % of the other'),
    ({'check': 'grows', 'table': 'med3dvlm_table1', 'a': 'med3dvlm', 'b': 'm3d_clip', 'metrics': ['tr.r1.n100', 'tr.r1.n500', 'tr.r1.n1000', 'tr.r1.n2000']}, True, 'leads: 20.00, 38.00, 44.70, 45.45'),
    ({'check': 'grows', 'table': 'med3dvlm_table1', 'a': 'med3dvlm', 'b': 'm3d_clip', 'metrics': ['ir.r1.n1000', 'ir.r1.n2000']}, False, 'leads: 42.00, 41.90'),
    ({'check': 'best', 'table': 'med3dvlm_table1', 'row': 'med3dvlm', 'metrics': ['ir.r5.n100']}, False, 'IR R@5 n=100: 95.00, M3D-LaMed (M3D-CLIP) 95.00'),       # a tie is no lead
    ({'check': 'best', 'table': 'med3dvlm_table1', 'row': 'med3dvlm', 'metrics': ['ir.r5.n100'], 'among': ['pmc_clip']}, True, 'above 1 rows in 1 metrics'),
    ({'check': 'best', 'table': 'content_topic_table1', 'row': 'content_topic', 'metrics': ['bleu2', 'cider']}, False, 'BLEU-2: 31.4, R2GenGPT 31.6'),
    ({'check': 'sum', 'numbers': [1, 2], 'value': 4}, False, '1 + 2 = 3'), ({'check': 'product', 'numbers': [2757, 3], 'value': 8271}, True, '2,757 x 3 = 8,271')])
def test_what_printed_numbers_say(check, holds, seen): assert in_print(check) == (holds, seen)

# --- the file of claims

def test_claims_are_complete_and_never_hold_a_verdict():
    per = pd.Series([c['paper'] for c in ALL]).value_counts()
    assert set(per.index) == set(load_papers()) and per.between(6, 20).all() and sorted(t for p in load_papers().values() for t in p['tables']) == sorted(TABLES)
    assert not {'verdict', 'measured', 'p'} & set().union(*ALL) and {c['kind'] for c in ALL} == {'comparison', 'value', 'code', 'untestable here'} and 'claims' not in TABLES

def test_printed_differences_have_the_claimed_direction():
    "Where the paper prints both numbers, the claim is the paper's and not ours."
    found = verdicts(ALL, [])
    assert [c['id'] for c in ALL if c['kind'] == 'comparison' and not np.isnan(p := found.loc[c['id'], 'published']) and not p > 0] == []

def test_every_printed_ablation_and_rival_that_can_run_is_a_claim_or_is_in_a_table():
    points = set(yaml.safe_load((ROOT/'params.yaml').read_text(encoding='utf-8'))['points'])
    asked = {c[k] for c in ALL if c['kind'] == 'comparison' for k in 'ab'}
    assert points <= asked | {r for t in TABLES for r in load_published(t).index}
    assert {'no_reg', 'no_fusion', 'no_fusion_no_reg', 'petar_focal', 'petar_none', 'petar_mask_ct_focal', 'dcformer_clip', 'project_2xmlp'} <= asked

def test_evidence_of_code_exists():
    params = yaml.safe_load((ROOT/'params.yaml').read_text(encoding='utf-8'))
    def there(e):
        name, _, key = e.partition(': ')
        level = params
        for k in filter(None, key.split('.')): level = level[k]
        return (ROOT/name).is_file()
    assert [e for c in ALL for e in c.get('evidence', ()) if not there(e)] == []

def broken(tmp_path, change):
    data = json.loads(CLAIMS.read_text(encoding='utf-8')); change(data)
    path = tmp_path/'claims.json'; path.write_text(json.dumps(data))
    with pytest.raises(ClaimError) as e: load_claims(path)
    return str(e.value)

@pytest.mark.parametrize('claim, change, says', [
    ('vipet-reg-fused', {'a': 'nobody'}, "row 'nobody'"), ('vipet-reg-fused', {'metric': 'bleu9'}, "metric 'bleu9'"), ('vipet-reg-fused', {'table': 'vipet_table9'}, "table 'vipet_table9'"),
    ('vipet-reg-fused', {'paper': 'lost'}, "paper 'lost'"), ('vipet-reg-fused', {'direction': 'up'}, 'direction'), ('vipet-reg-fused', {'verdict': 'reproduced direction'}, 'verdict'), ('vipet-reg-fused', {'id': 'vipet-full'}, "the id 'vipet-full'"),
    ('vipet-pairs', {'check': 'prayer'}, "check 'prayer'"), ('vipet-rouge1-text', {'metric': 'finding_f1'}, "metric 'finding_f1'"), ('vipet-reg-fused', {'kind': 'value'}, 'check')])
def test_a_broken_claim_is_refused(tmp_path, claim, change, says):
    assert says in broken(tmp_path, lambda data: next(c for c in data['claims'] if c['id'] == claim).update(change))

def test_a_claim_without_a_field_and_a_file_that_is_none(tmp_path):
    assert "'direction' is a required property" in broken(tmp_path, lambda data: next(c for c in data['claims'] if c['id'] == 'vipet-full').pop('direction'))
    assert "no 'numbers'" in broken(tmp_path, lambda data: next(c for c in data['claims'] if c['id'] == 'vipet-pairs').pop('numbers'))
    (tmp_path/'none.json').write_text('[')
    with pytest.raises(ClaimError, match='not JSON'): load_claims(tmp_path/'none.json')
    with pytest.raises(ClaimError, match='cannot be read'): load_claims(tmp_path/'absent.json')

# --- on disk and on paper

def test_verdicts_come_back_from_disk_as_they_went(tmp_path):
    found = verdicts(ALL, [choices('med3dvlm', .9), choices('m3d_lamed_mlp', .4)], 300)
    again = read_verdicts(write_verdicts(found, tmp_path).parent)
    pd.testing.assert_frame_equal(again, found, atol=6e-5, rtol=0)
    assert again.attrs['measured'] and not read_verdicts(tmp_path/'empty').attrs['measured'] and list(tmp_path.iterdir()) == [tmp_path/'verdicts.csv']

def test_without_verdicts_the_tables_are_read_unpaired(tmp_path):
    results = [choices('med3dvlm', .9), choices('m3d_lamed_mlp', .4), choices('med3dvlm', .2, 'shuffled'), result('petar', .8), result('petar_none', .3)]
    for name in ('med3dvlm_table4', 'petar_table2'): write_table(make_table(name, results, n=100), tmp_path)
    again, paired = read_verdicts(tmp_path), verdicts(ALL, results, 300)
    both = ['med3dvlm-closed', 'petar-place']
    assert again.attrs['measured'] and (again.loc[both, 'verdict'] == 'reproduced direction').all() and np.allclose(again.loc[both, 'measured'], paired.loc[both, 'measured'], atol=2e-4)
    assert (again.loc[both, 'high'] - again.loc[both, 'low'] > paired.loc[both, 'high'] - paired.loc[both, 'low']).all() and 'revision r1' in again.loc['petar-place', 'evidence']
    assert (again['measured'].notna() == paired['measured'].notna()).all() and not (tmp_path/'verdicts.csv').exists()
    (tmp_path/'vipet_table1.csv').write_text('row,model\nvipet,x\n')
    with pytest.raises(ClaimError, match='vipet_table1.csv: no table'): read_verdicts(tmp_path)

def test_verdicts_of_other_claims_are_refused(tmp_path):
    write_verdicts(verdicts(ALL[1:], []), tmp_path)
    with pytest.raises(ClaimError, match='other claims'): read_verdicts(tmp_path)
    (tmp_path/'verdicts.csv').write_text('id,paper\nx,y\n')
    with pytest.raises(ClaimError, match='other claims'): read_verdicts(tmp_path)

EVIL = '<img src=x onerror=alert(1)>|[x](javascript:y)\n# `z` $1$'
def test_texts_from_results_are_text():
    results = [result('vipet', .9), result('no_reg', .4) | {'file': EVIL, 'provenance': {'run': EVIL, 'data_hash': EVIL, 'params_hash': 'p', 'revision': EVIL}}, result(EVIL, .5)]
    found = verdicts(ALL, results, 100)
    page = summary_page(found, results, EVIL)
    for text in (page['md'], claims_markdown(found, 'vipet')): assert '<img' not in text and not re.search(r'(?<!\\)\]\(', text) and '\\[x\\](javascript' in text
    assert '<img' not in page['html'] and '&lt;img' in page['html']
    assert '<script' not in page['html'] and 'http' not in page['html'].replace('http-equiv', '') and "default-src 'none'" in page['html']
    widths = {len(row.replace('\\|', '').split('|')) for row in claims_markdown(found, 'vipet').splitlines()}
    assert widths == {10} and plain(EVIL).count('\n') == 0

def test_html_tables_are_balanced():
    results = [result('vipet', .9), result('vipet', .1, 'shuffled')]
    text = summary_page(verdicts(ALL, results, 100), results, 'x')['html']
    for tag in ('table', 'tr', 'td', 'th', 'p', 'h1', 'h2', 'body', 'html'): assert text.count(f'<{tag}>') + text.count(f'<{tag} ') == text.count(f'</{tag}>'), tag
    assert text.count('<h1>') == 1

def test_counts_add_up_and_are_those_of_the_verdicts():
    found = verdicts(ALL, [choices('med3dvlm', .9), choices('m3d_lamed_mlp', .4)], 300)
    table = counts(found)
    assert table['claims'].sum() == len(ALL) and (table.drop(columns='claims').sum(axis=1) == table['claims']).all()
    assert table.loc['med3dvlm', 'reproduced direction'] == 1 and table.loc['vipet', 'needs training'] == (found.loc[found['paper'] == 'vipet', 'verdict'].str.startswith('needs training')).sum()

def test_with_and_without_looking():
    rows = looking([result('vipet', .9), result('vipet', .1, 'shuffled'), result('vipet', 0., 'constant'), result('vipet', .1, 'noise'), result('no_reg', .8), choices('med3dvlm', .5)])
    assert rows['point'].tolist() == ['vipet', 'no_reg', 'med3dvlm'] and rows['metric'].tolist() == ['Finding F1', 'Finding F1', 'Mean accuracy']
    assert rows.loc[0, 'without looking'].startswith('0.00') and rows.loc[1, 'without looking'] == '–' and rows.loc[0, 'own images'].startswith('0.9')

def test_two_revisions_are_told_apart(): assert origins([result('vipet', .9), result('no_reg', .5, revision='r2')])['revision'].tolist() == ['r1', 'r2']

def test_what_dvc_reads(tmp_path):
    results = [result('vipet', .9), result('vipet', .1, 'shuffled'), choices('med3dvlm', .5)]
    found = verdicts(ALL, results, 100)
    metrics = metrics_of(results, found)
    assert metrics['vipet']['finding_f1'] == round(results[0]['metrics']['finding_f1']['value'], 4) and 'shuffled.finding_f1' in metrics['vipet'] and 'closed_vqa.mean.accuracy' in metrics['med3dvlm'] and sum(metrics['claims'].values()) == 2*len(ALL)
    assert points_of(results)['system'].tolist() == ['vipet report real', 'vipet report shuffled', 'med3dvlm closed_vqa real'] and curves_of(tmp_path).empty
    (tmp_path/'a.lm').mkdir(); (tmp_path/'a.lm/stage.json').write_text('{"node": "a.lm", "log": [{"step": "x", "loss": 1}]}')
    with pytest.raises(ClaimError, match='no record of a training stage'): curves_of(tmp_path)

@pytest.mark.parametrize('name', ['vipet_table1', 'med3dvlm_table3'])
def test_a_table_before_any_run_shows_what_was_printed(name, tmp_path):
    text = table_markdown(name, tmp_path)
    assert 'make repro' in text and all(f'{v:.2f}' in text for v in load_published(name)[load_published(name).attrs['metrics']].stack().dropna())
    (tmp_path/f'{name}.md').write_text('as written')
    assert table_markdown(name, tmp_path) == 'as written'

# --- what is committed

COMMITTED = ROOT/'tables/phantom'
tables = lambda: {name: pd.read_csv(COMMITTED/f'{name}.csv', index_col='row') for name in TABLES if (COMMITTED/f'{name}.csv').is_file()}

def test_committed_tables_hold_the_published_numbers():
    "A published CSV that was changed without making the tables again."
    for name, table in tables().items():
        published = load_published(name)
        for m in published.attrs['metrics']:
            column = table[f'{LABELS[m]} published']
            assert column.reindex(published.index).round(4).fillna(-1).tolist() == published[m].round(4).fillna(-1).tolist(), f'{name} {m}: make the tables again (dvc repro tables)'

def test_committed_verdicts_are_those_of_the_committed_tables():
    "A result that was changed after the verdicts were made, or a verdict that was typed."
    if not (COMMITTED/'verdicts.csv').is_file(): pytest.skip('no verdicts are committed: dvc repro tables writes them')
    found, fresh, measured = read_verdicts(COMMITTED), verdicts(ALL, []), tables()
    still = [i for i, c in BY_ID.items() if c['kind'] != 'comparison']
    assert found.loc[still, ['verdict', 'evidence']].to_dict() == fresh.loc[still, ['verdict', 'evidence']].to_dict() and np.allclose(found['published'], fresh['published'], atol=1e-4, equal_nan=True)
    for i, row in found[found['measured'].notna()].iterrows():
        cells = measured[row['table']]
        column = f"{LABELS[row['metric']]} measured"
        if column in cells: assert cells.loc[row['a'], column] - cells.loc[row['b'], column] == pytest.approx(row['measured'], abs=2e-4), i
        assert row['verdict'] == ('within noise' if not row['p_holm'] < .05 else 'reproduced direction' if (row['measured'] > 0) == (BY_ID[i]['direction'] == 'higher') else 'not reproduced'), i
        assert row['low'] <= row['measured'] <= row['high'] and row['p'] <= row['p_holm'] <= 1
    assert tuple(found) == COLUMNS
