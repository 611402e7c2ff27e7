"Every component notebook runs from top to bottom: its lessons are its tests. So do the notebooks that retell the papers."
from pathlib import Path
import pytest
from kernels import run

NBS = Path(__file__).parents[1]/'nbs'
NOTEBOOKS = sorted(NBS.glob('[0-9]*.ipynb')) + sorted((NBS/'papers').glob('*.ipynb'))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path): run(path)
