"Numerical parity with public reference implementations: weights and inputs from key names, outputs from tests/fixtures (see README.md there)."
import hashlib, json
from pathlib import Path
import numpy as np, torch
from safetensors.numpy import load_file

HERE = Path(__file__).parent/'fixtures'

def _noise(key: str, shape) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'little')
    return np.asarray(np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), dtype=np.float32))

def _by_name(key: str, n: np.ndarray) -> np.ndarray:
    last = key.rsplit('.', 1)[-1]
    if last == 'running_var': return 1 + np.float32(.1)*np.abs(n)
    if last == 'running_mean': return np.float32(.1)*n
    if n.ndim >= 2: return n/np.sqrt(np.float32(max(1, np.prod(n.shape[1:]))))
    return np.float32(last.endswith(('weight', 'gamma', 'scale'))) + np.float32(.1)*n

EXCEPTIONS = {'layer_scale': lambda n: np.float32(.5) + np.float32(.1)*n, 'pos': lambda n: np.float32(.02)*n, 'zeros': np.zeros_like, 'ones': np.ones_like,
              'codebook': lambda n: (n/np.sqrt((n.astype(np.float64)**2).sum(-1, keepdims=True))).astype(np.float32)}

def weights(meta: dict) -> dict[str, torch.Tensor]:
    "Fill rule v1: the reference's state dict, made from its key names. Keys that stay as initialised are left out."
    kinds = meta['fill_exceptions']
    make = lambda k, shape: EXCEPTIONS[kinds[k]](_noise(k, shape)) if k in kinds else _by_name(k, _noise(k, shape))
    return {k: torch.from_numpy(np.ascontiguousarray(make(k, shape), dtype=np.float32)) for k, (shape, dtype) in meta['state'].items() if kinds.get(k) != 'keep' and dtype.startswith('float')}

def tensor(spec: dict) -> torch.Tensor:
    "An input as its fixture describes it."
    rng, dist = np.random.Generator(np.random.PCG64(spec['seed'])), spec['dist']
    if dist == 'normal': return torch.from_numpy(rng.standard_normal(tuple(spec['shape']), dtype=np.float32))
    if dist.startswith('binary'): return torch.from_numpy((rng.random(tuple(spec['shape']), dtype=np.float32) > np.float32(dist.partition('>')[2])).astype(np.float32))
    lo, hi = (float(v) for v in dist.removeprefix('uniform[').rstrip(')').split(','))
    return torch.from_numpy(np.float32(lo) + np.float32(hi - lo)*rng.random(tuple(spec['shape']), dtype=np.float32))

def fixture(name: str) -> dict:
    "The description of the fixture `name`."
    return json.loads((HERE/f'{name}.json').read_text(encoding='utf-8'))

def expected(name: str) -> dict[str, np.ndarray]:
    "Its stored outputs, thinned by each output's stride."
    return load_file(HERE/f'{name}.safetensors')

def difference(name: str, output: str, got: torch.Tensor) -> np.ndarray:
    "Absolute differences at the stored places; asserts the full shape and the float64 norm."
    meta, got = fixture(name)['outputs'][output], got.detach().cpu().numpy()
    assert list(got.shape) == meta['shape'], (got.shape, meta['shape'])
    assert abs(np.sqrt((got.astype(np.float64)**2).sum()) - meta['l2']) <= 1e-5*max(1, meta['l2'])
    return np.abs(got.reshape(-1)[::meta['stride']].astype(np.float64) - expected(name)[output].reshape(-1))
