"DCFormer's depthwise convolutions and the strip of attention by Triton's kernels, in Triton's interpreter: outputs and gradients are PyTorch's. A card compares them again (benchmarks/axial.py, benchmarks/alignment.py)."
import importlib.util, json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='Triton is not installed (pip install triton==3.6.0): its kernels run on GPUs only, here in its interpreter')

def interpreted(code: str):
    "What `code` prints as JSON, under the interpreter, which has to be chosen before Triton is imported."
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], env=os.environ | {'TRITON_INTERPRET': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

LAYER = """
import json, torch
from torch import nn
import petvlm.dcformer as dc
torch.manual_seed(0)
layer, x, gaps = dc.AxialConv(2, 2, 5, depthwise=True).eval(), torch.randn(2, 2, 4, 5, 6), []
for _, norm in layer.axes: nn.init.normal_(norm.weight); nn.init.normal_(norm.bias); nn.init.normal_(norm.running_mean); nn.init.uniform_(norm.running_var, .5, 2.)
assert not layer.fused(x) and layer(x).requires_grad                     # somebody may want gradients
with torch.no_grad():
    assert layer.fused(x) and not layer.train()(x).requires_grad
    fast = layer.eval()(x); dc.KERNELS = False
    assert not layer.fused(x)
    gaps.append((fast - layer(x)).abs().max()); dc.KERNELS = True
    with torch.autocast('cpu', torch.bfloat16): half = layer(x)
    assert half.dtype == torch.bfloat16
    gaps.append((half - fast).abs().max()/fast.abs().max()/100)
print(json.dumps([float(g) for g in gaps]))
"""

@needs_triton
def test_a_layer_by_triton_is_the_layer_by_pytorch():
    assert max(interpreted(LAYER)) < 1e-4

STRIP = """
import json, torch
from petvlm.imagemass import KERNELS, by_triton, kernel_for, pull_plain, pull_triton, seen_plain, seen_triton, strip_of
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, h, 24, 8, generator=g) for h in (4, 2, 2))
channels = torch.zeros(2, 24, 3); channels[:, 3:11, -1] = 1; channels[:, 4:6, 0] = channels[:, 8, 1] = 1
weights = torch.zeros(2, 24); weights[0, 5:] = 1/19; weights[1, 20:] = 1/4
s, scale = strip_of(channels, weights), 8**-.5
_, lse, _ = KERNELS[kernel_for(q, None, True, scale)].forward(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), None, True, scale)
lse, pull = lse.contiguous(), torch.randn(2, 8, generator=g)
assert by_triton(q, None)
told = [(seen_plain(q, k, lse, s, None, True, scale) - seen_triton(q, k, lse, s, True, scale)).abs().max()]
both = [torch.zeros_like(q), torch.zeros_like(k)], [torch.zeros_like(q), torch.zeros_like(k)]
pull_plain(*both[0], q, k, lse, s, pull, None, True, scale); pull_triton(*both[1], q, k, lse, s, pull, True, scale)
print(json.dumps([float(t) for t in told + [(a - b).abs().max() for a, b in zip(*both)]] + [float(both[0][1].abs().max())]))
"""

@needs_triton
def test_the_strip_by_triton_is_the_strip_by_pytorch():
    import numpy as np
    if tuple(map(int, np.__version__.split('.')[:2])) >= (2, 5): pytest.skip("the interpreter of Triton 3.6 takes an array of one entry for a loop's bound, which numpy 2.5 refuses: pip install 'numpy<2.5'")
    *gaps, largest = interpreted(STRIP)
    assert max(gaps) < 1e-5 < 1e-3 < largest
