"""Tables, ablations, retrieval and training in a real browser: exported pages from disk with the network off, and the same in a JupyterLab. Slow; skipped where no Chromium is installed."""
import json, os, re, time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from browser import CHROMIUM, Page, jupyterlab
from petvlm.live import Overview, of_report
from petvlm.resultsview import read_table, write_gallery
from petvlm.retrievalview import export_retrieval, found
from test_live import report
from test_results_view import PRINTED
from test_retrieval_view import EVIL, made

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed (apt-get install chromium, or PETVLM_CHROMIUM=path)')]
RESOURCES = "performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:') && !n.startsWith('blob:'))"

def shoot(page, name):
    if keep := os.environ.get('PETVLM_SHOTS'): Path(keep).mkdir(parents=True, exist_ok=True); Image.fromarray(page.picture().astype(np.uint8)).save(Path(keep)/f'{name}.png')


# ---------- tables and ablations ----------
@pytest.fixture(scope='module')
def gallery_page(tmp_path_factory):
    room = tmp_path_factory.mktemp('gallery')
    with Page(write_gallery(PRINTED, room/'gallery.html').as_uri(), room, size=(1500, 1000), patience=90) as p:
        p.until("document.querySelectorAll('.petvlm-figure .main-svg').length >= document.querySelectorAll('.petvlm-figure').length && document.readyState === 'complete'"); yield p

FIGURE = "document.querySelectorAll('.petvlm-figure')[{}]"

def test_tables_are_drawn_offline_sorted_by_the_menu_and_tell_their_run(gallery_page):
    p, name = gallery_page, 'vipet_table1'; table = read_table(PRINTED/f'{name}.csv')
    k = p.js(f"[...document.querySelectorAll('.petvlm-figure')].findIndex(e => e.data[0].y.includes('no_fusion') && e.data[0].x.includes('BLEU-4') && e.data[0].x.includes('ROUGE-1'))"); figure = FIGURE.format(k)
    p.js(f"{figure}.scrollIntoView()"); time.sleep(.5); shoot(p, 'table')
    assert p.js(RESOURCES) == [] and p.js(f"[...{figure}.querySelectorAll('.ytick text')].map(t => t.textContent)") == table['model'].tolist()
    button = p.js(f"{figure}.layout.updatemenus[0].buttons.findIndex(b => b.label === 'by BLEU-4')")
    p.js(f"void Plotly.relayout({figure}, {figure}.layout.updatemenus[0].buttons[{button}].args[0])"); time.sleep(.5)
    best = table['BLEU-4 measured'].astype(float).sort_values(ascending=False, na_position='last', kind='stable').index
    assert p.js(f"[...{figure}.querySelectorAll('.ytick text')].map(t => [t.getBoundingClientRect().y, t.textContent]).sort((a, b) => a[0] - b[0]).map(t => t[1])") == table.loc[best, 'model'].tolist()
    shoot(p, 'table-sorted')
    x, y, w, h = p.js(f"(() => {{ const b = {figure}.querySelector('.heatmaplayer .hm').getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }})()")
    row = table.loc[best[0]]; p.mouse('mouseMoved', x + w/len(p.js(f'{figure}.data[0].x'))/2, y + h/len(table)/2); p.mouse('mouseMoved', x + w/len(p.js(f'{figure}.data[0].x'))/2 + 3, y + h/len(table)/2 + 2)
    p.until(f"!!{figure}.querySelector('.hoverlayer .hovertext')"); told = p.js(f"{figure}.querySelector('.hoverlayer').textContent"); shoot(p, 'table-hover')
    assert f"run: {row['run']}" in told and str(row['model']) in told and row['revision'] in told


# ---------- retrieval ----------
PAIRS = made(texts=(EVIL, *(f'Text {i % 30}, a nodule.' for i in range(1, 40))))
R = "document.querySelector('.petvlm-retrieval')"

@pytest.fixture(scope='module')
def retrieval_page(tmp_path_factory):
    room = tmp_path_factory.mktemp('retrieval')
    with Page(export_retrieval(PAIRS, room/'r.html', title=EVIL, chosen=7).as_uri(), room) as p: p.until(f"!!{R} && document.querySelectorAll('.petvlm-card').length === 9 + !{R}.petvlm.ranked.slice(0, 9).includes(7)"); yield p

def cards(p): return p.js("[...document.querySelectorAll('.petvlm-card')].map(c => +c.dataset.row)")

def test_a_text_finds_volumes_and_a_volume_texts(retrieval_page):
    p = retrieval_page; shoot(p, 'retrieval'); order = found(PAIRS, 7)[1].tolist()
    assert cards(p)[:9] == order[:9] and f"is at rank {order.index(7) + 1} of 40" in p.js(f'{R}.innerText') and p.js("document.querySelector('.petvlm-own').dataset.row") == '7' and p.js("document.querySelector('.petvlm-own').textContent").count('belongs to it') == 1
    for k, v in PAIRS.recalls()['text_to_image'].items(): assert f'R@{k} {v:.1f} %' in p.js(f'{R}.innerText')
    assert p.js("[...document.querySelectorAll('.petvlm-card img')].every(i => i.naturalWidth === 20)") and p.js(RESOURCES) == []
    p.js("document.querySelector('.petvlm-rlist button[data-row=\"12\"]').scrollIntoView()"); x, y, w, h = p.box('.petvlm-rlist button[data-row="12"]'); p.click(x + w/2, y + h/2)
    p.until("document.querySelector('.petvlm-asked').textContent === 'Text 12, a nodule.'"); assert cards(p)[:9] == found(PAIRS, 12)[1].tolist()[:9]
    p.js(f"(() => {{ const s = document.querySelector('.petvlm-retrieval select'); s.value = 'volume'; s.dispatchEvent(new Event('change')); }})()")
    p.until("document.querySelectorAll('.petvlm-texts .petvlm-card').length >= 9"); shoot(p, 'retrieval-volume')
    assert cards(p)[:9] == found(PAIRS, 12, 'volume')[1].tolist()[:9] and f"R@1 {PAIRS.recalls()['image_to_text'][1]:.1f} %" in p.js(f'{R}.innerText')

def test_words_choose_and_foreign_texts_stay_texts(retrieval_page):
    p = retrieval_page; p.js(f"(() => {{ const s = document.querySelector('.petvlm-retrieval select'); s.value = 'text'; s.dispatchEvent(new Event('change')); }})()")
    x, y, w, h = p.box('.petvlm-retrieval input'); p.click(x + w/2, y + h/2); p.call('Input.insertText', text='alert'); p.until("document.querySelectorAll('.petvlm-rlist button').length === 1")
    x, y, w, h = p.box('.petvlm-rlist button'); p.click(x + w/2, y + h/2); p.until(f"{R}.petvlm.store.get('chosen') === 0")
    assert p.js("document.querySelector('.petvlm-asked').textContent") == EVIL and p.js("document.querySelectorAll('img[src=x]').length") == 0 and p.js('document.title') == EVIL
    assert p.js(f"{R}.querySelector('form button')") is None


# ---------- training ----------
def test_the_training_page_shows_without_a_script(tmp_path):
    losses = [{'step': s, 'loss': 4/s + .2, 'lm': 4/s, 'align': .2 + .01*(s % 3)} for s in range(1, 401)]
    running = of_report(report('vipet.instruct', log=losses))._replace(state='running', steps=600)
    with Page(Overview([of_report(report(log=losses)), running], 5).save(tmp_path/'t.html').as_uri(), tmp_path) as p:
        p.until("document.querySelectorAll('svg polyline').length === 3"); shoot(p, 'training'); assert p.js(RESOURCES) == [] and 'step 400/600 (66 %)' in p.js('document.body.innerText')


# ---------- JupyterLab ----------
CELLS = ["import sys; sys.path.insert(0, {tests!r})\nfrom pathlib import Path\nimport time\nfrom petvlm.journal import NAME, Journal\nfrom petvlm.live import Live\nfrom petvlm.retrievalview import Browser\nfrom petvlm.resultsview import gallery\nfrom test_retrieval_view import made\nfrom test_results_view import PRINTED\npairs = made()",
         "show = Live(share=.5, least=.2)\nj = Journal(Path('work/vipet.instruct-0a')/NAME, every=.1, told=show); j.begin('instruct', 60, 16, {{'lm': 1., 'align': .1}})\nfor s in range(1, 61): time.sleep(.1); j.step(s, {{'lm': 3/(1 + s/10), 'align': .5 - s/200}}, 1e-3)\nj.end(60)",
         "gallery(PRINTED)[next(t for t in gallery(PRINTED) if 'Table 1' in t and 'ViPET' in t)][0]", "b = Browser(pairs, ask=lambda text: pairs.text[len(text)], chosen=3); b"]

def test_all_three_in_jupyterlab_without_network(tmp_path):
    with jupyterlab([c.format(tests=str(Path(__file__).parent)) for c in CELLS], tmp_path, patience=240) as lab:
        lab.js("void jupyterapp.commands.execute('notebook:run-all-cells')")
        lab.until("[...document.querySelectorAll('.jp-OutputArea-output progress')].some(e => e.value > 3 && e.value < 50)"); lab.js("document.querySelector('.jp-OutputArea-output progress').scrollIntoView()"); shoot(lab, 'lab-live')
        lab.until("document.querySelectorAll('.jp-OutputArea-output progress').length === 1 && document.querySelector('.jp-OutputArea-output progress').value === 60")
        assert 'step 60/60 (100 %)' in lab.js("document.querySelector('.jp-OutputArea-output progress').closest('.jp-OutputArea-output').textContent")
        lab.js('void jupyterapp.shell.currentWidget.content.scrollToItem(2)'); lab.until("!!document.querySelector('.js-plotly-plot .main-svg')"); lab.js("document.querySelector('.js-plotly-plot').scrollIntoView()"); time.sleep(.5); shoot(lab, 'lab-table')
        lab.until(f"!!{R} && document.querySelectorAll('.petvlm-card').length >= 9"); lab.js(f"{R}.scrollIntoView()"); time.sleep(.5)
        lab.js(f"(() => {{ const v = {R}.petvlm; v.word.value = 'a node'; v.question('a node'); }})()"); lab.until("document.querySelector('.petvlm-asked').textContent === 'a node'"); shoot(lab, 'lab-retrieval')
        assert cards(lab)[:9] == found(made(), 6)[1].tolist()[:9] and 'nothing is known to be right' in lab.js(f'{R}.innerText')
        outside = [n for n in lab.js(RESOURCES) if not n.startswith('http://127.0.0.1')]; assert outside == []
