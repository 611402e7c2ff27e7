"Published data sets in their documented layouts, with invented contents."
import json
from pathlib import Path
import h5py, numpy as np, pytest
from petvlm.layouts import M3DVQA_COLUMNS, PETAR_ARRAYS, autopet_h5_items, autopet_items, iu_rows, m3d_items, m3dvqa_image, m3dvqa_rows, petar_items, vimed_items, vimed_split
from petvlm.m3dvqa import closed_answer, closed_prompt, m3d_questions
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

# ---- M3D-VQA ----

HEAD = ','.join(M3DVQA_COLUMNS)

def vqa_csv(folder, *rows, head=HEAD):
    path = folder/'M3D_VQA_test.csv'
    path.write_text('\n'.join((head, *rows)) + '\n', encoding='utf-8')
    return path

def test_m3d_vqa_rows_are_questions_like_the_phantoms(tmp_path):
    rows = m3dvqa_rows(vqa_csv(tmp_path, 'ct/000/1.npy,ct/000/1.txt,1,"In which plane, if any, is the image?",Coronal,Axial,Sagittal,Oblique,Axial,B', 'ct/000/1.npy,ct/000/1.txt,5,Where is it?,Left,Right,Both,Unclear,Unclear,D'))
    assert [r['category'] for r in rows] == ['Plane', 'Location'] and closed_answer(rows[1]) == 'D. Unclear'
    assert closed_prompt(rows[0]) == 'In which plane, if any, is the image? Choices: A. Coronal B. Axial C. Sagittal D. Oblique'
    assert set(rows[0]) - {'image', 'text'} == set(m3d_questions((), 'chest', 'axial', 'delayed')[0])

def test_an_answer_that_is_not_its_choice_is_kept_and_counted(tmp_path, caplog):
    rows = m3dvqa_rows(vqa_csv(tmp_path, 'a.npy,a.txt,3,Which organ?,Liver,Lung,Colon,Rib,lung.,B', 'a.npy,a.txt,3,Which organ now?,Liver,Lung,Colon,Rib,Spleen,B'))
    assert closed_answer(rows[1]) == 'B. Spleen' and 'in 1 of 2 rows' in caplog.text and "'Which organ now?'" in caplog.text

@pytest.mark.parametrize('row,words', [('a.npy,a.txt,6,Q?,a,b,c,d,a,A', "line 2 has the question type '6', expected 1 to 5"), ('a.npy,a.txt,1,Q?,a,b,c,d,a,E', "line 2 has the answer choice 'E', expected one of"),
                                       ('a.npy,a.txt,1,Q?,a,b,,d,a,A', r"line 2 has nothing under \['Choice C'\]"), ('a.npy,a.txt,1,Q?', 'line 2 has nothing under')])
def test_m3d_vqa_rows_that_cannot_be_are_refused_by_line(tmp_path, row, words):
    with pytest.raises(SourceError, match=words) as e: m3dvqa_rows(vqa_csv(tmp_path, row))
    assert 'M3D_VQA_test.csv' in str(e.value)

def test_m3d_vqa_files_that_are_others(tmp_path):
    with pytest.raises(SourceError, match='no such file'): m3dvqa_rows(tmp_path/'none.csv')
    with pytest.raises(SourceError, match='holds no rows'): m3dvqa_rows(vqa_csv(tmp_path))
    with pytest.raises(SourceError, match=r"lacks the columns \['Choice A'.*separate with commas"): m3dvqa_rows(vqa_csv(tmp_path, 'a', head='Image Path,Text,Question Type,Question,Answer'))
    with pytest.raises(SourceError, match='separate with commas'): m3dvqa_rows(vqa_csv(tmp_path, 'a', head=HEAD.replace(',', ';')))
    (tmp_path/'latin.csv').write_bytes((HEAD + '\na.npy,a.txt,1,Où?,a,b,c,d,a,A\n').encode('latin-1'))
    with pytest.raises(SourceError, match='not UTF-8'): m3dvqa_rows(tmp_path/'latin.csv')

def test_images_are_found_after_the_renaming_of_npy_to_nifti_and_before(tmp_path):
    write_nifti(volume('1', .25), tmp_path/'a.nii.gz'); np.save(tmp_path/'b.npy', np.full((1, 4, 6, 8), .5, np.float32))
    assert float(m3dvqa_image(tmp_path, {'image': 'a.npy'}).data.max()) == .25 and float(m3dvqa_image(tmp_path, {'image': 'b.nii.gz'}).data.max()) == .5
    for n in 'ab': (tmp_path/f'{n}.txt').write_text('Report.')
    (tmp_path/'M3D_Cap.json').write_text(json.dumps({'train': [{'image': 'a.npy', 'text': 'a.txt'}, {'image': 'b.nii.gz', 'text': 'b.txt'}]}))      # the JSON that nobody renamed
    assert [float(load().volumes['ct'].data.max()) for _, load in m3d_items(tmp_path/'M3D_Cap.json')] == [.25, .5]
    with pytest.raises(SourceError, match=r'c\.npy: neither this nor c\.nii\.gz is there'): m3dvqa_image(tmp_path, {'image': 'c.npy'})
    with pytest.raises(SourceError, match='leads out'): m3dvqa_image(tmp_path, {'image': '../c.npy'})

# ---- AutoPET as HDF5 ----
PETCT = np.zeros((8, 6, 4), np.float64); PETCT[6, 1, 3] = 7.5        # x to the left, y to the front, z to the head

def a_study(**changed): return {'suv': PETCT, 'ctres': PETCT*100 - 1000, 'ct': np.zeros((16, 12, 4)), 'pet': PETCT*1e4, 'seg': (PETCT > 0).astype(float)} | changed

def write_h5(path, contents: dict):
    "`patient -> study -> arrays`, or a patient that is an array, as h5py writes them."
    with h5py.File(path, 'w') as f:
        for patient, studies in contents.items():
            if isinstance(studies, np.ndarray): f[patient] = studies
            else:
                for study, arrays in studies.items():
                    for k, v in arrays.items(): f.create_dataset(f'{patient}/{study}/{k}', data=v, compression='gzip')

def check_h5(path):
    (split, load), = autopet_h5_items(path, spacing=(2., 2.5, 3.), split=lambda patient: 'test' if patient == 'PETCT_01' else 'train')
    study = load()
    assert split == 'test' and study.id == 'PETCT_01/study-1' and {k: (v.unit, v.shape) for k, v in study.volumes.items()} == {'pet': ('SUVbw', (4, 6, 8)), 'ct': ('HU', (4, 6, 8)), 'lesions': ('label', (4, 6, 8))}
    assert study.volumes['pet'].spacing == (3., 2.5, 2.)
    assert study.volumes['pet'].data[3, 4, 6] == 7.5 and study.volumes['ct'].data[3, 4, 6] == -250 and study.volumes['lesions'].data.sum() == 1      # near the head, at the back, on the left

def test_autopet_hdf5_studies_are_canonical(tmp_path):
    write_h5(tmp_path/'a.hdf5', {'PETCT_01': {'study-1': a_study()}})
    check_h5(tmp_path/'a.hdf5')
    (_, load), = autopet_h5_items(tmp_path/'a.hdf5', (2., 2.5, 3.), orientation='RAS')
    assert load().volumes['pet'].data[3, 4, 1] == 7.5

@pytest.mark.parametrize('contents,words', [({}, 'no groups patient/study'), ({'PETCT_01': PETCT}, 'no groups patient/study'), ({'PETCT_01': {'study-1': {'suv': PETCT, 'ct': PETCT}}}, r"PETCT_01/study-1 lacks \['ctres'\], expected suv"),
                                            ({'PETCT_01': {'study-1': a_study(ctres=np.zeros((16, 12, 4)))}}, "expected one"), (None, 'not an HDF5 file')])
def test_autopet_hdf5_in_another_layout(tmp_path, contents, words):
    (tmp_path/'a.hdf5').write_bytes(b'not HDF5') if contents is None else write_h5(tmp_path/'a.hdf5', contents)
    with pytest.raises(SourceError, match=words) as e: [load() for _, load in autopet_h5_items(tmp_path/'a.hdf5', (2, 2, 3))]
    assert 'a.hdf5' in str(e.value)

def test_autopet_hdf5_wants_what_the_file_does_not_hold(tmp_path):
    with pytest.raises(SourceError, match='no such file; tcia2hdf5.py'): autopet_h5_items(tmp_path/'none.hdf5', (2, 2, 3))
    with pytest.raises(SourceError, match='expected three voxel sizes'): autopet_h5_items(tmp_path/'a.hdf5', (2, 0, 3))
    with pytest.raises(SourceError, match="found 'LAL', expected three letters"): autopet_h5_items(tmp_path/'a.hdf5', (2, 2, 3), orientation='LAL')
