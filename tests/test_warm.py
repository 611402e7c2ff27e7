"Forked kernels: their own state, their exit, the end of what stands for them, and what happens without a server."
import json, os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch
import nbformat, pytest
from jupyter_client.manager import start_new_kernel
from petvlm.warm import SOCKET, WarmError, warm

LIGHT = ('ipykernel.kernelapp', 'matplotlib', 'colorsys')

@pytest.fixture(scope='module')
def surroundings():
    with warm(LIGHT) as env: yield env

@contextmanager
def kernel(env):
    with patch.dict(os.environ, env): manager, client = start_new_kernel(startup_timeout=60)
    try: yield manager, client
    finally: client.stop_channels(); manager.shutdown_kernel(now=True)

def value(client, expression) -> str:
    return client.execute_interactive('pass', user_expressions={'x': expression}, timeout=60, output_hook=lambda _: None)['content']['user_expressions']['x']['data']['text/plain']

def alive(pid: int) -> bool:
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().rsplit(')', 1)[1].split()[0] != 'Z'

def soon(what, seconds=15) -> bool:
    ends = time.monotonic() + seconds
    while not what():
        if time.monotonic() > ends: return False
        time.sleep(.05)
    return True

def test_a_fork_has_what_was_imported_and_its_own_folder_variables_and_backend(surroundings, tmp_path):
    with patch.dict(os.environ, {'PETVLM_SEEN': 'yes'}), kernel(surroundings) as (manager, client):
        assert value(client, "'colorsys' in __import__('sys').modules") == 'True' and value(client, "__import__('os').environ['PETVLM_SEEN']") == "'yes'"
        assert value(client, "__import__('matplotlib').get_backend()").strip("'").endswith('inline')
        assert int(value(client, "__import__('os').getpid()")) != manager.provisioner.pid

def test_an_interrupt_reaches_the_kernel(surroundings):
    with kernel(surroundings) as (manager, client):
        asked = client.execute('import time; time.sleep(60)', stop_on_error=False)
        while client.get_iopub_msg(timeout=20)['content'].get('execution_state') != 'busy': pass
        time.sleep(.3); manager.interrupt_kernel()
        while (reply := client.get_shell_msg(timeout=20))['parent_header']['msg_id'] != asked: pass
        assert reply['content']['ename'] == 'KeyboardInterrupt' and value(client, '1 + 1') == '2'

def test_its_exit_code_is_that_of_the_process_jupyter_started(surroundings):
    with kernel(surroundings) as (manager, client):
        client.execute('import os; os._exit(7)')
        assert soon(lambda: manager.provisioner.process.poll() is not None) and manager.provisioner.process.poll() == 7

def test_with_its_stand_in_the_kernel_ends(surroundings):
    with kernel(surroundings) as (manager, client):
        pid = int(value(client, "__import__('os').getpid()"))
        os.kill(manager.provisioner.pid, signal.SIGKILL)
        assert soon(lambda: not alive(pid))

def test_with_the_server_every_kernel_ends_and_without_one_a_kernel_is_a_process_like_any_other():
    with warm(LIGHT) as env, kernel(env) as (manager, client): pid = int(value(client, "__import__('os').getpid()"))
    assert soon(lambda: not alive(pid))
    with warm(LIGHT) as env, kernel(env | {SOCKET: '/nowhere'}) as (manager, client):
        assert int(value(client, "__import__('os').getpid()")) == manager.provisioner.pid and value(client, "'colorsys' in __import__('sys').modules") == 'False'

@pytest.mark.parametrize('modules', [('no_such_module',), ('matplotlib.pyplot',)])
def test_a_server_that_cannot_start_is_an_error(modules, capfd):
    with pytest.raises(WarmError, match='did not start'), warm(modules): pass

def test_what_a_forked_kernel_used_is_in_the_account_of_its_stage(tmp_path, monkeypatch):
    from petvlm.cluster import here
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; x = bytearray(300 << 20); e = time.process_time() + 1\nwhile time.process_time() < e: pass")])
    nbformat.write(nb, tmp_path/'n.ipynb')
    with warm(('ipykernel.kernelapp', 'matplotlib')) as env:
        for k, v in env.items(): monkeypatch.setenv(k, v)
        assert here([sys.executable, '-m', 'papermill', '-k', 'python3', 'n.ipynb', 'out.ipynb'], 'n', tmp_path) == 0
    told = json.loads((tmp_path/'reports/spent/n.json').read_text())
    assert told['peak_mb'] > 300 and told['cpu_seconds'] > 1 and [p.name for p in (tmp_path/'reports/spent').iterdir()] == ['n.json']
