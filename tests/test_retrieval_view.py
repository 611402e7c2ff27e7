"What a query finds: the ranks are those that recall is made of, in Python and in the browser, and a page shows texts as texts."
import base64, hashlib, json, re, shutil, subprocess
import numpy as np
import pytest
import traitlets as T
from petvlm.facts import judge_retrieval
from petvlm.figures import FigureError
from petvlm.pairs import ARRAYS, HEIGHT, WORDS, Pairs, PairsError, ranks, read_pairs, thumbnail, write_pairs
from petvlm.retrieval import recall_at
from petvlm.retrievalview import Browser, export_retrieval, found, recall_line, reply, script, setup_of, still
from petvlm.widget import asset

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
NODE = shutil.which('node')

def unit(x): return (x/np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

def made(n=40, noise=.5, d=12, **more):
    rng = np.random.default_rng(3); image = unit(rng.normal(size=(n, d)))
    fields = dict(image=image, text=unit(image + noise*rng.normal(size=(n, d))), thumbs=rng.integers(0, 255, (n, 8, 20, 3), np.uint8), names=tuple(f'{i + 1}: chest' for i in range(n)), texts=tuple(f'Text {i % 30}, of ${i}$.' for i in range(n)), origin={'point': 'demo', 'view': 'ct', 'params_hash': 'p1'})
    return Pairs(**fields | more)

@pytest.fixture(scope='module')
def pairs(): return made()


# ---------- ranks and recall ----------
def test_ranks_by_hand():
    s = np.array([[.9, .1, .1], [.8, .7, .2], [.3, .3, .3]])
    assert ranks(s).tolist() == [[1, 1], [2, 2], [1, 3]]

def test_the_ranks_are_those_that_recall_is_made_of(pairs):
    "No two similarities are equal here, so recall at k is the share of ranks up to k; `judge_retrieval`, which makes the tables, says the same."
    judged = judge_retrieval(pairs.similarity, [f'p{i}' for i in range(40)], (40,), n=50)['metrics']; told = pairs.recalls()
    for way, name, m in (('image_to_text', 'tr', pairs.similarity), ('text_to_image', 'ir', pairs.similarity.T)):
        for k in (1, 5, 10):
            said = told[way][k], 100*(ranks(m)[:, 0] <= k).mean(), judged[f'{name}.r{k}.n40']['value'], recall_at(pairs.similarity)[40][way][k]
            assert np.allclose(said, said[0]), said
    assert 0 < told['text_to_image'][1] < 100 and f"R@1 {told['text_to_image'][1]:.1f} %" in recall_line(pairs, 'text')

@pytest.mark.parametrize('direction, m', [('text', lambda p: p.similarity.T), ('volume', lambda p: p.similarity)])
def test_what_is_found_is_in_the_order_of_similarity(pairs, direction, m):
    for i in (0, 7, 39):
        s, order = found(pairs, i, direction)
        assert np.allclose(s, m(pairs)[i], atol=1e-6) and (np.diff(s[order]) <= 0).all() and order.tolist().index(i) + 1 == ranks(m(pairs))[i, 0]
    for bad in ((40, direction), (-1, direction), (0, 'image')):
        with pytest.raises(PairsError): found(pairs, *bad)


# ---------- the record ----------
def test_a_record_comes_back_and_is_written_whole(pairs, tmp_path):
    write_pairs(pairs, tmp_path/'a'); again = read_pairs(tmp_path/'a')
    assert all(np.array_equal(getattr(again, k), getattr(pairs, k)) for k in ('image', 'text', 'thumbs')) and (again.names, again.texts, dict(again.origin)) == (pairs.names, pairs.texts, dict(pairs.origin))
    assert sorted(p.name for p in (tmp_path/'a').iterdir()) == [WORDS, ARRAYS] and read_pairs(tmp_path/'a').thumbs.dtype == np.uint8

def test_records_that_are_damaged_or_mixed_are_refused(pairs, tmp_path):
    write_pairs(pairs, tmp_path); words, arrays = (tmp_path/WORDS).read_text(), (tmp_path/ARRAYS).read_bytes()
    def refused(said):
        with pytest.raises(PairsError, match=said): read_pairs(tmp_path)
        (tmp_path/WORDS).write_text(words); (tmp_path/ARRAYS).write_bytes(arrays)
    (tmp_path/ARRAYS).write_bytes(arrays[:-7]); refused('no safetensors|not of one writing')
    (tmp_path/WORDS).write_text(words[:-9]); refused('not JSON')
    (tmp_path/WORDS).write_text(json.dumps(json.loads(words) | {'texts': [1]*40})); refused('not of one writing')
    (tmp_path/ARRAYS).unlink(); refused('no such file')
    write_pairs(made(noise=.6), tmp_path/'b'); (tmp_path/ARRAYS).write_bytes((tmp_path/'b'/ARRAYS).read_bytes()); refused('not of one writing')
    with pytest.raises(PairsError, match='cannot be read'): read_pairs(tmp_path/'none')

@pytest.mark.parametrize('more, said', [({'names': ('a',)}, '1 names'), ({'text': np.ones((40, 3), np.float32)}, 'arrays'), ({'thumbs': np.zeros((40, 8, 20), np.uint8)}, 'thumbs'), ({'image': 2*made().image}, 'length 2'), ({'image': made().image*np.nan}, 'length nan')])
def test_what_does_not_belong_together_is_refused(more, said):
    with pytest.raises(PairsError, match=said): made(**more)


# ---------- thumbnails ----------
def test_a_thumbnail_says_where_it_is_hot_and_how_dense():
    "HU 80 in a window of -200 to 360 is the middle grey; a hot spot on the patient's left (last columns), in front (first rows) and high up."
    ct = np.full((20, 12, 24), .5 + 80/2000, np.float16); pet = np.zeros((20, 12, 24), np.float16); pet[16:18, 2:4, 18:20] = .5
    grey = thumbnail({'ct': ct}); assert grey.shape == (HEIGHT, 144 + 2 + 86, 3) and set(np.unique(grey[:, :144])) <= {127, 128} and (grey[:, 144:146] == 255).all()
    both = thumbnail({'ct': ct, 'pet': pet}).astype(int); slice_, front = both[:, :144], both[:, 146:]
    rows, cols = np.nonzero(slice_[..., 0] - slice_[..., 2] > 100); assert 12 <= rows.mean() <= 24 and 108 <= cols.mean() <= 120
    rows, cols = np.nonzero(front[..., 0] < 200); assert 7 <= rows.mean() <= 15 and 18/24*86 <= cols.mean() <= 20/24*86 and (front[..., 0] == front[..., 2]).all()      # head up, dark where hot
    alone = thumbnail({'pet': pet}); assert alone.shape == both.shape and alone[:20, :80].max() < 15
    films = thumbnail({'xray': np.stack([np.zeros((32, 32)), np.ones((32, 32))])}); assert films.shape == (HEIGHT, 2*HEIGHT + 2, 3) and films[:, :HEIGHT].max() == 0 and films[:, HEIGHT + 2:].min() == 255
    with pytest.raises(PairsError): thumbnail({})


# ---------- the widget ----------
def test_the_widget_carries_what_it_needs_and_answers(pairs):
    b = Browser(pairs, ask=lambda text: pairs.text[5], chosen=3); sent = []; b.send = lambda content, buffers=None: sent.append(content)
    assert np.array_equal(np.frombuffer(base64.b64decode(b.setup['image']), '<f4').reshape(40, 12), pairs.image) and base64.b64decode(b.setup['thumbs'][0])[:4] == b'\x89PNG' and b.asks
    b._handle_custom_msg({'type': 'ask', 'seq': 4, 'view': 'v', 'text': 'a node'}, [])
    assert sent[0]['seq'] == 4 and sent[0]['view'] == 'v' and np.allclose(sent[0]['vector'], pairs.text[5]) and json.dumps(sent[0])
    data, _ = b._repr_mimebundle_(); assert base64.b64decode(data['image/png'])[:4] == b'\x89PNG' and 'application/vnd.jupyter.widget-view+json' in data and 'demo' in repr(b)
    assert not Browser(pairs).asks and len(Browser(pairs, direction='volume').still().subfigs) == 2

@pytest.mark.parametrize('bad', [{'chosen': 40}, {'chosen': -1}, {'direction': 'image'}, {'top': 0}, {'query': 'x'}])
def test_what_cannot_be_set_is_refused(pairs, bad, tmp_path):
    with pytest.raises(T.TraitError): Browser(pairs, **bad)
    with pytest.raises(T.TraitError): export_retrieval(pairs, tmp_path/'x.html', **bad)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('q, ask, said', [({'type': 'ask', 'text': ' '}, lambda t: np.ones(12), 'nothing to ask'), ({'type': 'ask', 'text': 5}, lambda t: np.ones(12), 'nothing to ask'), ({'type': 'ask', 'text': 'x'}, None, 'no model'),
                                          ({'type': 'ask', 'text': 'x'}, lambda t: np.ones(5), 'another model'), ({'type': 'ask', 'text': 'x'}, lambda t: np.full(12, np.nan), 'another model'), ({'type': 'ask', 'text': 'x'}, lambda t: 1/0, 'could not be asked')])
def test_what_cannot_be_asked_is_told(pairs, q, ask, said): assert said in reply(pairs, ask, q | {'seq': 1})['error']

def test_messages_of_others_are_left_alone(pairs): assert reply(pairs, None, {'type': 'rm'}) is None and reply(pairs, None, [1]) is None and reply(pairs, None, None) is None


# ---------- the script ----------
def test_the_script_fetches_nothing_and_makes_no_html_of_data():
    code = script()
    for word in ('://', 'innerHTML', 'outerHTML', 'insertAdjacent', 'document.write', 'eval(', 'new Function', 'fetch(', 'XMLHttp', 'WebSocket', 'import(', 'localStorage', 'cookie', '</script', 'srcdoc'): assert not re.search(rf'(?<![A-Za-z]){re.escape(word)}', code), word
    assert not re.search(r'^\s*import\b', code, re.M) and not re.search(r'url\(|@import|://', asset('retrieval_page.css')) and 'export default' in code and '\t' not in code

@pytest.mark.skipif(not NODE, reason='node is not installed')
def test_the_browser_ranks_as_python_does(pairs, tmp_path):
    (tmp_path/'script.mjs').write_text(script()); (tmp_path/'setup.json').write_text(json.dumps(setup_of(pairs)))
    (tmp_path/'run.mjs').write_text("""import {readFileSync} from 'node:fs'; import * as js from './script.mjs';
const s = JSON.parse(readFileSync(new URL('setup.json', import.meta.url))), v = {text: js.floats(s.text), volume: js.floats(s.image)}, out = [];
for (const [asked, sought] of [['text', 'volume'], ['volume', 'text']]) for (let i = 0; i < s.names.length; i++) { const x = js.products(v[sought], v[asked].subarray(i*s.dim, (i + 1)*s.dim)); out.push([asked, i, js.order(x), js.place(x, i), Array.from(x)]); }
console.log(JSON.stringify({out, tie: [js.place(Float64Array.from([.3, .5, .3, .3]), 0), js.order(Float64Array.from([.3, .5, .3]))]}));""")
    done = subprocess.run([NODE, str(tmp_path/'run.mjs')], capture_output=True, text=True, timeout=60); assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout); assert said['tie'] == [[2, 4], [1, 0, 2]] and len(said['out']) == 80
    for asked, i, order, place, similar in said['out']:
        s, own = found(pairs, i, asked); assert np.allclose(similar, s, atol=1e-6) and order == own.tolist() and place == [own.tolist().index(i) + 1]*2


# ---------- the page ----------
@pytest.fixture(scope='module')
def html(tmp_path_factory):
    evil = made(n=6, names=(EVIL,)*6, texts=(EVIL, 'b', 'c', 'd', 'e', EVIL), origin={'point': EVIL, 'view': 'ct'})
    path = export_retrieval(evil, tmp_path_factory.mktemp('page')/'p.html', title=EVIL, direction='volume', chosen=2)
    assert [p.name for p in path.parent.iterdir()] == ['p.html']
    return path.read_text(encoding='utf-8')

def test_the_page_names_no_address_and_runs_nothing_foreign(html):
    assert '://' not in html and len(re.findall('<script', html)) == 2 == html.count('</script') and '<img' not in html and 'onerror' not in re.sub(r'(&lt;|\\u003c)img[^<>]*', '', html)
    policy, code = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1], re.search(r'<script type="module">(.*?)</script>', html, re.S)[1]
    assert policy.startswith("default-src 'none'") and base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() in policy
    setup = json.loads(re.search(r'id="petvlm-retrieval-setup">(.*?)</script>', html, re.S)[1]); assert setup['texts'][0] == EVIL and setup['state'] == {'direction': 'volume', 'chosen': 2, 'top': 9} and 'scrub' in setup['caution']

def test_pictures_for_paper(pairs, tmp_path):
    far = int(np.argmax(ranks(pairs.similarity.T)[:, 0])); fig = still(pairs, far, top=3); titles = [ax.get_title() for ax in fig.subfigs[1].axes if ax.get_title()]
    assert len(titles) == 4 and titles[-1].startswith(f'{ranks(pairs.similarity.T)[far, 0]}.') and '★ belongs to it' in titles[-1] and 'R@1' in fig.subfigs[0].axes[0].get_title(loc='left')
    texts = [t.get_text() for t in still(pairs, 0, 'volume', top=4).subfigs[1].axes[0].texts]; assert any('Text 0' in t for t in texts) and len(texts) in (8, 10)
    assert export_retrieval(pairs, tmp_path/'a.pdf').read_bytes() == export_retrieval(pairs, tmp_path/'b.pdf').read_bytes()
    with pytest.raises(FigureError, match='tiff'): export_retrieval(pairs, tmp_path/'a.tiff')

def test_the_same_words_are_no_mistake_and_marked(pairs):
    "Texts 0 and 30 are one sentence here."
    same = made(texts=tuple(f'Text {i % 30}.' for i in range(40))); fig = still(same, 0, top=40)
    marked = [ax.get_title() for ax in fig.subfigs[1].axes if '≡' in ax.get_title()]; assert len(marked) == 1 and '31: chest' in marked[0]
