"Headless Chromium over its debugging port: as much of a hand and an eye as the viewer's tests need."
import base64, io, itertools, json, os, secrets, shutil, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from pathlib import Path
import nbformat
import numpy as np
from PIL import Image
from websocket import create_connection

CHROMIUM = os.environ.get('PETVLM_CHROMIUM') or shutil.which('chromium')
KERNEL = "jupyterapp.shell.currentWidget.sessionContext.session?.kernel"
FLAGS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--hide-scrollbars',
         '--force-device-scale-factor=1', '--remote-debugging-port=0', '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1']     # no name resolves: the network is off

class Page:
    "One page in a browser of its own; `with Page(url, folder) as page`."
    def __init__(self, url, room, size=(1216, 1100), patience=30):
        self.profile, self.patience, self.ids = Path(room)/'profile', patience, itertools.count(1)
        self.run = subprocess.Popen([CHROMIUM, *FLAGS, f'--window-size={size[0]},{size[1]}', f'--user-data-dir={self.profile}', url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = self.wait(lambda: (self.profile/'DevToolsActivePort').exists() and (self.profile/'DevToolsActivePort').read_text().split('\n')[0], 'a debugging port')
        def target(): return next((t['webSocketDebuggerUrl'] for t in json.load(urllib.request.urlopen(f'http://127.0.0.1:{port}/json', timeout=10)) if t['type'] == 'page'), None)
        self.socket = create_connection(self.wait(target, 'a page'), suppress_origin=True, timeout=patience)
        self.call('Runtime.enable')

    def __enter__(self): return self
    def __exit__(self, *_):
        self.socket.close(); self.run.terminate()
        try: self.run.wait(10)
        except subprocess.TimeoutExpired: self.run.kill()

    def wait(self, ready, what):
        "What `ready()` gives once it is true."
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if found := ready(): return found
            time.sleep(.05)
        raise TimeoutError(f'{what}: not there after {self.patience} s')

    def call(self, method, **params):
        me = next(self.ids); self.socket.send(json.dumps({'id': me, 'method': method, 'params': params}))
        while True:
            said = json.loads(self.socket.recv())
            if said.get('id') == me: break
        if 'error' in said: raise RuntimeError(f"{method}: {said['error']}")
        return said['result']

    def js(self, code):
        "The value of an expression in the page."
        said = self.call('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        if 'exceptionDetails' in said: raise RuntimeError(str(said['exceptionDetails'])[:600])
        return said['result'].get('value')

    def until(self, code): return self.wait(lambda: self.js(code), code)
    def box(self, selector, n=0): return self.js(f'(() => {{ const b = document.querySelectorAll({json.dumps(selector)})[{n}].getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }})()')
    def mouse(self, kind, x, y, **more): self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, **more)
    def click(self, x, y): self.drag((x, y))
    def drag(self, *points):
        "Press at the first point, move over the others, let go."
        self.mouse('mousePressed', *points[0], button='left', clickCount=1)
        for p in points[1:]: self.mouse('mouseMoved', *p, button='left', buttons=1)
        self.mouse('mouseReleased', *points[-1], button='left', clickCount=1)
    def key(self, key, code):
        for kind in ('keyDown', 'keyUp'): self.call('Input.dispatchKeyEvent', type=kind, key=key, windowsVirtualKeyCode=code)
    def picture(self):
        "(H, W, 3) of what is seen."
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(self.call('Page.captureScreenshot')['data']))).convert('RGB')).astype(int)

@contextmanager
def jupyterlab(cells, room, size=(1400, 1300), patience=90):
    "A page with a JupyterLab that shows `cells` (sources of code, or a whole notebook), its kernel ready."
    room, token = Path(room), secrets.token_hex(16)
    nb = cells if isinstance(cells, nbformat.NotebookNode) else nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}})
    nbformat.write(nb, room/'tour.ipynb')
    (room/'config/labconfig').mkdir(parents=True); (room/'config/labconfig/page_config.json').write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    env = os.environ | {'PYTHONPATH': str(Path(__file__).parents[1]), 'JUPYTER_CONFIG_DIR': str(room/'config'), 'JUPYTER_RUNTIME_DIR': str(room/'run'), 'JUPYTERLAB_SETTINGS_DIR': str(room/'settings'), 'JUPYTERLAB_WORKSPACES_DIR': str(room/'spaces')}
    log = open(room/'lab.log', 'wb')
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', '--port=0', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={room}',
                               '--LabApp.expose_app_in_browser=True'], env=env, stdout=log, stderr=log)
    try:
        def running(): return next((json.loads(p.read_text()) for p in (room/'run').glob('jpserver-*.json')), None)
        end = time.monotonic() + 90
        while not (found := running()):
            if time.monotonic() > end or server.poll() is not None: raise RuntimeError((room/'lab.log').read_text()[-2000:])
            time.sleep(.2)
        with Page(f"http://127.0.0.1:{found['port']}/lab/tree/tour.ipynb?token={token}&reset", room, size=size, patience=patience) as page:
            page.until(f"!!window.jupyterapp && !!document.querySelector('.jp-Notebook .jp-Cell') && {KERNEL}?.status === 'idle' && jupyterapp.commands.hasCommand('notebook:run-all-cells')")
            yield page
    finally: server.terminate(); server.wait(20); log.close()
