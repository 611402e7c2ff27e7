"What each step of the pipeline depends on: nothing that it runs is left out, nothing of other systems is in."
import json
from pathlib import Path
import pytest
from petvlm.config import Paths, load_params, resolve
from petvlm.graph import chain, plan
from petvlm.needs import EVALUATED_BY, IN_NAME_ONLY, MADE_BY, PREPARED_BY, READ_BY, RUN_BY, STANDS_ON, TRAINED_BY, models_of, write_needs
from petvlm.rows import KINDS
from petvlm.slots import PROJECTORS, SLOTS
from test_layers import ORDER, ROOT, imports

def closure(module: str) -> set[str]:
    found, todo = set(), [module]
    while todo:
        new = imports(ROOT/f'petvlm/{todo.pop()}.py') - found
        found |= new; todo += new
    return found

NAMED = {c.__module__.rpartition('.')[2] for slot in ('encode', 'fuse', 'pool') for c in SLOTS[slot].values()} | set(IN_NAME_ONLY.values())   # by a configuration
MODELS = {m for m, n in ORDER.items() if '10' <= n < '14'} - set(RUN_BY)    # those, and what only they stand on
INPUTS_ONLY = {m for m, n in ORDER.items() if n < '09'} - set(READ_BY)    # studies and rows: a step reads them as prepared data
NOT_IN_DATA = {'config', 'chat'}                                          # what is configured is in the file itself; a served model writes no data of the phantom
PUBLISHED = {'checkpoints', 'folders'}                                    # published weights, which say themselves what was read (their audit)

def test_a_preparation_depends_on_everything_it_imports():
    makers = {k: v.make.__module__.rpartition('.')[2] for k, v in KINDS.items()}; assert set(MADE_BY) == set(makers)
    assert closure('items') - NOT_IN_DATA - {'m3dvqa'} - set().union(*MADE_BY.values()) <= set(PREPARED_BY)
    for kind, maker in makers.items(): assert (closure(maker) | {maker}) - NOT_IN_DATA <= set(PREPARED_BY) | set(MADE_BY[kind]), kind

def test_a_training_depends_on_everything_it_imports():
    assert closure('train') - INPUTS_ONLY - PUBLISHED - MODELS <= set(TRAINED_BY)

def test_an_evaluation_depends_on_everything_it_imports():
    judged = closure('evaluate') - INPUTS_ONLY - PUBLISHED - MODELS - set(TRAINED_BY) - {'train'}     # what trained the weights is in the weights
    assert judged - {'endpoint'} <= set(EVALUATED_BY)

def test_models_stand_on_what_they_import():
    assert MODELS == NAMED | {m for parts in STANDS_ON.values() for m in parts}
    assert {m: tuple(sorted(imports(ROOT/f'petvlm/{m}.py') & MODELS)) for m in MODELS if imports(ROOT/f'petvlm/{m}.py') & MODELS} == {k: tuple(sorted(v)) for k, v in STANDS_ON.items()}
    assert set(IN_NAME_ONLY) == set(PROJECTORS)

@pytest.mark.parametrize('point', ['vipet', 'med3dvlm', 'petar', 'content_topic'])
def test_of_the_models_only_those_in_use(point):
    used = set(models_of(resolve(point, 'phantom')))
    assert used <= MODELS and used != MODELS and ('dcformer' in used) == ('axialkernels' in used) == (point == 'med3dvlm') and ('content_topic' in used) == (point == 'content_topic')

def test_the_same_bytes_twice_and_a_whole_folder(tmp_path):
    (tmp_path/'petvlm').symlink_to(ROOT/'petvlm')
    params, where = load_params(ROOT/'params.yaml'), Paths(tmp_path, 'phantom')
    read = lambda: {str(f.relative_to(tmp_path)): f.read_text(encoding='utf-8') for f in write_needs('petar', where, params).rglob('*.json')}
    first = read(); (where.needs('petar')/'train/left.json').write_text('{}')
    assert read() == first and not list(where.needs('petar').parent.glob('*.part'))
    nodes = {n for n, v in plan(params, 'phantom').items() if v['system'] == 'petar'}
    assert {Path(n).stem if '/train/' not in n else Path(n).name.removesuffix('.json') for n in first if '/train/' in n} == nodes
    need = json.loads(first[next(n for n in first if n.endswith('train/petar.full.json'))])
    assert need['key'] == chain(resolve('petar', 'phantom', params))['full'] and need['stage']['steps'] == resolve('petar', 'phantom', params).stages['full'].steps
