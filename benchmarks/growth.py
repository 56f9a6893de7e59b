"""Time and memory of a round as each of its sizes grows.

python -m benchmarks.growth [--repeats=5] [--size=clients]

On a random model of four layers and width 128, so that it takes minutes: the median
seconds of a round, the megabytes that its program needs besides its arguments,
those of its state, seconds to compile, and how many programs were compiled in all
rounds.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import machine
from configs import tiny
from hetlora_jax import config, points, sharding
from hetlora_jax.types import Memory

_SIZE = flags.DEFINE_string('size', '', 'How the sizes to grow begin.')

_BASE = {
  'federated.clients_per_round': 4,
  'federated.clients_at_once': 4,
  'federated.local_steps': 2,
  'federated.r_max': 16,
  'federated.r_min': 2,
  'model.random.width': 128,
  'model.random.num_layers': 4,
  'model.random.mlp_width': 512,
  'data.row_tokens': 256,
  'data.name': 'chitchat',  # people enough
  'eval.num_people': 2,
}
_GROW = {
  'clients, all at once': [
    {'federated.clients_per_round': n, 'federated.clients_at_once': None}
    for n in (1, 4, 16, 64)
  ],
  'clients, four at once': [{'federated.clients_per_round': n} for n in (4, 16, 64)],
  'rank slots': [{'federated.r_max': n} for n in (4, 16, 64, 128)],
  'local steps': [{'federated.local_steps': n} for n in (1, 2, 4, 8)],
  'tokens an example': [
    {'data.tokens_per_example': n, 'data.row_tokens': 8 * n} for n in (16, 32, 64)
  ],
  'layers': [{'model.random.num_layers': n} for n in (1, 2, 4, 8)],
  # Beside next to no training, so that a millisecond shows.
  'population': [
    {
      'population': 10**n,
      'federated.clients_per_round': 1,
      'federated.clients_at_once': 1,
      'federated.local_steps': 1,
      'model.random.num_layers': 1,
      'data.row_tokens': 64,
    }
    for n in (2, 3, 4, 5, 6)
  ],
}


def _populated(state, population: int):
  """Gives a state the memory of a larger population."""
  shape = (1, population, state.memory.rank.shape[2])
  memory = Memory(
    rank=jnp.full(shape, 4, jnp.int32),
    tail_norm=jnp.zeros(shape),
    personal=state.memory.personal,
  )
  return dataclasses.replace(state, memory=memory)


def grown(point: dict) -> dict:
  """Returns time and memory of a round of one size."""
  point = dict(point)
  population = point.pop('population', 0)
  raw = tiny.get_config()
  raw.update_from_flattened_dict(_BASE | point)
  if machine.smoke():
    raw.update_from_flattened_dict(machine.SMOKE_FIELDS | {'data.name': 'synthetic'})
  x = points.prepare(config.resolve(raw))
  state, cohorts = x.initial_state, points.make_cohorts(x, 0)
  if population:
    state = _populated(state, population)
    state = sharding.place(
      state, sharding.by_name(x.experiment.mesh, state, points=True)
    )
  run_rounds = points.make_rounds(x.experiment.rules, x.experiment.mesh, state)
  start = time.perf_counter()
  memory = (
    run_rounds.lower(*points.arguments(x, state, cohorts)).compile().memory_analysis()
  )
  compile_s = time.perf_counter() - start
  state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  times = []
  for i in range(machine.repeats() + 1):
    cohorts = points.make_cohorts(x, i)
    start = time.perf_counter()
    state, out = run_rounds(*points.arguments(x, state, cohorts))
    jax.block_until_ready(out)
    times.append(time.perf_counter() - start)
  return {
    'round_s': statistics.median(times[1:]),
    'temporary_mb': memory.temp_size_in_bytes / 1e6,
    'state_mb': state_bytes / 1e6,
    'compile_s': compile_s,
    'programs': run_rounds._cache_size(),
  }


def measure() -> dict:
  """Grows every size, or those that --size names."""
  result: dict = {}
  for name, sizes in _GROW.items():
    if not name.startswith(_SIZE.value):
      continue
    if machine.smoke() and name != 'population':
      continue
    result[name] = []
    for point in sizes[: 2 if machine.smoke() else None]:
      row = {'point': point, **grown(point)}
      result[name].append(row)
      print(name, {k: _short(x) for k, x in row.items()}, flush=True)
      machine.save('growth', {'grown': result})
  return {'grown': result}


def _short(value):
  return float(f'{value:.3g}') if isinstance(value, float) else value


def report(result: dict) -> str:
  """Tells seconds and megabytes, a row a size."""
  rows = []
  for name, grown in result['grown'].items():
    sizes = [next(iter(row['point'].values())) for row in grown]
    rows.append([
      f'{name} {", ".join(f"{n:,}" for n in sizes)}',
      ', '.join(f'{row["round_s"]:.2g}' for row in grown),
      ', '.join(f'{row["temporary_mb"]:.0f}' for row in grown),
      ', '.join(f'{row["state_mb"]:.2g}' for row in grown),
    ])  # fmt: skip
  programs = {row['programs'] for grown in result['grown'].values() for row in grown}
  head = 'what grows | seconds a round | temporary MB | MB of state'
  return (
    f'{machine.table(head, rows)}\n\nPrograms compiled for all rounds of a '
    f'size: {max(programs)}. {machine.told(result["machine"])}.'
  )


if __name__ == '__main__':
  machine.run('growth', measure, report)
