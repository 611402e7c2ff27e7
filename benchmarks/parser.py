"""The report parser side by side with the people and the language model that read the same reports.

    python benchmarks/parser.py                         # the shared Vietnamese reports (../shared/data/reports_vi)
    python benchmarks/parser.py --show                  # also the words behind every error of the tuned half, on the terminal only
    python benchmarks/parser.py --dump now.json         # keep what the parser read (findings, no text) ...
    python benchmarks/parser.py --before then.json      # ... to set a later parser beside it

Readers: `parser` reads the text, `experts` and `model` gave lists. The parser was tuned on a random half of the reports (seed 0); the other half was not looked at.
An empty list of the model for a report full of lesions is no reading, so it is left out and counted. Writes benchmarks/parser.json: numbers only, no word of a report.
"""
import argparse, hashlib, json, sys
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ('type', 'place', 'site', 'type_place', 'type_site', 'type_site_fdg', 'all')
SCOPES = {'whole body': lambda f: True, 'chest': lambda f: f.region == 'chest', 'chest, no axilla': lambda f: f.region == 'chest' and f.organ != 'axillary_node'}


def halves(ids, seed=0):
    "A random half of the reports to tune on and the rest, the same on every machine."
    order = sorted(ids, key=lambda i: hashlib.sha256(f'{seed}:{i}'.encode()).hexdigest())
    return {'tuned': set(order[:len(order)//2]), 'held out': set(order[len(order)//2:])}


def load(folder):
    "Texts, experts' lists and the model's lists by patient."
    pairs = json.loads((folder/'pairs.json').read_text(encoding='utf-8'))
    return {p['patient_id']: p['ground_truth'] for p in pairs}, json.loads((folder/'expert_lesions.json').read_text(encoding='utf-8')), {p['patient_id']: p['extracted_ground_truth'] for p in pairs}


def readers(texts, experts, model, before):
    "Name of a comparison -> (readings, lists) by patient, where both exist."
    lists = {i: x for i, x in model.items() if x}
    both = lambda a, b: {i: (a[i], b[i]) for i in a if i in b}
    found = {'parser, experts': both(texts, experts), 'parser, model': both(texts, lists), 'model, experts': both(lists, experts)}
    return found | ({'before, experts': both(before, experts), 'before, model': both(before, lists)} if before else {})


def compare(texts, experts, model, before, n):
    "Every comparison in every scope, for all reports and either half."
    from petvlm.readers import agreement, reading
    parts, table = {'all': set(texts)} | halves(texts), {}
    read = lambda readings: {i: reading(x) for i, x in readings.items()}
    for name, pairs in readers(*map(read, (texts, experts, model, before or {}))).items():
        for scope, within in SCOPES.items():
            for part, ids in parts.items():
                both = [pairs[i] for i in sorted(pairs) if i in ids]
                if both: table.setdefault(name, {}).setdefault(scope, {})[part] = agreement(*zip(*both), scope=within, n=n)
    return table


def rounded(x): return {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else round(x, 4) if isinstance(x, float) else x


def numbers_only(table):
    "Without the words that could not be mapped: how many of each field."
    clean = lambda r: r | {'unmapped': {field: sum(words.values()) for field, words in r['unmapped'].items()}}
    return {name: {scope: {part: clean(r) for part, r in parts.items()} for scope, parts in scopes.items()} for name, scopes in table.items()}


def report(table):
    for name, scopes in table.items():
        for scope, parts in scopes.items():
            for part, r in parts.items():
                print(f"\n{name}; {scope}; {part}: {r['reports']} reports, {r['counts']['lesions_said']} and {r['counts']['lesions_there']} lesions, {r['counts']['findings_said']} and {r['counts']['findings_there']} findings")
                for unit in ('lesions', 'findings'):
                    print(f'  {unit:9}' + ' '.join(f'{level:>20}' for level in SHOWN))
                    for what in ('precision', 'recall', 'f1'):
                        cells = (r[unit][level][what] for level in SHOWN)
                        print(f'  {what:9}' + ' '.join(f"{c['value']:8.2f} [{c['lo']:.2f}, {c['hi']:.2f}]" for c in cells))
                print('  errors   ', ', '.join(f'{k} {v}' for k, v in r['errors'].items() if v), '| not mapped:', {f: sum(w.values()) for f, w in r['unmapped'].items()})


def show(texts, experts, model, part):
    "The words behind every error; never written anywhere."
    from petvlm.readers import errors, reading
    for name, pairs in readers(texts, experts, model, {}).items():
        for i in sorted(set(pairs) & part):
            a, b = (reading(x) for x in pairs[i])
            words = lambda f, lesions: f and f"{f.organ} {f.side} {f.kind} {f.uptake} {f.size_mm} {f.suvmax}  <{next((x.words for x in lesions if f in x.findings), '')}>"
            for e in errors(a, b):
                if e.kind != 'unmapped': print(f'{name} | {i} | {e.kind} | said: {words(e.said, a)} | there: {words(e.there, b)}')
            for x in b:
                for field, lost in x.unmapped: print(f'{name} | {i} | unmapped {field}: {lost}')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=ROOT.parent/'shared/data/reports_vi')
    parser.add_argument('--out', type=Path, default=ROOT/'benchmarks/parser.json')
    parser.add_argument('--show', action='store_true', help='the words behind the errors of the tuned half, on the terminal')
    parser.add_argument('--dump', type=Path, help='write the findings that this parser reads')
    parser.add_argument('--before', type=Path, help='findings that another version read')
    parser.add_argument('-n', type=int, default=2000, help='bootstrap draws')
    a = parser.parse_args(argv)
    if not a.data.exists(): sys.exit(f'{a.data} is not here: the reports are for local evaluation only and are not part of the project; --data says where they lie')
    from petvlm.files import atomic
    from petvlm.findings import Finding
    from petvlm.reports import parse
    write = lambda path, what: atomic(path, lambda part: part.write_text(json.dumps(what) + '\n', encoding='utf-8'))
    texts, experts, model = load(a.data)
    if a.dump: return write(a.dump, {i: [f.to_dict() for f in parse(t)] for i, t in texts.items()})
    before = {i: [Finding.from_dict(f) for f in fs] for i, fs in json.loads(a.before.read_text(encoding='utf-8')).items()} if a.before else None
    if a.show: return show(texts, experts, model, halves(texts)['tuned'])
    table = compare(texts, experts, model, before, a.n)
    report(table)
    write(a.out, {'made': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'reports': len(texts), 'lists': {'experts': len(set(experts) & set(texts)), 'model': sum(bool(x) for x in model.values()), 'model, empty': sum(not x for x in model.values())},
                       'split': 'sha256, seed 0, first half tuned', 'bootstrap': a.n, 'comparisons': rounded(numbers_only(table))})


if __name__ == '__main__': main()
