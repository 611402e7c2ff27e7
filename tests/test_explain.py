"""A report beside the pictures: the script's sums and boxes are the record's, sentences are marked by what they speak of, the page needs no network and runs nothing foreign."""
import base64, dataclasses, hashlib, json, re, shutil, subprocess
from pathlib import Path
import numpy as np
import pytest
import traitlets as T
from petvlm.attentionrecord import AttentionRecord, RecordError, ideal_record, maps, save_record, sentences, shares, span_of
from petvlm.explain import EXPLAIN_STATE, ExplainError, attention_answer, attention_figure, explain_css, explain_script, explained, export_html, overlay_of, spoken_of, tints, with_s
from petvlm.findings import Finding, Study
from petvlm.phantom import draw, sample_patient
from petvlm.scene import scene_of

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
NODE = shutil.which('node')


@pytest.fixture(scope='module')
def study(): return draw(sample_patient(11), (8., 8., 8.), reports=True)

@pytest.fixture(scope='module')
def record(study): return ideal_record(study)

@pytest.fixture(scope='module')
def blind(study): return ideal_record(study, gaze=0)

@pytest.fixture(scope='module')
def about(record):
    "The first sentence outside the impression that states a finding which PET shows, in a region with an S."
    return next(s for s in sentences(record) if s.findings and not s.impression and s.findings[0].uptake == 'increased' and record.sections[s.section].weights.any())

def with_text(record, region, text):
    "The record with another text in one region, every word a token; it looks as the region's end did."
    def other(s):
        spans = np.array([*(m.span() for m in re.finditer(r'\S+', text)), (len(text),)*2], np.int32); n = len(spans)
        return dataclasses.replace(s, text=text, spans=spans, **{k: np.repeat(getattr(s, k)[-1:], n, 0) for k in ('attention', 'inside', 'image')})
    return AttentionRecord(tuple(other(s) if s.region == region else s for s in record.sections), record.about)


# ---------- what is told ----------
def test_sentences_speak_of_their_lesions(study, record):
    said, spoken = sentences(record), spoken_of(record, study)
    for i, f in enumerate(study.findings, 1):
        mine = [s for s, about in zip(said, spoken) if i in about]
        assert any(not s.impression for s in mine) and all((f.organ, f.side, f.kind) in [(g.organ, g.side, g.kind) for g in s.findings] for s in mine), f
    assert all(bool(about) == bool(s.findings) for s, about in zip(said, spoken)) and not any(wrong for about in spoken for wrong in about.values())

def test_a_wrong_side_is_marked_and_an_invented_lesion_is_nobodys(study, record):
    there = Finding('lung', 'left', 'nodule', 14., 6.1, 'increased'); own = dataclasses.replace(study, findings=(there,))
    flipped = with_text(record, 'chest', 'Nốt ở phổi phải, kích thước 14 mm, tăng chuyển hóa FDG (SUVmax: 6,1). Tràn dịch màng phổi trái, dày 22 mm.')
    found = [a for a, s in zip(spoken_of(flipped, own), sentences(flipped)) if flipped.sections[s.section].region == 'chest']
    assert found == [{1: ('side',)}, {}]

def test_s_lies_where_the_model_grid_has_it(study, record):
    hot = with_s(study, record).volumes['hot']; at = np.argwhere(hot.data > 0)
    inside = np.zeros(len(at), bool)
    for s in record.sections:
        v = np.rint(s.grid.index(hot.world(at)) + 1e-9).astype(int); ok = ((v >= 0) & (v < s.mask.shape)).all(-1)
        inside[ok] |= s.mask[tuple(v[ok].T)]
    assert len(at) > 50 and inside.mean() > .99
    with pytest.raises(ExplainError, match='other images'): with_s(draw(sample_patient(12), (8., 8., 8.)), record)
    with pytest.raises(ExplainError, match="'pet'"): with_s(Study('x', {'ct': study.volumes['ct']}), AttentionRecord(record.sections, {'language': 'vi'}))

def test_the_widget_answers_for_both_records(study, record, blind, about):
    v = explained(study, record, blind); out = []; v.send = lambda content, buffers=None: out.append((content, buffers))
    v._handle_custom_msg(dict(type='attention', record=0, span=list(about.span), layer=None, head=0, channel='attention', seq=3, view='b'), [])
    v._handle_custom_msg(dict(type='read', position=list(v.position), channel='read', seq=4, view='b'), [])
    said = out[0][0]; assert said['seq'] == 3 and said['inside'] == pytest.approx(shares(record, about.span, None, 0).inside) and np.allclose(said['maps'][about.section], maps(record, about.span, None, 0)[about.section]) and out[1][0]['reading']
    even = v.answer(dict(type='attention', record=1, span=[], layer=1, head=1))[0]; assert even['inside'] == pytest.approx(even['even'], abs=1e-4) and json.dumps(even)
    for bad in (dict(record=5, span=[]), dict(record=0, span=[0, 1]), dict(record=0, span=[], layer=9), dict(record=0), dict(record=0, span=3)): assert 'error' in v.answer(dict(type='attention', **bad))[0], bad
    assert [len(r['sections']) for r in v.setup['explained']] == [3, 3] and v.setup['page'] == 'explain' and json.loads(json.dumps(v.setup)) == v.setup

def test_python_sets_and_watches(study, record, blind):
    v = explained(study, record, blind, lesion=1); words = record.text[slice(*sentences(record)[0].span)]; seen = []
    v.observe(lambda change: seen.append(change['new']), 'selected'); v.select(words)
    assert seen == [list(span_of(record, words))] and record.text[slice(*v.selected)] == words and v.pet_map == 'inverted grey' and v.outlines == ['lesions', 'hot'] and set(EXPLAIN_STATE) <= set(v.trait_names())
    v.layer = v.head = 1; v.layer = None; v.selected = []; assert v.layer is None and v.head == 1
    assert study.id not in repr(v) + json.dumps(v.setup) and 'ideal reader' in repr(v)

@pytest.mark.parametrize('bad', [{'selected': [0, 1]}, {'selected': [3]}, {'selected': [10**6, 10**6 + 2]}, {'other_selected': [20, 30]}, {'layer': 2}, {'head': -1}, {'overlay': 'heat'}, {'strength': 2.}, {'lesion': -1}, {'glow': 1}])
def test_what_cannot_be_set_is_refused(study, record, bad):
    with pytest.raises(T.TraitError): explained(study, record, **bad)


# ---------- figures ----------
def test_the_overlay_lies_on_the_lesion(study, record, about):
    scene = scene_of(with_s(study, record)); i = next(iter(spoken_of(record, study)[sentences(record).index(about)])); at = study.findings[i - 1].center_mm
    d, h, w = np.rint(scene.frame.index(at)).astype(int); k = np.rint(scene.frame.index(at)).astype(int)
    for plane, axis in (('axial', 0), ('coronal', 1), ('sagittal', 2)):
        view = scene.views[plane]; values = overlay_of(scene, record, maps(record, about.span, None, 0), plane, int(k[axis]))
        row = scene.frame.shape[view.rows] - 1 - k[view.rows] if view.flip else k[view.rows]
        assert values[row, k[view.cols]] == values.max() > .4 and (values == values.max()).mean() < .12 and (plane == 'axial' or (values == 0).any()), plane

def test_a_figure_for_a_paper(study, record, blind, about, tmp_path):
    fig = attention_figure(study, record, about.span, blind, about.span, head=0, dpi=50); fig.savefig(tmp_path/'f.pdf'); fig.savefig(tmp_path/'f.png')
    assert (tmp_path/'f.pdf').read_bytes()[:4] == b'%PDF' and (tmp_path/'f.png').read_bytes()[:4] == b'\x89PNG' and len(fig.axes) == 9
    words = [t.get_text() for ax in fig.axes for t in ax.texts]; text = ' '.join(' '.join(words).split())
    assert [t.get_text() for t in fig.axes[1].texts] == ['R', 'L', 'A', 'P'] and f'{shares(record, about.span, None, 0).inside:.1%}' in text and 'head 0' in text and 'SUVbw > 4' in fig._supxlabel.get_text()
    odd = attention_figure(study, with_text(record, 'chest', 'Cost $5_{x} \\frac{ of $ <b>.'), 'Cost $5_{x}', dpi=40); odd.savefig(tmp_path/'odd.png')      # no mathematics is made of a report
    with pytest.raises(RecordError): attention_figure(study, record, 'nowhere said')

def test_colours_rise_with_the_share():
    t = tints(np.array([0., .25, .5, 1., 2.]), .8); assert np.allclose(t[:, 3], [0, .4, .8, .8, .8]) and (np.diff(t[:4, :3].sum(-1)) < 0).all() and np.allclose(t[3], t[4])

def test_the_widget_keeps_a_picture_for_where_no_kernel_is(study, record):
    data, _ = explained(study, record)._repr_mimebundle_(); assert base64.b64decode(data['image/png'])[:4] == b'\x89PNG'


# ---------- the script and the page ----------
def test_the_script_fetches_nothing_and_makes_no_html_of_data():
    code = explain_script()
    for word in ('://', 'innerHTML', 'outerHTML', 'insertAdjacent', 'document.write', 'eval(', 'new Function', 'fetch(', 'XMLHttp', 'WebSocket', 'import(', 'importScripts', 'localStorage', 'cookie', '</script', 'srcdoc'): assert word not in code, word
    assert not re.search(r'^\s*import\b', code, re.M) and not re.search(r'url\(|@import|://', explain_css()) and code.count('export default') == 1 and max(map(len, code.splitlines())) < 280 and '\t' not in code

@pytest.fixture(scope='module')
def evil(study, record, tmp_path_factory):
    "A page whose texts would run, were they not texts; its HTML, its path and its records."
    r = with_text(record, 'chest', f'Nốt ở phổi trái. {EVIL} 🙂 Hết.'); r = AttentionRecord(r.sections, r.about | {'title': EVIL})
    path = export_html(study, r, tmp_path_factory.mktemp('page')/'page.html', record, title=EVIL, organs={5: EVIL}, most_mb=2, selected=[])
    assert [p.name for p in path.parent.iterdir()] == ['page.html']
    return path.read_text(encoding='utf-8')

def test_foreign_texts_stay_texts(evil):
    assert len(re.findall(r'<script', evil)) == 3 and evil.count('</script') == 3 and 'onerror' not in re.sub(r'(&lt;|\\u003c)img[^<>]*', '', evil) and '://' not in evil
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', evil)[1]; code = re.search(r'<script type="module">(.*?)</script>', evil, re.S)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() in policy
    setup = json.loads(re.search(r'id="petvlm-setup">(.*?)</script>', evil, re.S)[1])
    assert EVIL in setup['explained'][0]['text'] and setup['explained'][0]['title'] == EVIL and setup['state']['selected'] == [] and setup['state']['layer'] is None

def test_a_page_keeps_to_its_size_or_is_not_made(study, record, tmp_path):
    size = sum(s.attention.nbytes for s in record.sections)/1e6
    small = export_html(study, record, tmp_path/'p.html', most_mb=2, attention_mb=size/1.9).read_text(encoding='utf-8'); setup = json.loads(re.search(r'id="petvlm-setup">(.*?)</script>', small, re.S)[1])
    assert [s['kept'] for s in setup['explained'][0]['sections']] == [[2, 1]]*3 and study.id not in small
    for bad, error in (({'pet_map': 'jet'}, T.TraitError), ({'attention_mb': 1e-6}, RecordError), ({'selected': [0, 1]}, T.TraitError)):
        with pytest.raises(error): export_html(study, record, tmp_path/'q.html', **bad)
    assert [p.name for p in tmp_path.iterdir()] == ['p.html']

@pytest.fixture(scope='module')
def ran(study, record, about, tmp_path_factory):
    "What the script makes of a page's own records, run by node."
    if not NODE: pytest.skip('node is not installed')
    room = tmp_path_factory.mktemp('node'); page = export_html(study, record, room/'p.html', ideal_record(study, gaze=.3), most_mb=2).read_text(encoding='utf-8')
    setup = re.search(r'id="petvlm-setup">(.*?)</script>', page, re.S)[1]; load = base64.b64decode(re.search(r'id="petvlm-volumes">(.*?)</script>', page, re.S)[1])
    span, frame = list(about.span), json.loads(setup)['frame']['shape']; at = [n//2 for n in frame]
    questions = [dict(record=0, span=[]), dict(record=0, span=span), dict(record=1, span=span, layer=1, head=0), dict(record=0, span=span, layer=0), dict(record=0, span=[0, 1]), dict(record=0, span=span, layer=2)]
    questions += [dict(record=0, span=span, head=0, plane=p, index=i) for p, i in zip(('axial', 'coronal', 'sagittal'), at)] + [dict(record=0, span=[], plane='axial', index=frame[0]//3), dict(record=0, span=span, head=0, plane='mip', angle=90)]
    questions = [{'layer': None, 'head': None} | q for q in questions]
    for name, content in (('script.mjs', explain_script()), ('setup.json', setup), ('questions.json', json.dumps(questions))): (room/name).write_text(content, encoding='utf-8')
    (room/'volumes.bin').write_bytes(load)
    done = subprocess.run([NODE, str(Path(__file__).parent/'explain_node.mjs'), *(str(room/n) for n in ('script.mjs', 'setup.json', 'volumes.bin', 'questions.json'))], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(setup), questions, json.loads(done.stdout)

def test_sums_in_the_browser_are_the_records(ran, study, record):
    setup, questions, said = ran; records = [record, ideal_record(study, gaze=.3)]
    for q, got in zip(questions[:4], said['out']):
        want, _ = attention_answer(records, q)
        for k in ('inside', 'even', 'on_image', 'tokens'): assert got[k] == pytest.approx(want[k], abs=1e-6), (q, k)
        for a, b in zip(got['maps'], want['maps']): assert (a is None) == (b is None) and (a is None or np.allclose(a, b, atol=1e-5))
    assert 'no word' in said['out'][4]['error'] and '0 to 1' in said['out'][5]['error']
    assert said['kernel'] == {'asked': {'type': 'attention', 'record': 1, 'span': [3, 9], 'layer': None, 'head': 2, 'channel': 'attention', 'seq': 1}, 'found': [[.5, .5], None]}
    assert said['halves'] == [float(np.array(b, np.uint16).view(np.float16)) for b in (0, 1, 1023, 1024, 0x3c00, 0x3555, 0x7bff, 0x0400, 0xc000)]

def test_boxes_in_the_browser_lie_where_python_draws_them(ran, study, record):
    from petvlm.scene import blank
    setup, questions, said = ran; scene = dataclasses.replace(scene_of(with_s(study, record)), frame=blank(setup['frame']['shape'], np.array(setup['frame']['affine'])))
    for q, got in list(zip(questions, said['out']))[6:10]:
        want = overlay_of(scene, record, maps(record, tuple(q['span']) or None, q['layer'], q['head']), q['plane'], q['index']); values = np.reshape(got['values'], (got['rows'], got['cols']))
        assert values.shape == want.shape and (abs(values - want) > 1e-4).mean() < .01, q                   # but for pixels on a box's edge, where rounding decides
    assert max(map(max, (g['values'] for g in said['out'][6:9]))) > 0 and np.isclose(max(said['out'][10]['values']), max(max(m) for m in said['out'][10]['maps'] if m), atol=1e-6)


# ---------- one line ----------
def test_records_and_files_are_shown_and_what_is_no_run_is_named(study, record, blind, tmp_path):
    from petvlm.explaining import ExplainingError, explain, speaker            # torch comes with it
    w = explain(save_record(record, tmp_path/'look.safetensors'), study, blind); assert w.records[0].text == record.text and w.records[1] is blind
    with pytest.raises(ExplainingError, match='not trained'): speaker('vipet', 'paper')
    with pytest.raises(ExplainingError, match='served'): speaker('gpt4o')
    with pytest.raises(ExplainingError, match='trained node'): speaker(tmp_path)
    with pytest.raises(ExplainingError, match='no such folder'): speaker('runs/nowhere/train/x')
    with pytest.raises(ExplainError): explain(record, draw(sample_patient(12), (8., 8., 8.)))
