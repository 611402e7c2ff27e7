"Text metrics against public scores, with the network shut; finding scores and intervals against counting by hand."
import importlib.util, json, os, socket, zipfile
from types import SimpleNamespace
from pathlib import Path
import numpy as np, pytest
from nltk.stem import PorterStemmer
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from petvlm.facts import COUNTS, FactError, bootstrap, by_patient, finding_counts, finding_scores, judge, paired_bootstrap, statistic_of, sums_of
from petvlm.findings import LESIONS, ORGANS, Finding
from petvlm.metric_bleu import counts
from petvlm.metric_meteor import NoSynonyms, WordNet, meteor
from petvlm.metric_rouge import f_measure, rouge_l_coco
from petvlm.metrics import METRICS, MODULES, MetricError, TOKENIZERS, label_of, load_metric, score, score_each, statistics, tokenizer_of
from petvlm.words import common_subsequence, compounds, ngram_counts, overlap, vietnamese_words

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
    ('rouge1', 'rouge-default', 'rouge1', 100), ('rougeL', 'rouge-default', 'rougeL', 100), ('rouge1', 'whitespace', 'rouge1_ws_tokenizer', 100),
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
    names = tuple(m for m, x in METRICS.items() if not x.extra)
    got = score([p[:200] for p in pairs[0][::9]], [r[:200] for r in pairs[1][::9]], names)   # every ninth: CIDEr wants different references
    assert list(got) == list(names) and got['bertscore'] > 50

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

def test_every_result_names_its_tokenizer(pairs):
    names = ('bleu4', 'bleu4_nltk', 'bleu1_hf', 'rouge2', 'rougeL_coco', 'meteor', 'cider')
    got = score(*pairs, names, 'intl')
    assert got.tokenizers == {m: {'bleu4_nltk': 'whitespace', 'bleu1_hf': '13a'}.get(m, 'intl') for m in names} == score_each(*pairs, names, 'intl').tokenizers
    assert tokenizer_of('bertscore', 'intl') == 'own' and '[intl]' in repr(got) and json.loads(json.dumps(got)) == dict(got)
    for module, metric in (('bleu', 'bleu4'), ('rouge', 'rouge2'), ('meteor', 'meteor'), ('cider', 'cider')):
        assert load_metric(module).compute(predictions=pairs[0], references=pairs[1], metrics=(metric,), tokenizer='13a')['tokenizer'] == '13a'
    with pytest.raises(MetricError, match="unknown metric 'bleu5'"): tokenizer_of('bleu5')

# n-grams and subsequences of whole sets, against one pair at a time

def drawn(rng, n, words=40, longest=120):
    "Texts of few and of many different words, some empty."
    return [' '.join(f'w{i}' for i in rng.integers(rng.integers(1, words), size=rng.integers(0, longest))) for _ in range(n)]

def test_rouge_is_rouge_scores_on_random_texts():
    rng, names = np.random.default_rng(11), ['rouge1', 'rouge2', 'rougeL']
    said, meant = ['', *drawn(rng, 200)], [*drawn(rng, 200), '']
    scorer = RougeScorer(names, tokenizer=SimpleNamespace(tokenize=str.split))
    theirs = [scorer.score(m, s) for s, m in zip(said, meant)]
    got = score_each(said, meant, names, 'whitespace')
    assert max(len(s.split()) for s in said) > 64   # more words than a machine word has bits
    for m in names: np.testing.assert_allclose(got[m], [100 * t[m].fmeasure for t in theirs], rtol=0, atol=1e-9)

def test_bleu_counts_are_sacrebleus_on_random_texts():
    rng = np.random.default_rng(12)
    said, meant = drawn(rng, 100, 8, 40), drawn(rng, 100, 8, 40)
    bleu = BLEU(tokenize='none', max_ngram_order=4, effective_order=True)
    theirs = [(*s.counts, *s.totals, s.sys_len, s.ref_len) for s in (bleu.sentence_score(a, [b]) for a, b in zip(said, meant))]
    assert counts([t.split() for t in said], [t.split() for t in meant]).tolist() == [list(map(float, t)) for t in theirs]

def test_overlap_is_that_of_counters():
    from collections import Counter
    rng = np.random.default_rng(13)
    said, meant = ([t.split() for t in drawn(rng, 40, 6, 20)] for _ in range(2))
    grams = lambda t, n: Counter(tuple(t[i:i + n]) for i in range(len(t) - n + 1))
    for row, s, m in zip(overlap(said, meant, 3), said, meant):
        assert row.tolist() == [[(grams(s, n) & grams(m, n)).total(), grams(s, n).total(), grams(m, n).total()] for n in (1, 2, 3)]

def test_texts_without_words_have_nothing_in_common():
    assert overlap([[], []], [[], []], 2).tolist() == [[[0, 0, 0]]*2]*2 and common_subsequence([], []) == common_subsequence('a', '') == 0
    names = [m for m, x in METRICS.items() if x.module in ('bleu', 'rouge', 'meteor')]
    assert set(score(['', '.'], ['', '!'], names).values()) == {0.}

def test_common_subsequence_is_that_of_the_table():
    rng = np.random.default_rng(14)
    for _ in range(60):
        a, b = (rng.integers(rng.integers(1, 12), size=rng.integers(0, 150)).tolist() for _ in range(2))
        row = [0] * (len(b) + 1)
        for x in a:
            before = row[:]
            for j, y in enumerate(b): row[j + 1] = before[j] + 1 if x == y else max(before[j + 1], row[j])
        assert common_subsequence(a, b) == common_subsequence(b, a) == row[-1]

def test_rouge_l_of_several_references_takes_the_best_of_each():
    "pycocoevalcap: the best precision and the best recall, each over all references, then F with beta 1.2; by hand."
    said, one, other = 'a b c d'.split(), 'a b'.split(), 'a b c x y z w v'.split()   # 2 of 4 and all 2; 3 of 4 and 3 of 8
    assert rouge_l_coco(said, [one, other]) == pytest.approx(2.44 * .75 * 1 / (1 + 1.44 * .75)) and rouge_l_coco(said, [['x']]) == rouge_l_coco([], [one]) == 0
    assert rouge_l_coco(said, [other]) == pytest.approx(f_measure(np.array([3.]), np.array([4.]), np.array([8.]), 1.2)[0])

# Vietnamese words

def test_vietnamese_words_are_the_longest_of_the_list():
    index = compounds(['hình ảnh', 'tuyến thượng thận', 'thượng thận', 'chuyển hoá', 'phổi', 'a b c d'])
    assert vietnamese_words('Hình ảnh tuyến thượng thận TRÁI', index) == ['hình_ảnh', 'tuyến_thượng_thận', 'trái']
    assert vietnamese_words('hình, ảnh. tuyến (thượng thận) phổi', index) == ['hình', 'ảnh', 'tuyến', 'thượng_thận', 'phổi']   # a sign ends a word
    assert vietnamese_words('a b c hình ảnh a b c d', index) == ['a', 'b', 'c', 'hình_ảnh', 'a_b_c_d']                       # a beginning that leads nowhere is given back
    assert vietnamese_words('', index) == vietnamese_words(' .,', index) == []

def test_both_places_of_the_tone_mark_and_both_forms_find_the_word():
    import unicodedata
    for listed in ('chuyển hoá', 'chuyển hóa'):
        index = compounds([listed])
        for text in ('chuyển hoá', 'chuyển hóa', unicodedata.normalize('NFD', 'Chuyển  hóa')): assert [w.replace('hoá', 'hóa') for w in vietnamese_words(text, index)] == ['chuyển_hóa']
    assert vietnamese_words('chuyển hòa', compounds(['chuyển hoá'])) == ['chuyển', 'hòa']   # another tone is another word

def test_the_list_is_read_as_text_and_its_absence_said(tmp_path, monkeypatch):
    from petvlm import words
    monkeypatch.setattr(words, 'find_spec', lambda name: None)
    words._pyvi.cache_clear()
    with pytest.raises(MetricError, match='pip install --no-deps pyvi==0.1.1'): score(['phổi'], ['phổi'], ('rouge1',), 'vietnamese')
    (tmp_path / 'models').mkdir()
    (tmp_path / 'models/words.txt').write_text('phổi\nkích thước\n')
    (tmp_path / '__init__.py').write_text('raise SystemExit("the package was imported")')
    monkeypatch.setattr(words, 'find_spec', lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    got = score(['kích thước lớn'], ['kích thước nhỏ'], ('rouge1', 'rouge2'), 'vietnamese')
    words._pyvi.cache_clear()
    assert dict(got) == {'rouge1': 50, 'rouge2': 0} and got.tokenizers['rouge1'] == 'vietnamese'

@pytest.mark.skipif(not importlib.util.find_spec('pyvi'), reason='pyvi is not installed (pip install --no-deps pyvi==0.1.1)')
def test_the_real_list_knows_the_words_of_a_report():
    assert vietnamese_words('Hình ảnh tăng chuyển hóa FDG ở tuyến thượng thận trái, kích thước 14 mm.') == 'hình_ảnh tăng chuyển_hóa fdg ở tuyến_thượng_thận trái kích_thước 14 mm'.split()

# real reports

REAL = pytest.mark.skipif(not REPORTS.exists(), reason='real reports (../shared/data/reports_vi) are not here')

@pytest.fixture(scope='module')
def real():
    rows = json.loads(REPORTS.read_text('utf-8'))
    return [r['generated'] for r in rows], [r['ground_truth'] for r in rows]

@REAL
def test_tokenizer_moves_rouge_on_real_reports(real):
    torn, whole = (score(*real, ('rouge1',), t)['rouge1'] for t in ('rouge-default', 'unicode'))
    assert torn > whole + 5

@REAL
@pytest.mark.parametrize('tokenizer,stem', [('rouge-default', False), ('rouge-stem', True)])
def test_rouge_on_real_reports_is_rouge_scores(real, tokenizer, stem):
    names = ['rouge1', 'rouge2', 'rougeL']
    scorer = RougeScorer(names, use_stemmer=stem)
    theirs = [scorer.score(m[:900], s[:900]) for s, m in zip(*real)]   # its table takes a second for a whole report
    got = score_each(*([t[:900] for t in side] for side in real), names, tokenizer)
    for m in names: np.testing.assert_allclose(got[m], [100 * t[m].fmeasure for t in theirs], rtol=0, atol=1e-9)

@REAL
@pytest.mark.parametrize('tokenizer,settings', [('13a', {}), ('intl', {'tokenize': 'intl'}), ('13a-lower', {'lowercase': True})])
def test_bleu_on_real_reports_is_sacrebleus(real, tokenizer, settings):
    said, meant = real
    got = score(said, meant, ('bleu1', 'bleu2', 'bleu3', 'bleu4'), tokenizer)
    theirs = [BLEU(max_ngram_order=n, **settings).corpus_score(said, [meant]).score for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(list(got.values()), theirs, rtol=0, atol=1e-9)
    each = [BLEU(effective_order=True, **settings).sentence_score(s, [m]).score for s, m in zip(said, meant)]
    np.testing.assert_allclose(score_each(said, meant, ('bleu4',), tokenizer)['bleu4'], each, rtol=0, atol=1e-9)

@REAL
def test_bleu_and_meteor_on_real_reports_are_nltks(real):
    said, meant = real
    whole = corpus_bleu([[m.split()] for m in meant], [s.split() for s in said], smoothing_function=SmoothingFunction().method4)
    assert score(said, meant, ('bleu4_nltk',))['bleu4_nltk'] == pytest.approx(100 * whole, abs=1e-9)
    for tokenizer in ('nltk', 'unicode'):
        split = TOKENIZERS[tokenizer]
        theirs = [100 * single_meteor_score(split(m), split(s), wordnet=NoSynonyms()) for s, m in zip(said, meant)]
        np.testing.assert_allclose(score_each(said, meant, ('meteor',), tokenizer)['meteor'], theirs, rtol=0, atol=1e-9)

@REAL
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('pycocoevalcap'), reason='pycocoevalcap is not installed (pip install --no-deps pycocoevalcap==1.2)')
def test_real_reports_score_as_in_pycocoevalcap(real):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    said, meant = ([' '.join(TOKENIZERS['unicode'](t)) for t in side] for side in real)
    theirs = {name: scorer.compute_score({i: [m] for i, m in enumerate(meant)}, {i: [s] for i, s in enumerate(said)}) for name, scorer in (('bleu', Bleu(4)), ('cider', Cider()), ('rouge', Rouge()))}
    orders = [f'bleu{n}_coco' for n in (1, 2, 3, 4)]
    got, each = score(*real, orders), score_each(*real, (*orders, 'cider', 'rougeL_coco'))
    np.testing.assert_allclose(list(got.values()), 100 * np.array(theirs['bleu'][0]), atol=1e-6)
    np.testing.assert_allclose([each[m] for m in orders], 100 * np.array(theirs['bleu'][1]), atol=1e-6)
    np.testing.assert_allclose(each['cider'], 100 * theirs['cider'][1], atol=1e-6)
    np.testing.assert_allclose(each['rougeL_coco'], 100 * theirs['rouge'][1], atol=1e-6)

# METEOR, CIDEr, BLEU-2, BLEU-3

WORDNET = Path(os.environ.get('PETVLM_WORDNET', '/usr/share/wordnet'))   # Debian: apt-get install wordnet-base
spaced = lambda text: ' '.join(''.join(f' {c} ' if c in '.,;:!?()' else c for c in text.lower()).split())
GROUPS = {'all': slice(None), 'en': slice(30), 'vi': slice(30, None)}

@pytest.fixture(scope='module')
def both(): return json.loads((HERE / 'fixtures/metrics.json').read_text('utf-8'))

@pytest.fixture(scope='module')
def synonyms(): return json.loads((HERE / 'fixtures/metrics_synonyms.json').read_text('utf-8'))

@pytest.fixture(scope='module')
def thin_wordnet(synonyms, tmp_path_factory):
    "The fixture's part of WordNet 3.0 as files: senses get the byte at which they are written."
    folder, head = tmp_path_factory.mktemp('thin'), '  1 WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved.  \n'
    for pos in ('noun', 'verb', 'adj', 'adv'):
        data, at = head, {}
        for old, words in synonyms['wordnet']['data'][pos].items():
            at[old] = f'{len(data.encode()):08d}'
            data += f"{at[old]} 00 {pos[0]} {len(words):02x} {' '.join(f'{w} 0' for w in words)} 000 | a sense\n"
        index = ''.join(f"{w} {pos[0]} {len(senses)} 0 {len(senses)} 0 {' '.join(at[s] for s in senses)}\n" for w, senses in synonyms['wordnet']['index'][pos].items())
        (folder / f'data.{pos}').write_text(data); (folder / f'index.{pos}').write_text(head + index)
        (folder / f'{pos}.exc').write_text(''.join(f"{w} {' '.join(bases)}\n" for w, bases in synonyms['wordnet']['exc'][pos].items()))
    return folder

def sides(pairs): return [list(x) for x in zip(*pairs)]

@pytest.mark.parametrize('how,prepare', [('raw', str), ('tokenised', spaced)])
@pytest.mark.parametrize('group', GROUPS)
def test_bleu_1_to_4_of_a_corpus_are_those_of_pycocoevalcap(both, group, how, prepare):
    "Its BLEU 'closest' differs from sacrebleu's only where an order has no match in the whole set, so one name serves both."
    got = score(*sides([map(prepare, p) for p in both['pairs'][GROUPS[group]]]), ('bleu1', 'bleu2', 'bleu3', 'bleu4'), 'whitespace')
    np.testing.assert_allclose(list(got.values()), 100 * np.array(both['bleu'][how][group]), atol=1e-6)

@pytest.mark.parametrize('how,prepare', [('raw', str), ('tokenised', spaced)])
def test_pairs_score_as_in_pycocoevalcap(both, how, prepare):
    "BLEU-1 to BLEU-4 of each pair, with its tiny smoothing, and its own ROUGE-L."
    said, meant = sides([map(prepare, p) for p in both['pairs']])
    orders = [f'bleu{n}_coco' for n in (1, 2, 3, 4)]
    got = score_each(said, meant, (*orders, 'rougeL_coco'), 'whitespace')
    np.testing.assert_allclose([got[m] for m in orders], 100 * np.array(both['bleu_per_sample'][how]), atol=1e-6)
    np.testing.assert_allclose(got['rougeL_coco'], 100 * np.array(both['rougeL_coco'][how]), atol=1e-6)
    for group, part in GROUPS.items():
        whole = score(said[part], meant[part], orders, 'whitespace')
        np.testing.assert_allclose(list(whole.values()), 100 * np.array(both['bleu'][how][group]), atol=1e-6)

@pytest.mark.parametrize('key,tokenizer', [('', 'rouge-default'), ('_ws_tokenizer', 'whitespace'), ('_stemmer', 'rouge-stem')])
def test_rouge_of_each_pair_is_that_of_hugging_face(both, key, tokenizer):
    names = ('rouge1', 'rouge2', 'rougeL')
    got = score_each(*sides(both['pairs']), names, tokenizer)
    for m in names: np.testing.assert_allclose(got[m], 100 * np.array(both['rouge'][m + key]), atol=1e-6)

@pytest.mark.parametrize('order', [1, 4])
def test_bleu_of_each_pair_is_that_of_hugging_face(both, order):
    "Where it divides by zero (an empty prediction) the score here is 0; all others agree, and so does the mean over samples."
    got = score_each(*sides(both['pairs']), (f'bleu{order}_hf',))[f'bleu{order}_hf']
    theirs = np.array(both['bleu_hf'][str(order)], float)
    assert np.isnan(theirs).sum() == 6 and (got[np.isnan(theirs)] == 0).all()
    np.testing.assert_allclose(got[~np.isnan(theirs)], 100 * theirs[~np.isnan(theirs)], atol=1e-6)
    assert score(*sides(both['pairs']), (f'bleu{order}_hf',))[f'bleu{order}_hf'] == pytest.approx(got.mean())

@pytest.mark.parametrize('group', GROUPS)
@pytest.mark.parametrize('tokenizer', ['13a', 'intl', '13a-lower'])
def test_corpus_bleu_by_tokenizer_is_sacrebleus(both, group, tokenizer):
    assert score(*sides(both['pairs'][GROUPS[group]]), ('bleu4',), tokenizer)['bleu4'] == pytest.approx(both['sacrebleu'][group][tokenizer], abs=1e-6)

@pytest.mark.parametrize('group', GROUPS)
def test_chrf_and_ter_are_sacrebleus(both, group):
    got = score(*sides(both['pairs'][GROUPS[group]]), ('chrf', 'ter'))
    assert dict(got) == pytest.approx({m: both['sacrebleu'][group][m] for m in ('chrf', 'ter')}, abs=1e-6)

@pytest.mark.parametrize('key,prepare', [('cider', str), ('cider_tokenised', spaced)])
@pytest.mark.parametrize('group', GROUPS)
def test_cider_is_that_of_pycocoevalcap(both, group, key, prepare):
    got = score_each(*sides([map(prepare, p) for p in both['pairs'][GROUPS[group]]]), ('cider',), 'whitespace')['cider'] / 100
    np.testing.assert_allclose(got, both[key][group], atol=1e-6)

def test_meteor_is_that_of_hugging_face(both):
    np.testing.assert_allclose(score_each(*sides(both['pairs']), ('meteor',), 'nltk')['meteor'] / 100, both['meteor'], atol=1e-6)

def test_meteor_with_wordnet_is_that_of_nltks_reader(synonyms, thin_wordnet):
    said, meant = sides(synonyms['pairs'])
    options = {'meteor': {'wordnet': thin_wordnet}}
    np.testing.assert_allclose(score_each(said, meant, ('meteor',), 'nltk', options)['meteor'] / 100, synonyms['meteor'], atol=1e-9)
    np.testing.assert_allclose(score_each(said, meant, ('meteor',), 'nltk')['meteor'] / 100, synonyms['plain'], atol=1e-9)
    assert max(np.array(synonyms['meteor']) - synonyms['plain']) > .1
    assert (label_of('meteor'), label_of('meteor', options)) == ('METEOR (exact+stem)', 'METEOR (exact+stem+wordnet)')

@pytest.mark.skipif(not (WORDNET / 'data.noun').is_file(), reason='no WordNet at /usr/share/wordnet nor at $PETVLM_WORDNET')
def test_meteor_with_the_whole_wordnet(both, synonyms):
    for pairs, wanted in ((both['pairs'], both['meteor']), (synonyms['pairs'], synonyms['meteor'])):
        np.testing.assert_allclose(score_each(*sides(pairs), ('meteor',), 'nltk', {'meteor': {'wordnet': WORDNET}})['meteor'] / 100, wanted, atol=1e-6)

def test_irregular_and_regular_forms_reach_their_senses(thin_wordnet, tmp_path):
    read = WordNet(thin_wordnet)
    assert 'armpit' in sum(read.synsets('axillae'), []) and 'see' in sum(read.synsets('seen'), []) and read.synsets('phổi') == []
    with zipfile.ZipFile(tmp_path / 'wordnet.zip', 'w') as z:
        for f in thin_wordnet.iterdir(): z.write(f, f'wordnet/{f.name}')
    assert WordNet(tmp_path / 'wordnet.zip').synsets('axillae') == read.synsets('axillae')

@pytest.mark.parametrize('spoil,words', [
    (lambda f: (f / 'noun.exc').unlink(), 'noun.exc not there'), (lambda f: (f / 'index.noun').write_text('lung n x\n'), r'not as in wndb\(5WN\)'),
    (lambda f: (f / 'data.noun').write_text('short'), 'where no sense begins')])
def test_a_damaged_wordnet_is_refused(thin_wordnet, tmp_path, spoil, words):
    for f in thin_wordnet.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes())
    spoil(tmp_path)
    with pytest.raises(MetricError, match=words): WordNet(tmp_path).synsets('sign')

def test_a_wordnet_of_another_version_says_so(thin_wordnet, tmp_path):
    for f in thin_wordnet.iterdir(): (tmp_path / f.name).write_bytes(f.read_bytes().replace(b'WordNet 3.0', b'WordNet 3.1'))
    assert label_of('meteor', {'meteor': {'wordnet': tmp_path}}) == 'METEOR (exact+stem+wordnet 3.1)'

@pytest.mark.parametrize('metric', ['bleu2', 'bleu3', 'meteor', 'cider'])
def test_empty_predictions_score_zero_and_equal_texts_best(both, metric):
    refs = [r for _, r in both['pairs'][::10]]
    got = score_each([''] + refs[1:], refs, (metric,))[metric]
    n = [len(TOKENIZERS['unicode'](r)) for r in refs[1:]]
    best = {'meteor': 100 * (1 - .5 / np.array(n, float)**3), 'cider': 1000.}.get(metric, 100.)
    assert got[0] == 0
    np.testing.assert_allclose(got[1:], np.broadcast_to(best, len(n)), atol=1e-9)
    with pytest.raises(MetricError): score([], [], (metric,))

@pytest.mark.parametrize('metric', ['bleu2', 'bleu3', 'meteor', 'cider'])
def test_order_of_samples_does_not_matter(both, metric):
    said, meant = sides(both['pairs'])
    order = np.random.default_rng(0).permutation(len(said))
    straight = statistics(said, meant, (metric,))[metric]
    turned = statistics([said[i] for i in order], [meant[i] for i in order], (metric,))[metric]
    np.testing.assert_allclose(turned, straight[order], atol=1e-9)

@pytest.mark.parametrize('metric', ['bleu2', 'bleu3', 'meteor', 'cider'])
def test_tone_marks_matter_and_their_storage_does_not(metric):
    import unicodedata
    meant = ['Nốt mờ ở thùy trên phổi trái.', 'Hạch trung thất kích thước 12 mm.']
    bare = [''.join(c for c in unicodedata.normalize('NFD', t) if not unicodedata.combining(c)) for t in meant]
    decomposed = [unicodedata.normalize('NFD', t) for t in meant]
    perfect = score(meant, meant, (metric,))[metric]
    assert score(bare, meant, (metric,))[metric] < .6 * perfect and score(decomposed, meant, (metric,))[metric] == pytest.approx(perfect)

def test_a_side_swap_barely_moves_meteor(both):
    "A fact about the metric, kept as a test: the wrong side costs less than five points of 100; CIDEr falls by 12 to 16 %."
    swaps = [p for p, kind in zip(both['pairs'], both['kinds']) if kind == 'side_swap']
    got = score_each(*sides(swaps), ('meteor', 'cider'))
    assert len(swaps) == 6 and (got['meteor'] > 95).all() and (840 < got['cider']).all() and (got['cider'] < 880).all()

def test_cider_counts_repeated_references_and_takes_weights_from_documents(both):
    "Equal pairs are scored once, but each counts in the weights; a part scored with the whole set's weights is a part of the whole."
    said, meant = sides(both['pairs'][::3])
    doubled = score_each(said + said[:4], meant + meant[:4], ('cider',))['cider']
    plain = score_each(said, meant, ('cider',))['cider']
    by_hand = score_each(said, meant, ('cider',), options={'cider': {'documents': meant + meant[:4]}})['cider']
    np.testing.assert_allclose(doubled[:len(said)], by_hand, atol=1e-9)
    assert np.abs(doubled[:len(said)] - plain).max() > 1
    np.testing.assert_allclose(score_each(said[:5], meant[:5], ('cider',), options={'cider': {'documents': meant}})['cider'], plain[:5], atol=1e-9)

def test_cider_without_weights_is_refused():
    for refs in (['gan bình thường'], ['gan bình thường', 'Gan  bình thường.']):
        with pytest.raises(MetricError, match='has 1 different'): score(refs, refs, ('cider',))
    with pytest.raises(MetricError, match='list of texts'): score(['a', 'b'], ['a', 'b'], ('cider',), options={'cider': {'documents': 'a b'}})

def test_ngrams_are_those_counted_by_hand():
    rng = np.random.default_rng(3)
    texts = [[f'w{i}' for i in rng.integers(4, size=n)] for n in (0, 1, 3, 4, 9, 0, 30, 2)]
    for n, m in enumerate(ngram_counts(texts), 1):
        for row, t in zip(m.toarray(), texts):
            grams = [tuple(t[i:i + n]) for i in range(len(t) - n + 1)]
            assert sorted(row[row > 0]) == sorted(grams.count(g) for g in set(grams))

def test_meteor_remembers_stems_and_stays_nltks():
    rng, words = np.random.default_rng(1), 'lung lungs nodule nodules noted noting uptake liver no the of in'.split()
    for _ in range(200):
        a, b = ([words[i] for i in rng.integers(len(words), size=rng.integers(0, 15))] for _ in range(2))
        assert meteor(a, b) == single_meteor_score(b, a, stemmer=PorterStemmer(), wordnet=SimpleNamespace(synsets=lambda w: ()))

def test_paired_bootstrap_of_the_new_metrics(both):
    said, meant = sides(both['pairs'])
    patients = [f'p{i // 3:02d}' for i in range(60)]
    metrics = ('bleu2', 'bleu3', 'meteor', 'cider')
    whole, worse = (judge(s, meant, patients, metrics=metrics, n=200) for s in (said, [s.replace('a', 'o') for s in said]))
    for m in metrics:
        assert whole['metrics'][m]['lo'] < whole['metrics'][m]['value'] < whole['metrics'][m]['hi']
        d = paired_bootstrap(*(sums_of(m, r['per_patient']) for r in (whole, worse)), statistic_of(m), n=200)
        assert d['lo'] > 0 and d['difference'] == pytest.approx(whole['metrics'][m]['value'] - worse['metrics'][m]['value'])

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
