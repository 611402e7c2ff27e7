"Lesion by lesion: matching, denials, numbers, clinical F1; expected values counted by hand."
import dataclasses, json
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from petvlm.facts import FactError
from petvlm.findings import LESIONS, ORGANS, Finding
from petvlm.lesionfacts import (LESION_COUNTS, LESION_METRICS, LEVELS, WRONG, LesionError, clinical_counts, clinical_f1, denials, denied, lesion_counts, lesion_scores, match, organ_errors)
from petvlm.reports import parse, write_report
from petvlm.wording import ReportError

REAL = Path(__file__).parents[2]/'shared/data/reports_vi'
NODULE = Finding('lung', 'left', 'nodule', 14, 6., 'increased')
change = dataclasses.replace

# ---------------------------------------------------------------- matching

def test_two_nodules_in_one_lung_are_told_apart_by_size():
    there = [change(NODULE, size_mm=6, suvmax=None), change(NODULE, size_mm=20, suvmax=None)]
    m = match([change(NODULE, size_mm=19, suvmax=None), change(NODULE, size_mm=7, suvmax=None)], there)
    assert sorted((p.said.size_mm, p.there.size_mm) for p in m.pairs) == [(7, 6), (19, 20)] and not m.missed and not m.hallucinated
    one = match([change(NODULE, size_mm=19, suvmax=None)], there)
    assert [p.there.size_mm for p in one.pairs] == [20] and [f.size_mm for f in one.missed] == [6]

def test_two_nodules_without_sizes_are_told_apart_by_suvmax():
    there = [Finding('liver', '', 'mass', None, suv, 'increased') for suv in (3., 12.)]
    assert {(p.said.suvmax, p.there.suvmax) for p in match([there[1], change(there[0], suvmax=4.)], there).pairs} == {(12., 12.), (4., 3.)}

@pytest.mark.parametrize('wrong, said', [('side', change(NODULE, side='right')), ('side_missing', change(NODULE, side='')), ('kind', change(NODULE, kind='mass')), ('uptake', change(NODULE, uptake='none')),
                                         ('organ', Finding('rib', 'left', 'nodule', 14, 6., 'increased'))])
def test_one_thing_wrong_is_one_error(wrong, said):
    m = match([said], [NODULE])
    assert [p.wrong for p in m.pairs] == [(wrong,)] and not m.missed and not m.hallucinated
    assert m.pairs[0].placed == (wrong in ('kind', 'uptake'))

@pytest.mark.parametrize('said', [change(NODULE, side='right', kind='effusion'), Finding('rib', 'left', 'nodule', 25, 6., 'increased'), Finding('rib', 'left', 'nodule', uptake='increased'),
                                  Finding('rib', 'right', 'nodule', 14, 6., 'increased'), Finding('adrenal', 'left', 'nodule', 14, 6., 'increased'), Finding('rib', 'left', 'lytic', 14, 6., 'increased')],
                         ids=['side and kind', 'organ and size', 'organ, no number', 'organ and side', 'organ of another region', 'organ and kind'])
def test_two_things_wrong_are_another_lesion(said):
    m = match([said], [NODULE])
    assert not m.pairs and m.missed == (NODULE,) and m.hallucinated == (said,)

def test_a_sound_pair_is_never_broken_up_for_two_flawed_ones():
    "Right nodule for left nodule and left nodule for left mass would leave nobody alone."
    right, mass = change(NODULE, side='right'), change(NODULE, kind='mass')
    m = match([NODULE, right], [NODULE, mass])
    assert [p.wrong for p in m.pairs] == [()] and m.missed == (mass,) and m.hallucinated == (right,)

def test_a_side_that_only_the_prediction_names_is_no_error():
    assert match([NODULE], [change(NODULE, side='')]).pairs[0].wrong == ()

def test_equal_costs_are_settled_by_the_findings_not_by_their_order():
    "5 and 20 mm are as far from 10 mm, as a share of the larger."
    a, b = change(NODULE, size_mm=5), change(NODULE, size_mm=20)
    assert match([a, b], [change(NODULE, size_mm=10)]) == match([b, a], [change(NODULE, size_mm=10)])

def test_a_lesion_named_in_another_organ_is_no_false_assertion_too():
    row = lesion_counts('A nodule in the left rib, 14 mm, hypermetabolic (SUVmax: 6.0).', [NODULE], 'en')
    assert (row['wrong_organ'], row['errors'], row['organs_said'], row['false_assertions']) == (1, 1, 1, 0)

def test_nothing_on_either_side():
    assert match([], [NODULE]).missed == (NODULE,) and match([NODULE], []).hallucinated == (NODULE,) and match([], []) == type(match([], []))((), (), ())

FINDINGS = st.builds(lambda lesion, side, size, suv: Finding(lesion[0], side if ORGANS[lesion[0]].sided else '', lesion[1], size, suv, lesion[2]),
                     st.sampled_from([x for x in LESIONS if x[0] in ('lung', 'liver', 'rib', 'axillary_node', 'adrenal')]), st.sampled_from(['left', 'right', '']),
                     st.sampled_from([None, 5., 10., 10.5, 40.]), st.sampled_from([None, 2., 6., 6.3]))

@settings(derandomize=True, max_examples=120, deadline=None)
@given(st.lists(FINDINGS, max_size=7), st.lists(FINDINGS, max_size=7), st.randoms(use_true_random=False))
def test_order_changes_nothing_and_everything_is_used_once(said, there, rng):
    summary = lambda m: (sorted((repr(p.said), repr(p.there), p.wrong) for p in m.pairs), sorted(map(repr, m.missed)), sorted(map(repr, m.hallucinated)))
    m, a, b = match(said, there), said[:], there[:]
    rng.shuffle(a); rng.shuffle(b)
    assert summary(match(a, b)) == summary(m)
    assert sorted(map(repr, said)) == sorted([repr(p.said) for p in m.pairs] + [repr(f) for f in m.hallucinated])
    assert sorted(map(repr, there)) == sorted([repr(p.there) for p in m.pairs] + [repr(f) for f in m.missed]) and all(there[p.at] == p.there for p in m.pairs)
    assert all(set(p.wrong) <= set(WRONG) and len(set(p.wrong) - {'uptake'}) <= 1 for p in m.pairs)
    t, tp, tf, tpf = clinical_counts(said, there)
    assert min(len(said), len(there)) >= t >= max(tp, tf) and min(tp, tf) >= tpf and clinical_counts(a, b) == [t, tp, tf, tpf]
    assert clinical_counts(there, there) == [len(there)]*4 and len(match(there, there).pairs) == len(there) and not any(p.wrong for p in match(there, b).pairs)

# ---------------------------------------------------------------- denials

MASS, EFFUSION, STONE = Finding('lung', 'left', 'mass', 40, 9., 'increased'), Finding('pleura', 'right', 'effusion', uptake='none'), Finding('kidney', 'left', 'stone', uptake='none')

@pytest.mark.parametrize('language, text, out, not_out', [
    ('vi', 'Hai trường phổi sáng đều.', [MASS, change(MASS, uptake='none')], [EFFUSION]),
    ('vi', 'Hai phổi không tăng bắt FDG khu trú.', [MASS], [change(MASS, uptake='none'), change(MASS, uptake='unknown')]),
    ('vi', 'Hình ảnh dải mờ ở hai phổi, không tăng chuyển hóa FDG.', [], [MASS]),
    ('vi', 'Không phát hiện hình ảnh tràn dịch màng phổi hai bên và tràn dịch màng tim.', [EFFUSION, change(EFFUSION, side='left'), change(EFFUSION, side=''), Finding('pericardium', '', 'effusion')], [MASS]),
    ('vi', 'Không thấy tràn dịch màng phổi trái.', [change(EFFUSION, side='left')], [EFFUSION, change(EFFUSION, side='')]),
    ('vi', 'Hai thận không ứ nước, không có sỏi.', [STONE], [Finding('kidney', 'left', 'cyst')]),
    ('vi', 'Thận hai bên kích thước bình thường. Gan không to.', [], [STONE, Finding('liver', '', 'mass')]),
    ('vi', 'Hố nách hai bên không có hạch to.', [Finding('axillary_node', 'right', 'node')], [Finding('cervical_node', 'right', 'node')]),
    ('vi', 'Không thấy bất thường ở hạch rốn phổi.', [Finding('hilar_node', 'right', 'calcification'), Finding('hilar_node', '', 'node')], []),
    ('vi', 'Hạch rốn phổi phải 12 mm, không tăng chuyển hóa FDG.', [], [Finding('hilar_node', 'right', 'node', uptake='increased')]),
    ('vi', 'Kết luận: không thấy tràn dịch màng phổi hai bên.', [], [EFFUSION]),
    ('en', 'Both lungs are clear.', [MASS], [EFFUSION]), ('en', 'No nodule or mass in the lungs.', [MASS], [Finding('lung', 'left', 'calcification')]),
    ('en', 'No pleural effusion.', [EFFUSION], [MASS]), ('en', 'Physiological FDG uptake in liver and spleen.', [Finding('liver', '', 'mass', uptake='increased')], [Finding('liver', '', 'cyst', uptake='none')]),
    ('en', 'The lungs show no abnormal uptake.', [MASS], [change(MASS, uptake='none')]), ('en', 'Bands in both lungs without increased FDG uptake.', [], [MASS]),
    ('en', 'Both kidneys are of normal size.', [], [STONE]), ('en', 'A mass in the left lung, 40 mm, FDG-avid, without calcification.', [Finding('lung', 'left', 'calcification')], [MASS])])
def test_what_a_denial_reaches(language, text, out, not_out):
    found = denials(text, language)
    assert [f for f in out if not denied(f, found)] == [] and [f for f in not_out if denied(f, found)] == []

@pytest.mark.parametrize('language', ['vi', 'en'])
def test_written_reports_never_deny_what_they_state(language):
    rng = np.random.default_rng(0)
    for seed in range(60):
        organ, kind, uptake = LESIONS[rng.integers(len(LESIONS))]
        f = Finding(organ, 'left' if ORGANS[organ].sided else '', kind, 12, 5. if uptake == 'increased' else None, uptake)
        report = write_report([f], f.region, language, seed)
        assert not denied(f, denials(report.text, language)), report.text
    assert len(denials(write_report([], 'chest', language, 0).text, language)) > 3

def test_a_denial_points_at_its_sentence():
    text = 'Nốt ở phổi trái 14 mm. Không thấy sỏi túi mật.'
    assert [text[slice(*d.span)].strip() for d in denials(text)] == ['Không thấy sỏi túi mật']

# ---------------------------------------------------------------- counts of a report, by hand

THERE = [NODULE, Finding('liver', '', 'mass', 50, 9., 'increased'), Finding('kidney', 'left', 'cyst', 20, None, 'none')]
SAID = {'en': 'A nodule in the right lung, 1.2 cm, hypermetabolic (SUVmax: 4.5). No cyst or mass in the liver. A cyst in the left kidney, 23 mm. A mass in the spleen, 30 mm, possibly hypermetabolic.',
        'vi': 'Nốt ở phổi phải 1,2 cm, tăng chuyển hóa FDG (SUVmax: 4,5). Không thấy nang hay khối ở gan. Nang thận trái 23 mm. Khối ở lách 30 mm, tăng chuyển hóa FDG, có thể do viêm.'}

@pytest.mark.parametrize('language', ['vi', 'en'])
def test_a_report_counted_by_hand(language):
    row = lesion_counts(SAID[language], THERE, language, measured=[5., None, None])
    expected = dict(reports=1, said=3, there=3, pairs=2, placed=1, hallucinated=1, missed=1, wrong_side=1, wrong_side_missing=0, wrong_organ=0, wrong_kind=0, wrong_uptake=0, errors=3,
                    suv_n=1, suv_abs=1.5, suv_rel=.25, measured_n=1, measured_abs=.5, measured_rel=.1, size_n=2, size_abs=5, organs_there=3, false_negations=1, organs_said=3, false_assertions=1,
                    t=3, tp=2, tf=3, tpf=2, abstained=0, parse_failed=0, numbered=3, unread=0, stating=3, hedged=1)
    assert tuple(row) == LESION_COUNTS == tuple(expected) and row == pytest.approx(expected)

def test_scores_by_hand_and_intervals_over_patients():
    r = lesion_scores([SAID['en'], 'Both lungs are clear.', ''], [THERE, [NODULE], []], ['a', 'b', 'b'], 'en', n=300)
    v = {k.removeprefix('lesion_'): m['value'] for k, m in r['metrics'].items()}
    assert (r['n'], r['n_patients'], r['per_patient']['patients']) == (3, 2, ['a', 'b']) and np.shape(r['per_patient']['lesions']) == (2, len(LESION_COUNTS) + 1)
    assert v['precision'] == pytest.approx(1/3) and v['recall'] == 1/4 and v['f1'] == pytest.approx(2/7) and v['pair_f1'] == pytest.approx(4/7)
    assert v['fp_per_patient'] == .5 and v['missed_per_patient'] == 1 and v['flips_per_patient'] == .5 and v['errors_per_patient'] == 2
    assert v['suv_abs_error'] == 1.5 and v['suv_rel_error'] == .25 and v['size_abs_error'] == 2.5 and v['false_negation'] == .5 and v['false_assertion'] == pytest.approx(1/3)
    assert v['abstention'] == pytest.approx(1/3) and v['parse_failure'] == 0 and v['hedged'] == pytest.approx(1/3) and 'suv_measured_abs_error' not in v
    assert (v['clinical_t'], v['clinical_tp'], v['clinical_tf'], v['clinical_tpf']) == pytest.approx((6/7, 4/7, 6/7, 4/7))
    assert all(m['lo'] <= m['value'] <= m['hi'] for m in r['metrics'].values()) and r['metrics']['lesion_suv_abs_error']['n'] == 1 and r['metrics']['lesion_false_negation']['n'] == 4
    assert json.loads(json.dumps(r)) == r and set(r['metrics']) <= set(LESION_METRICS)
    again = lesion_scores(['', SAID['en'], 'Both lungs are clear.'], [[], THERE, [NODULE]], ['b', 'a', 'b'], 'en', n=300)
    assert again == r

def test_the_truth_itself_scores_one_and_a_normal_report_zero():
    reports = [write_report([NODULE, EFFUSION, MASS], 'chest', 'vi', s) for s in range(4)]
    r = lesion_scores([x.text for x in reports], [x.findings for x in reports], list('abcd'), n=100)['metrics']
    assert all(r[f'lesion_{k}']['value'] == 1 for k in ('precision', 'recall', 'f1', 'pair_f1', *(f'clinical_{level}' for level in LEVELS))) and r['lesion_errors_per_patient']['value'] == 0
    plain = lesion_scores([write_report([], 'chest', 'vi', s).text for s in range(4)], [x.findings for x in reports], list('abcd'), n=100)['metrics']
    assert plain['lesion_f1']['value'] == 0 and plain['lesion_false_negation']['value'] > .5 and plain['lesion_abstention']['value'] == 0 and 'lesion_false_assertion' not in plain

INJECTED = {'side': ('flips_per_patient', change(NODULE, side='right')), 'kind': ('kind_errors_per_patient', change(NODULE, kind='mass')), 'uptake': ('uptake_errors_per_patient', change(NODULE, uptake='none', suvmax=None)),
            'number': ('suv_abs_error', change(NODULE, suvmax=8.)), 'unit': ('size_abs_error', change(NODULE, size_mm=140)), 'omission': ('missed_per_patient', None)}

@pytest.mark.parametrize('language', ['vi', 'en'])
@pytest.mark.parametrize('error', INJECTED)
def test_an_injected_error_is_found_under_its_own_name(error, language):
    name, said = INJECTED[error]
    texts = [write_report([f for f in (said, EFFUSION) if f], 'chest', language, s).text for s in range(5)]
    r = lesion_scores(texts, [[NODULE, EFFUSION]]*5, list('abcde'), language, n=20)['metrics']
    assert r[f'lesion_{name}']['value'] == {'suv_abs_error': 2, 'size_abs_error': 126}.get(name, 1)      # the effusion states no size
    others = {k for k, _ in INJECTED.values() if k.endswith('per_patient')} - {name}
    assert all(r[f'lesion_{k}']['value'] == 0 for k in others) and r['lesion_fp_per_patient']['value'] == 0

def test_what_cannot_be_read():
    assert lesion_counts('', [NODULE])['abstained'] == lesion_counts('Xin lỗi, tôi không biết.', [])['abstained'] == 1
    lost = lesion_counts('Hạch có kích thước 10 mm, tăng chuyển hóa FDG (SUVmax: 3,6).', [])
    assert (lost['abstained'], lost['parse_failed'], lost['numbered'], lost['unread']) == (0, 1, 1, 1)
    assert lesion_counts('Không thấy tràn dịch màng phổi hai bên.', [])['parse_failed'] == 0
    again = lesion_counts('Nốt ở phổi trái 14 mm, tăng chuyển hóa FDG. Nốt ở phổi trái 14 mm.', [NODULE])
    assert (again['said'], again['numbered'], again['unread']) == (1, 2, 0)                                # a repetition is not lost

def test_errors_by_organ():
    table = organ_errors([SAID['en'], 'Both lungs are clear.'], [THERE, [NODULE]], 'en')
    assert table['liver'] == {'organs_there': 1, 'false_negations': 1, 'organs_said': 0, 'false_assertions': 0} and table['spleen']['false_assertions'] == 1
    assert table['lung'] == {'organs_there': 2, 'false_negations': 1, 'organs_said': 1, 'false_assertions': 0} and list(table) == ['lung', 'liver', 'spleen', 'kidney']

# ---------------------------------------------------------------- clinical F1

def test_clinical_f1_by_hand():
    there = [NODULE, change(NODULE, size_mm=3), Finding('hilar_node', 'right', 'node', uptake='unknown'), Finding('rib', 'left', 'lytic', uptake='increased')]
    said = [change(NODULE, side='right'), Finding('mediastinal_node', '', 'node', uptake='none'), Finding('iliac_bone', 'left', 'sclerotic', uptake='increased'), change(NODULE, kind='mass'), Finding('pleura', 'left', 'nodule', uptake='none')]
    found = clinical_f1([said, []], [there, []])
    assert {k: v['right'] for k, v in found.items()} == {'t': 4, 'tp': 3, 'tf': 3, 'tpf': 2}            # both nodules (the pleura's place is the lung), node, bone lesion; the bones differ; one nodule is cold
    assert found['t'] == {'precision': .8, 'recall': 1., 'f1': pytest.approx(8/9), 'right': 4} and found['tpf']['f1'] == pytest.approx(4/9)
    assert {k: v['right'] for k, v in clinical_f1([said], [there], position='site').items()} == {'t': 4, 'tp': 0, 'tf': 3, 'tpf': 0}
    assert clinical_f1([[NODULE], []], [[], [NODULE]])['t']['right'] == 0                                  # never across reports
    assert clinical_f1([], [])['t'] == {'precision': 0., 'recall': 0., 'f1': 0., 'right': 0}

# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize('call, error, says', [
    (lambda: clinical_f1([[]], []), LesionError, '1 lists of predicted'), (lambda: clinical_f1([[]], [[]], position='lobe'), LesionError, "'lobe'.*place"), (lambda: lesion_scores([], [], []), LesionError, 'no reports'),
    (lambda: lesion_scores(['a'], [[]], ['x', 'y']), LesionError, r'\[1, 2\]'), (lambda: lesion_counts('', [NODULE], measured=[]), LesionError, '0 measured SUVmax for 1'), (lambda: organ_errors(['a'], []), LesionError, '1 texts'),
    (lambda: denials('x', 'fr'), ReportError, 'fr'), (lambda: lesion_scores(['a'], [[]], ['x'], 'fr'), ReportError, 'fr')])
def test_typed_errors(call, error, says):
    with pytest.raises(error, match=says): call()
    assert issubclass(LesionError, FactError)

# ---------------------------------------------------------------- real reports

@pytest.mark.skipif(not REAL.exists(), reason='real reports (../shared/data/reports_vi) are not here')
def test_real_reports():
    pairs = json.loads((REAL/'pairs.json').read_text(encoding='utf-8'))
    truth, patients = [parse(p['ground_truth']) for p in pairs], [p['patient_id'] for p in pairs]
    own = lesion_scores([p['ground_truth'] for p in pairs], truth, patients, n=50)['metrics']
    made = lesion_scores([p['generated'] for p in pairs], truth, patients, n=50)['metrics']
    assert own['lesion_f1']['value'] == 1 and own['lesion_unread']['value'] < .06 and own['lesion_parse_failure']['value'] == 0
    assert .1 < made['lesion_f1']['value'] < .3 and made['lesion_clinical_t']['value'] > made['lesion_clinical_tp']['value'] > made['lesion_clinical_tpf']['value'] > 0
    told = [denials(p['ground_truth']) for p in pairs]
    assert sum(map(len, told)) > 10*len(pairs) and sum(denied(f, d) for t, d in zip(truth, told) for f in t) < .02*sum(map(len, truth))     # what a report denies it seldom states
