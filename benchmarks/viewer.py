"""How quickly the viewer answers: a whole-body PET/CT with organs and lesions, the kernel's side only (no browser).

    python benchmarks/viewer.py                                   # 300 x 400 x 400 voxels, PET on a grid of its own
    python benchmarks/viewer.py --shape 60 80 80 --repeats 3      # a quick look

One JSON: seconds to open and to export, milliseconds (median, worst) per kind of question, bytes of the largest answer, megabytes of the page.
"""
import argparse, json, platform, statistics, sys, tempfile, time
from datetime import datetime, timezone
from pathlib import Path


def study(shape):
    "A smooth body with noise: CT of `shape` over 1.0 x 0.55 x 0.55 m, PET of about 4 mm on a grid of its own (at most the CT's), labels on the PET's."
    import numpy as np
    from petvlm.findings import Study
    from petvlm.volume import Volume
    rng, box = np.random.default_rng(0), np.array([1000., 550., 550.])
    def grid(n):
        affine = np.zeros((4, 4)); affine[3, 3] = 1; affine[[2, 1, 0], [0, 1, 2]] = box/n; affine[:3, 3] = (-box/2 + box/n/2)[::-1]
        return affine
    def body(n):
        d, h, w = np.ogrid[:n[0], :n[1], :n[2]]
        return (((h/n[1] - .5)/.3)**2 + ((w/n[2] - .5)/.42)**2 + 0*d < 1)
    small = np.minimum(shape, np.rint(box/4).astype(int))
    ct = np.where(body(shape), rng.normal(40, 15, shape).astype(np.float32), np.float32(-1000))
    pet = np.where(body(small), rng.gamma(4, .3, small).astype(np.float32), np.float32(0)); lesions = np.zeros(small, np.uint8); organs = body(small).astype(np.uint8)
    for k in range(1, 9): at = tuple(slice(int(n*k/10), int(n*k/10) + 3) for n in small); lesions[at] = k; pet[at] += 8
    return Study('bench', {'ct': Volume(ct, grid(shape), 'HU'), 'pet': Volume(pet, grid(small), 'SUVbw'), 'organs': Volume(organs, grid(small), 'label'), 'lesions': Volume(lesions, grid(small), 'label')})


def clock(scene, repeats):
    "Milliseconds per kind of question, and the bytes of the largest answer."
    import numpy as np
    from petvlm.widget import answer
    rng, out, most = np.random.default_rng(1), {}, 0
    windows, labels = {'pet': [0, 7], 'ct': [-160, 240]}, ['organs', 'lesions']
    asked = {plane: [dict(type='plane', plane=plane, index=int(rng.integers(scene.frame.shape[view.axis])), windows=windows, labels=labels) for _ in range(repeats)] for plane, view in scene.views.items()}
    places = [list(map(float, scene.frame.world(rng.uniform(0, 1, 3)*(np.array(scene.frame.shape) - 1)))) for _ in range(repeats)]
    asked |= {'mip, new angle': [dict(type='mip', angle=a, window=[0, 7]) for a in range(5, 5 + 10*min(repeats, 36), 10)], 'read': [dict(type='read', position=p) for p in places],
              'sphere of 15 mm': [dict(type='sphere', position=list(s.mm), radius=15) for s in scene.spots]}
    for name, questions in asked.items():
        took = []
        for q in questions:
            start = time.perf_counter(); told, blobs = answer(scene, q); took.append(1000*(time.perf_counter() - start))
            if 'error' in told: raise RuntimeError(told['error'])
            most = max(most, sum(map(len, blobs)))
        out[name] = {'median_ms': round(statistics.median(took), 1), 'worst_ms': round(max(took), 1)}
    return out, most


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--shape', type=int, nargs=3, default=(300, 400, 400)); p.add_argument('--repeats', type=int, default=20); p.add_argument('--out', default='')
    a = p.parse_args()
    from petvlm.offline import export_html
    from petvlm.scene import scene_of
    from petvlm.widget import setup_of
    made = study(tuple(a.shape)); start = time.perf_counter(); scene = scene_of(made); setup = setup_of(scene); scene.mip(0); opened = time.perf_counter() - start
    answers, most = clock(scene, a.repeats)
    with tempfile.TemporaryDirectory() as room:
        start = time.perf_counter(); page = export_html(made, Path(room)/'page.html'); exported, size = time.perf_counter() - start, page.stat().st_size/1e6
    result = {'shape': list(a.shape), 'pet': list(made.volumes['pet'].shape), 'open_s': round(opened, 2), 'setup_kb': round(len(json.dumps(setup))/1000, 1), 'answers': answers, 'largest_answer_mb': round(most/1e6, 2),
              'export_s': round(exported, 2), 'page_mb': round(size, 2), 'python': platform.python_version(), 'machine': platform.machine(), 'date': datetime.now(timezone.utc).date().isoformat()}
    text = json.dumps(result, indent=1) + '\n'
    if a.out: Path(a.out).write_text(text)
    sys.stdout.write(text)


if __name__ == '__main__': main()
