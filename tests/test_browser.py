"""The exported page in a real browser, from disk and with the network off: what is drawn is where the patient has it. Skipped where no Chromium is installed."""
import os, re, shutil, subprocess
import numpy as np
import pytest
from PIL import Image
from petvlm.offline import export_html
from test_widget import EVIL, study

CHROMIUM = os.environ.get('PETVLM_CHROMIUM') or shutil.which('chromium')
FLAGS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--host-resolver-rules=MAP * ~NOTFOUND', '--hide-scrollbars', '--window-size=1216,1100', '--force-device-scale-factor=1', '--virtual-time-budget=8000']
SPOT = (40., -20., 400.)       # the hot node: left of the middle, in front of it, in the upper half

pytestmark = pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed (apt-get install chromium, or PETVLM_CHROMIUM=path)')


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    "The page's DOM after it has run, and its picture (H, W, 3)."
    room = tmp_path_factory.mktemp('browser'); page = export_html(study(), room/'page.html', title=EVIL, organs={5: EVIL}, reports=True, position=SPOT)
    def run(*more): return subprocess.run([CHROMIUM, *FLAGS, f'--user-data-dir={room/"profile"}', *more, page.as_uri()], capture_output=True, text=True, timeout=110)
    dom = run('--dump-dom'); shot = run(f'--screenshot={room/"page.png"}')
    assert dom.returncode == shot.returncode == 0, dom.stderr[-1500:] + shot.stderr[-1500:]
    keep = os.environ.get('PETVLM_SHOTS')
    if keep: shutil.copy(room/'page.png', keep)
    return dom.stdout, np.asarray(Image.open(room/'page.png').convert('RGB')).astype(int)

def test_the_page_reads_the_point_and_runs_nothing_foreign(seen):
    dom = seen[0]; line = re.search(r'class="petvlm-line" role="status">([^<]*)<', dom)[1]
    assert re.search(r'SUVbw about [78]\.\d', line) and 'L 40.0  A 20.0  H 400.0 mm' in line and 'left, ' in line and '1: left lung nodule' in line
    assert 'SUVbw (g/ml)' in dom and 'cannot be shown' not in dom and EVIL.replace('<', '&lt;').replace('>', '&gt;') in re.search(r'petvlm-report">(.*?)</p>', dom, re.S)[1]
    assert not re.search(r'<img', dom)

def test_the_node_is_drawn_where_the_patient_has_it(seen):
    "Outline pixels (cyan): on the right of the axial and coronal picture (the patient's left), left of the middle on the sagittal one (in front), above the middle (towards the head)."
    picture = seen[1]; r, g, b = np.moveaxis(picture, -1, 0); cyan = (r < 60) & (g > 210) & (b > 230)
    dark = np.flatnonzero((picture[:, 20:600].max(-1) < 40).mean(1) > .5); top = dark[0]
    panels = {'axial': (top, 12, 606), 'coronal': (top, 609, 1203), 'sagittal': (top + 343, 12, 606)}
    for name, (y, x0, x1) in panels.items():
        rows, cols = np.nonzero(cyan[y:y + 340, x0:x1]); assert len(rows) > 8, name
        right, below = cols.mean() - (x1 - x0)/2, rows.mean() - 170
        assert (right < 0) if name == 'sagittal' else (right > 10), (name, right)
        assert below < -5, (name, below)
