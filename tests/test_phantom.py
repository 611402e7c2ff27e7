"The phantom: the same everywhere, seen by exactly whom it should be, and true to its own text."
import hashlib
from collections import Counter
from dataclasses import replace
import numpy as np, pytest
from petvlm.anatomy import LABEL
from petvlm.canvas import blur
from petvlm.dicom import find_series, pair_pet_ct, read_series
from petvlm.findings import LESIONS, ORGANS, REGIONS, Finding
from petvlm.implants import PET_FWHM, GAP_MM, _apart, place_lesion, sample_findings
from petvlm.phantom import PET_GRID, PhantomError, draw, make_data, paint, sample_patient, write_dicom
from petvlm.volume import Volume, read_nifti, region_bounds, resample

SEEDS = range(500, 512)

def digest(volume): return hashlib.sha256(volume.data.tobytes()).hexdigest()[:16]

def coarse(data, grid, unit): return resample(Volume(data, grid.affine, unit), spacing=10).data

@pytest.mark.parametrize('seed', [1, 2])
def test_the_same_seed_is_the_same_patient(seed):
    a, b = draw(sample_patient(seed)), draw(sample_patient(seed))
    assert a.findings == b.findings and all(digest(a.volumes[k]) == digest(b.volumes[k]) for k in a.volumes)
    assert digest(a.volumes['pet']) != digest(draw(sample_patient(seed + 10)).volumes['pet'])

def test_findings_do_not_depend_on_the_grid():
    for seed in SEEDS:
        p = sample_patient(seed)
        fine, rough = (draw(p, spacing).findings for spacing in ((5, 4, 4), (5, 5, 5)))
        assert [(f.site, f.kind, f.size_mm, f.suvmax) for f in fine] == [(f.site, f.kind, f.size_mm, f.suvmax) for f in rough]

def test_how_many_and_who_sees_them():
    found = [sample_findings(np.random.default_rng(i)) for i in range(400)]
    counts = [sum(f.region == r for f in fs) for fs in found for r in REGIONS]
    seen = Counter(f.seen_on for fs in found for f in fs)
    total = sum(seen.values())
    assert max(counts) <= 4 and 1.3 < np.mean(counts) < 1.7
    assert .28 < seen['ct']/total < .4 and .17 < seen['pet']/total < .3
    assert all(len({f.site for f in fs}) == len(fs) for fs in found)
    assert {(f.organ, f.kind, f.uptake) for fs in found for f in fs} == set(LESIONS)

def test_lesions_keep_apart():
    for seed in SEEDS:
        lesions = sample_patient(seed).lesions
        assert all(_apart(a, b) > GAP_MM for i, a in enumerate(lesions) for b in lesions[:i])

@pytest.mark.parametrize('organ, kind, uptake', LESIONS)
def test_each_scanner_sees_what_it_should(organ, kind, uptake):
    "Contrast after averaging to 10 mm voxels, against the same body without the lesion: enough where it shall be seen, exactly none where not."
    sided = 'left' if ORGANS[organ].sided else ''
    for seed in (3, 4):
        empty = replace(sample_patient(seed), lesions=())
        lesion = place_lesion(np.random.default_rng(seed), empty.body, Finding(organ, sided, kind, uptake=uptake))
        grid = empty.body.grid()
        (before, _), (after, found) = paint(empty, grid), paint(replace(empty, lesions=(lesion,)), grid)
        hu = abs(coarse(after.ct, grid, 'HU') - coarse(before.ct, grid, 'HU')).max()
        suv = abs(coarse(blur(after.pet, grid.spacing, PET_FWHM), grid, 'SUVbw') - coarse(blur(before.pet, grid.spacing, PET_FWHM), grid, 'SUVbw')).max()
        seen = lesion.finding.seen_on
        assert (hu >= 25) if seen in ('ct', 'both') else (hu == 0)
        assert (suv >= 1.2) if seen in ('pet', 'both') else (suv == 0)
        assert found[0].suvmax == lesion.finding.suvmax and (after.lesions == 1).sum() >= 6
        if sided: assert found[0].center_mm[0] > 0

def test_lesions_lie_in_their_region():
    for seed in SEEDS:
        study = draw(sample_patient(seed))
        bounds = region_bounds(study.volumes['ct'], 8)
        assert set(bounds) == set(REGIONS)
        assert all(bounds[f.region][0] <= f.slice < bounds[f.region][1] for f in study.findings)

def test_left_is_left():
    study = draw(sample_patient(7))
    organs, grid = study.volumes['organs'], study.volumes['pet']
    x = lambda name: grid.world(np.argwhere(organs.data == LABEL[name]).mean(0))[0]
    assert x('liver') < 0 < x('spleen') and x('kidney_right') < 0 < x('kidney_left') and x('heart') > 0 and x('stomach') > 0

def test_dicom_comes_back_as_drawn(tmp_path):
    patient = sample_patient(8)
    findings = write_dicom(patient, tmp_path)
    pair = pair_pet_ct(find_series(tmp_path))
    pet, ct, mask = read_series(pair.pet), read_series(pair.ct), read_nifti(tmp_path/'lesions.nii.gz')
    drawn = draw(patient, *PET_GRID).volumes['pet']
    assert not pair.refused and pair.pet.frame == pair.ct.frame
    assert np.allclose(pet.affine, drawn.affine) and abs(pet.data - drawn.data).max() < drawn.data.max()/60000
    assert pet.meta['suv']['decay_correction'] == 'START' and len({h.AcquisitionTime for h in pair.pet.headers}) > 3 and len({h.RescaleSlope for h in pair.pet.headers}) > 100
    assert np.allclose(mask.affine, pet.affine, atol=1e-3) and ct.unit == 'HU'
    for i, f in enumerate(findings, 1):
        if f.suvmax: assert abs(pet.data[mask.data == i].max()/f.suvmax - 1) < .2
    assert 'Phantom' in str(pair.pet.headers[0].PatientName)

def test_data_is_the_same_bytes_and_never_overwritten(tmp_path):
    def tree(folder): return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*') if p.is_file()}
    a, b = (make_data(tmp_path/str(w), n=2, seed=40, workers=w) for w in (1, 2))
    assert tree(a) == tree(b) and len(tree(a)) > 700
    with pytest.raises(PhantomError, match='exists'): make_data(a, n=1)
