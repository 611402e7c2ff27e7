"Preparing as tasks: killed in the middle and run again, the folder is that of a run that was never cut off, byte for byte; nothing finished is done twice, nothing changed passes for finished."
import dataclasses, functools, io, json, logging, os, signal, subprocess, sys, time, tracemalloc
from pathlib import Path
import numpy as np, psutil, pytest
from petvlm.config import Data, Part
from petvlm.findings import Study
from petvlm.prepare import PrepareError, prepare, standards
from petvlm.sources import SourceError
from petvlm.tasks import TaskError, alone, do, finished, identity, read_rows, revision, run_tasks
from petvlm.volume import Volume

OUTSIDE = Data('regions', 'vi', 0, 0, 0, 0, (4, 6, 6), 10., 0, 10., (-1000., 1000.), source=Part('own', {'path': 'x'}))
PHANTOM = dataclasses.replace(OUTSIDE, source=Part('phantom'))
PATIENCE = 400                                           # s; the machine may be busy with other work

@dataclasses.dataclass(frozen=True)
class Tiny:
    "A study of a few voxels. `pause`: s that it takes; `trace`: where it is written down that it was read; `gate`: it waits until the trace has a companion `.go`."
    study: str
    seed: int
    pause: float
    trace: Path
    gate: bool = False

    def __call__(self) -> Study:
        with open(self.trace, 'a') as f: f.write(f'{self.study} {os.getpid()}\n')
        time.sleep(self.pause)
        while self.gate and not self.trace.with_suffix('.go').exists(): time.sleep(.05)
        if self.seed < 0: raise SourceError(f"{self.study}: no series")
        voxels = np.random.default_rng(self.seed).gamma(2, 2, (4, 6, 6)).astype(np.float32)
        return Study(self.study, {'pet': Volume(voxels, np.eye(4), 'SUVbw', {}), 'ct': Volume(voxels - 500, np.eye(4), 'HU', {})})

def cut_in_two(study: Study, data: Data, split: str) -> list:
    logging.getLogger('petvlm.prepare').warning("study %s: looked at", study.id)
    pet, ct = (study.volumes[k].data for k in ('pet', 'ct'))
    return [({'pet': (pet*k/data.suv_max).astype(np.float16), 'ct': (ct + k).astype(np.float16)}, {'patient': study.id, 'region': region, 'text': 'phổi', 'x': 0.1*k, 'shape': list(pet.shape)}) for k, region in ((1, 'chest'), (2, 'abdomen_pelvis'))]

def items_of(trace: Path, n: int, pause: float = 0, half: bool = False) -> list:
    "`n` studies, the second without a series, the fourth with the images of the first. `half`: no more than n/2 are finished before the gate opens."
    seeds = {1: -1, 3: 0}
    return [(('train', 'validation', 'test')[i % 3], Tiny(f's{i}', seeds.get(i, i), pause, Path(trace), half and i > n//2)) for i in range(n)]

def prepared(folder, trace, n, pause=0, half=False, workers=1, scheduler=None) -> Path:
    return prepare(items_of(trace, int(n), float(pause), bool(half)), Path(folder), OUTSIDE, cut_in_two, workers=int(workers), scheduler=scheduler)

def expected(n: int) -> dict[str, bytes]:
    "What the folder holds, written down without the package's own writing."
    rows = [(split, row) for i, (split, load) in enumerate(items_of(Path(os.devnull), n)) if i not in (1, 3) for row in cut_in_two(load(), OUTSIDE, split)]
    def saved(write) -> bytes: f = io.BytesIO(); write(f); return f.getvalue()
    arrays, usual = {k: np.stack([a[k] for _, (a, _) in rows]) for k in ('pet', 'ct')}, {}
    for k, x in arrays.items():
        for region in ('abdomen_pelvis', 'chest'):
            part = x[[i for i, (split, (_, r)) in enumerate(rows) if split == 'train' and r['region'] == region]].astype(np.float32)
            part = np.log(part*10. + .3) if k == 'pet' else part
            usual[f'{k}.{region}'] = np.stack([part.mean(0), np.maximum(part.std(0), max(np.median(part.std(0))/2, 1e-3))])
    text = ''.join(json.dumps({'row': i, 'split': split} | r, ensure_ascii=False) + '\n' for i, (split, (_, r)) in enumerate(rows))
    return {f'{k}.npy': saved(lambda f: np.save(f, x)) for k, x in arrays.items()} | {'rows.jsonl': text.encode(), 'standard.npz': saved(lambda f: np.savez(f, **usual)),
            'skipped.csv': b'study,split,reason\r\ns1,validation,SourceError: s1: no series\r\ns3,train,the same images as s0\r\n'}

def content(folder: Path) -> dict[str, bytes]: return {p.name: p.read_bytes() for p in folder.iterdir()}
def done(folder: Path) -> set[str]: return {p.name for p in Path(f'{folder}.studies').glob('*.npz')}
def times(trace: Path) -> dict[str, int]:
    names = [line.split()[0] for line in trace.read_text().splitlines()]
    return {n: names.count(n) for n in names}

def until(true, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end: pytest.fail(f"{what}: not within {PATIENCE} s")
        time.sleep(.05)

ENV = os.environ | {'PYTHONPATH': f'{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}', 'OMP_NUM_THREADS': '1'}

def client(*args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-c', 'import sys, test_prepare_tasks as t; t.prepared(*sys.argv[1:])', *map(str, args)], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if 'spawn_main' in ' '.join(p.cmdline())]

# ---- killed and run again ----

def killed_and_resumed(tmp_path: Path, n: int, pause: float, again: int) -> None:
    "A worker dies, its work is done by others; then everything dies; the rest is done by `again` workers."
    folder, trace = tmp_path/'p', tmp_path/'trace'; trace.touch()
    first = client(folder, trace, n, pause, True, 2)
    try:
        until(lambda: len(done(folder)) >= n//8, 'first studies'); workers = workers_of(first)
        assert len(workers) == 2
        workers[0].kill()                                # SIGKILL
        until(lambda: len(done(folder)) == n//2, 'more studies without that worker')
        assert first.poll() is None
    finally: first.kill()
    assert first.wait() == -signal.SIGKILL and len(done(folder)) == n//2 and not folder.exists()
    until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers), 'workers end with their client')
    before = sum(times(trace).values()); trace.with_suffix('.go').touch()
    prepared(folder, trace, n, pause, True, again)
    assert sum(times(trace).values()) - before == n - n//2, "what was finished was done again"
    assert content(folder) == expected(n) and sorted(p.name for p in tmp_path.iterdir()) == ['p', 'trace', 'trace.go']

def test_a_worker_then_everything_is_killed(tmp_path): killed_and_resumed(tmp_path, 8, .5, 1)

@pytest.mark.slow
@pytest.mark.parametrize('again', [1, 3])
def test_a_worker_then_everything_is_killed_in_sixty_studies(tmp_path, again): killed_and_resumed(tmp_path, 60, .2, again)

def server(*args) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-m', 'distributed.cli.dask_' + args[0], *map(str, args[1:])], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

@pytest.mark.slow
def test_a_scheduler_elsewhere_is_killed_and_started_again(tmp_path):
    folder, trace, address, n, running = tmp_path/'p', tmp_path/'trace', tmp_path/'dask.json', 60, []; trace.touch()
    def start(k):
        running.append(server('scheduler', '--scheduler-file', address, '--port', 0, '--no-dashboard'))
        until(address.exists, 'scheduler')
        for _ in range(k): running.append(server('worker', '--scheduler-file', address, '--nthreads', 1, '--no-dashboard', '--death-timeout', 60))
    try:
        start(2); first = client(folder, trace, n, .1, True, 0, address); running.append(first)
        until(lambda: len(done(folder)) == n//2, 'first studies')
        running[0].kill()                                # the scheduler
        until(lambda: first.poll() is not None, 'the client gives up'); assert first.returncode == 1 and not folder.exists()
        for p in running: p.kill(); p.wait()
        before = sum(times(trace).values()); address.unlink(); running.clear(); trace.with_suffix('.go').touch()
        start(2); prepared(folder, trace, n, .1, True, 0, str(address))
        assert sum(times(trace).values()) - before == n - n//2 and content(folder) == expected(n)
    finally:
        for p in running: p.kill()

def test_the_folder_is_what_its_studies_say(tmp_path): assert content(prepared(tmp_path/'p', tmp_path/'trace', 8)) == expected(8)

# ---- a study that ends its process ----

def poison(i): return os.kill(os.getpid(), signal.SIGKILL) if i == 2 else ([({'x': np.full(3, i)}, {})], '')

@pytest.mark.slow
def test_a_study_that_ends_its_worker_costs_itself_only(tmp_path, monkeypatch):
    import dask, distributed
    monkeypatch.setitem(dask.config.config['distributed']['scheduler'], 'allowed-failures', 0)      # one death instead of four: each costs a start
    with alone(tmp_path/'a'): found = run_tasks(poison, [(i,) for i in range(6)], tmp_path/'a', workers=2, skip=True)
    assert [bool(r.images) for r in found] == [True, True, False, True, True, True] and found[2].why.startswith('KilledWorker: the study ended its worker')
    with alone(tmp_path/'a'), pytest.raises(TaskError, match='ended its worker process'): run_tasks(poison, [(i,) for i in range(6)], tmp_path/'a', workers=2)

# ---- what counts as finished ----

def stops(study, data, split):
    if study.id == 's5' and not (Path(data.source.args['path'])/'mended').exists(): raise TypeError('a mistake in the code')
    return cut_in_two(study, data, split)

def stopped(tmp_path: Path) -> tuple[Data, functools.partial]:
    "A run of 8 studies that a mistake ended at the sixth."
    data = dataclasses.replace(OUTSIDE, source=Part('own', {'path': str(tmp_path)}))
    run = functools.partial(prepare, items_of(tmp_path/'trace', 8), tmp_path/'p', make=stops, workers=1)
    with pytest.raises(TypeError, match='mistake'): run(data=data)
    assert times(tmp_path/'trace') == {f's{i}': 1 for i in range(6)} and len(done(tmp_path/'p')) == 4 and not (tmp_path/'p').exists()
    (tmp_path/'mended').touch()
    return data, run

def test_what_is_finished_is_not_done_again_and_bad_studies_are_tried_again(tmp_path):
    data, run = stopped(tmp_path)
    assert content(run(data=data)) == expected(8)
    assert times(tmp_path/'trace') == {'s0': 1, 's1': 2, 's2': 1, 's3': 1, 's4': 1, 's5': 2, 's6': 1, 's7': 1}

def test_another_configuration_takes_nothing_over(tmp_path):
    data, run = stopped(tmp_path)
    folder = run(data=dataclasses.replace(data, suv_max=5.))
    assert all(times(tmp_path/'trace')[f's{i}'] == 2 for i in range(5)) and not Path(f'{folder}.studies').exists()
    assert np.allclose(np.load(folder/'pet.npy'), 2*np.load(io.BytesIO(expected(8)['pet.npy'])).astype(np.float32), rtol=2e-3)

def test_a_damaged_file_is_done_again(tmp_path, caplog):
    data, run = stopped(tmp_path)
    for file in sorted((tmp_path/'p.studies').glob('*.npz')): file.write_bytes(file.read_bytes()[:-40])
    (tmp_path/'p.studies/left.npz.0.part').touch()
    assert content(run(data=data)) == expected(8) and 'damaged' in caplog.text and times(tmp_path/'trace')['s0'] == 2

def reads(path): return [({'x': np.load(path)}, {})], ''
def lists(path): return [({'x': np.array([len(list(path.iterdir()))])}, {})], ''

def test_a_study_that_was_replaced_is_read_again(tmp_path):
    file, out = tmp_path/'in/a.npy', str(tmp_path/'out.npz'); file.parent.mkdir(); np.save(file, np.zeros(3))
    value = lambda work, path: next(read_rows(do(work, (path,), out, {}).file))[0]['x'].tolist()
    assert value(reads, file) == [0, 0, 0] and finished(Path(out))
    np.save(file, np.ones(3)); os.utime(file, ns=(1, 1))
    assert finished(Path(out)) is None and value(reads, file) == [1, 1, 1]
    file.unlink(); assert finished(Path(out)) is None
    os.remove(out); assert value(lists, file.parent) == [0]
    (file.parent/'b').touch(); os.utime(file.parent, ns=(2, 2)); assert value(lists, file.parent) == [1]

def test_a_key_knows_the_code_behind_the_functions(tmp_path, monkeypatch):
    package = tmp_path/'ward'; package.mkdir(); monkeypatch.syspath_prepend(tmp_path)
    for name, text in {'__init__': '', 'a': 'from .b import g\ndef f(): return g()\n', 'b': 'def g(): return 1\n', 'c': 'x = 1\n'}.items(): (package/f'{name}.py').write_text(text)
    from ward.a import f
    key, code = identity(functools.partial(f, 1, k={'b', 'a'}), Path('x'))
    assert set(code) == {'numpy', 'scipy', 'pydicom', 'nibabel', 'ward.a'} and key == identity(functools.partial(f, 1, k={'a', 'b'}), Path('x'))[0] != identity(functools.partial(f, 2, k={'a', 'b'}), Path('x'))[0]
    (package/'c.py').write_text('x = 2\n'); revision.cache_clear(); assert identity(functools.partial(f, 1, k={'b', 'a'}), Path('x'))[0] == key
    (package/'b.py').write_text('def g(): return 2\n'); revision.cache_clear(); assert identity(functools.partial(f, 1, k={'b', 'a'}), Path('x'))[0] != key
    with pytest.raises(TaskError, match=r"another version of \['ward.a'\]"): do(f, (), str(tmp_path/'o.npz'), code)
    with pytest.raises(TaskError, match='no such folder on this worker'): do(f, (), str(tmp_path/'elsewhere/o.npz'), {})
    assert {'petvlm.prepare', 'petvlm.volume'} < set(sys.modules) and revision('petvlm.prepare') != revision('petvlm.volume')

def test_a_key_is_the_same_after_a_restart():
    here = identity(items_of(Path('t'), 2), cut_in_two, OUTSIDE)[0]
    there = subprocess.run([sys.executable, '-c', 'import test_prepare_tasks as t; print(t.identity(t.items_of(t.Path("t"), 2), t.cut_in_two, t.OUTSIDE)[0])'], env=ENV | {'PYTHONHASHSEED': '7'}, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here

# ---- said, refused, bounded ----

def test_what_workers_say_is_said_once_in_order_also_when_it_was_said_before(tmp_path, caplog):
    data, run = stopped(tmp_path); caplog.clear(); run(data=data)
    assert [r.getMessage() for r in caplog.records if 'looked at' in r.getMessage()] == [f'study s{i}: looked at' for i in (0, 2, 3, 4, 5, 6, 7)]
    assert '2 of 8 studies skipped' in caplog.text

def test_two_runs_in_one_folder_are_refused(tmp_path):
    with alone(tmp_path/'p.studies'), pytest.raises(TaskError, match='another run is at work'): prepared(tmp_path/'p', tmp_path/'trace', 3)

def test_no_scheduler_is_an_error_that_names_it(tmp_path, monkeypatch):
    import dask, distributed
    monkeypatch.setenv('PETVLM_DASK', 'tcp://127.0.0.1:9')
    with dask.config.set({'distributed.comm.timeouts.connect': '1s'}), pytest.raises(TaskError, match="no Dask scheduler answers at 'tcp://127.0.0.1:9'.*PETVLM_DASK"): prepared(tmp_path/'p', tmp_path/'trace', 3)
    with pytest.raises(TaskError, match='no Dask scheduler answers'): prepared(tmp_path/'p', tmp_path/'trace', 3, scheduler=str(tmp_path/'none.json'))

def test_a_file_that_is_not_here_is_an_error(tmp_path):
    with pytest.raises(TaskError, match='same file system'): next(read_rows(tmp_path/'a.npz'))

def odd(study, data, split): return [({'pet': np.zeros((2, 2) if study.id == 's2' else (2, 3), np.float16)}, {'region': 'chest'})]

def test_rows_of_different_shape_are_refused(tmp_path):
    with pytest.raises(PrepareError, match=r"row 1: its arrays are {'pet': \(2, 2\)}, those of the rows before {'pet': \(2, 3\)}"):
        prepare([('train', Tiny('s0', 0, 0, tmp_path/'t')), ('train', Tiny('s2', 2, 0, tmp_path/'t'))], tmp_path/'p', PHANTOM, odd, (), workers=1)
    assert not (tmp_path/'p').exists()

def big(i): return [({'pet': np.full((32, 64, 128), i, np.float32)}, {'region': 'chest'})]            # 1 MiB

def test_memory_is_that_of_a_study_not_of_all(tmp_path):
    items = [('train', functools.partial(big, i)) for i in range(12)]
    tracemalloc.start()
    try: folder = prepare(items, tmp_path/'p', PHANTOM, None, (), workers=1); peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert np.load(folder/'pet.npy', mmap_mode='r').shape == (12, 32, 64, 128) and peak < 4*2**20

@pytest.mark.parametrize('room', [1, 4*50*36, 2**28])
def test_slabs_give_the_bits_of_the_whole(tmp_path, room):
    x = np.random.default_rng(0).gamma(2, 1, (50, 7, 6, 6)).astype(np.float16); np.save(tmp_path/'pet.npy', x)
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps({'row': i, 'split': 'train', 'region': 'chest' if i % 2 else 'neck'}) + '\n' for i in range(50)))
    whole = np.log(x[1::2].astype(np.float32)*10. + .3)
    found = standards(tmp_path, ['pet'], 10., room)['pet.chest']
    assert found[0].tobytes() == whole.mean(0).tobytes() and np.array_equal(found[1], np.maximum(whole.std(0), max(np.median(whole.std(0))/2, 1e-3)))
