from __future__ import annotations
import logging
from collections import defaultdict
from pathlib import Path
import numpy as np
import pydicom
from petvlm.dicom import TOLERANCE_MM, DicomError, SeriesInfo, tag_name
from petvlm.volume import Volume, resample

log = logging.getLogger(__name__)

class MaskError(DicomError): "Contours or segments that do not fit the image; the message gives names and numbers and what to do."

class Masks(dict):
    "Label volumes (0, 1) by name, with `skipped`: why a name has none."
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs); self.skipped: dict[str, str] = {}

def _check_frame(found, frame: SeriesInfo | str | None, name: str) -> str:
    "'checked' or 'not checked' (`frame` None). Raises `MaskError` for another FrameOfReferenceUID; the UIDs stay out of the message."
    if frame is None: return 'not checked'
    wanted = frame.frame if isinstance(frame, SeriesInfo) else str(frame)
    if found and str(found) == wanted: return 'checked'
    raise MaskError(f"{name}: {tag_name('FrameOfReferenceUID')} {'is not the image' + chr(39) + 's' if found else 'is missing'}: drawn in another patient position. "
                    "Take the masks of this very series, or pass frame=None if you know that both share one position")

def even_odd(polygon, shape) -> np.ndarray:
    """Pixels (H, W) whose centre lies inside `polygon` (n, 2) = (h, w) in pixels, closed, by the even-odd rule.

    Half open: a centre on an upper (low h) or left (low w) edge is inside, on a lower or right edge outside. A channel run to and fro (keyhole) cancels."""
    p = np.round(np.asarray(polygon, float), 6)
    q = np.roll(p, -1, 0)
    p, q = p[p[:, 0] != q[:, 0]], q[p[:, 0] != q[:, 0]]                       # horizontal edges cross no row
    down = (p[:, 0] < q[:, 0])[:, None]
    lo, hi = np.where(down, p, q), np.where(down, q, p)                        # each edge from low h to high h: to and fro are the same numbers
    first, last = (np.clip(np.ceil(e[:, 0]), 0, shape[0]).astype(int) for e in (lo, hi))
    n = last - first                                                           # rows lo <= h < hi
    edge = np.repeat(np.arange(len(n)), n)
    row = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n) + first[edge]
    slope = (hi - lo)[:, 1] / (hi - lo)[:, 0]
    col = np.clip(np.ceil(np.round(lo[edge, 1] + (row - lo[edge, 0])*slope[edge], 6)), 0, shape[1]).astype(int)   # pixels w < col lie left of the crossing
    crossings = np.zeros((shape[0], shape[1] + 1), np.int32)
    np.add.at(crossings, (row, col), 1)
    return np.cumsum(crossings[:, ::-1], 1)[:, ::-1][:, 1:] % 2 == 1

OVERLAPS = {'xor': np.logical_xor.reduce, 'union': np.logical_or.reduce}

def _combine(parts: list, polygons: list, xor: bool, overlap: str | None, what: str) -> np.ndarray:
    "The pixels of all contours `parts` of one plane together."
    if xor or len(parts) == 1: return OVERLAPS['xor'](parts)
    for i, a in enumerate(parts):
        for j in range(i):
            b, shared = parts[j], int((a & parts[j]).sum())
            same = len(polygons[i]) == len(polygons[j]) and np.allclose(polygons[i], polygons[j])
            if not shared or (not same and shared in (a.sum(), b.sum())): continue        # apart, or one inside the other
            if overlap is None: raise MaskError(f"{what}: contours {j} and {i} overlap in {shared} of {int(b.sum())} and {int(a.sum())} voxels; union or hole? Pass overlap='union' or 'xor'")
            return OVERLAPS[overlap](parts)
    return OVERLAPS['xor'](parts)

def _gaps(like: Volume) -> np.ndarray:
    "Distance in mm between neighbouring index planes along (d, h, w); unlike `spacing` also right when the affine is sheared."
    return 1 / np.linalg.norm(np.linalg.inv(like.affine[:3, :3]), axis=1)

def _levels(contours: list, like: Volume, tolerance_mm: float, what: str) -> tuple[int, np.ndarray, float]:
    "The index axis along which all `contours` (n, 3) (index) are flat, the slice of each, and how far in mm the worst lies beside its slice."
    gaps = _gaps(like)
    spread = np.max([np.ptp(c, axis=0) for c in contours], axis=0) * gaps
    axis = int(spread.argmin())
    if spread[axis] > 2*tolerance_mm: raise MaskError(f"{what}: contours rise by up to {spread[axis]:.2f} mm across the planes of the grid, tolerance {2*tolerance_mm:g} mm; read them onto the image that they were drawn on and resample() the mask")
    level = np.array([c[:, axis].mean() for c in contours]); slices = np.rint(level).astype(int)
    off = abs(level - slices) * gaps[axis]
    if (off > tolerance_mm).any():
        raise MaskError(f"{what}: {(off > tolerance_mm).sum()} of {len(off)} contours lie up to {off.max():.2f} mm beside the nearest slice, tolerance {tolerance_mm:g} mm; read them onto the image that they were drawn on and resample() the mask")
    for k in np.unique(slices):
        if np.ptp(level[slices == k])*gaps[axis] > 2*TOLERANCE_MM: raise MaskError(f"{what}: contours of planes {np.ptp(level[slices == k])*gaps[axis]:.2f} mm apart fall on one slice ({k}); the grid is coarser than the drawing: lower tolerance_mm, or read onto the finer image")
    return axis, slices, float(off.max())

def _clipped(contours: list, axis: int, slices, shape) -> np.ndarray:
    "Which contours leave the grid, beyond the outer edge of its outer voxels."
    beyond = [((c < -.5 - 1e-6) | (c > np.array(shape) - .5 + 1e-6)).any(0) for c in contours]
    return np.array([b[[a for a in range(3) if a != axis]].any() for b in beyond]) | (slices < 0) | (slices >= shape[axis])

def _fill(points: list, like: Volume, xor: bool, tolerance_mm: float, overlap: str | None, clip: bool, what: str) -> tuple[np.ndarray, dict]:
    "Voxels (D, H, W) inside the contours `points` (n, 3) in mm of one ROI, and the numbers about it."
    contours = [like.index(p) for p in points if len(p) > 2]
    if not contours: raise MaskError(f"{what}: no contour has three points; nothing is enclosed")
    axis, slices, off = _levels(contours, like, tolerance_mm, what)
    cut = _clipped(contours, axis, slices, like.shape)
    if cut.any() and not clip: raise MaskError(f"{what}: {cut.sum()} of {len(cut)} contours leave the grid of {like.shape} voxels; check that image and contours belong together, or pass clip=True")
    data = np.zeros(like.shape, np.uint8)
    plane = [a for a in range(3) if a != axis]
    for k in np.unique(slices[(slices >= 0) & (slices < like.shape[axis])]):
        polygons = [c[:, plane] for c, s in zip(contours, slices) if s == k]
        parts = [even_odd(p, [like.shape[a] for a in plane]) for p in polygons]
        np.moveaxis(data, axis, 0)[k] = _combine(parts, polygons, xor, overlap, f"{what}, slice {k}")
    return data, {'contours': len(points), 'slices': len(np.unique(slices)), 'off_slice_mm': round(off, 4), 'clipped': int(cut.sum()), 'degenerate': len(points) - len(contours)}

CLOSED = ('CLOSED_PLANAR', 'CLOSEDPLANAR_XOR')

def _open(path, modality: str) -> pydicom.Dataset:
    ds = pydicom.dcmread(path)
    if ds.get('Modality') != modality: raise MaskError(f"{Path(path).name}: {tag_name('Modality')} is {ds.get('Modality') or 'missing'}, expected {modality}")
    return ds

def _unique_name(name: str, number: int, taken) -> str: return name if name and name not in taken else f'{name} #{number}'.strip()

def _rois(ds) -> dict[str, tuple[str, list]]:
    "ROI name -> (FrameOfReferenceUID, contour items)."
    contours = {int(c.ReferencedROINumber): list(c.get('ContourSequence') or []) for c in ds.get('ROIContourSequence') or []}
    found = {}
    for roi in ds.get('StructureSetROISequence') or []:
        found[_unique_name(str(roi.get('ROIName') or ''), int(roi.ROINumber), found)] = (roi.get('ReferencedFrameOfReferenceUID'), contours.get(int(roi.ROINumber), []))
    return found

def read_rtstruct(path, like: Volume, frame: SeriesInfo | str | None, rois=None, tolerance_mm: float = TOLERANCE_MM, overlap: str | None = None, clip: bool = False) -> Masks:
    """The ROIs of an RTSTRUCT as label volumes (0, 1) on the grid of `like` (D, H, W), by ROI name; `.skipped` says why others have none.

    A voxel is inside when its centre is, by the even-odd rule (see `even_odd`). `frame`: the `SeriesInfo` that `like` was read from or its FrameOfReferenceUID, None = do not check.
    `rois`: only these names. `tolerance_mm`: how far a contour may lie beside its slice. `overlap`: 'union' or 'xor' for CLOSED_PLANAR contours that overlap partly. `clip`: cut off at the grid what leaves it.
    Raises `MaskError` for another frame of reference, contours beside or across the slices, outside the grid, of doubtful overlap, open or mixed, and for names that are not there. Source: PS3.3 C.8.8.5, C.8.8.6."""
    if overlap not in (None, *OVERLAPS): raise MaskError(f"overlap is {overlap!r}, expected 'union', 'xor' or None")
    ds, name = _open(path, 'RTSTRUCT'), Path(path).name
    found = _rois(ds)
    missing = sorted(set(rois or ()) - set(found))
    if missing: raise MaskError(f"{name} has no ROI {missing}, found {sorted(found)}")
    masks = Masks()
    for roi, (uid, items) in found.items():
        if rois is not None and roi not in rois: continue
        kinds = sorted({str(c.get('ContourGeometricType')) for c in items})
        if not set(kinds) & set(CLOSED): masks.skipped[roi] = f"only {', '.join(kinds)}: encloses nothing" if kinds else 'no contours'; continue
        if len(kinds) > 1: raise MaskError(f"ROI {roi!r} of {name} mixes {', '.join(kinds)}; one of {CLOSED} was expected, the others enclose nothing or combine otherwise")
        checked = _check_frame(uid, frame, f'ROI {roi!r} of {name}')
        points = [np.array(c.ContourData, float).reshape(-1, 3) for c in items]
        data, numbers = _fill(points, like, kinds[0] == CLOSED[1], tolerance_mm, overlap, clip, f'ROI {roi!r}')
        masks[roi] = Volume(data, like.affine, 'label', {'source': 'RTSTRUCT', 'roi': roi, 'rule': 'even-odd, voxel centre', 'frame': checked} | numbers)
    if rois is not None and masks.skipped: raise MaskError(f"{name}: " + '; '.join(f'ROI {k!r} has {v}' for k, v in masks.skipped.items()))
    return masks

def _group(ds, i: int, keyword: str):
    "The functional group item `keyword` of frame `i`: its own, else the shared one, else None."
    for holder in (ds.PerFrameFunctionalGroupsSequence[i], *(ds.get('SharedFunctionalGroupsSequence') or [])):
        if holder.get(keyword): return holder[keyword].value[0]
    return None

def _frame_affines(ds, name: str) -> np.ndarray:
    "(frames, 3, 3): mm per row h, mm per column w, position of pixel (0, 0)."
    if 'PerFrameFunctionalGroupsSequence' not in ds: raise MaskError(f"{name}: {tag_name('PerFrameFunctionalGroupsSequence')} is missing; frames cannot be placed")
    out = []
    for i in range(len(ds.PerFrameFunctionalGroupsSequence)):
        place, plane, measures = (_group(ds, i, k) for k in ('PlanePositionSequence', 'PlaneOrientationSequence', 'PixelMeasuresSequence'))
        if None in (place, plane, measures): raise MaskError(f"{name}: frame {i + 1} lacks its position, orientation or pixel spacing; it cannot be placed")
        (between_rows, between_columns), cosines = map(float, measures.PixelSpacing), np.array(plane.ImageOrientationPatient, float)
        out.append(np.stack([cosines[3:]*between_rows, cosines[:3]*between_columns, np.array(place.ImagePositionPatient, float)], 1))
    return np.array(out)

def _on_grid(frames, rows: int, columns: int, like: Volume) -> np.ndarray | None:
    "(frames, 3, 3) whole-number maps (h, w, 1) -> index of `like`, or None where any frame's corner lies a hundredth of a voxel or more off the grid."
    inv = np.linalg.inv(like.affine)
    maps = inv[:3, :3] @ frames; maps[:, :, 2] += inv[:3, 3]
    corners = maps @ np.array([[h, w, 1] for h in (0, rows-1) for w in (0, columns-1)]).T
    whole = np.rint(maps)
    unit = abs(whole[:, :, :2]).sum(1) == 1
    return whole.astype(int) if unit.all() and abs(corners - np.rint(corners)).max() < .01 and abs(maps - whole).max() < .01 else None

def _frame_step(ds, along: np.ndarray, name: str) -> float:
    "Distance in mm between planes: as written, else the smallest gap; every position must lie on that comb."
    measures, levels = _group(ds, 0, 'PixelMeasuresSequence'), np.unique(np.round(along, 3))
    written = measures.get('SpacingBetweenSlices') or (measures.get('SliceThickness') if len(levels) == 1 else None)
    if not written and len(levels) == 1: raise MaskError(f"{name}: one plane and no {tag_name('SpacingBetweenSlices')}; its thickness is not known")
    step = float(written or np.diff(levels).min())
    off = abs((levels - levels[0])/step - np.rint((levels - levels[0])/step)).max()*step
    if off > TOLERANCE_MM: raise MaskError(f"{name}: planes lie up to {off:.2f} mm beside a regular spacing of {step:.3f} mm; frames cannot be joined into one volume")
    return step

def _own_volume(ds, frames, pixels, used, name: str) -> Volume:
    "The frames `used` as a volume of their own grid (all frames span it)."
    normal = np.cross(frames[0, :, 1], frames[0, :, 0]); normal /= np.linalg.norm(normal)
    along = frames[:, :, 2] @ normal
    step, first = _frame_step(ds, along, name), int(along.argmin())
    slices = np.rint((along - along[first])/step).astype(int)
    line = frames[first, :, 2] + np.outer(slices*step, normal)
    if abs(frames[:, :, :2] - frames[0, :, :2]).max() > 1e-3 or abs(line - frames[:, :, 2]).max() > 5*TOLERANCE_MM: raise MaskError(f"{name}: frames differ in orientation, spacing or lie beside each other; they form no regular volume")
    data = np.zeros((slices.max() + 1, *pixels.shape[1:]), np.uint8)
    for i in used: data[slices[i]] |= pixels[i]
    affine = np.eye(4); affine[:3] = np.column_stack([normal*step, frames[first]])
    return Volume(data, affine, 'label').canonical()

def _code(items) -> list[str] | None:
    "[value, scheme, meaning] of the first code item."
    return None if not items else [str(items[0].get('CodeValue') or items[0].get('LongCodeValue') or items[0].get('URNCodeValue') or ''), str(items[0].get('CodingSchemeDesignator') or ''), str(items[0].get('CodeMeaning') or '')]

def _segment_pixels(ds, threshold: float, name: str) -> dict[int, tuple[list[int], np.ndarray]]:
    "Segment number -> (its frames, boolean pixels (frames of the file, rows, columns))."
    kind, values = str(ds.get('SegmentationType') or ''), ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    numbers, frames = [int(s.SegmentNumber) for s in ds.SegmentSequence], range(len(values))
    if kind == 'LABELMAP':
        unknown = sorted(set(np.unique(values).tolist()) - set(numbers) - {0, ds.get('PixelPaddingValue', 0)})
        if unknown: raise MaskError(f"{name}: pixels hold segments {unknown}, described are {numbers}")
        return {n: (list(frames), values == n) for n in numbers if n}
    if kind not in ('BINARY', 'FRACTIONAL'): raise MaskError(f"{name}: {tag_name('SegmentationType')} is {kind or 'missing'}, expected BINARY, FRACTIONAL or LABELMAP")
    inside = values > 0 if kind == 'BINARY' else values >= threshold*int(ds.MaximumFractionalValue)
    owner = [int(_group(ds, i, 'SegmentIdentificationSequence').ReferencedSegmentNumber) for i in frames]
    return {n: ([i for i in frames if owner[i] == n], inside) for n in numbers}

def _segment_meta(ds, segment) -> dict:
    "What a segment is, with its codes; no UID."
    regions = [_code([r]) + [_code(r.get('AnatomicRegionModifierSequence'))] for r in segment.get('AnatomicRegionSequence') or []]
    return {'source': 'SEG', 'segment': int(segment.SegmentNumber), 'label': str(segment.get('SegmentLabel') or ''), 'type': str(ds.SegmentationType), 'category': _code(segment.get('SegmentedPropertyCategoryCodeSequence')),
            'property': _code(segment.get('SegmentedPropertyTypeCodeSequence')), 'regions': regions, 'algorithm': str(segment.get('SegmentAlgorithmType') or ''), 'tracking': str(segment.get('TrackingID') or '')}

def _place(ds, frames, maps, used, pixels, like: Volume, what: str) -> Volume:
    "The set pixels of frames `used` on the grid of `like`: straight to their index (`maps`), or by nearest voxel."
    if maps is None: return resample(_own_volume(ds, frames, pixels, used, what), like=like)
    data = np.zeros(like.shape, np.uint8)
    for i in used:
        h, w = np.nonzero(pixels[i])
        at = maps[i] @ np.stack([h, w, np.ones_like(h)])
        outside = ((at < 0) | (at >= np.array(like.shape)[:, None])).any(0).sum()
        if outside: raise MaskError(f"{what}: {outside} voxels of frame {i + 1} lie outside the grid of {like.shape} voxels; read it onto the image that was segmented")
        data[tuple(at)] = 1
    return Volume(data, like.affine, 'label')

def read_seg(path, like: Volume, frame: SeriesInfo | str | None, threshold: float = .5) -> Masks:
    """The segments of a DICOM SEG as label volumes (0, 1) on the grid of `like` (D, H, W), by segment label; codes, label and type in `meta`.

    BINARY, LABELMAP, and FRACTIONAL cut at `threshold` (0..1, inclusive). Frames are placed by their own positions, in any order, absent ones empty. Where the grids differ the nearest voxel is taken: logged, and
    named in `meta['resampled']` ('' = voxel for voxel). `frame`: the `SeriesInfo` that `like` was read from or its FrameOfReferenceUID, None = do not check.
    Raises `MaskError` for another frame of reference, frames that cannot be placed, voxels outside the grid, segments that are not described. Source: PS3.3 A.51, C.8.20, C.7.6.16.2."""
    if not 0 < threshold <= 1: raise MaskError(f"threshold is {threshold}, expected above 0, at most 1")
    ds, name = _open(path, 'SEG'), Path(path).name
    checked = _check_frame(ds.get('FrameOfReferenceUID'), frame, name)
    frames = _frame_affines(ds, name)
    segments, maps, masks = _segment_pixels(ds, threshold, name), _on_grid(frames, ds.Rows, ds.Columns, like), Masks()
    note = '' if maps is not None else f"nearest voxel, from {ds.Rows} x {ds.Columns} pixels of {' x '.join(f'{s:.3g}' for s in np.linalg.norm(frames[0, :, :2], axis=0))} mm"
    if note: log.warning("%s lies on another grid than the image: %s", name, note)
    for segment in ds.SegmentSequence:
        number, label = int(segment.SegmentNumber), _unique_name(str(segment.get('SegmentLabel') or ''), int(segment.SegmentNumber), masks)
        if number not in segments: masks.skipped[label] = 'segment 0 of a label map is its background'; continue
        used, pixels = segments[number]
        placed = _place(ds, frames, maps, used, pixels, like, f'segment {label!r} of {name}')
        masks[label] = placed.replace(meta=_segment_meta(ds, segment) | {'frames': len(used), 'frame': checked, 'resampled': note})
    return masks

def as_labels(masks: dict) -> Volume:
    """One label volume of `masks` (name -> label Volume, one grid), mask i as value i + 1; `meta['names']` lists the names in that order.

    Raises `MaskError` for no masks, different grids, or masks that overlap (names and voxels)."""
    if not masks: raise MaskError("no masks to join; see `.skipped` for why")
    first = next(iter(masks.values())); data = np.zeros(first.shape, np.uint16); names = list(masks)
    for i, (name, vol) in enumerate(masks.items(), 1):
        if vol.shape != first.shape or not np.allclose(vol.affine, first.affine, atol=1e-3): raise MaskError(f"{name!r} lies on another grid than {names[0]!r}; resample one of them")
        inside = vol.data > 0; both = data[inside]
        if both.any(): raise MaskError(f"{name!r} overlaps {names[both.max() - 1]!r} in {int((both == both.max()).sum())} voxels; keep them apart, or decide which one wins before joining")
        data[inside] = i
    return first.replace(data=data, unit='label', meta={'names': names})
