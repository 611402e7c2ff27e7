"Questions in M3D-VQA's categories, contrast phases, planes, and the series they are asked about."
import dataclasses
from collections import Counter
import numpy as np, pytest
from petvlm.anatomy import LABEL, ORGAN_LABELS
from petvlm.config import Data
from petvlm.findings import KINDS, ORGANS, REGIONS, SITES, Finding, Study
from petvlm.m3dvqa import (ALSO, AROUND, BOTH_SIDES, CATEGORIES, LETTERS, NOTHING_SEEN, PHASE_WORDS, PHASES, PLANE_WORDS, PLANES, SIDE_WORDS, TISSUES, Guess, QuestionError, closed_answer, closed_prompt, is_correct,
                           kind_words, lesion_words, m3d_questions, region_words, says, stated_letter)
from petvlm.phantom import draw, reports_of, sample_patient
from petvlm.phases import CORTEX_MM, PhaseError, enhance, gains, move, reformat
from petvlm.prepare import PrepareError, scaled, to_grid
from petvlm.reports import capital
from petvlm.scans import scan_rows, series_of, series_sentence
from petvlm.sources import drawn_study
from petvlm.volume import cut, region_bounds
from petvlm.vqa import split
from petvlm.wording import ReportError, site_name

DATA = Data('scans', 'en', 0, 3, 0, 1, (32, 32, 48), 10., 8, 10., (-1000., 1000.))
PATIENTS = [tuple(l.finding for l in sample_patient(seed).lesions) for seed in range(300)]

def asked(language='en', patients=PATIENTS):
    "(all findings, region, plane, phase, questions) of every region."
    for i, findings in enumerate(patients):
        for r, region in enumerate(REGIONS):
            plane, phase = PLANES[(i + r) % 3], PHASES[i % 4]
            yield findings, region, plane, phase, m3d_questions(findings, region, plane, phase, language, seed=[i, r])

ASKED = {lang: list(asked(lang)) for lang in ('en', 'vi')}

# ---- form ----

@pytest.mark.parametrize('lang', ('en', 'vi'))
def test_every_scan_has_plane_phase_and_organ_and_four_different_choices(lang):
    for _, _, plane, phase, qs in ASKED[lang]:
        by = {q['category']: q for q in qs}
        assert {'Plane', 'Phase', 'Organ', 'Abnormality'} <= set(by) and len(by) == len(qs) and [q['category'] for q in qs] == [c for c in CATEGORIES if c in by]
        assert by['Plane']['answer'] == PLANE_WORDS[lang][plane] and by['Phase']['answer'] == PHASE_WORDS[lang][phase]
        for q in qs: assert len(set(q['choices'])) == 4 and q['choices'][LETTERS.index(q['letter'])] == q['answer'] and '{' not in q['question'] + ''.join(q['choices']) and q['question'].endswith('?')

def test_open_and_closed_ask_and_answer_the_same():
    for *_, qs in ASKED['en']:
        for q in qs:
            prompt, letter = closed_prompt(q), q['letter']
            assert prompt.startswith(q['question'] + ' Choices: A. ') and closed_answer(q) == f"{letter}. {q['answer']}" and closed_answer(q) in prompt
            assert is_correct(closed_answer(q), letter) and is_correct(closed_answer(q), letter, strict=True)
            assert not any(is_correct(f'{other}. {q["answer"]}', letter, strict=True) for other in LETTERS if other != letter)

def test_the_letter_is_even_in_every_category_and_says_nothing_of_the_answer():
    many = [q for again in range(4) for i, fs in enumerate(PATIENTS) for r, region in enumerate(REGIONS) for q in m3d_questions(fs, region, 'axial', 'delayed', 'en', seed=[i, r, again])]
    for category in CATEGORIES:
        n = Counter(q['letter'] for q in many if q['category'] == category)
        expected = n.total()/4
        assert sum((n[c] - expected)**2/expected for c in LETTERS) < 16.27, (category, n)      # chi-square, 3 degrees of freedom, p = 0.001
    axial = Counter(q['letter'] for *_, qs in ASKED['en'] for q in qs if q['answer'] == 'Axial')
    assert min(axial[c] for c in LETTERS) > .18*axial.total()

def test_questions_follow_from_the_seed_alone():
    a, b, c = (m3d_questions(PATIENTS[3], 'chest', 'axial', 'arterial', 'en', seed=s) for s in (5, 5, 6))
    assert a == b != c

def test_what_cannot_be_asked_is_refused():
    for kw, words in (({'plane': 'oblique'}, "plane: found 'oblique'"), ({'phase': 'venous'}, "phase: found 'venous'"), ({'region': 'leg'}, "region: found 'leg'")):
        with pytest.raises(QuestionError, match=words): m3d_questions((), **({'region': 'chest', 'plane': 'axial', 'phase': 'arterial'} | kw))
    with pytest.raises(ReportError, match="language: found 'fr'"): m3d_questions((), 'chest', 'axial', 'arterial', 'fr')
    with pytest.raises(QuestionError, match="letter: found 'E'"): is_correct('E. Liver', 'E')

# ---- truth: the tables below are written out anew from the vocabulary, not taken from the code that asks ----

def sites_of(text, lang):
    "Every (organ, side) that a choice can mean."
    named = {capital(site_name(o, s, lang)): [(o, s)] for o, organ in ORGANS.items() for s in (('', 'left', 'right') if organ.sided else ('',))}
    both = {BOTH_SIDES[lang].format(capital(site_name(o, '', lang))): [(o, 'left'), (o, 'right')] for o, organ in ORGANS.items() if organ.sided}
    return (named | both)[text]

KIND_OF = {lang: {capital(kind_words(k, lang)): k for k in KINDS} for lang in ('en', 'vi')}
FILLERS = {lang: {w[lang == 'vi'] for _, words in TISSUES.values() for w in words} for lang in ('en', 'vi')}

@pytest.mark.parametrize('lang', ('en', 'vi'))
def test_no_organ_offered_in_vain_holds_any_finding(lang):
    n = 0
    for findings, region, _, _, qs in ASKED[lang]:
        busy, seen = {f.organ for f in findings}, {f.organ for f in findings if f.region == region and f.seen_on != 'pet'}
        for q in (q for q in qs if q['category'] == 'Organ'):
            right, = sites_of(q['answer'], lang)
            wrong = {sites_of(c, lang)[0][0] for c in q['choices'] if c != q['answer']}
            assert right[1] == '' and all(ORGANS[o].region == region for o in wrong) and right[0] not in wrong
            if 'largest' in q['question'] or 'lớn nhất' in q['question']: assert right[0] in ('brain', 'lung', 'liver')
            else:
                assert right[0] in seen and not wrong & busy and not any(right[0] in AROUND.get(o, ()) for o in wrong); n += 1
    assert n > 300

@pytest.mark.parametrize('lang', ('en', 'vi'))
def test_no_abnormality_offered_in_vain_is_present(lang):
    n = 0
    for findings, region, _, _, qs in ASKED[lang]:
        seen = [f for f in findings if f.region == region and f.seen_on != 'pet']
        for q in (q for q in qs if q['category'] == 'Abnormality'):
            wrong = [c for c in q['choices'] if c != q['answer']]
            assert all(c in KIND_OF[lang] or c in FILLERS[lang] or c == NOTHING_SEEN[lang] for c in q['choices'])
            kinds = {KIND_OF[lang].get(c) for c in wrong} - {None}
            assert 'uptake' not in kinds and not kinds & {f.kind for f in seen}
            if q['answer'] == NOTHING_SEEN[lang]: assert not seen; continue
            right = KIND_OF[lang][q['answer']]
            of = [f for f in seen if f.kind == right and (site_name(*f.site, lang) in q['question'] or region_words(region, lang) in q['question'])]
            lung = all(f.organ == 'lung' for f in of)
            assert of and not kinds & (ALSO[right] - ({'nodule', 'mass'} if lung else set())); n += 1
    assert n > 500

@pytest.mark.parametrize('lang', ('en', 'vi'))
def test_places_and_sides_are_right_and_no_other_place_is(lang):
    n = sides = 0
    for findings, region, _, _, qs in ASKED[lang]:
        seen = [f for f in findings if f.region == region and f.seen_on != 'pet']
        for q in (q for q in qs if q['category'] == 'Location'):
            if q['answer'] in SIDE_WORDS[lang].values():
                about = [f for f in seen if lesion_words(f, lang) in q['question'].lower()]
                meant = max({(f.organ, f.kind) for f in about}, key=lambda ok: len(lesion_words(Finding(ok[0], '', ok[1]), lang)))
                assert {SIDE_WORDS[lang][f.side] for f in seen if (f.organ, f.kind) == meant} == {q['answer']}; sides += 1
                continue
            at = sites_of(q['answer'], lang)
            kinds = {f.kind for f in seen if f.site in at and kind_words(f.kind, lang) in q['question'].lower()}
            assert any({f.site for f in seen if f.kind == k} == set(at) for k in kinds)
            wrong = [s for c in q['choices'] if c != q['answer'] for s in sites_of(c, lang)]
            assert not set(wrong) & {f.site for f in findings} and not any(at[0][0] in AROUND.get(o, ()) for o, _ in wrong); n += 1
    assert n > 200 and sides > 5

def test_what_only_pet_shows_is_neither_asked_nor_denied():
    focus = Finding('thoracic_spine', '', 'uptake', None, 8.2, 'increased')
    for seed in range(40):
        qs = m3d_questions((focus,), 'chest', 'axial', 'arterial', 'en', seed)
        assert {q['category']: q['answer'] for q in qs if q['category'] not in ('Plane', 'Phase')} == {'Organ': 'Lung', 'Abnormality': 'No abnormality'}
        mixed = m3d_questions((focus, Finding('rib', 'left', 'lytic', 20., 6., 'increased')), 'chest', 'axial', 'arterial', 'en', seed)
        assert not any('horacic spine' in c for q in mixed for c in q['choices'] + [q['question']])

def test_lung_and_pleura_never_stand_against_each_other():
    for f in (Finding('pleura', 'left', 'effusion', 20., None, 'none'), Finding('lung', 'left', 'mass', 32., 5., 'increased')):
        other = {'pleura': 'lung', 'lung': 'pleura'}[f.organ]
        for seed in range(60): assert not any(other in c.lower() for q in m3d_questions((f,), 'chest', 'axial', 'arterial', 'en', seed) if q['category'] != 'Abnormality' for c in q['choices'])

def test_a_crowded_report_still_gives_true_questions():
    every = tuple(Finding(o, s, 'node' if o.endswith('_node') else 'mass', 20.) for o, s in SITES if ORGANS[o].region == 'abdomen_pelvis')
    qs = {q['category']: q for q in m3d_questions(every, 'abdomen_pelvis', 'axial', 'arterial', 'en', 0)}
    assert qs['Organ']['answer'] == 'Liver' and 'largest' in qs['Organ']['question'] and not {'Mass', 'Nodule', 'Abnormal lymph node'} & (set(qs['Abnormality']['choices']) - {qs['Abnormality']['answer']})
    assert 'Location' not in qs

# ---- the rule ----

@pytest.mark.parametrize('text,letter', [('B. Liver', 'B'), (' (C) Spleen', 'C'), ('Answer: D', 'D'), ('the answer is B', 'B'), ('A nodule', ''), ('A. Spleen B. Liver', 'A'), ('', ''), ('MD. said', ''), ('C', 'C'), ('D: rib', 'D')])
def test_the_first_letter_stated(text, letter): assert stated_letter(text) == letter

def test_the_published_rule_is_reproduced_with_its_leniency():
    assert is_correct('B. Liver', 'B') and not is_correct('B) Liver', 'B') and all(is_correct('A. a B. b C. c D. d', c) for c in LETTERS)
    assert is_correct('B. Liver', 'B', strict=True) and [is_correct('A. a B. b C. c D. d', c, strict=True) for c in LETTERS] == [True, False, False, False]

def test_a_guess_without_the_image_does_not_know_the_phase():
    qs = [q for *_, some in ASKED['en'] for q in some if q['category'] == 'Phase']
    guess = Guess(qs[:450])
    assert np.mean([guess(q) == q['letter'] for q in qs[450:]]) < .4

# ---- planes ----

@pytest.mark.parametrize('shape', [(20, 36, 48), (40, 24, 30), (9, 60, 24)])
@pytest.mark.parametrize('plane', PLANES)
def test_an_asymmetric_block_lands_where_move_says(plane, shape):
    body = np.zeros((40, 24, 30), np.float32); body[30:36, 17:22, 20:28] = 1
    series = reformat(body, plane, shape)
    where = np.array([(np.arange(n)*series.sum(tuple(b for b in range(3) if b != a))).sum()/series.sum() for a, n in enumerate(shape)])
    assert series.shape == shape and np.allclose(where, move((32.5, 19, 23.5), plane, body.shape, shape), atol=.6)
    assert np.isclose(series.mean(), body.mean(), rtol=.1)

def test_each_plane_is_seen_as_on_a_workstation():
    d, h, w = 6, 4, 5
    mark = lambda at: np.eye(1, d*h*w, np.ravel_multi_index(at, (d, h, w)), dtype=np.float32).reshape(d, h, w)
    head, back, left = mark((5, 0, 0)), mark((0, 3, 0)), mark((0, 0, 4))        # everything else near feet, front, right
    at = lambda x, plane, shape: tuple(int(i) for i in np.argwhere(reformat(x, plane, shape))[0])
    assert [at(x, 'axial', (d, h, w)) for x in (head, back, left)] == [(5, 0, 0), (0, 3, 0), (0, 0, 4)]
    assert [at(x, 'coronal', (h, d, w)) for x in (head, back, left)] == [(0, 0, 0), (3, 5, 0), (0, 5, 4)]             # (slice to the back, row from the head, column to the left)
    assert [at(x, 'sagittal', (w, d, h)) for x in (head, back, left)] == [(0, 0, 0), (0, 5, 3), (4, 5, 0)]            # (slice to the left, row from the head, column to the back)
    for plane, shape in (('axial', (d, h, w)), ('coronal', (h, d, w)), ('sagittal', (w, d, h))):
        assert all(np.allclose(move(v, plane, (d, h, w), shape), at(mark(v), plane, shape)) for v in ((5, 3, 4), (2, 1, 3)))

def test_labels_stay_labels_and_unknown_planes_are_refused():
    labels = np.zeros((8, 6, 10), np.uint8); labels[2:6] = 7
    out = reformat(labels, 'sagittal', (5, 9, 4))
    assert out.dtype == np.uint8 and set(np.unique(out)) == {0, 7}
    for f in (lambda: reformat(labels, 'oblique', (5, 9, 4)), lambda: move((0, 0, 0), 'oblique', (1, 1, 1), (1, 1, 1))):
        with pytest.raises(PhaseError, match="plane: found 'oblique'"): f()

# ---- phases ----

def test_the_aorta_tells_the_phase_in_two_hundred_patients():
    hu = {p: [44 + gains(p, np.random.default_rng(i))[0][LABEL['aorta']] for i in range(200)] for p in PHASES}
    ranges = [(min(hu[p]), max(hu[p])) for p in ('non-contrast', 'delayed', 'portal venous', 'arterial')]
    assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:])) and ranges[0] == (44, 44) and ranges[-1][0] > 250
    assert np.std(hu['arterial']) > 5                              # patients differ

def study_of(*findings, seed=3):
    "A drawn patient with the given findings instead of its own, at the usual grid."
    from petvlm.implants import place_lesion
    patient = sample_patient(seed)
    return draw(dataclasses.replace(patient, lesions=tuple(place_lesion(np.random.default_rng(i), patient.body, f) for i, f in enumerate(findings))))

@pytest.fixture(scope='module')
def ill():
    return study_of(Finding('liver', '', 'cyst', uptake='none'), Finding('kidney', 'left', 'stone', uptake='none'), Finding('lung', 'left', 'uptake', uptake='increased'), Finding('axillary_node', 'left', 'node', uptake='none'), Finding('thyroid', 'left', 'uptake', uptake='increased'))

def added(study, phase, **kw):
    ct, organs, lesions = (study.volumes[k].data for k in ('ct', 'organs', 'lesions'))
    return enhance(ct, organs, phase, np.random.default_rng(1), **({'lesions': lesions, 'findings': study.findings} | kw)) - ct

def test_drawn_phases_are_told_apart_by_the_aorta_and_keep_their_order_elsewhere(ill):
    organs, gain = ill.volumes['organs'].data, {p: added(ill, p) for p in PHASES}
    mean = lambda p, *names: float(np.mean([gain[p][organs == LABEL[n]].mean() for n in names]))
    aorta = [mean(p, 'aorta') for p in ('non-contrast', 'delayed', 'portal venous', 'arterial')]
    assert aorta[0] == 0 and all(b - a > 20 for a, b in zip(aorta, aorta[1:]))
    assert mean('portal venous', 'liver') > 2*mean('arterial', 'liver') and mean('delayed', 'renal_pelvis_left') > 90 > 25 > mean('portal venous', 'renal_pelvis_left')
    assert mean('arterial', 'vena_cava_inferior') < 45 < mean('portal venous', 'vena_cava_inferior') and all(gain[p][organs == 0].max() == 0 for p in PHASES if not ill.volumes['lesions'].data[organs == 0].any())

def test_the_renal_cortex_is_bright_before_the_medulla(ill):
    organs, gain = ill.volumes['organs'].data, added(ill, 'arterial', lesions=None, findings=())
    kidney = gain[organs == LABEL['kidney_right']].round(2)
    assert len(np.unique(kidney)) == 2 and kidney.max() > kidney.min() + 60 and .3 < (kidney == kidney.max()).mean() < .95
    from scipy import ndimage as ndi
    whole = np.isin(organs, [v for n, v in LABEL.items() if n.startswith(('kidney', 'renal_pelvis'))])
    depth = ndi.distance_transform_edt(whole, sampling=(5, 5, 5))[organs == LABEL['kidney_right']]
    assert np.array_equal(kidney == kidney.max(), depth <= CORTEX_MM)

def test_fluid_and_calcium_take_up_nothing_solid_lesions_something_and_pet_only_foci_stay_invisible(ill):
    lesions = ill.volumes['lesions'].data
    for phase in PHASES[1:]:
        gain, without = added(ill, phase), added(ill, phase, lesions=None, findings=())
        by = {f.kind + f.organ: gain[lesions == i] for i, f in enumerate(ill.findings, 1)}
        assert by['cystliver'].max() == 0 == by['stonekidney'].max() and by['nodeaxillary_node'].min() > 10
        assert without[lesions == 1].max() > 8
        for i, f in enumerate(ill.findings, 1):
            if f.kind == 'uptake': assert np.array_equal(gain[lesions == i], without[lesions == i]) and (f.organ != 'thyroid' or gain[lesions == i].max() > 20)

def test_enhancing_refuses_what_does_not_fit():
    ct, organs = np.zeros((4, 5, 6), np.float32), np.zeros((4, 5, 6), np.uint8)
    rng = np.random.default_rng(0)
    with pytest.raises(PhaseError, match="phase: found 'venous'"): enhance(ct, organs, 'venous', rng)
    with pytest.raises(PhaseError, match='expected the same grid'): enhance(ct, organs[1:], 'arterial', rng)
    with pytest.raises(PhaseError, match='ORGAN_LABELS'): enhance(ct, organs + np.uint8(len(ORGAN_LABELS)), 'arterial', rng)
    with pytest.raises(PhaseError, match='only 1 findings'): enhance(ct, organs, 'arterial', rng, organs + np.uint8(2), (Finding('liver', '', 'mass'),))

# ---- series ----

def as_series(monkeypatch, plane, phase): monkeypatch.setattr('petvlm.scans.series_of', lambda study, region: (plane, phase))

@pytest.fixture(scope='module')
def study(): return drawn_study(24)

def test_a_scan_is_a_series_with_caption_truth_and_questions(study):
    made = scan_rows(study, DATA)
    again = scan_rows(study, DATA)
    assert [r['region'] for _, r in made] and {r['region'] for _, r in made} == set(REGIONS)
    for (a, r), (b, s) in zip(made, again):
        assert r == s and np.array_equal(a['ct'], b['ct']) and a['ct'].shape == DATA.shape and a['ct'].dtype == np.float16 and 0 <= a['ct'].min() and a['ct'].max() <= 1
        assert (r['plane'], r['phase']) == series_of(study.id, r['region']) and r['kind'] == 'scan' and r['parts'] == {'CT': r['text']}
        assert r['text'] == series_sentence(r['region'], r['plane'], r['phase'], 'en') + ' ' + split(study.reports[r['region']]['en'], 'en')['CT'] and 'FDG' not in r['text']
        assert [Finding.from_dict({k: v for k, v in f.items() if k != 'voxel'}) for f in r['findings']] == [f for f in study.findings if f.region == r['region'] and f.seen_on != 'pet']
        assert [(q['category'], q['question']) for q in r['open']] == [(q['category'], q['question'].partition(' Choices: ')[0]) for q in r['closed']]
        assert all(c['answer'] == f"{c['letter']}. {o['answer']}" for o, c in zip(r['open'], r['closed']))
        assert {o['answer'] == 'No abnormality' for o in r['open'] if o['category'] == 'Abnormality'} == {not r['findings']}
    assert sum(bool(r['findings']) for _, r in made) >= 2

def test_a_plain_axial_series_is_the_ct_that_prepare_makes(study, monkeypatch):
    as_series(monkeypatch, 'axial', 'non-contrast')
    expected = {k: scaled(v, DATA)['ct'] for k, v in to_grid(study, DATA).items()}
    for arrays, r in scan_rows(study, DATA): assert np.array_equal(arrays['ct'], expected[r['region']])

@pytest.mark.parametrize('plane', PLANES)
def test_findings_lie_where_the_series_shows_them(plane, monkeypatch):
    as_series(monkeypatch, plane, 'non-contrast')
    bright = study_of(Finding('iliac_bone', 'left', 'sclerotic', uptake='none'), Finding('gallbladder', '', 'stone', uptake='none'), Finding('kidney', 'right', 'stone', uptake='none'))
    bright = dataclasses.replace(bright, reports=reports_of(bright.findings, 3))
    gone = dataclasses.replace(study_of(), reports=bright.reports)
    with_, without = ({r['region']: (a['ct'].astype(np.float32), r) for a, r in scan_rows(s, DATA)}['abdomen_pelvis'] for s in (bright, gone))
    extra = with_[0] - without[0]
    assert len(with_[1]['findings']) == 3
    for f in with_[1]['findings']:
        v = np.array(f['voxel'])
        box = tuple(slice(max(0, int(round(x)) - 3), int(round(x)) + 4) for x in v)
        peak = np.array(np.unravel_index(extra[box].argmax(), extra[box].shape)) + [s.start for s in box]
        assert extra[tuple(peak)] > .04 and np.linalg.norm(peak - v) < 2
        lateral = f['voxel'][0] if plane == 'sagittal' else f['voxel'][2]
        middle = (DATA.shape[0] if plane == 'sagittal' else DATA.shape[2])/2
        assert (lateral > middle) == (f['side'] == 'left')                        # gallbladder and right kidney on the right

def test_contrast_reaches_the_series_and_a_study_without_labels_has_none(study, monkeypatch):
    as_series(monkeypatch, 'axial', 'arterial')
    bare = dataclasses.replace(study, volumes={k: v for k, v in study.volumes.items() if k != 'organs'})
    (a, r), (b, s) = (next((x, y) for x, y in scan_rows(st, DATA) if y['region'] == 'chest') for st in (study, bare))
    assert r['phase'] == 'arterial' and s['phase'] == 'non-contrast' and 'non-contrast' in s['text'] and {q['answer'] for q in s['open'] if q['category'] == 'Phase'} == {'Non-contrast'}
    gain = (a['ct'].astype(np.float32) - b['ct'])*2000
    assert gain.max() > 120 and gain.min() > -2 and np.median(gain) < 5

def test_a_ct_alone_is_enough_and_no_ct_or_no_report_is_refused(study):
    alone = dataclasses.replace(study, volumes={'ct': study.volumes['ct']}, findings=tuple(dataclasses.replace(f, center_mm=None) for f in study.findings))
    made = scan_rows(alone, DATA)
    assert len(made) == 3 and {f['voxel'] for _, r in made for f in r['findings']} == {None}
    with pytest.raises(PrepareError, match="no 'ct' among"): scan_rows(dataclasses.replace(study, volumes={'pet': study.volumes['pet']}), DATA)
    with pytest.raises(PrepareError, match=r"expected 'en'"): scan_rows(dataclasses.replace(study, reports={'chest': {'vi': 'x'}}), DATA)
    assert scan_rows(dataclasses.replace(study, reports={}), DATA) == []

def test_vietnamese_series(study):
    for _, r in scan_rows(study, dataclasses.replace(DATA, language='vi')):
        assert r['text'].startswith('CT ') and 'mặt phẳng' in r['text'] and r['closed'][0]['question'].count('Mặt phẳng') == 4

def test_the_largest_organ_is_in_the_box_of_its_region(study):
    names = {'head_neck': ('brain', 'white_matter_left', 'white_matter_right', 'basal_ganglia_left', 'basal_ganglia_right'), 'chest': ('lung_left', 'lung_right'), 'abdomen_pelvis': ('liver', 'liver_left')}
    bounds = region_bounds(study.volumes['ct'], DATA.overlap)
    for region, slab in cut(study.volumes['organs'], bounds).items():
        n = Counter()
        for label, count in zip(*np.unique(slab.data, return_counts=True)): n[ORGAN_LABELS[label]] += int(count)
        own = sum(n[x] for x in names[region])
        others = {k: v for k, v in n.items() if k not in (*names[region], 'background', 'fat', 'muscle', 'humerus', 'psoas', 'skull')}
        assert own > max(others.values()), (region, own, max(others, key=others.get))


@pytest.mark.parametrize('said,right', [('C. Axial.', True), ('axial', True), ('B) Axial', True), ('C. Coronal', False), ('C.', False), ('', False)])
def test_the_text_of_a_choice_counts_beside_its_letter(said, right): assert says(said, 'A. Axial') == right
