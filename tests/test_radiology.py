"RaTEScore, RadGraph-F1 and GREEN without their packages and models: what is refused, and the adapters on stand-ins that have the packages' interfaces (RaTEScore 0.6.0, radgraph 0.1.18, GREEN of 2025)."
import importlib.machinery, json, re, sys
from types import ModuleType
import numpy as np, pytest
from petvlm import radiology
from petvlm.metrics import METRICS, MetricError, label_of, score, score_each, tokenizer_of
from petvlm.radiology import LEVELS, NEEDS, checked_folder, graph_f1, green, green_of, radgraph_f1, ratescore, what_it_needs

@pytest.fixture
def folder(tmp_path):
    "A model folder as far as the check looks."
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'model.safetensors').write_bytes(b'')
    return tmp_path

def stand_in(monkeypatch, name, **content):
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module

# what is missing

@pytest.mark.parametrize('name', NEEDS)
def test_a_score_says_what_it_needs(name):
    with pytest.raises(MetricError) as e: score(['No effusion.'], ['No effusion.'], (name,))
    need = NEEDS[name]
    assert need.install in str(e.value) and need.licence in str(e.value) and all(f'"{k}"' in str(e.value) for k in need.files)
    assert METRICS[name].extra and tokenizer_of(name) == 'own' and label_of(name) == need.label

def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setattr(radiology, 'find_spec', lambda name: None)
    for call in (lambda: ratescore(['a b c'], ['a b c'], folder, folder), lambda: green(['a b c'], ['a b c'], folder)):
        with pytest.raises(MetricError, match='is not installed.*pip install'): call()

def test_a_package_that_cannot_be_imported_says_why(folder, monkeypatch):
    stand_in(monkeypatch, 'green_score')
    def broken(name): raise ImportError('No module named sentence_transformers')
    monkeypatch.setattr(radiology.importlib, 'import_module', broken)
    with pytest.raises(MetricError, match='sentence_transformers'): green(['a'], ['b'], folder)

@pytest.mark.parametrize('name,content,words', [
    ('pytorch_model.bin', '', 'pickles'), ('pytorch_model-00001-of-00002.bin', '', 'pickles'), ('weights.th', '', 'pickles'), ('model.pt', '', 'pickles'),
    ('config.json', '{"auto_map": {"AutoModel": "x.Y"}}', 'run code'), ('tokenizer_config.json', '{"auto_map": {}}', 'run code')])
def test_folders_with_pickles_or_code_are_refused(folder, name, content, words):
    (folder / name).write_text(content)
    with pytest.raises(MetricError, match=words): checked_folder(folder, 'green', 'model')

def test_folders_without_a_model_are_refused(folder):
    assert checked_folder(folder, 'green', 'model') == folder
    (folder / 'training_args.bin').write_text('')   # lies in GREEN's folder and is never read
    assert checked_folder(str(folder), 'green', 'model') == folder
    (folder / 'model.safetensors').unlink()
    with pytest.raises(MetricError, match='no safetensors'): checked_folder(folder, 'green', 'model')
    (folder / 'config.json').unlink()
    with pytest.raises(MetricError, match='no config.json'): checked_folder(folder, 'green', 'model')
    with pytest.raises(MetricError, match='"synonyms" is missing'): checked_folder(None, 'ratescore', 'synonyms')
    with pytest.raises(MetricError, match="unknown score 'chexbert'"): what_it_needs('chexbert')

# RaTEScore

def test_ratescore_hands_on_folders_and_keeps_pairs_together(folder, monkeypatch):
    made = []
    class RaTEScore:   # drops a report without sentences, as the package's does: pairs after it would shift
        def __init__(self, bert_model, eval_model, batch_size=1, use_gpu=True, visualization_path=None, affinity_matrix='long'): made.append((bert_model, eval_model, batch_size, use_gpu))
        def compute_score(self, candidate_list, reference_list):
            said, meant = ([t for t in side if len(t.strip()) > 2] for side in (candidate_list, reference_list))
            return [1. if s == m else .25 for s, m in zip(said, meant)]
    stand_in(monkeypatch, 'RaTEScore', RaTEScore=RaTEScore)
    radiology._rate_scorer.cache_clear()
    options = {'radiology': {'ratescore': {'entities': folder, 'synonyms': folder, 'gpu': False}}}
    said, meant = ['', 'No effusion.', 'Large heart.', 'Left nodule.'], ['No effusion.', 'No effusion.', ' ', 'Right nodule.']
    got = score_each(said, meant, ('ratescore',), options=options)['ratescore']
    radiology._rate_scorer.cache_clear()
    assert got.tolist() == [0, 100, 0, 25] and made == [(str(folder), str(folder), 8, False)]

# RadGraph

def graph(*entities): return {'entities': {str(i): {'tokens': t, 'label': label, 'relations': relations} for i, (t, label, relations) in enumerate(entities)}}

ABSENT, PRESENT, PLACE = 'Observation::definitely absent', 'Observation::definitely present', 'Anatomy::definitely present'

def test_graph_f1_by_hand():
    truth = graph(('Effusion', PRESENT, [['located_at', '2']]), ('small', PRESENT, [['modify', '0']]), ('pleura', PLACE, []))
    negated = graph(('Effusion', ABSENT, [['located_at', '2']]), ('small', PRESENT, [['modify', '0']]), ('pleura', PLACE, []))
    alone = graph(('Effusion', PRESENT, []))
    assert [graph_f1(truth, truth, level) for level in LEVELS] == [1, 1, 1]
    assert [graph_f1(negated, truth, level) for level in LEVELS] == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert [graph_f1(alone, truth, level) for level in LEVELS] == pytest.approx([2 / 4, 0, 0])     # the words are right; that something is somewhere is not said
    assert [graph_f1(graph(), truth, level) for level in LEVELS] == [graph_f1(graph(), graph(), level) for level in LEVELS] == [0, 0, 0]
    with pytest.raises(MetricError, match="unknown level 'partial'"): graph_f1(truth, truth, 'partial')

def test_the_graph_of_the_packages_readme():
    "'No evidence of pneumothorax following chest tube removal.' as radgraph 0.1.18 prints it; against the same report without the tube."
    found = json.loads('''{"text": "No evidence of pneumothorax following chest tube removal .", "entities": {
        "1": {"tokens": "pneumothorax", "label": "Observation::definitely absent", "start_ix": 3, "end_ix": 3, "relations": []},
        "2": {"tokens": "chest", "label": "Anatomy::definitely present", "start_ix": 5, "end_ix": 5, "relations": []},
        "3": {"tokens": "tube", "label": "Observation::definitely present", "start_ix": 6, "end_ix": 6, "relations": [["located_at", "2"]]}}}''')
    shorter = {'entities': {k: v for k, v in found['entities'].items() if k == '1'}}
    assert graph_f1(found, found, 'complete') == 1 and graph_f1(shorter, found, 'complete') == pytest.approx(2 * 1 / (1 + 3))

def test_annotations_are_looked_up_by_report(tmp_path):
    file = tmp_path / 'graphs.json'
    reports = {'Left nodule.': graph(('nodule', PRESENT, [['located_at', '1']]), ('left', PLACE, [])), 'Nodule.': graph(('nodule', PRESENT, []))}
    file.write_text(json.dumps(reports))
    got = radgraph_f1(['Nodule.', 'Left nodule.', ''], ['Left nodule.'] * 3, file, 'entity')
    assert got.tolist() == pytest.approx([2 / 3, 1, 0])
    with pytest.raises(MetricError, match='1 of 2 reports are not in it') as e: radgraph_f1(['Mr Smith has a nodule.'], ['Nodule.'], file)
    assert 'Smith' not in str(e.value)
    file.write_text('{')
    with pytest.raises(MetricError, match='not readable as JSON'): radgraph_f1(['Nodule.'], ['Nodule.'], file)

def test_options_go_to_the_score_they_name():
    with pytest.raises(MetricError, match=r"unknown options \['model'\]"): score(['a'], ['a'], ('green',), options={'radiology': {'model': 'folder'}})

# GREEN

ANSWER = '''[Explanation]:
Something.

[Clinically Significant Errors]:
(a) False report of a finding in the candidate: {a}. One; two
(b) Missing a finding present in the reference: {b}.
(f) Omitting a comparison detailing a change from a prior study: 0.

[Clinically Insignificant Errors]:
(a) False report of a finding in the candidate: 9. None of these count

[Matched Findings]:
{n}. Effusion; nodule'''

@pytest.mark.parametrize('a,b,n,wanted', [(0, 0, 2, 1), (2, 1, 3, .5), (0, 5, 0, 0), (1, 0, 4, .8)])
def test_green_counts_significant_errors_and_matches(a, b, n, wanted):
    assert green_of(ANSWER.format(a=a, b=b, n=n)) == pytest.approx(wanted)

def test_green_of_other_answers():
    none = re.sub(r'(?s)\(a\).*?\n\n', 'No significant errors.\n\n', ANSWER.format(a=0, b=0, n=3), count=1)
    numbered = ANSWER.format(a=2, b=1, n=3).replace('(a)', '(1)').replace('(b)', '(2)')
    assert green_of(none) == 1 and green_of(numbered) == .5 and green_of(ANSWER.format(a=0, b=0, n='No')) == 0
    assert green_of('') is green_of('The reports agree.') is green_of('[Matched Findings]:\n3. All') is None

def test_green_asks_the_packages_question_of_a_model_in_a_folder(tmp_path, monkeypatch, caplog):
    "A real, tiny, untrained Llama: its answers have no headings, so every pair counts 0, and the number of them is logged."
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    torch.manual_seed(0)
    letters = ['<unk>', '</s>', *sorted(set('\n<|>abcdefghijklmnopqrstuvwxyz. '))]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token='<unk>'))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token='</s>', unk_token='<unk>').save_pretrained(tmp_path)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1)).save_pretrained(tmp_path)
    asked = []
    stand_in(monkeypatch, 'green_score')
    stand_in(monkeypatch, 'green_score.utils', make_prompt=lambda reference, candidate: asked.append((reference, candidate)) or f'compare {candidate} to {reference}')
    got = green(['left nodule.', '', 'no nodule.'], ['right nodule.', 'no nodule.', 'no nodule.'], tmp_path, batch=2, tokens=4)
    assert got.tolist() == [0, 0, 0] and asked == [('right nodule.', 'left nodule.'), ('no nodule.', 'no nodule.')]
    assert '2 of 2 answers' in caplog.text

def test_green_puts_answers_back_in_their_places(folder, monkeypatch):
    stand_in(monkeypatch, 'green_score')
    stand_in(monkeypatch, 'green_score.utils', make_prompt=lambda reference, candidate: candidate)
    monkeypatch.setattr(radiology, '_green_model', lambda folder: (None, None))
    monkeypatch.setattr(radiology, '_answers', lambda tokenizer, model, requests, batch, tokens: [ANSWER.format(a=len(r) - 1, b=0, n=1) for r in requests])
    options = {'radiology': {'green': {'model': folder}}}
    assert score_each(['x', ' ', 'xx'], ['y', 'y', 'y'], ('green',), options=options)['green'].tolist() == pytest.approx([100, 0, 50])
    assert score(['x', ' ', 'xx'], ['y', 'y', 'y'], ('green',), options=options)['green'] == pytest.approx(50)
