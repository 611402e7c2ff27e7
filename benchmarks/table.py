"""One line per comparison: what a benchmark writes beside its raw numbers (`table` in its JSON), and `benchmarks/README.md`, which is made of all of them. Only the standard library is imported here."""
import json, statistics
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# Benchmarks

    make bench                                     # every benchmark, then this table; `BENCH="--quick data metrics"` for a look at two of them
    python benchmarks/run.py --table               # this table again, from the JSON files beside it
    python benchmarks/alignment.py --device cuda   # on a card: alignment, axial, encoders, data; writes alignment.cuda.json beside the CPU's

Each benchmark runs peer and petvlm in one process (or each in processes of their own, where peak memory counts), in turn, the order turning. *Ratio* is the median over the rounds of
peer to ours within a round, smallest and largest in brackets: above 1, petvlm is faster or smaller. Where a bar is set (issue 7), its line says what it is and whether it is met.
Numbers are those of the machine named below, with the load (waiting processes) that it had at the end: seconds of benchmarks that count CPU time do not hold the wait, but caches and memory are shared.
Nothing here is a test, and no test is timed.
"""


def line(job, peer, ours, ratios=(), unit='s', bar='', met=None, note=''):
    "One comparison. `peer`, `ours`: (what it is, value or list of the rounds' values, None where there is none); `ratios`: peer to ours in each round, by default from the lists, None for no ratio. `bar`: words; `met`: whether it is."
    values = [x[1] if isinstance(x[1], (list, tuple)) else [x[1]] for x in (peer, ours)]
    if ratios == () and None not in values[0] + values[1] and len(values[0]) == len(values[1]) and min(values[1]) > 0: ratios = [p/o for p, o in zip(*values)]
    middle = lambda v: None if None in v else statistics.median(v)
    out = {'job': job, 'peer': peer[0], 'ours': ours[0], 'peer_value': middle(values[0]), 'our_value': middle(values[1]), 'unit': unit}
    if ratios: out |= {'ratio': statistics.median(ratios), 'ratio_min': min(ratios), 'ratio_max': max(ratios)}
    return out | {'bar': bar, 'met': met, 'note': note}


def number(x):
    "Three digits, or all of a whole number."
    if x is None: return ''
    return f'{x:,.0f}' if abs(x) >= 100 else f'{x:.3g}'


# ---- JSON files that were written before there were lines, or by benchmarks with rows of `ways`

def from_ingest(r):
    peer, ours = 'SimpleITK and MONAI', 'petvlm'
    one = lambda job, key, unit, ratio: line(job, (peer, r[key]['peer']), (ours, r[key]['petvlm']), [ratio], unit)
    return [one('DICOM folder to two tensors, time', 'seconds', 's', r['speed_ratio']), one('DICOM folder to two tensors, peak memory', 'peak_mb', 'MB', 1/r['memory_ratio'])]

def from_viewer(r):
    return [line(f'viewer: {name}', ('', None), ('petvlm', a['median_ms']), unit='ms', note=f"worst {number(a['worst_ms'])} ms") for name, a in r['answers'].items()]

def told(row):
    "Whole numbers, words and sizes of a row: what was done."
    plain = lambda v: isinstance(v, (str, int)) and not isinstance(v, bool)
    shown = {k: v if plain(v) else ' x '.join(map(str, v)) for k, v in row.items() if plain(v) or isinstance(v, list) and v and all(map(plain, v))}
    return ', '.join(f'{k.replace("_", " ")} {v}' for k, v in shown.items())

def bar_of(name, row, way, ratio):
    "`(bar, met)` of issue 7 for a cost ratio (ours to plain), time or memory."
    if name == 'alignment' and way in ('channels', 'many') and row.get('tokens', 0) >= 2048: return 'at most 1.08 times plain SDPA', ratio <= 1.08
    return '', None

def from_ways(name, r):
    "Rows `{..., 'ways': {name: {'seconds', 'all_seconds', 'peak_mb', ...}}}`, whose first way is the peer; eager attention is one, too."
    out = []
    for row in r['rows']:
        ways = row['ways']; first, *others = ways
        for peer, w in (('eager', 'channels') if w == 'eager' and 'channels' in ways else (first, w) for w in others):
            p, o = ways[peer], ways[w]
            for what, key, unit in (('time', 'all_seconds', 's'), ('peak memory', 'peak_mb', 'MB'), ('memory that a step adds', 'rise_mb', 'MB')):
                if key not in o or key == 'rise_mb' and 'peak_mb' in o: continue
                x = line(f'{told(row)}: {what}', (peer, p[key]), (w, o[key]), unit=unit)
                if 'ratio' not in x: out.append(x); continue
                cost = 1/x['ratio']
                if peer == first: x['bar'], x['met'] = bar_of(name, row, w, cost)
                notes = [f'{cost:.2f} times the {what}'] if cost >= 1.005 else []
                if what == 'time' and 'limit' in o and peer == first: notes.append(f"{o['limit']:.2f} by FLOPs alone")
                out.append(x | {'note': '; '.join(notes)})
    return out

CARD = ".cuda"     # behind a benchmark's name: its file from a card

OLD = {'ingest': from_ingest, 'viewer': from_viewer}

def lines(name, result):
    "The lines of a benchmark's JSON, whichever form it has."
    if 'table' in result: return result['table']
    name = name.removesuffix(CARD)
    return OLD[name](result) if name in OLD else from_ways(name, result) if 'ways' in (result.get('rows') or [{}])[0] else []


# ---- the page

def row(name, x):
    value = lambda of: f"{number(x[f'{of}_value'])} {x['unit']}" if x[f'{of}_value'] is not None else ''
    ratio = f"{x['ratio']:.2f} [{x['ratio_min']:.2f}, {x['ratio_max']:.2f}]" if 'ratio' in x else ''
    met = {True: 'yes', False: '**no**', None: ''}[x['met']]
    cells = [name, x['job'], f"{x['peer']} {value('peer')}".strip(), f"{x['ours']} {value('our')}".strip(), ratio, x['bar'], met, x['note']]
    return '| ' + ' | '.join(str(c).replace('|', '/') for c in cells) + ' |'

def ran(name, r):
    "Where and when: the JSON's `machine` is a dictionary since the harness, a word before."
    m = r['machine'] if isinstance(r.get('machine'), dict) else {'cpu': r.get('machine'), 'cores': r.get('cores'), 'python': r.get('python')}
    cores = f"{m.get('cores_used') or ''} of {m.get('cores') or m.get('cpus') or '?'}".removeprefix(' of ')
    chip = ", ".join(filter(None, [m.get("gpu"), m.get("cpu") or m.get("machine")]))
    cells = [name, r.get("when") or r.get("date") or "", chip, cores, m.get('load', ''), m.get('OMP_NUM_THREADS') or r.get('threads') or '', m.get('python') or '', m.get('torch') or '', m.get('revision') or '', f"`{r['command']}`" if r.get('command') else '']
    return '| ' + ' | '.join(str(c).replace('|', '/') for c in cells) + ' |'

def page(results):
    "The README of `{name: JSON}`."
    head = lambda *cells: ['| ' + ' | '.join(cells) + ' |', '|' + '---|'*len(cells)]
    out = [HEAD, *head('benchmark', 'job', 'peer', 'ours', 'ratio', 'bar', 'met', 'limit, reason')]
    out += [row(name, x) for name, r in results.items() for x in lines(name, r)]
    out += ['', '## What they ran on', '', *head('benchmark', 'when (UTC)', 'processor', 'cores used', 'load', 'threads', 'Python', 'torch', 'revision', 'command')]
    out += [ran(name, r) for name, r in results.items()]
    limits = [f'- **{name}**: {text}' for name, r in results.items() for text in r.get('limits', ())]
    return '\n'.join([*out, *(['', '## Limits and reasons', '', *limits] if limits else [])]) + '\n'

def results_of(names, folder=HERE):
    "`{name: JSON}` of the files of `names` that are there, in that order, a card's behind the CPU's."
    return {n + kind: json.loads((folder/f"{n}{kind}.json").read_text("utf-8")) for n in names for kind in ("", CARD) if (folder/f"{n}{kind}.json").is_file()}

def write_page(names, folder=HERE):
    "`README.md` of the JSON files of `names` that are there, in that order. Returns its path."
    results = results_of(names, folder)
    part = folder/'.README.md.part'
    part.write_text(page(results), encoding='utf-8'); part.replace(folder/'README.md')
    return folder/'README.md'
