"Every component notebook runs from top to bottom: its lessons are its tests."
from pathlib import Path
import pytest
from kernels import run

NOTEBOOKS = sorted((Path(__file__).parents[1]/'nbs').glob('[0-9]*.ipynb'))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path): run(path)
