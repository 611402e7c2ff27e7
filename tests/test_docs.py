"The documentation: nothing is left out of it, no link leads nowhere, no page asks the network; and, slow, the whole site in a browser that has none."
import ast, functools, os, re, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote
import nbformat, papermill, pytest
from browser import CHROMIUM, Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'docs'))
import pages
from conf import plain_tex, rst

@functools.cache
def sources() -> dict[str, str]:
    "Page -> what Sphinx reads of it."
    return dict(pages.sources())

@functools.cache
def package() -> str: return '\n'.join(p.read_text(encoding='utf-8') for p in sorted((ROOT/'petvlm').glob('*.py'))) + (ROOT/'Makefile').read_text(encoding='utf-8')


# ---- what there is ----

def entries(page: str) -> set[str]:
    "The pages that the tables of contents of a page name."
    found = set()
    for block in re.findall(r'```\{toctree\}\n(.*?)```', sources()[page], re.S):
        for line in (x.strip() for x in block.split('\n') if x.strip() and not x.strip().startswith(':')):
            name = m[1] if (m := re.search(r'<(.+)>$', line)) else line
            path = os.path.normpath(os.path.join(os.path.dirname(page), name))
            found.add(next((p for p in (path, f'{path}.md', f'{path}.ipynb') if p in sources()), f'{path}?'))
    return found

def test_every_page_is_in_the_table_of_contents_once():
    listed = [e for p in sources() if p.endswith('.md') for e in entries(p)]
    assert sorted(listed) == sorted(set(sources()) - {'index.md'})

def test_every_notebook_and_howto_is_a_page():
    there = {str(p.relative_to(ROOT/'nbs')) for kind in ('*.ipynb', '*.md') for p in (ROOT/'nbs').rglob(kind)} - {'index.ipynb'}
    assert there <= set(sources()) and {'tour.ipynb', 'troubleshooting.md', 'howto/own_encoder.ipynb', 'howto/own_language_model.ipynb', 'howto/gpu.md', 'howto/cluster.md'} <= there

def test_every_module_has_a_page():
    modules = {p.stem for p in (ROOT/'petvlm').glob('*.py')} - {'__init__', '_modidx'}
    assert {f'api/{m}.md' for m in modules} | {'api/index.md'} == {p for p in sources() if p.startswith('api/')}
    assert all(f'automodule:: petvlm.{m}\n' in sources()[f'api/{m}.md'] for m in modules)

def test_every_notebook_begins_with_a_title_and_a_summary():
    assert not [n for n in pages.notebooks() if n[:2].isdigit() and not (pages.read(n).cells[0].cell_type == 'markdown' and all(pages.heading(pages.read(n))))]

def test_readme_is_the_index():
    assert (ROOT/'README.md').read_text(encoding='utf-8') == pages.readme(), 'python docs/pages.py readme'

def test_readme_shows_the_thing_in_its_first_screen():
    top = (ROOT/'README.md').read_text(encoding='utf-8').split('\n## ')[0]
    picture = re.search(r'!\[.+\]\((nbs/images/.+?\.png)\)', top)[1]
    code = re.search(r'```python\n(.+?)```', top, re.S)[1]
    assert (ROOT/picture).stat().st_size < 150_000 and len(top.split('\n')) < 30
    ast.parse(code); assert len(code.strip().split('\n')) == 5 and str(pages.PATIENT) in code
    assert len(re.findall(r'^    make \w+', top, re.M)) == 2


# ---- links ----

def links(page: str):
    "Markdown links and pictures of a page, code left out."
    text = sources()[page]
    if page.endswith('.ipynb'): text = '\n\n'.join(c.source for c in nbformat.reads(text, 4).cells if c.cell_type == 'markdown')
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    text = re.sub(r'`[^`\n]*`(?!\]\()', '', re.sub(r'(?m)^    .*$', '', text))
    return re.findall(r'\]\(([^)\s]+)\)', text)

def anchors(page: str) -> set[str]:
    text = sources()[page] if page.endswith('.md') else '\n'.join(c.source for c in nbformat.reads(sources()[page], 4).cells if c.cell_type == 'markdown')
    return {re.sub(r'[^\w\- ]', '', h.lower()).strip().replace(' ', '-') for h in re.findall(r'^#+ (.+)$', text, re.M)}

def test_no_link_leads_nowhere():
    lost, made = [], {'live/phantom.html', *(f'images/{p.name}' for p in (ROOT/'nbs/images').iterdir())}
    for page in sources():
        for link in links(page):
            path, _, anchor = unquote(link).partition('#')
            if re.match(r'[a-z]+:', path): continue
            target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
            if target not in sources() and target not in made: lost.append((page, link))
            elif anchor and anchor not in anchors(target): lost.append((page, link))
    assert not lost

def test_links_of_readme_exist():
    found = re.findall(r'\]\((?![a-z]+:)([^)#\s]+)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert found and not [f for f in found if not (ROOT/f).exists()]

def test_names_become_links_and_code_does_not():
    to = {'01_volume': '01_volume.ipynb', 'petvlm.volume': 'api/volume.md'}
    text = '`01_volume` and `petvlm.volume`, `petvlm.volume.Volume`, `x`\n\n    `01_volume`\n```\n`01_volume`\n```\n[`01_volume`](a)'
    assert pages.linked(text, 'papers/p.md', to) == '[`01_volume`](../01_volume.ipynb) and [`petvlm.volume`](../api/volume.md), {py:obj}`petvlm.volume.Volume`, `x`\n\n    `01_volume`\n```\n`01_volume`\n```\n[`01_volume`](a)'
    assert pages.linked('`01_volume`', '01_volume.ipynb', to) == '`01_volume`'
    assert pages.moved('[a](b.ipynb) [c](../D.md#e) [f](g:h) [i](#j)', 'nbs') == '[a](nbs/b.ipynb) [c](D.md#e) [f](g:h) [i](#j)'


# ---- nothing is asked of the network, nor of a kernel ----

def test_outputs_need_neither_kernel_nor_network():
    for name in (n for n in sources() if n.endswith('.ipynb')):
        nb = nbformat.reads(sources()[name], 4)
        data = [o.get('data', {}) for c in nb.cells if c.cell_type == 'code' for o in c.outputs]
        assert 'widgets' not in nb.metadata and not [d for d in data if any('widget' in k or 'javascript' in k for k in d)], name
        html = ''.join(d.get('text/html', '') for d in data)
        assert not re.search(r'<script|(?:src|href)\s*=\s*["\']?(?:https?:)?//', html), name
        assert not [c for c in nb.cells if c.cell_type == 'code' and re.search(r'^#\|', c.source, re.M)], name

def test_templates_name_no_address():
    assert not re.search(r'https?://|//cdn', ''.join(p.read_text(encoding='utf-8') for p in (ROOT/'docs').rglob('*') if p.is_file() and p.suffix in ('.py', '.css', '.html', '.js')))

def test_a_widget_gives_way_to_its_picture():
    keep = {'data': {'image/png': 'x', pages.WIDGET: {}}, 'output_type': 'display_data'}
    made = nbformat.v4.new_output('display_data', data=dict(keep['data'])), nbformat.v4.new_output('display_data', data={pages.WIDGET: {}, 'text/plain': '0%'})
    assert pages.still(made[0])['data'] == {'image/png': 'x'} and pages.still(made[1]) is None


# ---- formulas and docstrings ----

def formulas():
    for name in pages.notebooks():
        text = '\n\n'.join(c.source for c in pages.read(name).cells if c.cell_type == 'markdown')
        text = re.sub(r'```.*?```|`[^`\n]*`', '', text, flags=re.S)
        for block, inline in re.findall(r'\$\$(.+?)\$\$|(?<![\\$\w])\$(?! )([^$\n]+?)(?<! )\$(?![\d\w])', text, re.S): yield name, (block or inline), bool(block)

def test_every_formula_can_be_drawn():
    from docutils.utils.math import MathError
    from docutils.utils.math.latex2mathml import tex2mathml
    bad, found = [], list(formulas())
    for name, tex, block in found:
        try: assert tex2mathml(plain_tex(tex), as_block=block).startswith('<math')
        except MathError as e: bad.append((name, tex, str(e)))
    assert len(found) > 60 and not bad

def test_docstrings_keep_their_code_and_their_underscores():
    assert rst('The `x` of `a_b`s, 2*3 | y_') == r'The ``x`` of ``a_b``\ s, 2\*3 \| y\_'
    assert rst('(`q`)') == '(``q``)' and rst("an odd ` one_") == r"an odd ' one\_"


# ---- troubleshooting says what the package says ----

SAYS = sorted({q for line in (ROOT/'nbs/troubleshooting.md').read_text(encoding='utf-8').split('\n') if 'Says:' in line for q in re.findall(r'`([^`]+)`', re.split(r'(?<=`)\. |Behind it|Do:', line.partition('Says:')[2])[0])})

@pytest.mark.parametrize('fragment', SAYS)
def test_the_message_is_one_of_the_package(fragment): assert fragment in package()

def test_enough_messages_are_told(): assert len(SAYS) > 30


# ---- the notebooks beside the components ----

@pytest.mark.slow
@pytest.mark.parametrize('name', ['own_encoder', 'own_language_model'])
def test_howto_runs(name):
    from kernels import run
    run(ROOT/f'nbs/howto/{name}.ipynb')

@pytest.mark.slow
def test_the_tour_runs(tmp_path):
    "From the patient to the sentence that lights up, with as little training as shows that the path is whole."
    start = time.perf_counter()
    papermill.execute_notebook(ROOT/'nbs/tour.ipynb', tmp_path/'tour.ipynb', parameters=dict(patients=6, steps=2), cwd=ROOT/'nbs', progress_bar=False, log_output=False)
    assert time.perf_counter() - start < 120        # seconds, on a busy machine; about 20 on an idle one


# ---- the site itself ----

class Asked(HTMLParser):
    "What a page loads, and where it leads."
    def __init__(self, text):
        super().__init__(); self.loads, self.leads, self.ids = [], [], set(); self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.add(a['id'])
        if tag in ('script', 'img', 'iframe', 'source', 'video', 'audio', 'embed') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('rel') not in ('next', 'prev', 'index', 'search', 'genindex', 'canonical') and a.get('href'): self.loads.append(a['href'])
        if tag == 'a' and a.get('href'): self.leads.append(a['href'])

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "Built anew, as `make docs` does it, with every address of the network closed to it."
    start = time.perf_counter()
    run = subprocess.run([sys.executable, str(ROOT/'docs/pages.py')], cwd=ROOT, capture_output=True, text=True, env=os.environ | {k: 'http://127.0.0.1:9' for k in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY')})
    assert run.returncode == 0, run.stderr[-3000:]
    assert time.perf_counter() - start < 360        # three minutes on two idle cores
    return pages.OUT

@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere_and_links_lead_somewhere(site):
    asked = {p.relative_to(site): Asked(p.read_text(encoding='utf-8')) for p in site.rglob('*.html') if p.name != 'phantom.html'}
    assert len(asked) > 230
    assert not [(p, x) for p, a in asked.items() for x in a.loads if re.match(r'(https?:)?//', x)]
    assert not [(p, x) for p, a in asked.items() for x in a.loads if not x.startswith('data:') and not (site/p.parent/unquote(x.split('?')[0])).exists()]
    lost = []
    for p, a in asked.items():
        for x in (x for x in a.leads if not re.match(r'[a-z]+:|//', x)):
            path, _, anchor = unquote(x).partition('#'); target = (site/p.parent/path.split('?')[0]).resolve() if path else (site/p).resolve()
            if not target.exists(): lost.append((str(p), x))
            elif anchor and target.suffix == '.html' and (t := asked.get(target.relative_to(site.resolve()))) and anchor not in t.ids: lost.append((str(p), x))
    assert not lost
    css = ''.join(p.read_text(encoding='utf-8') for p in site.rglob('*.css'))
    assert not re.search(r'url\(["\']?(https?:)?//|@import\s+["\']?(url)?\(?["\']?https?:', css)

@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason='chromium is not installed (apt-get install chromium, or PETVLM_CHROMIUM=path)')
@pytest.mark.parametrize('name, shows', [('index.html', "document.querySelector('article img').naturalWidth > 400"), ('16_alignment.html', "document.querySelectorAll('math').length > 8 && document.querySelector('math').getBoundingClientRect().height > 5"),
    ('api/config.html', "!!document.getElementById('petvlm.config.resolve')"), ('troubleshooting.html', "document.querySelectorAll('h2').length > 8"), ('search.html?q=alignment', "document.querySelectorAll('#search-results li').length > 3"),
    ('live.html', "!!document.querySelector('iframe')"), ('live/phantom.html', "!!document.querySelector('.petvlm-viewer')?.petvlm?.panels.axial.answer")])
def test_pages_open_from_disk_without_network(site, tmp_path, name, shows):
    path, _, query = name.partition('?')
    with Page((site/path).as_uri() + (f'?{query}' if query else ''), tmp_path, size=(1400, 1500)) as page:
        page.until(shows)
        outside = page.js("performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('file:') && !n.startsWith('data:') && !n.startsWith('blob:'))")
        assert outside == [] and page.js("[...document.images].filter(i => !i.naturalWidth).length") == 0
        if keep := os.environ.get('PETVLM_SHOTS'):
            from PIL import Image
            Image.fromarray(page.picture().astype('uint8')).save(Path(keep)/f"{path.replace('/', '-')}.png")
