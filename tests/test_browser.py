"""The exported page in a real browser, from disk and with the network off: what is drawn is where the patient has it, and hands move it. Skipped where no Chromium is installed."""
import os
import numpy as np
import pytest
from PIL import Image
from browser import CHROMIUM, Page
from petvlm.offline import export_html
from test_widget import EVIL, study

SPOT = (40., -20., 400.)       # the hot node: left of the middle, in front of it, in the upper half
LINE, NOTE = "document.querySelectorAll('.petvlm-line')[0].textContent", "document.querySelectorAll('.petvlm-line')[1].textContent"
AXIAL, CORONAL, SAGITTAL, MIP = range(4)

pytestmark = pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed (apt-get install chromium, or PETVLM_CHROMIUM=path)')


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    room = tmp_path_factory.mktemp('browser')
    with Page(export_html(study(), room/'page.html', title=EVIL, organs={5: EVIL}, reports=True, position=SPOT).as_uri(), room) as p:
        p.until("(document.petvlm = document.querySelector('.petvlm-viewer')?.petvlm) && !!document.petvlm.panels.mip.answer"); p.until(LINE); yield p

@pytest.fixture
def fresh(page):
    "The page as it opened."
    page.js(f"Object.entries({{position: {list(SPOT)}, angle: 0, suv_window: [0, 7], opacity: .6, pet_map: 'hot', outlines: ['lesions']}}).forEach(([k, v]) => document.petvlm.store.set(k, v))")
    page.js("document.petvlm.zoom = 1; document.petvlm.tool = 'crosshair'; document.petvlm.ruler = document.petvlm.ball = null; document.petvlm.layout()")
    page.until(f"{LINE}.includes('L 40.0  A 20.0  H 400.0 mm') && document.petvlm.panels.axial.answer.index === 20 && document.petvlm.panels.mip.answer.angle === 0")
    return page

def spot(page, plane, xyz):
    "Where a place (LPS mm) lies on the screen."
    name = ('axial', 'coronal', 'sagittal', 'mip')[plane]; x, y, *_ = page.box('.petvlm-canvas', plane)
    at = page.js(f"(() => {{ const v = document.petvlm, [r, c] = v.spot('{name}', {list(xyz)}), f = v.fit('{name}'); return [f.ox + (c + .5)*f.kx, f.oy + (r + .5)*f.ky]; }})()")
    return x + at[0], y + at[1]

def position(page): return np.array(page.js("document.petvlm.store.get('position')"))


def test_it_reads_the_point_and_runs_nothing_foreign(fresh):
    line, text = fresh.js(LINE), fresh.js('document.body.innerText')
    assert line.startswith('HU about 40   |   SUVbw about 8.0') and 'left, 40 mm from the midline   |   1: left lung nodule' in line
    assert 'SUVbw (g/ml), slices: 0' in text and '1: left lung nodule: SUVmax 8.00' in text and f'A node. {EVIL}' in text
    assert fresh.js("document.querySelectorAll('img').length") == 0 and fresh.js("performance.getEntriesByType('resource').length") == 0

def test_the_node_is_drawn_where_the_patient_has_it(fresh):
    "Outline pixels (cyan): on the right of the axial and coronal picture (the patient's left), left of the middle on the sagittal one (in front), above the middle (front, head, head)."
    picture = fresh.picture(); r, g, b = np.moveaxis(picture, -1, 0); cyan = (r < 60) & (g > 210) & (b > 230)
    if keep := os.environ.get('PETVLM_SHOTS'): Image.fromarray(picture.astype(np.uint8)).save(keep)
    for plane in (AXIAL, CORONAL, SAGITTAL):
        x, y, w, h = (int(round(v)) for v in fresh.box('.petvlm-canvas', plane)); rows, cols = np.nonzero(cyan[y:y + h, x:x + w])
        assert len(rows) > 8 and rows.mean() < h/2 - 5 and (cols.mean() < w/2 - 5 if plane == SAGITTAL else cols.mean() > w/2 + 10), plane

def test_a_click_moves_the_crosshair_to_the_place_under_it(fresh):
    fresh.click(*spot(fresh, AXIAL, (-40, 0, 400))); fresh.until(f"{LINE}.includes('right, ')")
    assert abs(position(fresh) - (-40, 0, 400)).max() < 1.5
    fresh.click(*spot(fresh, CORONAL, (-40, 0, 340))); fresh.until(f"/SUVbw about (2.9|3.0)/.test({LINE})")
    assert abs(position(fresh) - (-40, 0, 340)).max() < 2.5 and EVIL in fresh.js(LINE)

def test_wheel_and_keys_turn_pages(fresh):
    x, y = spot(fresh, AXIAL, SPOT)
    fresh.mouse('mouseWheel', x, y, deltaX=0, deltaY=-120); fresh.until('document.petvlm.panels.axial.answer.index === 21')
    fresh.js("document.querySelectorAll('.petvlm-canvas')[0].focus()"); fresh.key('PageDown', 34); fresh.until('document.petvlm.panels.axial.answer.index === 20')
    before = position(fresh); fresh.key('ArrowRight', 39); fresh.key('ArrowUp', 38)
    assert np.allclose(position(fresh) - before, (4, -4, 0), atol=2.1) and (position(fresh) - before)[0] > 0 > (position(fresh) - before)[1]

def test_the_projection_turns_and_finds_the_focus(fresh):
    x, y = spot(fresh, MIP, (0, 0, 350)); fresh.drag((x, y), (x - 40, y), (x - 108, y)); fresh.until('document.petvlm.panels.mip.answer.angle === 90')
    assert fresh.js("document.petvlm.panels.mip.answer.sides").count('A') == 1 and fresh.js("document.petvlm.panels.mip.answer.sides")[:2] == ['A', 'P']
    fresh.js("document.petvlm.store.set('position', [0, 0, 320])"); fresh.click(*spot(fresh, MIP, SPOT)); fresh.until(f"{LINE}.includes('1: left lung nodule')")
    assert np.linalg.norm(position(fresh) - SPOT) < 14 and position(fresh)[0] > 25

def test_windows_maps_and_opacity(fresh):
    x, y = map(int, spot(fresh, CORONAL, (-40, -20, 340))); warm = fresh.picture()[y, x]
    menu = "document.querySelector('select[aria-label=\"SUVbw window\"]')"
    fresh.js(f"{menu}.value = '0 to 15'; {menu}.dispatchEvent(new Event('change'))")
    assert fresh.js("document.petvlm.store.get('suv_window')") == [0, 15] and fresh.picture()[y, x].sum() < warm.sum() and '15' in fresh.js("document.querySelector('.petvlm-bars').innerText")
    fresh.js("document.petvlm.store.set('pet_map', 'inverted grey'); document.petvlm.store.set('opacity', 1)")
    grey = fresh.picture()[y, x]; assert np.ptp(grey) <= 2 and abs(grey[0] - 255*(1 - 3/15)) < 12

def test_distance_and_sphere(fresh):
    fresh.js("document.petvlm.tool = 'distance'"); fresh.drag(spot(fresh, AXIAL, (-40, 0, 400)), spot(fresh, AXIAL, (0, 0, 400)), spot(fresh, AXIAL, (40, 30, 400)))
    assert abs(float(fresh.js(NOTE).split()[1]) - np.hypot(80, 30)) < 3
    fresh.js("document.petvlm.tool = 'sphere'"); fresh.click(*spot(fresh, AXIAL, SPOT)); fresh.until(f"{NOTE}.startsWith('sphere of 10 mm')")
    assert 'SUVmax 8.00' in fresh.js(NOTE) and 'SUVbw' in fresh.js(NOTE)

def test_a_lesion_of_the_list_is_gone_to(fresh):
    fresh.js("document.petvlm.store.set('position', [-40, 0, 340])"); fresh.until(f"!{LINE}.includes('nodule')")
    x, y, w, h = fresh.box('.petvlm-list button'); fresh.click(x + w/2, y + h/2); fresh.until(f"{LINE}.includes('1: left lung nodule')")

def test_enlarging_keeps_the_crosshair_and_the_scale(fresh):
    x, y, w, h = fresh.box('.petvlm-canvas', AXIAL); fresh.js("document.querySelectorAll('.petvlm-canvas')[0].focus()")
    for _ in range(4): fresh.key('+', 187)
    assert np.allclose(spot(fresh, AXIAL, SPOT), (x + w/2, y + h/2), atol=2) and fresh.js('document.petvlm.zoom') > 2
    fresh.click(*spot(fresh, AXIAL, (60, -10, 400))); assert abs(position(fresh) - (60, -10, 400)).max() < 1.5
