"Training while it trains: what a run writes, what is read of it, and that looking at it costs next to nothing and shows nothing foreign."
import json, math, os, re, time
import pytest
from petvlm.figures import FigureError
from petvlm.journal import NAME, Journal, JournalError, read_journal
from petvlm.live import Live, Overview, Screen, duration, of_report, progress, series, svg, trainings, watch

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'

class Clock:
    def __init__(self, now=1000.): self.now = now
    def __call__(self): return self.now

def run(path, clock, after=0, last=20, pace=.5, steps=100, told=None, **more):
    "Steps `after` + 1 to `last`, `pace` seconds each; the loss at step s is s, its other part 1."
    j = Journal(path, told=told, clock=clock); j.begin('lm', steps, 8, {'lm': 1., 'align': .1} | more, after)
    for s in range(after + 1, last + 1): clock.now += pace; j.step(s, {'lm': float(s), 'align': 1.}, 1e-3)
    return j

def report(node='vipet.lm', **more):
    return {'node': node, 'stage': node.split('.')[1], 'seconds': 50., 'held_out': {'lm': {'f1': .84, 'n': 30}}, 'log': [{'step': s, 'loss': 4/s, 'lm': 4/s, 'epoch': .1, 'learning_rate': 1e-3, 'grad_norm': 1.} for s in (1, 2, 4)] + [{'step': 4, 'train_runtime': 50., 'lm': 1.}]} | more

def finish(runs, node, **more):
    folder = runs/'train'/node; folder.mkdir(parents=True); (folder/'stage.json').write_text(json.dumps(report(node, **more)))
    return folder/'stage.json'


# ---------- the journal ----------
def test_a_line_a_second_holds_the_mean_since_the_line_before(tmp_path):
    clock = Clock(); run(tmp_path/NAME, clock, last=5).end(5); t = read_journal(tmp_path/NAME, 'a.lm')
    assert [(p.step, p.time, p.parts['lm']) for p in t.points] == [(1, 1000.5, 1.), (3, 1001.5, 2.5), (5, 1002.5, 4.5)]      # half a second a step: steps 2 and 3, 4 and 5 share a line
    assert [p.loss for p in t.points] == pytest.approx([1.1, 2.6, 4.6]) and t.state == 'trained' and t.eta == 0 and t.points[0].lr == 1e-3

def test_steps_that_no_line_was_due_for_are_told_at_the_end(tmp_path):
    clock = Clock(); run(tmp_path/NAME, clock, last=4).end(4)
    assert [(p.step, p.parts['lm']) for p in read_journal(tmp_path/NAME).points] == [(1, 1.), (3, 2.5), (4, 4.)]

def test_a_long_run_writes_fewer_lines(tmp_path):
    "Six hours of a step a second: about 1000 (1 + ln 21.6) lines, far from 21,600."
    clock = Clock(); run(tmp_path/NAME, clock, last=21600, pace=1., steps=21600)
    lines = (tmp_path/NAME).read_text().count('\n'); assert 3000 < lines < 4800

def test_rate_and_time_left(tmp_path):
    clock = Clock(); run(tmp_path/NAME, clock, last=41); t = read_journal(tmp_path/NAME)
    assert t.step == 41 and t.rate == pytest.approx(2.) and t.eta == pytest.approx(59/2) and t.silent(clock.now + 7) == pytest.approx(7)
    early = t._replace(points=t.points[:1]); assert early.rate == pytest.approx(1/.5)                                         # one line: from the beginning on
    assert math.isnan(t._replace(points=()).rate) and math.isnan(t._replace(points=()).eta) and t._replace(points=()).step == 0

def test_a_slower_second_half_is_told_by_its_own_pace(tmp_path):
    clock = Clock(); j = run(tmp_path/NAME, clock, last=50, pace=.1)
    for s in range(51, 81): clock.now += 2.; j.step(s, {'lm': 1.}, 1e-3)
    assert read_journal(tmp_path/NAME).rate == pytest.approx(.5)

def test_an_interrupted_run_goes_on_where_its_checkpoint_was(tmp_path):
    clock = Clock(); run(tmp_path/NAME, clock, last=41)
    with open(tmp_path/NAME, 'a') as f: f.write('{"step": 42, "par')
    assert read_journal(tmp_path/NAME).step == 41                                                                             # half a line is not read
    clock.now += 3600; run(tmp_path/NAME, clock, after=20, last=31); t = read_journal(tmp_path/NAME)
    steps = [p.step for p in t.points]; assert steps == sorted(set(steps)) and 19 in steps and 41 not in steps and t.step == 31 and t.after == 20
    assert t.rate == pytest.approx(2.)                                                                                        # the hour in between is no training

@pytest.mark.parametrize('text, said', [('', 'no line yet'), ('{"step": 1, "time": 1, "lr": 1, "parts": {}}\n', 'line 1'), ('[1]\n', 'expected a head'), ('nonsense\n', 'line 1'), ('{"stage": "lm", "steps": "many"}\n', 'line 1')])
def test_what_is_no_journal_is_refused(tmp_path, text, said):
    (tmp_path/NAME).write_text(text)
    with pytest.raises(JournalError, match=said): read_journal(tmp_path/NAME)

def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    run(tmp_path/NAME, Clock(), last=9); lines = (tmp_path/NAME).read_text().split('\n'); lines[2] = lines[2][:10]
    (tmp_path/NAME).write_text('\n'.join(lines))
    with pytest.raises(JournalError, match='line 3'): read_journal(tmp_path/NAME)
    with pytest.raises(JournalError, match='cannot be read'): read_journal(tmp_path/'none')

def test_a_step_costs_microseconds(tmp_path):
    j = Journal(tmp_path/NAME); j.begin('lm', 10**6, 8, {'lm': 1.}); start = time.perf_counter()
    for s in range(1, 5001): j.step(s, {'lm': 1., 'align': 1.}, 1e-3)
    assert (time.perf_counter() - start)/5000 < 2e-4                                                                          # a hundredth of a step of 20 ms; the fastest stage takes longer


# ---------- what is there ----------
def test_finished_running_and_what_left_a_checkpoint_only(tmp_path):
    first, second = finish(tmp_path, 'b.lm'), finish(tmp_path, 'a.lm'); os.utime(first, (1, 1)); os.utime(second, (2, 2))
    (tmp_path/'train/c.lm.partial').mkdir(); (tmp_path/'train/c.lm.partial/stage.json').write_text('{')                       # being written
    run(tmp_path/'work/x.fusion-00ff'/NAME, Clock()); (tmp_path/'work/y.lm-00ff').mkdir()                                     # y has said nothing yet
    (tmp_path/'work/w.lm-00ff').mkdir(); (tmp_path/'work/w.lm-00ff'/NAME).write_text('{"sta')                                 # nor has w
    for step in (100, 200):
        (tmp_path/f'work/v.clip_ct-00ff/checkpoint-{step}').mkdir(parents=True); (tmp_path/f'work/v.clip_ct-00ff/checkpoint-{step}/trainer_state.json').write_text(json.dumps({'max_steps': 400, 'log_history': [{'step': step, 'loss': .5, 'clip_ct': .5}]}))
    os.utime(tmp_path/'work/v.clip_ct-00ff/checkpoint-100/trainer_state.json', (1, 1))
    found = trainings(tmp_path); assert [(t.node, t.state) for t in found] == [('b.lm', 'finished'), ('a.lm', 'finished'), ('v.clip_ct', 'running'), ('x.fusion', 'running')]
    assert found[2].stage == 'clip_ct' and (found[2].step, found[2].steps) == (200, 400) and found[0].steps == 4 and found[0].rate == pytest.approx(4/50) and [p.step for p in found[0].points] == [1, 2, 4]

def test_a_node_that_is_trained_again_is_running_and_old_work_is_not(tmp_path):
    made = finish(tmp_path, 'a.lm'); run(tmp_path/'work/a.lm-00ff'/NAME, Clock(time.time() + 100))
    assert [t.state for t in trainings(tmp_path)] == ['running']
    os.utime(made, (time.time() + 9999,)*2); assert [t.state for t in trainings(tmp_path)] == ['finished']

def test_a_record_that_is_none_is_named(tmp_path):
    finish(tmp_path, 'a.lm').write_text('{"stage": "lm", "log": [{"loss": 1}], "seconds": 3}')
    with pytest.raises(JournalError, match='train this node again'): trainings(tmp_path)


# ---------- in words and pictures ----------
def test_durations_and_words(tmp_path):
    assert [duration(s) for s in (0, 59.6, 125, 7620, math.nan)] == ['0 s', '1 min 00 s', '2 min 05 s', '2 h 07 min', '?']
    clock = Clock(); run(tmp_path/NAME, clock, last=41); t = read_journal(tmp_path/NAME, 'a.lm'); said = progress(t, clock.now)
    assert said == 'step 41/100 (41 %), 2 steps/s, 16 items/s, loss 40.6, lm 40.5, align 1, learning rate 0.001, done in 30 s'
    assert progress(t, clock.now + 180).endswith('silent for 3 min 00 s: stopped?') and 'no step yet' in progress(t._replace(points=()), clock.now)
    assert 'NOT FINITE' in progress(t._replace(points=(t.points[-1]._replace(loss=math.nan),)), clock.now)
    over = Overview([of_report(report()), t], 5, clock.now); assert over.text().split('\n')[0] == '1 of 5 stages finished, 1 running' and over.text().endswith('last probe: vipet.lm, lm: f1 0.84, n 30')

def test_a_curve_is_drawn_where_its_numbers_are(tmp_path):
    "Straight axis (less than a factor of 3): the highest value at the top, the lowest at the bottom, step 50 of 100 in the middle."
    t = of_report(report(log=[{'step': s, 'loss': v} for s, v in ((0, 2.), (50, 3.), (100, 2.5))]))
    points = [tuple(map(float, p.split(','))) for p in re.search(r'points="([^"]*)"', svg(t, 'loss', 250, 110))[1].split()]
    assert points == [(46., 94.), (144., 20.), (242., 57.)] and 'log' not in svg(t, 'loss')
    wide = of_report(report(log=[{'step': s, 'loss': v} for s, v in ((0, 100.), (50, 10.), (100, 1.))])); assert '144.0,57.0' in svg(wide, 'loss') and '>log<' in svg(wide, 'loss')
    gap = of_report(report(log=[{'step': s, 'loss': v} for s, v in ((1, 1.), (2, math.nan), (3, 2.))])); assert series(gap, 'loss') == [(1, 1), (3, 2)]
    many = of_report(report(log=[{'step': s, 'loss': float(s)} for s in range(1, 1001)])); thin = series(many, 'loss', 100); assert len(thin) == 100 and thin[0] == (5.5, 5.5) and thin[-1] == (995.5, 995.5)

def test_nothing_foreign_in_the_page_and_no_address(tmp_path):
    held = {EVIL: {EVIL: .5}}; t = of_report(report(node=f'{EVIL}.lm', stage=EVIL, held_out=held, log=[{'step': s, 'loss': 1., EVIL: 1., 'b': 2.} for s in (1, 2)]))
    over = Overview([t, t._replace(state='running')], 3); page = over.save(tmp_path/'deep'/'p.html').read_text(encoding='utf-8')
    assert '<script' not in page and '<img' not in page and '://' not in page and 'src=' not in page.replace('src=x', '') and "default-src 'none'" in page and page.count('<svg') == 3
    assert set(over.bundle()) == {'text/html', 'text/plain', 'image/png'} and 'image/png' not in over.bundle(still=False)

def test_pictures_for_paper_are_the_same_bytes_twice_and_other_endings_are_refused(tmp_path):
    over = Overview([of_report(report())])
    for end in ('png', 'pdf', 'svg'): assert over.save(tmp_path/f'a.{end}').read_bytes() == over.save(tmp_path/f'b.{end}').read_bytes()
    with pytest.raises(FigureError, match='jpg'): over.save(tmp_path/'a.jpg')
    with pytest.raises(FigureError, match='no stage'): Overview([]).save(tmp_path/'c.png')
    assert not (tmp_path/'a.jpg').exists() and not (tmp_path/'c.png').exists()


# ---------- while it runs ----------
def test_looking_takes_a_hundredth_of_the_time_at_most():
    "Drawing takes 0.3 s of a clock that nothing else but steps of 0.05 s moves."
    clock = Clock(0.); screen, shown = Screen(least=0., clock=clock), []
    def make(): clock.now += .3; shown.append(clock.now); return Overview([])
    for _ in range(4000): clock.now += .05; screen.show(make)
    assert .3*(len(shown) - 1) <= .01*clock.now and len(shown) >= 6
    assert screen.show(make, last=True) and not screen.show(make)                                                             # the last one is shown in any case

def test_a_view_that_fails_is_told_once_and_the_run_goes_on(tmp_path, caplog):
    view = Live(least=0.); run(tmp_path/'a.lm-1'/NAME, Clock(), last=3, told=lambda path: view(tmp_path/'gone'/NAME)).end(3)
    assert view.off and len([r for r in caplog.records if 'training goes on' in r.message]) == 1 and read_journal(tmp_path/'a.lm-1'/NAME).state == 'trained'

def test_watching_a_run_of_another_process(tmp_path, capsys):
    clock = Clock(time.time() - 60); j = run(tmp_path/'work/a.lm-00ff'/NAME, clock, last=41); slept = []
    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 1: j.end(41)
        if len(slept) == 2: finish(tmp_path, 'a.lm'); (tmp_path/'work/a.lm-00ff'/NAME).unlink()
    watch(tmp_path, total=1, sleep=sleep); out = capsys.readouterr().out
    assert len(slept) == 3 and out.startswith('0 of 1 stages finished, 1 running\na.lm (lm): step 41/100 (41 %)') and out.strip().endswith('last probe: a.lm, lm: f1 0.84, n 30')

def test_watching_ends_when_nothing_runs_or_a_hand_stops_it(tmp_path, capsys, caplog):
    naps = []; watch(tmp_path, every=2., patience=10., sleep=naps.append); assert len(naps) == 6
    (tmp_path/'train/a.lm').mkdir(parents=True); (tmp_path/'train/a.lm/stage.json').write_text('{')
    def stop(_):
        naps.append(0)
        if len(naps) > 9: raise KeyboardInterrupt
    watch(tmp_path, patience=100., sleep=stop); assert len(naps) == 10 and len([r for r in caplog.records if 'not JSON' in r.message]) == 1
