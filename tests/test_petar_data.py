"PETAR's items: the published preprocessing number for number, crops that keep their lesion, lines that are read back, views in which left is left."
import hashlib, json, logging, time
from dataclasses import replace
import nibabel as nib, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from petvlm.anatomy import LABEL
from petvlm.config import Data
from petvlm.findings import LESIONS, LANGUAGES, ORGANS, Finding, Study
from petvlm.focal import FocalError, above_head, box_grid, extent, focal_box, focal_cube, petar_preprocess, petar_standard, petar_views, resize, slab
from petvlm.lesiontext import FIELDS, LABELS, OPEN, STRUCTURES, LesionText, insert_measured, lesion_request, organ_request, parse_lesion, structure_name, write_lesion, write_organ
from petvlm.lesionviews import ViewError, lesion_records, measure_lesion, organ_mask, organ_records, vanished
from petvlm.phantom import draw, sample_patient, write_patient
from petvlm.sources import phantom_study
from petvlm.volume import Volume, resample
from petvlm.wording import ReportError
from parity import difference, fixture

SMALL = Data('lesions', 'vi', 0, 3, 0, 1, (24, 32, 32), 10., 8, 12., (-300., 400.))
CASES = {c['name']: c for c in fixture('petar_preprocess')['cases']}

@pytest.fixture(scope='module')
def studies():
    "Thirty drawn patients."
    return [draw(sample_patient(s)) for s in range(30)]

# the published preprocessing

def scan(case: dict) -> dict[str, nib.Nifti1Image]:
    "PET, CT and mask of a fixture by its rule, through a NIfTI file each; asserts their hashes."
    shape, rng = tuple(case['shape']), np.random.Generator(np.random.PCG64(case['seed']))
    ijk = [a.astype(float) for a in np.ogrid[tuple(slice(0, n) for n in shape)]]
    u, w = rng.random(shape, dtype=np.float32).astype(float), rng.integers(-20, 21, size=shape)
    inside = lambda s: sum(((g - c)/r)**2 for g, c, r in zip(ijk, s['c'], s['r'])) <= 1
    body = (sum(((g - (n - 1)/2)/(f*n))**2 for g, n, f in zip(ijk, shape, (.4, .33))) <= 1) & (ijk[2] < case['zbody'])
    pet, ct = np.where(body, .3 + .7*u, 0), np.where(body, 40 + w, -1000)
    for s in case['spheres']:
        if 'pet' in s: pet = np.where(inside(s), s['pet'] + .5*u, pet)
        if 'ct' in s: ct = np.where(inside(s), s['ct'] + w, ct)
    lesion = inside(case['lesion']); pet = np.where(lesion, case['lesion']['suv'] + u, pet)
    data = {'pet': (np.round(pet*64)/64).astype(np.float32), 'ct': ct.astype(np.int16), 'mask': lesion.astype(np.uint8)}
    assert {k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for k, v in data.items()} == case['sha256']
    return {k: nib.Nifti1Image.from_bytes(nib.Nifti1Image(v, np.array(case['affine'], float)).to_bytes()) for k, v in data.items()}

@pytest.mark.parametrize('name', CASES)
def test_preprocessing_equals_the_published_code_stage_by_stage(name):
    case, far = CASES[name], lambda key, x: difference('petar_preprocess', f'{name}.{key}', torch.from_numpy(np.ascontiguousarray(x))).max()
    images = scan(case)
    assert above_head(*(np.asanyarray(images[k].dataobj) for k in ('pet', 'ct'))) == case['crop_offset']
    stored = petar_standard(**images)
    for k, i in stored.items():
        assert list(i.shape) == case['processed_shape'] and np.allclose(i.affine, case['processed_affine'], atol=1e-4)
        assert far(f'{k}_processed', i.get_fdata()) < (1e-4 if k == 'ct' else 1e-6)                # 1e-4 HU is float32's own step at -1000
    wide, close = petar_views(stored)
    assert list(wide['pet'][None].shape) == case['slab_shape'] and list(close['pet'][None].shape) == case['focal_box_shape']
    for k in stored: assert far(f'{k}_slab', wide[k][None]) < 1e-6 and far(f'{k}_focal_box', close[k][None]) < 1e-6
    lo, hi = extent(close['pet'])
    assert far('foreground_start_coord', lo.astype(np.float32)) == 0 == far('foreground_end_coord', hi.astype(np.float32))
    final = petar_preprocess(**images)
    for k, x in final.items(): assert x.dtype == np.float32 and far(k, x) < (1e-6 if 'mask' in k else 1e-5), k

def test_a_volume_goes_through_the_chain_as_its_file_would():
    images = scan(CASES['neg_xy_affine'])
    flip = lambda i: (np.diag([-1., -1., 1., 1.]) @ i.affine)[:, [2, 1, 0, 3]]
    vols = {k: Volume(np.asanyarray(i.dataobj).transpose(2, 1, 0), flip(i), unit) for (k, i), unit in zip(images.items(), ('SUVbw', 'HU', 'label'))}
    a, b = petar_standard(**images), petar_standard(**vols)
    assert all(np.array_equal(a[k].get_fdata(), b[k].get_fdata()) and np.allclose(a[k].affine, b[k].affine) for k in a)

def test_grids_that_differ_and_empty_masks_are_refused():
    images = scan(CASES['neg_xy_affine'])
    with pytest.raises(FocalError, match='share one grid'): petar_standard(images['pet'], images['ct'].slicer[:, :, :50], images['mask'])
    empty = nib.Nifti1Image(np.zeros(images['mask'].shape, np.uint8), images['mask'].affine)
    with pytest.raises(FocalError, match='empty'): petar_preprocess(images['pet'], images['ct'], empty)

@pytest.mark.parametrize('shape', [(5, 40, 13), (32, 20, 64), (7, 9, 11)])
def test_resize_is_torchs_interpolation(shape):
    x = np.random.default_rng(0).normal(size=(17, 23, 31)).astype(np.float32)
    t = lambda mode: torch.nn.functional.interpolate(torch.from_numpy(x)[None, None], size=shape, mode=mode)[0, 0].numpy()
    assert np.abs(resize(x, shape) - t('trilinear')).max() < 2e-5 and np.array_equal(resize(x, shape, 0), t('nearest'))

# crops

@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.floats(.5, 4), st.floats(0, .5), st.tuples(*[st.floats(.5, 6)]*3))
def test_the_jittered_cube_is_a_cube_and_never_cuts_the_mask(seed, context, jitter, spacing):
    rng = np.random.default_rng(seed); mask = np.zeros((30, 28, 26), bool)
    at = [sorted(rng.integers(0, n, 2)) for n in mask.shape]
    mask[tuple(slice(a, b + 1) for a, b in at)] = True
    (lo, hi), (a, b) = extent(mask), focal_cube(mask, jitter, rng, spacing, context)
    side = (b - a)*spacing
    assert np.allclose(side, side[0]) and (a <= lo + 1e-9).all() and (b >= hi - 1e-9).all()
    r, centre = context*((hi - lo)*spacing).max(), ((a + b - lo - hi)/2)*spacing
    assert side[0] <= max((1 + jitter)*r, ((hi - lo)*spacing).max()) + 1e-6 and np.abs(centre).max() <= jitter*r + 1e-6

def test_the_jitter_spreads_over_its_range_and_follows_its_seed():
    mask = np.zeros((60, 60, 60), bool); mask[28:32, 28:32, 28:32] = True
    cubes = np.array([focal_cube(mask, rng=np.random.default_rng(s)) for s in range(400)])
    side, centre = (cubes[:, 1] - cubes[:, 0])[:, 0], cubes.mean(1) - 30
    assert 8 <= side.min() < 8.2 and 11.8 < side.max() <= 12 and -2 <= centre.min() < -1.9 and 1.9 < centre.max() <= 2 and abs(centre.mean()) < .15
    assert np.array_equal(focal_cube(mask, rng=np.random.default_rng(3)), cubes[3]) and np.array_equal(focal_cube(mask), ([25]*3, [35]*3))

def test_box_and_slab_of_the_release():
    mask = np.zeros((300, 50, 60), bool); mask[100:105, 20:24, 2:5] = True
    assert [v.tolist() for v in focal_box(mask)] == [[80, 0, 0], [125, 44, 25]] and slab(mask) == (22, 183)
    drawn = np.array([slab(mask, 80, 15, np.random.default_rng(s)) for s in range(300)])
    below, above = 102 - drawn[:, 0], drawn[:, 1] - 103
    assert below.min() == above.min() == 65 and below.max() == above.max() == 95 and len(np.unique(below - above)) > 20
    for f in (extent, focal_box, slab, focal_cube):
        with pytest.raises(FocalError, match='empty'): f(np.zeros((4, 4, 4)))

def test_a_box_keeps_its_place():
    rng, affine = np.random.default_rng(0), np.array([[0, 0, 4, -40], [0, 4, 0, -30], [5, 0, 0, -500], [0, 0, 0, 1.]])
    vol = Volume(rng.normal(size=(20, 24, 28)), affine, 'SUVbw')
    assert np.array_equal(resample(vol, like=box_grid(vol, (3, 4, 5), (13, 14, 15), (10, 10, 10))).data, vol.data[3:13, 4:14, 5:15])

# text

def as_written(f: Finding) -> Finding: return replace(f, size_mm=f.size_mm and float(round(f.size_mm)), suvmax=f.suvmax and round(f.suvmax, 1), center_mm=None, span=None)

@pytest.mark.parametrize('language', LANGUAGES)
def test_every_finding_of_thirty_patients_is_read_back_exactly(studies, language):
    findings = [f for s in studies for f in s.findings]
    assert len(findings) > 100
    for k, f in enumerate(findings):
        read = parse_lesion(write_lesion(f, language, k), language)
        assert read.finding == as_written(f) and read.region == f.region and set(read.missing) == {n for n in ('suvmax', 'size_mm') if getattr(f, n) is None}

@pytest.mark.parametrize('language', LANGUAGES)
def test_every_organ_kind_and_uptake_is_read_back(language):
    for organ, o in ORGANS.items():
        for side in (('left', 'right', '') if o.sided else ('',)):
            kinds = {k for x, k, _ in LESIONS if x == organ} or {'mass', 'node', 'uptake'}
            for f in (Finding(organ, side, k, 12., 3.4, u, 7) for k in kinds for u in ('increased', 'none', 'unknown')):
                for seed in range(5): assert parse_lesion(write_lesion(f, language, seed), language).finding == f, write_lesion(f, language, seed)

@pytest.mark.parametrize('language', LANGUAGES)
def test_order_case_and_missing_fields_do_not_matter(language):
    f = Finding('hilar_node', 'right', 'node', 22., 7.4, 'increased', 101)
    parts = [f'{LABELS[language][k]}: {v}' for k, v in zip(FIELDS, [p.split(': ', 1)[1] for p in write_lesion(f, language, 3).rstrip('.').split('. ')])]
    rng = np.random.default_rng(0)
    for _ in range(30):
        order = rng.permutation(6); keep = order[:int(rng.integers(1, 7))]
        text = '\n'.join(parts[i] for i in keep); text = text.upper() if rng.random() < .5 else text.lower()
        read, there = parse_lesion(text, language), {FIELDS[i] for i in keep}
        want = LesionText(region='chest' if 'region' in there else None, suvmax=7.4 if 'suvmax' in there else None, size_mm=22. if 'size' in there else None, slice=101 if 'slice' in there else None,
                          **(dict(organ='hilar_node', side='right') if 'anatomy' in there else {}), **(dict(kind='node', uptake='increased') if 'finding' in there else {}))
        assert read == want
        assert (read.finding is None) == (not {'anatomy', 'finding'} <= there)

def test_numbers_as_models_write_them():
    read = lambda t: parse_lesion(t, 'en')
    assert read('Size: 1.4 x 2.6 cm').size_mm == 26 and read('Size: 14').size_mm == 14 and read('SUVmax=12,5').suvmax == 12.5 and read('slice: 7').slice == 7
    assert read('SUV Max: 1.2.3. Axial Slice: 7.5. Size: very large').missing == tuple(LesionText().__dataclass_fields__)
    assert read('SUV Max: n/a. SUV Max: 4.0.').suvmax == 4 and read('SUV Max: ' + '9'*5000).suvmax is None
    assert read('Anatomy: left and right lung').side is None and read('Anatomy: liver').side == ''

SCRAPS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(['Region:', 'Anatomy:', 'finding :', 'SUV Max:', 'SIZE =', 'Axial Slice:', 'Vùng:', 'Giải phẫu:', 'Tổn thương:', 'Kích thước:', 'Lát cắt:', 'left', 'phổi trái', 'lung', 'node', 'nốt',
                          'không tăng bắt FDG', 'FDG-avid', '6.1', '1,2', '²', '٣', '999999999', 'x', 'mm', 'cm', 'İ', 'ﬁ', '\x00', '\n'])), max_size=25).map(' '.join)

@settings(max_examples=400, deadline=None)
@given(SCRAPS, st.sampled_from(LANGUAGES), st.booleans())
def test_garbage_never_raises_and_what_is_measured_wins(text, language, fill):
    read = parse_lesion(text, language)
    assert read.finding is None or isinstance(read.finding, Finding)
    m = {'suvmax': 3.3, 'size_mm': 41., 'slice': 17}
    again = parse_lesion(insert_measured(text, m, language, fill), language)
    for k, v in m.items():
        assert getattr(again, k) == (v if fill or getattr(read, k) is not None else None)

def test_measured_numbers_replace_only_numbers_unless_told_to_fill():
    for lang in LANGUAGES:
        f = Finding('rib', 'left', 'uptake', None, 8.2, 'increased', 99); text = write_lesion(f, lang, 2)
        new = insert_measured(text, {'suvmax': 5.04, 'size_mm': 17.6, 'slice': 98}, lang)
        assert parse_lesion(new, lang).finding == replace(f, suvmax=5., slice=98) and OPEN[lang] in new
        assert parse_lesion(insert_measured(text, {'size_mm': 17.6}, lang, fill=True), lang).finding == replace(f, size_mm=18.)
        assert insert_measured(text, {'suvmax': None}, lang, True) == text == insert_measured(text, {}, lang)
        bare = parse_lesion(insert_measured('?', {'suvmax': 5.04, 'size_mm': 17.6, 'slice': 98}, lang, fill=True), lang)
        assert (bare.suvmax, bare.size_mm, bare.slice) == (5., 18., 98) and insert_measured('?', {'suvmax': 1.}, lang) == '?'

def test_questions_and_organ_sentences():
    for lang in LANGUAGES:
        asked = [{f(np.random.default_rng(s), lang) for s in range(80)} for f in (lesion_request, organ_request)]
        assert min(map(len, asked)) >= 5 and not asked[0] & asked[1]
        for k, s in STRUCTURES.items():
            for side in (('left', 'right') if s.sided else ('',)):
                said = {write_organ(k, side, lang, seed) for seed in range(40)}
                assert len(said) == 4 and all(structure_name(k, side, lang) in t for t in said)
    assert any(write_organ('kidney', 'left', 'en', s) == 'The masked region is the left kidney.' for s in range(20))
    for args in (('liver', 'left', 'en'), ('kidney', '', 'en'), ('gills', '', 'en'), ('liver', '', 'fr')):
        with pytest.raises(ReportError): write_organ(*args)
    with pytest.raises(ReportError): parse_lesion('Size: 3', 'fr')

# views

def test_items_of_every_lesion(studies):
    n = 0
    for study in studies[:12]:
        items, gone = lesion_records(study, SMALL), vanished(study)
        assert [r['lesion'] for _, r in items] == [i for i in range(1, len(study.findings) + 1) if i not in gone]; n += len(items)
        for arrays, r in items:
            f = study.findings[r['lesion'] - 1]
            assert {k: (a.shape, a.dtype.name) for k, a in arrays.items()} == {k + e: (SMALL.shape, 'uint8' if k == 'mask' else 'float16') for k in ('pet', 'ct', 'mask') for e in ('', '_focal')}
            assert all(0 <= a.min() and a.max() <= 1 and np.isfinite(a).all() for a in arrays.values()) and arrays['mask'].any() and arrays['mask_focal'].any()
            assert set(r) >= {'patient', 'region', 'text', 'findings', 'measured', 'kind'} and r['kind'] == 'lesion' and r['region'] == f.region
            json.dumps(r)
            assert parse_lesion(r['text'], 'vi').finding == as_written(f) and Finding.from_dict({k: v for k, v in r['findings'][0].items() if k != 'voxel'}) == f
            near = np.abs(np.argwhere(arrays['mask']) - r['findings'][0]['voxel']).max(1).min()
            assert near <= (1.01 if f.kind != 'effusion' else 6)
    assert n > 40

def test_what_is_measured_is_what_was_drawn(studies):
    pairs = [(f, measure_lesion(s.volumes['pet'], s.volumes['lesions'].replace(data=(s.volumes['lesions'].data == i).astype(np.uint8)))) for s in studies for i, f in enumerate(s.findings, 1) if i not in vanished(s)]
    lone = [(f, m) for f, m in pairs if f.kind != 'effusion']
    assert all(abs(m['slice'] - f.slice) <= 1 for f, m in pairs)
    hot = np.array([m['suvmax']/f.suvmax for f, m in lone if f.suvmax]); long = np.array([m['size_mm'] - f.size_mm for f, m in lone if f.size_mm])
    assert len(hot) > 60 and np.abs(hot - 1).max() < .1 and np.median(np.abs(hot - 1)) < .05
    assert len(long) > 50 and np.median(np.abs(long)) < 3 and np.abs(long).max() < 6

def lung_study(side: str) -> Study:
    "A hand-made body of water, 5 mm, in a PET that rises to the head, the back and the left; two lungs, a lesion of 20 mm in one of them."
    D, H, W = np.ogrid[:120, :64, :96]; affine = np.array([[0, 0, 5, -240.], [0, 5, 0, -160], [5, 0, 0, 0], [0, 0, 0, 1.]])
    ball = lambda c, r: (D - c[0])**2 + (H - c[1])**2 + (W - c[2])**2 <= r*r
    body = (((H - 32)/22)**2 + ((W - 47.5)/34)**2 <= 1) & (D >= 0)
    lungs = [(((D - 60)/20)**2 + ((H - 32)/14)**2 + ((W - w)/10)**2 <= 1) for w in (31, 64)]
    at = (60, 32, 64 if side == 'left' else 31); lesion = ball(at, 2)
    ct = np.where(lungs[0] | lungs[1], -800., np.where(body, 30., -1000.)); ct[lesion] = 40
    pet = .5 + .02*(D + H + W); pet[lesion] = 8
    organs = np.where(lungs[0], LABEL['lung_right'], np.where(lungs[1], LABEL['lung_left'], np.where(body, LABEL['muscle'], 0))).astype(np.uint8)
    vol = lambda x, unit: Volume(x, affine, unit)
    centre = tuple(vol(pet, 'SUVbw').world(at).tolist())
    return Study(f'made-{side}', {'pet': vol(pet, 'SUVbw'), 'ct': vol(ct, 'HU'), 'lesions': vol(lesion, 'label'), 'organs': vol(organs, 'label')}, (Finding('lung', side, 'nodule', 20., 8., 'increased', 60, None, centre),))

@pytest.mark.parametrize('focal', ['cube', 'box'])
@pytest.mark.parametrize('stored', [False, True])
def test_left_is_left_in_every_view(focal, stored):
    for side, sign in (('left', 1), ('right', -1)):
        study = lung_study(side)
        if stored: study = replace(study, volumes={k: Volume(v.data[:, :, ::-1], v.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 95], [0, 0, 0, 1.]]), v.unit) for k, v in study.volumes.items()})
        (a, r), = lesion_records(study, SMALL, focal=focal)
        w = lambda m: np.argwhere(m)[:, 2].mean() - 15.5
        assert sign*w(a['mask']) > 3 and sign*(r['findings'][0]['voxel'][2] - 15.5) > 3 and parse_lesion(r['text']).side == side
        assert np.allclose(np.linalg.inv(r['affine']) @ [*study.findings[0].center_mm, 1], [*r['findings'][0]['voxel'], 1], atol=.01)
        last, first = ([a['pet_focal'].take(i, axis).astype(float).mean() for axis in range(3)] for i in (-1, 0))
        assert all(y > x + .005 for x, y in zip(first, last))                                   # head, back and left are last
        d = np.argwhere(a['mask'])[:, 0].mean(); assert 8 < d < 16

def test_a_lesion_smaller_than_a_voxel_stays_and_one_without_voxels_is_named(caplog):
    study = lung_study('left'); lesions = np.zeros((120, 64, 96), np.uint8); lesions[60, 32, 64] = 1
    two = replace(study, volumes=study.volumes | {'lesions': study.volumes['lesions'].replace(data=lesions)}, findings=study.findings*2)
    assert list(vanished(two)) == [2] and 'no voxel of label 2 (left lung nodule)' in vanished(two)[2]
    with caplog.at_level(logging.WARNING): (a, r), = lesion_records(two, replace(SMALL, shape=(6, 8, 8)))
    assert a['mask'].sum() == 1 and a['mask_focal'].sum() >= 1 and r['lesion'] == 1 and 'label 2' in caplog.text
    assert np.abs(np.argwhere(a['mask'])[0] - r['findings'][0]['voxel']).max() <= .51

def test_records_follow_from_the_seed(studies):
    a, b, c = (lesion_records(studies[3], SMALL, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(x[k], y[k]) for (x, _), (y, _) in zip(a, b) for k in x) and [r for _, r in a] == [r for _, r in b]
    assert any(not np.array_equal(x['pet_focal'], y['pet_focal']) for (x, _), (y, _) in zip(a, c)) and [r['measured'] for _, r in a] == [r['measured'] for _, r in c]

def test_organs(studies):
    seen = set()
    for seed, study in enumerate(studies[:8]):
        items = organ_records(study, SMALL, seed)
        assert len(items) == 3 == len({(r['organ'], r['side']) for _, r in items})
        for arrays, r in items:
            assert r['kind'] == 'organ' and r['findings'] == [] and structure_name(r['organ'], r['side'], 'vi') in r['text'] and arrays['mask'].any() and arrays['mask_focal'].sum() > 3
            seen.add(r['organ'])
    assert len(seen) > 12

def test_organ_masks_lie_on_their_side(studies):
    organs = studies[0].volumes['organs']
    for k, s in STRUCTURES.items():
        if not s.sided: assert organ_mask(organs, k).data.any(), k; continue
        x = {side: organs.world(np.argwhere(organ_mask(organs, k, side).data))[:, 0] for side in ('left', 'right')}
        assert len(x['left']) and len(x['right']) and x['left'].mean() > 5 and x['right'].mean() < -5, k

def test_what_does_not_fit_is_refused():
    study = lung_study('left')
    with pytest.raises(ViewError, match="no \\['lesions'\\]"): lesion_records(replace(study, volumes={k: study.volumes[k] for k in ('pet', 'ct')}), SMALL)
    with pytest.raises(ViewError, match='but 0 findings'): lesion_records(replace(study, findings=()), SMALL)
    with pytest.raises(ViewError, match="found 'sphere'"): lesion_records(study, SMALL, focal='sphere')
    with pytest.raises(ViewError, match='SUVbw'): measure_lesion(study.volumes['ct'], study.volumes['lesions'])
    with pytest.raises(ViewError, match='nothing to measure'): measure_lesion(study.volumes['pet'], study.volumes['lesions'].replace(data=np.zeros((120, 64, 96), np.uint8)))

def test_a_patient_costs_little():
    t0 = time.process_time()
    for s in (71, 72, 73):
        study = draw(sample_patient(s)); lesion_records(study, SMALL); organ_records(study, SMALL)
    assert (time.process_time() - t0)/3 < .5

def test_patients_on_disk_have_their_labels(tmp_path):
    study = phantom_study(tmp_path/write_patient(11, tmp_path))
    drawn = draw(sample_patient(11))
    assert study.volumes['lesions'].unit == study.volumes['organs'].unit == 'label' and len(lesion_records(study, SMALL)) == len(study.findings)
    a, b = (lesion_records(s, SMALL) for s in (study, drawn))
    assert [r['findings'][0]['organ'] for _, r in a] == [r['findings'][0]['organ'] for _, r in b] and all(abs(x['measured']['suvmax']/y['measured']['suvmax'] - 1) < .15 for (_, x), (_, y) in zip(a, b))
    (tmp_path/study.id/'lesions.nii.gz').unlink()
    assert set(phantom_study(tmp_path/study.id).volumes) == {'pet', 'ct', 'organs'}
