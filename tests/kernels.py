"Running a notebook as a reader would, but without importing torch and transformers a hundred times (`petvlm.warm`). `PETVLM_KERNELS=new` starts every kernel as a process of its own, as Jupyter does."
import atexit, os
from contextlib import ExitStack
from functools import cache
from unittest.mock import patch
import nbformat
from nbclient import NotebookClient
from petvlm.warm import warm

@cache
def surroundings() -> dict[str, str]:
    "The environment of kernels that are forked, from a server that lives as long as the tests."
    if os.environ.get('PETVLM_KERNELS') == 'new': return {}
    stack = ExitStack(); atexit.register(stack.close)
    return stack.enter_context(warm())

def run(path, tries: int = 3) -> None:
    "Execute the notebook at `path` in its own folder, top to bottom. A kernel binds ports that were free a moment ago: where another process took one meanwhile, it dies before its first word and is started again."
    for left in reversed(range(tries)):
        try:
            with patch.dict(os.environ, surroundings()): return NotebookClient(nbformat.read(path, 4), timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
        except RuntimeError as e:
            if not left or 'Kernel died before replying' not in str(e): raise
