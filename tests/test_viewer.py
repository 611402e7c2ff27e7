"""The study page: nothing foreign runs in it, nothing is fetched, nobody is named, and what was refused says why."""
import re, tarfile
from html.parser import HTMLParser
from pathlib import Path
import numpy as np
import pydicom
import pytest
from petvlm.dicom import Pair, SeriesInfo, SeriesList, find_series, pair_pet_ct
from petvlm.figures import FigureError, fused, mip, slices, straight
from petvlm.lesions import candidates
from petvlm.viewer import TRAIN, WARNING, places, read_pair, study_page
from petvlm.volume import Volume

ARCHIVE = Path(__file__).resolve().parents[2]/'shared'/'data'/'petct'/'acrin_nsclc_042.tar.xz'
EVIL = '<script>alert("x")</script>'


def series(modality, description, **tags):
    ds = pydicom.Dataset()
    ds.update({'PatientName': 'Nguyen^Van Binh', 'PatientID': 'HN-0042', **tags})
    return SeriesInfo('1.2.3.4567', modality, description, '1', '1', (Path('binh_1.dcm'), Path('binh_2.dcm')), (ds, ds))


def volumes():
    "A box of a body, hot on the patient's left."
    affine = np.array([[0, 0, 10, -155], [0, 10, 0, -115], [10, 0, 0, 0], [0, 0, 0, 1.]])
    ct, pet = np.full((24, 24, 32), -1000.), np.zeros((24, 24, 32))
    ct[:, 4:20, 4:28], pet[:, 4:20, 4:28] = 40, 1
    pet[10:13, 10:13, 22:25] = 9
    return Volume(pet, affine, 'SUVbw'), Volume(ct, affine, 'HU')


def page(draft=None, refused=(), used='PET AC', ct=True):
    pet, body = volumes()
    main = series('PT', used)
    found = SeriesList([main, *[s for s, _ in refused]])
    return study_page(found, Pair(main, None, tuple(refused)), pet, body if ct else None, candidates(pet), draft)


class Tags(HTMLParser):
    "Every element and every attribute of a page."
    def __init__(self, html):
        super().__init__(); self.tags, self.attrs = [], []
        self.feed(html)
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag); self.attrs += [(tag, *a) for a in attrs]


def test_the_page_fetches_nothing():
    html = page({'chest': 'see http://example.com'})
    parsed = Tags(html)
    assert not {'script', 'link', 'iframe', 'object', 'base'} & set(parsed.tags)
    addresses = [v for _, name, v in parsed.attrs if name in ('src', 'href', 'srcset', 'action', 'data', 'poster', 'background')]
    assert addresses and all(v.startswith('data:image/png;base64,') for v in addresses)
    assert not re.search(r'@import|url\(', html) and any(v.startswith("default-src 'none'") for _, name, v in parsed.attrs if name == 'content')


def test_foreign_text_stays_text():
    html = page({'chest': EVIL, EVIL: 'x'}, [(series('PT', EVIL), EVIL)], used=f'a"b\'{EVIL}')
    assert '<script' not in html and html.count('&lt;script&gt;') >= 5
    assert 'script' not in Tags(html).tags


def test_a_refused_series_is_listed_with_its_reason():
    html = page(refused=[(series('PT', 'PET NAC'), 'Units (0054,1001) is PROPCNTS')])
    row = next(r for r in re.findall(r'<tr>.*?</tr>', html, re.S) if 'PET NAC' in r)
    assert 'refused' in row and 'PROPCNTS' in row


def test_nobody_is_named():
    html = page(refused=[(series('PT', 'NAC NGUYEN binh PET_NGUYEN_AC HN-0042_WB'), 'binh_2.dcm of HN-0042 in 1.2.3.4567 is broken')])
    for secret in ('nguyen', 'binh', 'hn-0042', '1.2.3.4567', '.dcm'): assert secret not in html.lower()


@pytest.mark.parametrize('draft, said', [(None, 'needs a usable PET and a CT'), ({}, TRAIN), ({'chest': 'Nốt phổi trái.'}, WARNING)])
def test_the_draft_says_what_it_is(draft, said): assert said in page(draft)


def test_without_a_ct_and_without_a_pet_there_is_still_a_page():
    assert 'nothing to fuse' in page(ct=False)
    refused = series('PT', 'PET NAC')
    html = study_page(SeriesList([refused]), Pair(None, None, ((refused, 'PROPCNTS'),)), None, None)
    assert 'No usable PET' in html and 'PROPCNTS' in html


def test_left_of_the_patient_is_right_in_the_picture():
    pet, ct = volumes()
    focus = candidates(pet)[0]
    assert 'left' in places([focus.center_mm], ct)[0]
    for fig in (mip(pet), slices(pet, at=[11]), fused(pet, ct, 11)):
        ax = fig.axes[0]
        x, _ = ax.transAxes.inverted().transform(ax.transData.transform((focus.center_mm[0], 0)))
        assert x > .6 and {t.get_text() for t in ax.texts} >= {'R', 'L'}
        assert next(t for t in ax.texts if t.get_text() == 'R').get_position()[0] < .5
        image = ax.images[-1]
        row, col = np.unravel_index(image.get_array().argmax(), image.get_array().shape)
        assert col > image.get_array().shape[1]/2 and image.get_extent()[0] < image.get_extent()[1]


def test_head_up_and_front_up():
    pet, _ = volumes()
    coronal, axial = mip(pet).axes[0], slices(pet, at=[11]).axes[0]
    assert np.diff(coronal.get_ylim())[0] > 0 and np.diff(axial.get_ylim())[0] < 0     # z grows upwards; y (to the back) downwards
    assert (coronal.images[0].origin, axial.images[0].origin) == ('lower', 'upper')


def test_a_volume_that_is_not_canonical_is_refused_and_straight_mends_it():
    pet, _ = volumes()
    flipped = Volume(pet.data[:, :, ::-1], pet.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 31], [0, 0, 0, 1.]]), 'SUVbw')
    with pytest.raises(FigureError, match='straight'): mip(flipped)
    assert np.array_equal(straight(flipped).data, pet.data) and np.allclose(straight(flipped).affine, pet.affine)


@pytest.mark.skipif(not ARCHIVE.exists(), reason=f'real study {ARCHIVE} is absent')
def test_the_real_study(tmp_path):
    with tarfile.open(ARCHIVE) as tar: tar.extractall(tmp_path, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))     # Python 3.11.2 has no filters yet
    found = find_series(tmp_path)
    pair = pair_pet_ct(found)
    study = read_pair(pair)
    pet, ct = study.volumes['pet'], study.volumes['ct']
    lesions = candidates(pet)
    html = study_page(found, pair, pet, ct, lesions, {})
    assert abs(lesions[0].suvmax/51.0933 - 1) < 1e-3 and '51.09' in html and 'PROPCNTS' in html
    assert html.count('data:image/png') == 11 and str(tmp_path) not in html
    assert all(str(pair.pet.headers[0].get(k)) not in html for k in ('PatientID', 'PatientName', 'StudyInstanceUID', 'SeriesInstanceUID'))
    assert places([lesions[1].center_mm], ct)[0].startswith('chest, right')

def test_the_page_leads_to_the_viewer_beside_it_and_nowhere_else():
    refused = series('PT', 'PET NAC')
    html = study_page(SeriesList([refused]), Pair(None, None, ((refused, 'PROPCNTS'),)), None, None, viewer='viewer-0a.html')
    assert [v for _, name, v in Tags(html).attrs if name == 'href'] == ['viewer-0a.html']
