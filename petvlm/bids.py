from __future__ import annotations
import csv, json, re
from pathlib import Path
import nibabel as nib
import numpy as np
from petvlm.dicom import SeriesInfo
from petvlm.suv import DOSE_BQ, HALF_LIFE_S, MAX_HALF_LIVES, WEIGHT_KG, SUVError, SUVProvenance, mean_rate_s, tag_name
from petvlm.volume import _FLIP, Volume, _atomic, _stem, write_nifti

class BidsError(SUVError): "A PET sidecar that does not settle SUV; the message names the field, what was found, and the remedy."

def _refuse(field: str, found: str, remedy: str): raise BidsError(f"{field} {found}. Remedy: {remedy}.")

def _get(side: dict, field: str):
    "The value of `field`, None where missing, empty or 'n/a'. Capitals are not trusted: the specification's own example writes InjectedRadioActivityUnits."
    found = [v for k, v in side.items() if k.lower() == field.lower() and v not in (None, '', [], 'n/a')]
    if len(found) > 1: _refuse(field, f"is there {len(found)} times with different capitals", "keep the right one")
    return found[0] if found else None

def _number(side: dict, field: str, remedy: str, unit: str = 's') -> float:
    "A finite number."
    value = _get(side, field)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value): _refuse(field, f"is {'missing' if value is None else repr(value)}, expected a number in {unit}", remedy)
    return float(value)

_PREFIX = {'': 1., 'k': 1e3, 'M': 1e6, 'G': 1e9}

def _becquerels(side: dict, field: str, per: str, remedy: str) -> float:
    "How many Bq (per ml, for `per` '/mL') one unit of `field` is."
    value = str(_get(side, field) or '')
    match = re.fullmatch(rf"([kMG]?)Bq{per.replace('L', '[lL]')}", value)     # mBq is not MBq
    if not match: _refuse(field, f"is {value or 'missing'}, expected Bq{per}, kBq{per} or MBq{per}", remedy)
    return _PREFIX[match[1]]

COLUMNS = ('body_weight', 'weight', 'BodyWeight')
_KG = ('kg', 'kilogram', 'kilograms')

def _row(table: Path, key: str, value: str) -> tuple[float, str] | None:
    "The body weight of the row `key` = `value` of a BIDS table, and where it came from."
    if not table.exists(): return None
    with open(table, newline='', encoding='utf-8-sig') as f: rows = [r for r in csv.DictReader(f, delimiter='\t') if r.get(key) == value]
    found = [(c, r[c]) for r in rows for c in COLUMNS if r.get(c) not in (None, '', 'n/a')]
    if len({v for _, v in found}) > 1: _refuse(f'{found[0][0]} in {table.name}', f"has {len(found)} values for one {key}", "pass weight_kg=")
    if not found: return None
    column, text = found[0]
    about = table.with_suffix('.json')
    unit = (json.loads(about.read_text()).get(column) or {}).get('Units') if about.exists() else None
    if unit and str(unit).lower() not in _KG: _refuse(f'{column} in {table.name}', f"is in {unit}, expected kg", "pass weight_kg=")
    try: return float(text), f'{column} in {table.name}'
    except ValueError as e: raise BidsError(f"{column} in {table.name} is {text!r}, expected a number in kg. Remedy: pass weight_kg=.") from e

def _weight(side: dict, path: Path, given: float | None) -> tuple[float, str]:
    "Body weight in kg and where it came from."
    entity = lambda key: next((f'{key}-{v}' for v in re.findall(rf'(?:^|_){key}-([A-Za-z0-9]+)', path.name)), '')
    if given is not None: found = float(given), 'weight_kg given'
    elif _get(side, 'BodyWeight') is not None: found = _number(side, 'BodyWeight', 'pass weight_kg=', 'kg'), 'BodyWeight'
    else:
        tables = [(p/f"{entity('sub')}_sessions.tsv", 'session_id', entity('ses')) for p in path.parents[:3]] + [(p/'participants.tsv', 'participant_id', entity('sub')) for p in path.parents[:5]]
        found = next((w for t, k, v in tables if v and (w := _row(t, k, v))), None)
    if found is None: _refuse('body_weight', f"is neither in the sidecar nor in sessions.tsv or participants.tsv above {path.parent.name}", "pass weight_kg=")
    lo = WEIGHT_KG[0] if given is None else .01
    if not lo <= found[0] <= WEIGHT_KG[1]: _refuse(found[1], f"is {found[0]:g}, expected kg in {lo:g}..{WEIGHT_KG[1]:g}", "pass weight_kg=")
    return found

EARLIEST_S = -600.    # a dynamic scan may start some minutes before the injection, and its values be corrected to that

def _half_life(side: dict, given: float | None) -> tuple[float, str | None]:
    "Half-life in s and nuclide ('F-18') from TracerRadionuclide, checked against RadionuclideHalfLife (written by dcm2niix and by `write_bids`) where there is one."
    text = str(_get(side, 'TracerRadionuclide') or '')
    parts = re.findall(r'[A-Za-z]+', text), re.findall(r'\d+', text)
    nuclide = next((n for n in HALF_LIFE_S if [[n.split('-')[0].lower()], [n.split('-')[1]]] == [[p.lower() for p in parts[0]], parts[1]]), None)
    if given is not None: return float(given), nuclide
    if nuclide is None: _refuse('TracerRadionuclide', f"is {text or 'missing'}, known are {', '.join(n.replace('-', '') for n in HALF_LIFE_S)}", "pass half_life_s=")
    if _get(side, 'RadionuclideHalfLife') is None: return HALF_LIFE_S[nuclide], nuclide
    stated = _number(side, 'RadionuclideHalfLife', 'pass half_life_s=')
    if abs(stated/HALF_LIFE_S[nuclide] - 1) > .01: _refuse('RadionuclideHalfLife', f"is {stated:g} s but {nuclide} has {HALF_LIFE_S[nuclide]:g} s", "pass half_life_s= with the right one")
    return stated, nuclide

def _dose(side: dict, given: float | None) -> float:
    "Injected activity in Bq at InjectionStart."
    if given is not None: dose = float(given)
    else:
        mode = str(_get(side, 'ModeOfAdministration') or 'bolus').lower()
        if mode != 'bolus': _refuse('ModeOfAdministration', f"is {mode}: the activity did not enter at one moment", "pass dose_bq=, its equivalent at InjectionStart")
        dose = _number(side, 'InjectedRadioactivity', 'pass dose_bq= in Bq', 'InjectedRadioactivityUnits')*_becquerels(side, 'InjectedRadioactivityUnits', '', 'pass dose_bq= in Bq')
    if not DOSE_BQ[0] <= dose <= DOSE_BQ[1]: _refuse('InjectedRadioactivity', f"is {dose:g} Bq with its units, expected {DOSE_BQ[0]:g}..{DOSE_BQ[1]:g} Bq", "pass dose_bq= in Bq")
    return dose

def _frames(side: dict, field: str, n: int) -> np.ndarray:
    "A field with one number per frame, in s."
    value = _get(side, field)
    values = np.array(value if isinstance(value, list) else [] if value is None else [value], float)
    if len(values) != n: _refuse(field, f"has {len(values)} values for {n} frames", "complete it, one number per frame")
    return values

def _decay(side: dict, n: int, half_life: float) -> tuple[np.ndarray, str, str]:
    "Seconds from injection to the moment of the values of each of `n` frames, the rule, and the decay correction (as DICOM calls it)."
    injected, corrected = _number(side, 'InjectionStart', 'add it, in s from TimeZero'), _get(side, 'ImageDecayCorrected')
    if not isinstance(corrected, bool): _refuse('ImageDecayCorrected', f"is {'missing' if corrected is None else repr(corrected)}, expected true or false", "add it")
    if corrected:
        decay = np.full(n, _number(side, 'ImageDecayCorrectionTime', 'add it, in s from TimeZero: the moment that the values are corrected to') - injected)
        rule, mode = 'ImageDecayCorrectionTime - InjectionStart', 'ADMIN' if abs(decay[0]) < 1e-6 else 'START'
    else:
        decay = _frames(side, 'FrameTimesStart', n) - injected + mean_rate_s(_frames(side, 'FrameDuration', n), half_life)
        rule, mode = 'FrameTimesStart - InjectionStart + mean-rate time of each frame', 'NONE'
    if decay.min() < EARLIEST_S or decay.max() > MAX_HALF_LIVES*half_life:
        _refuse('InjectionStart', f"lies {decay.min():.0f} to {decay.max():.0f} s before the moment of the values, expected {EARLIEST_S:g} to {MAX_HALF_LIVES*half_life:.0f}", "check InjectionStart, ImageDecayCorrectionTime and FrameTimesStart: all count from TimeZero")
    return decay, rule, mode

OVERRIDES = ('weight_kg', 'dose_bq', 'half_life_s', 'uncorrected')

def suv_factors(side: dict, path, n: int = 1, **given) -> SUVProvenance:
    """The factor from stored values to SUVbw (g/ml) of each of `n` frames, with its reasons, from a BIDS-PET sidecar `side` and the tables above `path`.

    `given` overrides: weight_kg, dose_bq (Bq at InjectionStart), half_life_s, uncorrected=True to accept PET without attenuation correction. Raises `BidsError` naming field and remedy. Source: BIDS specification, Positron Emission Tomography."""
    path, given = Path(path), {k: v for k, v in given.items() if v is not None}
    if set(given) - set(OVERRIDES): raise BidsError(f"unknown override {sorted(set(given) - set(OVERRIDES))}; expected {', '.join(OVERRIDES)}")
    scale, method = _becquerels(side, 'Units', '/mL', "convert the image to Bq/mL"), _get(side, 'AttenuationCorrection')
    without = 'AttenuationCorrection is none' if str(method or '').lower() in ('none', 'no', 'false') else 'rec- entity says nac' if re.search(r'_rec-nac(dyn|stat)', path.name) else ''
    if without and not given.get('uncorrected'): raise BidsError(f"{without}: PET without attenuation correction has no valid SUV. Remedy: read the corrected image, or pass uncorrected=True for a phantom.")
    weight, told = _weight(side, path, given.get('weight_kg'))
    dose, (half_life, nuclide) = _dose(side, given.get('dose_bq')), _half_life(side, given.get('half_life_s'))
    decay, rule, mode = _decay(side, n, half_life)
    factor = 1000*weight/(dose*2**(-decay/half_life))*scale
    notes = (told, *([] if method else ['AttenuationCorrection is missing']))
    return SUVProvenance(tuple(factor.tolist()), str(_get(side, 'Units')), rule, weight, dose, nuclide, half_life, (float(decay.min()), float(decay.max())), mode, tuple(sorted(given)), notes)

def _image(path: Path) -> tuple[nib.Nifti1Image, int]:
    img = nib.load(path)
    if img.ndim not in (3, 4): raise BidsError(f"{path.name} has shape {img.shape}, expected three axes, or four with frames last. Remedy: squeeze it.")
    return img, 1 if img.ndim == 3 else img.shape[3]

def _suv_data(img, n: int, factor, side: dict, frame) -> np.ndarray:
    "SUVbw (x, y, z) float64 of one frame or of the mean over time."
    at = lambda i: np.asarray(img.dataobj if img.ndim == 3 else img.dataobj[..., i], np.float64)*factor[i]
    if n == 1: return at(0)
    if frame == 'mean':
        weights = _frames(side, 'FrameDuration', n)
        if not (weights > 0).all(): _refuse('FrameDuration', "holds durations that are not above 0", "correct it, or choose a frame")
        return sum(w*at(i) for i, w in enumerate(weights/weights.sum()))
    return at(frame)

def read_bids(path, frame: int | str | None = None, sidecar=None, **given) -> Volume:
    """A canonical `Volume` (D, H, W) in SUVbw from a `*_pet.nii.gz` and its `*_pet.json`, provenance in `meta['suv']` (as from DICOM, `SUVProvenance`).

    `frame`: of a dynamic scan the frame's number from 0, or 'mean' over time; None is refused there. `sidecar`: another JSON file. `given`: see `suv_factors`. The body weight may stand in sessions.tsv or participants.tsv.
    Raises `BidsError` naming field and remedy; nothing of the participant goes into `meta`. Source: BIDS specification, Positron Emission Tomography."""
    path = Path(path); sidecar = Path(sidecar) if sidecar else _stem(path).with_suffix('.json')
    if not sidecar.exists(): raise BidsError(f"{sidecar.name} is not beside {path.name}; SUV cannot be computed. Remedy: pass sidecar=.")
    side, (img, n) = json.loads(sidecar.read_text()), _image(path)
    if n > 1 and frame is None: raise BidsError(f"{path.name} holds {n} frames. Remedy: pass frame=0..{n-1}, or frame='mean' for the mean over time.")
    if frame not in (None, 'mean') and not (isinstance(frame, int) and 0 <= frame < n): raise BidsError(f"frame is {frame!r}, {path.name} holds {n} frames. Remedy: pass 0..{n-1} or 'mean'.")
    found = suv_factors(side, path, n, **given)
    data = _suv_data(img, n, found.factor, side, frame)
    meta = {'modality': 'PT', 'frames': n, 'frame': 0 if n == 1 else frame, 'suv': found.to_dict()}
    return Volume(data.transpose(2, 1, 0), (_FLIP @ img.affine)[:, [2, 1, 0, 3]], 'SUVbw', meta).canonical()

def _seconds(time) -> float | None:
    "Seconds of the day of a DICOM TM or of the time in a DT."
    match = re.match(r'(?:\d{8}(?=\d{4}))?(\d\d)(\d\d)(\d\d)?(\.\d+)?', re.sub('[: ]', '', str(time or '')))
    return float(match[1])*3600 + float(match[2])*60 + float(match[3] or 0) + float(match[4] or 0) if match else None

def _timing(source: SeriesInfo, suv: dict) -> dict:
    "TimeZero (= injection), ScanStart, FrameTimesStart and FrameDuration in s; the frame spans all bed positions."
    tracer = (source.headers[0].get('RadiopharmaceuticalInformationSequence') or [{}])[0]
    injected = _seconds(tracer.get('RadiopharmaceuticalStartTime') or tracer.get('RadiopharmaceuticalStartDateTime'))
    beds = [(_seconds(h.get('AcquisitionTime')), h.get('ActualFrameDuration')) for h in source.headers]
    for keyword, known in (('RadiopharmaceuticalStartTime', injected is not None), ('AcquisitionTime', all(t is not None for t, _ in beds)), ('ActualFrameDuration', all(d not in (None, '') for _, d in beds))):
        if not known: _refuse(tag_name(keyword), "is missing; BIDS requires the times that follow from it", "complete the headers")
    after = [(t - injected) % 86400 for t, _ in beds]                    # past midnight it is the next day
    start = suv['decay_s'][0] if suv['decay_correction'] == 'START' else min(after)
    length = max(a + float(d)/1000 for a, (_, d) in zip(after, beds)) - min(after)
    clock = f'{int(injected)//3600:02}:{int(injected)//60 % 60:02}:{int(injected) % 60:02}'
    return dict(TimeZero=clock, InjectionStart=0, ScanStart=start, FrameTimesStart=[start], FrameDuration=[length])

def write_bids(vol: Volume, path, source: SeriesInfo, administration: str = 'bolus') -> Path:
    """Write a PET `vol` (SUVbw, read from the DICOM `source`) as `*_pet.nii.gz` in Bq/mL with its BIDS-PET sidecar; `read_bids` gives the same SUV.

    Values stay corrected to the moment of the DICOM series; a series without decay correction is written corrected to the injection. `administration`: DICOM does not say it, SUV presumes a bolus. Clock time of the injection is written
    (TimeZero), no date and no identifier. Raises `BidsError` for another unit or file name, and where dose, weight or nuclide are not known (SUV made by the scanner) or times are missing."""
    path = Path(path); suv = vol.meta.get('suv') or {}
    if vol.unit != 'SUVbw' or not path.name.endswith(('_pet.nii.gz', '_pet.nii')): raise BidsError(f"expected a volume in SUVbw and a name ending in _pet.nii.gz, found {vol.unit} and {path.name}. Remedy: read the PET with read_series.")
    missing = [k for k in ('dose_bq', 'weight_kg', 'nuclide', 'half_life_s', 'decay_s') if not suv.get(k)]
    if missing: raise BidsError(f"meta['suv'] lacks {', '.join(missing)} ({suv.get('rule', 'no SUV record')}): activity cannot be recovered from SUV. Remedy: read a series in BQML.")
    text = lambda keyword: str(source.headers[0].get(keyword) or 'n/a')
    tracer = (source.headers[0].get('RadiopharmaceuticalInformationSequence') or [{}])[0]
    moment = suv['decay_s'][0] if suv['decay_correction'] == 'START' else 0.
    side = dict(Manufacturer=text('Manufacturer'), ManufacturersModelName=text('ManufacturerModelName'), Units='Bq/mL', TracerName=str(tracer.get('Radiopharmaceutical') or 'n/a'), TracerRadionuclide=suv['nuclide'].replace('-', ''),
                RadionuclideHalfLife=suv['half_life_s'], InjectedRadioactivity=suv['dose_bq']/1e6, InjectedRadioactivityUnits='MBq', InjectedMass='n/a', InjectedMassUnits='n/a', SpecificRadioactivity='n/a', SpecificRadioactivityUnits='n/a',
                ModeOfAdministration=administration, BodyWeight=suv['weight_kg'], AcquisitionMode='n/a', ImageDecayCorrected=True, ImageDecayCorrectionTime=moment, ReconMethodName=text('ReconstructionMethod'), ReconMethodParameterLabels=['n/a'],
                ReconMethodParameterUnits=['n/a'], ReconMethodParameterValues=['n/a'], ReconFilterType=text('ConvolutionKernel'), AttenuationCorrection=text('AttenuationCorrectionMethod')) | _timing(source, suv)
    factor = 1000*suv['weight_kg']/(suv['dose_bq']*2**(-moment/suv['half_life_s']))
    _atomic(_stem(path).with_suffix('.json'), lambda p: p.write_text(json.dumps(side, indent=1)))
    return write_nifti(vol.replace(data=(vol.data.astype(np.float64)/factor).astype(np.float32), unit='Bq/ml', meta={}), path)
