"""Every benchmark of this folder, each in a process of its own, one after the other; then one table of all (`README.md`).

    python benchmarks/run.py                       # all; minutes each, hours never
    python benchmarks/run.py data metrics          # these
    python benchmarks/run.py --quick               # a look: everything small, nothing written
    python benchmarks/run.py --table               # the table again, from the JSON files

A benchmark whose peer is not installed says what it needs and is left out; its JSON of an earlier run stays. Ends with 1 where one failed. One core: `taskset -c 1 env OMP_NUM_THREADS=1 python benchmarks/run.py`.
"""
import argparse, importlib.util, os, subprocess, sys, tempfile, time
from pathlib import Path
from typing import NamedTuple
sys.path.insert(0, str(Path(__file__).parent))
from harness import LEFT_OUT
from table import HERE, write_page

ROOT = HERE.parent
ACRIN = ROOT.parent/'shared/data/petct/acrin_nsclc_042.tar.xz'


class Bench(NamedTuple):
    args: tuple[str, ...] = ()
    quick: tuple[str, ...] = ('--quick',)
    needs: tuple[str, ...] = ()           # modules that petvlm itself does without
    how: str = ''                         # to get them
    data: Path | None = None              # an archive whose folder is the first argument
    out: bool = False                     # whether the file it writes has to be named

BENCHMARKS = {
    'ingest': Bench(('--repeats', '3'), ('--repeats', '1', '--shape', '32', '24', '40', '--spacing', '12'), ('SimpleITK',), 'pip install SimpleITK==2.5.7', ACRIN, out=True),
    'alignment': Bench(), 'axial': Bench(), 'encoders': Bench(), 'contrast': Bench(),
    'data': Bench(), 'generation': Bench(),
    'retrieval': Bench(needs=('faiss',), how='pip install faiss-cpu==1.15.1'),
    'metrics': Bench(),
    'stages': Bench(),
    'viewer': Bench(quick=('--shape', '60', '80', '80', '--repeats', '3'), out=True)}


def wanting(name):
    "What a benchmark cannot run without, in words; '' where it can."
    b = BENCHMARKS[name]
    if not (HERE/f'{name}.py').is_file(): return f'benchmarks/{name}.py is not there'
    gone = [m for m in b.needs if not importlib.util.find_spec(m)]
    if gone: return f"needs {', '.join(gone)}: {b.how}"
    return f'needs {b.data}' if b.data and not b.data.exists() else ''


def run(name, quick, room):
    "The exit status of one benchmark."
    b, here = BENCHMARKS[name], []
    if b.data:
        subprocess.run(['tar', '-xf', str(b.data), '-C', room], check=True)
        here = [room]
    out = ['--out', str(HERE/f'{name}.json')] if b.out and not quick else []
    env = os.environ | {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false', 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    return subprocess.run([sys.executable, str(HERE/f'{name}.py'), *here, *(b.quick if quick else b.args), *out], env=env).returncode


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('names', nargs='*', metavar='name', help=f"of {', '.join(BENCHMARKS)}; all by default")
    p.add_argument('--quick', action='store_true', help='small sizes, nothing written'); p.add_argument('--table', action='store_true', help='only the table')
    a = p.parse_args(argv)
    if unknown := sorted(set(a.names) - set(BENCHMARKS)): p.error(f'no benchmark {unknown[0]!r}; there are {list(BENCHMARKS)}')
    failed = []
    for name in () if a.table else a.names or BENCHMARKS:
        if why := wanting(name): print(f'== {name}: left out, {why}', flush=True); continue
        print(f'== {name}', flush=True); start = time.perf_counter()
        with tempfile.TemporaryDirectory() as room:
            if run(name, a.quick, room) not in (0, LEFT_OUT): failed.append(name)
        print(f'== {name}: {time.perf_counter() - start:.0f} s', flush=True)
    if not a.quick: print(write_page(BENCHMARKS))
    if failed: sys.exit(f"failed: {', '.join(failed)}")


if __name__ == '__main__': main()
