"Running a notebook as a reader would."
import nbformat
from nbclient import NotebookClient

def run(path, tries: int = 3) -> None:
    "Execute the notebook at `path` in its own folder, top to bottom. A kernel binds ports that were free a moment ago: where another process took one meanwhile, it dies before its first word and is started again."
    for left in reversed(range(tries)):
        try: return NotebookClient(nbformat.read(path, 4), timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
        except RuntimeError as e:
            if not left or 'Kernel died before replying' not in str(e): raise
