"Every further fixture of the published code: where image tokens go, contrastive losses with their gradients, CT-CLIP's latents, projectors at full size, Med3DVLM's whole image path."
import importlib, re
from pathlib import Path
import numpy as np, pytest, torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
import petvlm
from petvlm.checkpoints import CheckpointError, load_published
from petvlm.codebook import CosineCodebook
from petvlm.heads import SlabLatent
from petvlm.insertion import InsertionError, insert, overwrite, published_dialogue, published_text, published_tokens
from petvlm.losses import LossError, similarity
from petvlm.published_losses import ctclip_loss, pair_scores, raw_scale_logits, raw_scale_loss
from petvlm.siglip import siglip_loss
from petvlm.tokens import Tokens
from parity import HERE, difference, expected, fixture, tensor, weights

# ---- image tokens in a language model
SYSTEMS = {'tokens_qwen': 'qwen2', 'tokens_llama': 'llama', 'tokens_phi3': 'phi3'}

def language_model(name: str):
    meta = fixture(name)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(SYSTEMS[name], **meta['config'])).eval()
    lm.load_state_dict(weights(meta))
    return lm

def stored(name: str, key: str) -> torch.Tensor:
    return torch.from_numpy(expected(name)[key]).long().view(fixture(name)['outputs'][key]['shape'])

def features(name: str) -> torch.Tensor: return tensor(fixture(name)['input']['image_features'] | {'dist': 'normal'})*.5

@pytest.mark.parametrize('name', SYSTEMS)
@torch.no_grad()
def test_insertion_logits_and_loss_equal_the_published_code(name):
    lm, ids, mask, labels = language_model(name), *(stored(name, k) for k in ('input_ids', 'attention_mask', 'labels'))
    embeds = insert(lm, ids, features(name))
    assert difference(name, 'inputs_embeds', embeds).max() == 0
    out = lm(inputs_embeds=embeds, attention_mask=mask, labels=labels)
    m = fixture(name)['outputs']['logits']
    heard = mask[..., None].expand(m['shape']).reshape(-1)[::m['stride']].bool().numpy()      # what is not attended to depends on the form of the mask
    away = np.abs(out.logits.reshape(-1)[::m['stride']].numpy() - expected(name)['logits'].reshape(-1))[heard]
    assert away.size > 500 and away.max() <= 10*fixture(name)['tolerance']['logits_f32_vs_f64']
    assert difference(name, 'loss', out.loss).max() < 1e-5

@pytest.mark.parametrize('name', SYSTEMS)
@torch.no_grad()
def test_greedy_answers_equal_the_published_code(name):
    lm, prompt = language_model(name), stored(name, 'generate_prompt_ids')
    out = lm.generate(inputs_embeds=insert(lm, prompt, features(name)[:1]), attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert expected(name)['generated_top2_margin'].min() > 1e-3 and out[0].tolist() == stored(name, 'generated_ids').tolist()

@pytest.mark.parametrize('name', SYSTEMS)
@torch.no_grad()
def test_which_positions_matter_is_as_measured(name):
    lm, ids, mask = language_model(name), stored(name, 'input_ids'), stored(name, 'attention_mask')
    image, first = features(name), stored(name, 'first_question_position')
    assert first.tolist() == [{'tokens_qwen': 16}.get(name, 17)]*2
    def change(at):
        other = ids.clone(); other[torch.arange(2), at] = (other[torch.arange(2), at] + 1) % 119
        return (lm(inputs_embeds=insert(lm, ids, image), attention_mask=mask).logits - lm(inputs_embeds=insert(lm, other, image), attention_mask=mask).logits)[mask.bool()].abs().max().item()
    stands = expected(name)['max_abs_logit_change_if_first_question_token_changed'].item()
    assert (change(first) == 0) == (stands == 0) == (name == 'tokens_qwen') and change(torch.zeros(2, dtype=torch.long)) > .1

def numbers(bos: bool) -> PreTrainedTokenizerFast:
    "A tokenizer whose token i is written wi; 0, 1, 2 are padding, begin and end, 119 the image's."
    tok = Tokenizer(models.WordLevel({**{f'w{i}': i for i in range(3, 119)}, '<pad>': 0, '<s>': 1, '</s>': 2, '<im_patch>': 119}, unk_token='<pad>'))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos: tok.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token='<pad>', bos_token='<s>', eos_token='</s>', additional_special_tokens=['<im_patch>'])

@pytest.mark.parametrize('kind', ['caption', 'vqa'])
@pytest.mark.parametrize('name', SYSTEMS)
def test_a_dialogue_is_the_published_sequence(name, kind):
    ids, mask, labels = (stored(name, k) for k in ('input_ids', 'attention_mask', 'labels'))
    tokenizer, words = numbers(bos=name != 'tokens_qwen'), lambda t: ' '.join(f'w{i}' for i in t.tolist() if i > 2 and i != 119)
    for i in range(2):
        asked = words(ids[i][labels[i] == -100]), words(labels[i][labels[i] > 2])
        got = published_dialogue(tokenizer, 16, *asked, kind=kind, max_length=40)
        assert all(torch.equal(a, b) for a, b in zip(got, (ids[i], mask[i], labels[i])))
    prompt = words(stored(name, 'generate_prompt_ids')[0])
    assert tokenizer(published_text(prompt, 16, kind), return_tensors='pt')['input_ids'].tolist() == stored(name, 'generate_prompt_ids').tolist()

def test_the_end_token_is_a_label_even_where_it_pads():
    tokenizer = numbers(bos=False); tokenizer.pad_token = '</s>'
    ids, mask, labels = published_dialogue(tokenizer, 2, 'w5', 'w6 w7', max_length=8)
    assert ids.tolist() == [119, 119, 5, 6, 7, 2, 2, 2] and labels.tolist() == [-100]*3 + [6, 7, 2, -100, -100] and mask.tolist() == [1]*5 + [0]*3
    ids, mask, labels = published_dialogue(tokenizer, 2, 'w5', 'w6 w7 w8', max_length=5)                      # cut: no end token
    assert ids.tolist() == [119, 119, 5, 6, 7] and labels.tolist() == [-100]*3 + [6, 7] and mask.all()

@pytest.mark.parametrize('make', [lambda: overwrite(torch.zeros(1, 16, 4), torch.zeros(1, 16, 4)), lambda: overwrite(torch.zeros(2, 20, 4), torch.zeros(1, 16, 4)), lambda: overwrite(torch.zeros(1, 20, 4), torch.zeros(1, 16, 5)),
    lambda: published_dialogue(numbers(False), 2, 'w5 w6 w7', 'w8', max_length=5), lambda: published_dialogue(numbers(False), 8, 'w5', 'w8', max_length=8), lambda: published_text('w5', 2, 'report'),
    lambda: published_tokens(numbers(False), None, 'llava')])
def test_what_cannot_be_inserted_says_why(make):
    with pytest.raises(InsertionError, match='.{30,}'): make()

def test_embeddings_shrink_to_the_tokenizer_and_new_rows_are_the_mean():
    tokenizer = numbers(bos=True)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model('phi3', **fixture('tokens_phi3')['config'] | {'vocab_size': 160}))
    before = [t.weight[:120].detach().clone() for t in (lm.get_input_embeddings(), lm.get_output_embeddings())]
    assert published_tokens(tokenizer, lm, 'm3d') == [119, 120, 121, 122] and lm.config.vocab_size == len(tokenizer) == 123
    for table, old in zip((lm.get_input_embeddings(), lm.get_output_embeddings()), before):
        assert torch.equal(table.weight[:120], old) and torch.allclose(table.weight[120:], old.mean(0).expand(3, -1), atol=1e-7)

# ---- contrastive losses
GIVEN = fixture('losses')['input']
def leaves(*scalars): return [*(tensor(GIVEN[k]).requires_grad_() for k in ('image', 'text')), *(torch.tensor(float(v), requires_grad=True) for v in scalars)]
def agrees(key: str, got: torch.Tensor): assert difference('losses', key, got).max() < 1e-5*max(1, got.abs().max()), key

@pytest.mark.parametrize('name, scale', [('m3d_clip_gatherFalse', 'logit_scale'), ('med3dvlm_nce', 't')])
def test_raw_scale_losses_and_gradients(name, scale):
    image, text, s = leaves(np.log(1/.07))
    loss = raw_scale_loss(image, text, s)
    agrees(f'{name}.loss', loss); agrees(f'{name}.logits', raw_scale_logits(image, text, s))
    for key, g in zip(('image', 'text', scale), torch.autograd.grad(loss, (image, text, s))):
        if f'{name}.grad_{key}' in expected('losses'): agrees(f'{name}.grad_{key}', g)

@pytest.mark.parametrize('decoupled', [False, True], ids=['infonce', 'dcl'])
def test_ctclip_losses_and_gradients(decoupled):
    image, text, t = leaves(1)
    loss, name = ctclip_loss(image, text, t, decoupled), f"ctclip_{'dcl' if decoupled else 'infonce'}"
    agrees(f'{name}.loss', loss); agrees(f'{name}.pair_scores', pair_scores(image, text, t))
    for key, g in zip(('image', 'text', 'temperature'), torch.autograd.grad(loss, (image, text, t))): agrees(f'{name}.grad_{key}', g)

@pytest.mark.parametrize('rank', [0, 1])
def test_two_processes_see_the_joint_loss_and_twice_its_gradient(rank):
    "Gathering sums gradients over ranks: before DDP's average, embeddings have world_size times the gradient of one batch; the two scalars, used after gathering, once."
    image, text, t, b = leaves(np.log(1/.07), 0)
    loss, name, own = siglip_loss(image, text, t, b, 'symmetrised'), f'med3dvlm_dist_world2_rank{rank}', slice(3*rank, 3*rank + 3)
    gi, gt, g_t, g_b = torch.autograd.grad(loss, (image, text, t, b))
    for key, value in {'loss': loss, 'grad_image': 2*gi[own], 'grad_text': 2*gt[own], 'grad_t': g_t, 'grad_bias': g_b}.items(): agrees(f'{name}.{key}', value)

def test_every_loss_of_the_fixture_is_compared():
    here = (Path(__file__).read_text() + (Path(__file__).parent/'test_med3dvlm.py').read_text())
    forms = {k.split('.')[0] for k in expected('losses')}
    assert {f for f in forms if f not in here and not re.search(r'_(rank[01]|infonce|dcl)$', f)} == set()

@pytest.mark.parametrize('make', [lambda: raw_scale_loss(torch.zeros(3, 4), torch.zeros(2, 4), 1.), lambda: ctclip_loss(torch.zeros(3, 4), torch.zeros(2, 4)), lambda: ctclip_loss(torch.ones(1, 4), torch.ones(1, 4), decoupled=True), lambda: pair_scores(torch.zeros(3, 4), torch.zeros(2, 4))])
def test_rows_that_are_no_pairs_are_refused(make):
    with pytest.raises(LossError, match='.{20,}'): make()

# ---- CT-CLIP's latents
@torch.no_grad()
def test_ctclip_latents_scores_and_loss():
    meta = fixture('ctclip_latent_reduced'); w, c = weights(meta), meta['config']['ctvit']
    video = tensor(meta['input']['video'])
    vit, _ = load_published('ctclip.ctvit', {k.removeprefix('visual_transformer.'): v for k, v in w.items() if k.startswith('visual_transformer.')},
                            image_size=tuple(video.shape[2:]), patch_size=(c['temporal_patch_size'], c['patch_size'], c['patch_size']))
    tokens = vit(video)
    assert meta['min_vq_margin'] > 1e-5 and not difference('ctclip_latent_reduced', 'codebook_ids', vit.codebook(vit.features(video).x).ids.view(2, -1)).any()
    latent = SlabLatent(tokens.grid, tokens.dim, 32)
    latent.load_state_dict({'linear.weight': w['to_visual_latent.weight']})
    image, text = latent(tokens), torch.nn.functional.normalize(tensor(meta['input']['text_cls']) @ w['to_text_latent.weight'].T, dim=-1)
    got = {'image_latent': image, 'text_latent': text, 'pair_scores': pair_scores(image, text, 1.), 'loss': ctclip_loss(image, text, 1.)}
    for key, value in got.items(): assert difference('ctclip_latent_reduced', key, value).max() < 1e-5, key

# ---- projectors
@pytest.mark.parametrize('name, given', [('spp_reduced_sequence', {'pooling': 'sequence'}), ('spp_full_phi3', {})])
@torch.no_grad()
def test_spatial_pooling_projectors(name, given):
    c = fixture(name)['config']
    project, audit = load_published('m3d.spatial_pool', weights(fixture(name)), **given)
    assert not audit.passed_over and not audit.kept and audit.sizes['gelu'] == (c['layer_type'] == 'mlp') and audit.sizes['depth'] == c['layer_num']
    out = project(Tokens(tensor(fixture(name)['input']['x']), tuple(n//p for n, p in zip(c['image_size'], c['patch_size'])))).x
    assert difference(name, 'out', out).max() < 10*fixture(name)['tolerance']['out']['f32_vs_f64']

@pytest.mark.parametrize('name', ['low_high_mlp_reduced', 'low_high_mlp_full'])
@torch.no_grad()
def test_the_dual_mlp_by_its_layout(name):
    m, audit = load_published('med3dvlm.low_high_mlp', weights(fixture(name)))
    assert not audit.passed_over and not audit.kept
    low, high = (tensor(fixture(name)['input'][k]) for k in ('low', 'high'))
    assert difference(name, 'out', m.net(torch.cat([m.low(low), m.high(high)], 1))).max() < 10*fixture(name)['tolerance']['out']['f32_vs_f64']

@pytest.mark.parametrize('name', ['mlp_projector_reduced', 'mlp_projector_full'])
@torch.no_grad()
def test_the_mlp_by_its_layout(name):
    m, audit = load_published('med3dvlm.mlp', weights(fixture(name)))
    x = tensor(fixture(name)['input']['x'])
    assert not audit.passed_over and not audit.kept and audit.sizes['depth'] == 2
    assert difference(name, 'out', m(Tokens(x, (1, 1, x.shape[1]))).x).max() < 10*fixture(name)['tolerance']['out']['f32_vs_f64']

def test_an_unknown_pooling_is_refused():
    with pytest.raises(CheckpointError, match="expected 'spatial'"): load_published('m3d.spatial_pool', weights(fixture('spp_reduced')), pooling='max')

# ---- whole images
@torch.no_grad()
def test_med3dvlm_image_tokens_at_full_size():
    name = 'med3dvlm_image_tokens_fullsize'
    encoder, _ = load_published('med3dvlm.dcformer', weights(fixture('dcformer_small')))
    project, _ = load_published('med3dvlm.mixer', weights(fixture('mixer_full')))
    states = encoder.states(tensor(fixture(name)['input']['x']))
    for i, t in enumerate(states): assert difference(name, f'hidden{i}', t.x).max() < 1e-4*t.x.std(), i
    tokens = torch.cat([project.low(states[-2].x), project.high(states[-1].x)], 1)
    assert difference(name, 'image_tokens', tokens).max() < 2e-5 and difference(name, 'pooled', states[-1].x.mean(1)).max() < 1e-4*states[-1].x.std()

@torch.no_grad()
def test_ctvit_tokens_of_twenty_frames():
    name = 'ctvit_full_20frames'; meta = fixture(name); c = meta['config']
    model, _ = load_published('ctclip.ctvit', weights(meta), image_size=(20, 480, 480), patch_size=(c['temporal_patch_size'], c['patch_size'], c['patch_size']))
    t = model(tensor(meta['input']['video']))
    assert expected(name)['vq_top2_margin'].min() > 1e-5                      # no token near a tie: all are compared
    assert difference(name, 'tokens', t.x.unflatten(1, t.grid)).max() < 1e-6
    assert difference(name, 'time_mean_tokens', t.lattice().mean(2).permute(0, 2, 3, 1)).max() < 1e-6

@torch.no_grad()
def test_margins_between_the_two_nearest_codes():
    name = 'ctvit_reduced'; meta = fixture(name); c = meta['config']
    model, _ = load_published('ctclip.ctvit', weights(meta), image_size=tuple(meta['input']['video']['shape'][2:]), patch_size=(c['temporal_patch_size'], c['patch_size'], c['patch_size']))
    x = torch.nn.functional.normalize(model.features(tensor(meta['input']['video'])).x, dim=-1)
    best = (x @ torch.nn.functional.normalize(model.codebook.embed, dim=-1).T).topk(2).values
    margin = (best[..., 0] - best[..., 1]).view(fixture(name)['outputs']['vq_top2_margin']['shape'])
    assert difference(name, 'vq_top2_margin', margin).max() < 1e-5

@torch.no_grad()
def test_a_codebook_at_rest_has_no_commitment_to_pay():
    meta = fixture('vq_train_step')
    book = CosineCodebook(64, 256); book.embed.copy_(weights(meta)['_codebook.embed'][0]); book.eval()
    out = book(tensor(meta['input']['x']))
    assert expected('vq_train_step')['eval_commit_loss'].item() == 0 and not difference('vq_train_step', 'eval_ids', out.ids).any()

def test_every_fixture_is_named_by_a_test():
    text = ''.join(p.read_text(encoding='utf-8') for p in Path(__file__).parent.glob('test_*.py'))
    names = {p.stem for p in HERE.glob('*.json')}
    loose = {n for n in names if n not in text and n.rsplit('_', 1)[0] not in ('dcformer',)}              # dcformer_nano and _small are named by their size
    assert not loose, f'fixtures that no test reads: {sorted(loose)}'

# ---- R2Gen's encoder-decoder
@torch.no_grad()
def test_r2gen_equals_the_published_formulas():
    meta = fixture('r2gen_reduced')
    lm, audit = load_published('r2gen.lm', weights(meta), num_attention_heads=4, memory_heads=4)
    assert audit.sizes == {'num_attention_heads': 4, 'memory_heads': 4, 'vocab_size': 40, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'memory_slots': 3} and not audit.kept
    spec, mask = meta['input']['words'], torch.ones(2, 6, dtype=torch.long)
    for place in meta['input']['masked']: mask[tuple(place)] = 0
    words = torch.from_numpy(np.random.Generator(np.random.PCG64(spec['seed'])).integers(0, spec['high'], spec['shape']))
    out = lm(inputs_embeds=tensor(meta['input']['src']), attention_mask=mask, decoder_input_ids=words).logits
    assert difference('r2gen_reduced', 'logits', out).max() < 1e-5 and difference('r2gen_reduced', 'memory', lm.memory(lm.words(words))).max() < 1e-5
    with pytest.raises(CheckpointError, match='mlp_gamma|of_gamma'): load_published('r2gen.lm', {k: v for k, v in weights(meta).items() if 'layers.1.sublayer.2.norm.mlp_gamma' not in k}, num_attention_heads=4, memory_heads=4)
