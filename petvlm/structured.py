from __future__ import annotations
import copy, hashlib, json, uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
import highdicom as hd
import numpy as np
import pydicom
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from petvlm import __version__
from petvlm.dicom import DicomError, SeriesInfo, tag_name
from petvlm.findings import KINDS, ORGANS, UPTAKES, Finding
from petvlm.lesions import Lesion
from petvlm.volume import Volume, _atomic

class StructuredError(DicomError): "Labels or measurements that cannot be written to DICOM, or an object that holds none; the message says what was found, expected and what to do."

def content_uid(*parts) -> str:
    "A valid UID (2.25 + UUID, PS3.5 B.2) that depends on the content of `parts` (bytes, text, numbers) only."
    digest = hashlib.sha256(b'\0'.join(p if isinstance(p, bytes) else str(p).encode() for p in parts)).hexdigest()
    return f'2.25.{uuid.uuid5(uuid.NAMESPACE_OID, digest).int}'

SCHEME = '99PETVLM'     # private coding scheme: code value = this project's own word, e.g. 'lytic' (PS3.16, section 8: 99 marks a private scheme)
_SNOMED = dict(brain='Brain', nasopharynx='Nasopharynx', thyroid='Thyroid', cervical_node='CervicalLymphNode', supraclavicular_node='SupraclavicularLymphNode', lung='Lung', pleura='Pleura',
               mediastinal_node='MediastinalLymphNode', hilar_node='HilarLymphNode', axillary_node='AxillaryLymphNode', esophagus='Esophagus', aorta='Aorta', rib='Rib', thoracic_spine='ThoracicSpine',
               liver='Liver', spleen='Spleen', gallbladder='Gallbladder', adrenal='AdrenalGland', kidney='Kidney', colon='Colon', retroperitoneal_node='RetroperitonealLymphNode', iliac_node='IliacLymphNode',
               inguinal_node='InguinalLymphNode', lumbar_spine='LumbarSpine', iliac_bone='Ilium', sinus='ParanasalSinus', pharynx='Pharynx', tongue='Tongue', larynx='Larynx', jaw='JawRegion',
               cervical_spine='CervicalSpine', heart='Heart', pericardium='Pericardium', breast='Breast', sternum='Sternum', scapula='Scapula', clavicle='Clavicle', chest_wall='ChestWall', stomach='Stomach',
               bowel='SmallIntestine', rectum='Rectum', pancreas='Pancreas', peritoneum='PeritoneumSerousMembraneStructure', bladder='Bladder', uterus='Uterus', ovary='Ovary', prostate='Prostate',
               sacrum='Sacrum', femur='Femur', nodule='Nodule', mass='Mass', effusion='Effusion', cyst='Cyst')

def _coded(words: dict) -> MappingProxyType:
    "Word -> code: SNOMED CT where the dictionary has that very term, else the private scheme."
    return MappingProxyType({k: getattr(codes.SCT, _SNOMED[k]) if k in _SNOMED else Code(k, SCHEME, meaning) for k, meaning in words.items()})

ORGAN_CODES, KIND_CODES = _coded({k: o.en for k, o in ORGANS.items()}), _coded({k: v.en for k, v in KINDS.items()})
UPTAKE_CODES = _coded(dict(zip(UPTAKES, ('no increased uptake', 'increased uptake', 'uptake not stated'))))
SIDE_CODES = MappingProxyType({'left': codes.SCT.Left, 'right': codes.SCT.Right})

_SUV, _MM, _ONE = codes.UCUM.StandardizedUptakeValueBodyWeight, codes.UCUM.Millimeter, codes.UCUM.NoUnits
_GRAM = Code('g', 'UCUM', 'gram')
def _private(value: str, meaning: str, unit: Code) -> tuple: return Code(value, SCHEME, meaning), None, unit

# field of Lesion or Finding -> concept name, derivation, unit; 1 cm3 = 1 ml
NUMBERS = MappingProxyType({
    'lesion.suvmax': (codes.DCM.Suvbw, codes.SCT.Maximum, _SUV), 'lesion.suvpeak': (codes.DCM.Suvbw, codes.DCM.PeakValueWithinROI, _SUV), 'lesion.suvmean': (codes.DCM.Suvbw, codes.SCT.Mean, _SUV),
    'lesion.mtv_ml': (codes.DCM.MetabolicVolume, None, codes.UCUM.CubicCentimeter), 'lesion.tlg': (codes.DCM.TotalLesionGlycolysis, None, _GRAM), 'lesion.longest_mm': (codes.IBSI.Maximum3DDiameterOfAMesh, None, _MM),
    **{f'lesion.center_mm.{i}': _private(f'CENTROID_{a}', f'centroid, LPS {a.lower()}', _MM) for i, a in enumerate('XYZ')},
    **{f'lesion.peak.{i}': _private(f'HOTTEST_{a}', f'hottest voxel, index {a.lower()}', _ONE) for i, a in enumerate('DHW')},
    'finding.size_mm': (codes.SCT.Diameter, None, _MM), 'finding.suvmax': (codes.DCM.StandardizedUptakeValue, codes.SCT.Maximum, _SUV),
    'finding.slice': _private('REPORT_SLICE', 'slice as reported, index d', _ONE),
    **{f'finding.span.{i}': _private(f'TEXT_{a}', f'{a.lower()} in the text, characters', _ONE) for i, a in enumerate(('START', 'END'))},
    **{f'finding.center_mm.{i}': _private(f'REPORT_{a}', f'place as reported, LPS {a.lower()}', _MM) for i, a in enumerate('XYZ')}})

def _flat(prefix: str, record: dict) -> dict[str, float]:
    "The numbers of a Lesion's or Finding's dictionary under the keys of `NUMBERS`; None left out."
    pairs = {k: v for field, value in record.items() for k, v in ({f'{field}.{i}': x for i, x in enumerate(value)} if isinstance(value, (tuple, list)) else {field: value}).items()}
    return {f'{prefix}.{k}': v for k, v in pairs.items() if f'{prefix}.{k}' in NUMBERS and v is not None}

def _nested(prefix: str, numbers: dict) -> dict:
    "The inverse of `_flat`: indices and characters whole, triples together."
    whole = lambda k, v: int(v) if NUMBERS[k][2] == _ONE else v
    mine = {k.split('.', 1)[1]: whole(k, v) for k, v in numbers.items() if k.startswith(f'{prefix}.')}
    fields = dict.fromkeys(k.split('.')[0] for k in mine)
    return {f: mine[f] if f in mine else tuple(mine[f'{f}.{i}'] for i in range(sum(k.startswith(f'{f}.') for k in mine))) for f in fields}

_DATES = ('Series', 'Acquisition', 'Content', 'Study')

def _stamp(source: SeriesInfo) -> tuple[str, str]:
    "Date and time of the source series, for every date in what is derived from it."
    ds = source.headers[0]
    for kind in _DATES:
        if ds.get(f'{kind}Date'): return str(ds.get(f'{kind}Date')), str(ds.get(f'{kind}Time') or '000000')
    raise StructuredError(f"the source series has none of {', '.join(tag_name(k + 'Date') for k in _DATES)}; the standard requires a date in what is derived from it. Keep one date when de-identifying (shifted if need be)")

_MAY_BE_EMPTY = ('PatientName', 'PatientID', 'PatientBirthDate', 'PatientSex', 'StudyID', 'StudyDate', 'StudyTime', 'AccessionNumber', 'ReferringPhysicianName')   # type 2: must be there, empty = unknown

def _sources(source: SeriesInfo) -> list[pydicom.Dataset]:
    "The headers of the source; what de-identification took away but the standard wants present is empty in them."
    headers = []
    for h in source.headers:
        absent = [k for k in _MAY_BE_EMPTY if k not in h]
        if absent: h = copy.deepcopy(h); h.update(dict.fromkeys(absent, ''))
        headers.append(h)
    return headers

def _settle(ds: pydicom.Dataset, source: SeriesInfo) -> pydicom.Dataset:
    "`ds` without anything that depends on the moment or the run."
    date, time = _stamp(source)
    for kind in ('InstanceCreation', 'Content', 'Series'): setattr(ds, f'{kind}Date', date); setattr(ds, f'{kind}Time', time)
    for where in (*(ds.get('DimensionOrganizationSequence') or []), *(ds.get('DimensionIndexSequence') or [])):
        if 'DimensionOrganizationUID' in where: where.DimensionOrganizationUID = content_uid('dimensions', ds.SOPInstanceUID)
    for tool in ds.get('ContributingEquipmentSequence') or []:
        if 'ContributionDateTime' in tool: tool.ContributionDateTime = date + time
    scheme = pydicom.Dataset(); scheme.update({'CodingSchemeDesignator': SCHEME, 'CodingSchemeName': 'petvlm: words without a standard code', 'CodingSchemeResponsibleOrganization': 'petvlm'})
    ds.CodingSchemeIdentificationSequence = [*(ds.get('CodingSchemeIdentificationSequence') or []), scheme]
    ds.file_meta.ImplementationClassUID, ds.file_meta.ImplementationVersionName = content_uid('petvlm', 'implementation'), 'PETVLM'
    return ds

def _write(ds: pydicom.Dataset, path) -> Path:
    path = Path(path); _atomic(path, lambda p: ds.save_as(p, enforce_file_format=True, implicit_vr=False, little_endian=True))
    return path

def _equipment() -> dict: return dict(manufacturer='petvlm', manufacturer_model_name='petvlm', software_versions=__version__, device_serial_number='0', specific_character_set='ISO_IR 192')   # UTF-8: names are copied in any script

@lru_cache
def _by_code(kind: str) -> dict[tuple[str, str], str]:
    "(scheme, value) -> word."
    table = {'organ': ORGAN_CODES, 'kind': KIND_CODES, 'uptake': UPTAKE_CODES, 'side': SIDE_CODES}[kind]
    return {(c.scheme_designator, c.value): word for word, c in table.items()}

def _check_labels(labels: Volume, source: SeriesInfo) -> int:
    "The highest label. Raises `StructuredError` where labels and source series do not fit."
    if labels.unit != 'label': raise StructuredError(f"labels have unit {labels.unit}, expected 'label'; pass the label volume, not the image")
    corners = []
    for h in source.headers:
        row, col = np.array(h.ImageOrientationPatient, float).reshape(2, 3)
        for y in (0, h.Rows - 1):
            for x in (0, h.Columns - 1): corners.append(np.array(h.ImagePositionPatient, float) + col*y*float(h.PixelSpacing[0]) + row*x*float(h.PixelSpacing[1]))
    at = labels.index(corners)
    if abs(at - np.rint(at)).max() > .02 or (np.rint(at.min(0)) != 0).any() or (np.rint(at.max(0)) != np.array(labels.shape) - 1).any():
        raise StructuredError(f"labels of {labels.shape} voxels do not lie on the grid of the source series ({len(source)} slices of {source.headers[0].Rows} x {source.headers[0].Columns}); resample(labels, like=read_series(source)) first")
    present = [int(k) for k in np.unique(labels.data) if k]
    if not present or present != list(range(1, len(present) + 1)): raise StructuredError(f"labels are {present}, expected 1..n without a gap (PS3.3 C.8.20.2); number them anew before measuring, so that report and segments agree")
    return len(present)

def _describe(k: int, name: str, finding: Finding | None, uid: str, algorithm: str) -> hd.seg.SegmentDescription:
    "One segment: what it is, where, who drew it."
    how = hd.AlgorithmIdentificationSequence('petvlm', codes.cid7162.NeighborhoodAnalysis, __version__) if algorithm != 'MANUAL' else None
    kind = KIND_CODES[finding.kind] if finding else codes.SCT.Lesion
    if kind.scheme_designator == SCHEME: kind = codes.SCT.Lesion         # CID 7151 knows no closer type
    d = hd.seg.SegmentDescription(k, name[:64], codes.SCT.MorphologicallyAbnormalStructure, kind, algorithm, how, tracking_uid=uid, tracking_id=name, anatomic_regions=[ORGAN_CODES[finding.organ]] if finding else None)
    if finding and finding.side: d.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [hd.sr.CodedConcept.from_code(SIDE_CODES[finding.side])]
    return d

def write_seg(labels: Volume, source: SeriesInfo, path, names=None, findings=None, kind: str = 'BINARY', algorithm: str = 'AUTOMATIC') -> Path:
    """Write the lesions of `labels` (D, H, W; 1..n) as one DICOM SEG, segment k = label k; the same input gives the same bytes.

    `source`: the PET series that was segmented (its headers are referred to). `names`: n tracking identifiers, by default 'lesion k'. `findings`: n `Finding` or None, for anatomic region, side and type.
    `kind`: 'BINARY' or 'LABELMAP'. `algorithm`: 'AUTOMATIC', 'SEMIAUTOMATIC' or 'MANUAL'. **Patient and study identifiers are copied from the source headers, as the standard demands of clinical objects.** Dates are the source series'.
    Raises `StructuredError` for labels on another grid or with gaps, a wrong number of names, a source without a date. Source: PS3.3 A.51, C.8.20; written by highdicom."""
    n = _check_labels(labels, source); _stamp(source)
    names, findings = list(names or (f'lesion {k}' for k in range(1, n + 1))), list(findings or [None]*n)
    if len(names) != n or len(findings) != n or len(set(names)) != n: raise StructuredError(f"{n} labels, {len(names)} names ({len(set(names))} different), {len(findings)} findings; expected one of each per label")
    if kind not in ('BINARY', 'LABELMAP'): raise StructuredError(f"kind is {kind!r}, expected 'BINARY' or 'LABELMAP'")
    about = json.dumps([kind, algorithm, __version__, names, [f and f.to_dict() for f in findings]])
    sop = content_uid('seg', source.uid, source.frame, labels.data.astype('<u2').tobytes(), np.round(labels.affine, 6).tobytes(), about)
    segments = [_describe(k, name, f, content_uid('lesion', sop, k), algorithm) for k, (name, f) in enumerate(zip(names, findings), 1)]
    pixels = hd.Volume(labels.data.astype(np.uint16 if n > 255 else np.uint8), labels.affine, coordinate_system='PATIENT', frame_of_reference_uid=source.frame)
    seg = hd.seg.Segmentation(_sources(source), pixels, kind, segments, content_uid('series', sop), 1000, sop, 1, content_label='LESIONS', series_description='petvlm lesions', **_equipment())
    return _write(_settle(seg, source), path)

@dataclass(frozen=True)
class Entry:
    "One row of a measurement report: its tracking identifier `name`, the `lesion` measured (its label is the SEG segment), the `finding` stated, either or both."
    name: str
    lesion: Lesion | None = None
    finding: Finding | None = None

    def __post_init__(self):
        if self.lesion is None and self.finding is None: raise StructuredError(f"entry {self.name!r} holds neither lesion nor finding")
        if not 0 < len(self.name) <= 64: raise StructuredError(f"entry name has {len(self.name)} characters, expected 1 to 64")

def _measurements(entry: Entry) -> list[hd.sr.Measurement]:
    values = (_flat('lesion', entry.lesion.to_dict()) if entry.lesion else {}) | (_flat('finding', entry.finding.to_dict()) if entry.finding else {})
    return [hd.sr.Measurement(name=NUMBERS[k][0], value=v, unit=NUMBERS[k][2], derivation=NUMBERS[k][1]) for k, v in values.items()]

UPTAKE = Code('UPTAKE', SCHEME, 'uptake')

def _segment(seg, number: int) -> hd.sr.ReferencedSegment:
    "The reference to a segment; frames of a label map belong to no single segment, so there the source series stands for the source images."
    if seg.SegmentationType != 'LABELMAP': return hd.sr.ReferencedSegment.from_segmentation(seg, number)
    series = hd.sr.SourceSeriesForSegmentation(seg.ReferencedSeriesSequence[0].SeriesInstanceUID)
    return hd.sr.ReferencedSegment(seg.SOPClassUID, seg.SOPInstanceUID, number, source_series=series)

def _group(entry: Entry, seg, uids: dict, sop: str):
    "The measurement group of one entry."
    f = entry.finding
    common = dict(measurements=_measurements(entry), finding_type=KIND_CODES[f.kind] if f else codes.SCT.Lesion,
                  finding_sites=[hd.sr.FindingSite(ORGAN_CODES[f.organ], laterality=SIDE_CODES.get(f.side))] if f else None, qualitative_evaluations=[hd.sr.QualitativeEvaluation(UPTAKE, UPTAKE_CODES[f.uptake])] if f else None)
    if entry.lesion is None: return hd.sr.MeasurementsAndQualitativeEvaluations(tracking_identifier=hd.sr.TrackingIdentifier(content_uid('finding', sop, entry.name), entry.name), **common)
    tracking = hd.sr.TrackingIdentifier(uids[entry.lesion.label], entry.name)
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(tracking, referenced_segment=_segment(seg, entry.lesion.label), **common)

def write_sr(entries: list[Entry], source: SeriesInfo, path, seg=None) -> Path:
    """Write `entries` as a DICOM structured report, TID 1500 (Comprehensive 3D SR); the same input gives the same bytes.

    `source`: the PET series measured. `seg`: the file of `write_seg` for the same series, needed where an entry has a lesion: its segment number is the lesion's label. SUV in g/ml, volume in cm3 (= ml), TLG in g, lengths in mm (UCUM).
    **Patient and study identifiers are copied from the source headers, as the standard demands of clinical objects.** Dates are the source series'; the report is marked unverified. Raises `StructuredError` for no entries, equal names,
    a lesion without its segment, a SEG of another study. Source: PS3.16 TID 1500, 1411, 1501, CID 7466; PS3.3 A.35.13; written by highdicom."""
    entries = list(entries); names = [e.name for e in entries]; _stamp(source)
    if not entries or len(set(names)) < len(names): raise StructuredError(f"{len(entries)} entries with {len(set(names))} different names; expected at least one, each with its own name")
    seg = None if seg is None else hd.seg.segread(seg)
    if seg is not None and (str(seg.StudyInstanceUID), str(seg.FrameOfReferenceUID)) != (source.study, source.frame): raise StructuredError("the SEG belongs to another study or frame of reference than the source series; write it from this series")
    uids = {} if seg is None else {int(s.SegmentNumber): str(s.TrackingUID) for s in seg.SegmentSequence if s.get('TrackingUID')}
    absent = [e.name for e in entries if e.lesion and e.lesion.label not in uids]
    if absent: raise StructuredError(f"entries {absent} have no segment with a tracking UID ({'no SEG given' if seg is None else f'segments {sorted(uids)}'}); pass seg= as written by write_seg")
    sop = content_uid('sr', source.uid, '' if seg is None else seg.SOPInstanceUID, __version__, json.dumps([[e.name, e.lesion and e.lesion.to_dict(), e.finding and e.finding.to_dict()] for e in entries]))
    observer = hd.sr.ObserverContext(codes.DCM.Device, hd.sr.DeviceObserverIdentifyingAttributes(content_uid('petvlm', 'device'), name='petvlm', model_name=__version__))
    report = hd.sr.MeasurementReport(hd.sr.ObservationContext(observer_device_context=observer), codes.LN.PETUnspecifiedBodyRegion, [_group(e, seg, uids, sop) for e in entries], codes.DCM.ImagingMeasurementReport)
    evidence = [*([seg] if seg is not None else []), *_sources(source)]
    sr = hd.sr.Comprehensive3DSR(evidence, report, content_uid('series', sop), 1001, sop, 1, is_complete=True, series_description='petvlm measurements', **_equipment())
    return _write(_settle(sr, source), path)

def _concept(items) -> tuple[str, str] | None: return (str(items[0].CodingSchemeDesignator), str(items[0].get('CodeValue') or items[0].get('LongCodeValue'))) if items else None
def _is(item, code: Code) -> bool: return _concept(item.get('ConceptNameCodeSequence')) == (code.scheme_designator, code.value)
def _children(item) -> list: return list(item.get('ContentSequence') or [])
def _value(item) -> tuple[str, str] | None: return _concept(item.get('ConceptCodeSequence'))

def _number(item) -> float:
    value = item.MeasuredValueSequence[0]
    return float(value.FloatingPointValue) if 'FloatingPointValue' in value else float(value.NumericValue)

@lru_cache
def _number_keys() -> dict: return {tuple((c.scheme_designator, c.value) if c else None for c in (name, derivation)): k for k, (name, derivation, _) in NUMBERS.items()}

def _finding(group, numbers: dict, name: str) -> Finding | None:
    "The finding of a group, or None where it is only a lesion."
    by = {label: next((i for i in group if _is(i, code)), None) for label, code in (('kind', codes.DCM.Finding), ('organ', codes.SCT.FindingSite), ('uptake', UPTAKE))}
    if by['kind'] is None or _value(by['kind']) == ('SCT', codes.SCT.Lesion.value): return None
    words = {label: _by_code(label).get(_value(item)) if item is not None else None for label, item in by.items()}
    if None in words.values(): raise StructuredError(f"group {name!r}: {[k for k, v in words.items() if v is None]} missing or with a code that is none of this project's words; the report was written by another program")
    side = next((_by_code('side').get(_value(i)) for i in _children(by['organ']) if _is(i, codes.SCT.Laterality)), '')
    return Finding(side=side, **words, **_nested('finding', numbers))

def _entry(group) -> Entry:
    "One measurement group as an `Entry`."
    name = next((str(i.TextValue) for i in group if _is(i, codes.DCM.TrackingIdentifier)), '')
    numbers = {}
    for i in group:
        if i.ValueType != 'NUM': continue
        key = _number_keys().get((_concept(i.ConceptNameCodeSequence), next((_value(c) for c in _children(i) if _is(c, codes.DCM.Derivation)), None)))
        if key: numbers[key] = _number(i)
    segment = next((i.ReferencedSOPSequence[0] for i in group if i.ValueType == 'IMAGE' and _is(i, codes.DCM.ReferencedSegment)), None)
    lesion = None
    if segment is not None:
        lacking = [k for k in NUMBERS if k.startswith('lesion.') and k not in numbers]
        if lacking: raise StructuredError(f"group {name!r} lacks {', '.join(NUMBERS[k][0].meaning for k in lacking)}; the report was written by another program, measure its segments with petvlm.lesions.measure")
        lesion = Lesion(int(np.atleast_1d(segment.ReferencedSegmentNumber)[0]), **_nested('lesion', numbers))
    return Entry(name, lesion, _finding(group, numbers, name))

def read_sr(path) -> list[Entry]:
    """The entries of a structured report (TID 1500) written by `write_sr`, in its order, every number as it was.

    Raises `StructuredError` for another kind of object or template, and for groups that lack what an `Entry` holds. Source: PS3.16 TID 1500."""
    ds = pydicom.dcmread(path)
    template = (ds.get('ContentTemplateSequence') or [{}])[0].get('TemplateIdentifier')
    if ds.get('Modality') != 'SR' or template != '1500': raise StructuredError(f"{Path(path).name} is {ds.get('Modality') or 'no modality'} with template {template or 'none'}, expected SR with TID 1500")
    groups = [g for i in _children(ds) if _is(i, codes.DCM.ImagingMeasurements) for g in _children(i) if _is(g, codes.DCM.MeasurementGroup)]
    if not groups: raise StructuredError(f"{Path(path).name} holds no measurement group")
    return [_entry(_children(g)) for g in groups]
