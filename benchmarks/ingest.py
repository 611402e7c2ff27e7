"""A DICOM folder to tensors on a model grid, side by side: petvlm, and SimpleITK's series reader with MONAI's resampling.

    pip install SimpleITK==2.5.7                       # the peer; petvlm does not need it
    python benchmarks/ingest.py folder                 # a folder with a PET/CT study, e.g. ACRIN-NSCLC-FDG-PET
    python benchmarks/ingest.py folder --shape 32 24 40 --spacing 12        # the phantom's grid

The job: find the series in the folder, choose attenuation-corrected PET and its CT, read both, SUVbw and HU as float32, both onto one grid of `--shape` voxels
(in plane of `--spacing` mm, along the body as long as the PET). One JSON: seconds (median of repeats, each in a process of its own, imports not counted, the two
in turn), peak memory, their ratios, and how far the two PET tensors lie apart. Chosen series are told to the peer, which costs petvlm time and the peer none.
"""
import argparse, json, multiprocessing, os, platform, resource, statistics, sys, time
from datetime import datetime, timezone
from pathlib import Path


def grid(pet, shape, spacing):
    "An axis-aligned grid around the middle of the canonical volume `pet`: (4, 4) from (d, h, w) to (x, y, z) mm, LPS."
    import numpy as np
    step = np.array([pet.shape[0]*pet.spacing[0]/shape[0], spacing, spacing])
    affine = np.zeros((4, 4)); affine[3, 3] = 1
    affine[[2, 1, 0], [0, 1, 2]] = step
    affine[:3, 3] = pet.world((np.array(pet.shape) - 1)/2) - affine[:3, :3] @ ((np.array(shape) - 1)/2)
    return affine


def ours(folder, a):
    import numpy as np, torch
    from petvlm.dicom import find_series, pair_pet_ct, read_series
    from petvlm.volume import Volume, resample
    start = time.perf_counter()
    pair = pair_pet_ct(find_series(folder))
    pet, ct = read_series(pair.pet), read_series(pair.ct)
    affine = grid(pet, a.shape, a.spacing)
    like = Volume(np.zeros(a.shape, np.float32), affine, 'HU', {})
    out = [torch.from_numpy(np.ascontiguousarray(resample(v, like=like).data)) for v in (pet, ct)]
    return time.perf_counter() - start, out, {'pet': pair.pet.uid, 'ct': pair.ct.uid, 'affine': affine.tolist()}


def peer(folder, a, chosen):
    import numpy as np, pydicom, SimpleITK, torch
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    start = time.perf_counter()
    files = {uid: SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(d, uid) for d, _, names in os.walk(folder) if names for uid in SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(d)}
    swap = np.eye(4)[[2, 1, 0, 3]]                                       # (d, h, w) <-> (x, y, z)
    out = []
    for name in ('pet', 'ct'):
        reader = SimpleITK.ImageSeriesReader(); reader.SetFileNames(files[chosen[name]])
        image = SimpleITK.Cast(reader.Execute(), SimpleITK.sitkFloat32)
        data = SimpleITK.GetArrayFromImage(image)
        if name == 'pet': data *= suv_factor(files[chosen[name]][0], pydicom)
        affine = np.eye(4)
        affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) @ np.diag(image.GetSpacing()); affine[:3, 3] = image.GetOrigin()
        moved = SpatialResample(mode='bilinear', padding_mode='border', align_corners=True, dtype=torch.float32)(
            MetaTensor(torch.from_numpy(data)[None], affine=affine @ swap), dst_affine=torch.tensor(chosen['affine']), spatial_size=a.shape)
        out.append(moved.as_tensor()[0])
    return time.perf_counter() - start, out, {}


def suv_factor(file, pydicom):
    "SUVbw per Bq/ml as most scripts have it: dose decayed from injection to the series time, which is right for this study (START, one series time)."
    ds = pydicom.dcmread(file, stop_before_pixels=True)
    dose = ds.RadiopharmaceuticalInformationSequence[0]
    seconds = lambda t: int(t[:2])*3600 + int(t[2:4])*60 + float(t[4:])
    waited = seconds(ds.SeriesTime) - seconds(dose.RadiopharmaceuticalStartTime)
    return 1000*float(ds.PatientWeight)/(float(dose.RadionuclideTotalDose)*2**(-waited/float(dose.RadionuclideHalfLife)))


def work(way, folder, a, chosen, pipe):
    "One run, in its own process."
    import torch
    torch.set_num_threads(a.threads)
    for module in ('petvlm.dicom', 'monai.transforms', *(['SimpleITK'] if way == 'peer' else [])): __import__(module)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, (pet, ct), told = ours(folder, a) if way == 'petvlm' else peer(folder, a, chosen)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send((seconds, peak/1024, pet.numpy(), ct.numpy(), told))


def main():
    import numpy as np
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path); parser.add_argument('--shape', type=int, nargs=3, default=(128, 256, 256)); parser.add_argument('--spacing', type=float, default=1.9)
    parser.add_argument('--repeats', type=int, default=5); parser.add_argument('--threads', type=int, default=1); parser.add_argument('--out', type=Path)
    a = parser.parse_args(); context = multiprocessing.get_context('spawn')
    runs, chosen = {'petvlm': [], 'peer': []}, None
    for n in range(a.repeats):
        for way in (('petvlm', 'peer') if n % 2 == 0 else ('peer', 'petvlm')):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(way, str(a.folder), a, chosen, there)); process.start(); there.close()
            runs[way].append(here.recv()); process.join()
            chosen = chosen or runs['petvlm'][0][4]
    median = lambda way, k: statistics.median(r[k] for r in runs[way])
    pet, other = runs['petvlm'][0][2], runs['peer'][0][2]
    result = {'when': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'machine': platform.processor() or platform.machine(), 'cores': os.cpu_count(), 'threads': a.threads,
              'shape': list(a.shape), 'spacing_mm': a.spacing, 'repeats': a.repeats,
              'seconds': {w: round(median(w, 0), 3) for w in runs}, 'peak_mb': {w: round(median(w, 1), 1) for w in runs},
              'speed_ratio': round(statistics.median(p[0]/o[0] for o, p in zip(runs['petvlm'], runs['peer'])), 2), 'memory_ratio': round(median('petvlm', 1)/median('peer', 1), 2),
              'suvmax': {'petvlm': float(pet.max()), 'peer': float(other.max())}, 'pet_difference': {'median': float(np.median(abs(pet - other))), 'p99.9': float(np.quantile(abs(pet - other), .999))}}
    text = json.dumps(result, indent=1)
    sys.stdout.write(text + '\n')
    if a.out: a.out.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__': main()
