"Which metric to believe: correlations, agreement and p-values against numbers had by hand or in print; which injected errors the scores see."
import numpy as np, pandas as pd, pytest
from hypothesis import assume, given, settings, strategies as st
from scipy.stats import spearmanr
from petvlm.believe import DIMENSIONS, FINDING_F1, SEVERITY, BelieveError, agreement, correlate, damaged, fact_f1, finding_f1_each, holm, injected_table, ratings, rho_of, scored
from petvlm.findings import Finding
from petvlm.inject import ERRORS, InjectError
from petvlm.phantom import sample_patient
from petvlm.reports import write_report

REGIONS = ('head_neck', 'chest', 'abdomen_pelvis')
GOOD = 'case,system,rater,anatomy,preference\n7,ours,A,4,3\n7,ours,B,5,\n8,ours,A,1,2.5\n'


def file(tmp_path, text, name='r.csv'):
    path = tmp_path/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_ratings_are_read(tmp_path):
    got = ratings(file(tmp_path, GOOD))
    assert list(got) == ['case', 'system', 'rater', 'anatomy', 'preference'] and got['case'].tolist() == ['7', '7', '8'] and got['anatomy'].tolist() == [4, 5, 1]
    assert np.isnan(got['preference'][1]) and got['preference'][2] == 2.5
    pd.testing.assert_frame_equal(got, ratings(file(tmp_path, '\ufeff' + GOOD.replace(',', ';').replace('\n', '\r\n'))))
    assert ratings(file(tmp_path, GOOD.replace(',5,', ',90,')), scale=(0, 100))['anatomy'][1] == 90

@pytest.mark.parametrize('text,match', [
    (GOOD.replace('B,5', 'B,5.5'), "line 3: anatomy '5.5' lies outside the scale from 1 to 5"), (GOOD.replace('B,5', 'B,0'), "line 3: anatomy '0' lies outside"),
    (GOOD.replace('B,5', 'B,nan'), "line 3: anatomy 'nan' lies outside"), (GOOD.replace('B,5', 'B,good'), "line 3: anatomy 'good' is no number"),
    (GOOD.replace('B,5', 'A,5'), 'line 3: same case, system and rater as line 2'), (GOOD.replace('B,5,', 'B,,'), 'line 3: no rating in it'),
    (GOOD.replace('8,ours', ',ours'), 'line 4: case is empty'), (GOOD.replace('1,2.5', '1,2.5,9'), 'line 4: more cells than columns'),
    (GOOD.replace('anatomy', 'colour'), r"line 1 has unknown columns \['colour'\]"), (GOOD.replace('rater', 'anatomy'), r"columns twice \['anatomy'\], lacks \['rater'\]"),
    ('case,system,rater\n1,a,x\n', 'lacks .*one of anatomy'), ('case,system,rater,utility\n', 'holds no ratings'), ('', 'lacks'),
    (GOOD + '9,"ours,A,1,2\n', 'line 5 cannot be read'), (GOOD.encode() + b'9,\xff,A,1,2\n', 'line 5 is not UTF-8'),
    (GOOD.replace(',4,3', ',9,3').replace(',1,2.5', ',1,7'), "line 2: anatomy '9'.*; line 4: preference '7'")])
def test_bad_ratings_are_refused_with_their_line(tmp_path, text, match):
    with pytest.raises(BelieveError, match=match): ratings(file(tmp_path, text))

def test_a_refusal_names_no_case(tmp_path):
    with pytest.raises(BelieveError) as e: ratings(file(tmp_path, 'case,system,rater,utility\nNguyenVanA,s,x,9\nNguyenVanA,s,x,9\nNguyenVanA,s,y,1\nNguyenVanA,s,y,1\n'))
    assert 'Nguyen' not in str(e.value) and 'line 5' in str(e.value)
    with pytest.raises(BelieveError, match='no such file'): ratings(tmp_path/'none.csv')


def test_rho_of_five_points_by_hand():
    "Ranks 1 2 3 4 5 and 2 1 4 3 5: 1 - 6*4/(5*24) = 0.8. With ties: ranks 1 2.5 2.5 4 5 against 1 2 3 4 5: covariance 9.5, variances 9.5 and 10."
    assert rho_of(np.arange(5.), np.array([20., 10, 40, 30, 50]), np.ones((1, 5)))[0] == pytest.approx(.8)
    assert rho_of(np.array([1., 3, 3, 7, 9]), np.arange(5.), np.ones((1, 5)))[0] == pytest.approx(9.5/np.sqrt(95))
    assert np.isnan(rho_of(np.ones(5), np.arange(5.), np.ones((1, 5)))[0])

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), min_size=3, max_size=12))
def test_rho_with_weights_is_scipy_s_on_the_resample_written_out(rows):
    x, y, w = np.array(rows).T
    assume(w.sum())
    a, b = np.repeat(x, w), np.repeat(y, w)
    got = rho_of(x.astype(float), y.astype(float), w[None].astype(float))[0]
    assert np.isnan(got) if len(set(a)) < 2 or len(set(b)) < 2 else got == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)


def table(n=30, systems=('a', 'b'), raters=('x', 'y'), seed=0):
    r = np.random.default_rng(seed)
    scores = pd.DataFrame([{'case': c, 'system': s, 'true': r.random(), 'noise': r.random()} for c in range(n) for s in systems])
    rate = lambda x: float(np.clip(round(1 + 4*x + r.normal(0, .4)), 1, 5))
    rated = pd.DataFrame([{'case': str(q.case), 'system': q.system, 'rater': p, 'anatomy': rate(q.true), 'utility': rate(q.true) if p == 'x' else np.nan} for q in scores.itertuples() for p in raters])
    return scores, rated

def test_correlate_averages_raters_and_resamples_cases():
    scores, rated = table()
    got = correlate(scores, rated, n=400).set_index(['dimension', 'metric'])
    means = rated.groupby(['case', 'system'])['anatomy'].mean()
    own = scores.assign(case=scores['case'].astype(str)).set_index(['case', 'system']).loc[means.index]
    assert got.loc[('anatomy', 'true'), 'rho'] == pytest.approx(spearmanr(own['true'], means).statistic)
    assert got.loc[('anatomy', 'true'), 'lo'] > .8 and got.loc[('anatomy', 'noise'), 'lo'] < 0 < got.loc[('anatomy', 'noise'), 'hi']
    assert got['reports'].eq(60).all() and got['cases'].eq(30).all()
    pd.testing.assert_frame_equal(correlate(scores, rated, n=50), correlate(scores.sample(frac=1, random_state=1), rated.sample(frac=1, random_state=2), n=50))

def test_reports_on_one_case_are_drawn_together():
    "Twenty copies of each report are no more cases: the interval must not get narrower."
    scores, rated = table(8, ('s',), ('x',), seed=2)
    many_s, many_r = (pd.concat([t.assign(system=f's{i}') for i in range(20)]) for t in (scores, rated))
    one, many = (correlate(s, r, n=500)[['lo', 'hi']].iloc[0] for s, r in ((scores, rated), (many_s, many_r)))
    np.testing.assert_allclose(one, many, atol=1e-9)

@pytest.mark.parametrize('change,match', [
    (lambda s, r: (s[s['case'] < 29], r), '2 of 60 rated reports have none'), (lambda s, r: (s.assign(true=np.inf), r), 'true is not finite for 60'),
    (lambda s, r: (pd.concat([s, s[:1]]), r), '1 rows with the case and system of another'), (lambda s, r: (s.drop(columns='system'), r), r"lacks the columns \['system'\]"),
    (lambda s, r: (s[['case', 'system']], r), '0 metrics')])
def test_scores_that_do_not_fit_are_refused(change, match):
    with pytest.raises(BelieveError, match=match): correlate(*change(*table()))

def test_constant_scores_have_no_rho():
    scores, rated = table()
    got = correlate(scores.assign(true=1.), rated, n=20).set_index(['dimension', 'metric']).loc[('anatomy', 'true')]
    assert np.isnan(got[['rho', 'lo', 'hi']].astype(float)).all() and got['reports'] == 60


KRIPPENDORFF = np.array([[1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3], [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0]])

def long(values): return pd.DataFrame([{'case': str(u), 'system': 's', 'rater': str(r), 'anatomy': float(values[r, u])} for r, u in zip(*np.nonzero(values))])

def test_agreement_is_the_printed_one():
    "Krippendorff (2011), the example with four observers and missing data: ordinal alpha 0.815."
    got = agreement(long(KRIPPENDORFF), n=300)
    assert got['alpha'][0] == pytest.approx(.815, abs=5e-4) and got['raters'][0] == 4 and got['reports'][0] == 11 and got['lo'][0] < .815 < got['hi'][0] <= 1

def test_agreement_at_its_ends():
    assert agreement(long(np.array([[1, 2, 5], [1, 2, 5]])), n=20)['alpha'][0] == 1
    assert agreement(long(np.array([[1, 5], [5, 1]])), n=20)['alpha'][0] == pytest.approx(-.5)       # observed 1, expected 2/3
    assert agreement(long(np.array([[1, 2, 5]]))).empty and np.isnan(agreement(long(np.array([[3, 3], [3, 3]])), n=20)['alpha'][0])


def test_holm_by_hand():
    assert holm({'a': .01, 'b': .04, 'c': .03, 'd': .005}) == pytest.approx({'a': .03, 'b': .06, 'c': .06, 'd': .02})
    assert list(holm({'z': .5, 'a': .9})) == ['z', 'a'] and holm({'z': .5, 'a': .9}) == {'z': 1., 'a': 1.} and holm({}) == {} and holm({'a': .04}) == {'a': .04}

@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.dictionaries(st.integers(0, 50), st.floats(0, 1), min_size=1, max_size=12), st.sampled_from((.01, .05, .2)))
def test_holm_rejects_what_stepping_down_rejects(p, level):
    got, m, rejected = holm(p), len(p), set()
    for i, k in enumerate(sorted(p, key=p.get)):
        if p[k]*(m - i) > level: break
        rejected.add(k)
    assert {k for k in p if got[k] <= level} == rejected and all(p[k] <= got[k] <= min(1, m*p[k]) + 1e-12 for k in p)

@pytest.mark.parametrize('p', [-.1, 1.1, float('nan')])
def test_what_is_no_p_value_is_refused(p):
    with pytest.raises(BelieveError, match='b: found p ='): holm({'a': .5, 'b': p})


@pytest.fixture(scope='module')
def cases():
    found = [([x.finding for x in sample_patient(5_000_000 + s).lesions], r) for s in range(50) for r in REGIONS]
    return [(own, r) for fs, r in found if len(own := [f for f in fs if f.region == r]) >= 2][:18]

@pytest.fixture(scope='module')
def believed(cases): return injected_table(cases, metrics=('bleu4', 'meteor'), n=200, language='en', more={'length': lambda texts, refs: [len(t.split()) for t in texts]}).set_index(['metric', 'kind'])

@pytest.mark.parametrize('kind,metric,rate', [('side', 'finding_f1', .95), ('organ', 'finding_f1', .95), ('negation', 'finding_f1', .95), ('omission', 'finding_f1', .95), ('invention', 'finding_f1', .95),
                                              *((kind, 'fact_f1', 1.) for kind in ERRORS)])
def test_each_kind_is_detected_by_the_finding_scores(believed, kind, metric, rate):
    row = believed.loc[(metric, kind)]
    assert row['reports'] >= 15 and min(row['detected'], row['copied'], row['same_words']) >= rate and (not row['ladders'] or row['rho'] < -.7)

def test_the_finding_f1_does_not_see_numbers(believed):
    assert believed.loc[('finding_f1', 'number'), 'detected'] == 0 and np.isnan(believed.loc[('finding_f1', 'number'), 'rho'])

def test_text_metrics_prefer_the_echo_to_the_truth(believed):
    "A copy with one flipped side outscores a right report in other words; in the same words they do see it."
    for metric in ('bleu4', 'meteor'):
        assert believed.loc[(metric, 'side'), 'copied'] < .2 and believed.loc[(metric, 'side'), 'same_words'] > .9 and believed.loc[(metric, 'all'), 'rho'] > believed.loc[('fact_f1', 'all'), 'hi']

def test_the_all_normal_report_is_worth_nothing(cases, believed):
    assert all(believed.loc[(m, 'all_normal'), 'score'] == 0 and believed.loc[(m, 'all_normal'), 'score_right'] == 100 for m in FINDING_F1)
    texts = [write_report((), r, 'vi', 3).text for _, r in cases]
    assert max(v.max() for v in finding_f1_each(texts, [f for f, _ in cases], 'vi').values()) == 0
    assert believed.loc[('bleu4', 'all_normal'), 'score'] > 1

def test_the_table_says_that_no_physician_was_asked(believed):
    assert believed['severity'].eq(SEVERITY).all() and 'not physicians' in SEVERITY and believed.loc[('length', 'omission'), 'detected'] > .9

def test_ladders_have_every_step(cases):
    reports = damaged(cases[:8], kinds=('side', 'omission'), most=2)
    for (case, kind), rows in reports[reports['words'] == 1].groupby(['case', 'kind']):
        if kind in ('side', 'omission'): assert rows['errors'].tolist() == list(range(1, len(rows) + 1)) and len(rows) <= 2
    got = scored(reports, cases[:8], ('rouge1',))
    assert (got.loc[(got['kind'] == 'none') & (got['words'] == 0), 'rouge1'] == 100).all() and (got.loc[got['kind'] == 'none', 'fact_f1'] == 100).all()
    assert len(reports[(reports['kind'] == 'omission') & (reports['errors'] == 2)]) == 8

def test_fact_f1_by_hand():
    a, b = Finding('lung', 'left', 'nodule', 14., 6.1, 'increased'), Finding('pleura', 'right', 'effusion', 22., None, 'none')
    c = Finding('lung', 'left', 'nodule', 14., 12.2, 'increased')
    assert fact_f1([a, b], [a, b]) == 1 and fact_f1([c, b], [a, b]) == .5 and fact_f1([a, b, b], [a, b]) == .8 and fact_f1([], [a]) == 0 and fact_f1([], []) == 1

def test_cases_that_cannot_be_used_are_refused(cases):
    with pytest.raises(BelieveError, match='case 1: no finding in chest'): injected_table([cases[0], ([], 'chest')])
    with pytest.raises(BelieveError, match='no cases'): injected_table([])
    with pytest.raises(BelieveError, match='most: found 0'): injected_table(cases, most=0)
    with pytest.raises(BelieveError, match=r"the names \['words'\] are taken"): injected_table(cases[:1], more={'words': lambda texts, refs: [0.]*len(texts)})
    with pytest.raises(InjectError, match="kind: found 'typo'"): injected_table(cases[:1], kinds=('typo',))
    assert DIMENSIONS == ('anatomy', 'interpretation', 'utility', 'preference')
