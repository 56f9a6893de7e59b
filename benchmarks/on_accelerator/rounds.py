"""Rounds of the main job on random weights: tokens a second, share of the peak.

Rounds run as in training: the next cohort is built while the devices work, so a
round takes as long as the slower of the two. Arithmetic is counted at real
tokens, targets and ranks (hetlora_jax/tools/flops.py): padding is waste.
"""

import concurrent.futures
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import chats, machine, profiling
from hetlora_jax import points
from hetlora_jax.models import shapes
from hetlora_jax.tools import chips, flops


class Plan(NamedTuple):
  """A model, and its sizes: clients a round, and how many train at once."""

  shape: str
  sizes: tuple[tuple[int, int], ...]
  every: bool  # of the sizes, or only the first that fits


PLANS = {
  'gemma3_270m': Plan(
    'gemma3_270m', ((64, 64), (1, 1), (8, 8), (512, 64), (512, 512)), True
  ),
  'gemma3_1b': Plan('gemma3_1b', ((64, 64), (64, 16)), False),
  'gemma3_4b': Plan('gemma3_4b', ((64, 64), (64, 16)), False),
  'deterministic': Plan('gemma3_270m', ((64, 64),), False),
}
_SMOKE_PLAN = Plan('', ((2, 2), (4, 2)), True)
_SECONDS = 2.0  # that rounds are timed for
_FEWEST = 5
_KERNELS = 10  # that are told


def peak_flops() -> float | None:
  """Returns what the maker says of this chip's bfloat16 products, a second."""
  kind = jax.devices()[0].device_kind.lower()
  return next((c.flops for name, c in chips.CHIPS.items() if name in kind), None)


def product_rate() -> float:
  """Measures this chip's own rate of large bfloat16 products."""
  size = 256 if machine.smoke() else 8192
  a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
  multiply = jax.jit(jnp.matmul)
  times = [machine.seconds(multiply, a, b) for _ in range(10)]
  return 2 * size**3 / min(times)


def counted(x: points.Points) -> flops.Work:
  """Counts what the first cohort holds."""
  cohorts = jax.device_get(points.make_cohorts(x, 0))
  cohort = jax.tree.map(lambda leaf: leaf[0, 0], cohorts)
  return flops.count_work(cohort, x.initial_rank[0])


class Round:
  """A compiled round, to be timed."""

  def __init__(self, shape: str, clients: int, at_once: int, **fields):
    self.x = chats.prepare(shape, clients=clients, at_once=at_once, **fields)
    self.work, self.shape = counted(self.x), shape
    self._state = self.x.initial_state
    self.compile_s = float('nan')

  def compile(self) -> None:
    """Compiles, alone or beside others."""
    x, start = self.x, time.perf_counter()
    cohorts = points.make_cohorts(x, 0)
    lowered = x.run_rounds.lower(*points.arguments(x, self._state, cohorts))
    self.program = lowered.compile()
    self.compile_s = time.perf_counter() - start

  def run(self, cohorts) -> dict:
    x = self.x
    self._state, out = self.program(*points.arguments(x, self._state, cohorts))
    return out

  def time(self) -> dict[str, float]:
    """Times rounds: on the device alone, of the host, and both as they run."""
    x, each = self.x, self.x.config.federated.rounds_per_call
    cohorts = points.make_cohorts(x, 0)
    once = min(machine.seconds(self.run, cohorts) for _ in range(2))
    count = 2 if machine.smoke() else max(_FEWEST, int(_SECONDS / once / 3))
    device = [machine.seconds(self.run, cohorts) for _ in range(count)]
    start = time.perf_counter()
    for i in range(2):
      points.make_cohorts(x, i * each)
    host_s = (time.perf_counter() - start) / 2
    start, targets = time.perf_counter(), 0
    for cohorts in points.cohorts_ahead(x, 0, count * each):
      targets += jax.device_get(self.run(cohorts)['tokens']).sum()
    seconds, calls = time.perf_counter() - start, each * len(x.configs)
    return {
      'device_s': statistics.median(device) / calls,
      'host_s': host_s / calls,
      'round_s': seconds / count / calls,
      'target_tokens_per_s': float(targets / seconds),
    }

  def kernels(self) -> list[dict]:
    """Returns the kernels that take the most of a call, which must be warm."""
    cohorts = points.make_cohorts(self.x, 0)
    run = lambda: self.run(cohorts)  # noqa: E731
    return profiling.top(self.program, run, _KERNELS)

  def row(self) -> dict:
    """Times the round and returns what is to be known about it."""
    times, memory = self.time(), self.program.memory_analysis()
    tokens_a_target = self.work.tokens / self.work.targets
    row = times | {
      'tokens_per_s': times['target_tokens_per_s'] * tokens_a_target,
      'compile_s': self.compile_s,
      'argument_mb': memory.argument_size_in_bytes / 1e6,
      'temporary_mb': memory.temp_size_in_bytes / 1e6,
    }
    if self.shape:
      needed = flops.count_flops(
        shapes.SHAPES[self.shape], self.x.experiment.model.dims, self.work
      )
      rate = sum(needed.values()) / times['device_s']
      row['flops_per_s'] = rate
      if peak := peak_flops():
        row['share_of_peak'] = rate / peak
    return row


def _key(clients: int, at_once: int) -> str:
  return f'{clients} clients, {at_once} at once'


def _try(function) -> dict:
  """Returns what a function does, or says that it does not fit."""
  try:
    return function() or {}
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return {'does_not_fit': str(error).splitlines()[0][:200]}


def measure_plan(name: str, keep) -> None:
  """Times a model's rounds; the first is compiled alone, the others together.

  Of the first that fits, the kernels that take the most time are told too.
  """
  plan = _SMOKE_PLAN if machine.smoke() else PLANS[name]
  result: dict = {'matmul_flops_per_s': product_rate(), 'rounds': {}}

  def told(sizes, one: Round, compiled: dict, **about) -> bool:
    """Times and keeps a round; tells whether it fitted."""
    row = compiled or _try(one.row)
    result['rounds'][_key(*sizes)] = row | about
    print(_key(*sizes), {k: _short(x) for k, x in row.items()}, flush=True)
    keep(result)
    return 'does_not_fit' not in row

  waiting = list(plan.sizes)
  while waiting:
    sizes = waiting.pop(0)
    one = Round(plan.shape, *sizes)
    if told(sizes, one, _try(one.compile), compiled_alone=True):
      result['kernels'] = one.kernels()
      print(profiling.told(result['kernels']), flush=True)
      keep(result)
      break
  others = [Round(plan.shape, *sizes) for sizes in waiting if plan.every]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = list(pool.map(lambda one: _try(one.compile), others))
  for sizes, one, done in zip(waiting, others, compiled, strict=plan.every):
    told(sizes, one, done, compiled_alone=False)


def _short(value):
  return float(f'{value:.3g}') if isinstance(value, float) else value


def report(result: dict) -> str:
  """Tells the rounds of a model, a row a size."""
  head = (
    'clients a round | ms a round | of that, on the device | target tokens/s | '
    'tokens/s | share of the peak | GB | compiled in, s'
  )
  rows = []
  for name, row in result['rounds'].items():
    if 'does_not_fit' in row:
      rows.append([name, 'does not fit', *[''] * 6])
      continue
    share = row.get('share_of_peak')
    gigabytes = (row['argument_mb'] + row['temporary_mb']) / 1e3
    rows.append([
      name, f'{1e3 * row["round_s"]:.3g}', f'{1e3 * row["device_s"]:.3g}',
      f'{row["target_tokens_per_s"]:,.0f}', f'{row["tokens_per_s"]:,.0f}',
      f'{share:.1%}' if share else '', f'{gigabytes:.3g}',
      f'{row["compile_s"]:.0f}' + ('' if row['compiled_alone'] else ' *'),
    ])  # fmt: skip
  rate = result['matmul_flops_per_s'] / 1e12
  return (
    f'{machine.table(head, rows)}\n\nA large bfloat16 product runs at '
    f'{rate:.0f} TFLOP/s. *: compiled beside the others. The kernels that take '
    f'the most of the first:\n\n{profiling.table(result.get("kernels", []))}'
  )
