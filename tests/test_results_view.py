"Tables and ablations to point at: every number is the table's, every cell leads to its run, and no colour is needed to read a status."
import base64, hashlib, json, re
from pathlib import Path
import numpy as np
import pytest
from petvlm.believe import holm
from petvlm.facts import judge, paired_bootstrap, statistic_of, sums_of
from petvlm.figures import FigureError, Picture
from petvlm.findings import Finding
from petvlm.lesionfacts import LESION_METRICS
from petvlm.onefile import Exhibit, data_block, exhibition, one_file, plotly_script
from petvlm.paper import write_table
from petvlm.resultsview import STATUS, cell, differences, forest_figure, forest_picture, gallery, hover, kind_of, labels_of, orders, pieces, read_table, table_figure, table_picture
from petvlm.tables import LEVEL, TABLES, TableError, compare, load_published, make_table, rows_of

PRINTED = Path(__file__).parents[1]/'tables'/'phantom'
EVIL = '</script><img src=x onerror=alert(1)>'


def result(point, right, arm='real', n=30, **more):
    "Made-up sums: BLEU-like counts that come out as `right` percent, findings right in `right` of 100, a little different by patient."
    rng = np.random.default_rng(7)
    truth = [[Finding('lung', 'left', 'nodule', 10., 5., 'increased')] for _ in range(n)]; text = 'Nốt mờ ở phổi trái, kích thước 10 mm, tăng chuyển hóa FDG.'
    hit = rng.random(n) < right
    scores = judge([text if h else 'Không thấy tổn thương tăng chuyển hóa FDG.' for h in hit], [text]*n, [f'p{i//2}' for i in range(n)], [f if h else [] for f, h in zip(truth, hit)], truth, metrics=('bleu4', 'rouge1'), n=100)
    return {'point': point, 'task': 'report', 'arm': arm, **scores, 'provenance': {'run': f'{point}.instruct', 'data_hash': '12345e7', 'params_hash': '1e5', 'revision': 'r1'}, 'file': f'runs/{point}/results.json'} | more

@pytest.fixture(scope='module')
def results(): return [result('vipet', .9), result('no_reg', .85), result('no_fusion', .5), result('no_fusion_no_reg', .45), result('vipet', .1, 'shuffled')]

@pytest.fixture(scope='module')
def written(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tables'); write_table(make_table('vipet_table1', results, n=100), folder)
    return folder

@pytest.fixture(scope='module')
def table(written): return read_table(written/'vipet_table1.csv')

@pytest.fixture(scope='module')
def found(results): return differences('vipet_table1', results, n=100)


# ---------- the table ----------
@pytest.mark.parametrize('text, kind', [('reproduced-direction', 'reproduced-direction'), ('within noise', 'within noise'), ('not run: needs a; or b (c)', 'not run'), ('control: within noise of the full model (Finding F1)', 'control'),
                                        ('not compared: no metric in common', 'not compared'), ('within noise (BLEU-4); not reproduced (ROUGE-1)', 'mixed'), ('reproduced-direction (3 of 24 metrics); within noise (21 of 24 metrics)', 'mixed')])
def test_kinds_of_status(text, kind): assert kind_of(text) == kind

def test_an_unknown_status_is_refused():
    with pytest.raises(TableError, match='splendid'): kind_of('splendid')

def test_no_two_statuses_look_alike_without_colour():
    measured = ['reproduced-direction', 'within noise', 'not reproduced', 'differs']
    assert len({m.sign for m in STATUS.values()}) == len({m.word for m in STATUS.values()}) == len(STATUS) and len({STATUS[k].symbol for k in measured}) == len({STATUS[k].marker for k in measured}) == 4

def test_a_table_comes_back_from_its_file_with_hashes_as_text(results, table):
    made = make_table('vipet_table1', results, n=100)
    assert table.loc['vipet', 'data_hash'] == '12345e7' and table.loc['vipet', 'params_hash'] == '1e5' and np.allclose(table['BLEU-4 measured'].astype(float), made['BLEU-4 measured'].astype(float), atol=1e-4, equal_nan=True)
    assert labels_of(table) == labels_of(made) and 'BERTScore' in labels_of(table) and labels_of(table)[0] == 'BLEU-4'

@pytest.mark.parametrize('text, said', [(None, 'cannot be read'), ('row,model\na,b\n', 'no column'), ('', 'cannot be read')])
def test_what_is_no_table_is_refused(tmp_path, text, said):
    if text is not None: (tmp_path/'vipet_table1.csv').write_text(text)
    with pytest.raises(TableError, match=said): read_table(tmp_path/'vipet_table1.csv')

def test_cells_say_measured_interval_and_printed(table):
    row = table.loc['vipet'].copy(); row[['BLEU-4 measured', 'BLEU-4 low', 'BLEU-4 high']] = 34.4143, 32.443, 36.3061; row[['Finding F1 measured', 'Finding F1 low', 'Finding F1 high']] = .7094, .66, .75
    assert cell(row, 'BLEU-4') == ('34.4 [32.4, 36.3]', '55.70') and cell(row, 'Finding F1') == ('0.71 [0.66, 0.75]', '') and cell(table.loc['gpt4o'], 'BLEU-4') == ('–', '31.12')

def test_every_measured_cell_leads_to_its_run(table):
    fig = table_figure(table); heads, rows = list(fig.data[0].x), list(fig.data[0].y)
    for row in rows:
        for k, head in enumerate(heads):
            told = fig.data[1].hovertext[rows.index(row)*len(heads) + k]; assert (fig.data[1].y[rows.index(row)*len(heads) + k], fig.data[1].x[rows.index(row)*len(heads) + k]) == (row, head)
            if isinstance(table.loc[row, 'run'], str): assert f"run: {table.loc[row, 'run']}" in told and 'data hash: 12345e7' in told and 'file: runs/' in told and '15 patients' in told
            if head != 'status': assert f'{head}: ' in told
    of = lambda row, k: rows.index(row)*len(heads) + k
    assert 'not run: needs' in fig.data[1].hovertext[of('gpt4o', 0)] and fig.data[1].text[of('gpt4o', len(heads) - 1)] == '· not run'
    assert 'p of the difference, after Holm' in fig.data[1].hovertext[of('no_fusion', 0)]

def test_texts_from_outside_stay_texts(table):
    evil = table.copy(); evil.attrs = table.attrs; evil.loc['vipet', ['model', 'run', 'file']] = EVIL
    said = json.dumps(json.loads(table_figure(evil).to_json()), ensure_ascii=False)
    assert '<img' not in said and '&lt;img src=x' in said and '<img' not in hover(evil.loc['vipet'], 'BLEU-4')
    page = exhibition(EVIL, {EVIL: [Exhibit(table_figure(evil), lambda: None, EVIL)]}, [EVIL])
    body = page[:page.index('<script>')]; assert '<img' not in body and page.count('</script') == 3

def test_rows_are_sorted_by_what_was_measured(table):
    some = table.loc[['gpt4o', 'no_fusion', 'vipet', 'no_reg']].copy(); some['BLEU-4 measured'] = [None, 5., 9., 7.]
    by = orders(some, ['BLEU-4'])
    assert by['in the order of the paper'] == list(some.index) and by['by BLEU-4'] == ['vipet', 'no_reg', 'no_fusion', 'gpt4o'] and by['by status'][-1] == 'gpt4o'
    menu = table_figure(some, ['BLEU-4']).layout.updatemenus[0].buttons
    assert [b.label for b in menu] == list(by) and list(menu[1].args[0]['yaxis.categoryarray']) == by['by BLEU-4'] and all(b.method == 'relayout' for b in menu)

def test_wide_tables_come_in_pieces():
    assert pieces(['BLEU-4', 'Finding F1']) == {'': ['BLEU-4', 'Finding F1']}
    wide = [f'IR R@{k} n={n}' for k in (1, 5, 10) for n in (50, 100, 180)] + ['BLEU-4', 'Finding F1', 'False findings per patient']
    assert {k: len(v) for k, v in pieces(wide).items()} == {'IR R@1': 3, 'IR R@5': 3, 'IR R@10': 3, 'Text': 1, 'Findings': 2}


# ---------- the forest ----------
def test_differences_are_the_paired_bootstraps_with_holms_p(results, found):
    by_point = {r['point']: r for r in results if r['arm'] == 'real'}; raw = {}
    for row in ('no_reg', 'no_fusion', 'no_fusion_no_reg'):
        for metric, label in (('bleu4', 'BLEU-4'), ('finding_f1', 'Finding F1')):
            sums = [sums_of(metric, by_point[p]['per_patient']) for p in ('vipet', row)]
            d = paired_bootstrap(*sums, statistic_of(metric, LESION_METRICS), 100, 0); raw[row, label] = d['p']
            line = found[(found['row'] == row) & (found['label'] == label)].iloc[0]
            assert (line.d, line.lo, line.hi) == pytest.approx((d['difference'], d['lo'], d['hi'])) and line.d == pytest.approx(by_point['vipet']['metrics'][metric]['value'] - by_point[row]['metrics'][metric]['value'])
    for label in ('BLEU-4', 'Finding F1'):
        adjusted = holm({row: p for (row, l), p in raw.items() if l == label}); of = found[found['label'] == label].set_index('row')['p']
        assert all(of[row] == pytest.approx(p) for row, p in adjusted.items())

def test_each_pair_stands_once_and_controls_stay_out(found):
    assert set(found['row']) == {'no_reg', 'no_fusion', 'no_fusion_no_reg'} and not found.duplicated(['row', 'label']).any() and set(found['run_against']) == {'vipet.instruct'}
    assert found[found['label'] == 'Finding F1']['printed'].isna().all() and found[found['label'] == 'BLEU-4']['printed'].tolist() == pytest.approx([55.70 - 53.30, 55.70 - 54.02, 55.70 - 53.72])

def test_statuses_of_the_forest_are_those_of_the_table(results, found):
    published = load_published('vipet_table1'); compared = compare(published, rows_of(results, 'report', 'vipet', published.index), 100)
    for r in found[found['printed'].notna()].itertuples():
        c = next(c for m, c in compared[r.row].items() if c.published == pytest.approx(r.printed) and c.found.d == pytest.approx(r.d))
        assert r.p == c.p and r.kind == ('within noise' if c.p >= LEVEL else 'reproduced-direction' if c.found.d*c.published > 0 else 'not reproduced')
    assert set(found[found['printed'].isna()]['kind']) <= {'within noise', 'differs'}

def test_dots_bars_and_words_of_the_forest(found):
    fig = forest_figure(found); seen = {}
    for t in fig.data:
        if t.hovertext is None: continue
        for y, x, up, down, told, p in zip(t.y, t.x, t.error_x.array, t.error_x.arrayminus, t.hovertext, t.text): seen[y, round(x, 9)] = (x + up, x - down, told, t.marker.symbol)
    for r in found.itertuples():
        hi, lo, told, symbol = seen[r.row, round(r.d, 9)]
        assert (hi, lo) == pytest.approx((r.hi, r.lo)) and 'vipet.instruct and' in told and symbol in {STATUS[k].symbol for k in found['kind']}
    legend = [t.name for t in fig.data if t.showlegend]; assert len(legend) == len(set(legend)) and '◇ printed in the paper' in legend
    twin = forest_picture(found); assert len(twin.axes) == found['label'].nunique() and all(STATUS[k].sign in twin._supxlabel.get_text() for k in set(found['kind']))

def test_nothing_measured_is_nothing_drawn():
    none = differences('vipet_table1', []); assert none.empty and list(none.columns)[:3] == ['row', 'model', 'against']
    for draw in (forest_figure, forest_picture):
        with pytest.raises(TableError, match='nothing to draw'): draw(none)


# ---------- pages ----------
def test_the_gallery_of_what_git_holds(results):
    "Tables as an earlier revision printed them (no p in them yet): each has its piece for every number, wide ones without rows that have none."
    shown = gallery(PRINTED)
    assert len(shown) == len([p for p in PRINTED.glob('*.csv') if p.stem in TABLES]) and all(shown.values())
    for path in sorted(PRINTED.glob('*.csv')):
        if path.stem not in TABLES: continue
        table = read_table(path); drawn = [h for e in shown[table.attrs['title']] for h in e.figure.data[0].x if h != 'status']
        assert sorted(drawn) == sorted(labels_of(table))

def test_the_gallery_adds_forests_and_refuses_an_empty_folder(written, results, tmp_path):
    (shown,) = gallery(written, results, n=100).values(); assert [e.title.rpartition(', ')[2] for e in shown][-1] == 'ablations' and len(shown) == 2
    with pytest.raises(TableError, match='make tables'): gallery(tmp_path)

def test_the_page_names_no_address_and_allows_only_its_own_scripts(table, found):
    page = exhibition('t', {'a': [Exhibit(table_figure(table), lambda: table_picture(table), 'x'), Exhibit(forest_figure(found), lambda: forest_picture(found), 'y')]})
    assert not re.search(r'https?://(?!www\.w3\.org/)', page) and not re.search(r'<(link|iframe|img)|\bsrc="', page[:page.index('<script>')]) and not re.search(r'<script[^>]+src', page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]; codes = re.findall(r'<script>(.*?)</script>', page, re.S)
    assert len(codes) == 2 and all(base64.b64encode(hashlib.sha256(c.encode()).digest()).decode() in policy for c in codes) and policy.startswith("default-src 'none'") and 'unsafe-eval' not in policy and "script-src 'sha256-" in policy
    specs = [json.loads(s) for s in re.findall(r'<script type="application/json" id="petvlm-figure-\d">(.*?)</script>', page, re.S)]
    assert specs[0]['data'][0]['type'] == 'heatmap' and len(specs) == 2
    for host in ('cdn.plot.ly', 'jsdelivr', 'cloudflare', 'openstreetmap.org/', 'mapbox.com/'): assert host not in re.sub(r'/\*.*?\*/', '', page, flags=re.S), host

def test_a_script_that_would_end_early_is_refused():
    with pytest.raises(FigureError, match='break the word'): one_file('t', [], scripts=['"</SCRIPT>"'])
    assert json.loads(data_block({'a': '<&>\u2028'})) == {'a': '<&>\u2028'} and not set('<>&\u2028') & set(data_block('<&>\u2028'))

def test_an_exhibit_keeps_a_picture_and_saves_whole_files_only(table, found, tmp_path):
    e = Exhibit(forest_figure(found), lambda: forest_picture(found), 'forest'); bundle = e._repr_mimebundle_()
    assert 'image/png' not in bundle and '<svg' in bundle['image/svg+xml'] and e._repr_mimebundle_() == bundle and bundle['application/vnd.plotly.v1+json']['data'] and bundle['text/plain'] == 'Exhibit: forest'
    assert e.save(tmp_path/'a.svg').read_bytes() == e.save(tmp_path/'deep'/'b.svg').read_bytes() == bundle['image/svg+xml'].encode()
    assert e.save(tmp_path/'a.pdf').read_bytes() == e.save(tmp_path/'deep'/'b.pdf').read_bytes() and e.save(tmp_path/'a.png').stat().st_size > 5000
    def breaks(): raise ValueError('no')
    with pytest.raises(ValueError): Exhibit(None, breaks, '').save(tmp_path/'c.png')
    with pytest.raises(FigureError, match='docx'): e.save(tmp_path/'c.docx')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.pdf', 'a.png', 'a.svg', 'deep']

def test_the_twin_of_a_table_says_the_same(table):
    twin = table_picture(table); said = {c.get_text().get_text() for c in twin.axes[0].tables[0].get_celld().values()}
    assert isinstance(twin, Picture) and '· not run' in said and any(t.startswith(cell(table.loc['vipet'], 'BLEU-4')[0]) for t in said) and 'GPT-4o (few-shot)' in said
