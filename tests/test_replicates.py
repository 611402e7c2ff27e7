"Seeds as replicates: how they are asked for, what they share with the point that they repeat, and what is made of their results; hashes of the weights that a model was loaded from."
import copy, dataclasses, hashlib, json, math
import jsonschema, numpy as np, pytest, yaml
from petvlm.cli import plan_text
from petvlm.config import SEED_STEP, ConfigError, Part, Paths, digest, load_params, replicate_of, resolve
from petvlm.facts import bootstrap, judge_choices, mean_from_sums, paired_bootstrap, statistic_of, sums_of
from petvlm.graph import chain, last_nodes, lineage, plan
from petvlm.replicates import ReplicateError, difference, families, hierarchical, pool, seeds_table
from petvlm.tables import RESULT, make_table, rows_of
from petvlm.weights import INDEX, file_hash, shards, weight_files, weight_hashes

PARAMS = load_params()
def listed(*points, beside=PARAMS['points']): return PARAMS | {'points': {p: PARAMS['points'][replicate_of(p)[0]] for p in (*beside, *points)}}

# ---- asking for them ----

@pytest.mark.parametrize('point', PARAMS['points'] | PARAMS['offered'])
def test_a_replicate_is_its_point_with_another_seed_and_nothing_else(point):
    own, third = resolve(point, params=PARAMS), resolve(f'{point}~3', params=PARAMS)
    assert third.seed == own.seed + 2*SEED_STEP and digest(dataclasses.replace(third, point=point, seed=own.seed)) == digest(own)

@pytest.mark.parametrize('point', PARAMS['points'])
def test_no_stage_is_shared_and_the_data_are(point):
    own, second = resolve(point, params=PARAMS), resolve(f'{point}~2', params=PARAMS)
    assert not set(chain(own).values()) & set(chain(second).values()) and list(chain(own)) == list(chain(second)) and own.data.name == second.data.name

def test_no_two_replicates_take_each_others_order_of_items():
    most = max(len(resolve(p, params=PARAMS).stages) for p in PARAMS['points'])
    assert most < SEED_STEP                             # stage i draws its items with seed + i

def test_listing_replicates_leaves_every_other_node_as_it_was():
    before, after = plan(PARAMS), plan(listed('vipet~2', 'no_reg~2', 'vipet~3'))
    assert {n: v for n, v in after.items() if '~' not in n} == before
    assert {n.partition('.')[0] for n in set(after) - set(before)} == {'vipet~2', 'no_reg~2', 'vipet~3'}
    assert last_nodes('no_reg~2', listed('vipet~2', 'no_reg~2')) == ['no_reg~2.instruct'] and 'vipet~2.fusion' in lineage('no_reg~2', listed('vipet~2', 'no_reg~2'))

def test_dvcs_plan_holds_replicates_beside_everything_it_held():
    before, after = (yaml.safe_load(plan_text(p)) for p in (listed(beside=('vipet', 'no_reg')), listed('vipet~2', beside=('vipet', 'no_reg'))))
    for part in before: assert {k: v for k, v in after[part].items() if '~' not in k} == before[part]
    assert set(after['points']) - set(before['points']) == {'vipet~2'} and after['points']['vipet~2']['last'].endswith('/train/vipet~2.instruct') and after['datasets'] == before['datasets']
    assert after['nodes']['vipet~2.lm']['after1'].endswith('/train/vipet~2.lm_report')

@pytest.mark.parametrize('point', ['vipet~', 'vipet~1', 'vipet~0', 'vipet~02', 'vipet~x', 'vipet~2~3', '~2', 'vipet~-2', 'vipet~２'])
def test_marks_that_mean_nothing(point):
    with pytest.raises(ConfigError, match='expected a name, or a name, ~ and a number from 2 on'): resolve(point, params=PARAMS)

def test_a_replicate_of_nothing_or_of_something_else_is_refused():
    with pytest.raises(ConfigError, match='points.vipett: unknown'): resolve('vipett~2', params=PARAMS)
    params = copy.deepcopy(PARAMS); params['points']['vipet~2'] = {'system': 'vipet', 'ablation': 'no_reg'}
    with pytest.raises(ConfigError, match=r"points.vipet~2: found .*no_reg.*expected .*none.*another seed and nothing else"): plan(params)
    assert resolve('smollm2~2', params=PARAMS).lm == resolve('smollm2', params=PARAMS).lm and replicate_of('no_reg~12') == ('no_reg', 12) and replicate_of('no_reg') == ('no_reg', 1)

# ---- putting results together ----

def result(point, right, seed=0, patients=20, **more):
    hit = np.random.default_rng(seed).random(2*patients) < right
    return {'point': point, 'task': 'closed_vqa', 'arm': 'real', 'provenance': {'run': f'{point}.instruct', 'data_hash': 'd', 'params_hash': f'h{point}', 'revision': 'r'},
            **judge_choices(hit, [f'p{i//2:02}' for i in range(2*patients)], ['organ' if i % 2 else 'plane' for i in range(2*patients)]), **more}

def test_one_seed_comes_out_as_it_went_in():
    results = [result('vipet', .8), result('no_reg', .6), result('vipet', .1) | {'arm': 'shuffled'}]
    before = json.dumps(results)
    assert all(a is b for a, b in zip(pool(results), results)) and json.dumps(results) == before

def test_a_lone_replicate_does_not_pass_for_its_point():
    lone = [result('vipet~2', .8), result('vipet~3', .7)]
    assert pool(lone) == lone and not rows_of(pool(lone), 'closed_vqa', 'vipet', ['vipet'])

def test_mean_deviation_and_interval_by_hand():
    seeds = [result('vipet', .8, 1), result('vipet~2', .8, 2), result('vipet~3', .8, 3)]
    pooled, = pool(seeds[::-1])
    values = [r['metrics']['mean.accuracy']['value'] for r in seeds]
    e = pooled['metrics']['mean.accuracy']
    assert e['values'] == values and e['value'] == pytest.approx(np.mean(values)) and e['sd'] == pytest.approx(np.std(values, ddof=1)) and e['seeds'] == 3 and e['lo'] < e['value'] < e['hi']
    assert pooled['point'] == 'vipet' and pooled['provenance']['run'] == 'vipet.instruct+vipet~2.instruct+vipet~3.instruct' and [r['point'] for r in pooled['replicates']] == ['vipet', 'vipet~2', 'vipet~3']

def test_two_seeds_without_noise_of_patients():
    rows = [np.tile([x, 1.], (9, 1)) for x in (60, 70)]
    e = hierarchical(rows, mean_from_sums)
    assert (e['value'], round(e['sd'], 6)) == (65, round(50**.5, 6)) and (e['lo'], e['hi']) == pytest.approx((65 - 5*2**.5, 65 + 5*2**.5))

def test_patients_are_one_draw_for_all_seeds():
    "The same answers from every seed: more seeds must not narrow the interval that patients give."
    x = np.random.default_rng(0).normal(50, 10, 80)
    rows = np.column_stack([x, np.ones(80)])
    for n in (1, 2, 9):
        e = hierarchical([rows]*n, mean_from_sums)
        assert (e['lo'], e['hi']) == pytest.approx(bootstrap(x))

@pytest.mark.parametrize('S', [8, 20])
def test_the_interval_has_the_width_of_both_spreads(S):
    rng, P = np.random.default_rng(S), 60
    centred = lambda n, sd: (lambda x: sd*(x - x.mean())/x.std(ddof=1))(rng.normal(size=n))
    hard, seeds = centred(P, 10), centred(S, 4)
    shares = rng.multinomial(S, np.full(S, 1/S), size=4000)/S                                        # what the widened draw of seeds alone has as variance
    assert ((shares @ seeds)*math.sqrt(S/(S - 1))).var() == pytest.approx(16/S, rel=.1)
    e = hierarchical([np.column_stack([50 + hard + s, np.ones(P)]) for s in seeds], mean_from_sums, n=8000)
    assert (e['hi'] - e['lo'])/2 == pytest.approx(1.96*math.sqrt(16/S + 100/P), rel=.12)

def test_pooled_results_are_results():
    pooled = pool([result('vipet', .8, 1), result('vipet~2', .7, 2), result('no_reg', .5, 3)])
    jsonschema.validate(json.loads(json.dumps(pooled)), {'type': 'array', 'items': RESULT})

def test_tables_take_pooled_results_and_pass_over_loose_replicates():
    single, second = (result(p, .8, s) | {'task': 'closed_vqa'} for p, s in (('med3dvlm', 1), ('med3dvlm~2', 2)))
    loose, pooled = make_table('med3dvlm_table4', [single, second], n=200), make_table('med3dvlm_table4', pool([single, second]), n=200)
    assert loose.loc['med3dvlm', 'run'] == 'med3dvlm.instruct' and pooled.loc['med3dvlm', 'run'] == 'med3dvlm.instruct+med3dvlm~2.instruct'
    assert pooled.loc['med3dvlm', 'Mean accuracy measured'] == pytest.approx(np.mean([r['metrics']['mean.accuracy']['value'] for r in (single, second)]))

@pytest.mark.parametrize('change,words', [({'tokenizer': 'nltk'}, r"differs from vipet in \['tokenizer'\]"), ({'provenance': {'data_hash': 'other'}}, r"\['data_hash'\]"), ({'per_patient': {'patients': ['a']}}, 'of other patients'), ({'n': 3}, r"\['n'\]")])
def test_results_that_do_not_belong_together(change, words):
    with pytest.raises(ReplicateError, match=words): pool([result('vipet', .8, 1), result('vipet~2', .8, 2) | change])

def test_two_results_of_one_replicate():
    with pytest.raises(ReplicateError, match='two results of vipet~2'): families([result('vipet~2', .8), result('vipet~2', .7)])
    with pytest.raises(ReplicateError, match='the same for each seed'): hierarchical([np.ones((3, 2)), np.ones((4, 2))], mean_from_sums)

def test_a_metric_that_one_seed_lacks_is_left_out():
    second = result('vipet~2', .8, 2); del second['metrics']['organ.accuracy']
    pooled, = pool([result('vipet', .8, 1), second])
    assert set(pooled['metrics']) == {'plane.accuracy', 'mean.accuracy'}

def test_a_difference_of_one_seed_is_that_of_before():
    a, b = result('vipet', .8, 1), result('no_reg', .5, 2)
    old = paired_bootstrap(*(sums_of('mean.accuracy', r['per_patient']) for r in (a, b)), statistic_of('mean.accuracy'))
    new = difference(a, b, 'mean.accuracy')
    assert (new['value'], new['lo'], new['hi']) == pytest.approx((old['difference'], old['lo'], old['hi'])) and math.isnan(new['sd'])

def test_what_a_seed_does_to_both_falls_out_of_their_difference():
    "Each seed moves both points alike by far more than the points differ: only pairs of seeds show the difference."
    def counted(point, right):
        hit = np.arange(200) % 100 < right
        return {'point': point, 'task': 'closed_vqa', 'arm': 'real', 'provenance': {}, **judge_choices(hit, [f'p{i % 100:02}' for i in range(200)], ['organ']*200)}
    a, = pool([counted('vipet', 80), counted('vipet~2', 60), counted('vipet~3', 40)])
    b, = pool([counted('no_reg', 75), counted('no_reg~2', 55), counted('no_reg~3', 35)])
    paired = difference(a, b, 'mean.accuracy')
    loose, = pool([counted('no_reg', 75), counted('no_reg~4', 55), counted('no_reg~5', 35)])
    apart = difference(a, loose, 'mean.accuracy')
    assert paired['paired'] and paired['values'] == pytest.approx([5, 5, 5]) and paired['sd'] == pytest.approx(0) and paired['lo'] > 0
    assert not apart['paired'] and apart['value'] == pytest.approx(5) and apart['lo'] < -10 and apart['hi'] > 20

def test_the_table_of_seeds():
    table = seeds_table(pool([result('vipet', .8, 1), result('vipet~2', .7, 2), result('no_reg', .5, 3)]), ['mean.accuracy'])
    assert table['point'].tolist() == ['vipet', 'no_reg'] and table['seeds'].tolist() == [2, 1] and table['sd'].isna().tolist() == [False, True] and len(table['values'][0].split()) == 2

# ---- weights ----

def test_every_file_that_a_model_is_loaded_from_is_hashed(tmp_path):
    where, cfg = Paths(tmp_path, 'smoke'), resolve('no_reg', 'smoke')
    (tmp_path/'theirs').mkdir(); (tmp_path/'theirs/model.safetensors').write_bytes(b'abc'); (tmp_path/'theirs/other.safetensors').write_bytes(b'not read')
    (tmp_path/'lm').mkdir(); (tmp_path/'lm/model.safetensors').write_bytes(b'lm')
    cfg = dataclasses.replace(cfg, encode=cfg.encode | {'ct': dataclasses.replace(cfg.encode['ct'], weights='theirs')}, project=dataclasses.replace(cfg.project, weights='theirs/other.safetensors'), lm=Part('hub', {'name': str(tmp_path/'lm')}))
    nodes = lineage('no_reg', scale='smoke')
    for n in nodes: where.node(n).mkdir(parents=True); (where.node(n)/'delta.safetensors').write_bytes(n.encode())
    sha = lambda b: hashlib.sha256(b).hexdigest()[:12]
    assert weight_hashes(cfg, where) == {'lm/model.safetensors': sha(b'lm'), 'encode.ct/model.safetensors': sha(b'abc'), 'project/other.safetensors': sha(b'not read')} | {f'{n}/delta.safetensors': sha(n.encode()) for n in nodes}
    assert sha(b'abc') == 'ba7816bf8f01'                                   # FIPS 180-2's example
    (where.node(nodes[0])/'delta.safetensors').write_bytes(b'trained again')
    assert weight_hashes(cfg, where)[f'{nodes[0]}/delta.safetensors'] == sha(b'trained again')

def test_a_served_point_has_no_weights_here(tmp_path): assert weight_files(resolve('gpt4o', 'smoke'), Paths(tmp_path, 'smoke')) == {}

def test_what_is_read_of_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r'found \[\], expected model.safetensors'): shards(tmp_path)
    for n in 'ab': (tmp_path/f'{n}.safetensors').touch()
    with pytest.raises(ConfigError, match=r"found \['a.safetensors', 'b.safetensors'\]"): shards(tmp_path)
    (tmp_path/INDEX).write_text(json.dumps({'weight_map': {'x': 'b.safetensors', 'y': 'b.safetensors'}}))
    assert [p.name for p in shards(tmp_path)] == ['b.safetensors']
    (tmp_path/'vision_tower.safetensors').touch()
    assert [p.name for p in shards(tmp_path)] == ['b.safetensors', 'vision_tower.safetensors'] and shards(tmp_path/'a.safetensors') == [tmp_path/'a.safetensors']
    with pytest.raises(ConfigError, match='cannot be read'): file_hash(tmp_path/'none.safetensors')
