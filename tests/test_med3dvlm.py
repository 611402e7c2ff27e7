"Med3DVLM's parts against the published code, by weights filled in by name."
import numpy as np, pytest, torch
from petvlm.checkpoints import load_published
from petvlm.dcformer import SIZES
from petvlm.mixers import DualMLP
from petvlm.siglip import siglip_logits, siglip_loss
from petvlm.tokens import Tokens
from parity import difference, expected, fixture, tensor, weights

def dcformer(name: str):
    model, audit = load_published('med3dvlm.dcformer', weights(fixture(f'dcformer_{name}')), image_size=(32, 64, 64))
    assert (audit.sizes['dims'], audit.sizes['blocks']) == SIZES[name] and not audit.passed_over and all(k.endswith('num_batches_tracked') for k in audit.kept)
    return model, audit

@pytest.mark.parametrize('name', ['nano', 'small'])
@torch.no_grad()
def test_every_state_equals_the_published_encoder(name):
    states = dcformer(name)[0].states(tensor(fixture(f'dcformer_{name}')['input']['x']))
    for i, t in enumerate(states):
        assert difference(f'dcformer_{name}', f'hidden{i}', t.x).max() < 1e-4*t.x.std()

@torch.no_grad()
def test_batch_statistics_move_as_published():
    (model, audit), meta = dcformer('nano'), fixture('dcformer_nano_train')
    last = model.train()(tensor(meta['input']['x']))
    assert difference('dcformer_nano_train', 'hidden4', last.x).max() < 1e-4
    for key in meta['outputs']:
        if key != 'hidden4':
            assert difference('dcformer_nano_train', key, model.state_dict()[audit.mapped[key]]).max() < 1e-6, key

def streams(name: str) -> Tokens:
    "The fixture's coarse tokens, with the fine ones behind them."
    low, high = (tensor(fixture(name)['input'][k]) for k in ('low', 'high'))
    return Tokens(high, (1, 1, high.shape[1]), fine=Tokens(low, (1, 1, low.shape[1])))

@pytest.mark.parametrize('name', ['mixer_reduced', 'mixer_full'])
@torch.no_grad()
def test_the_mixer_equals_the_published_projector(name):
    model, audit = load_published('med3dvlm.mixer', weights(fixture(name)))
    assert not audit.passed_over and not audit.kept
    assert difference(name, 'out', model(streams(name)).x).max() < 1e-5

@torch.no_grad()
def test_the_dual_mlp_equals_the_published_projector():
    c = fixture('low_high_mlp_reduced')['config']
    model = DualMLP(c['output_size'], c['low_input_size'], c['high_input_size'])
    names = {'low_up_mlp': 'low', 'high_up_mlp': 'high', 'mm_projector': 'net'}
    model.load_state_dict({'.'.join(names.get(p, p) for p in k.split('.')): v for k, v in weights(fixture('low_high_mlp_reduced')).items()})
    assert difference('low_high_mlp_reduced', 'out', model(streams('low_high_mlp_reduced')).x).max() < 1e-5

FORMS = {'med3dvlm_dist_world1': ('symmetrised', np.log(1/.07), 0., 't'), 'med3dvlm_single_process': ('single_process', np.log(1/.07), 0., 't'),
         'textbook_siglip_clip_init': ('textbook', np.log(1/.07), 0., 't_prime'), 'textbook_siglip_siglip_init': ('textbook', np.log(10), -10., 't_prime')}

@pytest.mark.parametrize('name', FORMS)
def test_each_form_of_the_sigmoid_loss_and_its_gradients(name):
    form, t, b, t_name = FORMS[name]
    given = fixture('losses')['input']
    image, text = (tensor(given[k]).requires_grad_() for k in ('image', 'text'))
    t, b = (torch.tensor(float(v), requires_grad=True) for v in (t, b))
    loss = siglip_loss(image, text, t, b, form)
    grads = torch.autograd.grad(loss, (image, text, t, b))
    assert difference('losses', f'{name}.loss', loss).max() < 1e-5*loss
    for key, g in zip(('image', 'text', t_name, 'bias'), grads): assert difference('losses', f'{name}.grad_{key}', g).max() < 1e-5*max(1, g.abs().max()), key
    if f'{name}.logits' in expected('losses'): assert difference('losses', f'{name}.logits', siglip_logits(image, text, t, b, form)).max() < 1e-5
