"Served models: what is sent, what is not, and what happens when the other side fails. Everything against a server on this machine."
import base64, dataclasses, functools, http.server, io, json, threading, time
import numpy as np, pytest
from PIL import Image
from petvlm.chat import ChatError, OpenAIBackend, Said
from petvlm.config import Part, resolve
from petvlm.datasets import Rows
from petvlm.endpoint import Endpoint, EndpointError, SHOWN, answered_by, ask_endpoint, beside, endpoint_of, endpoint_writer, examples, pictures, plate, png, request, served
from petvlm.rows import prepare_rows
from petvlm.sources import drawn_study

NAME = 'NGUYEN VAN A 1961'                                   # whom no request may name
KINDS = {'regions': 'vipet', 'scans': 'med3dvlm', 'lesions': 'petar', 'radiographs': 'content_topic'}

class Server:
    "Plays back actions, the last one for ever: a text is an answer, an int an HTTP error, 'bad' broken JSON, 'other' JSON that is no completion, 'refuses' a refusal, a float seconds of silence. Keeps requests and keys."
    def __init__(self, *actions):
        self.actions, self.requests, self.keys, outer = list(actions), [], [], self
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                outer.requests.append(json.loads(self.rfile.read(int(self.headers['Content-Length'])))); outer.keys.append(self.headers['Authorization'])
                act = outer.actions.pop(0) if len(outer.actions) > 1 else outer.actions[0]
                if isinstance(act, float): time.sleep(act)
                message = {'role': 'assistant', 'content': None, 'refusal': 'I cannot help with that.'} if act == 'refuses' else {'role': 'assistant', 'content': str(act)}
                reply = {'id': '1', 'object': 'chat.completion', 'created': 0, 'model': 'served-2', 'choices': [{'index': 0, 'finish_reason': 'stop', 'message': message}]}
                body = {'bad': b'{"choices": [', 'other': b'{"status": "ok"}'}.get(act, json.dumps(reply).encode())
                self.send_response(act if isinstance(act, int) else 200)
                self.send_header('Content-Type', 'application/json'); self.send_header('Content-Length', str(len(body))); self.end_headers()
                try: self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError): pass          # who asked has given up
            def log_message(self, *args): pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={'poll_interval': .01}, daemon=True).start()

    def __enter__(self): return self
    def __exit__(self, *args): self.server.shutdown(); self.server.server_close()
    @property
    def url(self): return f'http://127.0.0.1:{self.server.server_port}/v1'
    def endpoint(self, **kw): return Endpoint(self.url, 'm', **{'retries': 1, 'timeout': 10., 'slices': 2, 'pixels': 96} | kw)

@functools.cache
def config(kind): return resolve(KINDS[kind], 'smoke')

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Prepared rows of each kind; every patient has the same telling name in front."
    root = tmp_path_factory.mktemp('prepared')
    @functools.cache
    def of(kind):
        jobs = [(s, functools.partial(drawn_study, n)) for s, n in (('train', 1), ('train', 2), ('test', 3), ('test', 5))]
        folder = prepare_rows(jobs, root/kind, config(kind).data, workers=1)
        lines = [json.loads(line) for line in open(folder/'rows.jsonl', encoding='utf-8')]
        (folder/'rows.jsonl').write_text('\n'.join(json.dumps(r | {'patient': f"{NAME} {r['patient']}"}, ensure_ascii=False) for r in lines), encoding='utf-8')
        return folder
    return of

def held(folders, kind, split='test'): return Rows(folders(kind), split, config(kind).data.suv_max)

def images(sent: dict) -> list[np.ndarray]:
    "The decoded images of a request; PNG files with nothing in them but pixels."
    out = []
    for part in sent['messages'][-1]['content']:
        if part['type'] != 'image_url': continue
        head, data = part['image_url']['url'].split(',', 1); image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert head == 'data:image/png;base64' and image.format == 'PNG' and image.info == {} and image.mode == 'RGB'
        out.append(np.asarray(image).astype(int))
    return out

def marked(x: np.ndarray) -> bool:
    "Yellow letters at the left edge and at the right one."
    yellow = (x[..., 0] > 180) & (x[..., 1] > 140) & (x[..., 2] < 90)
    return yellow[:, :24].any() and yellow[:, -24:].any()

COUNT = {'regions': 3, 'scans': 4, 'lesions': 2, 'radiographs': 2}

@pytest.mark.parametrize('kind', KINDS)
def test_what_is_sent(folders, kind, tmp_path, caplog):
    rows, cfg = held(folders, kind), config(kind)
    with Server('said') as s: assert ask_endpoint(s.endpoint(shots=2), rows, [(0, 'Report this.')], cfg, tmp_path, progress=False) == ['said']
    sent, = s.requests
    assert [m['role'] for m in sent['messages']] == ['system', *['user', 'assistant']*2, 'user'] and sent['temperature'] == 0 and sent['model'] == 'm' and sent['max_tokens'] == 512
    seen, shown = images(sent), pictures(s.endpoint(), rows, 0, cfg.data)
    assert len(seen) == COUNT[kind] and all(np.array_equal(x, p.pixels) and marked(x) for x, p in zip(seen, shown))
    assert all(96 in x.shape[:2] or x.shape[1] > 96 for x in seen) and max(x.shape[0] for x in seen) <= 96
    words = json.dumps(sent, ensure_ascii=False)
    assert NAME not in words and not any(r['patient'].split()[-1] in words for r in rows.records)
    train = {r['text'] for r in held(folders, kind, 'train').records}
    assert {m['content'] for m in sent['messages'] if m['role'] == 'assistant'} <= train and rows.records[0]['text'] not in words
    assert 'go to' not in caplog.text                        # it stayed on this machine

@pytest.mark.parametrize('kind,task', [('regions', 'single'), ('scans', 'open'), ('scans', 'closed')])
def test_questions_come_with_examples_of_their_kind(folders, kind, task):
    rows, train = held(folders, kind), held(folders, kind, 'train')
    q = rows.records[0][task][0]
    pairs = {(x['question'], x['answer']): x.get('category', '') for r in train.records for x in r[task]}
    found = examples(train, rows.records[0], q['question'], config(kind), 2, [0, 0])
    assert len(found) == 2 and {pairs[x] for x in found} == {q.get('category', '')} and found == examples(train, rows.records[0], q['question'], config(kind), 2, [0, 0])

def test_right_is_on_the_left():
    "A hot spot at the patient's left (large w) lies on the right of the projection, by the letter L; one near the head lies high."
    pet, record = np.zeros((12, 10, 16), np.float32), {'affine': [[0, 0, 4, 0], [0, 4, 0, 0], [5, 0, 0, 0], [0, 0, 0, 1]]}
    pet[9:11, 4:6, 12:14] = 1
    e, data = Endpoint('http://x/v1', 'm', pixels=128), config('regions').data
    front = SHOWN['regions'][1]({'pet': pet, 'ct': np.zeros_like(pet)}, record, data, e)[0].pixels
    width = 128                                              # 16 x 4 mm are the longer side, 12 x 5 mm the shorter
    dark = np.argwhere(front[:120, 14:width - 14].max(-1) < 40) + (0, 14)
    assert dark[:, 1].mean() > .7*width and dark[:, 0].mean() < front.shape[0]*.3

def test_plates_keep_millimetres_and_outline_masks():
    x = np.zeros((10, 20)); mask = np.zeros((10, 20), bool); mask[4:7, 5:9] = True
    p = plate(x, (3., 1.), mask=mask, pixels=90)
    assert p.shape == (90, 60, 3)
    red = np.argwhere((p == (255, 0, 0)).all(-1))
    assert red.min(0).tolist() == [36, 15] and red.max(0).tolist() == [62, 26] and (p[48, 20] == 0).all()
    assert beside(p, p[:50]).shape == (90, 124, 3) and Image.open(io.BytesIO(png(p))).size == (60, 90)

def test_a_lesion_is_outlined_and_other_arms_show_other_things(folders):
    rows, data, e = held(folders, 'lesions'), config('lesions').data, Endpoint('http://x/v1', 'm', pixels=96)
    other = np.roll(np.arange(len(rows)), 1)
    arms = {arm: [p.pixels for p in pictures(e, rows, 1, data, arm, other)] for arm in ('real', 'shuffled', 'noise', 'ct_shuffled')}
    assert all((x == (255, 0, 0)).all(-1).any() for shown in arms.values() for x in shown)
    alike = lambda a, b: a.shape == b.shape and np.array_equal(a, b)
    assert all(alike(a, b) for a, b in zip(arms['shuffled'], [p.pixels for p in pictures(e, rows, int(other[1]), data)]))
    assert not any(alike(a, b) for arm in ('shuffled', 'noise', 'ct_shuffled') for a, b in zip(arms['real'][:1], arms[arm][:1]))

# ---------------------------------------------------------------- the other side

ASKED = [(0, 'Hãy viết báo cáo.'), (1, 'Hãy viết báo cáo.'), (0, 'Có tổn thương không?')]

def test_what_was_answered_is_not_asked_again(folders, tmp_path):
    rows, cfg = held(folders, 'regions'), config('regions')
    with Server('a', 'b', 'c', 'd') as s:
        run = lambda asked, arm='real', **kw: ask_endpoint(s.endpoint(**kw), rows, asked, cfg, tmp_path, arm, progress=False)
        assert run(ASKED[:2]) == ['a', 'b'] and run(ASKED) == ['a', 'b', 'c'] and run(ASKED[::-1]) == ['c', 'b', 'a'] and len(s.requests) == 3
        assert run(ASKED[:1], 'shuffled') == ['d'] and len(s.requests) == 4                                     # other images are another request
        run(ASKED[:1], shots=1); assert len(s.requests) == 5                                                    # so are other examples
    assert answered_by(tmp_path) == ['served-2'] and len([*tmp_path.glob('*')]) == 5
    assert not any('image' in p.read_text() or NAME in p.read_text() for p in tmp_path.glob('*.json'))
    next(tmp_path.glob('*.json')).write_text('{"text"')
    with Server('a') as s, pytest.raises(EndpointError, match='delete it'): answered_by(tmp_path)

def test_a_server_error_and_broken_json_are_tried_again(folders, tmp_path):
    rows, cfg = held(folders, 'regions'), config('regions')
    with Server(500, 'a', 'bad', 'b', 'other', 'c') as s: assert ask_endpoint(s.endpoint(), rows, ASKED, cfg, tmp_path, progress=False) == ['a', 'b', 'c'] and len(s.requests) == 6

@pytest.mark.parametrize('act,says', [('bad', '2 attempts.*no JSON'), ('other', "2 attempts.*expected a chat completion"), (503, 'InternalServerError'), (401, 'the environment variable'), (404, 'does it serve that model'), (.8, 'raise the timeout')])
def test_failures_are_typed_and_say_what_to_do(folders, tmp_path, act, says):
    rows, cfg = held(folders, 'regions'), config('regions')
    with Server('a', act) as s, pytest.raises(ChatError, match=says) as e: ask_endpoint(s.endpoint(timeout=.3), rows, ASKED, cfg, tmp_path, progress=False)
    assert s.url in str(e.value) and NAME not in str(e.value)
    with Server('b') as again:                               # what was answered before the failure is kept; the address is part of the request, so it must be the same
        s2 = dataclasses.replace(again.endpoint(timeout=.3), url=s.url)
        with pytest.raises(ChatError, match='is the server running'): ask_endpoint(s2, rows, ASKED[1:], cfg, tmp_path, progress=False)
        assert ask_endpoint(s2, rows, ASKED[:1], cfg, tmp_path, progress=False) == ['a'] and not again.requests

def test_a_refusal_is_an_answer(folders, tmp_path):
    with Server('refuses') as s: assert ask_endpoint(s.endpoint(), held(folders, 'regions'), ASKED[:1], config('regions'), tmp_path, progress=False) == ['I cannot help with that.']

def test_the_key_comes_from_the_environment(folders, tmp_path, monkeypatch):
    monkeypatch.setenv('SOME_KEY', 'k-123'); monkeypatch.setenv('OPENAI_API_KEY', 'not this one')
    rows, cfg = held(folders, 'regions'), config('regions')
    with Server('a') as s:
        for name in ('SOME_KEY', 'NO_SUCH_KEY'): ask_endpoint(s.endpoint(key_env=name, shots=1 + len(s.keys)), rows, ASKED[:1], cfg, tmp_path, progress=False)
    assert s.keys == ['Bearer k-123', 'Bearer none'] and not any('k-123' in p.read_text() for p in tmp_path.glob('*.json'))

# ---------------------------------------------------------------- the configuration

@pytest.mark.parametrize('point', ['gpt4o', 'medgemma_fewshot'])
def test_nothing_is_sent_unless_an_address_is_given(point, monkeypatch, tmp_path):
    import socket
    def refuse(*a): raise AssertionError('a connection was opened')
    monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.delenv('PETVLM_ENDPOINT_URL', raising=False)
    cfg = resolve(point, 'smoke')
    assert served(cfg) and not served(resolve('vipet', 'smoke')) and not cfg.stages
    with pytest.raises(EndpointError, match='PETVLM_ENDPOINT_URL'): endpoint_writer(cfg, tmp_path)

def test_the_address_of_the_configuration_goes_first(monkeypatch):
    monkeypatch.setenv('PETVLM_ENDPOINT_URL', 'http://environment/v1')
    cfg = resolve('gpt4o', 'smoke'); given = lambda **kw: dataclasses.replace(cfg, lm=Part('endpoint', cfg.lm.args | kw))
    assert endpoint_of(cfg) == Endpoint('http://environment/v1', 'gpt-4o') and endpoint_of(given(url='http://here/v1')).host == 'here'
    with pytest.raises(EndpointError, match='shotz: unknown'): endpoint_of(given(shotz=3))
    with pytest.raises(EndpointError, match='the name under which'): endpoint_of(given(model=None))
    with pytest.raises(EndpointError, match="expected 'endpoint'"): endpoint_of(resolve('vipet', 'smoke'))

def test_evaluation_calls_it_like_a_local_model(folders, tmp_path, monkeypatch):
    rows, cfg = held(folders, 'regions'), dataclasses.replace(resolve('gpt4o', 'smoke'), data=config('regions').data)
    with Server('a', 'b') as s:
        monkeypatch.setenv('PETVLM_ENDPOINT_URL', s.url)
        write = endpoint_writer(cfg, tmp_path)
        assert write(rows, ASKED[:1], 'real', 64, 160, 0, progress=False) == ['a'] and write(rows, ASKED[:1], arm='noise', batch=64, max_new_tokens=160, seed=0, progress=False) == ['b']

def test_what_leaves_the_machine_is_said(folders, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(OpenAIBackend, 'say', lambda self, messages, max_tokens: Said('x', 'y', 'stop'))
    ask_endpoint(Endpoint('https://models.example/v1', 'm', slices=1, pixels=64), held(folders, 'regions'), ASKED[:1], config('regions'), tmp_path, progress=False)
    assert 'go to models.example' in caplog.text
