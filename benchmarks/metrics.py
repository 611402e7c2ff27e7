"""Text metrics of a whole set, side by side: petvlm, and the libraries whose numbers they are (rouge-score, sacrebleu, nltk, pycocoevalcap).

    python benchmarks/metrics.py                                   # 10,000 pairs of reports of about 80 words, every job
    python benchmarks/metrics.py --pairs 200 --repeats 2           # a quick look
    python benchmarks/metrics.py --jobs rouge --out benchmarks/metrics.json
    pip install --no-deps pycocoevalcap==1.2                       # one of the peers; petvlm does not need it, and its job is left out without it

The job: from two lists of texts to the scores of the set, words split on the way by the same rule on both sides. Texts are drawn: words by a power law from 2,000, in each
prediction a part of them replaced, left out or moved. One JSON: seconds of one core (CPU time, so that what else runs on the machine does not count; median of repeats in
one process, the two in turn, the order turning), the ratio within each repeat (median, smallest, largest), and how far the scores lie apart. A job that is run alone replaces its entry in `--out` and leaves the others.
"""
import argparse, importlib.util, json, os, platform, statistics, sys, time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path


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
    from petvlm.metrics import score
    return lambda said, meant: list(score(said, meant, names, tokenizer).values())

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


JOBS = {   # job -> the peer's package, the peer, ours
    'rouge': ('rouge-score', rouge, petvlm_(('rouge1', 'rouge2', 'rougeL'), 'rouge-default')),
    'bleu': ('sacrebleu', bleu, petvlm_(('bleu1', 'bleu2', 'bleu3', 'bleu4'), '13a')),
    'bleu_nltk': ('nltk', bleu_nltk, petvlm_(('bleu4_nltk',), 'whitespace')),
    'meteor': ('nltk', meteor, petvlm_(('meteor',), 'whitespace')),
    'coco': ('pycocoevalcap', coco, petvlm_(('bleu1_coco', 'bleu2_coco', 'bleu3_coco', 'bleu4_coco', 'cider', 'rougeL_coco'), 'whitespace'))}


def measured(job, said, meant, repeats):
    "Seconds of both in every repeat, and the largest difference between their scores."
    package, peer, ours = JOBS[job]
    ways, seconds, scores = {'petvlm': ours, 'peer': peer}, {'petvlm': [], 'peer': []}, {}
    for way in ways.values(): way(said[:20], meant[:20])   # imports are not counted
    for n in range(repeats):
        for way in (list(ways) if n % 2 == 0 else list(ways)[::-1]):
            start = time.process_time(); scores[way] = ways[way](said, meant); seconds[way].append(time.process_time() - start)
    ratios = [p/o for o, p in zip(seconds['petvlm'], seconds['peer'])]
    return {'peer': f'{package} {version(package)}', 'repeats': repeats, 'seconds': {w: round(statistics.median(s), 2) for w, s in seconds.items()},
            'speed_ratio': round(statistics.median(ratios), 1), 'spread': [round(min(ratios), 1), round(max(ratios), 1)],
            'largest_difference': max(abs(a - b) for a, b in zip(scores['petvlm'], scores['peer']))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', type=int, default=10_000); parser.add_argument('--words', type=int, default=80); parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--jobs', nargs='+', choices=JOBS, default=list(JOBS)); parser.add_argument('--out', type=Path)
    a = parser.parse_args()
    said, meant = texts(a.pairs, a.words)
    old = json.loads(a.out.read_text('utf-8')) if a.out and a.out.is_file() else {}
    result = {'when': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'machine': platform.processor() or platform.machine(), 'cores': os.cpu_count(), 'threads': 1,
              'python': platform.python_version(), 'pairs': a.pairs, 'words': a.words, 'jobs': old.get('jobs', {}) if (old.get('pairs'), old.get('words')) == (a.pairs, a.words) else {}}
    for job in a.jobs:
        missing = JOBS[job][0] == 'pycocoevalcap' and not importlib.util.find_spec('pycocoevalcap')
        result['jobs'][job] = {'left_out': 'pycocoevalcap is not installed'} if missing else measured(job, said, meant, a.repeats)
        sys.stderr.write(f"{job}: {result['jobs'][job]}\n")
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + '\n')
    if a.out: a.out.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')
    main()
