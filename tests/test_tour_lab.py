"""The tour as a reader takes it: opened in a real JupyterLab in a real browser, run from top to bottom, touched, and held against the phantom's truth. Slow; skipped where no Chromium is installed."""
import json, os, re
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from browser import CHROMIUM, KERNEL, jupyterlab
from petvlm.phantom import draw, sample_patient
from test_lab import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed (apt-get install chromium, or PETVLM_CHROMIUM=path)')]
ROOT = Path(__file__).parents[1]
SHORT = dict(patients=6, steps=2)                              # the tour's own short path; PETVLM_TOUR='{}' takes the whole one
A, B = (f"document.querySelectorAll('.petvlm-viewer')[{k}].petvlm" for k in range(2))
LINE = f"{A}.line.textContent"
RESOURCES = "performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('http://127.0.0.1') && !n.startsWith('data:') && !n.startsWith('blob:'))"


@pytest.fixture
def room(tmp_path):
    "Where pictures are kept: PETVLM_SHOTS, or beside the test's other output."
    keep = Path(os.environ.get('PETVLM_SHOTS') or tmp_path/'shots'); keep.mkdir(parents=True, exist_ok=True); return keep

def tour():
    "The notebook with its parameters set, and no outputs."
    nb = load_notebook_node(str(ROOT/'nbs/tour.ipynb'))
    for c in nb.cells:
        if c.cell_type == 'code': c.outputs, c.execution_count = [], None
    given = json.loads(os.environ.get('PETVLM_TOUR', 'null'))
    nb = parameterize_notebook(nb, SHORT if given is None else given); nb.metadata.pop('papermill', None); return nb

def shoot(page, where, name, target=None):
    if target: page.js(f"{target}.root.scrollIntoView({{block: 'start'}})"); page.js("new Promise(done => setTimeout(done, 700))")
    Image.fromarray(page.picture().astype(np.uint8)).save(where/f'{name}.png')

def clicked(page, viewer, plane, xyz):
    "Press on the place `xyz` (LPS mm) of the slice that is shown."
    page.js(f"{viewer}.panels.{plane}.canvas.scrollIntoView({{block: 'center'}})"); page.js("new Promise(done => setTimeout(done, 500))")
    page.click(*page.js(f"(() => {{ const v = {viewer}, [r, c] = v.spot('{plane}', {list(map(float, xyz))}), f = v.fit('{plane}'), b = v.panels.{plane}.canvas.getBoundingClientRect(); return [b.x + f.ox + (c + .5)*f.kx, b.y + f.oy + (r + .5)*f.ky]; }})()"))


def test_the_tour_in_jupyterlab(tmp_path, room, monkeypatch):
    monkeypatch.setenv('PETVLM_ROOT', os.environ.get('PETVLM_ROOT', str(ROOT)))
    truth = draw(sample_patient(20323)); hot = max((f for f in truth.findings if f.suvmax), key=lambda f: f.suvmax); there = hot.center_mm
    with jupyterlab(tour(), tmp_path, size=(1500, 1500), patience=420) as lab:
        lab.js("void jupyterapp.commands.execute('notebook:run-all-cells')")
        lab.until(f"document.querySelectorAll('.petvlm-viewer').length === 2 && !!{A}.panels.axial.answer && !!{B}?.found && !!{B}.panels.axial.answer && {KERNEL}.status === 'idle'")
        failed = lab.js("[...document.querySelectorAll('.jp-OutputArea-output[data-mime-type=\"application/vnd.jupyter.error\"], .jp-RenderedText[data-mime-type=\"application/vnd.jupyter.stderr\"] .ansi-red-fg')].map(e => e.textContent.slice(0, 300))"); assert failed == []
        shoot(lab, room, 'tour-opened', A)

        # the crosshair goes where the hand points, and reads the lesion that the phantom put there
        lab.js(f"{A}.store.set('position', {list(map(float, there))})"); lab.until(f"{A}.panels.coronal.answer.index === {A}.slice('coronal') && {A}.panels.axial.answer.index === {A}.slice('axial')")
        away = (-there[0], there[1], there[2]); clicked(lab, A, 'axial', away); lab.until(f"Math.abs({A}.store.get('position')[0] - {away[0]}) < 6")
        clicked(lab, A, 'axial', there); lab.until(f"Math.abs({A}.store.get('position')[0] - {there[0]}) < 6 && {LINE}.includes('{'left' if there[0] > 0 else 'right'}, ') && /SUVbw (about )?[\\d.]+/.test({LINE})")
        said = lab.js(LINE); shown = float(re.search(r'SUVbw (?:about )?([\d.]+)', said)[1]); side = 'left' if there[0] > 0 else 'right'
        pet = truth.volumes['pet']; d, h, w = np.rint(np.linalg.inv(pet.affine) @ [*lab.js(f"{A}.store.get('position')"), 1]).astype(int)[:3]
        assert side in said and abs(shown - pet.data[d, h, w]) < .3*hot.suvmax and shown > .3*hot.suvmax, (said, hot)
        lab.until(f"{A}.store.get('position').every((x, i) => Math.abs(x - {list(map(float, there))}[i]) < 8)"); shoot(lab, room, 'tour-lesion', A)

        # another window: the same voxel is drawn paler, and the bar says so
        grey = f"(() => {{ const v = {A}, c = v.panels.mip.canvas; return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].reduce((a, b) => a + b, 0); }})()"
        before = lab.js(grey); menu = "document.querySelector('.petvlm-viewer select[aria-label=\"SUVbw window\"]')"
        lab.js(f"{menu}.value = '0 to 15'; {menu}.dispatchEvent(new Event('change'))"); lab.until(f"{A}.store.get('suv_window')[1] === 15 && {grey} > {before}*1.005")
        assert '15' in lab.js(f"{A}.bars.textContent"); shoot(lab, room, 'tour-window', A)

        # a sentence: pressing one lights its own attention up; which, is what Python hears
        lab.js(f"{B}.root.scrollIntoView()"); spans = lab.js(f"{B}.sentences.map(s => s.span)"); assert len(spans) > 2
        for want in (spans[-1], spans[0]):
            at = lab.js(f"(() => {{ const s = {B}.sentences.find(s => s.span[0] === {want[0]}); s.e.scrollIntoView({{block: 'center'}}); const b = s.e.getClientRects()[0]; return [b.x + b.width/2, b.y + b.height/2]; }})()")
            lab.click(*at); lab.until(f"{B}.store.get('selected')[0] === {want[0]} && {B}.goes === '' && {B}.found?.tokens > 0")         # the planes have gone there, too
        heard = f"import json; from petvlm.attentionrecord import tokens_at; print(json.dumps([list(seen.selected), bool((tokens_at(record.sections[sentences(record)[0].section], seen.position) >= 0).all())]))"
        lab.wait(lambda: json.loads(python(lab, heard)) == [spans[0], True], 'Python to hear of the sentence, and of the planes that went where its tokens are')
        inside = json.loads(python(lab, 'from petvlm.attentionrecord import shares; print(__import__("json").dumps(shares(record, seen.selected).inside))')); shown = lab.js(f"{B}.found.inside ?? null")
        assert (inside is None) == (shown is None) and (inside is None or abs(inside - shown) < 1e-4)
        shoot(lab, room, 'tour-sentence', B)

        # a lesion of the list: the crosshair goes to it, the sentences that speak of it are underlined, and it is where the phantom has it
        spot = lab.js(f"{B}.setup.spots[0]"); lab.js(f"{B}.buttons[{B}.buttons.findIndex(b => b[0] === {spot['label']})][1].click()"); lab.until(f"{B}.store.get('lesion') === {spot['label']}")
        finding = json.loads(python(lab, f"print([float(x) for x in held_out.findings[{spot['label']} - 1].center_mm])")); assert np.linalg.norm(np.subtract(finding, spot['mm'])) < 40
        shoot(lab, room, 'tour-spoken-of', B); assert lab.js(RESOURCES) == []
