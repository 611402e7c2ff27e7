"Reports: what is written is read back, parts stay apart, answers follow from findings, chat backends keep to their schema."
import http.server, json, re, threading
from pathlib import Path
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from petvlm.chat import VQA_SCHEMA, LocalChatBackend, OpenAIBackend, SchemaError, contamination
from petvlm.findings import LANGUAGES, LESIONS, ORGANS, REGIONS, Finding
from petvlm.lexicon import LEXICA, sites_in
from petvlm.reports import finding_list, full_report, parse, write_report
from petvlm.vqa import ANSWERS, split, vqa_multi, vqa_single
from petvlm.wording import ReportError, site_name

REAL = Path(__file__).parents[2]/'shared/data/reports_vi'


def draw(seed, n=6, bare=.1):
    "Random findings that the phantom's table allows; some without size or SUVmax, some of unknown uptake."
    rng = np.random.default_rng(seed)
    def one(organ, kind, uptake):
        side = ('left', 'right')[int(rng.integers(2))] if ORGANS[organ].sided else ''
        if kind != 'uptake' and rng.random() < bare: uptake = 'unknown'
        size = None if rng.random() < bare else float(rng.uniform(8, 60))
        return Finding(organ, side, kind, size, float(rng.uniform(2, 30)) if uptake == 'increased' and rng.random() > bare else None, uptake)
    return [one(*LESIONS[int(i)]) for i in rng.integers(len(LESIONS), size=int(rng.integers(n + 1)))]


def facts(findings): return sorted((f.organ, f.side, f.kind, f.uptake, f.size_mm or -1, f.suvmax or -1) for f in findings)


@pytest.mark.parametrize('language', LANGUAGES)
def test_round_trip(language):
    for seed in range(1500):
        for region in REGIONS:
            r = write_report(draw([seed, 7]), region, language, seed)
            assert facts(parse(r.text, language)) == facts(r.findings), r.text


@pytest.mark.parametrize('language', LANGUAGES)
def test_every_lesion_alone_in_many_wordings(language):
    for organ, kind, uptake in LESIONS:
        for side in ('left', 'right') if ORGANS[organ].sided else ('',):
            for seed in range(20):
                r = write_report([Finding(organ, side, kind, 14., 6.1 if uptake == 'increased' else None, uptake)], ORGANS[organ].region, language, seed)
                assert facts(parse(r.text, language)) == facts(r.findings), r.text
                stated = r.text[slice(*r.findings[0].span)].lower()
                assert site_name(organ, '', language).removesuffix('a') in stated
                assert not side or {'vi': {'left': 'trái', 'right': 'phải'}, 'en': {'left': 'left', 'right': 'right'}}[language][side] in stated


@pytest.mark.parametrize('language', LANGUAGES)
def test_whole_report(language):
    for seed in range(200):
        found = draw([seed, 8], n=9)
        r = full_report({region: write_report(found, region, language, seed) for region in REGIONS})
        assert facts(parse(r.text, language)) == facts(r.findings), r.text
        assert all(re.sub(r'\W', '', site_name(f.organ, '', language).removesuffix('a').lower()) in re.sub(r'\W', '', r.text[slice(*f.span)].lower()) for f in r.findings)


def test_length_and_variety():
    words = [len(write_report(draw([s, 9], 4), region, 'vi', s).text.split()) for s in range(300) for region in REGIONS]
    assert 30 <= np.percentile(words, 1) and np.percentile(words, 99) <= 115
    f = Finding('lung', 'left', 'nodule', 14., 6.1, 'increased')
    stated = {r.text[slice(*r.findings[0].span)] for r in (write_report([f], 'chest', 'vi', s) for s in range(500))}
    assert 20 < len(stated) < 200
    assert write_report([f], 'chest', 'vi', 5) == write_report([f], 'chest', 'vi', 5)


def test_normal_sentences_never_vouch_for_an_organ_with_a_finding():
    for seed in range(200):
        r = write_report([Finding('pleura', 'left', 'effusion', 20., None, 'none')], 'chest', 'vi', seed)
        assert 'hông thấy tràn dịch' not in r.text and 'không có dịch' not in r.text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from('phổi trái phải hai bên nốt hạch cổ màng tràn dịch không thấy tăng chuyển hóa FDG (SUVmax: 6,1) 14 mm . ; , và Kết luận: sỏi thận có lớn nhất Hạch 3 x cm'.split()), max_size=40))
def test_parser_takes_any_text(tokens):
    for language in LANGUAGES: parse(' '.join(tokens), language)


def test_denial_is_not_a_finding():
    assert parse('Không thấy nốt ở phổi trái. Chưa phát hiện hạch to ở trung thất. Tim bắt FDG sinh lý.') == []
    assert parse('No nodule in the left lung. The liver has homogeneous density.', 'en') == []
    with pytest.raises(ReportError, match="'fr'"): parse('rien', 'fr')
    with pytest.raises(ReportError, match="'leg'"): write_report([], 'leg')


@pytest.mark.parametrize('language', LANGUAGES)
def test_separated_parts_do_not_contaminate_each_other(language):
    for seed in range(400):
        for region in REGIONS:
            r = write_report(draw([seed, 10]), region, language, seed)
            parts = split(r.text, language)
            assert set(parts) == {'PET', 'CT'} and all(parts.values()) and contamination(parts, language) is None, (r.text, parts)
            hot = {f.site for f in r.findings if f.uptake == 'increased'}
            assert {f.site for f in parse(parts['PET'], language)} == hot, (r.text, parts)
            assert {(f.site, f.kind) for f in parse(parts['CT'], language)} == {(f.site, f.kind) for f in r.findings if f.kind != 'uptake'}, (r.text, parts)


def test_answers_follow_from_findings():
    for seed in range(200):
        for region in REGIONS:
            r = write_report(draw([seed, 11], bare=0), region, 'vi', seed)
            single, multi = vqa_single(r, region, seed=seed), vqa_multi(r.text, region, seed=seed)
            assert single == vqa_single(r, region, seed=seed) and 2 <= len(multi) <= 4 and 3 <= len(single) <= 6
            assert {q['kind'] for q in single + multi} <= set(ANSWERS) | {'report'}
            for q in single:
                if q['kind'] == 'list': assert q['answer'].lower() == f'{finding_list(r.findings)}.'.lower()
                if q['kind'] == 'report': assert q['answer'] == r.text
                if q['kind'] == 'presence':
                    there = {f.site for f in r.findings} & set(sites_in(q['question'].lower(), LEXICA['vi']))
                    assert q['answer'].startswith('Có') == bool(there), q
            assert 'report' not in {q['kind'] for q in vqa_single(r.findings, region, seed=seed)}


def test_yes_and_no_are_balanced():
    asked = [q['answer'].startswith('Có') for s in range(500) for q in vqa_single(draw([s, 12], 9), REGIONS[s % 3], seed=s) if q['kind'] == 'presence']
    assert .3 < np.mean(asked) < .6


# ---------------------------------------------------------------- chat backends

class Endpoint:
    "A local server of OpenAI's chat protocol that plays back answers; an int is an HTTP error."
    def __init__(self, *answers):
        self.answers, self.requests, outer = list(answers), [], self
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                outer.requests.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
                answer = outer.answers.pop(0)
                message = {'role': 'assistant', 'content': answer}
                body = json.dumps({'id': '1', 'object': 'chat.completion', 'created': 0, 'model': 'm', 'choices': [{'index': 0, 'finish_reason': 'stop', 'message': message}]}).encode()
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header('Content-Type', 'application/json'); self.send_header('Content-Length', str(len(body))); self.end_headers()
                self.wfile.write(body)
            def log_message(self, *args): pass
        self.server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': .01}, daemon=True)

    def __enter__(self): self.thread.start(); return self
    def __exit__(self, *args): self.server.shutdown(); self.server.server_close()
    def backend(self, **options): return OpenAIBackend(f'http://127.0.0.1:{self.server.server_port}/v1', 'm', api_key='none', timeout=10, **options)


TEXT = 'Hạch cổ trái 14 mm, tăng chuyển hóa FDG (SUVmax: 5,2).'
GOOD = json.dumps({'PET': 'Tăng chuyển hóa FDG (SUVmax: 5,2) ở hạch cổ trái.', 'CT': 'Hạch cổ trái 14 mm.'}, ensure_ascii=False)


def test_endpoint_is_retried_until_the_answer_fits():
    with Endpoint('Xin lỗi.', '{"PET": "x"', GOOD) as e:
        assert split(TEXT, 'vi', e.backend())['CT'] == 'Hạch cổ trái 14 mm.'
        assert e.requests[0]['response_format']['json_schema']['strict'] and TEXT in e.requests[0]['messages'][0]['content']
        assert [len(r['messages']) for r in e.requests] == [1, 3, 5] and 'expected a JSON object' in e.requests[1]['messages'][-1]['content']


def test_endpoint_that_never_fits_is_refused():
    with Endpoint(*['{"PET": "a"}']*3) as e, pytest.raises(SchemaError, match="3 attempts.*'CT' is a required property"): split(TEXT, 'vi', e.backend())
    with Endpoint(*['{"PET": "Hạch 14 mm.", "CT": "Hạch."}']) as e, pytest.raises(SchemaError, match='belongs to the other part'): split(TEXT, 'vi', e.backend(retries=0))


def test_endpoint_server_error_is_retried_by_the_client():
    with Endpoint(500, GOOD) as e: assert split(TEXT, 'vi', e.backend(network_retries=1))['PET'].endswith('hạch cổ trái.')


def test_endpoint_asks_questions():
    items = [{'question': 'Có hạch cổ trái không?', 'answer': 'Có.', 'kind': 'presence'}]*3
    with Endpoint(json.dumps({'items': items}), json.dumps({'items': items})) as e:
        assert vqa_single(TEXT, 'head_neck', n=2, backend=e.backend()) == items[:2]
        assert vqa_multi(parse(TEXT), 'head_neck', backend=e.backend()) == items
        assert 'Hạch cổ trái' in e.requests[1]['messages'][0]['content'] or 'hạch cổ trái' in e.requests[1]['messages'][0]['content']


def test_local_model_through_transformers(tmp_path):
    tokenizers, transformers = pytest.importorskip('tokenizers'), pytest.importorskip('transformers')
    core = tokenizers.Tokenizer(tokenizers.models.BPE()); core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(); core.decoder = tokenizers.decoders.ByteLevel()
    core.train_from_iterator([TEXT, GOOD], tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=['<s>', '</s>'], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token='<s>', eos_token='</s>', pad_token='</s>')
    tok.chat_template = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
    cfg = transformers.MistralConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, pad_token_id=1)
    transformers.MistralForCausalLM(cfg).save_pretrained(tmp_path); tok.save_pretrained(tmp_path)
    backend = LocalChatBackend(str(tmp_path), max_new_tokens=4, retries=1)
    with pytest.raises(SchemaError, match='2 attempts'): split(TEXT, 'vi', backend)
    assert isinstance(backend.complete([{'role': 'user', 'content': TEXT}], VQA_SCHEMA), str)


# ---------------------------------------------------------------- real reports

@pytest.mark.skipif(not REAL.exists(), reason='real reports (../shared/data/reports_vi) are not here')
def test_real_reports_are_read_sensibly():
    pairs = json.loads((REAL/'pairs.json').read_text(encoding='utf-8'))
    assert all(contamination(split(p['ground_truth']), 'vi') is None for p in pairs)
    hit = total = 0
    for p in pairs:
        found = {f.site for f in parse(p['ground_truth'])}
        for lesion in p['extracted_ground_truth']:
            sites = set(sites_in(str(lesion['Vị trí của khối u, tổn thương, bất thường']).lower(), LEXICA['vi']))
            total += bool(sites); hit += bool(sites & found)
    assert total > 150 and hit/total > .8
