"Every component notebook runs from top to bottom: its lessons are its tests."
from pathlib import Path
import nbformat, pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1]/'nbs').glob('[0-9]*.ipynb'))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path):
    nb = nbformat.read(path, 4)
    NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
