"""The picture in README: `python docs/picture.py` draws a digital patient's PET over CT, outlines one lesion, and lays the report beside it with that lesion's sentence marked."""
import io
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from petvlm.figures import Picture, png
from petvlm.files import atomic
from petvlm.phantom import draw, sample_patient
from petvlm.reports import write_report
from petvlm.scene import scene_of
from petvlm.screen import outline
from petvlm.widget import look_of, rgb
from pages import NBS, PATIENT

MARK = '#ffe08a'

def hottest(study, report) -> int:
    "Which finding of the study the hottest of the report is."
    best = max((f for f in report.findings if f.suvmax), key=lambda f: f.suvmax)
    return next(i for i, f in enumerate(study.findings) if f.site == best.site and f.kind == best.kind and round(f.suvmax or 0, 1) == best.suvmax)

def slice_of(ax, study, k: int) -> None:
    "The axial plane through finding `k`, its outline in cyan."
    scene = scene_of(study); look, view = look_of(scene)._replace(outlines=()), scene.views['axial']
    at = scene.frame.index(study.findings[k].center_mm); index = int(round(at[view.axis])); sy, sx = scene.frame.spacing[view.rows], scene.frame.spacing[view.cols]
    pixels = rgb(scene, 'axial', index, look); rows, cols = pixels.shape[:2]
    ax.imshow(pixels, extent=(0, cols*sx, rows*sy, 0), interpolation='bicubic')
    lines = outline(scene.cut('lesions', 'axial', index)).get(k + 1, np.empty((0, 4)))
    ax.plot(lines[:, ::2].T*sx, lines[:, 1::2].T*sy, color='cyan', lw=1.6)
    body = pixels.max((1, 2)) > 60; ys = np.flatnonzero(body)*sy
    ax.set(xlim=(0, cols*sx), ylim=(min(ys.max() + 12, rows*sy), max(ys.min() - 12, 0)), xticks=[], yticks=[])
    for x, side in ((.03, view.sides[0]), (.97, view.sides[1])): ax.text(x, .5, side, transform=ax.transAxes, color='w', weight='bold', ha='center', va='center')

def flow(fig, words, x0: float, x1: float, y: float, size: float = 11.5, lead: float = .098) -> None:
    "`(word, marked)` set in lines between `x0` and `x1` (figure fractions) from `y` down."
    draw_at, width, x = FigureCanvasAgg(fig).get_renderer(), fig.get_window_extent().width, x0
    space = size*.28/72*fig.dpi/width
    for word, marked in words:
        t = fig.text(x, y, word, size=size, va='baseline', color='#111' if marked else '#777', weight='bold' if marked else 'normal')
        long = t.get_window_extent(draw_at).width/width
        if x + long > x1: x, y = x0, y - lead; t.set_position((x, y))
        if marked: t.set_bbox(dict(facecolor=MARK, edgecolor='none', pad=2.2))
        x += long + space

def picture(seed: int = PATIENT, region: str = 'chest', language: str = 'en') -> Picture:
    patient = sample_patient(seed); study = draw(patient, spacing=(4., 3., 3.), reports=True)
    report = write_report(study.findings, region, language, seed=seed)
    k = hottest(study, report); f = study.findings[k]
    span = next(g.span for g in report.findings if g.site == f.site and g.kind == f.kind and g.suvmax == round(f.suvmax, 1))
    fig = Picture(figsize=(10, 2.75), dpi=96); ax = fig.add_axes((0, 0, .5, 1)); slice_of(ax, study, k)
    starts = np.cumsum([0] + [len(w) + 1 for w in report.text.split(' ')])
    flow(fig, [(w, span[0] <= s < span[1]) for s, w in zip(starts, report.text.split(' '))], .525, .985, .84)
    fig.text(.525, .05, f'Digital patient {seed}, {region}. PET (SUVbw 0 to 7) over CT. Nobody was scanned.', size=8, color='#777')
    return fig

if __name__ == '__main__':
    small = io.BytesIO(); Image.open(io.BytesIO(png(picture()))).convert('RGB').quantize(128).save(small, 'PNG', optimize=True)
    atomic(NBS/'images/lesion.png', lambda p: p.write_bytes(small.getvalue()))
