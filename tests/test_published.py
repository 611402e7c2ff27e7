"""Printed numbers as they were typed: pinned, and found again in the papers' text. After a correction on purpose: python tests/test_published.py"""
import csv, hashlib, json, re
from pathlib import Path
import pytest
from petvlm.claims import CLAIMS, load_claims, load_papers
from petvlm.tables import PUBLISHED, TABLES, load_published

PINNED = Path(__file__).parent/'fixtures/published.json'
PAPERS = Path(__file__).parents[2]/'shared/papers'
FILES = {'vipet': 'vipet-vlm', 'med3dvlm': 'med3dvlm', 'petar': 'petar', 'content_topic': 'content-topic'}
SCALE = {'petar': 100, 'content_topic': 100}     # printed from 0 to 1

def typed(text: str) -> dict[str, dict[str, str]]:
    "Row -> metric -> digits, of the rows of a published CSV that have numbers: without comments, models, and controls, which may change."
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith('#')))
    metrics = [c for c in rows[0] if c not in ('row', 'model', 'against', 'needs')]
    return {r['row']: {m: r[m] for m in metrics} for r in rows if any(r[m] for m in metrics)}

def fingerprint(text: str) -> str: return hashlib.sha256(json.dumps(typed(text)).encode()).hexdigest()
def of(name: str) -> str: return (PUBLISHED/f'{name}.csv').read_text(encoding='utf-8')
def claimed(claims: list[dict]) -> str: return hashlib.sha256(json.dumps([{k: c[k] for k in ('id', 'value', 'numbers') if k in c} for c in claims]).encode()).hexdigest()
def pins() -> dict[str, str]: return {name: fingerprint(of(name)) for name in TABLES} | {CLAIMS.name: claimed(load_claims())}
def paper_of(name: str) -> str: return next(p for p, spec in load_papers().items() if name in spec['tables'])

def text_of(paper: str) -> str:
    path = PAPERS/f'{FILES[paper]}.txt'
    if not path.is_file(): pytest.skip(f'{path}: the papers are not beside the checkout')
    return path.read_text(encoding='utf-8')

def test_printed_numbers_are_pinned():
    "A digit that changes, a row or a column that is added or lost."
    pinned = json.loads(PINNED.read_text())
    changed = [name for name, digest in pins().items() if pinned.get(name) != digest] + sorted(set(pinned) - set(pins()))
    assert not changed, f'printed numbers differ from those pinned: {changed}. If that was meant: python tests/test_published.py'

@pytest.mark.parametrize('old, new', [('55.70', '55.71'), ('55.70', '55.7'), ('vipet,', 'vipet2,'), (',rouge1,', ',rouge2,')])
def test_a_changed_number_is_caught(old, new):
    text = of('vipet_table1')
    assert old in text and fingerprint(text.replace(old, new)) != fingerprint(text)

def test_notes_and_controls_may_change():
    text = of('vipet_table1')
    assert fingerprint(text.replace('# note: Percent.', '# note: In percent.') + 'flat,A control,,,,,vipet,arm flat of point vipet\n') == fingerprint(text)

@pytest.mark.parametrize('name', TABLES)
def test_every_table_belongs_to_a_paper_and_says_where_it_stands(name):
    attrs = load_published(name).attrs
    assert name in load_papers()[paper_of(name)]['tables'] and re.match(r'\d+ |not known: ', attrs['page']) and attrs['notes']

@pytest.mark.parametrize('name', TABLES)
def test_every_printed_number_stands_in_the_paper(name):
    paper = paper_of(name)
    text = text_of(paper)
    there = {round(SCALE.get(paper, 1)*float(x), 3) for x in re.findall(r'(?<![\w.])\d+\.\d+(?![\d.])', text)}
    missing = [f'{row} {m}: {v}' for row, cells in typed(of(name)).items() for m, v in cells.items() if v and round(float(v), 3) not in there]
    assert not missing

@pytest.mark.parametrize('name', ['vipet_table1', 'vipet_table2'])
def test_rows_of_vipet_are_lines_of_its_tables(name):
    lines = [re.findall(r'(?<![\w.])\d+\.\d+(?![\d.])', line) for line in text_of('vipet').splitlines() if '\t' in line]
    assert [row for row, cells in typed(of(name)).items() if list(cells.values()) not in lines] == []

def test_a_foreign_number_would_be_missed():
    "The search can fail: a number of another table is not on that line, one that nobody printed is nowhere."
    text = text_of('vipet')
    assert '55.70' in text and '55.71' not in text

def test_numbers_of_claims_stand_in_the_paper():
    digits = {p: set(re.findall(r'\d+(?:\.\d+)?', text_of(p).replace(',', ''))) for p in FILES}
    number = lambda x, scale: f'{x/scale:.3f}'.rstrip('0').rstrip('.')
    printed = lambda c: [number(x, SCALE.get(c['paper'], 1) if 'table' in c else 1) for x in [*c.get('numbers', ()), c.get('value')] if x is not None]
    loose = {p: {d.rstrip('0').rstrip('.') if '.' in d else d for d in ds} for p, ds in digits.items()}
    short = {'3', '120000', '115000', '3000', '2000'}     # three regions; 120K, 115k, 3k and 2k in print
    assert [f"{c['id']}: {x}" for c in load_claims() for x in printed(c) if x not in loose[c['paper']] | short] == []

if __name__ == '__main__': PINNED.write_text(json.dumps(pins(), indent=1) + '\n')
