"Searching: by hand, exact against brute force, approximate with a floor, kept on disk without pickle."
import json, pickle, sys
import numpy as np, pytest
from petvlm.vectorindex import KINDS, Found, SearchError, brute, build_index, load_index, partner_recall, recall, save_index, unit
from petvlm.words import MetricError

@pytest.fixture(scope='module')
def archive():
    rng = np.random.default_rng(5)
    vectors = unit(rng.normal(size=(30, 24))[rng.integers(30, size=3000)] + .5*rng.normal(size=(3000, 24)))
    return vectors, unit(vectors[:60] + .05*rng.normal(size=(60, 24)))

def test_by_hand():
    vectors, questions = np.array([[1, 0], [0, 1], [.6, .8], [-1, 0]]), np.array([[1, 0], [3, 4]])
    for found in (brute(vectors, questions, 3), build_index(vectors).search(questions, 3)):
        assert found.place.tolist() == [[0, 2, 1], [2, 1, 0]] and found.similarity == pytest.approx(np.array([[1, .6, 0], [5, 4, 3]]), abs=1e-6)

def test_equal_ones_come_by_row():
    assert brute(np.ones((5, 3)), np.ones((1, 3)), 5).place.tolist() == [[0, 1, 2, 3, 4]]

@pytest.mark.parametrize('room', [1, 4*3000*7, 2**28])
def test_blocks_and_flat_are_a_full_sort(archive, room):
    vectors, questions = archive
    s = questions.astype(float) @ vectors.T.astype(float)
    full = np.argsort(-s, axis=1, kind='stable')[:, :10]
    for found in (brute(vectors, questions, 10, room), build_index(vectors, 'flat').search(questions, 10)):
        assert found.place.dtype == np.int64 and np.allclose(found.similarity, np.take_along_axis(s, full, 1), atol=1e-6)
        assert np.allclose(np.take_along_axis(s, found.place, 1), np.take_along_axis(s, full, 1), atol=1e-6) and recall(found, Found(None, full)) > .999

def test_approximate_ones_miss_little_and_ivf_nothing_when_it_looks_everywhere(archive):
    exact = brute(*archive, 10)
    assert recall(build_index(archive[0], 'ivf', cells=50, probe=50).search(archive[1], 10), exact) == 1
    few = recall(build_index(archive[0], 'ivf', cells=50, probe=1).search(archive[1], 10), exact)
    assert .3 < few < 1 and recall(build_index(archive[0], 'ivf', cells=50, probe=10).search(archive[1], 10), exact) > max(.9, few)
    assert recall(build_index(archive[0], 'hnsw').search(archive[1], 10), exact) > .9

def test_ivf_follows_from_its_seed(archive):
    one, two, other = (build_index(archive[0], 'ivf', seed=s, cells=50, probe=1).search(archive[1], 10).place for s in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, other)

@pytest.mark.parametrize('kind', KINDS)
def test_what_is_saved_is_what_is_loaded_and_no_pickle(archive, tmp_path, kind, monkeypatch):
    index = build_index(archive[0], kind); before = index.search(archive[1])
    for name in ('load', 'loads', 'Unpickler', 'dump', 'dumps'): monkeypatch.setattr(pickle, name, lambda *a, **k: pytest.fail('pickle was asked'))
    save_index(index, tmp_path/'i'); again = load_index(tmp_path/'i')
    assert sorted(p.name for p in (tmp_path/'i').iterdir()) == ['index.faiss', 'index.json'] and sorted(p.name for p in tmp_path.iterdir()) == ['i']
    assert (again.kind, len(again), again.dim) == (kind, 3000, 24) and all(np.array_equal(a, b) for a, b in zip(again.search(archive[1]), before))

def test_saving_replaces_the_whole(archive, tmp_path):
    save_index(build_index(archive[0]), tmp_path/'i'); (tmp_path/'i'/'old').write_text('x')
    save_index(build_index(archive[0][:100]), tmp_path/'i')
    assert len(load_index(tmp_path/'i')) == 100 and not (tmp_path/'i'/'old').exists()

def damaged(how, folder):
    file, said = folder/'index.faiss', folder/'index.json'
    if how == 'bit': data = bytearray(file.read_bytes()); data[len(data)//2] ^= 1; file.write_bytes(data)
    elif how == 'short': file.write_bytes(file.read_bytes()[:-8])
    elif how == 'gone': file.unlink()
    elif how == 'json': said.write_text('{')
    else: said.write_text(json.dumps(json.loads(said.read_text()) | {'n': 7}))

@pytest.mark.parametrize('how,words', [('bit', 'not those that were saved'), ('short', 'not those that were saved'), ('gone', 'no such file'), ('json', 'not JSON'), ('count', 'says 7 of 24')])
def test_damage_is_refused(archive, tmp_path, how, words):
    save_index(build_index(archive[0]), tmp_path/'i'); damaged(how, tmp_path/'i')
    with pytest.raises(SearchError, match=words): load_index(tmp_path/'i')

def hole(x): x = x.copy(); x[3, 1] = np.nan; return x

@pytest.mark.parametrize('call,words', [
    (lambda v, q: brute(v, q, 0), 'k is 0, expected 1 to 3000'), (lambda v, q: build_index(v).search(q, 3001), 'k is 3001'), (lambda v, q: brute(v, q[:, :5]), 'queries have 5 numbers each, the vectors 24'),
    (lambda v, q: brute(hole(v), q), '1 of 3000 rows hold a number that is not finite'), (lambda v, q: build_index(hole(v)), 'not finite'), (lambda v, q: build_index(v).search(hole(q)), 'not finite'),
    (lambda v, q: unit(np.vstack([v, 0*v[:2]])), '2 of 3002 vectors are zero'), (lambda v, q: brute(v[:0], q), r'found \(0, 24\)'), (lambda v, q: build_index(v, 'lsh'), "kind: found 'lsh'"),
    (lambda v, q: build_index(v[:10], 'ivf', cells=11), '11 cells for 10 vectors'), (lambda v, q: partner_recall(brute(v, q, 3), range(60), (5,)), '3 were searched for'), (lambda v, q: partner_recall(brute(v, q, 3), range(9), (1,)), '60 queries')])
def test_refusals_say_what_was_found(archive, call, words):
    with pytest.raises(SearchError, match=words): call(*archive)

def test_without_faiss_it_says_what_to_install(archive, monkeypatch):
    monkeypatch.setitem(sys.modules, 'faiss', None)
    with pytest.raises(MetricError, match='pip install faiss-cpu'): build_index(archive[0])
    assert brute(*archive).place.shape == (60, 10)

def test_partners_are_counted():
    found = Found(None, np.array([[4, 0, 1], [1, 2, 3], [7, 8, 9], [5, 6, 3]]))
    assert partner_recall(found, [4, 3, 1, 6], (1, 2, 3)) == {1: 25., 2: 50., 3: 75.}
