"The benchmarks' table: ratios by hand, and what cannot run says so. Nothing is timed."
import importlib.util, json, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]

@pytest.fixture(scope='module')
def bench():
    "`benchmarks/<name>.py` as a module."
    sys.path.insert(0, str(ROOT/'benchmarks'))
    def load(name):
        spec = importlib.util.spec_from_file_location(f'{name}_benchmark', ROOT/f'benchmarks/{name}.py'); module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
        return module
    yield load
    sys.path.remove(str(ROOT/'benchmarks'))

def test_a_line_has_the_median_of_the_ratios_not_the_ratio_of_medians(bench):
    x = bench('table').line('job', ('peer', [4., 9., 8.]), ('ours', [2., 3., 8.]), bar='at least 2', met=True)
    assert (x['peer_value'], x['our_value'], x['ratio'], x['ratio_min'], x['ratio_max']) == (8., 3., 2., 1., 3.)
    assert 'ratio' not in bench('table').line('job', ('', None), ('ours', 3.)) and 'ratio' not in bench('table').line('job', ('p', 1.), ('o', 2.), None)

def test_the_page_has_every_line_where_it_ran_and_what_limits_it(bench):
    table = bench('table')
    new = {'when': '2026-11-26T09:00:00+00:00', 'command': 'python benchmarks/data.py', 'machine': {'cpu': 'A', 'cores': 4, 'cores_used': 1, 'OMP_NUM_THREADS': '1', 'python': '3.11', 'torch': '2', 'revision': 'abc'},
           'table': [table.line('a | b', ('p', 200.), ('o', 100.), unit='MB', bar='fits', met=False, note='because')], 'limits': ['so it is'], 'rows': []}
    old = {'machine': 'x86_64', 'cores': 2, 'threads': 1, 'python': '3.11', 'when': 'then', 'seconds': {'petvlm': 2., 'peer': 4.}, 'peak_mb': {'petvlm': 1., 'peer': 2.}, 'speed_ratio': 2., 'memory_ratio': .5}
    ways = {'machine': {}, 'rows': [{'tokens': 512, 'ways': {'sdpa': {'all_seconds': [1., 2.], 'peak_mb': 10.}, 'channels': {'all_seconds': [2., 2.], 'peak_mb': 20.}}}]}
    said = table.page({'data': new, 'ingest': old, 'alignment': ways})
    assert '| data | a / b | p 200 MB | o 100 MB | 2.00 [2.00, 2.00] | fits | **no** | because |' in said and '- **data**: so it is' in said and '| data | 2026-11-26T09:00:00+00:00 | A | 1 of 4 |  | 1 | 3.11 | 2 | abc | `python benchmarks/data.py` |' in said
    assert said.count('| ingest | ') == 3 and '| ingest | DICOM folder to two tensors, peak memory | SimpleITK and MONAI 2 MB | petvlm 1 MB | 2.00' in said
    assert '| alignment | tokens 512: time | sdpa 1.5 s | channels 2 s | 0.75 [0.50, 1.00] |' in said and 'tokens 512: peak memory | sdpa 10 MB | channels 20 MB | 0.50' in said

def test_the_table_in_the_repository_is_that_of_its_files(bench):
    run, table = bench('run'), bench('table')
    results = table.results_of(run.BENCHMARKS)
    assert (ROOT/'benchmarks/README.md').read_text('utf-8') == table.page(results), 'run python benchmarks/run.py --table'

def test_what_cannot_run_says_what_it_needs(bench, monkeypatch, capsys):
    run = bench('run')
    monkeypatch.setitem(run.BENCHMARKS, 'retrieval', run.Bench(needs=('no_such_module',), how='pip install it'))
    monkeypatch.setitem(run.BENCHMARKS, 'ingest', run.Bench(data=Path('/no/such.tar')))
    monkeypatch.setattr(run, 'run', lambda *a: pytest.fail('it ran'))
    run.main(['--quick', 'retrieval', 'ingest'])
    said = capsys.readouterr().out
    assert 'retrieval: left out, needs no_such_module: pip install it' in said and 'ingest: left out, needs /no/such.tar' in said
    with pytest.raises(SystemExit): run.main(['nothing'])

def test_one_that_fails_does_not_stop_the_others_and_is_told(bench, monkeypatch):
    run, ran = bench('run'), []
    monkeypatch.setattr(run, 'wanting', lambda name: '')
    monkeypatch.setattr(run, 'run', lambda name, quick, room: ran.append(name) or int(name == 'data'))
    with pytest.raises(SystemExit, match='failed: data'): run.main(['--quick', 'data', 'metrics'])
    assert ran == ['data', 'metrics']

def test_the_bar_of_the_alignment_loss_is_judged_where_it_holds(bench):
    ways = lambda t: {'sdpa': {'all_seconds': [1., 1.], 'peak_mb': 100.}, 'channels': {'all_seconds': [t, t], 'peak_mb': 107., 'limit': 1.05}, 'eager': {'all_seconds': [9., 9.], 'peak_mb': 900.}}
    found = bench('table').lines('alignment', {'rows': [{'head': 64, 'tokens': 1024, 'ways': ways(2.)}, {'head': 64, 'tokens': 2048, 'ways': ways(1.09)}, {'head': 64, 'tokens': 4096, 'ways': ways(1.07)}]})
    met = {(x['job'], x['peer'], x['ours']): x['met'] for x in found}
    assert met['head 64, tokens 1024: time', 'sdpa', 'channels'] is None and met['head 64, tokens 2048: time', 'sdpa', 'channels'] is False and met['head 64, tokens 2048: peak memory', 'sdpa', 'channels'] is True
    assert met['head 64, tokens 4096: time', 'sdpa', 'channels'] is True and met['head 64, tokens 4096: time', 'eager', 'channels'] is None and found[4*1]['note'] == '1.09 times the time; 1.05 by FLOPs alone'
