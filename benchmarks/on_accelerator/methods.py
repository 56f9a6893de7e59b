"""Every method's rounds on this device against those of a CPU, as committed.

Two rounds of each method on the tiny model, with SGD, since Adam turns rounding
into signs. Two children a precision run half of them each and leave what they changed:
the products of the adapters, what was folded into the base, factors that clients
keep. In float32 at the highest precision of products these must be the CPU's
(benchmarks/results/accelerator_cpu.json has their norms and projections); the
default precision and bfloat16 are compared with that whole.
"""

import concurrent.futures
import pathlib
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from benchmarks import machine
from configs import tiny
from hetlora_jax import config, points
from hetlora_jax.methods import registry
from hetlora_jax.types import ServerState

CPU = machine.ROOT / 'benchmarks' / 'results' / 'accelerator_cpu.json'
LIMIT = 1e-4  # of the relative difference from the CPU's
PRECISIONS = ('highest', 'default', 'bfloat16')
_SMOKE_PRECISIONS = ('highest', 'bfloat16')
_SMOKE_METHODS = ('hetlora',)
_THREADS = 5  # that compile at the same time
# These programs are run once.
_COMPILE_FAST = '--xla_gpu_autotune_level=0 --xla_llvm_disable_expensive_passes=true'
_FIELDS = {
  'federated.num_rounds': 2,
  'federated.rounds_per_call': 2,
  'federated.clients_per_round': 4,
  'federated.clients_at_once': 4,
  'federated.local_steps': 2,
  'federated.local_batch': 4,
  'federated.r_max': 8,
  'federated.gamma': 0.7,
  'federated.tail_penalty': 5.0,
  'client_optimizer.name': 'sgd',
  'client_optimizer.learning_rate': 0.3,
  'client_optimizer.full_learning_rate': 0.1,
  'lora.targets': ('q', 'v', 'down'),
  'model.random.num_layers': 2,
  'model.random.width': 32,
  'eval.num_people': 2,
  'eval.every': None,
  'checkpoint.every': 2,
}
PRECISION = flags.DEFINE_enum(
  'precision', None, PRECISIONS, 'Be a child that runs methods so.'
)
_METHODS = flags.DEFINE_list('methods', [], 'Those that a child runs.')
_CHILDREN = 2  # of a precision: tracing is Python, on one core


def changes(state: ServerState, scale: float) -> dict[str, np.ndarray]:
  """Returns all that training changed, in float64, by name."""
  out = {
    f'product/{target}': scale * np.asarray(x.a, np.float64) @ x.b
    for target, x in state.adapters.items()
  }
  for name, x in state.residual.items():
    same = f'product/{name}'
    total = np.asarray(x, np.float64) + out.pop(same, 0)
    out[same if name in state.adapters else f'base/{name}'] = total
  for target, factors in state.memory.personal.items():
    for factor, x in factors.items():
      out[f'personal/{target}/{factor}'] = np.asarray(x, np.float64)
  return out


def run(method: str, dtype: str) -> dict[str, np.ndarray]:
  """Runs a method's rounds; returns changes, losses and ranks by name."""
  raw = tiny.get_config()
  raw.update_from_flattened_dict(_FIELDS | {'method': method, 'model.dtype': dtype})
  c = config.resolve(raw)
  x = points.prepare(c)
  state, out = points.call(x, x.initial_state, points.make_cohorts(x, 0))
  state, out = jax.device_get((state, out))
  one = jax.tree.map(lambda leaf: leaf[0], state)
  return changes(one, c.lora.scale) | {
    'loss': np.asarray(out['loss_sum'] / out['tokens'], np.float64),
    'rank': np.asarray(out['rank'], np.float64),
    'tokens': np.asarray(out['tokens'], np.float64),
  }


def methods() -> tuple[str, ...]:
  return _SMOKE_METHODS if machine.smoke() else tuple(registry.METHODS)


def all_runs(
  precision: str, methods: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
  """Runs methods at a precision, several of them compiling at once."""
  exact = precision == 'highest'
  jax.config.update('jax_default_matmul_precision', 'highest' if exact else None)
  dtype = 'bfloat16' if precision == 'bfloat16' else 'float32'
  first, *others = methods
  found = {first: run(first, dtype)}  # makes the data and the base
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    runs = pool.map(lambda method: run(method, dtype), others)
    return found | dict(zip(others, runs, strict=True))


def probe(name: str, x: np.ndarray) -> list[float]:
  """Returns an array's norm, and its product with a fixed random direction."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  direction = rng.normal(size=x.shape)
  norm = np.linalg.norm(direction)
  return [float(np.linalg.norm(x)), float((x * direction).sum() / norm)]


def probes(found: dict[str, dict[str, np.ndarray]]) -> dict:
  """Returns what is committed of `all_runs`."""
  return {
    method: {name: probe(name, x) for name, x in arrays.items()}
    for method, arrays in found.items()
  }


def apart(found: dict, wanted: dict) -> dict[str, float]:
  """Returns each method's largest relative distance from committed probes."""
  out = {}
  for method, arrays in probes(found).items():
    want = wanted[method]
    if set(arrays) != set(want):
      raise ValueError(f'{CPU.name} has other arrays of {method}: make it anew.')
    out[method] = max(
      abs(a - b) / max(want[name][0], 1e-12)
      for name, got in arrays.items()
      for a, b in zip(got, want[name], strict=True)
    )
  return out


def distance(found: dict, exact: dict) -> dict[str, float]:
  """Returns how far each method's arrays are apart, relative, at most."""
  return {
    method: max(
      float(np.linalg.norm(x - exact[method][name]))
      / max(float(np.linalg.norm(exact[method][name])), 1e-12)
      for name, x in arrays.items()
    )
    for method, arrays in found.items()
  }


def child(precision: str) -> None:
  """Runs --methods and writes what they changed to --result."""
  found = all_runs(precision, _METHODS.value)
  flat = {
    f'{method}:{name}': x
    for method, arrays in found.items()
    for name, x in arrays.items()
  }
  np.savez(machine.RESULT.value, **flat)


def _read(path: pathlib.Path) -> dict[str, dict[str, np.ndarray]]:
  found: dict = {}
  with np.load(path) as file:
    for key in file.files:
      method, _, name = key.partition(':')
      found.setdefault(method, {})[name] = file[key]
  return found


def _start(precision: str, methods: Sequence[str], out: pathlib.Path):
  """Starts a child that runs methods."""
  command = [
    sys.executable, '-m', 'benchmarks.accelerator', '--part=methods',
    f'--precision={precision}', f'--methods={",".join(methods)}', f'--result={out}',
  ]  # fmt: skip
  return subprocess.Popen(command, env=machine.child_env(_COMPILE_FAST))


def measure(keep) -> None:
  """Compares all methods at all precisions; keeps the distances.

  Raises:
    ValueError: a precision failed, or float32 is not the CPU's.
  """
  wanted = machine.read(CPU)
  result: dict = {'cpu': wanted['machine'], 'failed': []}
  found: dict = {}
  precisions = _SMOKE_PRECISIONS if machine.smoke() else PRECISIONS
  parts = [p for i in range(_CHILDREN) if (p := methods()[i::_CHILDREN])]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    running = {
      (precision, i): _start(precision, part, folder / f'{precision}{i}.npz')
      for precision in precisions
      for i, part in enumerate(parts)
    }
    for (precision, i), process in running.items():
      if process.wait():
        result['failed'].append(precision)
      else:
        read = _read(folder / f'{precision}{i}.npz')
        found[precision] = found.get(precision, {}) | read
  found = {p: x for p, x in found.items() if p not in result['failed']}
  exact = found.get('highest', {})
  if exact:
    result['from_cpu'] = apart(exact, wanted['probes'])
    result |= {p: distance(x, exact) for p, x in found.items() if x is not exact}
    result['ranks_equal'] = {
      method: all(
        np.array_equal(x[method]['rank'], arrays['rank']) for x in found.values()
      )
      for method, arrays in exact.items()
    }
  keep(result)
  far = {m: x for m, x in result.get('from_cpu', {}).items() if not x <= LIMIT}
  if far or result['failed']:
    raise ValueError(f'failed: {result["failed"]}; beyond {LIMIT}: {far}')


def report(result: dict) -> str:
  """Tells the distances, a row a method."""
  if 'from_cpu' not in result:
    return f'Failed: {", ".join(result["failed"])}.'
  head = (
    'method, two rounds | float32, highest precision, from the CPU | '
    'default precision, from that | bfloat16, from that'
  )

  def cell(precision: str, method: str) -> str:
    return f'{result[precision][method]:.0e}' if precision in result else 'failed'

  rows = [
    [f'`{method}`', f'{far:.0e}', cell('default', method), cell('bfloat16', method)]
    for method, far in result['from_cpu'].items()
  ]  # fmt: skip
  same = all(result['ranks_equal'].values())
  ranks = 'Ranks are equal in all.' if same else 'Ranks differ in some.'
  return f'{machine.table(head, rows)}\n\n{ranks}'
