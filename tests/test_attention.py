"""The record of what a model looks at: the same numbers as the alignment loss and as eager maps, kept whole in a file, drawn back where the tokens lie."""
import copy, dataclasses, unicodedata
import numpy as np
import pytest, torch
from safetensors.numpy import load_file, save_file
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from petvlm.alignment import AlignmentError, alignment_loss, attention_mass, supervised_queries
from petvlm.attention import AttentionError, Shown, TokenAttention, attend, fingerprint, record_of, reports_of, token_spans
from petvlm.attentionrecord import (AttentionRecord, RecordError, Section, chosen, drawn, ideal_record, kept_within, load_record, maps, save_record, sentences, share, shares, span_of, stamp, tokens_at)
from petvlm.findings import Finding, Study
from petvlm.language import train_tokenizer
from petvlm.processor import PetVLMProcessor
from petvlm.reports import write_report
from petvlm.vlm import PetVLM, PetVLMConfig
from petvlm.volume import Volume

TEXT = 'Nốt mờ ở phổi trái, kích thước 14 mm, tăng chuyển hóa FDG (SUVmax: 6,1). Không thấy hạch trung thất.'
QUESTION = 'Hãy đọc kết quả PET/CT.'
AFFINE = np.array([[0, 0, 12, -190], [0, 12, 0, -90], [15, 0, 0, 300], [0, 0, 0, 1.]])


def small(reading='union', **lm):
    "A model of two inputs and 2 x 2 x 4 image tokens with attention far from even, and its processor."
    tokenizer = train_tokenizer([TEXT, QUESTION]*30, 310); torch.manual_seed(5)
    enc = dict(kind='ctvit', args=dict(patch_size=(8, 8, 8), dim=32, spatial_depth=1, temporal_depth=1, heads=2, dim_head=16, codebook_size=0, peg_scrambled=False))
    sizes = dict(model_type='mistral', vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, head_dim=8, pad_token_id=2, initializer_range=.3) | lm
    model = PetVLM(PetVLMConfig(inputs=['pet', 'ct'], image_size=[16, 16, 32], encode={'pet': enc, 'ct': enc}, fuse={'kind': 'cross_attention', 'args': {'heads': 2}}, lm=sizes, align=dict(threshold=4., reading=reading, max_regions=4)))
    return model.eval(), PetVLMProcessor(tokenizer, model.n_image)

def shown(region='chest', seed=0):
    "Random images; three hot spots in tokens 0, 7 and 13 of 16, the last one of a single voxel."
    g = np.random.default_rng(seed); suv = g.uniform(0, 3, (16, 16, 32)).astype(np.float32)
    suv[1:5, 1:4, 2:6] = 9; suv[2:6, 10:13, 26:30] = 6; suv[12, 11, 9] = 5
    return Shown(region, {k: g.normal(size=suv.shape).astype(np.float32) for k in ('pet', 'ct')}, suv, AFFINE)

@pytest.fixture(scope='module')
def speaker(): return small()

@pytest.fixture(scope='module')
def section(speaker): return attend(*speaker, shown(), QUESTION, TEXT)

def passed(model, processor, look):
    "Embeddings, mask, labels and slots of the pass that training would make."
    batch = processor([[(QUESTION, TEXT)]])
    with torch.no_grad(): embeds = model.embed(batch['input_ids'], model.image_tokens({k: torch.from_numpy(v)[None, None] for k, v in look.images.items()}))
    return embeds, batch['attention_mask'], batch['labels'], batch['input_ids'] == model.config.image_token_id


# ---------- the numbers ----------
@pytest.mark.parametrize('layers', [None, (0,), (2,)], ids=str)
@pytest.mark.parametrize('reading', ['union', 'region'])
def test_the_share_is_what_the_alignment_loss_sees(reading, layers):
    model, processor = small(reading); look = shown(); embeds, mask, labels, slots = passed(model, processor, look)
    regions = model.regions(torch.from_numpy(look.suv)[None, None])
    with torch.no_grad(), attention_mass(regions, slots, supervised_queries(labels), layers) as mass: model._logits(embeds, mask, None, attention_mass=mass)
    theirs = alignment_loss(*mass.masses(), reading, mass.valid)
    ours = AttentionRecord((attend(model, processor, look, QUESTION, TEXT),), {'language': 'vi'})
    layer = layers and layers[0]
    assert regions.shape[1] == (3 if reading == 'region' else 1) and abs(share(ours, layer=layer) - theirs.share.sum().item()) < 1e-5
    assert abs(shares(ours, layer=layer).on_image - mass.masses()[1].item()) < 1e-5

def test_the_maps_are_those_of_eager_attention(speaker, section):
    model, processor = speaker; embeds, mask, labels, slots = passed(model, processor, shown())
    lm = AutoModelForCausalLM.from_config(copy.deepcopy(model.lm.config), attn_implementation='eager').eval(); lm.load_state_dict(model.lm.state_dict())
    with torch.no_grad(): found = lm(inputs_embeds=embeds, attention_mask=mask, use_cache=False, output_attentions=True).attentions
    want = torch.stack([a[0][:, supervised_queries(labels)[0]][..., slots[0]].transpose(0, 1) for a in found], 1).numpy()       # (T, L, H, N)
    assert want.shape == section.attention.shape == (len(section.spans), 3, 4, 16) and np.abs(want - section.attention).max() < 5e-4
    assert np.allclose(want.sum(-1), section.image, atol=1e-5) and np.allclose(want[..., [0, 7, 13]].sum(-1), section.inside, atol=1e-5)
    assert section.weights.nonzero()[0].tolist() == [0, 7, 13] and np.ptp(want.mean((0, 1, 2))) > 1e-3

def test_heads_and_layers_average_to_the_whole(section):
    r = AttentionRecord((section,), {'language': 'vi'}); span = span_of(r, 'phổi trái')
    each = np.array([[[f.inside*f.on_image, f.on_image] for f in [shares(r, span, l, h)]][0] for l in range(3) for h in range(4)])
    assert np.isclose(share(r, span), each[:, 0].sum()/each[:, 1].sum(), atol=1e-6) and np.isclose(maps(r, span)[0].sum(), 1)
    assert np.isclose(maps(r, span)[0] @ section.weights, share(r, span), atol=2e-3)             # the maps are half precision, the sums are not

def test_adapters_are_looked_through_and_training_goes_on():
    model, processor = small(); model.adapt(dict(r=2, alpha=4)); model.train()
    for n, p in model.named_parameters():
        if 'lora_B' in n: torch.nn.init.normal_(p, std=.3)
    before = fingerprint(model); adapted = attend(model, processor, shown(), QUESTION, TEXT)
    assert model.training and fingerprint(model) == before and adapted.attention.shape == (len(adapted.spans), 3, 4, 16)
    with model.lm.disable_adapter(): plain = attend(model, processor, shown(), QUESTION, TEXT)
    assert np.abs(plain.inside - adapted.inside).max() > 1e-3

def test_what_comes_later_does_not_change_where_a_word_looked(speaker, section):
    first = TEXT[:TEXT.index(' Không')]; alone = attend(*speaker, shown(), QUESTION, first); n = len(alone.spans) - 1
    assert section.spans[:n].tolist() == alone.spans[:n].tolist() and np.allclose(section.inside[:n], alone.inside[:n], atol=1e-6)

def test_other_images_other_looks(speaker, section):
    assert np.abs(attend(*speaker, shown(seed=1), QUESTION, TEXT).image - section.image).max() > 1e-3

def test_one_recorder_one_pass(speaker):
    model, processor = speaker; embeds, mask, labels, slots = passed(model, processor, shown()); recorder = TokenAttention(torch.zeros(16), slots, supervised_queries(labels))
    with torch.no_grad(): model._logits(embeds, mask, None, attention_mass=recorder)
    with pytest.raises(AlignmentError, match='ran twice'), torch.no_grad(): model._logits(embeds, mask, None, attention_mass=recorder)
    with pytest.raises(AlignmentError, match='one sample'): TokenAttention(torch.zeros(16), slots.expand(2, -1), supervised_queries(labels).expand(2, -1))

def by_hand(**change):
    "'nodule left': head 0 looks at token 3 (S) for the second word, head 1 everywhere alike; a tenth of all attention is on the image."
    a = np.zeros((3, 1, 2, 4), np.float16); a[0, 0, 0, 0] = a[1, 0, 0, 3] = a[2, 0, 0, 1] = .5; a[:, 0, 1] = .125; full = a.astype(np.float32); w = np.array([0, 0, 0, 1], np.float32)
    mask = np.zeros((2, 2, 8), bool); mask[:, :, 6:] = True
    return Section(**dict(region='chest', text='nodule left', spans=np.array([[0, 6], [7, 11], [11, 11]], np.int32), attention=a, inside=full @ w, image=full.sum(-1), weights=w, mask=mask, affine=AFFINE, lattices=((1, 1, 4),)) | change)

@pytest.mark.parametrize('span, layer, head, inside, even, on_image, tokens', [
    ((13, 17), None, 0, 1, .25, .5, 1), ((13, 17), None, 1, .25, .25, .5, 1), ((13, 17), 0, None, .625, .25, .5, 1), ((6, 17), None, None, (.5 + .25)/2, .25, .5, 2), (None, None, None, (.5 + .375)/3, .25, .5, 3)])
def test_shares_by_hand(span, layer, head, inside, even, on_image, tokens):
    "'Chest' and a line break stand before the text, so it begins at character 6."
    found = shares(AttentionRecord((by_hand(),), {'language': 'en'}), span, layer, head)
    assert np.allclose(found, (inside, even, on_image, tokens))

def test_several_regions_are_one_report():
    "A span over two sections: the attention on the image of either is counted, each with its own S."
    empty = by_hand(region='head_neck', text='clear now ok', spans=np.array([[0, 5], [6, 9], [12, 12]], np.int32), weights=np.zeros(4, np.float32), inside=np.zeros((3, 1, 2), np.float32))
    r = AttentionRecord((by_hand(), empty), {'language': 'en'})
    assert r.text[slice(*span_of(r, 'clear'))] == 'clear' and maps(r, span_of(r, 'clear'))[0] is None
    assert np.isclose(share(r), (.5 + .375)/6) and np.isclose(shares(r).even, .125) and shares(r, span_of(r, 'clear')).inside is None
    with pytest.raises(RecordError, match='S is empty'): share(r, span_of(r, 'clear'))

@pytest.mark.parametrize('ask, said', [(dict(layer=1), '0 to 0'), (dict(head=-1), '0 to 1'), (dict(span=(0, 5)), 'no text token'), (dict(span=(900, 901)), 'no text token'), (dict(span='left'), 'expected'), (dict(span=(1, 2, 3)), 'expected'), (dict(span=(5, 3)), 'no text')])
def test_what_is_not_there_is_refused(ask, said):
    with pytest.raises(RecordError, match=said): shares(AttentionRecord((by_hand(),), {'language': 'en'}), **ask)


# ---------- text ----------
def test_tokens_know_their_letters(speaker):
    tokenizer = speaker[1].tokenizer; spans = token_spans(tokenizer, TEXT); pieces = [TEXT[a:b] for a, b in spans]
    assert len(spans) == len(tokenizer(TEXT)['input_ids']) + 1 and pieces[-1] == '' and all(p == p.strip() for p in pieces)
    covered = np.zeros(len(TEXT), bool)
    for a, b in spans: covered[a:b] = True
    assert all(c or letter.isspace() for c, letter in zip(covered, TEXT))
    rare = 'Ệ'; assert len(tokenizer(rare)['input_ids']) > 1 and set(map(tuple, token_spans(tokenizer, rare)[:-1].tolist())) == {(0, 1)}       # a letter in several bytes
    with pytest.raises(AttentionError, match='fast'): token_spans(object(), TEXT)

def test_a_text_that_is_cut_empty_or_in_pieces(speaker):
    model, processor = speaker
    with pytest.raises(AttentionError, match='shorter'): attend(model, PetVLMProcessor(processor.tokenizer, model.n_image, max_length=60), shown(), QUESTION, TEXT)
    with pytest.raises(AttentionError): attend(model, processor, shown(), QUESTION, '  ')
    assert attend(model, processor, shown(), QUESTION, unicodedata.normalize('NFD', TEXT) + '\n').text == TEXT

def test_an_encoder_decoder_is_refused(speaker):
    class Lm: config = type('C', (), {'is_encoder_decoder': True})
    with pytest.raises(AttentionError, match='encoder'): attend(type('M', (), {'lm': Lm})(), speaker[1], shown(), QUESTION, TEXT)

@pytest.mark.parametrize('language', ['vi', 'en'])
def test_sentences_state_their_findings(language):
    there = [Finding('lung', 'left', 'nodule', 14., 6.1, 'increased'), Finding('pleura', 'right', 'effusion', 22., None, 'none'), Finding('hilar_node', 'right', 'node', 12., 4.3, 'increased')]
    for seed in range(6):
        text = write_report(there, 'chest', language, seed=seed).text; n = len(text)
        r = AttentionRecord((by_hand(text=text, spans=np.array([[0, 3], [4, 6], [n, n]], np.int32)),), {'language': language}); said = sentences(r)
        stated = [(f.organ, f.side, f.kind) for s in said for f in s.findings if not s.impression]
        assert sorted(stated) == sorted((f.organ, f.side, f.kind) for f in there) and any(s.impression and s.findings for s in said)
        assert ' '.join(' '.join(r.text[slice(*s.span)] for s in said).split()) == ' '.join(text.split())
        assert all(r.text[slice(*w)].strip('.,;()') == r.text[slice(*w)] and s.span[0] <= w[0] < w[1] <= s.span[1] for s in said for w in s.words)

def test_a_record_of_all_regions(speaker, tmp_path):
    model, processor = speaker; looks = [shown('head_neck'), shown('chest', 1)]
    r = record_of(model, processor, looks, 'vi', max_new_tokens=6, about={'run': 'r'})
    written = reports_of(model, processor, looks, r.about['question'], 6)
    assert r.about['written'] and {s.region: s.text for s in r.sections} == {k: v for k, v in written.items() if v} and r.about['model'] == fingerprint(model)
    given = record_of(model, processor, looks, 'vi', {'chest': TEXT}, QUESTION)
    assert [s.region for s in given.sections] == ['chest'] and not given.about['written'] and given.text.startswith('Lồng ngực\n')
    with pytest.raises(AttentionError, match='pelvis'): record_of(model, processor, looks, 'vi', {'pelvis': TEXT})
    with pytest.raises(AttentionError, match='no text'): record_of(model, processor, looks, 'vi', {'chest': ' '})
    blind = record_of(model, processor, [looks[0]._replace(suv=None)], 'vi', {'head_neck': TEXT})
    assert shares(blind).inside is None and not blind.sections[0].mask.any()


# ---------- places ----------
def test_every_voxel_is_drawn_with_its_token():
    "Two lattices, a grid that lies askew: against boxes blown up by hand."
    turn = np.deg2rad(20); askew = AFFINE.copy(); askew[:3, :3] = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1.]]) @ askew[:3, :3]
    a = np.zeros((1, 1, 1, 20), np.float16); s = Section('chest', 'x', np.array([[0, 1]], np.int32), a, a[..., 0].astype(np.float32), a[..., 0].astype(np.float32), np.zeros(20, np.float32), np.zeros((4, 6, 8), bool), askew, ((2, 2, 4), (1, 1, 2)))
    values = np.random.default_rng(0).random(20).astype(np.float32); places = s.grid.world(np.stack(np.indices((4, 6, 8)), -1))
    want = np.kron(values[:16].reshape(2, 2, 4), np.ones((2, 3, 2))) + np.kron(values[16:18].reshape(1, 1, 2), np.ones((4, 6, 4)))       # the last two tokens lie nowhere
    assert np.allclose(drawn(s, values, places), want) and (tokens_at(s, places)[..., 1] >= 16).all()
    assert (tokens_at(s, s.grid.world([[-.6, 0, 0], [0, 5.6, 0], [0, 0, 99]])) == -1).all()

def test_the_ideal_reader_looks_at_the_lesion_and_the_blind_one_does_not():
    grid = np.array([[0, 0, 8, -160], [0, 8, 0, -100], [10, 0, 0, 0], [0, 0, 0, 1.]]); ct = Volume(np.full((60, 26, 41), 40.), grid, 'HU'); ct.data[20:44, 6:20, 8:33] = -800; ct.data[:, :2] = ct.data[:, -2:] = ct.data[..., :2] = ct.data[..., -2:] = -1000
    pet = Volume(np.ones(ct.shape), grid, 'SUVbw'); at = (30, 12, 28); pet.data[tuple(slice(i - 1, i + 2) for i in at)] = 9
    study = Study('x', {'pet': pet, 'ct': ct}, (Finding('lung', 'left', 'nodule', 20., 9., 'increased', center_mm=tuple(pet.world(at))),))
    seen, blind = ideal_record(study, 'en'), ideal_record(study, 'en', gaze=0); k = [s.region for s in seen.sections].index('chest')
    s = next(s for s in sentences(seen) if s.findings and s.section == k); token = int(tokens_at(seen.sections[k], study.findings[0].center_mm)[0])
    assert np.isclose(maps(seen, s.span, head=0)[k][token], .8 + .2/60, atol=1e-3) and np.isclose(maps(blind, s.span)[k][token], 1/60, atol=1e-4) and shares(seen, s.span, head=0).inside > .8
    assert seen.about['study'] == stamp(study) != stamp(Study('x', {'pet': pet.replace(data=pet.data*2), 'ct': ct}))


# ---------- the file ----------
def test_a_record_comes_back_as_it_was(section, tmp_path):
    r = AttentionRecord((section, dataclasses.replace(section, region='head_neck')), {'language': 'vi', 'run': 'r', 'threshold': 4.}); again = load_record(save_record(r, tmp_path/'deep'/'r.safetensors'))
    assert again.text == r.text and again.about == r.about and [p.name for p in (tmp_path/'deep').iterdir()] == ['r.safetensors']
    for a, b in zip(again.sections, r.sections):
        assert a.lattices == b.lattices and a.reads == b.reads == ('pet', 'ct') and all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ('spans', 'attention', 'inside', 'image', 'weights', 'mask', 'affine'))
    with pytest.raises(RecordError, match='safetensors'): save_record(r, tmp_path/'r.pkl')

def spoiled(path, **change):
    "The file at `path` with other arrays or another header."
    with safe_open(path, 'np') as f: told = f.metadata()
    arrays = load_file(path); told = change.pop('told', told)
    for name, x in change.items():
        if x is None: del arrays[name.replace('_', '.', 1)]
        else: arrays[name.replace('_', '.', 1)] = x
    save_file(arrays, path, metadata=told)

@pytest.mark.parametrize('change', [dict(_0_weights=None), dict(_0_weights=np.ones(3, np.float32)), dict(_0_inside=np.full((3, 1, 2), np.nan, np.float32)), dict(_0_inside=np.full((3, 1, 2), .9, np.float32)), dict(_0_spans=np.array([[0, 600], [7, 11], [11, 11]], np.int32)),
                                    dict(_0_attention=np.zeros((3, 1, 2, 4), np.float32)), dict(_0_affine=np.zeros((4, 4))), dict(_0_mask=np.zeros(1, np.uint8)), dict(told={}), dict(told={'petvlm': '{"format": '}), dict(told={'petvlm': '{"format": "petvlm attention 9"}'}),
                                    dict(told={'petvlm': '{"format": "petvlm attention 1", "about": {"language": "vi"}, "sections": []}'})], ids=lambda c: ' '.join(f'{k} {str(v)[:40]}' for k, v in c.items()))
def test_a_damaged_record_is_named(change, tmp_path):
    path = save_record(AttentionRecord((by_hand(),), {'language': 'en'}), tmp_path/'r.safetensors')
    spoiled(path, **{k.lstrip('_'): v for k, v in change.items()})
    with pytest.raises(RecordError, match='r.safetensors'): load_record(path)

@pytest.mark.parametrize('content', [b'', b'\0'*7, b'PK\3\4' + b'x'*99, b'\xff'*200])
def test_what_is_no_record_is_named(content, tmp_path):
    (tmp_path/'r.safetensors').write_bytes(content)
    with pytest.raises(RecordError, match='r.safetensors'): load_record(tmp_path/'r.safetensors')
    with pytest.raises(RecordError): load_record(tmp_path/'none.safetensors')

def test_maps_shrink_and_shares_stay(section):
    full = AttentionRecord((section,), {'language': 'vi'}); size = section.attention.nbytes/1e6
    for mb, shape in ((size*1.001, (3, 4)), (size/2, (3, 1)), (size/9, (1, 1))):
        less = AttentionRecord(kept_within([section], mb), {'language': 'vi'})
        assert less.sections[0].attention.shape[1:3] == shape and shares(less, None, 2, 3) == shares(full, None, 2, 3) and np.allclose(maps(less)[0], maps(full)[0], atol=1e-3)
    with pytest.raises(RecordError, match='mean over'): maps(less, None, 1)
    with pytest.raises(RecordError, match='do not fit|does not fit'): kept_within([section], size/100)

def test_words_that_are_not_there():
    r = AttentionRecord((by_hand(),), {'language': 'en'})
    with pytest.raises(RecordError, match='0 times'): span_of(r, 'right')
    assert chosen(r, span_of(r, 'ft'))[0].tolist() == [False, True, False]
    with pytest.raises(ValueError): AttentionRecord((by_hand(),), {'language': 'xx'})
    with pytest.raises(RecordError): AttentionRecord((), {'language': 'en'})
