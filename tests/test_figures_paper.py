"Figures of a paper: records against sizes worked out by hand, layouts without overlaps, every stage of the pipeline drawn, the same bytes twice, nothing read as a formula, cases chosen by rule."
import dataclasses, json, time, unicodedata
from itertools import combinations
import numpy as np, pytest, yaml
from hypothesis import given, settings, strategies as st
from petvlm.blueprint import BlueprintError, blueprint, skeleton, write_blueprint
from petvlm.casebook import MARKS, OFF, Case, CaseError, Mark, choose, examples, read_cases, source_of, spans_of, study_of, tally
from petvlm.config import Paths, find_root, load_params, resolve
from petvlm.diagram import Box, DiagramError, arrange, size_of, spread
from petvlm.evaluate import NUMBERS
from petvlm.findings import Finding
from petvlm.overview import architecture, architecture_graph, feeds, load_blueprint, load_steps, pipeline_overview, systems_of
from petvlm.pictures import PANELS, panels_of
from petvlm.plates import band_of, case_plate, error_plate, is_right, questions_of
from petvlm.prepare import region_rows
from petvlm.press import PressError, Span, caption, drawable, flow, load_figures, markdown, publish, render, sheet
from petvlm.reports import parse
from petvlm.rows import KINDS
from petvlm.sources import drawn_study

ROOT = find_root()

# ---- Architecture. vipet at phantom scale, by hand: (32, 24, 40) voxels in patches of 8 are 4 x 3 x 5 = 60 tokens of 128.
@pytest.fixture(scope='module')
def vipet(): return blueprint(resolve('vipet', 'phantom'), 1024)

def part(record, name): return next(p for p in record['parts'] if p['name'] == name)

def test_shapes_are_those_worked_out_by_hand(vipet):
    tokens = [{'shape': [60, 128], 'grid': [4, 3, 5]}]
    assert vipet['images'] == {'pet': [32, 24, 40], 'ct': [32, 24, 40]} and vipet['device'] == 'cpu' and vipet['n_image'] == 60
    assert [part(vipet, n)['out'] for n in ('encode.pet', 'encode.ct', 'fuse', 'project')] == [tokens]*4 and part(vipet, 'fuse')['in'] == tokens*2      # PET and CT
    assert part(vipet, 'lm')['out'] == [{'shape': [1 + 60 + 8, 1024], 'grid': None}] and part(vipet, 'latent.full')['out'] == [{'shape': [128], 'grid': None}]

LAYER = 2*128*128 + 2*128*64 + 3*128*384 + 2*128              # q and o, k and v of two heads of 32, the gated feed-forward, two norms
LORA = 16*(2*(128 + 128) + 2*(128 + 64) + 3*(128 + 384))      # rank 16 on each of the seven linear layers

def test_parameters_are_those_worked_out_by_hand(vipet):
    size = {p['name']: p['params'] for p in vipet['parts']}
    assert size['lm'] == 1024*128 + 4*LAYER + 128 == 918_656 and size['project'] == 128*128 + 128 and size['latent.pet'] == 3*5*128*128 and size['pool'] == 0
    stages = {s['name']: s['trains'] for s in vipet['stages']}
    assert stages['instruct'] == {'project': [16_512, 16_512], 'lm': [4*LORA, 918_656 + 4*LORA]} and stages['projection'] == {'project': [16_512, 16_512]}
    assert set(stages['clip_pet']) >= {'encode.pet', 'text.pet', 'latent.pet'} and not any('lm' in t for n, t in stages.items() if n not in ('lm', 'lm_list', 'lm_report', 'instruct'))

def test_what_feeds_what_is_seen_in_the_pass(vipet):
    edges = {tuple(e) for e in vipet['edges']}
    assert edges >= {('pet', 'encode.pet'), ('ct', 'encode.ct'), ('encode.pet', 'fuse'), ('encode.ct', 'fuse'), ('fuse', 'pool'), ('pool', 'project'), ('project', 'lm'), ('encode.pet', 'latent.pet'), ('fuse', 'latent.full')}
    assert ('encode.ct', 'latent.pet') not in edges and ('pet', 'encode.ct') not in edges
    boxes, drawn = architecture_graph(vipet)
    assert ('fuse', 'project') in drawn and 'pool' not in boxes and set(boxes) >= {p['name'] for p in vipet['parts']} - {'pool'}

PAPER = {'med3dvlm': {'encode.ct': [([256, 384], [4, 8, 8]), ([32, 768], [2, 4, 4])], 'project': [([256, 3584], [1, 1, 256])]}, 'petar': {'encode.lesion': [([2048, 1536], [8, 16, 16])], 'pool': [([256, 1536], [4, 8, 8])]},
         'content_topic': {'encode.xray': [([392, 768], [2, 14, 14])], 'fuse': [([400, 768], [1, 1, 400])]}}      # facts of the published code (tests/test_paper_scale.py)

@pytest.mark.parametrize('point', PAPER)
def test_published_sizes_without_a_number(point):
    record = blueprint(resolve(point, 'paper'))
    assert record['device'] == 'meta' and {n: [(o['shape'], o['grid']) for o in part(record, n)['out']] for n in PAPER[point]} == PAPER[point]
    check(*architecture_graph(record)); architecture(record)

def test_what_cannot_be_built_says_so(tmp_path, vipet):
    with pytest.raises(BlueprintError, match='served'): skeleton(resolve('gpt4o', 'phantom'))
    cfg = resolve('vipet', 'paper')
    with pytest.raises(BlueprintError, match="'no/such'"): skeleton(dataclasses.replace(cfg, lm=dataclasses.replace(cfg.lm, args={'name': 'no/such'})))
    assert load_blueprint(write_blueprint(vipet, tmp_path/'a.json')) == vipet
    (tmp_path/'b.json').write_text('{"parts": []}')
    with pytest.raises(DiagramError, match='lacks'): load_blueprint(tmp_path/'b.json')

# ---- Layout
def check(boxes, edges):
    "No two boxes meet, arrows run from left to right, and none through a box."
    layout = arrange(boxes, edges); found = layout.boxes
    for a, b in combinations(found.values(), 2): assert a[0] + a[2] <= b[0] + 1e-6 or b[0] + b[2] <= a[0] + 1e-6 or a[1] + a[3] <= b[1] + 1e-6 or b[1] + b[3] <= a[1] + 1e-6
    assert all((x, y, x + w, y + h) == pytest.approx(np.clip((x, y, x + w, y + h), 0, layout.size*2), abs=1e-6) for x, y, w, h in found.values())
    for (a, b), points in layout.arrows.items():
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            for n, (x, y, w, h) in found.items():
                assert n in (a, b) or x1 <= x + 1e-6 or x0 >= x + w - 1e-6 or max(y0, y1) <= y or min(y0, y1) >= y + h, (a, b, n)
    return layout

def test_no_overlap_in_the_real_figures(vipet):
    check(*architecture_graph(vipet))

@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(2, 9), st.data())
def test_no_overlap_in_any_figure(n, data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=14))
    boxes = {str(k): Box(tuple((f'line {j}', 6., 'normal') for j in range(data.draw(st.integers(1, 4))))) for k in range(n)}
    check(boxes, [(str(min(p)), str(max(p))) for p in pairs if p[0] != p[1]])

@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 20)), min_size=1, max_size=6))
def test_rows_are_as_near_as_they_can_be(things):
    wanted, sizes = (np.array(x, float) for x in zip(*things))
    y = spread(wanted, sizes, 2)
    room = (sizes[1:] + sizes[:-1])/2 + 2
    assert (np.diff(y) >= room - 1e-9).all()
    cost = ((y - wanted)**2).sum()
    for k in range(len(y)):                       # moving any run of neighbours that may move does not come nearer
        for e in (-.01, .01):
            for l in range(k + 1, len(y) + 1):
                z = y.copy(); z[k:l] += e
                if (np.diff(z) >= room - 1e-9).all(): assert ((z - wanted)**2).sum() >= cost - 1e-9

def test_a_circle_and_an_unknown_box_are_refused():
    one = Box((('a', 6., 'normal'),))
    with pytest.raises(DiagramError, match='circle'): arrange({'a': one, 'b': one}, [('a', 'b'), ('b', 'a')])
    with pytest.raises(DiagramError, match="'c'"): arrange({'a': one}, [('a', 'c')])

# ---- Pipeline
def test_every_stage_of_dvc_is_in_the_overview_with_its_real_arrows():
    stages, plan = (yaml.safe_load((ROOT/p).read_text()) for p in ('dvc.yaml', 'nbs/pipeline/plan.yaml'))
    stages = stages['stages']; steps = load_steps(ROOT); links = feeds(steps)
    times = {n: len(plan[s['foreach'].strip('${}')]) if 'foreach' in s else 1 for n, s in stages.items()}
    assert {n: sum(s.stage == n for s in steps) for n in stages} == times
    after = [n[a] for n in plan['nodes'].values() for a in ('after1', 'after2', 'after3')]
    assert links['train', 'train'] == sum('/train/' in a and '/needs/' not in a for a in after) and links['prepare', 'audit'] == times['prepare'] and links['train', 'evaluate'] == times['evaluate'] and links['evaluate', 'tables'] == times['evaluate']
    assert links['prepare', 'train'] == times['train'] and not any(('audit', n) in links for n in stages)      # the audit stops a run by failing, nobody reads it
    fig = pipeline_overview(steps, systems_of(ROOT)); drawn = {t.get_text() for t in fig.axes[0].texts}
    assert {n + (f' × {k}' if k > 1 else '') for n, k in times.items()} <= drawn and 'data' in drawn

# ---- Bytes
def test_the_same_bytes_tomorrow(monkeypatch, vipet):
    make = lambda: [render(architecture(vipet), f, 60) for f in ('png', 'pdf', 'svg')]
    today = make(); now = time.time()
    monkeypatch.setattr(time, 'time', lambda: now + 86_400*400)
    assert today == make() and [x[:4] for x in today[:2]] == [b'\x89PNG', b'%PDF']

def test_a_caption_says_where_from_or_there_is_none(tmp_path):
    with pytest.raises(PressError, match="'run'"): caption('a', 'b', {'scale': 'x', 'revision': 'y', 'data_hash': 'z', 'run': ''})
    with pytest.raises(PressError, match='name'): publish(sheet(20, 20)[0], tmp_path, '../a', 'text')
    with pytest.raises(PressError, match='format'): render(sheet(20, 20)[0], 'gif')
    assert not list(tmp_path.iterdir())

# ---- Text
HOSTILE = 'Nốt $\\frac{1}{0}$ ở phổi <script>alert(1)</script> | *a* \x00\u202e' + unicodedata.normalize('NFD', 'trái')

def test_report_text_is_no_formula_and_no_markup(study_case):
    study, case, cfg = study_case
    bad = dataclasses.replace(case, prediction=HOSTILE)
    fig = case_plate([band_of('worst', bad, study, cfg, HOSTILE)], MARKS)
    texts = [t for ax in fig.axes for t in ax.texts]
    assert not any(t.get_parse_math() for t in texts if '$' in t.get_text()) and any('$\\frac{1}{0}$' in t.get_text() for t in texts)
    joined = ' '.join(t.get_text() for t in texts)
    assert 'trái' in joined and '\x00' not in joined and '\u202e' not in joined and '\N{REPLACEMENT CHARACTER}' in joined
    render(fig, 'pdf'); svg = render(fig, 'svg')
    assert b'<script' not in svg
    told = markdown(HOSTILE)
    assert '<' not in told and '\\|' in told and '\\*a\\*' in told and '\\$' in told and '\n' not in markdown('a\n# b')

@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4), st.integers(20, 200))
def test_any_text_is_broken_into_lines_that_fit(texts, width):
    lines = flow([Span(t, mark='✓') for t in texts], width)
    assert all(c.end <= width + 1e-6 or len(c.text) == 1 for line in lines for c in line)
    left = lambda s: ''.join(s.split()).replace('✓', '')
    assert ''.join(left(c.text) for line in lines for c in line) == ''.join(left(drawable(t)) for t in texts)

def test_every_mark_has_a_glyph_and_differs_in_more_than_colour():
    assert all(drawable(m) == m for m, *_ in MARKS.values()) and len({m for m, *_ in MARKS.values()}) == len(MARKS) == len({c for _, c, _ in MARKS.values()})

def test_marked_spans_give_the_text_back():
    text = 'Gan to. Nốt ở phổi trái 14 mm. Lách nhỏ.'
    right, wrong = (Mark((k,), None, None) for k in ('right', 'side'))
    spans = spans_of(text, [((8, 29), right), ((20, 29), wrong)])
    assert ''.join(s.text for s in spans) == text and [s.mark for s in spans] == ['', '✓⇄', ''] and spans[1].colour == MARKS['side'][1]
    assert [s.mark for s in spans_of(text, [(None, wrong)])] == ['⇄']

# ---- Cases
@pytest.fixture(scope='module')
def study_case():
    cfg = resolve('vipet', 'smoke'); study = drawn_study(3_000_000)
    rows = [r for _, r in region_rows(study, cfg.data, 'test')]
    r = max(rows, key=lambda r: len(r['findings']))
    truth = tuple(f for f in study.findings if f.region == r['region'])
    return study, Case(0, r, r['text'], 'Không thấy bất thường.', truth, lambda t: parse(t, 'vi')), cfg

def test_numbers_are_off_where_the_evaluation_says_so():
    values = np.linspace(1, 40, 60)
    assert all(OFF[k](a, b) != NUMBERS[k](a, b) for k in NUMBERS for a in values for b in values) and set(OFF) == set(NUMBERS)

def report(k, right, extra=0):
    "A case with `k` findings of which `right` are written, and `extra` that are not there."
    sites = [('lung', 'left'), ('lung', 'right'), ('kidney', 'left'), ('kidney', 'right')]
    text = lambda sites, kind: ' '.join(f'{kind} ở {"phổi" if o == "lung" else "thận"} {"trái" if s == "left" else "phải"}, kích thước 14 mm.' for o, s in sites)
    truth = tuple(Finding(o, s, 'mass', 14.) for o, s in sites[:k])
    return Case(0, {'patient': f'{k}{right}{extra}', 'region': 'chest'}, text(sites[:k], 'Khối'), text(sites[:right], 'Khối') + ' Lách có khối 20 mm.'*extra, truth, lambda t: parse(t, 'vi'))

def test_cases_are_chosen_by_rule():
    cases = [report(0, 0), report(2, 1), report(4, 4), report(3, 0), report(2, 2), report(3, 0, 1), report(4, 2)]
    assert [round(c.f1, 2) for c in cases] == [1, .67, 1, 0, 1, 0, .67]
    found = choose(cases, 3)
    assert found['best'] is cases[2] and found['worst'] is cases[5] and found['median'] in (cases[1], cases[6]) and cases[0] not in found.values()
    assert found == choose(cases, 3) and choose(cases[:1]) == {} and list(choose(cases[1:2])) == ['best'] and list(choose(cases[1:3])) == ['best', 'worst']

def test_errors_are_counted_and_shown_with_one_of_the_commonest():
    cases = [report(2, 1), report(4, 2), report(3, 3, 1)]
    table = tally(cases).set_index('kind')
    assert table.loc['missed', ['n', 'reports', 'of', 'mostly', 'times']].tolist() == [3, 2, 9, 'kidney mass', 2] and table.loc['invented', 'n'] == 1 and table.index[0] == 'missed'
    case, mark = examples(cases, 0)['missed']
    assert (mark.there.organ, mark.there.kind) == ('kidney', 'mass') and tally([report(2, 2)]).empty
    with pytest.raises(CaseError, match='without an error'): error_plate([report(2, 2)], None, 'vi')

def test_every_kind_of_row_has_pictures(): assert set(PANELS) == set(KINDS)

@pytest.fixture
def run(tmp_path, study_case):
    "A run of one row, as far as figures read it."
    study, case, cfg = study_case; where = Paths(tmp_path, 'smoke'); folder = where.prepared(cfg.data); folder.mkdir(parents=True); where.results('vipet').mkdir(parents=True)
    (folder/'rows.jsonl').write_text(json.dumps({'row': 0, 'split': 'test'} | case.record, ensure_ascii=False)); np.save(folder/'pet.npy', np.zeros((1, 2, 2, 2), np.float16)); np.savez(folder/'standard.npz')
    line = dict(task='report', arm='real', patient=case.record['patient'], region=case.record['region'], question='?', reference=case.reference, prediction='Gan không to.')
    def write(**other): (where.results('vipet')/'predictions.jsonl').write_text(json.dumps(line | other, ensure_ascii=False))
    write(); (where.results('vipet')/'results.json').write_text(json.dumps([{'provenance': {'run': 'vipet.instruct', 'revision': 'r', 'data_hash': 'd', 'params_hash': 'p'}}]))
    return where, write

def test_cases_are_read_with_their_patient(run, study_case):
    (where, write), (study, own, cfg) = run, study_case
    case, = read_cases('vipet', where)
    assert case.truth == own.truth and {m.kinds for m in case.marks} == {('missed',)} and source_of('vipet', where)['run'] == 'vipet.instruct'
    drawn = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, dicom=0))
    found = study_of(drawn, where, case)
    assert found.id == case.record['patient'] and len(panels_of(case, found, cfg)) == 1 + min(3, len(case.truth)) and case.record['patient'] not in case.name

def test_predictions_of_another_run_are_refused(run, study_case):
    where, write = run
    for other in ({'reference': 'Another report.'}, {'patient': 'phantom-000001'}):
        write(**other)
        with pytest.raises(CaseError, match='different runs') as e: read_cases('vipet', where)
        assert 'phantom-' not in str(e.value)
    write(arm='shuffled')
    with pytest.raises(CaseError, match='0 reports, 1 prepared'): read_cases('vipet', where)
    (where.results('vipet')/'predictions.jsonl').write_text('{"task": ')
    with pytest.raises(CaseError, match='line 1'): read_cases('vipet', where)
    with pytest.raises(CaseError, match='evaluate'): read_cases('no_reg', where)

def test_answers_to_other_questions_are_refused():
    records = [{'open': [{'question': 'a', 'answer': 'b', 'category': 'Plane'}], 'closed': []}]
    with pytest.raises(CaseError, match='0 answers'): questions_of({'ours': []}, records)
    assert is_right('b. liver', 'B. Liver', True) is False and is_right('B. Spleen', 'B. Liver', True) and is_right('liver', 'Liver.', False)

# ---- The papers' figures
def test_every_figure_of_the_papers_has_a_twin_that_is_drawn_or_a_reason(tmp_path):
    drawn = (ROOT/'nbs/pipeline/figures.ipynb').read_text(encoding='utf-8')
    assert all(f"f'{t.partition('-')[0]}-" in drawn for f in load_figures() for t in f['twins'])
    found = json.loads((ROOT/'petvlm/published/figures.json').read_text(encoding='utf-8')); found['figures'][0]['why'] = 'both'
    (tmp_path/'f.json').write_text(json.dumps(found))
    with pytest.raises(PressError, match='not both'): load_figures(tmp_path/'f.json')
