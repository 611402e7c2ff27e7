"Sphinx on what docs/pages.py has staged. Nothing here names an address on the network."
import dataclasses, inspect, re
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project, author, language = 'petvlm', 'petvlm contributors', 'en'
project_copyright = '2026 onwards, petvlm contributors'
extensions = ['myst_nb', 'sphinx.ext.autodoc']
html_theme, html_title, html_static_path, html_css_files, html_extra_path = 'furo', 'petvlm', ['_static'], ['petvlm.css'], ['_extra']
html_show_sourcelink = html_copy_source = html_show_search_summary = False    # summaries are fetched, and a page opened from disk may fetch nothing
html_math_renderer = 'mathml'

nb_execution_mode = 'off'
nb_ipywidgets_js = {}                                   # by default two scripts from a CDN
myst_enable_extensions, myst_heading_anchors, myst_dmath_allow_space, myst_dmath_allow_digits = ['dollarmath'], 3, False, False
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']

add_module_names, python_use_unqualified_type_names, python_maximum_signature_line_length = False, True, 110
toc_object_entries_show_parents = 'hide'
autodoc_member_order, autodoc_inherit_docstrings, autodoc_preserve_defaults, autodoc_typehints = 'bysource', False, True, 'signature'


# ---- formulas: MathML, which browsers draw by themselves ----

def plain_tex(tex: str) -> str:
    "TeX in the words that docutils' converter knows: big brackets with a side, fractions with braces, a number beside its formula."
    tex = re.sub(r'\\(big|Big|bigg|Bigg)(?=\\?[(\[{])', r'\\\1l', tex)
    tex = re.sub(r'\\(big|Big|bigg|Bigg)(?=\\?[)\]}])', r'\\\1r', tex)
    tex = re.sub(r'\\([td]?frac)(\d)(\d)', r'\\\1{\2}{\3}', tex)
    return re.sub(r'\\tag\{(\w+)\}', r'\\qquad (\1)', tex)

def _inline(self, node):
    self.body.append(tex2mathml(plain_tex(node.astext()))); raise nodes.SkipNode

def _block(self, node):
    self.body.append(f'<div class="formula">{tex2mathml(plain_tex(node.astext()), as_block=True)}</div>\n'); raise nodes.SkipNode


# ---- docstrings: Markdown's backticks, nothing else that reStructuredText would take for markup ----

def _plain(text: str) -> str: return re.sub(r'([\\*|_])', r'\\\1', text)

def rst(text: str) -> str:
    "A docstring as reStructuredText. One with an odd backtick is left without literals."
    parts = text.split('`')
    if len(parts) % 2 == 0: return _plain(text.replace('`', "'"))
    out = _plain(parts[0])
    for code, after in zip(parts[1::2], parts[2::2]):
        glue = r'\ ' if out and not re.search(r"[\s\-:/'\"<(\[{]$", out) else ''
        out += f'{glue}``{code}``' if code.strip() == code and code else _plain(f"'{code}'")
        out += (r'\ ' if after and not re.match(r"[\s'\")\]}>\-/\\:.,;!?]", after) else '') + _plain(after)
    return out

_FIELD = re.compile(r'^    (\w+): [^#\n]*?# *(.+)$', re.M)

def _fields(obj) -> list[str]:
    "What the comments beside the fields of a dataclass or named tuple say, as a list."
    if not (dataclasses.is_dataclass(obj) or hasattr(obj, '_fields')): return []
    return ['', *(f'- ``{n}``: {rst(told)}' for n, told in _FIELD.findall(inspect.getsource(obj))), '']

def _docstring(app, what, name, obj, options, lines):
    lines[:] = rst('\n'.join(lines)).split('\n')
    if what == 'class': lines += _fields(obj)

def _skip(app, what, name, obj, skip, options): return True if type(obj).__name__ == '_tuplegetter' else None      # "Alias for field number 0"

def setup(app):
    app.add_html_math_renderer('mathml', (_inline, None), (_block, None))
    app.connect('autodoc-process-docstring', _docstring)
    app.connect('autodoc-skip-member', _skip)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
