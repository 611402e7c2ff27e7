"The whole path in a fresh clone at smoke scale: data, training tree, evaluation, tables; then nothing is redone; then one ablation changes."
import json, os, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, yaml

ROOT = Path(__file__).parents[1]

def run(clone: Path, *args: str, **kw) -> str:
    "A command in the clone, with the clone's own package; its output. Fails with the last lines when the command does."
    env = os.environ | {'PYTHONPATH': str(clone), 'PETVLM_ROOT': str(clone), 'HF_HUB_OFFLINE': '1', 'DVC_NO_ANALYTICS': '1', 'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = subprocess.run(args, cwd=clone, env=env, capture_output=True, text=True, timeout=1500, **kw)
    assert out.returncode == 0, f"{' '.join(args)}:\n{out.stdout[-3000:]}\n{out.stderr[-3000:]}"
    return out.stdout

@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('fresh')/'petvlm'
    subprocess.run(['git', 'clone', '-q', str(ROOT), str(path)], check=True)
    run(path, sys.executable, '-m', 'petvlm.cli', 'plan', '--scale', 'smoke')
    run(path, sys.executable, '-m', 'petvlm.cli', 'data')
    run(path, 'dvc', 'repro')
    return path

def test_both_tables_hold_the_four_ablations(clone):
    for name in ('vipet_table1', 'vipet_table2'):
        table = pd.read_csv(clone/f'tables/smoke/{name}.csv', index_col='row')
        assert table.loc[['vipet', 'no_reg', 'no_fusion', 'no_fusion_no_reg'], 'BLEU-4 measured'].notna().all()
        assert (clone/f'tables/smoke/{name}.md').exists() and (clone/f'tables/smoke/{name}.tex').exists()

def test_every_arm_is_there_and_traceable(clone):
    results = json.loads((clone/'runs/smoke/evaluate/vipet/results.json').read_text())
    assert {r['arm'] for r in results if r['task'] == 'report'} == {'real', 'shuffled', 'ct_shuffled', 'noise', 'constant'}
    for r in results: assert r['provenance']['run'] == 'vipet.instruct' and r['provenance']['data_hash'] and r['n_patients'] > 1

def test_the_data_are_the_bytes_of_data_dvc(clone):
    assert 'up to date' in run(clone, 'dvc', 'status', 'data.dvc')

def test_nothing_is_done_twice(clone):
    assert 'Running stage' not in run(clone, 'dvc', 'repro')

def test_changing_one_ablation_touches_only_its_own_stages(clone):
    path = clone/'params.yaml'; before = path.read_text()
    path.write_text(before.replace('  no_reg:\n    stages:', '  no_reg:\n    tau: 0.07\n    stages:', 1))
    try: status = json.loads(run(clone, 'dvc', 'status', '--json'))
    finally: path.write_text(before)
    touched = {s.split('@')[-1] for s in status if s.startswith(('train', 'evaluate'))}
    assert touched and all(t.startswith('no_reg') for t in touched)
