from __future__ import annotations
import csv, json, logging, os, shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
import numpy as np
from .config import Data, digest
from .findings import REGIONS, Finding, FindingError, Study
from .reports import parse, report_request
from .sources import SourceError
from .suv import DicomError
from .tasks import Result, alone, read_rows, run_tasks
from .vqa import YES_NO, split, vqa_multi, vqa_single
from .volume import Volume, VolumeError, body_mask, cut, lung_extent, region_bounds, resample
from .wording import ReportError

log = logging.getLogger(__name__)

class PrepareError(ValueError):
    "A study that cannot be put on the model grid; the message names the study and what is missing."

def region_grid(ct: Volume, data: Data) -> Volume:
    "An empty volume on the model grid of one region's `ct` (HU): the region's length along d, `data.spacing` mm in the plane, centred on the body."
    D, H, W = data.shape
    body = np.argwhere((ct.data[:: max(1, ct.shape[0]//16)] > -500).any(0))
    h, w = (body.min(0) + body.max(0))/2 if len(body) else (np.array(ct.shape[1:]) - 1)/2
    step = np.array([ct.shape[0]*ct.spacing[0]/D, data.spacing, data.spacing])
    centre = ct.world([(ct.shape[0] - 1)/2, h, w])                                  # (x, y, z) mm
    affine = np.zeros((4, 4)); affine[3, 3] = 1
    affine[[2, 1, 0], [0, 1, 2]] = step
    affine[:3, 3] = centre - affine[:3, :3] @ ((np.array(data.shape) - 1)/2)
    return Volume(np.zeros(data.shape, np.float32), affine, 'HU', {})

def relative(pet: Volume, ct: Volume) -> Volume:
    """`pet` in any unit over its mean in the body (unit '1'), the body being that of `ct` (HU). Raises `PrepareError` where the two do not meet or the body holds nothing.

    SUVbw is activity over what it would be, were the dose spread evenly through the whole body; this is activity over its mean in the part that was scanned. It is no SUV: excretion and the legs are left out."""
    inside = resample(body_mask(ct), like=pet).data > 0
    mean = float(pet.data[inside].mean(dtype=np.float64)) if inside.any() else 0.
    if not mean > 0: raise PrepareError(f"PET holds {mean:g} on average in the {int(inside.sum())} voxels of the body; expected more than nothing: do PET and CT lie on each other?")
    return pet.replace(data=pet.data/np.float32(mean), unit='1', meta=pet.meta | {'relative_to': mean, 'was': pet.unit})

PET_UNITS = {'SUVbw': ('SUVbw', lambda pet, ct: pet), 'relative': ('1', relative)}     # data.pet_unit -> unit on the grid, and how PET gets there

def _pet(study: Study, data: Data) -> Volume:
    if data.pet_unit not in PET_UNITS: raise PrepareError(f"data.pet_unit: found {data.pet_unit!r}, expected one of {sorted(PET_UNITS)}")
    try: return PET_UNITS[data.pet_unit][1](study.volumes['pet'], study.volumes['ct'])
    except PrepareError as e: raise PrepareError(f"study {study.id}: {e}") from e

def to_grid(study: Study, data: Data) -> dict[str, dict[str, Volume]]:
    "Region name -> {'pet': in `data.pet_unit`, 'ct': HU} on the model grid. Raises `PrepareError` if PET or CT is missing."
    missing = {'pet', 'ct'} - set(study.volumes)
    if missing: raise PrepareError(f"study {study.id}: no {sorted(missing)} among {sorted(study.volumes)}; a PET/CT study needs both")
    pet, ct, out = _pet(study, data), study.volumes['ct'], {}
    for name, slab in cut(ct, region_bounds(ct, data.overlap)).items():
        grid = region_grid(slab, data)
        out[name] = {'pet': resample(pet, like=grid), 'ct': resample(ct, like=grid)}
    return out

def scaled(volumes: dict[str, Volume], data: Data) -> dict[str, np.ndarray]:
    "PET and CT of one region as float16 in model units. Raises `PrepareError` for PET that is not in SUVbw (unless `data.pet_unit` is 'relative') or CT that is not in HU: a threshold in SUV would mean nothing."
    for name, unit, remedy in (('pet', PET_UNITS[data.pet_unit][0], "or, where its SUV cannot be known, set data.pet_unit: relative"), ('ct', 'HU', "HU are stored values times slope plus intercept")):
        if volumes[name].unit != unit: raise PrepareError(f"{name} is in {volumes[name].unit!r}, expected {unit}: convert it first (petvlm.dicom.read_series does), {remedy}")
    lo, hi = data.hu_window
    return {'pet': np.clip(volumes['pet'].data/data.suv_max, 0, 3).astype(np.float16),
            'ct': np.clip((volumes['ct'].data - lo)/(hi - lo), 0, 1).astype(np.float16)}

def stated(turns: list[dict], findings: Sequence[Finding], text: str, language: str, seed: int) -> list[dict]:
    "Of the questions made from what was read in `text`, those that it answers: no 'no' to what it may have said in other words, no list of nothing; at least the request for the report itself."
    denies = lambda t: t['kind'] in ('presence', 'list', 'impression') and (not findings or t['answer'] == f'{YES_NO[language][1]}.')
    return [t for t in turns if not denies(t)] or [{'question': report_request(np.random.default_rng(seed), language), 'answer': text, 'kind': 'report'}]

def _asked(study: Study, region: str, language: str, n: int) -> tuple[list[Finding], dict]:
    "Findings of a region, and the questions about them."
    text, seed = study.reports[region][language], int(digest([study.id, region]), 16) % 2**31
    if study.provenance.get('findings') == 'report':
        findings, keep, about = parse(text, language), (lambda turns: stated(turns, findings, text, language, seed)), text
    else: findings, keep = [f for f in study.findings if f.region == region], lambda turns: turns; about = findings
    return findings, {'single': keep(vqa_single(about, region, language, seed=seed, n=n)), 'multi': keep(vqa_multi(about, region, language, seed=seed))}

def record(study: Study, region: str, grid: Volume, data: Data, n_single: int = 6) -> dict:
    """The texts and the truth of one region: report, its PET and CT parts, questions, findings with their place on the grid (`voxel`, d h w; None where nobody knows).

    `findings_from`: 'truth', or 'report' where they were read from the text. `patient`: who it is, `study`: which study of theirs."""
    text = study.reports[region][data.language]
    findings, questions = _asked(study, region, data.language, n_single)
    inside = lambda f: None if f.center_mm is None else np.clip(grid.index(f.center_mm), 0, np.array(grid.shape) - 1).round(2).tolist()
    return dict(patient=study.provenance.get('patient', study.id), study=study.id, region=region, text=text, parts=split(text, language=data.language), findings=[f.to_dict() | {'voxel': inside(f)} for f in findings],
                findings_from=study.provenance.get('findings', 'truth'), pet_unit=data.pet_unit, affine=grid.affine.round(4).tolist()) | questions

def feature(x: np.ndarray, name: str, suv_max: float) -> np.ndarray:
    "What is standardised: log(SUVbw + 0.3) for PET, the windowed HU for CT. `x` in stored units."
    x = x.astype(np.float32)
    return np.log(x*suv_max + .3) if name == 'pet' else x

def usual_of(record: dict) -> str:
    "What a row is compared with: its region, or what its record names under `usual` (region and plane of a CT series)."
    return record.get('usual', record['region'])

def standards(folder: Path, names: Sequence[str], suv_max: float = 10., room: int = 2**28) -> dict[str, np.ndarray]:
    "`{input}.{usual}`: `(2, D, H, W)` mean and deviation over the training rows of a prepared folder, of the inputs `names`; rows are compared with those of the same `usual` (the record's region, where it does not say). Deviations below half their median are raised to it, so that air is not a microscope. Voxels are independent of each other, so a slab of all rows at a time is read, of `room` bytes."
    with open(folder/'rows.jsonl', encoding='utf-8') as f: rows = [(r['row'], usual_of(r)) for r in map(json.loads, f) if r['split'] == 'train']
    out = {}
    for name in names:
        array = np.load(folder/f'{name}.npy', mmap_mode='r')
        for region in sorted({r for _, r in rows}):
            which = [i for i, r in rows if r == region]
            step = max(1, room//(4*len(which)*int(np.prod(array.shape[2:]))))
            slabs = (feature(array[which, d:d + step], name, suv_max) for d in range(0, array.shape[1], step))
            mean, sd = map(np.concatenate, zip(*((x.mean(0), x.std(0)) for x in slabs)))
            out[f'{name}.{region}'] = np.stack([mean, np.maximum(sd, max(np.median(sd)/2, 1e-3))])
    return out

def standardise(x: np.ndarray, name: str, standard: np.ndarray, suv_max: float) -> np.ndarray:
    "Stored values of one region as deviations from the usual, clipped to [-4, 8]."
    return np.clip((feature(x, name, suv_max) - standard[0])/standard[1], -4, 8)

def region_rows(study: Study, data: Data, split: str) -> list[tuple[dict, dict]]:
    "`(arrays, record)` of each region of one study. A region without a report is left out, a report without its region in the CT is named in the log. Raises `PrepareError` when nothing is left, and for a study from outside in whose CT no lungs are found: a cut at fixed fractions would give one region the other's report."
    if study.provenance.get('findings') == 'report' and 'ct' in study.volumes and lung_extent(study.volumes['ct']) is None: raise PrepareError(f"study {study.id}: no lungs in the CT; they tell the regions of the body apart")
    grids = to_grid(study, data)
    told = [name for name in REGIONS if data.language in study.reports.get(name, {})]
    both, lost = [n for n in grids if n in told], [n for n in told if n not in grids]
    if not both: raise PrepareError(f"study {study.id}: reports in {data.language!r} of {told}, all reports {({k: sorted(v) for k, v in study.reports.items()})}, the CT covers {sorted(grids)}; no region has both")
    if lost: log.warning("study %s: %s reported, but not in the CT; left out", study.id, lost)
    return [(scaled(grids[name], data), record(study, name, grids[name]['ct'], data)) for name in both]

BAD_STUDY = (PrepareError, SourceError, DicomError, VolumeError, ReportError, FindingError)     # what a study can be guilty of

def _rows(load: Callable, make: Callable, data: Data, split: str, skip: bool) -> tuple[list[tuple[dict, dict]], str]:
    "Rows of one study and, where there are none, why. What `load` gives is a study, or rows already."
    try: found = load(); rows = found if isinstance(found, list) else make(found, data, split)
    except BAD_STUDY as e:
        if not skip: raise
        return [], ' '.join(f'{type(e).__name__}: {e}'.split())
    return rows, '' if rows else f'gave no row of kind {data.kind!r}'

def _unique(names: Sequence[str], results: Sequence[Result]) -> list[Result]:
    "`results`, where a study with an image that another study had before loses its rows."
    seen, out = {}, []
    for name, r in zip(names, results):
        twin = next((seen[k] for k in r.images if k in seen), None)
        for k in r.images: seen.setdefault(k, name)
        out.append(r if twin is None else Result(r.file, f'the same images as {twin}'))
    return out

def _header(f, x: np.ndarray, n: int) -> None:
    "The head of a .npy file for `n` arrays like `x`."
    np.lib.format.write_array_header_1_0(f, {'descr': np.lib.format.dtype_to_descr(x.dtype), 'fortran_order': False, 'shape': (n, *x.shape)})

def _write(tmp: Path, splits: Sequence[str], results: Sequence[Result]) -> None:
    "Rows of all studies in order: arrays to `{name}.npy`, records to `rows.jsonl`. Raises `PrepareError` for rows that differ in their arrays or shapes."
    rows = ((split_name, *row) for split_name, r in zip(splits, results) if r.images for row in read_rows(r.file))
    count, shapes, files = sum(len(r.images) for r in results), {}, {}
    with ExitStack() as stack:
        out = stack.enter_context(open(tmp/'rows.jsonl', 'w', encoding='utf-8'))
        for n, (split_name, arrays, rec) in enumerate(rows):
            if not n:
                shapes, files = {k: (x.shape, x.dtype) for k, x in arrays.items()}, {k: stack.enter_context(open(tmp/f'{k}.npy', 'wb')) for k in arrays}
                for k, x in arrays.items(): _header(files[k], x, count)
            found, expected = {k: x.shape for k, x in arrays.items()}, {k: shape for k, (shape, _) in shapes.items()}
            if found != expected: raise PrepareError(f"row {n}: its arrays are {found}, those of the rows before {expected}; every row of a folder has the same")
            for k, x in arrays.items(): files[k].write(np.ascontiguousarray(x, shapes[k][1]).data)
            out.write(json.dumps({'row': n, 'split': split_name} | rec, ensure_ascii=False) + '\n')

def _account(tmp: Path, names: Sequence[str], told: list[tuple[str, str]], data: Data) -> None:
    "Write `skipped.csv`, log the count. Raises `PrepareError` for a split whose studies are all skipped."
    skipped = [(name, s, why) for name, (s, why) in zip(names, told) if why]
    with open(tmp/'skipped.csv', 'w', encoding='utf-8', newline='') as f: csv.writer(f).writerows([('study', 'split', 'reason'), *skipped])
    if not skipped: return
    some = '; '.join(f'{name}: {why}' for name, _, why in skipped[:3])
    lost = sorted({s for s, _ in told} - {s for s, why in told if not why})
    if lost: raise PrepareError(f"{data.name}: {len(skipped)} of {len(told)} studies cannot be used, nothing is left for {lost}: {some}{' ...' if len(skipped) > 3 else ''}. All reasons are in {tmp/'skipped.csv'}")
    log.warning("%s: %d of %d studies skipped (%s%s); skipped.csv has all reasons", data.name, len(skipped), len(told), some, ' ...' if len(skipped) > 3 else '')

FEW = 16     # studies of the phantom that are done before a local cluster has started

def prepare(items: Sequence[tuple[str, Callable]], folder: Path, data: Data, make: Callable = region_rows, standard: Sequence[str] = ('pet', 'ct'), workers: int = 2, skip: bool | None = None, scheduler: str | None = None) -> Path:
    """Prepare `(split, load)` items into `folder`, which appears only when it is complete, and is the same byte for byte however many workers made it and however often the run was cut off.

    `load()` gives a `Study` or finished rows; `make(study, data, split)` gives the rows of a study as `(arrays, record)`; `standard`: inputs that encoders read as deviations from the usual.
    `workers`: processes of a local Dask cluster, in this process for 1 or 0 (and for up to `FEW` studies none of which may be skipped: nothing is gained by keeping them apart); `scheduler`: a Dask scheduler instead (`petvlm.tasks`, default `$PETVLM_DASK`). A script that starts workers does so below `if __name__ == '__main__'`.
    `skip`: studies that raise one of `BAD_STUDY`, end their worker process, or repeat another's images, are left out and listed in `skipped.csv` (default: in data from outside, not in the phantom). A load may carry its study's name as `study`.
    Finished studies lie in `{folder}.studies` until all are; a run that is cut off goes on from there, and twice the room of `folder` is needed for the time being.
    Raises `PrepareError` when a split has nothing left, what `make` raises when nothing is skipped, `TaskError` for a scheduler that does not answer, and everything that is not a study's fault."""
    folder, tmp, studies = Path(folder), Path(f'{folder}.partial'), Path(f'{folder}.studies')
    if not items: raise PrepareError(f"{folder}: no studies to prepare")
    skip = data.source.kind != 'phantom' if skip is None else skip
    splits, loads = zip(*items)
    names = [getattr(load, 'study', '') or f'number {i}' for i, load in enumerate(loads, 1)]
    with alone(studies):
        results = run_tasks(_rows, [(load, make, data, s, skip) for s, load in items], studies, workers, scheduler, 0 if skip else FEW, skip, f'prepare {data.name}')
        if skip: results = _unique(names, results)
        shutil.rmtree(tmp, ignore_errors=True); tmp.mkdir(parents=True)
        _write(tmp, splits, results)
        _account(tmp, names, [(s, r.why) for s, r in zip(splits, results)], data)
        np.savez(tmp/'standard.npz', **standards(tmp, standard, data.suv_max))
        shutil.rmtree(folder, ignore_errors=True); os.replace(tmp, folder)
        shutil.rmtree(studies)
    return folder
