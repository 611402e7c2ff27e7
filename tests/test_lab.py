"""`view(study)` in a real JupyterLab in a real browser: it opens, answers, follows Python, and its pictures say what the phantom is. Slow; skipped where no Chromium is installed."""
import json, os, statistics, time
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from browser import CHROMIUM, KERNEL, jupyterlab

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed (apt-get install chromium, or PETVLM_CHROMIUM=path)')]
ROOT = Path(__file__).parents[1]
CELLS = ["import sys; sys.path.insert(0, {bench!r})\nfrom petvlm.widget import view\nfrom viewer import study\nmade = study({shape})", "v = view(made); v"]
V = "document.querySelector('.petvlm-viewer').petvlm"
LINE = "document.querySelectorAll('.petvlm-line')[0].textContent"


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab with a notebook whose kernel is ready."
    shape = tuple(json.loads(os.environ.get('PETVLM_LAB_SHAPE', '[120, 160, 160]')))
    with jupyterlab([c.format(bench=str(ROOT/'benchmarks'), shape=shape) for c in CELLS], tmp_path_factory.mktemp('lab')) as page: yield page

def python(page, code):
    "What `code` prints in the notebook's kernel."
    return page.js(f"""(async () => {{ let said = ''; const future = {KERNEL}.requestExecute({{code: {json.dumps(code)}}});
        future.onIOPub = m => {{ said += m.content.text || m.content.evalue || ''; }}; await future.done; return said; }})()""")


def test_the_viewer_in_lab(lab):
    lab.js("jupyterapp.commands.execute('notebook:run-cell-and-select-next').then(() => null)")                     # imports, and the data: not the viewer's time
    start = time.perf_counter(); lab.js("void jupyterapp.commands.execute('notebook:run-cell-and-select-next')")
    lab.until(f"!!document.querySelector('.petvlm-viewer') && !!{V}.panels.axial.answer && !!{V}.panels.mip.answer && !!{LINE}"); opened = time.perf_counter() - start
    assert 'organ 1' in lab.js(LINE) and 'lesion ' in lab.js(LINE)
    lab.js("document.querySelector('.petvlm-viewer').scrollIntoView()"); time.sleep(.5)
    took = []
    for k in range(12):                                        # one page up by the wheel, until the picture of that slice is there
        index = lab.js(f"{V}.panels.axial.answer.index"); x, y, w, h = lab.box('.petvlm-canvas', 0)
        took.append(lab.js(f"""new Promise(done => {{ const v = {V}, c = v.panels.axial.canvas, from = performance.now();
            c.dispatchEvent(new WheelEvent('wheel', {{deltaY: -120, cancelable: true}}));
            const look = () => v.panels.axial.answer.index === {index} + 1 ? done(performance.now() - from) : setTimeout(look, 1); look(); }})"""))
    if keep := os.environ.get('PETVLM_SHOTS'): Image.fromarray(lab.picture().astype(np.uint8)).save(keep)
    told = {'open_s': round(opened, 1), 'slice_ms_median': round(statistics.median(took)), 'slice_ms_worst': round(max(took))}
    if where := os.environ.get('PETVLM_TIMES'): Path(where).write_text(json.dumps(told) + '\n')
    assert opened < 60 and statistics.median(took) < 1000, told          # on a busy machine; what is promised (5 s, 100 ms at 300 x 400 x 400) is measured with PETVLM_TIMES on a quiet one

    before = lab.js(f"{V}.store.get('position')"); lab.js(f"{V}.panels.axial.canvas.focus()"); cells = lab.js("document.querySelector('.jp-Notebook').querySelectorAll('.jp-Cell').length")
    lab.key('ArrowDown', 40); lab.key('PageDown', 34); lab.key('Home', 36)
    assert lab.js("document.querySelector('.jp-Notebook').querySelectorAll('.jp-Cell').length") == cells and before != lab.js(f"{V}.setup.start") and np.allclose(lab.js(f"{V}.store.get('position')"), lab.js(f"{V}.setup.start"), atol=1e-3)

    time.sleep(.3)                                             # the hand rests: the browser's last move is told to Python, then Python moves
    assert np.allclose(json.loads(python(lab, 'print(list(v.position))')), lab.js(f"{V}.setup.start"), atol=1e-3)
    assert python(lab, 'v.position = [-60, 0, 120]; v.suv_window = (0, 15)') == ''
    lab.until(f"{LINE}.includes('R 60.0') && {LINE}.includes('H 120.0 mm')")
    assert lab.js(f"{V}.store.get('suv_window')") == [0, 15] and lab.js("document.querySelector('select[aria-label=\"SUVbw window\"]').value") == '0 to 15'
    letters = lab.js(f"['axial', 'coronal', 'sagittal'].map(n => {V}.sides(n).join(''))")
    assert letters == ['RLAP', 'RLHF', 'APHF'] and 'right, ' in lab.js(LINE)
    outside = lab.js("performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('http://127.0.0.1') && !n.startsWith('data:') && !n.startsWith('blob:'))")
    assert outside == []
