"""`explained(study, record)` in a real JupyterLab: words chosen in the browser reach Python and the other way round, maps come from the kernel. Slow; skipped where no Chromium is installed."""
import json, os, time
import numpy as np
import pytest
from PIL import Image
from browser import CHROMIUM
try: from browser import jupyterlab
except ImportError: pytest.skip('tests/browser.py has no jupyterlab yet', allow_module_level=True)
from petvlm.attentionrecord import ideal_record, sentences, shares
from petvlm.phantom import draw, sample_patient
from test_lab import python

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed (apt-get install chromium, or PETVLM_CHROMIUM=path)')]
CELLS = ["from petvlm.attentionrecord import ideal_record\nfrom petvlm.explain import explained\nfrom petvlm.phantom import draw, sample_patient\nstudy = draw(sample_patient(11), (8., 8., 8.), reports=True); record, blind = ideal_record(study), ideal_record(study, gaze=0)", "w = explained(study, record, blind); w"]
A, B = (f"document.querySelectorAll('.petvlm-viewer')[{k}].petvlm" for k in range(2))


def test_explaining_in_lab(tmp_path):
    record = ideal_record(draw(sample_patient(11), (8., 8., 8.), reports=True)); s = next(s for s in sentences(record) if s.findings and not s.impression); inside = shares(record, s.span).inside
    with jupyterlab(CELLS, tmp_path, size=(1500, 1500)) as lab:
        lab.js("void jupyterapp.commands.execute('notebook:run-all-cells')"); lab.until(f"document.querySelectorAll('.petvlm-viewer').length === 2 && !!{B}?.found && !!{A}.found && !!{A}.panels.axial.answer && !!{B}.panels.axial.answer")
        start = time.perf_counter(); lab.js(f"{A}.sentences.find(x => x.span[0] === {s.span[0]}).e.click()"); lab.until(f"{A}.found.tokens === {shares(record, s.span).tokens} && {B}.found.tokens === {A}.found.tokens"); took = time.perf_counter() - start
        assert abs((lab.js(f"{A}.found.inside") or 0) - (inside or 0)) < 1e-6 and lab.js(f"{A}.store.get('other_selected')") == list(s.span) and took < 3
        lab.js(f"{A}.root.scrollIntoView()"); time.sleep(.5)
        if keep := os.environ.get('PETVLM_EXPLAIN_SHOTS'): Image.fromarray(lab.picture().astype(np.uint8)).save(f'{keep}/lab.png')
        assert json.loads(python(lab, 'print(w.selected)')) == list(s.span)
        word = record.text[slice(*s.words[0])]; assert python(lab, f"w.selected = {list(s.words[0])}; w.head = 1") == ''
        lab.until(f"{A}.found.tokens === 1 && document.querySelectorAll('select[aria-label=\"head\"]')[0].value === '1'"); assert lab.js(f"[...{A}.box.querySelectorAll('.petvlm-word.petvlm-chosen')].map(e => e.textContent).join()") == word
        assert 'TraitError' in python(lab, 'try: w.selected = [0, 1]\nexcept Exception as e: print(type(e).__name__)')
        outside = lab.js("performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('http://127.0.0.1') && !n.startsWith('data:') && !n.startsWith('blob:'))"); assert outside == []
