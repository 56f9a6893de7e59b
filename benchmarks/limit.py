"""A round's arithmetic against the machine's own rate of matrix products.

python -m benchmarks.limit [--config=configs/chitchat_gemma3.py] [--repeats=5]

Counts what a round needs, analytically: forward and input-gradient products of
the frozen matrices, LoRA products, attention (its causal half) and the loss
head at loss-bearing positions. Times the round, and single products of the same
type and shapes, in turn. Prints a table and writes benchmarks/results/limit.json.
"""

import datetime
import json
import os
import pathlib
import platform
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from hetlora_jax import base_model, config, experiment
from hetlora_jax.models import decoder, pretrained

_CONFIG = config_flags.DEFINE_config_file(
  'config', 'configs/chitchat_gemma3.py', 'Experiment whose round is timed.'
)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed rounds.')
_OUT = flags.DEFINE_string('out', 'benchmarks/results/limit.json', 'Result.')


class Product(NamedTuple):
  """`times` products [rows, inner] x [inner, columns] a client's step."""

  kind: str
  rows: int
  inner: int
  columns: int
  times: float

  @property
  def flops(self) -> float:
    return 2.0 * self.rows * self.inner * self.columns * self.times


def needed(c: decoder.DecoderConfig, dims, slots, rows, length, targets):
  """Lists the products of one client's step.

  Args:
    c: the model.
    dims: target -> (num_layers, d_in, d_out) of the adapters.
    slots: R.
    rows: P.
    length: T.
    targets: M, loss-bearing positions.
  """
  tokens, out = rows * length, []
  for name, (d_in, d_out) in decoder.matrix_dims(c).items():
    # Nothing before the first layer is trained, so its inputs need no gradient.
    back = c.num_layers - (name in 'qkv')
    out.append(Product('frozen', tokens, d_in, d_out, c.num_layers))
    out.append(Product('frozen', tokens, d_out, d_in, back))
  for layers, d_in, d_out in dims.values():
    # low = x A, low B, and back: d_low, d_B, d_A, d_x.
    out.append(Product('lora', tokens, d_in, slots, 3 * layers))
    out.append(Product('lora', tokens, slots, d_out, 3 * layers))
  # Scores and values, each once forward and twice back, over half the pairs.
  pairs = rows * c.num_heads * length * length / 2
  out.append(Product('attention', 1, c.head_dim, 1, 6 * pairs * c.num_layers))
  out.append(Product('head', targets, c.width, c.vocab_size, 1))
  out.append(Product('head', targets, c.vocab_size, c.width, 1))
  return out


def _seconds(function, *args) -> float:
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def _rate(products, dtype, seconds: dict) -> float:
  """Times every distinct large product once; returns FLOP/s of their mix."""
  multiply = jax.jit(
    lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32)
  )
  rng, flops, total = np.random.default_rng(0), 0.0, 0.0
  for p in products:
    if p.kind not in ('frozen', 'head'):
      continue
    shape = (p.rows, p.inner, p.columns)
    x = jnp.asarray(rng.normal(size=shape[:2]), dtype)
    w = jnp.asarray(rng.normal(size=shape[1:]), dtype)
    if shape not in seconds:
      _seconds(multiply, x, w)  # compiles
    seconds[shape] = min(_seconds(multiply, x, w) for _ in range(3))
    flops, total = flops + p.flops, total + p.times * seconds[shape]
  return flops / total


def main(argv) -> None:
  del argv
  c = config.resolve(_CONFIG.value)
  x, shape = experiment.prepare(c), _shape(c)
  cohort = experiment.make_cohort(x, 0)
  clients, steps, rows, length = cohort.batches.tokens.shape
  busy = int((np.asarray(cohort.batches.weight).sum(-1) > 0).sum())
  targets = cohort.batches.target.shape[-1]
  products = needed(shape, x.dims, c.federated.r_max, rows, length, targets)
  step_flops = sum(p.flops for p in products)
  dtype, state = base_model.compute_dtype(c), x.initial_state
  state, _ = x.run_round(x.base, state, cohort, x.hyper)  # compiles
  measured, times, rates = {}, [], []
  for _ in range(_REPEATS.value):
    rates.append(_rate(products, dtype, measured))
    start = time.perf_counter()
    state, out = x.run_round(x.base, state, cohort, x.hyper)
    jax.block_until_ready(out)
    times.append(time.perf_counter() - start)
  fractions = [busy * step_flops / t / r for t, r in zip(times, rates, strict=True)]  # fmt: skip
  result = {
    'fraction_of_matmul_rate': statistics.median(fractions),
    'fractions': fractions,
    'round_s': times,
    'matmul_flops_per_s': rates,
    'counted_flops_a_round': busy * step_flops,
    'counted_flops_a_step': {
      kind: sum(p.flops for p in products if p.kind == kind)
      for kind in ('frozen', 'lora', 'attention', 'head')
    },
    'clients': clients, 'steps': steps, 'rows': rows, 'row_tokens': length,
    'targets': targets, 'rank_slots': c.federated.r_max, 'dtype': dtype.name,
    'model': c.model.source, 'jax': jax.__version__,
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, '
    f'{jax.devices()[0].device_kind}',
    'date': datetime.date.today().isoformat(),
  }  # fmt: skip
  path = pathlib.Path(_OUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=2) + '\n')
  for kind, flops in result['counted_flops_a_step'].items():
    print(f'{kind:<12}{flops / 1e9:>10.1f} GFLOP a step')
  print(f'{"round":<12}{statistics.median(times):>10.1f} s')
  print(f'{"products":<12}{statistics.median(rates) / 1e9:>10.0f} GFLOP/s')
  print(f'{"fraction":<12}{result["fraction_of_matmul_rate"]:>10.2f}')


def _shape(c: config.Config) -> decoder.DecoderConfig:
  """Returns the shape of the base model, which is in memory already."""
  model: pretrained.Pretrained = base_model.load(c)
  return model.config


if __name__ == '__main__':
  app.run(main)
