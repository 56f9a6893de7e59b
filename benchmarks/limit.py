"""A round's arithmetic against the machine's own rate of matrix products.

python -m benchmarks.limit [--config=configs/chitchat_gemma3.py] [--repeats=5]

Counts what a round needs, analytically, at real tokens, targets and ranks, so
that padding is waste: forward and input-gradient products of the frozen
matrices, LoRA products, attention (pairs that see each other) and the loss head
at loss-bearing positions. Times rounds and, between them, single products of
the type and shapes that the round has.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from hetlora_jax import base_model, config, points
from hetlora_jax.models import decoder, kernels
from hetlora_jax.tools import flops

machine.define_config()


def shapes(c: decoder.DecoderConfig, tokens: int, targets: int) -> dict:
  """Returns (rows, inner, columns) -> operations of it, as the round has them.

  Args:
    c: the model.
    tokens: rows of one frozen product: those of all clients trained at once.
    targets: rows of one product of the head.
  """
  out = {}
  for d_in, d_out in decoder.matrix_dims(c).values():
    for a, b in ((d_in, d_out), (d_out, d_in)):
      flops = 2.0 * tokens * a * b * c.num_layers
      out[tokens, a, b] = out.get((tokens, a, b), 0) + flops
  chunk = min(kernels.vocab_chunk_size(), c.vocab_size)
  flops = 2.0 * targets * c.width * c.vocab_size
  out[targets, c.width, chunk] = out[targets, chunk, c.width] = flops
  return out


class Rate:
  """Measures the rate of a mix of products."""

  def __init__(self, mix: dict, dtype):
    self._mix, self._multiply = mix, jax.jit(
      lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32)
    )  # fmt: skip
    key = jax.random.key(0)
    self._arrays = {
      (m, k, n): (
        jax.random.normal(key, (m, k), dtype),
        jax.random.normal(key, (k, n), dtype),
      )
      for m, k, n in mix
    }
    self()  # compiles

  def __call__(self) -> float:
    """Returns operations a second, each shape at the best of ten."""
    seconds = sum(
      flops / (2.0 * np.prod(shape))
      * min(machine.seconds(self._multiply, *self._arrays[shape]) for _ in range(10))
      for shape, flops in self._mix.items()
    )  # fmt: skip
    return sum(self._mix.values()) / seconds


def measure() -> dict:
  """Times rounds and products in turn; see the module."""
  x = points.prepare(config.resolve(machine.config()))
  c, f = x.config, x.config.federated
  model, dtype = x.experiment.model.decoder, base_model.compute_dtype(c)
  cohorts = points.make_cohorts(x, 0)
  cohort = jax.tree.map(lambda leaf: np.asarray(leaf[0, 0]), cohorts)
  rank_N = x.initial_rank[0]
  work = flops.count_work(cohort, rank_N)
  counted = flops.count_flops(model, x.experiment.model.dims, work)
  _, _, rows, length = cohort.batches.tokens.shape
  at_once = f.clients_at_once or f.clients_per_round
  targets = at_once * cohort.batches.target.shape[-1]
  rate = Rate(shapes(model, at_once * rows * length, targets), dtype)
  state, _ = points.call(x, x.initial_state, cohorts)  # compiles
  times, rates = [], [rate()]
  for _ in range(machine.repeats()):
    start = time.perf_counter()
    state, out = points.call(x, state, cohorts)
    jax.block_until_ready(out)
    times.append(time.perf_counter() - start)
    rates.append(rate())
  total = sum(counted.values())
  fractions = [  # of the mean of the rates before and after
    2 * total / t / (before + after)
    for t, before, after in zip(times, rates[:-1], rates[1:], strict=True)
  ]
  padded = cohort.batches.tokens.size, cohort.batches.target.size
  return {
    'fraction_of_matmul_rate': statistics.median(fractions),
    'fractions': fractions, 'round_s': times,
    'matmul_flops_per_s': rates,
    'counted_flops': total, 'counted_flops_by_kind': counted,
    'work': work._asdict(),
    'share_of_token_slots_used': work.tokens / padded[0],
    'share_of_target_slots_used': work.targets / padded[1],
    'clients': f.clients_per_round, 'clients_at_once': at_once,
    'dtype': dtype.name, 'model': c.model.source,
  }  # fmt: skip


def report(result: dict) -> str:
  """Tells the arithmetic, the times, and their ratio."""
  kinds = result['counted_flops_by_kind'].items()
  rows = [
    [f'counted arithmetic of a round, {result["clients"]} clients',
     f'{result["counted_flops"] / 1e9:,.0f} GFLOP: '
     + ', '.join(f'{kind} {x / 1e9:,.0f}' for kind, x in kinds)],
    ['a round', f'{statistics.median(result["round_s"]):.2f} s'],
    ['products of its shapes',
     f'{statistics.median(result["matmul_flops_per_s"]) / 1e9:.0f} GFLOP/s'],
    ['**share of that rate**', f'**{result["fraction_of_matmul_rate"]:.2f}** '
     f'({min(result["fractions"]):.2f} to {max(result["fractions"]):.2f})'],
  ]  # fmt: skip
  head = f'{result["model"]} in {result["dtype"]} | '
  return f'{machine.table(head, rows)}\n\n{machine.told(result["machine"])}.'


if __name__ == '__main__':
  machine.run('limit', measure, report)
