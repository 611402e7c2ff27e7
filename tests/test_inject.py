"Injected errors: exactly the facts that were meant, in both languages, for every kind; what cannot be injected is refused."
from collections import Counter
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from petvlm.findings import LANGUAGES, LESIONS, ORGANS, REGIONS, Finding
from petvlm.inject import ALTERED, ERRORS, InjectError, denial, fact, inject, lines_of, possible, write_lines
from petvlm.lexicon import LEXICA
from petvlm.reports import parse, write_report
from petvlm.wording import ReportError

CHEST = [Finding('lung', 'left', 'nodule', 14., 6.1, 'increased'), Finding('pleura', 'right', 'effusion', 22., None, 'none'), Finding('esophagus', '', 'mass', 31., 9.4, 'increased')]
SEEDS = st.integers(0, 2**20)


def rng(*seed): return np.random.default_rng(seed)
def facts(findings): return Counter(map(fact, findings))

def draw(seed, region):
    "Up to five findings of a region; two may lie at one site, some lack numbers."
    r, here = rng(seed, 11), [x for x in LESIONS if ORGANS[x[0]].region == region]
    def one(organ, kind, uptake):
        side = ('left', 'right')[int(r.integers(2))] if ORGANS[organ].sided else ''
        size = None if kind == 'uptake' or r.random() < .1 else float(r.uniform(8, 60))
        return Finding(organ, side, kind, size, float(r.uniform(2, 30)) if uptake == 'increased' and r.random() > .1 else None, uptake)
    return [one(*here[int(i)]) for i in r.integers(len(here), size=int(r.integers(1, 6)))]


@pytest.mark.parametrize('language', LANGUAGES)
def test_without_an_error_the_report_gives_back_its_findings(language):
    for seed in range(150):
        for region in REGIONS:
            found = draw(seed, region)
            r = write_lines(lines_of(found, region), region, language, seed)
            assert facts(parse(r.text, language)) == facts(found) == facts(r.findings), r.text


@pytest.mark.parametrize('language', LANGUAGES)
def test_every_lesion_can_be_denied_in_every_wording(language):
    for organ, kind, uptake in LESIONS:
        for seed in range(12):
            said = denial(Finding(organ, 'left' if ORGANS[organ].sided else '', kind, 14., None, uptake), language, rng(seed))
            assert parse(said, language) == [] and LEXICA[language].denied.search(said.lower()), said


CHANGED = {'side': ('side',), 'organ': ('organ', 'side'), 'number': ('size_mm', 'suvmax')}

@settings(max_examples=120, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from(REGIONS), st.sampled_from(LANGUAGES), st.sampled_from(ERRORS), st.integers(1, 4))
def test_exactly_the_intended_facts_change(seed, region, language, kind, k):
    found = draw(seed, region)
    if len(facts(found)) < len(found) or not possible(found, kind, region): return
    got, clean = inject(found, kind, k, rng(seed), language, region, seed), inject(found, kind, 0, rng(seed), language, region, seed)
    a, b = facts(parse(clean.text, language)), facts(parse(got.text, language))
    assert a == facts(found) and 1 <= got.made <= k
    assert (a - b).total() == (0 if kind == 'invention' else got.made) and (b - a).total() == (got.made if kind in ('side', 'organ', 'number', 'invention') else 0)
    for e in got.errors:
        if kind in CHANGED:
            differ = {name for name in ('organ', 'side', 'kind', 'uptake', 'size_mm', 'suvmax') if getattr(e.before, name) != getattr(e.after, name)}
            assert differ and differ <= set(CHANGED[kind]) and kind.replace('number', next(iter(differ))) in differ and (kind != 'number' or len(differ) == 1)
        assert (e.before is None) == (kind == 'invention') and (e.after is None) == (kind in ('negation', 'omission'))
        if kind == 'invention': assert e.after.site not in {f.site for f in found}


def test_a_side_error_by_hand():
    got = inject(CHEST[:1], 'side', 1, rng(0), 'en', 'chest', seed=3)
    clean = inject(CHEST[:1], 'side', 0, rng(0), 'en', 'chest', seed=3)
    assert got.text == clean.text.replace('left', 'right') != clean.text and got.errors[0].after == Finding('lung', 'right', 'nodule', 14., 6.1, 'increased')


def test_a_number_error_is_half_or_twice():
    seen = {(g.size_mm, g.suvmax) for s in range(60) for g in inject(CHEST[:1], 'number', 1, rng(s), 'vi', 'chest').findings}
    assert seen == {(7., 6.1), (28., 6.1), (14., 3.), (14., 12.2)}      # 3.05 is printed as 3.0: round half to even of the binary number below it


def test_a_denied_finding_is_named_and_an_omitted_one_is_not():
    denied, gone = (inject(CHEST, kind, 3, rng(0), 'en', 'chest', seed=3) for kind in ('negation', 'omission'))
    assert denied.findings == gone.findings == () and denied.made == gone.made == 3
    assert 'effusion' in denied.text and 'oesophagus' in denied.text and 'effusion' not in gone.text and 'Impression' not in denied.text + gone.text


@pytest.mark.parametrize('kind', ERRORS)
def test_words_stay_where_no_error_is(kind):
    "All sentences of the body but those with errors are the clean report's, in its order; an invention may silence a remark on its organ."
    for seed in range(40):
        clean, got = (inject(CHEST, kind, k, rng(seed), 'vi', 'chest', seed) for k in (0, 1))
        a, b = (r.text.partition('Kết luận')[0].strip(' .').split('. ') for r in (clean, got))
        assert len(set(b) - set(a)) == (kind != 'omission') and len(set(a) - set(b)) <= 2
        kept = [s for s in b if s in a]
        assert kept == [s for s in a if s in kept]


def test_severity_is_nested_and_stops_where_there_is_no_room():
    steps = [inject(CHEST, 'side', k, rng(7), 'vi', 'chest').errors for k in range(5)]
    assert [len(s) for s in steps] == [0, 1, 2, 2, 2] and steps[2][:1] == steps[1]
    many = [inject(CHEST, 'invention', k, rng(7), 'vi', 'chest').errors for k in (1, 4)]
    assert many[1][:1] == many[0] and len({e.after.site for e in many[1]}) == 4


def test_possible_counts_by_hand():
    assert [possible(CHEST, k, 'chest') for k in ERRORS] == [2, 1, 3, 3, 3, 1]     # organ: only the mass may move, to a lung without a finding on that side
    pair = [Finding('lung', s, 'nodule', 10., None, 'none') for s in ('left', 'right')]
    assert possible(pair, 'side', 'chest') == 0                                      # the other side already has the same nodule
    assert possible([Finding('liver', '', 'cyst')], 'number', 'abdomen_pelvis') == 0 and possible(CHEST, 'omission', 'head_neck') == 0


def test_remarks_on_normal_organs_never_contradict_the_claims():
    for seed in range(60):
        text = inject(CHEST[1:2], 'invention', 3, rng(seed), 'en', 'chest', seed)
        claimed = {f.organ for f in text.findings}
        assert not ('lung' in claimed and any(s in text.text for s in ('Both lungs are clear', 'No nodule or mass in the lungs', 'parenchyma is clear')))


def test_as_long_as_a_report_of_the_writer():
    ours, theirs = (np.mean([len(f(s).text.split()) for s in range(80)]) for f in (lambda s: write_lines(lines_of(CHEST, 'chest'), 'chest', 'vi', s), lambda s: write_report(CHEST, 'chest', 'vi', s)))
    assert abs(ours/theirs - 1) < .1


@pytest.mark.parametrize('call,match', [
    (lambda: inject(CHEST, 'typo', 1, rng(0)), "kind: found 'typo'"), (lambda: possible(CHEST, 'typo', 'chest'), "kind: found 'typo'"),
    (lambda: inject(CHEST, 'side', -1, rng(0)), 'k: found -1'), (lambda: inject(CHEST, 'side', 1, rng(0), region='arm'), "region: found 'arm'"),
    (lambda: inject(CHEST[2:], 'side', 1, rng(0)), 'side: none of the 1 findings of chest'), (lambda: inject([], 'omission', 1, rng(0)), 'omission: none of the 0 findings'),
    (lambda: inject([Finding('lung', 'left', 'node', 9.)], 'omission', 1, rng(0)), 'without errors is read as')])
def test_what_cannot_be_injected_is_refused(call, match):
    with pytest.raises(InjectError, match=match): call()

def test_an_unknown_language_is_the_writer_s_error():
    with pytest.raises(ReportError, match="language: found 'fr'"): inject(CHEST, 'side', 1, rng(0), 'fr')

def test_the_kinds_of_the_issue():
    assert ERRORS == ('side', 'organ', 'number', 'negation', 'omission', 'invention') and set(ALTERED) < set(ERRORS)
