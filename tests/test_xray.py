"Chest radiographs out of CT, their reports and rows, the 2-D vision transformer against transformers' own, content and topics, and their contrast."
import json
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from petvlm.config import Data
from petvlm.content_topic import ContentTopic, pooled, split
from petvlm.contrast import content_topic_loss, embed_text, equal_texts, hidden_text, info_nce
from petvlm.encoders import EncoderError
from petvlm.findings import LESIONS, ORGANS, Finding, Study
from petvlm.fusion import FusionError
from petvlm.language import tiny_causal_lm, train_tokenizer
from petvlm.layouts import iu_rows
from petvlm.lexicon import LEXICA
from petvlm.losses import LossError, clip_loss
from petvlm.phantom import draw, sample_patient
from petvlm.prepare import PrepareError
from petvlm.projectors import LinearProjector
from petvlm.radiograph import MU_WATER, VIEWS, NoLungs, RadiographError, chest, place, project, radiograph_report, shown, topics, transmission, visible
from petvlm.radiographs import iu_records, radiograph_rows, text_topics
from petvlm.reports import parse
from petvlm.sources import SourceError, drawn_study
from petvlm.tokens import Tokens
from petvlm.vit2d import ViT2D, vit_from_hf
from petvlm.volume import Volume
from petvlm.wording import ReportError

DATA = Data('radiographs', 'en', 0, 3, 0, 1, (2, 64, 64), 10., 8, 10., (-1000., 1000.))

@pytest.fixture(scope='module')
def ct() -> Volume: return draw(sample_patient(11)).volumes['ct']

def with_ball(ct: Volume, at, radius=15., hu=40.) -> Volume:
    "`ct` with a ball of soft tissue around LPS `at`."
    where = ct.world(np.moveaxis(np.indices(ct.shape), 0, -1))
    return ct.replace(data=np.where(((where - at)**2).sum(-1) < radius**2, hu, ct.data))

def added(a: Volume, b: Volume, view: str) -> np.ndarray:
    "Line integral that `b` has more than `a`."
    return -np.log(transmission(b, view)/transmission(a, view))

# --- the picture

@pytest.mark.parametrize('side', (-1, 1))
@pytest.mark.parametrize('view', VIEWS)
def test_a_ball_is_seen_where_place_says(ct, side, view):
    x, y, z = chest(ct).centre
    at = np.array([x + side*65., y + 15, z + 40])
    more = added(ct, with_ball(ct, at), view)
    r, c = np.array([more.sum(1), more.sum(0)])/more.sum() @ np.arange(64)          # centre of gravity
    assert np.abs(np.subtract((r, c), place(at, ct, view))).max() < .5
    assert r < 31.5                                                                 # above the middle of the lungs: nearer the top
    if view == 'frontal': assert (c > 31.5) == (side > 0)                           # the patient's left is the picture's right
    else: assert c > 31.5                                                           # behind the middle: the right side, for the patient faces left

def test_height_and_area_of_what_is_added_are_those_of_the_ball(ct):
    at = np.add(chest(ct).centre, (65., 15, 40))
    ball = with_ball(ct, at)
    mass = (np.maximum(ball.data, -1000) - np.maximum(ct.data, -1000)).sum()/1000*MU_WATER*np.prod(ct.spacing)
    for view in VIEWS: assert abs(added(ct, ball, view).sum()*6*6/mass - 1) < .03   # mm of line integral times mm2 of a pixel

def test_how_the_scan_is_stored_does_not_matter(ct):
    m = ct.affine[:, [2, 0, 1, 3]].copy(); m[:3, 3] += m[:3, 1]*(ct.shape[0] - 1); m[:3, 1] *= -1
    stored = Volume(ct.data.transpose(2, 0, 1)[:, ::-1], m, 'HU')
    for view in VIEWS: assert np.array_equal(project(stored, view), project(ct, view))

def test_a_tilted_scan_is_put_upright(ct):
    a = np.deg2rad(7); turn = np.eye(4); turn[1:3, 1:3] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]     # about x: a gantry's tilt
    from scipy import ndimage as ndi
    affine = turn @ ct.affine
    to = np.linalg.inv(ct.affine) @ affine                                           # index of the tilted grid -> index of the upright one
    tilted = Volume(ndi.affine_transform(ct.data, to[:3, :3], to[:3, 3], order=1, cval=-1000), affine, 'HU')
    assert np.abs(project(tilted, 'lateral') - project(ct, 'lateral')).mean() < .03 < np.abs(project(ct.replace(data=tilted.data), 'lateral') - project(ct, 'lateral')).mean()
    at = np.add(chest(ct).centre, (65., 15, 40))
    assert np.abs(np.subtract(place(at, tilted), place(at, ct))).max() < 2

def test_the_table_is_not_in_the_picture(ct):
    y = np.flatnonzero((ct.data > -500).any((0, 2))).max()
    with_table = ct.replace(data=ct.data.copy()); with_table.data[:, y+4:y+6] = 200.
    for view in VIEWS: assert np.abs(project(with_table, view) - project(ct, view)).max() < .05

def test_finer_voxels_and_finer_pixels_show_the_same(ct):
    fine = draw(sample_patient(11), (3., 3., 3.)).volumes['ct']
    for view in VIEWS:
        assert np.corrcoef(project(fine, view).ravel(), project(ct, view).ravel())[0, 1] > .99
        blocks = project(ct, view, (128, 128)).reshape(64, 2, 64, 2).mean((1, 3))
        assert np.abs(blocks - project(ct, view)).mean() < .02
    r, c = place((50., 0, chest(ct).centre[2]), ct, 'frontal', (128, 128))
    r2, c2 = place((50., 0, chest(ct).centre[2]), ct)
    assert np.allclose([(r + .5)/2, (c + .5)/2], [r2 + .5, c2 + .5])

def test_what_cannot_be_projected_is_refused(ct):
    with pytest.raises(RadiographError, match='oblique'): project(ct, 'oblique')
    with pytest.raises(RadiographError, match='SUVbw'): project(ct.replace(unit='SUVbw'))
    with pytest.raises(NoLungs, match='covers the chest'): project(ct.slab(ct.shape[0] - 40, ct.shape[0]))

# --- the report

def sites(findings): return sorted({f.site for f in findings})

@pytest.mark.parametrize('language', ['en', 'vi'])
def test_two_hundred_patients_are_read_back(language):
    for seed in range(1000, 1200):
        there = [l.finding for l in sample_patient(seed).lesions]
        text, sections = radiograph_report(there, seed, language)
        assert sites(parse(text, language)) == sites(f for f in there if visible(f)), text
        assert not LEXICA[language].metabolic.search(text) and sections['findings'] in text and sections['impression'] in text

@pytest.mark.parametrize('language', ['en', 'vi'])
def test_each_kind_in_many_wordings_and_what_no_radiograph_shows(language):
    for organ, kind, uptake in LESIONS:
        for seed in range(12):
            f = Finding(organ, ('left', 'right')[seed % 2] if ORGANS[organ].sided else '', kind, 20., 7. if uptake == 'increased' else None, uptake)
            read = parse(radiograph_report([f], [seed, 5], language)[0], language)
            assert [(g.site, g.kind, g.size_mm) for g in read] == ([(f.site, f.kind, 20.)] if visible(f) else [])
    assert not any(map(visible, (Finding('lung', 'left', 'nodule', 6.), Finding('lung', 'left', 'nodule'), Finding('liver', '', 'mass', 40.), Finding('lung', 'left', 'uptake', 30., 9., 'increased'))))

def test_topics_follow_from_what_is_shown():
    findings = [Finding('pleura', 'left', 'effusion', 30.), Finding('lung', 'left', 'mass', 30.), Finding('lung', 'right', 'nodule', 20.), Finding('esophagus', '', 'mass', 40.)]
    assert topics(findings) == ['lung', 'pleura'] and topics(findings[3:]) == ['normal'] and topics((), 'vi') == ['bình thường']
    assert len(shown(findings)) == 3 and radiograph_report(findings, 1) == radiograph_report(findings, 1) != radiograph_report(findings, 2)
    with pytest.raises(ReportError): radiograph_report(findings, 1, 'de')

# --- rows

def test_rows_hold_what_the_text_says():
    for seed in range(8):
        study = drawn_study(seed)
        (arrays, rec), = radiograph_rows(study, DATA)
        assert arrays['xray'].shape == (2, 64, 64) and arrays['xray'].dtype == np.float16 and 0 <= arrays['xray'].min() and arrays['xray'].max() <= 1
        assert sites(parse(rec['text'], 'en')) == sorted({(f['organ'], f['side']) for f in rec['findings']}) and json.loads(json.dumps(rec))['kind'] == 'radiograph'
        for f in rec['findings']:
            (_, r, c), (_, r2, _) = f['voxel']
            assert r == r2 and f['voxel'] == [[i, *np.round(place(f['center_mm'], study.volumes['ct'], v), 2)] for i, v in enumerate(VIEWS)]
            if f['side']: assert (c > 31.5) == (f['side'] == 'left')

def test_what_lies_beside_the_field_is_not_spoken_of():
    study = drawn_study(3)
    far = Finding('axillary_node', 'left', 'calcification', 20., center_mm=(400., 0., chest(study.volumes['ct']).centre[2]))
    (_, rec), = radiograph_rows(Study('far', study.volumes, (far,), study.reports), DATA)
    assert rec['findings'] == [] and parse(rec['text'], 'en') == [] and rec['parts']['topic'] == 'normal'

def test_who_gives_no_row():
    study = drawn_study(3)
    assert radiograph_rows(Study('no ct', {'pet': study.volumes['pet']}, (), study.reports), DATA) == [] == radiograph_rows(Study('unread', study.volumes), DATA)
    with pytest.raises(RadiographError, match='unit 1'): radiograph_rows(Study('x', {'ct': study.volumes['ct'].replace(unit='1')}, (), study.reports), DATA)
    with pytest.raises(PrepareError): radiograph_rows(study, Data('radiographs', 'en', 0, 3, 0, 1, (1, 64, 64), 10., 8, 10., (-1000., 1000.)))

def test_iu_files_become_the_same_rows(tmp_path):
    (tmp_path/'images/CXR1').mkdir(parents=True)
    Image.fromarray(np.full((40, 30, 3), (51, 51, 51), np.uint8)).save(tmp_path/'images/CXR1/0.png'); Image.fromarray(np.full((40, 30), 13107, np.uint16)).save(tmp_path/'images/CXR1/1.png')
    listing = tmp_path/'annotation.json'
    write = lambda **kw: listing.write_text(json.dumps({'val': [{'id': 'CXR1', 'report': 'No pleural effusion. A nodule in the right lung.', 'image_path': ['CXR1/0.png', 'CXR1/1.png'], 'split': 'val'} | kw]}))
    write(); (split_, (arrays, rec)), = iu_records(listing, DATA)
    assert split_ == 'validation' and np.allclose(arrays['xray'], .2, atol=1e-3) and arrays['xray'].shape == (2, 64, 64)
    (_, drawn), = radiograph_rows(drawn_study(3), DATA)
    assert set(rec) == set(drawn) - {"single"} and set(rec['parts']) == set(drawn['parts']) and rec['parts']['topic'] == 'lung'
    (tmp_path/'images/CXR1/text.png').write_text('not an image')
    for paths, message in ((['CXR1/0.png'], '1 pictures'), (['CXR1/0.png', 'CXR1/2.png'], 'no such file'), (['CXR1/0.png', 'CXR1/text.png'], 'not an image'), (['CXR1/0.png', '../x.png'], 'leads out')):
        write(image_path=paths)
        with pytest.raises(SourceError, match=message): list(iu_records(listing, DATA))

def test_topics_of_the_real_iu_reports():
    path = Path(__file__).parents[2]/'shared/data/reports_cxr/annotation.json'
    if not path.exists(): pytest.skip(f'{path} is not here: it cannot be shipped with the project')
    about = [text_topics(report) for *_, report in iu_rows(path)]
    assert .35 < sum(t == ['normal'] for t in about)/len(about) < .5 and len({tuple(t) for t in about}) > 50

# --- ViT

def published(cls=ViTModel, **kw):
    "A small transformers ViT with random weights, biases and norms too."
    torch.manual_seed(0)
    model = cls(ViTConfig(**(dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8) | kw))).eval()
    with torch.no_grad(): [p.normal_(std=.15) for p in model.parameters()]
    return model

@torch.no_grad()
@pytest.mark.parametrize('bias', (True, False))
def test_vit_equals_transformers(bias):
    theirs = published(qkv_bias=bias); x = torch.rand(2, 3, 2, 32, 32)
    want = torch.stack([theirs(x[:, :, i]).last_hidden_state for i in (0, 1)], 1)
    mine = vit_from_hf(theirs.state_dict(), heads=4, gray=None, mean=0, std=1).eval()
    assert (mine.sequence(x) - want).abs().max() < 1e-5
    assert torch.equal(mine(x).lattice(), Tokens(mine.sequence(x)[:, :, 1:].flatten(1, 2), (2, 4, 4)).lattice()) and mine.grid == (2, 4, 4) and mine.image_size == (2, 32, 32)

@torch.no_grad()
@pytest.mark.parametrize('gray, factor', [('sum', 1), ('mean', 1/3)])
def test_one_channel_is_the_sum_or_the_mean_of_three(gray, factor):
    theirs = published(); x = torch.rand(2, 1, 2, 32, 32)
    norm = torch.tensor([.485, .456, .406]).view(3, 1, 1), torch.tensor([.229, .224, .225]).view(3, 1, 1)
    want = torch.stack([theirs((x[:, :, i] - norm[0])/norm[1]*factor).last_hidden_state for i in (0, 1)], 1)
    mine = vit_from_hf(theirs.state_dict(), heads=4, gray=gray, mean=norm[0].flatten().tolist(), std=norm[1].flatten().tolist()).eval()
    assert (mine.sequence(x) - want).abs().max() < 1e-5

@torch.no_grad()
@pytest.mark.parametrize('size', [(48, 48), (24, 40)])
def test_another_size_interpolates_positions_as_transformers_does(size):
    theirs = published(); x = torch.rand(2, 1, 1, *size)
    want = theirs((x[:, :, 0].expand(-1, 3, -1, -1) - .5)/.5, interpolate_pos_encoding=True).last_hidden_state
    assert (vit_from_hf(theirs.state_dict(), (1, *size), 4).eval().sequence(x)[:, 0] - want).abs().max() < 1e-5

@torch.no_grad()
def test_the_names_in_files_are_read_too(tmp_path):
    theirs = published(ViTForImageClassification); theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path/'model.safetensors')
    assert 'vit.encoder.layer.0.attention.attention.query.weight' in state
    a, b = vit_from_hf(state, heads=4), vit_from_hf(theirs.state_dict(), heads=4)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())

def test_a_checkpoint_that_does_not_fit_is_refused():
    state = published().state_dict()
    with pytest.raises(EncoderError, match='no place for'): vit_from_hf(state | {'extra.weight': torch.zeros(3)}, heads=4)
    with pytest.raises(EncoderError, match='missing'): vit_from_hf({k: v for k, v in state.items() if 'layers.1.attention.k_proj.weight' not in k}, heads=4)
    with pytest.raises(EncoderError, match='Hugging Face'): vit_from_hf({'conv_proj.weight': torch.zeros(3)})
    with pytest.raises(EncoderError, match='shapes differ'): vit_from_hf(state | {'layernorm.weight': torch.zeros(3)}, heads=4)
    with pytest.raises(EncoderError, match="'max'"): vit_from_hf(state, heads=4, gray='max')
    with pytest.raises(EncoderError, match=r'\(B, 1, 2, 24, 24\)'): ViT2D((2, 24, 24), 8, dim=32, depth=1, heads=2, mlp_dim=32)(torch.zeros(1, 1, 1, 24, 24))

# --- content and topics

@pytest.mark.parametrize('order', ['content_first', 'topics_first'])
@pytest.mark.parametrize('topics_read', ['content', 'visual'])
def test_parts_survive_projection(order, topics_read):
    torch.manual_seed(0)
    fuse = ContentTopic(32, 24, topics=3, topic_depth=2, text_dim=40, order=order, topics_read=topics_read)
    out = fuse(Tokens(torch.randn(2, 24, 32), (2, 3, 4)))
    content, topic = split(LinearProjector(32, 64)(out))
    assert out.grid == (1, 1, 27) and content.grid == (2, 3, 4) and content.x.shape == (2, 24, 64) and topic.shape == (2, 3, 64)
    assert torch.allclose(pooled(out)[1], fuse.split(out)[1].mean(1)) and torch.allclose(pooled(out)[0], fuse.split(out)[0].x.mean(1))
    topic.sum().backward()
    assert fuse.queries.grad.abs().sum() > 0 and (topics_read == 'content') == bool(fuse.content[0].mlp[0].weight.grad.any())

def test_what_content_topic_refuses():
    fuse = ContentTopic(32, 24, topics=3)
    with pytest.raises(FusionError, match='16 wide'): fuse(Tokens(torch.zeros(1, 24, 16), (2, 3, 4)))
    with pytest.raises(FusionError, match='topics=5 and text_dim=48'): fuse.init_topics(torch.zeros(5, 48))
    for kw, message in (({'order': 'last'}, "'last'"), ({'topics_read': 'text'}, "'text'"), ({'topics': 0}, 'at least 1'), ({'heads': 5}, 'no multiple')):
        with pytest.raises(FusionError, match=message): ContentTopic(32, **kw)

# --- the contrast

def by_hand(v, t, same, tau):
    "Symmetric InfoNCE in numpy, `same` rows left out of each other's denominators."
    unit = lambda x: x/np.linalg.norm(x, axis=1, keepdims=True)
    e, n = np.exp(unit(v) @ unit(t).T/tau), len(v)
    others = lambda i: [j for j in range(n) if j == i or not same[i][j]]
    return -sum(np.log(e[i, i]/sum(e[i, j] for j in others(i))) + np.log(e[i, i]/sum(e[j, i] for j in others(i))) for i in range(n))/2/n

def test_the_loss_in_closed_form_with_repeated_topics():
    rng = np.random.default_rng(0)
    content, topic, text = (rng.normal(size=(5, 24)) for _ in range(3))
    words = rng.normal(size=(3, 24))[[0, 1, 0, 2, 0]]
    alone, same = np.eye(5, dtype=bool), np.equal.outer([0, 1, 0, 2, 0], [0, 1, 0, 2, 0])
    given = [torch.tensor(x, dtype=torch.float32) for x in (content, topic, text, words)]
    for masked, s in ((True, same), (False, alone)):
        want = (by_hand(content, text, alone, .07) + by_hand(topic, words, s, .07))/2
        assert abs(content_topic_loss(*given, tau=.07, mask_equal=masked).item() - want) < 1e-4*want
    assert torch.isclose(info_nce(given[0], given[2], .07, mask_equal=False), clip_loss(given[0], given[2], .07, symmetric=True))

def test_all_the_same_topic_teaches_nothing():
    v = torch.randn(4, 8, requires_grad=True)
    loss = info_nce(v, torch.ones(4, 8)); loss.backward()
    assert loss == 0 and not v.grad.any()

def test_the_text_side_has_no_gradient_and_no_padding():
    torch.manual_seed(0)
    tokenizer = train_tokenizer(['the left lung', 'pleural effusion']*5, 300)
    lm = tiny_causal_lm('llama', tokenizer, hidden_size=32, layers=2, attention_dropout=.5).train()
    texts = ['lung', 'pleural effusion on the left side']
    batch = tokenizer(texts, return_tensors='pt', padding=True); ids, mask = batch['input_ids'], batch['attention_mask']
    for f, given in ((embed_text, lm.get_input_embeddings()), (hidden_text, lm)):
        both = f(given, ids, mask)
        alone = f(given, *(tokenizer(texts[:1], return_tensors='pt')[k] for k in ('input_ids', 'attention_mask')))
        assert torch.allclose(both[:1], alone, atol=1e-5) and both.shape == (2, 32) and not both.requires_grad and lm.training
    image = torch.randn(2, 32, requires_grad=True)
    content_topic_loss(image, image, embed_text(lm.get_input_embeddings(), ids, mask), hidden_text(lm, ids, mask)).backward()
    assert image.grad.abs().sum() > 0 and all(p.grad is None for p in lm.parameters())
    bf16 = lm.to(torch.bfloat16)
    assert embed_text(bf16.get_input_embeddings(), ids, mask).dtype == torch.float32
    with pytest.raises(LossError, match='1 of 2 texts are empty'): embed_text(lm.get_input_embeddings(), ids, mask*torch.tensor([[0], [1]]))
    with pytest.raises(LossError, match='2 images and 3 texts'): info_nce(image, torch.zeros(3, 32))

def test_equal_texts_are_known_under_autocast_too():
    "bfloat16 has no number between 1 and 1 - 1/256: without float32 no text would equal another."
    g = torch.Generator().manual_seed(0); image, text = torch.randn(6, 32, generator=g), torch.randn(6, 32, generator=g); text[3] = text[0]
    plain = info_nce(image, text); assert not torch.isclose(plain, info_nce(image, text, mask_equal=False))
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(info_nce(image, text), plain) and equal_texts(text)[0, 3]
