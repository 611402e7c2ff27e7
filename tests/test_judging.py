"What is made of judged reports: the table of lesions, how injected errors are named, the sheet for physicians and what comes back."
import json
import numpy as np, pandas as pd, pytest
from petvlm.believe import BelieveError, ratings
from petvlm.detection import NAMED, detection
from petvlm.evaluate import _joined, number_accuracy
from petvlm.facts import FactError, p_of, paired_bootstrap, statistic_of, sums_of
from petvlm.findings import Finding
from petvlm.inject import ERRORS
from petvlm.lesionfacts import LESION_METRICS, lesion_scores
from petvlm.lesiontext import write_lesion
from petvlm.lesiontable import ARM_NAMES, BLOCKS, lesion_table, lesions_markdown, write_lesions
from petvlm.ratingsheet import SHEET, believed_by_physicians, predictions_of, rating_sheet, sheet_scores, write_sheet
from petvlm.tables import RESULT, difference

def scored(point, arm, texts, truth, **more):
    return {'point': point, 'task': 'report', 'arm': arm, 'provenance': {'run': f'{point}.x', 'data_hash': 'd', 'params_hash': 'p', 'revision': 'r'}, **lesion_scores(texts, truth, [f'p{i//2}' for i in range(len(texts))], 'en', n=200), **more}

TRUTH = [[Finding('lung', 'left', 'nodule', 12., 5., 'increased')] for _ in range(8)]
RIGHT = ['A nodule in the left lung, 12 mm, hypermetabolic (SUVmax: 5.0).']*8
FLIPPED = [t.replace('left', 'right') for t in RIGHT]


# --- numbers of lesions, and p

def test_lesions_without_numbers_cost_nothing_and_effusions_are_not_asked_for_their_length():
    truth = [[Finding('lung', 'left', 'nodule', 12., 5., 'increased')], [], [Finding('pleura', 'left', 'effusion', 20., None, 'none')]]
    texts, patients = [write_lesion(truth[0][0], 'en'), 'Intense focus in the hilum.', write_lesion(truth[2][0], 'en')], ['p0', 'p1', 'p2']
    measured = [{'size_mm': 12.4, 'suvmax': 5.1}, {}, {'size_mm': 140.}]
    found = number_accuracy(texts, truth, measured, patients, 'en', n=100)
    assert found['metrics']['size_mm.accuracy']['value'] == found['metrics']['size_mm_voxels.accuracy']['value'] == found['metrics']['suvmax_voxels.accuracy']['value'] == 100
    assert number_accuracy(texts[1:2], truth[1:2], measured[1:2], patients[1:2], 'en', n=100) == {'metrics': {}, 'per_patient': {'patients': []}}
    judged = lesion_scores(texts, truth, patients, 'en', n=100); both = _joined(judged, found)
    rows = sums_of('size_mm_voxels.accuracy', both['per_patient']); assert rows.shape[0] == 3 and not rows[1].any() and not rows[2].any() and statistic_of('size_mm_voxels.accuracy')(rows.sum(0)) == 100
    with pytest.raises(FactError, match='1 patients have numbers'): _joined({'metrics': {}, 'per_patient': {'patients': ['p0', 'p1']}}, found)

def test_p_is_not_smaller_than_so_few_patients_can_show():
    one, other = np.array([3., 4.]), np.array([1., 2.])
    assert paired_bootstrap(one, other)['p'] == .5 and paired_bootstrap(np.r_[one, one, one], np.r_[other, other, other])['p'] == 2**-5
    assert p_of(np.full(2000, np.nan), 60) == 1 and p_of(np.r_[np.full(1000, np.nan), np.ones(1000)], 60) == pytest.approx(2/1001)


# --- the table of lesions

def test_lesion_metrics_are_compared_like_any_other():
    a, b = scored('a', 'real', RIGHT, TRUTH), scored('a', 'shuffled', FLIPPED, TRUTH)
    for name in ('lesion_f1', 'lesion_flips_per_patient', 'lesion_clinical_tpf'):
        expected = paired_bootstrap(*(sums_of(name, r['per_patient']) for r in (a, b)), LESION_METRICS[name], 200)
        assert difference(a, b, name, 200) == pytest.approx(tuple(expected[k] for k in ('difference', 'lo', 'hi', 'p')))
    assert difference(a, b, 'lesion_f1', 200).d == 1 and difference(a, b, 'lesion_flips_per_patient', 200).d == -2
    with pytest.raises(ValueError, match='unknown metric'): statistic_of('lesion_f1')

def test_rows_stand_by_system_and_arm_and_numbers_are_those_of_the_results():
    results = [scored('b', 'noise', FLIPPED, TRUTH), scored('b', 'real', RIGHT, TRUTH), scored('a', 'real', FLIPPED, TRUTH), {**scored('a', 'real', RIGHT, TRUTH), 'task': 'vqa'}]
    table = lesion_table(results)
    assert list(zip(table['point'], table['arm'])) == [('b', 'real'), ('b', 'noise'), ('a', 'real')]
    for row, r in zip(table.to_dict('records'), (results[1], results[0], results[2])):
        for m in (m for block in BLOCKS.values() for m in block if m in table): assert row[m] == r['metrics'].get(m, {}).get('value', row[m]) or (m not in r['metrics'] and pd.isna(row[m]))
    assert table.loc[2, 'lesion_flips_per_patient'] == 2 and table.loc[0, 'lesion_suv_rel_error'] == 0 and table.loc[0, 'run'] == 'b.x'

def test_markdown_has_a_row_for_each_arm_and_is_the_same_twice(tmp_path):
    results = [scored('a|b', arm, RIGHT, TRUTH) for arm in ('real', 'shuffled')]
    text = lesions_markdown(lesion_table(results))
    assert r'| a\|b | own images |' in text and text == lesions_markdown(lesion_table(results)) and '1.00 [1.00, 1.00]' in text
    csv, md = write_lesions(lesion_table(results), tmp_path/'t')
    assert md.read_text() == text and pd.read_csv(csv)['reports'].tolist() == [8, 8]
    assert lesion_table([]).empty and 'Lesion by lesion' in lesions_markdown(lesion_table([]))

def test_every_arm_of_a_result_has_a_name(): assert set(ARM_NAMES) == set(RESULT['properties']['arm']['enum'])
def test_every_column_is_a_metric(): assert {m for m in (m for block in BLOCKS.values() for m in block) if not m.endswith('.accuracy')} <= set(LESION_METRICS)


# --- detection

CASES = [([Finding('lung', 'left', 'nodule', 14., 6.1, 'increased'), Finding('pleura', 'right', 'effusion', 22., None, 'none'), Finding('esophagus', '', 'mass', 31., 9.4, 'increased')], 'chest'),
         ([Finding('kidney', 'left', 'cyst', 30., None, 'none'), Finding('liver', '', 'mass', 41., 7.3, 'increased')], 'abdomen_pelvis')]

@pytest.mark.parametrize('language', ['vi', 'en'])
def test_every_kind_of_error_is_seen_and_right_reports_are_not_accused(language):
    table = detection(CASES, language=language).set_index('kind')
    assert list(table.index) == [*ERRORS, 'none', 'all_normal'] and set(NAMED) == set(ERRORS)
    assert (table.loc[list(ERRORS), 'seen'] == 1).all() and table.loc['none', 'seen'] == 0 and table.loc['none', 'reports'] == 4
    assert (table.loc[['side', 'number', 'omission', 'invention'], 'named'] == 1).all() and table.loc['all_normal', 'f1'] == 0 and table.loc['none', 'f1'] == 1
    pd.testing.assert_frame_equal(table, detection(CASES, language=language).set_index('kind'))

def test_a_reader_that_sees_nothing_detects_nothing(monkeypatch):
    import petvlm.detection as d
    real = d.lesion_counts
    monkeypatch.setattr(d, 'lesion_counts', lambda t, f, l: dict.fromkeys(real(t, f, l), 0))
    assert (d.detection(CASES, ('side', 'omission'), 'en').set_index('kind')['seen'] == 0).all()


# --- physicians

def written(tmp_path, name, reports):
    lines = [dict(task='report', arm=arm, patient=f'Nguyen-{i//2}', region='chest', question='q', reference=f'A nodule in the left lung, {10 + i} mm.', prediction=r) for arm in ('real', 'noise') for i, r in enumerate(reports)]
    path = tmp_path/f'{name}.jsonl'
    path.write_text('\n'.join(map(json.dumps, [*lines, dict(task='vqa', arm='real', patient='x', region='chest', question='q', reference='a', prediction='b')])))
    return predictions_of(path)

@pytest.fixture
def points(tmp_path):
    right = [f'A nodule in the left lung, {10 + i} mm.' for i in range(6)]
    return {'good': written(tmp_path, 'good', right), 'half': written(tmp_path, 'half', [t if i % 2 else 'Both lungs are clear.' for i, t in enumerate(right)]), 'bad': written(tmp_path, 'bad', ['Both lungs are clear.']*6)}

def test_a_sheet_hides_patients_and_systems(points):
    sheet, key = rating_sheet(points, cases=4, seed=3)
    assert list(sheet) == list(SHEET) and len(sheet) == 12 and sheet.groupby('case')['system'].nunique().eq(3).all() and sorted(key.values()) == ['bad', 'good', 'half']
    assert 'Nguyen' not in sheet.to_csv() and not set(points) & set(sheet['system']) and len({tuple(g) for _, g in sheet.groupby('case')['system']}) > 1      # no fixed order
    pd.testing.assert_frame_equal(sheet, rating_sheet(points, cases=4, seed=3)[0])

def test_ratings_come_back_and_name_the_metric_that_sees(points, tmp_path):
    sheet, key = rating_sheet(points, cases=6)
    said = lambda r: 5 if r['report'] == r['reference'] else 1
    filled = pd.concat([sheet.assign(rater=who, utility=sheet.apply(said, axis=1)) for who in ('x', 'y')]).drop(columns=['anatomy', 'interpretation', 'preference'])
    table = believed_by_physicians(write_sheet(filled, tmp_path/'r.csv'), key, points, 'en', metrics=('rouge1',)).set_index('metric')
    assert table.loc['lesion_f1', 'rho'] == pytest.approx(1) and table.loc['lesion_errors', 'rho'] == pytest.approx(1) and table.loc['rouge1', 'reports'] == 18
    scores = sheet_scores(points, 'en', ('rouge1',)).set_index(['system', 'case'])
    assert scores.loc['good', 'lesion_f1'].eq(1).all() and scores.loc['bad', 'lesion_f1'].eq(0).all()

def test_formulas_are_disarmed(points, tmp_path):
    sheet, _ = rating_sheet({'a': points['good'].assign(report='=HYPERLINK("http://x")')})
    text = write_sheet(sheet, tmp_path/'s.csv').read_text(encoding='utf-8-sig')
    assert "'=HYPERLINK" in text and ',"=' not in text and ',=' not in text

def test_refusals(points, tmp_path):
    with pytest.raises(BelieveError, match='no such file'): predictions_of(tmp_path/'none.jsonl')
    (tmp_path/'empty.jsonl').write_text('{"task": "vqa", "arm": "real"}\n')
    with pytest.raises(BelieveError, match='none of them a report'): predictions_of(tmp_path/'empty.jsonl')
    (tmp_path/'torn.jsonl').write_text('{"task": ')
    with pytest.raises(BelieveError, match='torn.jsonl'): predictions_of(tmp_path/'torn.jsonl')
    with pytest.raises(BelieveError, match='no case in common'): rating_sheet({'a': points['good'], 'b': points['bad'].assign(case='z')})
    sheet, key = rating_sheet(points)
    path = write_sheet(sheet.assign(rater='x', utility=3, system='Q', case=range(len(sheet)))[['case', 'system', 'rater', 'utility']], tmp_path/'q.csv')
    with pytest.raises(BelieveError, match="systems \\['Q'\\] are not in the key"): believed_by_physicians(path, key, points, 'en', metrics=('rouge1',))
    with pytest.raises(BelieveError, match='unknown columns'): ratings(write_sheet(sheet.assign(rater='x', utility=3), tmp_path/'e.csv'))
