"The whole path in a fresh clone at smoke scale, every system: data, training graph, evaluation, tables; then nothing is redone; then one ablation changes."
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

QUICK = ('vipet', 'no_reg', 'content_topic')                      # two systems side by side and an ablation; `make test-slow` runs every system
POINTS = (*QUICK, 'med3dvlm', 'dcformer_clip', 'petar', 'petar_none')

def reproduced(path: Path, points) -> Path:
    "A fresh clone in which `points` were trained, evaluated and tabulated at smoke scale."
    subprocess.run(['git', 'clone', '-q', str(ROOT), str(path)], check=True)
    params = path/'params.yaml'; text = params.read_text()
    kept = [line for line in text[text.index('\npoints:'):text.index('\noffered:')].splitlines(True) if line.split(':')[0].strip() in ('', 'points', *points)]
    params.write_text(text[:text.index('\npoints:')] + ''.join(kept) + text[text.index('\noffered:'):])
    run(path, sys.executable, '-m', 'petvlm.cli', 'plan', '--scale', 'smoke')
    run(path, sys.executable, '-m', 'petvlm.cli', 'data')
    run(path, sys.executable, '-m', 'petvlm.cli', 'repro')
    return path

@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path: return reproduced(tmp_path_factory.mktemp('fresh')/'petvlm', QUICK)

@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path: return reproduced(tmp_path_factory.mktemp('whole')/'petvlm', POINTS)

ROWS = {'vipet_table1': ('vipet', 'no_reg', 'shuffled'), 'vipet_table2': ('vipet', 'no_reg'), 'med3dvlm_table1': ('med3dvlm',), 'med3dvlm_table2': ('med3dvlm', 'noise'), 'med3dvlm_table3': ('med3dvlm',),
        'med3dvlm_table4': ('med3dvlm', 'constant'), 'med3dvlm_table5': ('med3dvlm', 'dcformer_clip'), 'petar_table1': ('petar', 'measured'), 'petar_table2': ('petar', 'petar_none'), 'content_topic_table1': ('content_topic', 'constant')}

def test_every_table_is_written():
    from petvlm.tables import TABLES
    assert set(ROWS) <= set(TABLES)

def check_table(clone: Path, name: str) -> None:
    table = pd.read_csv(clone/f'tables/smoke/{name}.csv', index_col='row')
    for row in ROWS[name]:
        measured = [c for c in table.columns if c.endswith(' measured')]
        assert table.loc[row, measured].notna().any() and '.' in table.loc[row, 'run'] and 'not run' not in table.loc[row, 'status'], row
    assert table['status'].notna().all() and (clone/f'tables/smoke/{name}.md').exists() and (clone/f'tables/smoke/{name}.tex').exists()

@pytest.mark.parametrize('name', [n for n in ROWS if n.startswith(('vipet', 'content'))])
def test_each_table_holds_what_was_trained_with_its_run(clone, name): check_table(clone, name)

@pytest.mark.slow
@pytest.mark.parametrize('name', ROWS)
def test_each_table_of_every_system(whole, name): check_table(whole, name)

@pytest.mark.slow
def test_lesions_have_their_arms_and_their_numbers(whole):
    lesions = json.loads((whole/'runs/smoke/evaluate/petar/results.json').read_text())
    assert {r['arm'] for r in lesions} == {'real', 'shuffled', 'ct_shuffled', 'pet_only', 'ct_only', 'noise', 'constant', 'measured'} and all({'suvmax.accuracy', 'slice_voxels.accuracy'} <= set(r['metrics']) for r in lesions)

@pytest.mark.slow
def test_a_retrieval_leaves_the_pairs_that_it_was_measured_on(whole):
    from petvlm.pairs import read_pairs
    folder = whole/'runs/smoke/evaluate/med3dvlm'; pairs = read_pairs(folder)
    (r,) = [r for r in json.loads((folder/'results.json').read_text()) if r['task'] == 'retrieval']
    for way, name in (('text_to_image', 'ir'), ('image_to_text', 'tr')):
        for k, v in pairs.recalls()[way].items(): assert abs(v - r['metrics'][f'{name}.r{k}.n{len(pairs)}']['value']) < 1e-9

def test_every_arm_is_there_and_traceable(clone):
    results = json.loads((clone/'runs/smoke/evaluate/vipet/results.json').read_text())
    assert {r['arm'] for r in results if r['task'] == 'report'} == {'real', 'shuffled', 'ct_shuffled', 'pet_only', 'ct_only', 'noise', 'constant'}
    for r in results: assert r['provenance']['run'] == 'vipet.instruct' and r['provenance']['data_hash'] and r['n_patients'] > 1

def test_every_arm_is_in_the_table_of_lesions_and_errors_are_injected(clone):
    lesions = pd.read_csv(clone/'tables/smoke/lesions.csv')
    assert set(lesions['point']) == set(QUICK) and set(lesions.loc[lesions['point'] == 'vipet', 'arm']) >= {'real', 'pet_only', 'ct_only', 'constant'} and lesions['lesion_missed_per_patient'].notna().all()
    for language in ('vi', 'en'):
        seen = pd.read_csv(clone/f'tables/believe-smoke/detected_{language}.csv', index_col='kind')['seen']
        assert seen.drop(['none', 'all_normal']).min() > .9 and seen['none'] < .05

@pytest.mark.parametrize('name', ['regions-vi', 'radiographs-en'])
def test_every_data_set_is_audited_and_nobody_is_on_two_sides(clone, name):
    table = pd.read_csv(clone/f'audits/smoke/{name}.csv')
    assert {'same patient', 'same images', 'near images'} <= set(table['check']) and not table.loc[table['severity'] == 'leak', 'number'].any()
    assert table['data_hash'].unique().tolist() == [json.loads((clone/'runs/smoke/evaluate'/{'regions-vi': 'vipet', 'radiographs-en': 'content_topic'}[name]/'results.json').read_text())[0]['provenance']['data_hash']]

def test_the_data_are_the_bytes_of_data_dvc(clone):
    assert 'up to date' in run(clone, 'dvc', 'status', 'data.dvc')

def test_nothing_is_done_twice(clone):
    assert 'Running stage' not in run(clone, sys.executable, '-m', 'petvlm.cli', 'repro')

def test_changing_one_ablation_touches_only_its_own_stages(clone):
    path = clone/'params.yaml'; before = path.read_text()
    def touched(setting: str) -> set[str]:
        path.write_text(before.replace('  no_reg:\n    stages:', f'  no_reg:\n    {setting}\n    stages:', 1))
        try:
            run(clone, 'dvc', 'repro', 'configure@vipet')
            return {s for s in json.loads(run(clone, 'dvc', 'status', '--json')) if s.startswith(('prepare', 'train', 'evaluate'))}
        finally: path.write_text(before)
    assert touched('tau: 0.07') == set()                                  # what it is anyway
    assert touched('lora: {r: 2}') == {'train@no_reg.instruct', 'evaluate@no_reg'}
