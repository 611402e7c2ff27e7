"""Damaged input, 20,000 times: every outcome is a right answer or an error of the project that names the file.

    python tests/fuzz.py                               # 20,000 inputs on all cores; exit code 1 unless wrong, crashed and hung are 0
    python tests/fuzz.py --inputs 300 --seed 7         # a quick look
    python tests/fuzz.py --only dicom:1234 --seed 0    # one of them again, with its traceback

Each family makes one sound input, damages a copy, reads it, and judges what comes out against an independent reading of the damaged copy: pydicom and the SUV
formula, nibabel, json, or the text itself. `right`: the answer is what the damaged file says. `refused`: one of the project's errors. `wrong`: another answer, or one
that no PET can give. `crashed`: any other exception, a dead process, or more than 256 MB for a kilobyte of input. `hung`: more than `--limit` seconds.
"""
import argparse, collections, csv, functools, gzip, io, json, logging, math, multiprocessing, os, resource, shutil, struct, sys, tempfile, time, traceback, warnings
from pathlib import Path
import numpy as np
import pydicom

sys.path.insert(0, str(Path(__file__).parent))
ROOM = 256     # MB


class Wrong(AssertionError): "An answer that is not what the damaged file says."


# ---- damage ------------------------------------------------------------------------------------------------------------------
def flip(data: bytearray, rng) -> None:
    for at in rng.integers(0, len(data), rng.integers(1, 5)): data[at] ^= 1 << int(rng.integers(8))

def overwrite(data: bytearray, rng) -> None:
    at, n = int(rng.integers(len(data))), int(rng.integers(1, 17))
    data[at:at + n] = rng.choice([bytes(n), b'\xff'*n, rng.bytes(n)])[:max(0, len(data) - at)]

def cut(data: bytearray, rng) -> None: del data[int(rng.integers(len(data))):]

def lose(data: bytearray, rng) -> None:
    at = int(rng.integers(len(data))); del data[at:at + int(rng.integers(1, 65))]

def insert(data: bytearray, rng) -> None:
    at = int(rng.integers(len(data))); data[at:at] = rng.bytes(int(rng.integers(1, 65)))

def repeat(data: bytearray, rng) -> None:
    at, n = int(rng.integers(len(data))), int(rng.integers(1, 200)); data[at:at] = data[at:at + n]

def digits(data: bytearray, rng) -> None:
    "Change digits where there are any: numbers stay numbers."
    where = [i for i, c in enumerate(data) if 48 <= c <= 57]
    for at in rng.choice(where, min(len(where), int(rng.integers(1, 4))), replace=False) if where else (): data[at] = 48 + int(rng.integers(10))

def length(data: bytearray, rng) -> None:
    "A claim of very much, or of nothing, somewhere."
    at = int(rng.integers(max(1, len(data) - 4))); data[at:at + 4] = struct.pack('<I', int(rng.choice([0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1])))

BYTES = {f.__name__: f for f in (flip, overwrite, cut, lose, insert, repeat, digits, length)}

def damage(data: bytes, rng) -> tuple[bytes, str]:
    name = str(rng.choice(list(BYTES))); out = bytearray(data)
    BYTES[name](out, rng)
    return bytes(out), name


# ---- DICOM -------------------------------------------------------------------------------------------------------------------
SLICES, STEP = 4, 3.
HALF_LIFE = 6586.2
# what no PET can be: tag -> values of the file, of one slice or of all
IMPOSSIBLE = {'PatientWeight': [0, -70, .07, 70000, None, ''], 'RadionuclideTotalDose': [0, -1e8, 368, 3.68e5, 1e12, None], 'RadionuclideHalfLife': [0, -1, 109.77, 1223.4, 1e9, None],
              'RadiopharmaceuticalStartTime': [None, '235900', '250000', 'noon'], 'SeriesTime': [None, '', '99'], 'DecayCorrection': [None, 'NONE', 'LATER'], 'Units': [None, 'PROPCNTS', 'CNTS', 'COUNTS'],
              'RescaleSlope': [0, -2, 1e9, None], 'CorrectedImage': [['DECY']], 'PixelSpacing': [None, [0, 4], [-4, 4], [1e9, 4]], 'ImageOrientationPatient': [None, [1, 0, 0, 1, 0, 0], [0]*6],
              'ImagePositionPatient': [None, [0, 0, 'x'], [0, 0, 1e30]], 'Rows': [0, 65535, None], 'Columns': [0, 65535], 'NumberOfFrames': [2**31 - 1, -1], 'BitsAllocated': [0, 12, 64], 'BitsStored': [0, 17], 'HighBit': [3],
              'PixelRepresentation': [7], 'SamplesPerPixel': [3, 0], 'Modality': [None, 'XX'], 'SOPClassUID': [None, '1.2.840.10008.5.1.4.1.1.7'], 'SeriesInstanceUID': [None]}
TRACER = ('RadionuclideTotalDose', 'RadionuclideHalfLife', 'RadiopharmaceuticalStartTime')


@functools.lru_cache
def dicom_base(coded: bool) -> dict[str, bytes]:
    from test_dicom import slice_
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as room:
        for i in range(SLICES):
            slice_(room, f'{i}.dcm', rng.integers(0, 3000, (6, 8)), (0, 0, STEP*i), '1.2.3.9', rle=coded, RescaleSlope=1 + i/8, NumberOfSlices=SLICES)
        return {p.name: p.read_bytes() for p in sorted(Path(room).iterdir())}


def rewritten(content: bytes, tag: str, value) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(content)); target = ds.RadiopharmaceuticalInformationSequence[0] if tag in TRACER else ds
    if value is None: delattr(target, tag)
    else:
        if tag not in target: target.add_new(tag, pydicom.datadict.dictionary_VR(tag), value)
        target[tag]._value = value if isinstance(value, (str, int, float)) else pydicom.multival.MultiValue(lambda v: v, value)
    out = io.BytesIO(); ds.save_as(out); return out.getvalue()


def factors(headers) -> set[float]:
    "SUVbw per Bq/ml for every moment that a header may mean: the series', the acquisition's."
    found = set()
    for ds in headers:
        try:
            item = ds.RadiopharmaceuticalInformationSequence[0]; seconds = lambda t: int(str(t)[:2])*3600 + int(str(t)[2:4])*60 + float(str(t)[4:] or 0)
            start = item.get('RadiopharmaceuticalStartTime') or str(item.RadiopharmaceuticalStartDateTime)[8:]
            for then in (ds.get('SeriesTime'), ds.get('AcquisitionTime')):
                if then: found.add(1000*float(ds.PatientWeight)/(float(item.RadionuclideTotalDose)*2**(-((seconds(then) - seconds(start)) % 86400)/float(item.RadionuclideHalfLife))))
        except Exception: continue       # an oracle: what it cannot read, it has no opinion of
    return found


def decoded(ds) -> list[np.ndarray]:
    "The pixels as each of pydicom's decoders has them: of a damaged stream they may differ."
    plugins = ('',) if not ds.file_meta.TransferSyntaxUID.is_encapsulated else ('pydicom', 'pylibjpeg')
    out = []
    for plugin in plugins:
        try: out.append(pydicom.pixels.pixel_array(ds, decoding_plugin=plugin).astype(float))
        except BaseException: continue
    if not out and not ds.file_meta.TransferSyntaxUID.is_encapsulated: out = [np.frombuffer(ds.PixelData, '<i2')[:48].astype(float)]      # pydicom wants tags that say nothing of the values
    return out

@functools.lru_cache
def sound(coded: bool) -> tuple[list, set]:
    "The oracle's reading of the undamaged series."
    with tempfile.TemporaryDirectory() as room:
        for name, content in dicom_base(coded).items(): (Path(room)/name).write_bytes(content)
        return dicom_oracle(Path(room))

def dicom_oracle(folder: Path) -> tuple[list[tuple[float, np.ndarray]], set[float]]:
    "(place along the normal, slope-scaled values, sorted) of each file that pydicom reads, and factors that could be meant."
    slices, headers = [], []
    for path in sorted(folder.iterdir()):
        try:
            ds = pydicom.dcmread(path)
            across, down = np.array(ds.ImageOrientationPatient[:3], float), np.array(ds.ImageOrientationPatient[3:], float)
            place = float(np.cross(across, down) @ np.array(ds.ImagePositionPatient, float))
            slices += [(place, np.sort((x*float(ds.RescaleSlope) + float(ds.get('RescaleIntercept') or 0)).ravel())) for x in decoded(ds)]
        except Exception: continue
        headers.append(ds)
    return slices, factors(headers)


def dicom(rng, room: Path) -> tuple[str, object]:
    coded, files = bool(rng.random() < .25), None
    files = dict(dicom_base(coded)); which = list(files) if rng.random() < .4 else [str(rng.choice(list(files)))]
    impossible = ''
    if rng.random() < .45:
        tag = str(rng.choice(list(IMPOSSIBLE))); value = IMPOSSIBLE[tag][int(rng.integers(len(IMPOSSIBLE[tag])))]; impossible = f'{tag} = {value!r}'
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for name in which: files[name] = rewritten(files[name], tag, value)
        how = f"{'all' if len(which) > 1 else 'one'}: {impossible}"
    else:
        seed = int(rng.integers(2**31))
        for name in which: files[name], how = damage(files[name], np.random.default_rng(seed) if rng.random() < .5 else rng)
    if rng.random() < .1: files['notes.txt'] = rng.bytes(100)
    for name, content in files.items(): (room/name).write_bytes(content)
    from petvlm.dicom import read_series
    volume = read_series(room)
    (slices, allowed), (whole, true) = dicom_oracle(room), sound(coded)            # what hides the rest of a file from pydicom may leave its values as they were
    slices, allowed, truth = slices + whole, allowed | true, max(true)
    if volume.unit == 'SUVbw':
        normal = np.cross(volume.affine[:3, 2], volume.affine[:3, 1]); normal /= np.linalg.norm(normal)
        for d in range(volume.shape[0]):
            mine, place = np.sort(volume.data[d].ravel().astype(float)), float((volume.affine[:3, 3] + d*volume.affine[:3, 0]) @ normal)
            if not any(abs(abs(place) - abs(z)) < .6 and any(np.allclose(mine, f*values, rtol=2e-3, atol=1e-6) for f in allowed) for z, values in slices if len(values) == len(mine)):
                raise Wrong(f'{how}: slice {d} at {place:.2f} mm is not what pydicom and the formula give')
        if impossible and not 'RescaleSlope' in impossible and abs(volume.meta['suv']['factor'][1]/truth - 1) > .01: raise Wrong(f"{how}: SUV changed by {volume.meta['suv']['factor'][1]/truth:g}")
        if impossible and 'RescaleSlope' in impossible: raise Wrong(f'{how}: was believed')
        if volume.shape[0] < SLICES and not (volume.meta.get('notes') or volume.meta.get('dropped')): raise Wrong(f'{how}: {volume.shape[0]} of {SLICES} slices, and nothing said')
    elif volume.unit != 'HU': raise Wrong(f'{how}: unit {volume.unit}')
    return 'right', how


# ---- NIfTI -------------------------------------------------------------------------------------------------------------------
@functools.lru_cache
def nifti_base(suffix: str) -> dict[str, bytes]:
    from petvlm.volume import Volume, write_nifti
    affine = np.eye(4); affine[[0, 1, 2], [0, 1, 2]] = 0; affine[[2, 1, 0], [0, 1, 2]] = 3., 2., 2.
    with tempfile.TemporaryDirectory() as room:
        write_nifti(Volume(np.random.default_rng(0).gamma(2., 1., (5, 6, 7)).astype(np.float32), affine, 'SUVbw', {'modality': 'PT'}), Path(room)/f'a{suffix}')
        return {p.name: p.read_bytes() for p in Path(room).iterdir()}


def nifti(rng, room: Path) -> tuple[str, object]:
    import nibabel
    suffix = str(rng.choice(['.nii', '.nii.gz'])); files = dict(nifti_base(suffix)); name = f'a{suffix}' if rng.random() < .85 else 'a.json'
    inside = suffix == '.nii.gz' and name != 'a.json' and rng.random() < .6           # damage before compression reaches the header
    new, how = damage(gzip.decompress(files[name]) if inside else files[name], rng); files[name] = gzip.compress(new) if inside else new
    if name != 'a.json' and rng.random() < .3:                                        # a header field of its own
        raw = bytearray(gzip.decompress(files[name]) if inside else files[name])
        at = int(rng.choice([40, 42, 44, 46, 70, 72, 80, 84, 88, 108, 112, 116, 252, 254, 280, 296, 312])); raw[at:at + 4] = rng.choice([struct.pack('<f', v) for v in (math.nan, math.inf, 0., -1., 1e30)] + [struct.pack('<hh', v, v) for v in (0, -1, 32767, 5)])
        files[name], how = (gzip.compress(bytes(raw)) if inside else bytes(raw)), f'header byte {at}'
    for n, content in files.items(): (room/n).write_bytes(content)
    from petvlm.volume import read_nifti
    volume = read_nifti(room/f'a{suffix}', 'SUVbw' if rng.random() < .5 else None)
    img = nibabel.load(room/f'a{suffix}'); theirs = np.asanyarray(img.dataobj, float); theirs = np.where(np.isfinite(theirs), theirs, 0)
    with np.errstate(over='ignore'): same = np.array_equal(np.sort(volume.data.ravel()), np.sort(theirs.astype(np.float32).ravel()))
    if not same or not np.allclose(sorted(volume.spacing), sorted(np.linalg.norm(img.affine[:3, :3], axis=0)), rtol=1e-4): raise Wrong(f'{how}: not what nibabel reads')
    return 'right', how


# ---- JSON and CSV ------------------------------------------------------------------------------------------------------------
ODD = (None, True, 0, -1, 1e308, float('nan'), 10**400, '', 'x', '\0', '..', '/etc/passwd', '\ud800', [], [None], {}, {'a': 1}, 'n/a', 'a'*5000)

def twisted(found, rng, depth: int = 0):
    "A copy of JSON data with one value, key or entry replaced, removed or doubled."
    if isinstance(found, (dict, list)) and found and (depth < 1 or rng.random() < .75):
        key = list(found)[int(rng.integers(len(found)))] if isinstance(found, dict) else int(rng.integers(len(found))); out = dict(found) if isinstance(found, dict) else list(found)
        how = rng.random()
        if how < .15: del out[key]
        elif how < .25 and isinstance(out, list): out.insert(key, out[key])
        elif how < .25: out[str(key).swapcase()] = out.pop(key)
        else: out[key] = twisted(found[key], rng, depth + 1)
        return out
    if isinstance(found, (int, float)) and not isinstance(found, bool) and rng.random() < .5: return found*float(rng.choice([-1, 0, 1e-3, 1e3, 1e6, 60, 1.0001]))
    return ODD[int(rng.integers(len(ODD)))]

def json_damaged(found, rng) -> tuple[bytes, str]:
    if rng.random() < .3: return damage(json.dumps(found, ensure_ascii=False).encode(), rng)
    if rng.random() < .02: return b'['*100_000, 'nested'
    return json.dumps(twisted(found, rng)).encode(), 'twisted'


SIDECAR = {'Modality': 'PT', 'Units': 'Bq/mL', 'TracerRadionuclide': 'F18', 'InjectedRadioactivity': 368., 'InjectedRadioactivityUnits': 'MBq', 'InjectionStart': -3600, 'TimeZero': '11:00:00', 'ImageDecayCorrected': True,
           'ImageDecayCorrectionTime': 0, 'FrameTimesStart': [0], 'FrameDuration': [600], 'BodyWeight': 70., 'AttenuationCorrection': 'CT', 'ModeOfAdministration': 'bolus'}

def bids(rng, room: Path) -> tuple[str, object]:
    import nibabel
    voxels = np.random.default_rng(0).integers(0, 9000, (5, 6, 7)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-2, -2, 3, 1.])), room/'sub-01_pet.nii.gz')
    content, how = json_damaged(SIDECAR, rng); (room/'sub-01_pet.json').write_bytes(content)
    from petvlm.bids import read_bids
    volume = read_bids(room/'sub-01_pet.nii.gz')
    side = {k.lower(): v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in json.loads(content.decode('utf-8-sig')).items() if v not in (None, '', [], 'n/a')}
    prefix = lambda key: {'b': 1., 'k': 1e3, 'm': 1e6, 'g': 1e9}[side[key][0].lower()]
    waited = side['imagedecaycorrectiontime'] - side['injectionstart'] if side['imagedecaycorrected'] else side['frametimesstart'] - side['injectionstart'] + side['frameduration']/2
    life = side.get('radionuclidehalflife') or {'18': 6586.2}.get(''.join(c for c in side['tracerradionuclide'] if c.isdigit()))
    factor = 1000*side['bodyweight']*prefix('units')/(side['injectedradioactivity']*prefix('injectedradioactivityunits')*2**(-waited/life))
    if not np.allclose(np.sort(volume.data.ravel()), np.sort(voxels.ravel()*factor), rtol=3e-3): raise Wrong(f'{how}: factor {volume.meta["suv"]["factor"]}, by hand {factor:g}')
    if not (2 <= side['bodyweight'] <= 400 and 1e6 <= side['injectedradioactivity']*prefix('injectedradioactivityunits') <= 1e10 and -700 <= waited <= 6*life + 1): raise Wrong(f'{how}: was believed')
    return 'right', how


def texts(found):
    "Every text in JSON data."
    if isinstance(found, str): yield found
    for v in found.values() if isinstance(found, dict) else found if isinstance(found, list) else (): yield from texts(v)


ROWS = [{'study': f'study-{i}', 'region': r, 'language': l, 'text': t, 'patient': f'p{i}', 'split': ''} for i in range(3) for r, l, t in (
    ('chest', 'vi', 'Nốt phổi phải 14 mm, SUVmax: 6,1.'), ('chest', 'en', 'Nodule in the right lung, "14 mm", SUVmax 6.1;\nno effusion.'), ('head_neck', 'vi', 'Không thấy bất thường.'))]

def own(rng, room: Path) -> tuple[str, object]:
    for i in range(3): (room/f'study-{i}').mkdir()
    if rng.random() < .5: content, how = json_damaged(ROWS, rng); path = room/'reports.json'
    else:
        out = io.StringIO(newline=''); table = csv.DictWriter(out, list(ROWS[0]), delimiter=str(rng.choice([',', ';', '\t']))); table.writeheader(); table.writerows(ROWS)
        content, how = damage(out.getvalue().encode(str(rng.choice(['utf-8', 'utf-8-sig', 'utf-16']))), rng); path = room/'reports.csv'
    path.write_bytes(content)
    from petvlm.own import read_reports
    rows = read_reports(path)
    text = content.decode('utf-16' if content[:2] in (b'\xff\xfe', b'\xfe\xff') else 'utf-8-sig')
    bare = lambda t: ' '.join(t.replace('"', '').split())
    told = '\n'.join(map(bare, texts(json.loads(text)))) if path.suffix == '.json' else bare(text)
    for r in rows:
        said = bare(r.text)
        if said not in told or r.region not in ('chest', 'head_neck', 'abdomen_pelvis') or r.language not in ('vi', 'en') or not r.text: raise Wrong(f'{how}: {r}')
        r.text.encode(); r.patient.encode()
    if len(rows) > len(ROWS) + 1: raise Wrong(f'{how}: {len(rows)} rows')
    return 'right', how


def layouts(rng, room: Path) -> tuple[str, object]:
    from petvlm.layouts import iu_rows, m3d_items, m3dvqa_rows, petar_items, vimed_reports
    from petvlm.sources import SourceError
    kind = str(rng.choice(['iu', 'm3d', 'petar', 'vqa', 'vimed', 'array']))
    if kind == 'array': return array(rng, room)
    if kind == 'vqa':
        columns = ['Image Path', 'Text', 'Question Type', 'Question', 'Choice A', 'Choice B', 'Choice C', 'Choice D', 'Answer', 'Answer Choice']
        out = io.StringIO(newline=''); table = csv.writer(out); table.writerow(columns)
        for i in range(4): table.writerow([f'ct/{i}.npy', f'{i}.txt', 1 + i, 'Which plane, "exactly"?', 'Axial', 'Coronal', 'Sagittal', 'Oblique', 'Axial', 'A'])
        content, how = damage(out.getvalue().encode(), rng); (room/'x.csv').write_bytes(content)
        for r in m3dvqa_rows(room/'x.csv'):
            if r['letter'] not in 'ABCD' or len(r['choices']) != 4 or not all(r['choices']): raise Wrong(f'{how}: {r}')
        return 'right', f'vqa {how}'
    names = ('pet', 'ct', 'mask', 'pet_focal', 'ct_focal', 'mask_focal')
    sound = {'iu': {'train': [{'id': f'c{i}', 'report': 'The heart is normal.', 'image_path': [f'{i}/0.png', f'{i}/1.png']} for i in range(3)]},
             'm3d': {'train': [{'image': f'ct/{i}.npy', 'text': f'{i}.txt'} for i in range(3)]}, 'petar': {'test': [{n: f'{i}/{n}.npy' for n in names} | {'text': 'A lesion.'} for i in range(3)]},
             'vimed': {'Mô tả hình ảnh': {'Đầu - cổ': 'Bình thường.', 'Lồng ngực': 'Nốt phổi.'}, 'Kết luận': 'U phổi.'}}[kind]
    content, how = json_damaged(sound, rng); path = room/'x.json'; path.write_bytes(content)
    if kind == 'vimed':
        from petvlm.files import read_json
        for text in (t['vi'] for t in vimed_reports(read_json(path, SourceError, dict)).values()):
            if not any(text in t for t in texts(json.loads(content.decode('utf-8-sig')))): raise Wrong(f'{how}: {text!r}')
        return 'right', f'vimed {how}'
    items = {'iu': iu_rows, 'm3d': m3d_items, 'petar': petar_items}[kind](path)
    for item in items if kind != 'iu' else ():
        try: item[1]()                                                               # names files that are not there
        except SourceError: pass
    if len(items) != sum(len(v) for k, v in json.loads(content.decode('utf-8-sig')).items() if k in ('train', 'test', 'val', 'validation')): raise Wrong(f'{how}: {len(items)} items')
    return 'right', f'{kind} {how}'


def array(rng, room: Path) -> tuple[str, object]:
    "One .npy or .npz volume."
    from petvlm.layouts import _array
    x, out, packed = np.random.default_rng(0).integers(0, 32767, (4, 5, 6)).astype(np.int16), io.BytesIO(), rng.random() < .5
    np.savez_compressed(out, x) if packed else np.save(out, x)
    content, how = damage(out.getvalue(), rng)
    if not packed and rng.random() < .3: content, how = out.getvalue().replace(b'(4, 5, 6)', rng.choice([b'(9999999999, 5, 6)', b'(4, -5, 6)', b'(4, 5, 0)'])), 'claims'
    path = room/('x.npz' if packed else 'x.npy'); path.write_bytes(content)
    got = _array(path)
    theirs = np.load(path, allow_pickle=False); theirs = theirs[theirs.files[0]] if packed else theirs
    if not np.array_equal(np.asarray(got), theirs, equal_nan=got.dtype.kind == 'f'): raise Wrong(f'{how}: not what numpy reads')
    return 'right', f'array {how}'


FAMILIES = {'dicom': (dicom, .4), 'nifti': (nifti, .2), 'bids': (bids, .1), 'own': (own, .15), 'layouts': (layouts, .15)}


# ---- running -----------------------------------------------------------------------------------------------------------------
def errors() -> tuple[type, ...]:
    from petvlm.dicom import DicomError
    from petvlm.sources import SourceError
    from petvlm.volume import VolumeError
    return DicomError, SourceError, VolumeError


def case(family: str, number: int, seed: int) -> tuple[str, str]:
    "Outcome and what it was."
    rng, room = np.random.default_rng([seed, list(FAMILIES).index(family), number]), Path(tempfile.mkdtemp(prefix='fuzz-'))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            outcome, what = FAMILIES[family][0](rng, room)
    except errors() as e: outcome, what = 'refused', f'{type(e).__name__}: {e}'
    except Wrong as e: outcome, what = 'wrong', str(e)
    except Exception: outcome, what = 'crashed', traceback.format_exc()
    finally: shutil.rmtree(room, ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//1024
    return ('crashed', f'{grown} MB more memory; {what}') if grown > ROOM and number else (outcome, what)


def work(jobs: list, seed: int, pipe) -> None:
    logging.disable(logging.CRITICAL)
    for family in FAMILIES: case(family, 0, seed)                                    # imports and bases are no part of a case
    for job in jobs: pipe.send(('start', job)); pipe.send(('done', job, *case(*job, seed)))
    pipe.send(('end',))


def run(jobs: list, seed: int, workers: int, limit: float, show=None) -> list[tuple]:
    "`(family, number, outcome, what)` of all `jobs`. A worker that hangs or dies is replaced, and its case counted."
    context, out, left = multiprocessing.get_context('spawn'), [], [jobs[i::workers] for i in range(workers)]
    def start(todo):
        here, there = context.Pipe(False); p = context.Process(target=work, args=(todo, seed, there), daemon=True); p.start(); there.close()
        return [p, here, todo, None, time.monotonic() + 120]
    running = [start(todo) for todo in left if todo]
    while running:
        for slot in list(running):
            p, here, todo, now, since = slot; fate = None
            try:
                while fate is None and here.poll(.02):
                    word, *rest = here.recv()
                    if word == 'start': slot[3], slot[4] = rest[0], time.monotonic()
                    elif word == 'done': out.append((*rest[0], *rest[1:])); todo.remove(tuple(rest[0])); slot[3] = None
                    else: fate = 'end'
            except EOFError: fate = 'crashed'
            if fate is None and time.monotonic() - slot[4] > limit: fate = 'hung'; p.kill()
            if show: show(len(out))
            if fate is None: continue
            running.remove(slot); p.join()
            if fate != 'end':
                if slot[3] is None: raise RuntimeError('a worker ended outside a case')
                out.append((*slot[3], fate, f'exit code {p.exitcode}')); todo.remove(tuple(slot[3]))
                if todo: running.append(start(todo))
    return out


def main(args=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--inputs', type=int, default=20_000); parser.add_argument('--seed', type=int, default=0); parser.add_argument('--workers', type=int, default=os.cpu_count())
    parser.add_argument('--limit', type=float, default=20.); parser.add_argument('--only')
    a = parser.parse_args(args)
    if a.only:
        family, number = a.only.split(':'); print(*case(family, int(number), a.seed), sep='\n'); return 0
    jobs = [(family, i) for family, (_, share) in FAMILIES.items() for i in range(1, round(share*a.inputs) + 1)]
    begun = time.monotonic()
    from tqdm import tqdm
    with tqdm(total=len(jobs), unit='input') as bar: found = run(jobs, a.seed, a.workers, a.limit, lambda n: bar.update(n - bar.n))
    names, counts = ('right', 'refused', 'wrong', 'crashed', 'hung'), collections.Counter((f, o) for f, _, o, _ in found)
    print(f"{'':8s}" + ''.join(f'{n:>9s}' for n in names))
    for family in (*FAMILIES, 'all'): print(f'{family:8s}' + ''.join(f"{sum(c for (f, o), c in counts.items() if o == n and family in (f, 'all')):9d}" for n in names))
    bad = [x for x in found if x[2] not in ('right', 'refused')]
    for family, number, outcome, what in bad[:40]: print(f'\n{outcome} {family}:{number} (--only {family}:{number} --seed {a.seed})\n{what}')
    print(f'{len(found)} inputs in {time.monotonic() - begun:.0f} s')
    return int(bool(bad) or len(found) != len(jobs))


if __name__ == '__main__': sys.exit(main())
