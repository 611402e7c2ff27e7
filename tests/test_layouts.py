"Published data sets in their documented layouts, with invented contents."
import json
import numpy as np, pytest
from petvlm.layouts import PETAR_ARRAYS, autopet_items, iu_rows, m3d_items, petar_items, vimed_items, vimed_split
from petvlm.sources import SourceError
from petvlm.volume import Volume, write_nifti

def volume(unit, value=0.):
    affine = np.zeros((4, 4)); affine[3, 3] = 1; affine[[2, 1, 0], [0, 1, 2]] = (3, 2, 2)
    return Volume(np.full((4, 6, 8), value, np.uint8 if unit == 'label' else np.float32), affine, unit)

def test_autopet_studies_keep_suv_geometry_and_lesions(tmp_path):
    at = tmp_path/'PETCT_01/study-1'; at.mkdir(parents=True)
    for name, v in {'SUV': volume('SUVbw', 2.5), 'CTres': volume('HU', -1000), 'CT': volume('HU', 7), 'SEG': volume('label', 1)}.items(): write_nifti(v, at/f'{name}.nii.gz')
    (split, load), = autopet_items(tmp_path, split=lambda patient: 'test' if patient == 'PETCT_01' else 'train')
    study = load()
    assert split == 'test' and study.id == 'PETCT_01/study-1' and {k: v.unit for k, v in study.volumes.items()} == {'pet': 'SUVbw', 'ct': 'HU', 'lesions': 'label'}
    assert study.volumes['pet'].data.max() == 2.5 and study.volumes['ct'].data.max() == -1000 and np.allclose(study.volumes['pet'].spacing, (3, 2, 2))

def test_petar_lesions_are_six_arrays_and_a_text(tmp_path):
    (tmp_path/'p000003_02_1').mkdir()
    entry = {k: f'p000003_02_1/{k}.npy' for k in PETAR_ARRAYS} | {'text': 'Region: Chest Anatomy: ...'}
    for k in PETAR_ARRAYS: np.save(tmp_path/entry[k], np.ones((1, 4, 6, 6), np.float32))
    (tmp_path/'data.json').write_text(json.dumps({'train': [], 'test': [entry]}))
    (split, load), = petar_items(tmp_path/'data.json')
    study = load()
    assert split == 'test' and study.id == 'p000003_02_1' and study.volumes['mask_focal'].unit == 'label' and study.volumes['pet'].shape == (4, 6, 6)
    assert study.reports == {'lesion': {'en': 'Region: Chest Anatomy: ...'}}
    (tmp_path/'data.json').write_text(json.dumps({'train': [{k: v for k, v in entry.items() if k != 'mask'}]}))
    with pytest.raises(SourceError, match="lacks \\['mask'\\]"): petar_items(tmp_path/'data.json')

def test_m3d_images_come_as_arrays_or_nifti(tmp_path):
    np.save(tmp_path/'a.npy', np.full((1, 4, 6, 8), .5, np.float32)); write_nifti(volume('1', .25), tmp_path/'b.nii.gz')
    for n in 'ab': (tmp_path/f'{n}.txt').write_text(f'Report {n}.\n')
    (tmp_path/'M3D_Cap.json').write_text(json.dumps({'train': [{'image': 'a.npy', 'text': 'a.txt'}], 'validation': [{'image': 'b.nii.gz', 'text': 'b.txt'}], 'test100': []}))
    studies = {split: load() for split, load in m3d_items(tmp_path/'M3D_Cap.json')}
    assert {s: (float(x.volumes['ct'].data.max()), x.volumes['ct'].unit, x.reports['whole']['en']) for s, x in studies.items()} == {'train': (.5, '1', 'Report a.'), 'validation': (.25, '1', 'Report b.')}

def test_iu_x_ray_in_r2gens_layout(tmp_path):
    path = tmp_path/'annotation.json'
    path.write_text(json.dumps({s: [{'id': f'CXR{i}', 'report': 'Clear lungs.', 'image_path': [f'CXR{i}/0.png', f'CXR{i}/1.png'], 'split': s}] for i, s in enumerate(('train', 'val', 'test'))}))
    assert iu_rows(path)[1] == ('validation', 'CXR1', ('CXR1/0.png', 'CXR1/1.png'), 'Clear lungs.')

def test_the_real_iu_listing_has_the_known_split():
    from pathlib import Path
    from collections import Counter
    path = Path(__file__).parents[2]/'shared/data/reports_cxr/annotation.json'
    if not path.exists(): pytest.skip(f'{path} is not here: it cannot be shipped with the project')
    assert Counter(s for s, *_ in iu_rows(path)) == {'train': 2069, 'validation': 296, 'test': 590}

@pytest.mark.parametrize('year,split', [(2017, 'train'), (2019, 'train'), (2018, 'validation'), (2023, 'validation')])
def test_vimed_months_are_split_as_published(year, split):
    assert vimed_split(year, 10) == split and vimed_split(year, 12) == 'test' and vimed_split(year, 1) == 'train'
    with pytest.raises(SourceError, match='2020'): vimed_split(2020, 1)

def test_vimed_wants_its_year(tmp_path):
    (tmp_path/'x/THANG 3/PET').mkdir(parents=True); np.save(tmp_path/'x/THANG 3/PET/a.npy', np.zeros((2, 2, 2)))
    with pytest.raises(SourceError, match='no year'): vimed_items(tmp_path/'x', (1, 1, 1))
