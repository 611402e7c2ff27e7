"Stages that submit themselves: with an `sbatch` that runs the script at once, with one that refuses, with none, and through DVC."
import json, os, stat, subprocess, sys
from pathlib import Path
import pytest
from petvlm import cluster
from petvlm.cluster import ClusterError, options, script, shims, stage_of, submit, write_spent
from petvlm.cli import main as cli

ROOT = Path(__file__).parents[1]
RUNS = '''#!/bin/bash
# As SLURM: prints a job number, reads options from the script, runs it elsewhere (its own environment is kept), exits as the job does.
file="${@: -1}"; echo "$@" > sbatch-args; echo 4711
log=$(sed -n 's/^#SBATCH --output=//p' "$file" | sed 's/%j/4711/'); cd "$(sed -n 's/^#SBATCH --chdir=//p' "$file")"
SLURM_JOB_ID=4711 bash "$file" > "$log" 2>&1
'''
REFUSES = '#!/bin/bash\necho "sbatch: error: invalid partition specified: nowhere" >&2; exit 1\n'
MODULE = 'import json, os, sys\njson.dump({"args": sys.argv[1:], "job": os.environ.get("SLURM_JOB_ID"), "slurm": os.environ.get("PETVLM_SLURM"), "root": os.environ.get("PETVLM_ROOT")}, open("ran.json", "w"))\nsys.exit(int(os.environ.get("FAIL", 0)))\n'

def module(root: Path, name: str) -> None:
    folder = root/'lib'/name; folder.mkdir(parents=True); (folder/'__init__.py').touch(); (folder/'__main__.py').write_text(MODULE)

@pytest.fixture
def place(tmp_path, monkeypatch):
    "A project's root, a folder for programs that is first on the path, and a module `papermill` that writes down how it was called."
    (tmp_path/'params.yaml').write_text('scale: smoke\n'); (tmp_path/'bin').mkdir(); module(tmp_path, 'papermill')
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('PETVLM_ROOT', str(tmp_path)); monkeypatch.setenv('PATH', f"{tmp_path/'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv('PYTHONPATH', f"{tmp_path/'lib'}:{ROOT}"); monkeypatch.delenv('PETVLM_SLURM', raising=False)
    return tmp_path

def program(folder: Path, name: str, text: str) -> None:
    path = folder/'bin'/name; path.write_text(text); path.chmod(path.stat().st_mode | stat.S_IEXEC)

CALL = ['papermill', '--log-output', 'nbs/pipeline/train.ipynb', 'reports/train-vipet.lm.ipynb', '-p', 'node', 'vipet.lm', '-p', 'scale', 'smoke']

def test_a_job_runs_the_command_and_is_waited_for(place):
    program(place, 'sbatch', RUNS)
    submit([sys.executable, '-c', 'open("done", "w").write("x y")'], 'a b;c', place, ['--gres=gpu:2', '--time=1:00'])
    assert (place/'done').read_text() == 'x y' and (place/'sbatch-args').read_text().split()[:2] == ['--parsable', '--wait']
    text = (place/'reports/slurm/a_b_c.sh').read_text()
    assert '#SBATCH --gres=gpu:2\n#SBATCH --time=1:00\nset -euo pipefail' in text and 'petvlm-a_b_c' in text

def test_a_job_that_fails_says_so_with_its_last_lines(place):
    program(place, 'sbatch', RUNS)
    with pytest.raises(ClusterError, match=r'job 4711 ended with 3.*\n.*out of memory'): submit(['bash', '-c', 'echo out of memory >&2; exit 3'], 'x', place, [])

def test_a_refusal_and_a_missing_sbatch_are_named(place, monkeypatch):
    program(place, 'sbatch', REFUSES)
    with pytest.raises(ClusterError, match='refused x.sh.*invalid partition'): submit(['true'], 'x', place, ['--partition=nowhere'])
    monkeypatch.setenv('PATH', str(place/'empty'))
    with pytest.raises(ClusterError, match='no sbatch'): submit(['true'], 'x', place, [])

def test_options_are_options_and_a_stage_may_have_its_own(monkeypatch):
    assert options('train') is None
    monkeypatch.setenv('PETVLM_SLURM', '--partition=cpu --time=1-00:00:00'); monkeypatch.setenv('PETVLM_SLURM_TRAIN', '--gres=gpu:8 --exclusive')
    assert options('train') == ['--gres=gpu:8', '--exclusive'] and options('prepare') == ['--partition=cpu', '--time=1-00:00:00']
    for bad in ('--time=1:00\n#SBATCH --uid=0', 'rm -rf x', '--x=$(id)', '-p gpu'):
        monkeypatch.setenv('PETVLM_SLURM', bad)
        if bad == '--time=1:00\n#SBATCH --uid=0': assert pytest.raises(ClusterError, options).value.args[0].startswith("PETVLM_SLURM: found '#SBATCH'")
        else: pytest.raises(ClusterError, options)

def test_a_stage_here_is_written_down(place):
    assert cluster.main(CALL) == 0
    ran, told = json.loads((place/'ran.json').read_text()), json.loads((place/'reports/spent/train-vipet.lm.json').read_text())
    assert ran['args'] == CALL[1:] and ran['job'] is None and told['scale'] == 'smoke' and told['exit'] == 0 and told['peak_mb'] > 3 and told['seconds'] > 0
    assert write_spent(place, 'smoke').read_text().splitlines()[1].startswith('train-vipet.lm,smoke,') and write_spent(place, 'phantom') is None

def test_a_stage_submits_itself_once(place, monkeypatch):
    program(place, 'sbatch', RUNS); monkeypatch.setenv('PETVLM_SLURM', '--gres=gpu:1')
    assert cluster.main(CALL) == 0
    ran = json.loads((place/'ran.json').read_text())
    assert ran == {'args': CALL[1:], 'job': '4711', 'slurm': None, 'root': str(place)}            # in the job, which does not submit again
    assert json.loads((place/'reports/spent/train-vipet.lm.json').read_text())['name'] == 'train-vipet.lm'
    monkeypatch.setenv('FAIL', '5')
    assert cluster.main(CALL) == 1

def test_the_script_before_papermill(place):
    folder = shims(place)
    run = subprocess.run(['papermill', *CALL[1:]], env=os.environ | {'PATH': f"{folder}:{os.environ['PATH']}"}, cwd=place, capture_output=True, text=True)
    assert run.returncode == 0 and json.loads((place/'ran.json').read_text())['args'] == CALL[1:], run.stderr
    assert shims(place) == folder

def test_one_stage_by_hand(place, monkeypatch):
    program(place, 'sbatch', RUNS); module(place, 'dvc')
    assert cli(['submit', 'train@vipet.lm']) == 0 and json.loads((place/'ran.json').read_text())['args'] == ['repro', '-s', 'train@vipet.lm']
    assert cli(['submit', 'vipet']) == 1

def test_what_is_no_call_of_papermill_is_refused(place):
    assert cluster.main(['papermill', 'train.ipynb']) == 1 and cluster.main(['python']) == 1
    with pytest.raises(ClusterError, match='executed copy'): stage_of(['a.ipynb'])

@pytest.mark.slow
def test_dvc_repro_submits_its_stages(place):
    "DVC with a stage as in dvc.yaml: it is submitted, waited for, recorded, and not done twice."
    program(place, 'sbatch', RUNS)
    (place/'dvc.yaml').write_text(f"stages:\n  train:\n    cmd: {' '.join(CALL)} && echo ready > result\n    outs: [result]\n")
    env = os.environ | {'PATH': f"{shims(place)}:{os.environ['PATH']}", 'PETVLM_SLURM': '--gres=gpu:1', 'DVC_NO_ANALYTICS': '1'}
    dvc = lambda *a: subprocess.run([sys.executable, '-m', 'dvc', *a], cwd=place, env=env | {'PYTHONPATH': f"{place/'lib'}:{ROOT}"}, capture_output=True, text=True)
    assert dvc('init', '--no-scm', '-q').returncode == 0
    first = dvc('repro'); assert first.returncode == 0, first.stderr
    assert json.loads((place/'ran.json').read_text())['job'] == '4711' and (place/'result').read_text() == 'ready\n'
    (place/'ran.json').unlink()
    assert dvc('repro').returncode == 0 and not (place/'ran.json').exists()
