"A step that several real processes share is the step of one: loss, weights, codebooks; sharded, resumed with fewer, started by torchrun."
import functools, json, multiprocessing, os, shutil, socket, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from petvlm.config import Stage
from petvlm.ranks import RANKS, RanksError, Share, asked, command, launch, leave, share, world
from petvlm.train import TrainError, kept, run_stage
from petvlm.vlm import PetVLM, PetVLMConfig

ROOT = Path(__file__).parents[1]
EVERYTHING = {'lm': 1., 'align': .1, 'match': .3, 'sites_full': .3, 'clip_pet': .5}      # means over tokens, items and findings, and a comparison
PARTS = ('encode.*', 'fuse.*', 'project.*', 'lm.*', 'text.*', 'latent.*', 'heads.*')

def tiny(codes: int = 4) -> PetVLM:
    "Two encoders with codebooks, their fusion, a language model: 8 image tokens."
    torch.manual_seed(0)
    enc = dict(kind='ctvit', args=dict(patch_size=(8, 8, 8), dim=32, spatial_depth=1, temporal_depth=1, heads=2, dim_head=16, codebook_size=codes, peg_scrambled=False))
    sizes = dict(vocab_size=50, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    return PetVLM(PetVLMConfig(inputs=['pet', 'ct'], image_size=[16, 16, 16], encode={'pet': enc, 'ct': enc}, fuse={'kind': 'cross_attention', 'args': {'heads': 2}}, n_labels=5, contrasts=['pet'], heads=['full'],
        latent={'kind': 'slabs'}, latent_dim=16, lm=dict(model_type='mistral', num_hidden_layers=2, num_key_value_heads=1, head_dim=16, pad_token_id=2, tie_word_embeddings=True, **sizes),
        text=dict(model_type='bert', num_hidden_layers=1, hidden_dropout_prob=0., attention_probs_dropout_prob=0., **sizes), align=dict(threshold=.8, reading='region', max_regions=3)))

class Numbers(torch.utils.data.Dataset):
    "Item i follows from i: images, findings, and an answer of 2 to 9 words, so that tokens are uneven."
    def __init__(self, n: int): self.n = n
    def __len__(self) -> int: return self.n
    def __getitem__(self, i: int) -> dict:
        g = torch.Generator().manual_seed(1000 + i)
        words = torch.randint(4, 50, (int(torch.randint(2, 10, (1,), generator=g)),), generator=g)
        truth = (torch.rand(8, 7, generator=g) < .15).float()
        return {'i': i, 'words': words, 'truth': truth, **{k: torch.rand(1, 16, 16, 16, generator=g) for k in ('pet', 'ct', 'suv')}}

def collate(seen: list, items: list[dict]) -> dict:
    seen += [x['i'] for x in items]
    rows = [torch.cat([torch.tensor([0] + [3]*8 + [5]), x['words'], torch.tensor([1])]) for x in items]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, 2)
    mask = torch.stack([torch.arange(ids.shape[1]) < len(r) for r in rows]).long()
    labels = ids.masked_fill(mask == 0, -100); labels[:, :10] = -100
    text = torch.nn.utils.rnn.pad_sequence([x['words'] for x in items], True, 2)
    return {k: torch.stack([x[k] for x in items]) for k in ('pet', 'ct', 'suv', 'truth')} | {'truth_heads': torch.stack([x['truth'] for x in items]), 'input_ids': ids, 'attention_mask': mask, 'labels': labels,
            'text_pet_ids': text, 'text_pet_mask': torch.stack([torch.arange(text.shape[1]) < len(x['words']) for x in items]).long()}

class Stop(TrainerCallback):
    "The machine fails after a step."
    def __init__(self, step: int): self.step = step
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == self.step: os._exit(7)

def train(out: Path, batch: int = 4, accumulate: int = 1, steps: int = 3, objective=EVERYTHING, sharded: bool = False, fail: int = 0, lr: float = 1e-3, codes: int = 4, parts=PARTS) -> dict:
    "Train the tiny model on this rank; what it saw and the first rank's weights go to `out`."
    seen, stage = [], Stage('all', objective, parts, lr, steps, batch, accumulate=accumulate, warmup=0.)
    model, n = tiny(codes), steps*batch*accumulate
    report = run_stage(model, stage, Numbers(n), functools.partial(collate, seen), out/'work', 3, [Stop(fail)] if fail else [], save_steps=2, sharded=sharded)
    weights = kept(model, report['trainable'])
    report |= {'seen': seen}
    (out/f"rank{int(os.environ.get('RANK', 0))}.json").write_text(json.dumps(report))
    if not int(os.environ.get('RANK', 0)): save_file(weights, out/'weights.safetensors')
    return report

def _rank(number: int, n: int, port: int, out: Path, kw: dict) -> None:
    os.environ |= {'RANK': str(number), 'LOCAL_RANK': str(number), 'WORLD_SIZE': str(n), 'LOCAL_WORLD_SIZE': str(n), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'OMP_NUM_THREADS': '1'}
    torch.set_num_threads(1)
    report = train(out, **kw)
    assert report['ranks'] == world() == torch.distributed.get_world_size() == n
    leave()

def forked(n: int, out: Path, **kw) -> list[int]:
    "`train` in `n` processes, as torchrun would start them; forked, which spares the imports. Their exit codes."
    out.mkdir(exist_ok=True)
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    fork = multiprocessing.get_context('fork')
    ranks = [fork.Process(target=_rank, args=(k, n, port, out, kw)) for k in range(n)]
    for p in ranks: p.start()
    for p in ranks: p.join(120)
    for p in ranks:
        if p.is_alive(): p.terminate()
    return [p.exitcode for p in ranks]

def alone(out: Path, **kw) -> dict:
    out.mkdir(exist_ok=True)
    return train(out, **kw)

def reports(out: Path) -> list[dict]: return [json.loads(p.read_text()) for p in sorted(out.glob('rank*.json'))]
def losses(report: dict, name: str = 'loss') -> list[float]: return [r[name] for r in report['log'] if name in r and 'learning_rate' in r]

def alike(a: Path, b: Path, atol: float = 1e-4) -> float:
    "Share of weights that agree. Adam makes a whole step of the rounding where a gradient is nought."
    a, b = load_file(a/'weights.safetensors'), load_file(b/'weights.safetensors')
    assert set(a) == set(b) and {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    return float(torch.cat([((a[k] - b[k]).abs() < atol).float().flatten() for k in a]).mean())

@pytest.fixture(scope='module')
def one(tmp_path_factory) -> Path:
    "Three steps of four items in one process."
    out = tmp_path_factory.mktemp('ranks')/'one'
    alone(out)
    return out

def test_two_processes_make_the_steps_of_one(one, tmp_path):
    assert forked(2, tmp_path/'two') == [0, 0]
    both, (single,) = reports(tmp_path/'two'), reports(one)
    assert [r['ranks'] for r in both] == [2, 2] and single['ranks'] == 1
    seen = [r['seen'] for r in both]
    assert sorted(seen[0] + seen[1]) == sorted(single['seen']) == list(range(12)) and not set(seen[0]) & set(seen[1])       # nothing twice, nothing left out
    for name in ('loss', *EVERYTHING): assert losses(both[0], name) == pytest.approx(losses(single, name), rel=2e-4, abs=2e-5), name
    assert alike(tmp_path/'two', one) > .995
    books = [{k: v for k, v in load_file(p/'weights.safetensors').items() if 'codebook' in k} for p in (tmp_path/'two', one)]
    assert books[0] and all(torch.allclose(v, books[1][k], atol=1e-3) for k, v in books[0].items())

def test_whole_batches_go_to_ranks_first(tmp_path):
    alone(tmp_path/'one', batch=2, accumulate=2, steps=2, codes=0)               # codes follow each batch of one process, and each step of several
    assert forked(2, tmp_path/'two', batch=2, accumulate=2, steps=2, codes=0) == [0, 0]
    assert [r['seen'] for r in reports(tmp_path/'two')] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert losses(reports(tmp_path/'two')[0]) == pytest.approx(losses(reports(tmp_path/'one')[0]), rel=2e-4) and alike(tmp_path/'two', tmp_path/'one') > .99

@pytest.mark.slow
def test_the_check_sees_a_different_step(one, tmp_path):
    "Half the batch is another step; without the exchange two processes would agree with it no better than this."
    alone(tmp_path/'half', batch=2)
    assert alike(tmp_path/'half', one) < .9

@pytest.mark.slow
def test_two_processes_leave_off_and_one_goes_on(tmp_path):
    alone(tmp_path/'whole', steps=5)
    assert forked(2, tmp_path/'broken', steps=5, fail=3) == [7, 7] and (tmp_path/'broken/work/checkpoint-2').is_dir()
    alone(tmp_path/'broken', steps=5)
    resumed, whole = reports(tmp_path/'broken')[0], reports(tmp_path/'whole')[0]
    assert resumed['seen'] == list(range(8, 20)) or resumed['seen'] == list(range(20))              # accelerate may fetch and drop what was trained already
    assert losses(resumed) == pytest.approx(losses(whole), rel=5e-4) and alike(tmp_path/'broken', tmp_path/'whole') > .99

@pytest.mark.slow
def test_fsdp2_makes_the_steps_of_one(one, tmp_path):
    assert forked(2, tmp_path/'sharded', sharded=True) == [0, 0]
    both = reports(tmp_path/'sharded')
    assert [r['ranks'] for r in both] == [2, 2] and both[0]['n_trainable'] == reports(one)[0]['n_trainable']
    assert losses(both[0]) == pytest.approx(losses(reports(one)[0]), rel=2e-4) and alike(tmp_path/'sharded', one) > .995

@pytest.mark.slow
def test_fsdp2_resumes(tmp_path):
    kw = dict(steps=4, sharded=True, codes=0, objective={'lm': 1., 'align': .1}, parts=('project.*', 'lm.*'))      # every number that moves has a gradient: see nbs/howto/several_cards.md
    assert forked(2, tmp_path/'whole', **kw) == [0, 0]
    assert forked(2, tmp_path/'broken', **kw, fail=3) == [7, 7]
    assert forked(1, tmp_path/'broken', **kw) == [0]                              # two ranks leave off, one goes on
    assert alike(tmp_path/'broken', tmp_path/'whole') > .99

# --- who takes what

@pytest.mark.parametrize('batch,accumulate,ranks,each', [(8, 1, 1, (8, 1, 1)), (8, 1, 2, (4, 1, 2)), (8, 4, 2, (8, 2, 1)), (8, 4, 8, (4, 1, 2)), (64, 8, 8, (64, 1, 1)), (6, 4, 6, (2, 2, 3))])
def test_a_step_is_shared_whole_batches_first(batch, accumulate, ranks, each):
    own = share(batch, accumulate, ranks)
    assert own == Share(*each) and own.batch*own.accumulate*ranks == batch*accumulate

@pytest.mark.parametrize('batch,accumulate,ranks', [(3, 1, 2), (8, 3, 5), (1, 4, 8)])
def test_a_step_that_does_not_divide_is_refused(batch, accumulate, ranks):
    with pytest.raises(RanksError, match=f'{ranks} processes would cut each'): share(batch, accumulate, ranks)

def test_sharding_without_torchrun_is_refused(tmp_path):
    with pytest.raises(TrainError, match='torchrun'): run_stage(tiny(), Stage('x', {'lm': 1.}, ('lm.*',), 1e-3, 1, 2), Numbers(2), None, tmp_path, 0, sharded=True)

def test_zero_3_is_refused(tmp_path, monkeypatch):
    (tmp_path/'ds.json').write_text('{"zero_optimization": {"stage": 3}}'); monkeypatch.setenv('LOCAL_RANK', '0')
    with pytest.raises(TrainError, match='ZeRO stage 3'): run_stage(tiny(), Stage('x', {'lm': 1.}, ('lm.*',), 1e-3, 1, 2), Numbers(2), None, tmp_path, 0, deepspeed=str(tmp_path/'ds.json'))

def test_the_environment_asks_for_processes_once(monkeypatch):
    monkeypatch.setenv(RANKS, '4'); assert asked() == 4
    monkeypatch.setenv('LOCAL_RANK', '1'); assert asked() == 0              # one of them
    monkeypatch.delenv('LOCAL_RANK'); monkeypatch.setenv(RANKS, 'all')
    with pytest.raises(RanksError, match="found 'all'"): asked()

@pytest.mark.slow
def test_a_process_that_fails_is_reported_with_its_last_words(capsys):
    with pytest.raises(RanksError, match='no node'): launch('petvlm.train', ['vipet.no_such_node', '--scale', 'smoke'], 2)

@pytest.mark.slow
def test_torchrun_writes_the_node_of_one_process(tmp_path):
    "A node of the graph at smoke scale, by `train_node` in one process and by torchrun in two, DDP and FSDP2: same delta, one report, and what one wrote loads as the past of the next."
    from petvlm.config import Paths, resolve
    from petvlm.prepare import prepare
    from petvlm.sources import drawn_study
    from petvlm.train import make_tokenizer
    cfg = resolve('vipet', 'smoke')
    for name in ('one', 'two', 'shard'): (tmp_path/name).mkdir(); shutil.copy(ROOT/'params.yaml', tmp_path/name)
    where = Paths(tmp_path/'one', 'smoke')
    jobs = [('train', functools.partial(drawn_study, s)) for s in (1, 2)] + [('validation', functools.partial(drawn_study, 3))]
    make_tokenizer(prepare(jobs, where.prepared(cfg.data), cfg.data, workers=1))
    for name in ('two', 'shard'): shutil.copytree(where.runs, tmp_path/name/'runs/smoke')
    run = lambda cmd, root: subprocess.run(cmd, env=os.environ | {'PETVLM_ROOT': str(root), 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, cwd=root, capture_output=True, text=True, timeout=300)
    for node in ('vipet.lm_list', 'vipet.lm_report'):
        for cmd, root in (([sys.executable, '-m', 'petvlm.train', node, '--scale', 'smoke'], tmp_path/'one'), (command('petvlm.train', [node, '--scale', 'smoke'], 2), tmp_path/'two'), (command('petvlm.train', [node, '--scale', 'smoke', '--shard'], 2), tmp_path/'shard')):
            done = run(cmd, root); assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        a, *others = (load_file(tmp_path/k/'runs/smoke/train'/node/'delta.safetensors') for k in ('one', 'two', 'shard'))
        told = [json.loads((tmp_path/k/'runs/smoke/train'/node/'stage.json').read_text()) for k in ('one', 'two', 'shard')]
        assert [t['ranks'] for t in told] == [1, 2, 2] and len({t['key'] for t in told}) == 1 and all('held_out' in t for t in told)
        for b in others: assert set(a) == set(b) and torch.cat([((a[k] - b[k]).abs() < 1e-4).float().flatten() for k in a]).mean() > .99
        assert not list((tmp_path/'shard/runs/smoke/work').glob('*'))

def test_a_single_number_that_moves_cannot_be_sharded():
    from petvlm.train import loose
    model = tiny(); model.sigmoid = torch.nn.ModuleDict({'pet': torch.nn.ParameterDict({'bias': torch.tensor(1.)})})
    with pytest.raises(TrainError, match='sigmoid.pet.bias'): loose(model)
    model.sigmoid.requires_grad_(False)
    assert loose(model) == r'sigmoid\.pet' and loose(tiny()) == ''
