"The benchmarks' own arithmetic: turning order, ratios within rounds, peaks, processes, files. No speed is tested."
import importlib.util, json, sys
from pathlib import Path
from types import SimpleNamespace
import pytest

spec = importlib.util.spec_from_file_location('harness', Path(__file__).parents[1]/'benchmarks/harness.py')
harness = importlib.util.module_from_spec(spec); spec.loader.exec_module(harness)

BENCH = """
import os
def ready():
    global seen
    seen = 'imported'
def pid(add): return [os.getpid(), add, seen]
def grow(mb):
    import harness
    with harness.peak() as m:
        block = bytearray(mb*1_000_000)
        for i in range(0, len(block), 4096): block[i] = 1
        del block
    return m
def fail(): raise ValueError('seven')
"""

@pytest.fixture
def bench(tmp_path):
    (path := tmp_path/'bench.py').write_text(BENCH)
    return path

def test_the_order_turns_and_warm_rounds_are_not_counted():
    said, clock = [], iter(range(1000))
    ways = {w: (lambda w=w: said.append(w)) for w in 'abc'}
    seconds = harness.interleaved(ways, repeats=3, warm=1, before=lambda w: said.append(f'before {w}'), clock=lambda: float(next(clock)))
    assert [s for s in said if len(s) == 1] == list('abc' 'bca' 'cab' 'abc') and said[:2] == ['before a', 'a']
    assert seconds == {w: [1., 1., 1.] for w in 'abc'}

def test_no_round_begins_after_most_seconds():
    assert [len(s) for s in harness.interleaved({'a': lambda: None}, repeats=9, warm=0, most=-1.).values()] == [1]

def test_ratios_are_taken_within_rounds():
    "Ours is twice as fast in every round; the machine slows down fourfold."
    found = harness.against({'peer': [2., 4., 8.], 'ours': [1., 2., 4.]})
    assert found['ours'] == {'seconds': 2., 'fastest': 1., 'slowest': 4., 'time_ratio': .5, 'ratio_min': .5, 'ratio_max': .5, 'all_seconds': [1., 2., 4.]}
    assert found['peer']['time_ratio'] == 1 and harness.against({'a': [1.], 'b': [3.]}, first='b')['a']['time_ratio'] == pytest.approx(1/3)

def test_each_measure_has_a_process_of_its_own_and_imports_are_shared(bench):
    (one, *said), (two, *_), grown = harness.apart(bench, [('pid', {'add': 1}), ('pid', {'add': 2}), ('grow', {'mb': 60})])
    assert one != two and said == [1, 'imported']
    assert 55 < grown['rise_mb'] < 75 and grown['peak_mb'] == pytest.approx(grown['start_mb'] + grown['rise_mb'])

def test_nothing_begins_after_the_limit_and_what_was_measured_is_kept(bench):
    assert harness.apart(bench, [('pid', {'add': 1})], limit=-1) == [None]
    assert harness.apart(bench, [('pid', {'add': 1})], limit=600)[0][1] == 1

def test_a_measure_that_fails_says_so(bench, capfd):
    with pytest.raises(RuntimeError, match='bench.py'): harness.apart(bench, [('fail', {})])
    assert 'seven' in capfd.readouterr().err

def test_quick_takes_its_own_values_and_writes_nothing(tmp_path):
    read = lambda *argv: harness.options('doc', tmp_path/'x.py', list(argv), quick={'repeats': 1}, add=lambda p: p.add_argument('--n', type=int, default=3))
    assert (read().repeats, read().out, read().n) == (5, tmp_path/'x.json', 3)
    assert (read('--quick').repeats, read('--quick').out) == (1, None)
    assert (read('--quick', '--repeats', '2', '--out', 'y.json').repeats, read('--quick', '--out', 'y.json').out) == (2, Path('y.json'))

def test_a_result_is_written_whole_with_the_machine(tmp_path):
    a = SimpleNamespace(out=tmp_path/'x.json', quick=False, repeats=2)
    harness.write(a, 'a test', [{'n': 1}], more=5)
    found = json.loads(a.out.read_text())
    assert found['rows'] == [{'n': 1}] and found['more'] == 5 and found['settings'] == {'repeats': 2} and found['machine']['python'] == sys.version.split()[0] and [p.name for p in tmp_path.iterdir()] == ['x.json']
