"Text metrics against public scores, with the network shut; finding scores and intervals against counting by hand."
import json, socket
from pathlib import Path
import numpy as np, pytest
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from sacrebleu.metrics import BLEU
from petvlm.facts import COUNTS, FactError, bootstrap, by_patient, finding_counts, finding_scores, judge, paired_bootstrap, statistic_of, sums_of
from petvlm.findings import LESIONS, ORGANS, Finding
from petvlm.metrics import METRICS, MODULES, MetricError, TOKENIZERS, score, score_each, statistics

HERE = Path(__file__).parent
REPORTS = HERE.parent.parent / 'shared/data/reports_vi/pairs.json'

@pytest.fixture(scope='module')
def public(): return json.loads((HERE / 'fixtures/metrics_vi.json').read_text())

@pytest.fixture(scope='module')
def pairs(public): return [list(x) for x in zip(*public['pairs'])]

@pytest.fixture
def no_network(monkeypatch):
    def refuse(*a, **k): raise AssertionError('a metric asked the network')
    for name in ('connect', 'connect_ex'): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)

@pytest.mark.parametrize('metric,tokenizer,key,scale', [
    ('rouge1', 'rouge_score', 'rouge1', 100), ('rougeL', 'rouge_score', 'rougeL', 100), ('rouge1', 'whitespace', 'rouge1_ws_tokenizer', 100),
    ('rougeL', 'whitespace', 'rougeL_ws_tokenizer', 100), ('bleu4', '13a', 'bleu_13a_effective_order', 1)])
def test_each_pair_scores_as_in_public_code(public, pairs, metric, tokenizer, key, scale):
    got = score_each(*pairs, (metric,), tokenizer)[metric]
    np.testing.assert_allclose(got, scale * np.array(public['per_sample'][key]), atol=2e-7)

def test_corpus_bleu_is_the_public_one(public, pairs):
    got = score(*pairs, ('bleu1', 'bleu4', 'bleu4_nltk'), '13a')
    assert got['bleu4'] == pytest.approx(public['corpus']['bleu_13a'], abs=1e-7)
    assert got['bleu1'] == pytest.approx(100 * public['corpus']['bleu1'], abs=1e-7)
    nltk = corpus_bleu([[r.split()] for r in pairs[1]], [p.split() for p in pairs[0]], smoothing_function=SmoothingFunction().method4)
    assert got['bleu4_nltk'] == pytest.approx(100 * nltk, abs=1e-9)

@pytest.mark.parametrize('seed', range(8))
def test_sums_give_the_score_of_any_resample(pairs, seed):
    "The bootstrap multiplies sums; sacrebleu on the texts themselves must agree, also for tiny sets with empty orders."
    size = [1, 2, 3, 5, 8, 13, 21, 30][seed]
    drawn = np.random.default_rng(seed).integers(len(pairs[0]), size=size)
    said, meant = ([' '.join(TOKENIZERS['unicode'](side[i])) for i in drawn] for side in pairs)
    rows = statistics(*pairs, ('bleu4',))['bleu4']
    assert METRICS['bleu4'].finish(rows[drawn].sum(0)) == pytest.approx(BLEU(tokenize='none').corpus_score(said, [meant]).score, abs=1e-9)

def test_no_network_is_asked(no_network, pairs):
    got = score([p[:200] for p in pairs[0][:4]], [r[:200] for r in pairs[1][:4]], tuple(METRICS))
    assert list(got) == list(METRICS) and got['bertscore'] > 50

def test_bertscore_does_not_depend_on_what_else_is_scored():
    texts = ['Nốt mờ ở phổi trái.', 'Gan không có khối bất thường, lách không to.', '', 'Hạch trung thất 12 mm.']
    refs = ['Nốt mờ ở phổi phải.', 'Gan có nang.', 'Hạch cổ.', 'Hạch trung thất 12 mm.']
    together = score_each(texts, refs, ('bertscore',))['bertscore']
    alone = [score_each([t], [r], ('bertscore',))['bertscore'][0] for t, r in zip(texts, refs)]
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert together[2] == 0 and together[3] == pytest.approx(100, abs=1e-3)

def test_modules_of_the_register_are_in_the_package():
    assert {m.module for m in METRICS.values()} == set(MODULES)

@pytest.mark.parametrize('args,words', [
    ((['a'], []), '1 predictions but 0 references'), (([], []), 'nothing to score'), ((['a'], ['a'], ('bleu5',)), "unknown metric 'bleu5'"),
    ((['a'], ['a'], ('bleu4',), 'vi'), "unknown tokenizer 'vi'"), (([None], ['a']), 'expected text, found NoneType')])
def test_refusals_say_what_was_found(args, words):
    with pytest.raises(MetricError, match=words): score(*args)

@pytest.mark.skipif(not REPORTS.exists(), reason='real reports (../shared/data/reports_vi) are not here')
def test_tokenizer_moves_rouge_on_real_reports():
    real = json.loads(REPORTS.read_text())
    said, meant = [r['generated'] for r in real], [r['ground_truth'] for r in real]
    torn, whole = (score(said, meant, ('rouge1',), t)['rouge1'] for t in ('rouge_score', 'unicode'))
    assert torn > whole + 5

# findings

def random_findings(rng, n):
    picks = [LESIONS[i] for i in rng.integers(len(LESIONS), size=n)]
    return [Finding(o, ('left', 'right')[rng.integers(2)] if ORGANS[o].sided else '', k, uptake=u) for o, k, u in picks]

@pytest.fixture(scope='module')
def samples():
    rng = np.random.default_rng(7)
    truth = [random_findings(rng, rng.integers(0, 5)) for _ in range(120)]
    said = [[f for f in t if rng.random() < .6] + random_findings(rng, rng.integers(0, 2)) for t in truth]
    return said, truth, [f'p{i // 3}' for i in range(120)]

def test_scores_are_those_of_pooled_sets(samples):
    said, truth, patients = samples
    S, T = ({(i, f.site) for i, fs in enumerate(x) for f in fs} for x in (said, truth))
    got = finding_scores(said, truth, patients=patients)
    assert (got['tp'], got['fp'], got['fn'], got['n']) == (len(S & T), len(S - T), len(T - S), 120)
    assert got['f1'] == pytest.approx(2 * len(S & T) / (len(S) + len(T))) and got['fp_per_patient'] == pytest.approx(len(S - T) / 40)

def test_turning_the_question_round_swaps_precision_and_recall(samples):
    said, truth, _ = samples
    a, b = finding_scores(said, truth), finding_scores(truth, said)
    assert (a['precision'], a['recall'], a['f1'], a['flips']) == (b['recall'], b['precision'], b['f1'], b['flips'])

def test_kind_makes_the_key_stricter():
    a, b = [Finding('lung', 'left', 'nodule')], [Finding('lung', 'left', 'mass')]
    assert finding_scores([a], [b])['f1'] == 1 and finding_scores([a], [b], 'site_kind')['f1'] == 0

@pytest.mark.parametrize('said,there,flips', [
    ([('lung', 'left')], [('lung', 'right')], 1), ([('lung', 'left'), ('kidney', 'right')], [('lung', 'right'), ('kidney', 'left')], 2),
    ([('lung', '')], [('lung', 'right')], 0), ([('lung', 'left'), ('lung', 'right')], [('lung', 'right')], 0), ([('lung', 'left')], [('rib', 'right')], 0)])
def test_flips(said, there, flips):
    made = [[Finding(o, s, 'nodule') for o, s in x] for x in (said, there)]
    assert finding_counts([made[0]], [made[1]])[0, COUNTS.index('flips')] == flips

def test_recall_by_what_shows_the_finding():
    truth = [[Finding('pleura', 'left', 'effusion', uptake='none'), Finding('colon', '', 'uptake', uptake='increased'), Finding('liver', '', 'mass', uptake='increased')]]
    blind_to_ct = finding_scores([[f for f in truth[0] if f.seen_on != 'ct']], truth)
    assert (blind_to_ct['recall_pet'], blind_to_ct['recall_ct'], blind_to_ct['recall_both']) == (1, 0, 1)

def test_bootstrap_resamples_patients_not_regions(samples):
    "Three equal regions per patient hold no more information than one: the interval must not shrink."
    x = np.random.default_rng(0).normal(size=60)
    thrice = by_patient(np.column_stack([np.repeat(x, 3), np.ones(180)]), np.repeat([f'{i:02d}' for i in range(60)], 3))[1]
    assert bootstrap(thrice) == pytest.approx(bootstrap(x))

def test_bootstrap_is_the_loop_it_replaces(samples):
    said, truth, patients = samples
    _, rows = by_patient(finding_counts(said, truth), patients)
    rows = np.column_stack([rows, np.ones(len(rows))])
    f1 = statistic_of('finding_f1')
    draws = np.random.default_rng(5).multinomial(len(rows), np.full(len(rows), 1/len(rows)), size=200)
    slow = [float(f1(np.repeat(rows, d, axis=0).sum(0))) for d in draws]
    assert bootstrap(rows, f1, n=200, seed=5) == pytest.approx(tuple(np.quantile(slow, [.025, .975])))

def test_interval_covers_about_as_often_as_it_says():
    hits = sum(lo <= 0 <= hi for s in range(200) for lo, hi in [bootstrap(np.random.default_rng(s).normal(size=40), n=400, seed=s)])
    assert .88 <= hits / 200 <= .99

def test_a_system_does_not_differ_from_itself(samples):
    said, truth, patients = samples
    record = judge(['a'] * 120, ['a'] * 120, patients, said, truth, metrics=('rouge1',))['per_patient']
    same = paired_bootstrap(*[sums_of('finding_f1', record)] * 2, statistic_of('finding_f1'))
    assert same == {'difference': 0, 'lo': 0, 'hi': 0, 'p': 1}

def test_judge_is_json_and_deterministic(samples):
    said, truth, patients = samples
    texts = [' '.join(f.organ for f in t) or 'none' for t in truth]
    a, b = (judge(texts, texts[::-1], patients, said, truth, metrics=('bleu4', 'rouge1')) for _ in range(2))
    assert json.dumps(a, allow_nan=False) == json.dumps(b, allow_nan=False) and a['n_patients'] == 40
    assert all(m['lo'] <= m['value'] <= m['hi'] for m in a['metrics'].values())

@pytest.mark.parametrize('call', [lambda: finding_scores([[]], []), lambda: finding_scores([[]], [[]], 'organ'), lambda: bootstrap([]),
                                  lambda: paired_bootstrap([1.], [1., 2.]), lambda: by_patient(np.zeros((2, 1)), ['a']), lambda: statistic_of('f2')])
def test_facts_refuse(call):
    with pytest.raises(FactError): call()
