"""What every benchmark shares: options, a measure in a process of its own, interleaved repeats, peak memory, one JSON, one table.

A benchmark is a file of functions that take and return what JSON can hold:

    def ready(): import torch, petvlm.alignment               # imported once, before the processes part (no threads, no GPU touched)
    def times(length): return harness.interleaved({'peer': f, 'ours': g}, repeats=5)
    def memory(way):
        with harness.peak() as m: work(way)
        return m
    def main(argv=None):
        a = harness.options(__doc__, __file__, argv, quick={'repeats': 1}, add=lambda p: p.add_argument('--lengths', type=int, nargs='+', default=[512]))
        seconds, *peaks = harness.apart(__file__, [('times', {'length': 512}), ('memory', {'way': 'peer'}), ('memory', {'way': 'ours'})])
        harness.write(a, 'what it is', rows=[{'tokens': 512, 'ways': harness.against(seconds)}])

Only the standard library is imported here.
"""
import argparse, ctypes, importlib.util, json, os, platform, shutil, statistics, subprocess, sys, threading, time, traceback
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


LEFT_OUT = 4       # exit status of a benchmark whose data are not there; it has said which
LIMIT = 'seconds after which nothing more is begun: what has been measured by then is written'

# ---- options, machine, results

def options(doc, file, argv=None, quick=None, add=None):
    "Parsed options: `--repeats`, `--out`, `--quick` (the values of `quick` in place of the defaults, and nothing written unless `--out` says where), and what `add(parser)` adds."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=5, help='rounds of each way, in turn')
    p.add_argument('--quick', action='store_true', help='a look in under 20 seconds; writes nothing unless --out is given')
    p.add_argument('--out', type=Path, help='default: the .json beside the benchmark')
    if add: add(p)
    if p.parse_known_args(argv)[0].quick: p.set_defaults(**(quick or {}))
    a = p.parse_args(argv)
    if a.out is None and not a.quick: a.out = Path(file).with_suffix('.cuda.json' if getattr(a, 'device', 'cpu') == 'cuda' else '.json')
    return a


def _said(path, word):
    "The rest of the first line of a /proc file that begins with `word`; '' where there is none."
    try: lines = Path(path).read_text().splitlines()
    except OSError: return ''
    return next((x.partition(':')[2].strip() for x in lines if x.startswith(word)), '')


def _version(package):
    try: return version(package)
    except PackageNotFoundError: return None


def machine(device='cpu'):
    "What the numbers were measured on. `device` 'cuda' adds the GPU's name (and imports torch)."
    git = ['git', 'describe', '--always', '--dirty']
    revision = os.environ.get('PETVLM_REVISION') or (subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() if shutil.which('git') else '')     # a copy without .git is told
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    memory = _said('/proc/meminfo', 'MemTotal')
    out = {'cpu': _said('/proc/cpuinfo', 'model name') or platform.processor() or platform.machine(), 'machine': platform.machine(), 'cores': os.cpu_count(), 'cores_used': cores,
           'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS'), 'memory_gb': round(int(memory.split()[0])/1e6, 1) if memory else None, 'load': round(os.getloadavg()[0], 2),
           'system': f'{platform.system()} {platform.release()}', 'python': platform.python_version(), 'torch': _version('torch'), 'transformers': _version('transformers'), 'revision': revision or None}
    if device == 'cuda':
        import torch
        free, total = torch.cuda.mem_get_info()
        out |= {'gpu': torch.cuda.get_device_name(), 'gpu_gb': round(total/1e9, 1), 'cuda': torch.version.cuda, 'triton': _version('triton')}
    return out


def write(a, what, rows, **more):
    "One JSON at `a.out`, whole or not at all; nothing where `a.out` is None. `rows`: list of dictionaries; `more`: further entries. Returns what was written."
    settings = {k: v for k, v in vars(a).items() if k not in ('out', 'quick')}
    result = {'what': what, 'when': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'command': ' '.join(['python', f'benchmarks/{Path(sys.argv[0]).name}', *sys.argv[1:]]),
              'settings': settings, 'machine': machine(getattr(a, 'device', 'cpu')), **more, 'rows': rows}
    if a.out is not None:
        part = a.out.with_name(f'.{a.out.name}.{os.getpid()}')
        part.write_text(json.dumps(result, indent=1, default=str) + '\n', encoding='utf-8')
        part.replace(a.out)
        print(a.out)
    return result


def show(rows, columns):
    "Print dictionaries as a table: `columns` name -> format, such as {'tokens': '6d', 'seconds': '8.3f'}; '-' where a row has no such entry."
    cells = [[*columns]] + [[format(r[c], f) if r.get(c) is not None else '-' for c, f in columns.items()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells: print('  '.join(x.rjust(w) for x, w in zip(row, widths)), flush=True)


# ---- time

def interleaved(ways, repeats, warm=1, before=None, sync=None, most=None, clock=time.perf_counter):
    """Seconds of every way in every round, `{name: [seconds]}`: `ways` name -> function, `repeats` rounds after `warm` ones that are not counted.

    The order turns by one from round to round, so that a machine that slows down or does other work meanwhile meets all ways alike. `before(name)` runs untimed ahead of each;
    `sync()` is called before the clock is read (`torch.cuda.synchronize`); no new round begins after `most` seconds. `clock=time.process_time` counts this process's own time only.
    """
    names, seconds, begun = list(ways), {w: [] for w in ways}, time.perf_counter()
    for n in range(warm + repeats):
        if most is not None and n > warm and time.perf_counter() - begun > most: break
        for w in names[n % len(names):] + names[:n % len(names)]:
            if before: before(w)
            if sync: sync()
            start = clock(); ways[w]()
            if sync: sync()
            if n >= warm: seconds[w].append(clock() - start)
    return seconds


def spread(values):
    "Median, smallest and largest."
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def against(seconds, first=None):
    "Per way: median, smallest and largest seconds, and the same of its ratio to the way `first` (the first one) within each round: `{name: {'seconds', 'fastest', 'slowest', 'time_ratio', 'ratio_min', 'ratio_max', 'all_seconds'}}`."
    first, out = first or next(iter(seconds)), {}
    for w, s in seconds.items():
        t, r = spread(s), spread([x/y for x, y in zip(s, seconds[first])])
        out[w] = {'seconds': t['median'], 'fastest': t['min'], 'slowest': t['max'], 'time_ratio': r['median'], 'ratio_min': r['min'], 'ratio_max': r['max'], 'all_seconds': s}
    return out


# ---- memory

def _resident(word): return int((_said('/proc/self/status', word) or '0').split()[0])*1024


def _watch(stop, top, every=.002):
    "Where the kernel's own peak cannot be reset: resident memory, sampled."
    import psutil
    process = psutil.Process()
    while not stop.wait(every): top[0] = max(top[0], process.memory_info().rss)


@contextmanager
def peak(device='cpu'):
    """Megabytes of this process at the beginning of the block and at its peak within it: `with peak() as m: ...` fills `{'start_mb', 'peak_mb', 'rise_mb', 'how'}`. Call it in a process of its own (`apart`).

    On the CPU resident memory, by the kernel's high-water mark (Linux) or sampled every 2 ms elsewhere; on 'cuda' what torch has allocated.
    """
    out = {}
    if device == 'cuda':
        import torch
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats(); start = torch.cuda.memory_allocated()
        yield out
        torch.cuda.synchronize(); end, how = torch.cuda.max_memory_allocated(), 'torch.cuda'
    else:
        # glibc raises its mmap threshold as it goes and then keeps freed blocks: resident memory would depend on luck (measured: 1.0 or 1.2 GB for the same step)
        try: ctypes.CDLL(None).mallopt(-3, 1 << 18)
        except (AttributeError, OSError): pass
        try: Path('/proc/self/clear_refs').write_text('5'); kernel = _resident('VmHWM') > 0
        except OSError: kernel = False
        if kernel:
            start = _resident('VmRSS')
            yield out
            end, how = _resident('VmHWM'), 'kernel'
        else:
            import psutil
            start = psutil.Process().memory_info().rss
            stop, top = threading.Event(), [start]
            watcher = threading.Thread(target=_watch, args=(stop, top), daemon=True); watcher.start()
            yield out
            stop.set(); watcher.join(); end, how = max(top[0], psutil.Process().memory_info().rss), 'sampled'
    out.update(start_mb=start/1e6, peak_mb=end/1e6, rise_mb=(end - start)/1e6, how=how)


# ---- processes

def load(file):
    "A benchmark file as a module."
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def apart(file, calls, limit=None):
    """Results of `calls`, a list of (name of a function of the benchmark `file`, keyword arguments), each run in a process of its own, one after the other.

    A fresh interpreter imports the file, runs its `ready()` where it has one, and forks for every call: imports are paid once and weigh the same in all. No call begins after `limit` seconds: None stands for its result. `RuntimeError` if one of them fails.
    """
    done = subprocess.run([sys.executable, __file__, str(file)], input=json.dumps([calls, limit]), stdout=subprocess.PIPE, text=True)
    if done.returncode: raise RuntimeError(f'{Path(file).name}: a measure failed (see above)')
    return json.loads(done.stdout.splitlines()[-1])


def _forked(function, kw):
    "The result of `function(**kw)`, computed by a child."
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(here)
            with os.fdopen(there, 'w') as pipe: json.dump(function(**kw), pipe)
            status = 0
        except BaseException:
            traceback.print_exc(); status = 1
        sys.stderr.flush(); os._exit(status)
    os.close(there)
    with os.fdopen(here) as pipe: told = pipe.read()
    _, status = os.waitpid(child, 0)
    if status: raise SystemExit(f'{function.__name__}({kw}) ended with {"signal " + str(status & 127) if status & 127 else "an error"}')
    return json.loads(told)


def _serve(file):
    "The other end of `apart`: calls from standard input, results as the last line of standard output."
    begun, (calls, limit), sys.stdout = time.perf_counter(), json.load(sys.stdin), sys.stderr            # what a measure prints must not mix with the results
    sys.path.insert(0, str(Path(file).parent))
    sys.modules['harness'] = sys.modules['__main__']
    module = load(file)
    getattr(module, 'ready', lambda: None)()
    results = []
    for name, kw in calls:
        start = time.perf_counter()
        if limit is not None and start - begun > limit: results.append(None); continue
        results.append(_forked(getattr(module, name), kw))
        print(f'{name} {kw}: {time.perf_counter() - start:.1f} s', flush=True)
    sys.__stdout__.write(json.dumps(results) + '\n')


if __name__ == '__main__': _serve(sys.argv[1])
