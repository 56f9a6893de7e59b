"""The benchmark counts the arithmetic that XLA compiles."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from hetlora_jax import base_model, lora
from hetlora_jax.config import RandomModel
from hetlora_jax.models import decoder, readout
from hetlora_jax.tools import flops
from hetlora_jax.types import Batch, Cohort

TOKENS, SLOTS, VOCAB = 64, 8, 512


def _batch():
  """Returns one client's step: full, and a target everywhere."""
  index = np.arange(TOKENS, dtype=np.int32)
  return Batch(
    tokens=index[None] % VOCAB,
    segment=np.ones((1, TOKENS), np.int32),
    position=index[None],
    target_index=index,
    target=index % VOCAB,
    weight=np.ones(TOKENS, np.float32),
  )


def _executed(program: str) -> int:
  """Adds up the products of a compiled program without loops."""
  shape_of = {
    name: [int(n) for n in dims.split(',') if n]
    for name, dims in re.findall(r'%(\S+) = \w+\[([\d,]*)\]', program)
  }
  found = re.findall(
    r'%(\S+) = \S+ dot\((?:\w+\[\S+ )?%([^,\s]+),.*lhs_contracting_dims=\{(\d+)\}',
    program,
  )
  return sum(
    2 * math.prod(shape_of[out]) * shape_of[left][int(axis)]
    for out, left, axis in found
  )


def test_counted_operations_are_those_of_the_compiled_step():
  shape = base_model.random_shape(
    RandomModel(
      seed=0, width=128, num_layers=1, num_heads=4, head_dim=32, mlp_width=512,
      vocab_size=VOCAB,
    ),
    VOCAB,
  )  # fmt: skip
  dims = decoder.adapter_dims(shape, ('q', 'v', 'up'))
  batch = _batch()
  cohort = Cohort(
    client_id=np.zeros(1, np.int32),
    num_examples=np.ones(1, np.float32),
    batches=jax.tree.map(lambda x: x[None, None], batch),
  )
  work = flops.count_work(cohort, np.array([SLOTS]))
  assert work == (TOKENS, TOKENS * SLOTS, TOKENS * (TOKENS + 1) // 2, TOKENS)
  counted = flops.count_flops(shape, dims, work)

  base = decoder.init_params(shape, jax.random.key(0), jnp.float32)
  adapters = lora.init(jax.random.key(1), dims, SLOTS, 'gaussian')
  loss = readout.make_loss(shape, jnp.float32, remat=False)

  def total(adapters, base, batch):
    return loss(base, adapters, jnp.float32(2), batch)[0]

  step = jax.jit(jax.grad(total)).lower(adapters, base, batch).compile()
  counted['attention'] *= 2 * TOKENS / (TOKENS + 1)  # it computes all pairs
  # A first layer does without the gradients of what q and v read, and of k.
  spared = 2 * TOKENS * (2 * SLOTS * shape.width + TOKENS * 4 * 32)
  assert sum(counted.values()) - spared == _executed(step.as_text())
