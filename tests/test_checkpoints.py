"Whole checkpoints in the folders that the published code writes: every key is accounted for, and the parts together compute what they compute apart."
import dataclasses, json, re, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel
from petvlm.config import Part as Slot
from petvlm.config import resolve
from petvlm.checkpoints import CheckpointError, load_published, read_state
from petvlm.folders import FOLDERS, load_folder, recognise
from petvlm.insertion import insert
from petvlm.petar import global_and_focal
from petvlm.published_losses import ctclip_loss, pair_scores
from petvlm.language import train_tokenizer
from petvlm.tokens import Tokens
from petvlm.train import build, fill
from parity import difference, expected, fixture, tensor, weights

def under(prefix: str, state: dict) -> dict: return {prefix + k: v for k, v in state.items()}

def filled(shapes: dict) -> dict: return weights({'state': {k: (v, 'float32') for k, v in shapes.items()}, 'fill_exceptions': {}})

def write(folder: Path, state: dict, config: dict | None = None, shards: int = 2) -> Path:
    "A folder as `save_pretrained` leaves it."
    names = sorted(state); cuts = [names[i::shards] for i in range(shards)]
    files = {f'model-{i + 1:05d}-of-{shards:05d}.safetensors': part for i, part in enumerate(cuts)} if shards > 1 else {'model.safetensors': names}
    for file, part in files.items(): save_file({k: state[k].clone() for k in part}, folder/file)
    if shards > 1: (folder/'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': {k: f for f, part in files.items() for k in part}}))
    if config: (folder/'config.json').write_text(json.dumps(config))
    return folder

def same(a, b) -> bool: return a.state_dict().keys() == b.state_dict().keys() and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())

# ---- Med3DVLM
def mixer(out=64, low=(4, 128), high=(1, 256), low_tokens=(5, 10), high_tokens=(3, 6)) -> dict:
    "A mixer's published keys, two layers a stream."
    shapes = {}
    for stream, (n, d), counts in (('low', low, low_tokens), ('high', high, high_tokens)):
        for i, (m, e) in enumerate(zip(counts, (out//2, out))):
            shapes |= {f'{stream}_mixer.{i}.{norm}.{part}': (d,) for norm in ('ln1', 'ln2') for part in ('weight', 'bias')}
            for mlp, a, b in (('mlp1', n, m), ('mlp2', d, e)): shapes |= {f'{stream}_mixer.{i}.{mlp}.mm_projector.0.weight': (b, a), f'{stream}_mixer.{i}.{mlp}.mm_projector.0.bias': (b,), f'{stream}_mixer.{i}.{mlp}.mm_projector.1.1.weight': (b, b), f'{stream}_mixer.{i}.{mlp}.mm_projector.1.1.bias': (b,)}
            n, d = m, e
    return filled(shapes)

MED3DVLM = fixture('tokens_qwen')['config'] | {'model_type': 'vlm_qwen', 'architectures': ['VLMQwenForCausalLM'], 'auto_map': {'AutoModelForCausalLM': 'evil.Code'}, 'vocab_size': 152, 'vision_tower': 'dcformer', 'input_size': [64, 64, 32],
    'vision_select_layer': -2, 'vision_select_feature': 'cls_patch', 'mm_projector_type': 'mixer', 'mm_hidden_size': 768, 'proj_out_num': 16, 'low_input_size': [4, 128], 'dim': 768, 'depth': 12}
def dcformer() -> dict:
    "With the counters that a saved module holds and the fill rule leaves out."
    return weights(fixture('dcformer_nano')) | {k: torch.tensor(7) for k in fixture('dcformer_nano')['state'] if k.endswith('num_batches_tracked')}
def med3dvlm() -> dict:
    return under('model.vision_tower.vision_tower.', dcformer()) | under('model.mm_projector.', mixer()) | weights(fixture('tokens_qwen'))

@pytest.fixture
def folder(tmp_path): return write(tmp_path, med3dvlm(), MED3DVLM)

@torch.no_grad()
def image_tokens(parts: dict, x: torch.Tensor) -> torch.Tensor:
    low, high = parts['encode'].states(x)[-2:]
    return torch.cat([parts['project'].low(low.x), parts['project'].high(high.x)], 1)

@torch.no_grad()
def test_med3dvlm_from_its_folder(folder):
    parts, audit = load_folder(folder)
    apart = {'encode': load_published('med3dvlm.dcformer', dcformer(), image_size=(32, 64, 64))[0], 'project': load_published('med3dvlm.mixer', mixer())[0]}
    assert audit.name == 'med3dvlm' and list(parts) == ['encode', 'project', 'lm'] and not audit.unread and not audit.replaced and not audit.passed_over
    assert sum(len(p.mapped) for p in audit.parts.values()) == len(med3dvlm()) and not any(p.kept or p.passed_over for p in audit.parts.values())
    assert audit.parts['lm'].sizes == {'vocab_size': 120, 'vocab_size_of_config': 152} and type(parts['lm']).__name__ == 'Qwen2ForCausalLM' and not parts['lm'].training
    assert all(same(parts[k], apart[k]) for k in apart)
    x = tensor(fixture('dcformer_nano')['input']['x'])
    last = parts['encode'].states(x)[-1].x
    assert difference('dcformer_nano', 'hidden4', last).max() < 1e-4*last.std()
    image = image_tokens(parts, x)
    assert image.shape == (1, 16, 64) and torch.equal(image, image_tokens(apart, x))
    ids = torch.from_numpy(expected('tokens_qwen')['generate_prompt_ids']).long().view(1, -1)
    logits = parts['lm'](inputs_embeds=insert(parts['lm'], ids, image)).logits
    assert logits.isfinite().all() and not torch.equal(logits, parts['lm'](inputs_embeds=insert(parts['lm'], ids, image_tokens(parts, 1 - x))).logits)   # the image is heard

@pytest.mark.parametrize('name, model_type', [('tokens_qwen', 'vlm_qwen'), ('tokens_phi3', 'lamed_phi3'), ('tokens_llama', 'lamed_llama')])
@torch.no_grad()
def test_a_language_model_from_a_folder_gives_the_published_logits(tmp_path, name, model_type):
    "The vision parts are random; the language model is the fixture's, and its logits are the published code's."
    state = under('model.vision_tower.vision_tower.', weights(fixture('m3d_vit_reduced'))) | under('model.mm_projector.', filled({'projector.0.weight': (64, 96), 'projector.0.bias': (64,)})) | weights(fixture(name))
    meta = fixture(name)
    config = meta['config'] | {'model_type': model_type, 'image_size': [16, 64, 64], 'patch_size': [4, 16, 16], 'mm_projector_type': 'spp', 'proj_pooling_type': 'spatial', 'proj_pooling_size': 2}
    parts, audit = load_folder(write(tmp_path, state, config, shards=3), sizes={'encode': {'heads': 4}})
    ids, mask = (torch.from_numpy(expected(name)[k]).long().view(2, 40) for k in ('input_ids', 'attention_mask'))
    logits = parts['lm'](inputs_embeds=insert(parts['lm'], ids, tensor(meta['input']['image_features'] | {'dist': 'normal'})*.5), attention_mask=mask).logits
    m = meta['outputs']['logits']
    heard = mask[..., None].expand(m['shape']).reshape(-1)[::m['stride']].bool()
    assert (logits.reshape(-1)[::m['stride']] - torch.from_numpy(expected(name)['logits']).reshape(-1))[heard].abs().max() < 3e-5
    assert audit.name == 'm3d' and difference('m3d_vit_reduced', 'out', parts['encode'].sequence(tensor(fixture('m3d_vit_reduced')['input']['x']))).max() < 2e-5

# ---- M3D-LaMed
LAMED = fixture('tokens_phi3')['config'] | {'model_type': 'lamed_phi3', 'vocab_size': 32064, 'vision_tower': 'vit3d', 'image_size': [16, 64, 64], 'patch_size': [4, 16, 16], 'vision_select_layer': -1, 'vision_select_feature': 'patch',
    'mm_projector_type': 'spp', 'proj_layer_type': 'mlp', 'proj_layer_num': 2, 'proj_pooling_type': 'spatial', 'proj_pooling_size': 2, 'mm_hidden_size': 96, 'segmentation_module': 'segvol'}
SPP = filled({'projector.0.weight': (64, 96), 'projector.0.bias': (64,), 'projector.2.weight': (64, 64), 'projector.2.bias': (64,)})
def lamed() -> dict:
    return under('model.vision_tower.vision_tower.', weights(fixture('m3d_vit_reduced'))) | under('model.mm_projector.', SPP) | weights(fixture('tokens_phi3')) | filled({'model.seg_module.image_encoder.weight': (2, 2), 'model.seg_projector.0.weight': (2, 2)})

@torch.no_grad()
def test_m3d_lamed_with_fewer_rows_than_its_configuration_claims(tmp_path):
    state = lamed()
    for k in ('model.embed_tokens.weight', 'lm_head.weight'): state[k] = torch.cat([state[k]]*3)[:315]              # as 32,015 rows under 32,064 (issue 33)
    parts, audit = load_folder(write(tmp_path, state, LAMED), sizes={'encode': {'heads': 4}})
    assert audit.parts['lm'].sizes == {'vocab_size': 315, 'vocab_size_of_config': 32064} and sorted(audit.passed_over) == ['model.seg_module.image_encoder.weight', 'model.seg_projector.0.weight']
    vit, _ = load_published('m3d.vit', weights(fixture('m3d_vit_reduced')), image_size=(16, 64, 64), patch_size=(4, 16, 16), heads=4)
    x = tensor(fixture('m3d_vit_reduced')['input']['x'])
    image = parts['project'](parts['encode'](x)).x
    assert torch.equal(image, load_published('m3d.spatial_pool', SPP)[0](vit(x)).x) and image.shape == (2, 8, 64)
    ids = torch.tensor([[1, *[314]*8, 5, 6, 7]]*2)
    assert parts['lm'](inputs_embeds=insert(parts['lm'], ids, image)).logits.shape == (2, 12, 315)

@torch.no_grad()
def test_the_whole_clip_and_the_bare_encoder_give_the_same_vit(tmp_path):
    "Issue 24: `model_params.bin` is M3D-CLIP, `pretrained_ViT.bin` its encoder."
    vit, given = weights(fixture('m3d_vit_reduced')), {'encode': {'heads': 4, 'image_size': (16, 64, 64)}}
    torch.manual_seed(0)
    bert = AutoModel.from_config(AutoConfig.for_model('bert', vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, max_position_embeddings=32)).eval()
    clip = under('vision_encoder.', vit) | under('language_encoder.', bert.state_dict() | {'embeddings.position_ids': torch.arange(32)[None]}) | filled({'mm_vision_proj.weight': (96, 96), 'mm_vision_proj.bias': (96,), 'mm_language_proj.weight': (96, 64), 'mm_language_proj.bias': (96,)})
    save_file(vit, tmp_path/'pretrained_ViT.safetensors'); save_file(clip | {'logit_scale': torch.tensor(2.6593)}, tmp_path/'model_params.safetensors')
    bare, whole = (load_folder(tmp_path/f'{f}.safetensors', sizes=given) for f in ('pretrained_ViT', 'model_params'))
    assert (bare[1].name, whole[1].name) == ('vit', 'm3d_clip') and list(bare[0]) == ['encode'] and same(bare[0]['encode'], whole[0]['encode'])
    ids = torch.arange(9)[None]
    assert torch.equal(whole[0]['text'](ids).last_hidden_state, bert(ids).last_hidden_state) and whole[0]['loss']['logit_scale'].item() == pytest.approx(2.6593) and whole[0]['text_latent'].in_features == 64
    assert list(whole[1].parts['text'].passed_over) == ['embeddings.position_ids']
    with pytest.raises(CheckpointError, match='no index'): load_folder(tmp_path)
    (tmp_path/'model_params.safetensors').unlink()
    assert same(load_folder(tmp_path, sizes=given)[0]['encode'], bare[0]['encode'])                               # the only file there is

# ---- PETAR
@torch.no_grad()
def test_petar_from_its_folder(tmp_path):
    name = 'petar_tower_reduced'; meta = fixture(name)
    config = LAMED | {'vocab_size': 120, 'use_mask': True, 'use_ct': True, 'segmentation_module': None}
    parts, audit = load_folder(write(tmp_path, under('model.', weights(meta)) | weights(fixture('tokens_phi3')), config), sizes={'encode': {'heads': 4}})
    assert audit.name == 'petar' and audit.parts['encode'].sizes['ct'] == 'separate' and not audit.passed_over
    x = {k: tensor(v) for k, v in meta['input'].items()}
    image = parts['project'](global_and_focal(parts['encode'], [x[k] for k in ('pet', 'mask', 'ct')], [x[f'{k}_focal'] for k in ('pet', 'mask', 'ct')])).x
    assert difference(name, 'projected_global_plus_focal', image).max() < 2e-5
    assert parts['lm'](inputs_embeds=insert(parts['lm'], torch.ones(2, image.shape[1] + 4, dtype=torch.long), image)).logits.isfinite().all()

def test_petar_without_ct(tmp_path):
    tower = {k: v for k, v in weights(fixture('petar_tower_reduced')).items() if 'ct_tower' not in k and 'mm_projector' not in k}
    config = LAMED | {'vocab_size': 120, 'use_mask': True, 'use_ct': False}
    parts, audit = load_folder(write(tmp_path, under('model.', tower) | under('model.mm_projector.', SPP) | weights(fixture('tokens_phi3')), config), sizes={'encode': {'heads': 4}})
    assert audit.parts['encode'].sizes['ct'] == 'none' and parts['encode'].dim == 96

# ---- CT-CLIP, DCFormer_SigLIP, adapters
@torch.no_grad()
def test_ctclip_from_one_file(tmp_path):
    meta = fixture('ctclip_latent_reduced'); c, video = meta['config']['ctvit'], tensor(meta['input']['video'])
    save_file(weights(meta) | {'temperature': torch.tensor(1.)}, tmp_path/'CT-CLIP_v2.safetensors')
    given = {'encode': {'image_size': tuple(video.shape[2:]), 'patch_size': (c['temporal_patch_size'], c['patch_size'], c['patch_size'])}}
    with pytest.raises(CheckpointError, match="part 'text'"): load_folder(tmp_path, sizes=given)
    parts, audit = load_folder(tmp_path, sizes=given, without=['text'])                                           # the fixture's text tower is a stub
    assert audit.name == 'ctclip' and sorted(audit.passed_over) == ['to_text_latent_extra.weight', 'to_visual_latent_extra.weight']
    t = parts['encode'](video)
    image = torch.nn.functional.linear(t.x.unflatten(1, t.grid).mean(1).flatten(1), parts['image_latent'].weight)
    text = parts['text_latent'](tensor(meta['input']['text_cls']))
    for key, value in {'image_latent': torch.nn.functional.normalize(image, dim=-1), 'pair_scores': pair_scores(image, text, parts['loss']['temperature']), 'loss': ctclip_loss(image, text, parts['loss']['temperature'])}.items():
        assert difference('ctclip_latent_reduced', key, value).max() < 1e-5, key

def test_dcformer_siglip(tmp_path):
    torch.manual_seed(0)
    bert = AutoModel.from_config(AutoConfig.for_model('distilbert', vocab_size=50, dim=64, n_layers=2, n_heads=1, hidden_dim=96, max_position_embeddings=32)).eval()
    state = under('vision_encoder.', weights(fixture('dcformer_nano'))) | under('language_encoder.', bert.state_dict()) | filled({f'mm_{p}_proj.{k}': s for p, n in (('vision', 256), ('language', 64)) for k, s in (('weight', (32, n)), ('bias', (32,)))})
    parts, audit = load_folder(write(tmp_path, state | {'t_prime': torch.tensor(2.7), 'bias': torch.tensor(-.1)}, {'model_type': 'clip'}, shards=1), sizes={'encode': {'image_size': (32, 64, 64)}})
    ids = torch.arange(9)[None]
    assert audit.name == 'med3dvlm_clip' and sorted(parts['loss']) == ['bias', 't_prime'] and torch.equal(parts['text'](ids).last_hidden_state, bert(ids).last_hidden_state)

@pytest.mark.parametrize('kind, project', [('mixer', mixer()), ('mlp', weights(fixture('mlp_projector_reduced'))), ('low_high_mlp', weights(fixture('low_high_mlp_reduced'))), ('spp', SPP)], ids=lambda v: v if isinstance(v, str) else '')
def test_a_first_stages_projector(tmp_path, kind, project):
    rows = filled({'model.embed_tokens.weight': (120, 64)})
    save_file(under('model.mm_projector.', project) | rows, tmp_path/'mm_projector.safetensors')
    (tmp_path/'config.json').write_text(json.dumps({'mm_projector_type': kind}))
    parts, audit = load_folder(tmp_path)
    published = {'mixer': 'med3dvlm.mixer', 'mlp': 'med3dvlm.mlp', 'low_high_mlp': 'med3dvlm.low_high_mlp', 'spp': 'm3d.spatial_pool'}[kind]
    assert audit.name == 'adapter' and audit.parts['project'].kind == published and same(parts['project'], load_published(published, project)[0]) and torch.equal(parts['embed'].weight, rows['model.embed_tokens.weight'])
    (tmp_path/'config.json').write_text(json.dumps({'mm_projector_type': 'spp' if kind != 'spp' else 'mixer'}))
    with pytest.raises(CheckpointError, match='mm_projector_type'): load_folder(tmp_path)

# ---- files beside the shards, pickles, prefixes
def test_a_vision_tower_beside_the_shards_wins(folder):
    "As in Med3DVLM's demo, which loads it over the encoder that was just read."
    before = load_folder(folder)[0]['encode']
    other = {k: v + 1 for k, v in dcformer().items()}
    torch.save(under('vision_tower.', other), folder/'vision_tower.bin')
    with pytest.raises(CheckpointError, match='vision_tower.bin: found .bin') as refused: load_folder(folder)
    command = re.search(r'python -c "(.*)"$', str(refused.value))[1]
    subprocess.run([sys.executable, '-c', command], check=True)                                                   # the message's own command
    parts, audit = load_folder(folder)
    assert len(audit.replaced) == len(other) and not audit.parts['encode'].passed_over and audit.unread == ['vision_tower.bin']
    assert same(parts['encode'], load_published('med3dvlm.dcformer', other, image_size=(32, 64, 64))[0]) and not same(parts['encode'], before)

@pytest.mark.parametrize('file', ['pytorch_model.bin', 'CT-CLIP_v2.pt', 'model_with_lora.bin'])
def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path, file):
    state = weights(fixture('m3d_vit_reduced'))
    torch.save(state, tmp_path/file)
    for path in (tmp_path, tmp_path/file):
        with pytest.raises(CheckpointError, match='expected .safetensors') as refused: load_folder(path)
    subprocess.run([sys.executable, '-c', re.search(r'python -c "(.*)"$', str(refused.value))[1]], check=True)
    given = {'encode': {'heads': 4, 'image_size': (16, 64, 64)}}
    assert load_folder(tmp_path, sizes=given)[1].unread == [file] and read_state((tmp_path/file).with_suffix('.safetensors')).keys() == state.keys()

def test_other_prefixes(tmp_path):
    state = {re.sub(r'^model\.(vision_tower|mm_projector)\.', r'vlm.\1.', k): v for k, v in lamed().items() if 'seg_' not in k}
    write(tmp_path, state, LAMED | {'vocab_size': 120})
    with pytest.raises(CheckpointError, match='no layout'): load_folder(tmp_path)
    given = dict(name='m3d', prefixes={'encode': 'vlm.vision_tower.vision_tower.', 'project': 'vlm.mm_projector.'}, sizes={'encode': {'heads': 4}})
    parts, _ = load_folder(tmp_path, **given)
    assert same(parts['encode'], load_published('m3d.vit', weights(fixture('m3d_vit_reduced')), image_size=(16, 64, 64), patch_size=(4, 16, 16), heads=4)[0])
    with pytest.raises(CheckpointError, match="part 'vision' is unknown"): load_folder(tmp_path, **given | {'prefixes': {'vision': 'x.'}})

def test_stored_precision_of_the_language_model_stays(tmp_path):
    state = {k: v.bfloat16() for k, v in lamed().items()}
    write(tmp_path, state, LAMED | {'vocab_size': 120}, shards=1)
    parts, _ = load_folder(tmp_path, sizes={'encode': {'heads': 4}})
    assert parts['lm'].dtype == torch.bfloat16 and torch.equal(parts['lm'].lm_head.weight, state['lm_head.weight']) and parts['encode'].embed.weight.dtype == torch.float32
    assert load_folder(tmp_path, sizes={'encode': {'heads': 4}}, dtype=torch.float32)[0]['lm'].dtype == torch.float32

def test_tied_embeddings_need_no_second_table(tmp_path):
    state = {k: v for k, v in lamed().items() if k != 'lm_head.weight'}
    parts, audit = load_folder(write(tmp_path, state, LAMED | {'vocab_size': 120, 'tie_word_embeddings': True}), sizes={'encode': {'heads': 4}})
    assert parts['lm'].lm_head.weight is parts['lm'].model.embed_tokens.weight and list(audit.parts['lm'].kept) == ['lm_head.weight']

def without(*patterns): return {k: v for k, v in med3dvlm().items() if not any(p in k for p in patterns)}
REFUSED = {'a key too many': (med3dvlm() | {'model.merlin.weight': torch.zeros(1)}, {}, 'model.merlin.weight: has no place'), 'no key of an lm layer': (without('layers.1.mlp.up_proj'), {}, 'up_proj.weight: nothing in the checkpoint fills it'),
    'no key of the encoder': (without('s3.0.scale'), {}, r"part 'encode'.*s3.0.scale: missing"), 'no projector': (without('mm_projector.low', 'mm_projector.high'), {}, "part 'project' of med3dvlm"), 'no embeddings': (without('embed_tokens'), {}, 'embed_tokens.weight: missing'),
    'no lm_head': (without('lm_head'), {}, 'lm_head.weight: nothing'), 'another width': (med3dvlm(), {'intermediate_size': 96}, r'found shape \(128, 64\)'), 'another encoder': (med3dvlm(), {'vision_tower': 'vit3d'}, "vision_tower is 'vit3d'"),
    'another layer': (med3dvlm(), {'vision_select_layer': -3}, 'vision_select_layer is -3'), 'another projector': (med3dvlm(), {'mm_projector_type': 'mlp'}, "mm_projector_type is 'mlp'"), 'an unknown lm': (med3dvlm(), {'model_type': 'frankenstein'}, "model_type is 'frankenstein'"),
    'padding out of the table': (med3dvlm(), {'pad_token_id': 130}, 'pad_token_id 130')}

@pytest.mark.parametrize('state, config, why', REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_named(tmp_path, state, config, why):
    with pytest.raises(CheckpointError, match=why): load_folder(write(tmp_path, state, MED3DVLM | config))

def test_broken_folders_are_named(tmp_path, folder):
    lost = json.loads((folder/'model.safetensors.index.json').read_text())
    lost['weight_map']['model.layers.9.mlp.up_proj.weight'] = 'model-00001-of-00002.safetensors'
    (folder/'model.safetensors.index.json').write_text(json.dumps(lost))
    with pytest.raises(CheckpointError, match='layers.9.*does not hold'): load_folder(folder)
    (folder/'model-00002-of-00002.safetensors').unlink()
    with pytest.raises(CheckpointError, match='model-00002-of-00002.safetensors: no such file'): load_folder(folder)
    (empty := tmp_path/'empty').mkdir()
    with pytest.raises(CheckpointError, match='no weights'): load_folder(empty)
    with pytest.raises(CheckpointError, match='no such file or folder'): load_folder(tmp_path/'nowhere')
    with pytest.raises(CheckpointError, match="layout 'llava' is unknown"): load_folder(write(empty, med3dvlm()), name='llava')
    with pytest.raises(CheckpointError, match='there is no config.json'): load_folder(empty, sizes={'encode': {'image_size': (32, 64, 64)}})
    with pytest.raises(CheckpointError, match='no layout'): recognise({'transformer.wte.weight': torch.zeros(1)})

def test_a_bare_dcformer(tmp_path):
    save_file(weights(fixture('dcformer_nano')), tmp_path/'dcformer.safetensors')
    parts, audit = load_folder(tmp_path, sizes={'encode': {'image_size': (32, 64, 64)}})
    assert audit.name == 'dcformer' and same(parts['encode'], load_published('med3dvlm.dcformer', weights(fixture('dcformer_nano')), image_size=(32, 64, 64))[0])

def test_every_layout_is_loaded_by_a_test():
    text = Path(__file__).read_text(encoding='utf-8')
    asserted = set(re.findall(r"audit\.name == '(\w+)'", text)) | set(re.findall(r"\[1\]\.name\) == \('(\w+)', '(\w+)'\)", text)[0])
    assert asserted == set(FOLDERS)

# ---- as the start of a point
NANO = Slot('dcformer', {'dims': [32, 32, 64, 128, 256], 'blocks': [1, 1, 1, 1], 'kernels': [13, 11, 9, 7], 'stride': 4, 'taps': 2}, 'published')

def point(name: str = 'med3dvlm', **kw):
    cfg = resolve(name, 'smoke')
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, shape=(32, 64, 64)), project=Slot('mlp'), **kw)
    return cfg, build(cfg, train_tokenizer(['no abnormal uptake'], 300))

def test_a_point_starts_from_published_weights(tmp_path):
    (tmp_path/'published').mkdir(); write(tmp_path/'published', med3dvlm(), MED3DVLM)
    cfg, model = point(encode={'ct': NANO})
    audits = fill(model, cfg, tmp_path)
    assert list(audits) == ['encode.ct'] and audits['encode.ct'].name == 'med3dvlm' and same(model.encode['ct'], load_published('med3dvlm.dcformer', dcformer(), image_size=(32, 64, 64))[0])

@pytest.mark.parametrize('change, message', [({'dims': [32, 32, 64, 128, 192]}, r"set its args to the published sizes: .*256"), ({'position': 'learned'}, r"places\.0 is absent there")], ids=['width', 'positions'])
def test_weights_of_another_size_are_refused(tmp_path, change, message):
    (tmp_path/'published').mkdir(); write(tmp_path/'published', med3dvlm(), MED3DVLM)
    cfg, model = point(encode={'ct': dataclasses.replace(NANO, args=NANO.args | change)})
    with pytest.raises(CheckpointError, match=message): fill(model, cfg, tmp_path)

def test_a_folder_without_the_part_is_refused(tmp_path):
    (tmp_path/'published').mkdir(); save_file(under('model.mm_projector.', SPP) | filled({'model.embed_tokens.weight': (120, 64)}), tmp_path/'published/mm_projector.safetensors')
    cfg, model = point(encode={'ct': NANO})
    with pytest.raises(CheckpointError, match="weights of encode.ct: part 'encode' is unknown, adapter has"): fill(model, cfg, tmp_path)
