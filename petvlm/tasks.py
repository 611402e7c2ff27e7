from __future__ import annotations
import contextlib, dataclasses, fcntl, functools, hashlib, importlib.util, json, logging, os, re, sys, threading, uuid, zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
import cloudpickle
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

log = logging.getLogger(__name__)

class TaskError(RuntimeError):
    "A batch that cannot go on: no scheduler, other code on a worker, a file that a worker wrote elsewhere. What is finished stays."

LIBRARIES = ('numpy', 'scipy', 'pydicom', 'nibabel')
_IMPORT = re.compile(rb'^\s*from (petvlm)?\.(\w+) import', re.M)

@functools.cache
def revision(module: str) -> str:
    "A library's version (`LIBRARIES`), or the digest of a module's source and of all that it imports from petvlm or its own package, at any depth."
    if module in LIBRARIES: return version(module)
    todo, seen = [module], {}
    while todo:
        name = todo.pop(); spec = importlib.util.find_spec(name)
        if name in seen or spec is None or not os.path.isfile(spec.origin or ''): continue
        seen[name] = source = Path(spec.origin).read_bytes()
        found = [f"{own.decode() or name.rpartition('.')[0]}.{part.decode()}" for own, part in _IMPORT.findall(source)]
        todo += [m for m in found if not m.startswith('.')]
    return hashlib.sha256(b''.join(name.encode() + seen[name] for name in sorted(seen))).hexdigest()[:12]

def _by_name(x) -> bool:
    "Whether another process finds `x` under its name; what a notebook or a script defines travels by value."
    found = sys.modules.get(getattr(x, '__module__', None) or '')
    for part in getattr(x, '__qualname__', '<none>').split('.'): found = getattr(found, part, None)
    return found is x and x.__module__ != '__main__'

def identity(*parts) -> tuple[str, dict[str, str]]:
    "A key for `parts` that is the same in every process and after every restart, and the `revision` of each module that functions among them come from. Reads dataclasses, partials, paths and containers; anything else by its pickle."
    code = {name: revision(name) for name in LIBRARIES}
    def plain(x):
        if isinstance(x, Path): return str(x)
        if isinstance(x, (set, frozenset)): return sorted(x, key=str)
        if isinstance(x, functools.partial): return [x.func, x.args, x.keywords]
        if dataclasses.is_dataclass(x) and not isinstance(x, type): return [type(x), {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}]
        if not _by_name(x): return hashlib.sha256(cloudpickle.dumps(x)).hexdigest()
        code[x.__module__] = revision(x.__module__)
        return f'{x.__module__}.{x.__qualname__}'
    text = json.dumps(parts, default=plain)
    return hashlib.sha256(json.dumps([text, code], sort_keys=True).encode()).hexdigest()[:32], code

_reading = threading.local()

def _note(event: str, args: tuple) -> None:
    if event not in ('open', 'os.listdir', 'os.scandir') or getattr(_reading, 'seen', None) is None: return
    path, mode, flags = (*args, None, 0)[:3] if event == 'open' else (args[0], None, 0)
    writes = set('wax+') & set(mode) if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR)
    if isinstance(path, (str, os.PathLike)) and not writes: _reading.seen.add(os.path.abspath(os.fspath(path)))

@functools.cache
def _listen() -> None: sys.addaudithook(_note)               # once a process: a hook cannot be taken back

def _stamp(path: str) -> list[int]:
    "Size and time of a file or folder, [] if it is not there."
    try: s = os.stat(path)
    except OSError: return []
    return [s.st_size, s.st_mtime_ns]

@contextlib.contextmanager
def watched() -> Iterator[dict[str, list[int]]]:
    "Files opened for reading and folders listed meanwhile by this thread, path -> [bytes, ns since 1970], filled in at the end. Code, what the system pretends to be files, and what is gone again are left out."
    _listen(); _reading.seen, out = set(), {}
    try: yield out
    finally: seen, _reading.seen = _reading.seen, None
    code = lambda p: p in sys.path_importer_cache or p.endswith(('.py', '.pyc', '.so')) or p.startswith(('/proc/', '/sys/', '/dev/'))
    out |= {p: s for p in sorted(seen) if not code(p) and (s := _stamp(p))}

class Result(NamedTuple):
    "What a worker reports of one study: the file with its rows, why there are none, a digest of each row's arrays, what was logged (logger, level, text). Small: the rows stay on disk."
    file: str
    why: str = ''
    images: tuple[str, ...] = ()
    said: tuple = ()

def _image(arrays: dict[str, np.ndarray]) -> str:
    h = hashlib.sha256()
    for k in sorted(arrays): h.update(np.ascontiguousarray(arrays[k]).data)
    return h.hexdigest()

def _save(path: Path, rows: list[tuple[dict, dict]], note: dict) -> None:
    text = json.dumps(note | {'rows': [[sorted(arrays), record] for arrays, record in rows]}, ensure_ascii=False).encode()
    part = path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')
    with open(part, 'wb') as f:
        np.savez(f, note=np.frombuffer(text, np.uint8), **{f'{i}/{k}': x for i, (arrays, _) in enumerate(rows) for k, x in arrays.items()})
        f.flush(); os.fsync(f.fileno())
    os.replace(part, path)

def read_rows(file) -> Iterator[tuple[dict[str, np.ndarray], dict]]:
    "`(arrays, record)` of each row of one study's file, one row in memory at a time. Raises `TaskError` where the file is missing or damaged."
    try:
        with np.load(file) as z:
            for i, (names, record) in enumerate(json.loads(z['note'].tobytes())['rows']): yield {k: z[f'{i}/{k}'] for k in names}, record
    except FileNotFoundError as e: raise TaskError(f"{file}: not here, though a worker wrote it; do the workers see the same file system as this machine?") from e
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError) as e: raise TaskError(f"{file}: damaged ({e}); remove it and run again") from e

def finished(path: Path) -> Result | None:
    "The `Result` that lies in `path`, if it is whole and nothing that it was read from has changed since."
    try:
        with np.load(path) as z: note = json.loads(z['note'].tobytes())
    except FileNotFoundError: return None
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError) as e: log.warning("%s: damaged (%s), done again", path, e); return None
    changed = [p for p, s in note['read'].items() if _stamp(p) != s]
    return None if changed else Result(str(path), '', tuple(note['images']), tuple(map(tuple, note['said'])))

class _Ear(logging.Handler):
    def __init__(self): super().__init__(); self.said = []
    def emit(self, r): self.said.append((r.name, r.levelno, r.getMessage()))

@contextlib.contextmanager
def heard() -> Iterator[list[tuple[str, int, str]]]:
    "What petvlm's loggers say meanwhile, as (logger, level, text), instead of where it would have gone."
    logger, ear = logging.getLogger('petvlm'), _Ear()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(ear)
    try: yield ear.said
    finally: logger.removeHandler(ear); logger.propagate = before

def say(said: Sequence[tuple[str, int, str]]) -> None:
    "Log what was `heard`."
    for name, level, text in said: logging.getLogger(name).log(level, '%s', text)

_one = threading.Lock()

def do(work: Callable, args: tuple, file: str, code: dict[str, str]) -> Result:
    """The task: `work(*args)` gives rows and, where there are none, why; rows go to `file`, unless they lie there already. No rows, no file: a study that could not be used is tried again by the next run.

    One study at a time in a process, whatever the worker's threads: memory is that of one study. One BLAS thread: pools of threads that fight for the cores were measured ten times slower.
    Raises `TaskError` on a worker whose code or file system is not the client's, and what `work` raises."""
    other = sorted(m for m, r in code.items() if revision(m) != r)
    if other: raise TaskError(f"this worker has another version of {other} than the client; install the same revision of petvlm and its requirements.txt, restart the workers")
    if done := finished(Path(file)): return done
    if not Path(file).parent.is_dir(): raise TaskError(f"{Path(file).parent}: no such folder on this worker; all workers need the file system of the client, under the same path")
    with _one, threadpool_limits(1), heard() as said, watched() as seen: rows, why = work(*args)
    images = tuple(_image(arrays) for arrays, _ in rows)
    if rows: _save(Path(file), rows, {'images': images, 'said': said, 'read': seen})
    return Result(file, why, images, tuple(said))

ADDRESS = 'PETVLM_DASK'

@contextlib.contextmanager
def cluster(workers: int, scheduler: str | None = None):
    "A Dask client: of `scheduler` (an address, or the file it wrote) or else of `workers` single-threaded processes here. Raises `TaskError` where no scheduler answers."
    import dask
    from distributed import Client, LocalCluster              # a second of imports that work done here can do without
    if not scheduler:
        with dask.config.set({'distributed.scheduler.worker-saturation': 1.0}), LocalCluster(n_workers=workers, threads_per_worker=1, security=True, dashboard_address=None) as here, Client(here, set_as_default=False) as client: yield client
        return
    try:
        address = json.loads(Path(scheduler).read_text())['address'] if scheduler.endswith('.json') else scheduler
        client = Client(address, set_as_default=False)
    except (OSError, ValueError, KeyError) as e: raise TaskError(f"no Dask scheduler answers at {scheduler!r} ({type(e).__name__}: {e}); start one with `dask scheduler`, or unset {ADDRESS} to work on this machine") from e
    with client:
        if not client.scheduler_info()['workers']: log.warning("%s: no workers yet; nothing happens until `dask worker %s` runs somewhere", scheduler, scheduler)
        yield client

def _ended(error: BaseException) -> str: return ' '.join(f"{type(error).__name__}: the study ended its worker process again and again, also when alone (memory, or a fault in a decoder): {error}".split())

def _on_dask(client, jobs: dict[str, tuple], skip: bool) -> Iterator[tuple[str, Result]]:
    "`(key, result)` of each job as it is finished. A study that ends its worker is tried once more, alone: the others were only standing by."
    from distributed import KilledWorker, as_completed
    run = f'petvlm-{uuid.uuid4().hex[:8]}-'                # another run's tasks are other tasks
    futures, alone, left = client.map(do, *zip(*jobs.values()), key=[run + k for k in jobs], pure=False), [], len(jobs)
    for future, result in as_completed(futures, loop=client.loop, with_results=True, raise_errors=False):
        key = future.key.removeprefix(run)
        if future.status == 'finished': left -= 1; yield key, result; future.release()
        elif future.status != 'error': raise TaskError(f"the Dask scheduler went away with {left} studies to do; start it and run again, what is finished is kept")
        elif isinstance(result[1], KilledWorker): alone.append(key)
        else: raise result[1].with_traceback(result[2])
    for key in alone:
        try: yield key, client.submit(do, *jobs[key], key=f'{run}{key}-alone', pure=False).result()
        except KilledWorker as e:
            if not skip: raise TaskError(_ended(e)) from e
            yield key, Result(jobs[key][2], _ended(e))

@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    "Makes `folder` and holds its lock. Raises `TaskError` where another run does."
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder/'lock', 'w') as f:
        try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e: raise TaskError(f"{folder}: another run is at work here; wait for it, or end it") from e
        except OSError as e: log.warning("%s: cannot be locked on this file system (%s); see to it that only one run is at work", folder, e)
        yield

def run_tasks(work: Callable, args: Sequence[tuple], folder, workers: int = 2, scheduler: str | None = None, few: int = 0, skip: bool = False, desc: str = 'tasks') -> list[Result]:
    """`work(*a)` for each `a` of `args`, one file each in `folder` (which is there, and `alone` one's own); results in the order of `args`, the same whoever did the work.

    `workers`: processes, in this one for 1 or less and for up to `few` tasks; `scheduler`: address or file of a Dask scheduler instead (default: `$PETVLM_DASK`). Files of other tasks are never taken, and are left: whoever goes back to the configuration before goes on from there.
    `skip`: a task that ends its worker process again and again is a `Result` with a reason. Otherwise raises `TaskError`, as for a scheduler that is lost, and what `work` raises."""
    folder, scheduler = Path(folder).absolute(), scheduler or os.environ.get(ADDRESS) or None
    named = [identity(work, a) for a in args]
    jobs = {key: (work, a, str(folder/f'{key}.npz'), code) for (key, code), a in zip(named, args)}
    here = not scheduler and (workers <= 1 or len(jobs) <= few)
    with contextlib.ExitStack() as stack:
        found = ((key, do(*job)) for key, job in jobs.items()) if here else _on_dask(stack.enter_context(cluster(workers, scheduler)), jobs, skip)
        try: results = dict(tqdm(found, total=len(jobs), desc=desc, unit='study'))
        except CancelledError as e: raise TaskError("the Dask scheduler went away; start it and run again, what is finished is kept") from e
    for result in results.values(): say(result.said)
    return [results[key] for key, _ in named]
