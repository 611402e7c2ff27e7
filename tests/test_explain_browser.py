"""The report beside the pictures in a real browser, from disk and with the network off: a sentence is chosen and the truth of the phantom is where the boxes are. Slow; skipped where no Chromium is installed."""
import os, time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from browser import CHROMIUM, Page
from petvlm.attentionrecord import AttentionRecord, ideal_record, maps, sentences, shares
from petvlm.explain import export_html, most_looked_at, spoken_of
from petvlm.phantom import draw, sample_patient
from test_explain import EVIL, with_text

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed (apt-get install chromium, or PETVLM_CHROMIUM=path)')]
V = "document.querySelectorAll('.petvlm-viewer')[{}].petvlm"
A, B = V.format(0), V.format(1)
INSIDE = "document.querySelectorAll('.petvlm-inside')[{}].textContent"


def shoot(page, name):
    if keep := os.environ.get('PETVLM_EXPLAIN_SHOTS'): Path(keep).mkdir(exist_ok=True); Image.fromarray(page.picture().astype(np.uint8)).save(Path(keep)/f'{name}.png')

@pytest.fixture(scope='module')
def study(): return draw(sample_patient(11), reports=True)

@pytest.fixture(scope='module')
def record(study): return ideal_record(study)

@pytest.fixture(scope='module')
def spoken(study, record):
    "The sentences of the body that state a finding, the lesion they speak of, and its place."
    return [(s, i, study.findings[i - 1].center_mm) for s, about in zip(sentences(record), spoken_of(record, study)) for i in about if not s.impression]

def opened(path, room, size):
    page = Page(path.as_uri(), room, size)
    page.until(f"!!document.querySelector('.petvlm-viewer')?.petvlm && !!{A}.found && !!{A}.panels.mip.answer && !!{A}.panels.axial.answer")
    return page

@pytest.fixture(scope='module')
def single(study, record, tmp_path_factory):
    room = tmp_path_factory.mktemp('single')
    with opened(export_html(study, record, room/'page.html', most_mb=8), room, (1240, 1150)) as page: yield page

@pytest.fixture(scope='module')
def pair(study, record, tmp_path_factory):
    room = tmp_path_factory.mktemp('pair'); blind = ideal_record(study, gaze=0)
    records = [AttentionRecord(r.sections, r.about | {'title': t}) for r, t in ((record, 'ideal reader'), (blind, 'reader who looks at nothing'))]
    with opened(export_html(study, records[0], room/'page.html', records[1], most_mb=8), room, (1240, 1250)) as page:
        page.until(f"!!{B}.found && !!{B}.panels.axial.answer"); yield page

def click_sentence(page, span, viewer=A):
    at = page.js(f"(() => {{ const s = {viewer}.sentences.find(s => s.span[0] === {span[0]}); s.e.scrollIntoView({{block: 'center'}}); const b = s.e.getClientRects()[0]; return [b.x + b.width/2, b.y + b.height/2]; }})()")
    page.click(*at)

def spot(page, plane, xyz, viewer=A):
    "Where a place (LPS mm) lies on the screen; the crosshair goes there first."
    page.js(f"{viewer}.store.set('position', {list(map(float, xyz))})"); index = page.js(f"{viewer}.slice('{plane}')"); page.until(f"{viewer}.panels.{plane}.answer.index === {index}")
    return page.js(f"(() => {{ const v = {viewer}, [r, c] = v.spot('{plane}', {list(map(float, xyz))}), f = v.fit('{plane}'), b = v.panels.{plane}.canvas.getBoundingClientRect(); return [b.x + f.ox + (c + .5)*f.kx, b.y + f.oy + (r + .5)*f.ky]; }})()")

def pink(page, plane, viewer=A):
    "(rows, cols) how strongly each pixel of a panel is tinted (red and blue above green), from the screen, and where the panel begins."
    x, y, w, h = (int(round(v)) for v in page.js(f"(() => {{ const b = {viewer}.panels.{plane}.canvas.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }})()")); r, g, b = np.moveaxis(page.picture()[y:y + h, x:x + w], -1, 0)
    tint = (r + b)/2 - g
    return np.where(tint > 30, tint, 0), (x, y)


def test_the_text_is_a_text(single, record):
    assert single.js("document.querySelector('.petvlm-text').textContent") == record.text and single.js("performance.getEntriesByType('resource').length") == 0
    assert single.js("document.querySelectorAll('.petvlm-sentence').length") == len(sentences(record)) and 'mean of 2' in single.js("document.querySelector('select[aria-label=\"layer\"]').textContent")
    shoot(single, 'whole-report')

def test_a_chosen_sentence_lights_up_at_its_lesion(single, record, study, spoken):
    "For every sentence about a lesion: the most strongly tinted box on each plane holds the lesion, and the share inside S is the record's."
    single.js(f"{A}.store.set('lesion', 0); {A}.store.set('head', 0); {A}.store.set('outlines', [])")
    for n, (s, i, at) in enumerate(spoken):
        if single.js(f"{A}.store.get('selected')[0]") != s.span[0]: click_sentence(single, s.span)
        single.until(f"{A}.store.get('selected')[0] === {s.span[0]}"); found = shares(record, s.span, None, 0)
        if found.inside is not None: assert abs(float(single.js(INSIDE.format(0)).split('inside S: ')[1].split(' %')[0])/100 - found.inside) < .006
        places = maps(record, s.span, None, 0)[s.section]; assert places.max() > .35
        for plane in ('axial', 'coronal', 'sagittal'):
            x, y = spot(single, plane, at); strength, (x0, y0) = pink(single, plane); here = strength[int(y - y0) - 6:int(y - y0) + 7, int(x - x0) - 6:int(x - x0) + 7]
            assert np.median(here) > 45, (i, plane)
            assert (strength > 45).mean() < .35, (i, plane)
        if n == 0: single.js("window.scrollTo(0, 0)"); shoot(single, 'sentence')
    single.js(f"{A}.store.set('outlines', ['lesions', 'hot']); {A}.store.set('head', null)")

def test_a_sentence_of_another_region_brings_the_planes_there(single, record, spoken):
    "The crosshair stands at the feet: a chosen sentence about something else is looked at where its attention is largest, and stays put where the region is shown already."
    s, i, at = spoken[0]; single.js(f"{A}.store.set('head', 0); {A}.store.set('selected', [])")
    single.js(f"(() => {{ const f = {A}.setup.frame, m = f.affine; {A}.store.set('position', [0, 1, 2].map(k => m[k][1]*f.shape[1]/2 + m[k][2]*f.shape[2]/2 + m[k][3])); }})()"); low = single.js(f"{A}.store.get('position')")
    click_sentence(single, s.span); single.until(f"{A}.store.get('position')[2] !== {low[2]}")
    want = most_looked_at(record, maps(record, s.span, None, 0)); assert np.linalg.norm(np.subtract(single.js(f"{A}.store.get('position')"), want)) < 10
    x, y = spot(single, 'axial', want); strength, (x0, y0) = pink(single, 'axial'); assert np.median(strength[int(y - y0) - 4:int(y - y0) + 5, int(x - x0) - 4:int(x - x0) + 5]) > 45
    single.js(f"{A}.store.set('selected', []); {A}.store.set('position', {list(map(float, at))})"); click_sentence(single, s.span); single.until(f"{A}.store.get('selected')[0] === {s.span[0]} && {A}.found.tokens > 0"); time.sleep(.3)
    assert np.allclose(single.js(f"{A}.store.get('position')"), at, atol=1e-3); single.js(f"{A}.store.set('head', null)")

def test_a_word_the_arrows_and_the_whole(single, record, spoken):
    s = spoken[0][0]; menu = "document.querySelector('select[aria-label=\"choose\"]')"
    single.js(f"{menu}.value = 'word'; {menu}.dispatchEvent(new Event('change'))")
    at = single.js(f"(() => {{ const w = {A}.sentences.find(s => s.span[0] === {s.span[0]}).parts[1].e; w.scrollIntoView({{block: 'center'}}); const b = w.getBoundingClientRect(); return [b.x + b.width/2, b.y + b.height/2]; }})()")
    single.click(*at); assert single.js(f"{A}.store.get('selected')") == list(s.words[1]) and single.js("[...document.querySelectorAll('.petvlm-word.petvlm-chosen')].map(e => e.textContent).join()") == record.text[slice(*s.words[1])]
    single.until(f"{INSIDE.format(0)}.includes('1 text token,')"); single.key('ArrowRight', 39)
    assert single.js(f"{A}.store.get('selected')") == list(s.words[2])
    single.js("[...document.querySelectorAll('button')].find(b => b.textContent === 'whole report').click()"); single.until(f"{INSIDE.format(0)}.includes('{shares(record).tokens} text tokens')")
    single.js(f"{menu}.value = 'sentence'; {menu}.dispatchEvent(new Event('change'))"); single.js('window.scrollTo(0, 0)')

def test_a_lesion_marks_its_sentences(single, study, record, spoken):
    marked = "[...document.querySelectorAll('.petvlm-about')].map(e => e.textContent)"
    s, i, at = spoken[0]; want = [record.text[slice(*x.span)] for x, about in zip(sentences(record), spoken_of(record, study)) if i in about]
    n = single.js(f"{A}.buttons.findIndex(b => b[0] === {i})"); single.js(f"{A}.buttons[{n}][1].scrollIntoView({{block: 'center'}})"); x, y, w, h = single.box('.petvlm-list button', n); single.click(x + w/2, y + h/2)
    single.until(f"{A}.store.get('lesion') === {i}"); assert single.js(marked) == want and single.js(f"{A}.store.get('selected')") == list(s.span)
    single.js('window.scrollTo(0, 0)'); shoot(single, 'lesion')
    mm = single.js(f"{A}.setup.spots.find(s => s.label === {i}).mm"); single.js(f"{A}.store.set('lesion', 0)"); single.until(f"{marked}.length === 0")
    single.click(*spot(single, 'axial', mm)); single.until(f"{A}.store.get('lesion') === {i}"); assert single.js(marked) == want           # a click on it in the picture
    other = next((t for t in spoken if t[1] != i and t[2] is not None), None)
    if other: n = single.js(f"{A}.buttons.findIndex(b => b[0] === {other[1]})"); single.js(f"{A}.buttons[{n}][1].click()"); single.until(f"{A}.store.get('lesion') === {other[1]}"); assert single.js(marked) != want

def test_s_is_shown_beside_it(single, study, record, spoken):
    "The overlay 'S' tints the tokens of S and nothing else."
    single.js(f"{A}.store.set('lesion', 0); {A}.store.set('selected', []); {A}.store.set('overlay', 'S'); {A}.store.set('outlines', [])")
    k = max(range(len(record.sections)), key=lambda k: record.sections[k].weights.sum()); s = record.sections[k]; at = s.grid.world(np.argwhere(s.mask).mean(0).round())
    nearest = np.argwhere(s.mask)[np.linalg.norm(s.grid.world(np.argwhere(s.mask)) - at, axis=1).argmin()]; x, y = spot(single, 'axial', s.grid.world(nearest)); strength, (x0, y0) = pink(single, 'axial')
    assert np.median(strength[int(y - y0) - 4:int(y - y0) + 5, int(x - x0) - 4:int(x - x0) + 5]) > 45
    single.js(f"{A}.store.set('overlay', 'nothing')"); assert (pink(single, 'axial')[0] > 45).mean() < .002
    single.js(f"{A}.store.set('overlay', 'attention'); {A}.store.set('outlines', ['lesions', 'hot'])")

def test_layers_and_heads(single, record, spoken):
    s = spoken[0][0]; single.js(f"{A}.store.set('selected', {list(s.span)})")
    for head in (0, 1, None):
        menu = "document.querySelector('select[aria-label=\"head\"]')"; single.js(f"{menu}.value = '{'mean' if head is None else head}'; {menu}.dispatchEvent(new Event('change'))")
        single.until(f"{INSIDE.format(0)}.endsWith('{'mean of heads' if head is None else f'head {head}'}')"); assert abs(single.js(f"{A}.found.inside ?? -1") - (shares(record, s.span, None, head).inside or -1)) < 1e-5

def test_two_runs_side_by_side(pair, record, study, spoken):
    "A sentence chosen in one report chooses the one about the same lesion in the other; one scale; the blind reader's boxes are pale."
    s, i, at = spoken[0]; pair.js(f"{A}.store.set('head', 0)"); click_sentence(pair, s.span); pair.until(f"{A}.store.get('other_selected')[0] === {s.span[0]}"); pair.until(f"Math.abs({B}.top - {A}.top) < 1e-9 && {B}.found.tokens === {A}.found.tokens")
    pair.js('window.scrollTo(0, 0)'); x, y = spot(pair, 'coronal', at); pair.until(f"{B}.panels.coronal.answer.index === {A}.panels.coronal.answer.index"); strong, (x0, y0) = pink(pair, 'coronal'); pale, _ = pink(pair, 'coronal', B)
    assert strong[int(y - y0) - 5:int(y - y0) + 6, int(x - x0) - 5:int(x - x0) + 6].max() > 45 and (pale > 45).mean() < .01
    assert pair.js("document.querySelectorAll('.petvlm-bar').length") == 2 and pair.js("document.querySelectorAll('.petvlm-list').length") == 1
    boxes = [pair.js(f"{v}.panels.axial.canvas.getBoundingClientRect().y") for v in (A, B)]; assert abs(boxes[0] - boxes[1]) < 2
    shoot(pair, 'pair')

def test_foreign_texts_run_nothing(study, record, tmp_path):
    r = with_text(record, 'chest', f'Nốt ở phổi trái. {EVIL} 🙂 Hết.'); r = AttentionRecord(r.sections, r.about | {'title': EVIL})
    with opened(export_html(study, r, tmp_path/'page.html', title=EVIL, organs={5: EVIL}, most_mb=3), tmp_path, (1240, 1000)) as page:
        assert page.js("document.querySelector('.petvlm-text').textContent") == r.text and page.js("document.querySelectorAll('img').length") == 0 and EVIL in page.js("document.body.innerText")
        last = sentences(r)[[s.section for s in sentences(r)].index(1) + 1:]; end = next(s for s in last if r.text[slice(*s.span)].endswith('Hết.')); click_sentence(page, end.span)
        page.until(f"{A}.store.get('selected')[1] === {end.span[1]}"); assert page.js("document.querySelector('.petvlm-sentence.petvlm-chosen').textContent") == r.text[slice(*end.span)]
