"""The ten studies most like this one, of 100,000: brute force in numpy against the indices of faiss (`petvlm.vectorindex`).

    pip install faiss-cpu==1.15.1                  # the engine; petvlm pins it
    python benchmarks/retrieval.py                 # 100,000 x 512
    python benchmarks/retrieval.py --quick
    python benchmarks/retrieval.py --kinds flat ivf hnsw   # HNSW, too: minutes to build

The vectors: unit vectors around centres, within a space of 32 dimensions laid into 512 (`--inner`), with a little noise in all of them; questions are studies seen again through noise. Embeddings of studies have such a
shape; vectors without any shape are the worst case of every approximate index, and their recall is given beside it. One JSON: CPU seconds of one core for many questions at once and for one at a time, recall against the
exact search, how often a study's own vector is found, seconds to build, save and load, bytes on disk.
"""
import shutil, sys, tempfile, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import harness
from table import line


def ready(): import petvlm.vectorindex, faiss  # noqa: F401


def drawn(n, dim, inner, asked, seed=0):
    "`(n, dim)` unit vectors and `asked` questions about the first of them; `inner` 0: no shape at all."
    import numpy as np
    from petvlm.vectorindex import unit
    rng = np.random.default_rng(seed); normal = lambda *size: rng.standard_normal(size, np.float32)
    if not inner: vectors = unit(normal(n, dim))
    else:
        groups, into = normal(max(1, n//50), inner), normal(inner, dim)/inner**.5
        vectors = unit((groups[rng.integers(len(groups), size=n)] + .7*normal(n, inner)) @ into + .1*normal(n, dim))
    return vectors, unit(vectors[:asked] + .5/dim**.5*normal(asked, dim))


def built(kinds, vectors, room):
    "Indices by kind, and what building, saving and loading took."
    import numpy as np
    from petvlm.vectorindex import build_index, load_index, save_index
    indices, cost = {}, {}
    for kind in kinds:
        start = time.process_time(); index = build_index(vectors, kind); build = time.process_time() - start
        folder = Path(room)/kind
        start = time.perf_counter(); save_index(index, folder); save = time.perf_counter() - start
        start = time.perf_counter(); again = load_index(folder); load = time.perf_counter() - start
        if not np.array_equal(again.search(vectors[:5]).place, index.search(vectors[:5]).place): raise RuntimeError(f'{kind}: another index after loading')
        indices[kind], cost[kind] = index, {'build_seconds': build, 'save_seconds': save, 'load_seconds': load, 'mb': (folder/'index.faiss').stat().st_size/1e6}
        shutil.rmtree(folder)
    return indices, cost


def plain(vectors, queries, k, block=200):
    "Rows of the `k` largest inner products, as one writes it in numpy."
    import numpy as np
    out = []
    for start in range(0, len(queries), block):
        s = queries[start:start + block] @ vectors.T
        best = np.argpartition(s, -k, axis=1)[:, -k:]
        out.append(np.take_along_axis(best, np.argsort(-np.take_along_axis(s, best, 1), axis=1), 1))
    return np.concatenate(out)


def measured(n, dim, inner, asked, single, k, repeats, kinds, room):
    "Seconds per question of every way, in a batch and one at a time; recall and cost."
    import faiss
    from petvlm.vectorindex import brute, partner_recall, recall
    faiss.omp_set_num_threads(1)
    vectors, queries = drawn(n, dim, inner, asked)
    indices, cost = built(kinds, vectors, room)
    searches = {'numpy': lambda q: plain(vectors, q, k), **{kind: (lambda q, index=index: index.search(q, k)) for kind, index in indices.items()}}
    exact = brute(vectors, queries, k)
    if (same := recall(exact._replace(place=plain(vectors, queries, k)), exact)) < .9999: raise RuntimeError(f'petvlm.vectorindex.brute finds {same:.4f} of what numpy finds')   # near ties may turn
    found = {'numpy': exact, **{kind: index.search(queries, k) for kind, index in indices.items()}}
    quality = {w: {'recall': recall(f, exact), 'own': partner_recall(f, range(len(queries)), (1, k))} for w, f in found.items()}
    def one_by_one(s):
        for q in queries[:single]: s(q[None])
    batch = harness.interleaved({w: (lambda s=s: s(queries)) for w, s in searches.items()}, repeats, clock=time.process_time)
    alone = harness.interleaved({w: (lambda s=s: one_by_one(s)) for w, s in searches.items()}, repeats, clock=time.process_time)
    per = lambda seconds, m: {w: [x/m for x in v] for w, v in seconds.items()}
    return {'batch': per(batch, len(queries)), 'alone': per(alone, single), 'quality': quality, 'cost': cost}


def worst(n, dim, asked, k, kinds):
    "Recall of the approximate kinds on vectors without any shape."
    import faiss
    from petvlm.vectorindex import brute, build_index, recall
    faiss.omp_set_num_threads(1)
    vectors, queries = drawn(n, dim, 0, asked)
    exact = brute(vectors, queries, k)
    return {kind: recall(build_index(vectors, kind).search(queries, k), exact) for kind in kinds if kind != 'flat'}


def table(a, r):
    exact = 'exact: the same rows as brute force'
    told = lambda kind: exact if r['quality'][kind]['recall'] == 1 else f"recall of the exact {a.k}: {100*r['quality'][kind]['recall']:.1f} %; own vector first {r['quality'][kind]['own'][str(1)]:.1f} % (brute force {r['quality']['numpy']['own'][str(1)]:.1f} %)"
    cost = lambda kind: f"built in {r['cost'][kind]['build_seconds']:.1f} s, {r['cost'][kind]['mb']:.0f} MB"
    size = f'{a.studies:,} x {a.dim}'
    return [line(f'{size}: {what}, per question', ('brute force (numpy)', r[key]['numpy']), (f'faiss {kind}', r[key][kind]), note=f'{told(kind)}; {cost(kind)}') for key, what in (('alone', 'one question'), ('batch', f'{a.asked} questions at once')) for kind in a.kinds]


def main(argv=None):
    def add(p):
        for name, default in dict(studies=100_000, dim=512, inner=32, asked=500, single=30, k=10, shapeless=10_000).items(): p.add_argument(f'--{name}', type=int, default=default)
        p.add_argument('--kinds', nargs='+', choices=('flat', 'ivf', 'hnsw'), default=['flat', 'ivf']); p.set_defaults(repeats=3)
    a = harness.options(__doc__, __file__, argv, quick={'studies': 4000, 'dim': 64, 'asked': 100, 'single': 10, 'repeats': 2, 'shapeless': 4000, 'kinds': ['flat', 'ivf', 'hnsw']}, add=add)
    room = tempfile.mkdtemp()
    try: r, shapeless = harness.apart(__file__, [('measured', dict(n=a.studies, dim=a.dim, inner=a.inner, asked=a.asked, single=a.single, k=a.k, repeats=a.repeats, kinds=a.kinds, room=room)),
                                                 ('worst', dict(n=a.shapeless, dim=a.dim, asked=min(a.asked, 200), k=a.k, kinds=a.kinds))])
    finally: shutil.rmtree(room)
    rows = [{'way': w, 'batch_ms': 1000*harness.spread(r['batch'][w])['median'], 'alone_ms': 1000*harness.spread(r['alone'][w])['median'], 'recall': r['quality'][w]['recall'], 'own': r['quality'][w]['own'], **r['cost'].get(w, {}),
             'all_batch': r['batch'][w], 'all_alone': r['alone'][w]} for w in r['batch']]
    limits = [f"a question by brute force reads every vector: {4*a.studies*a.dim/1e6:.0f} MB, {2*a.studies*a.dim/1e6:.0f} million floating-point operations; flat does the same in C++. The whole matrix of {a.studies:,} x {a.studies:,} would be {4*a.studies**2/1e9:.1f} GB.",
              f"on {a.shapeless:,} vectors without any shape (independent normal numbers) the recall is " + ', '.join(f'{100*x:.0f} % ({kind})' for kind, x in shapeless.items()) + ': an index finds neighbours where there are some.']
    harness.write(a, 'nearest studies', rows, table=table(a, r), shapeless=shapeless, limits=limits)
    harness.show(rows, {'way': 's', 'alone_ms': '8.3f', 'batch_ms': '8.3f', 'recall': '6.3f', 'build_seconds': '7.1f', 'mb': '7.0f', 'load_seconds': '6.2f'})
    for text in limits: print(text)


if __name__ == '__main__':
    import importlib.util
    if not importlib.util.find_spec('faiss'): sys.exit('benchmarks/retrieval.py needs faiss: pip install faiss-cpu==1.15.1')
    main()
