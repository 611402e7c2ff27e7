"""`make docs`: notebooks as they stand (nothing is executed again), how-tos, troubleshooting and a page per module from its docstrings, as HTML in `_docs/`.

    python docs/pages.py           # stage everything in build/docs and run Sphinx on it
    python docs/pages.py readme    # README.md from nbs/index.ipynb: the same text, links from the project's root

No network is used, and none is needed to read what comes out: `tests/test_docs.py` opens it in a browser that has none."""
from __future__ import annotations
import functools, os, posixpath, re, shutil, subprocess, sys, time
from collections.abc import Iterator
from pathlib import Path
import nbformat

ROOT = Path(__file__).resolve().parents[1]
NBS, WORK, OUT = ROOT/'nbs', ROOT/'build/docs', ROOT/'_docs'
WIDGET = 'application/vnd.jupyter.widget-view+json'
PATIENT = 20323                                         # of the live page and of the picture in README

START = ('tour.ipynb', 'own_data.ipynb', 'howto/own_encoder.ipynb', 'howto/own_language_model.ipynb', 'howto/gpu.md', 'howto/several_cards.md', 'howto/cluster.md', 'troubleshooting.md', 'live.md')
PARTS = {                                               # page -> title, first and last number of its notebooks, what they are about
    'inputs': ('What goes in', 0, 9, 'Configuration, volumes, DICOM and SUV, findings, reports and questions, the phantom, published layouts, rows on the model grid.'),
    'model': ('What a model is', 10, 19, 'Tokens, stem, encoders, fusion, projectors, language, losses, the alignment loss, their assembly, and probes of what it knows.'),
    'learning': ('How it learns and speaks', 20, 28, 'Stages as data, generation, attention, served models.'),
    'judging': ('How it is judged and seen', 29, 99, 'Metrics, findings and lesions, tables, claims, figures, the viewer, the study page, the command line.')}
FOLDERS = {'papers': ('The papers, retold', 'What each paper claims, what its code does, its tables beside ours, and what became of every claim.'),
           'pipeline': ('The pipeline', 'Thin notebooks that DVC runs through papermill. They are stripped of outputs; the executed ones lie in `reports/`.')}
BESIDE = {'contributing.md': ROOT/'CONTRIBUTING.md', 'changelog.md': ROOT/'CHANGELOG.md'}


# ---- what there is ----

def notebooks() -> list[str]:
    "Every notebook below `nbs/`, as a path from there; the index is the front page and no page of its own."
    return sorted(str(p.relative_to(NBS)) for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and p != NBS/'index.ipynb')

def of_part(name: str) -> list[str]:
    "The component notebooks of a part, in their order."
    _, first, last, _ = PARTS[name]
    return [n for n in notebooks() if n[:2].isdigit() and first <= int(n[:2]) <= last]

def read(name: str): return nbformat.read(NBS/name, 4)

def module_of(nb) -> str | None:
    "The module that a notebook exports."
    return next((m[1] for c in nb.cells if (m := re.search(r'^#\| default_exp (\w+)', c.source, re.M))), None)

@functools.cache
def told(name: str) -> tuple[str, str]:
    "Title and one-line summary of a notebook, by its name."
    return heading(read(name))

def heading(nb) -> tuple[str, str]:
    "Title and one-line summary of a notebook."
    text = next(c.source for c in nb.cells if c.cell_type == 'markdown')
    title, summary = re.search(r'^# (.+)$', text, re.M), re.search(r'^> (.+)$', text, re.M)
    return title[1] if title else '', summary[1] if summary else ''

@functools.cache
def modules() -> dict[str, str]:
    "Module -> the notebook that it is exported from."
    return {m: n for n in notebooks() if n[:2].isdigit() and (m := module_of(read(n)))}

def targets() -> dict[str, str]:
    "What may be named in backticks -> its page."
    out = {Path(n).stem: n for n in notebooks() if n[:2].isdigit()} | {'own_data': 'own_data.ipynb'}
    return out | {f'nbs/{n}': n for n in notebooks()} | {'CONTRIBUTING.md': 'contributing.md', 'CHANGELOG.md': 'changelog.md', 'nbs/troubleshooting.md': 'troubleshooting.md'} | {f'petvlm.{m}': f'api/{m}.md' for m in modules()}


# ---- text ----

_NAME = re.compile(r'(?<![`\[{}\w])`([\w./]+)`(?![`\]])')

def linked(text: str, here: str, to: dict[str, str]) -> str:
    "Markdown in which the names of notebooks and modules in backticks lead to their pages; code blocks and headings stay as they are."
    def link(m) -> str:
        page = to.get(m[1])
        if page and page != here: return f'[`{m[1]}`]({os.path.relpath(page, os.path.dirname(here) or ".")})'
        return f'{{py:obj}}`{m[1]}`' if m[1].startswith('petvlm.') and m[1].count('.') > 1 else m[0]
    out, fenced = [], False
    for line in text.split('\n'):
        fenced ^= line.lstrip().startswith('```')
        out.append(line if fenced or line.startswith(('    ', '#', '```')) else _NAME.sub(link, line))
    return '\n'.join(out)

def still(output) -> dict | None:
    "An output without what needs a kernel: a widget gives way to its picture, a progress bar to nothing."
    if WIDGET not in output.get('data', {}): return output
    data = {k: v for k, v in output.data.items() if k != WIDGET}
    return nbformat.from_dict(output | {'data': data}) if set(data) - {'text/plain'} else None

def page(nb, here: str, to: dict[str, str], note: str = ''):
    "The notebook as a page: without hidden cells, directives and widgets, with links, and `note` below its summary."
    cells = []
    for c in nb.cells:
        if c.cell_type == 'code':
            if re.match(r'\s*#\|\s*(hide|default_exp)\b', c.source): continue
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M).strip('\n')
            if not c.source.strip(): continue
            c.outputs = [o for o in map(still, c.outputs) if o]
        else: c.source = linked(c.source, here, to)
        cells.append(c)
    if note: cells[0].source += f'\n\n{note}'
    nb.cells = cells; nb.metadata.pop('widgets', None)
    return nb

def moved(text: str, folder: str) -> str:
    "Markdown written in `folder`, as it must read one level above: relative links go through `folder`."
    return re.sub(r'(\]\()(?![a-z]+:|#)([^)\s]+)', lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2])), text)

def readme() -> str:
    "README.md: the text of nbs/index.ipynb with links from the project's root."
    return moved('\n\n'.join(c.source for c in read('index.ipynb').cells if c.cell_type == 'markdown'), 'nbs') + '\n'


# ---- pages that are made ----

def toctree(entries, caption: str = '', depth: int = 1, hidden: bool = True) -> str:
    options = [f':caption: {caption}']*bool(caption) + [f':maxdepth: {depth}'] + [':hidden:']*hidden
    return '\n'.join(['```{toctree}', *options, '', *entries, '```', ''])

def listing(names: list[str], here: str) -> Iterator[str]:
    "A line per notebook: its name and its summary."
    for n in names:
        title, summary = told(n)
        yield f'- [`{Path(n).stem}`]({os.path.relpath(n, os.path.dirname(here))}): {summary or title}'

def part_page(here: str, title: str, about: str, names: list[str]) -> str:
    entries = [f'{Path(n).stem} <{os.path.relpath(n, os.path.dirname(here))}>' for n in names]
    return '\n'.join([f'# {title}', '', about, '', *listing(names, here), '', toctree(entries)])

def api_page(module: str, notebook: str) -> str:
    return '\n'.join([f'# petvlm.{module}', '', f'Explained step by step, with examples, in [`{Path(notebook).stem}`](../{notebook}).', '', '```{eval-rst}', f'.. automodule:: petvlm.{module}', '   :members:', '```', ''])

def api_index(found: dict[str, str]) -> str:
    lines = [f'- [`petvlm.{m}`]({m}.md): {told(n)[1]}' for m, n in found.items()]
    return '\n'.join(['# Modules', '', 'In the order in which they may import each other: a module imports only those above it.', '', *lines, '', toctree([f'petvlm.{m} <{m}>' for m in found])])

LIVE = """# The viewer, live

A digital patient in the viewer that `view(study)` opens in JupyterLab; `petvlm.offline.export_html` wrote it as one file. Scroll through slices, click to move the crosshair, drag the projection to turn it. <a href="live/phantom.html">Open it alone</a>.

<iframe src="live/phantom.html" title="PET/CT viewer" style="width:100%;height:1050px;border:1px solid #8884"></iframe>
"""

def front() -> str:
    "The front page: README, and what hangs below it."
    text = '\n\n'.join(c.source for c in read('index.ipynb').cells if c.cell_type == 'markdown').replace('](../CONTRIBUTING.md', '](contributing.md').replace('](../CHANGELOG.md', '](changelog.md')
    below = [toctree(START, 'Start here'), toctree([*(f'parts/{p}' for p in PARTS), *(f'parts/{f}' for f in FOLDERS)], 'Notebooks', 1), toctree(['api/index', *BESIDE], 'Reference')]
    return linked(text, 'index.md', targets()) + '\n\n' + '\n'.join(below)

def sources() -> Iterator[tuple[str, str]]:
    "`(path, text)` of every page that Sphinx reads."
    to, found = targets(), modules()
    yield 'index.md', front()
    for n in notebooks():
        nb = read(n); m = module_of(nb) if n[:2].isdigit() else None
        yield n, nbformat.writes(page(nb, n, to, f'Exported as [`petvlm.{m}`](api/{m}.md).' if m else ''))
    for p in sorted(NBS.rglob('*.md')): yield (n := str(p.relative_to(NBS))), linked(p.read_text(encoding='utf-8'), n, to)
    for name, (title, _, _, about) in PARTS.items(): yield f'parts/{name}.md', part_page(f'parts/{name}.md', title, about, of_part(name))
    for name, (title, about) in FOLDERS.items(): yield f'parts/{name}.md', part_page(f'parts/{name}.md', title, about, [n for n in notebooks() if n.startswith(f'{name}/')])
    for m, n in found.items(): yield f'api/{m}.md', api_page(m, n)
    yield 'api/index.md', api_index(found)
    yield 'live.md', LIVE
    for name, path in BESIDE.items(): yield name, linked(path.read_text(encoding='utf-8'), name, to)

def stage(folder: Path) -> None:
    "Write what Sphinx reads into `folder`; a file whose text is the same keeps its time, so that Sphinx passes over it."
    wanted = dict(sources())
    for path in (p for p in folder.rglob('*') if p.suffix in ('.md', '.ipynb')):
        if str(path.relative_to(folder)) not in wanted: path.unlink()
    for name, text in wanted.items():
        path = folder/name; path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding='utf-8') != text: path.write_text(text, encoding='utf-8')
    shutil.copy2(ROOT/'docs/conf.py', folder/'conf.py')
    shutil.copytree(ROOT/'docs/_static', folder/'_static', dirs_exist_ok=True)
    shutil.copytree(NBS/'images', folder/'images', dirs_exist_ok=True)

def live(path: Path) -> None:
    "A digital patient as a page of its own, unless it is there and newer than all that could draw it."
    newest = max(p.stat().st_mtime for p in (ROOT/'petvlm').rglob('*') if p.suffix in ('.py', '.js', '.css'))
    if path.exists() and path.stat().st_mtime >= newest: return
    from petvlm.offline import export_html
    from petvlm.phantom import draw, sample_patient
    path.parent.mkdir(parents=True, exist_ok=True)
    export_html(draw(sample_patient(PATIENT), reports=True), path, title='A digital patient', reports=True)

def orphans(html: Path) -> list[Path]:
    "Pages below `html` whose source is gone, which Sphinx leaves lying."
    wanted = {str(Path(n).with_suffix('.html')) for n, _ in sources()} | {'genindex.html', 'search.html', 'py-modindex.html', 'live/phantom.html'}
    return [p for p in html.rglob('*.html') if '_static' not in p.parts and str(p.relative_to(html)) not in wanted]

def build() -> int:
    "Stage, then Sphinx; every warning is an error. Returns Sphinx's exit code."
    start = time.perf_counter()
    source = WORK/'source'; source.mkdir(parents=True, exist_ok=True)
    stage(source); live(source/'_extra/live/phantom.html')
    code = subprocess.call([sys.executable, '-m', 'sphinx', '-b', 'html', '-j', '2', '-W', '--keep-going', '-q', '-d', str(WORK/'doctrees'), str(source), str(WORK/'html')], cwd=ROOT)
    if not code:
        for page in orphans(WORK/'html'): page.unlink()
        # MyST-NB writes its copies beside the folder that it is given: so that is below build/
        shutil.rmtree(OUT, ignore_errors=True); shutil.copytree(WORK/'html', OUT)
        sys.stdout.write(f'{OUT/"index.html"}: {sum(1 for _ in OUT.rglob("*.html"))} pages in {time.perf_counter() - start:.0f} s\n')
    return code

if __name__ == '__main__':
    if sys.argv[1:] == ['readme']: (ROOT/'README.md').write_text(readme(), encoding='utf-8')
    elif sys.argv[1:]: sys.exit(f'{sys.argv[1:]}: expected nothing, or readme')
    else: sys.exit(build())
