"""What a client minimises besides its task: a penalty on its adapters.

Objective = (adapters, rank [G], hyper) -> scalar, added to the mean token loss.
"""

import functools

import jax.numpy as jnp

from hetlora_jax.methods import tail
from hetlora_jax.types import Adapters, Array, Hyperparameters


def task(adapters: Adapters, rank: Array, hyper: Hyperparameters) -> Array:
  """Adds nothing."""
  del adapters, rank, hyper
  return jnp.float32(0)


def tail_penalty(
  adapters: Adapters, rank: Array, hyper: Hyperparameters, *, rounding: str
) -> Array:
  """Returns lambda sum ||B_tail|| ||A_tail|| (HetLoRA, arXiv 2401.06432)."""
  sizes = tail.norms(adapters, rank, hyper.gamma, rounding)
  return hyper.tail_penalty * sum(size.sum() for size in sizes.values())


TABLE = {
  'task': lambda rounding: task,
  'tail_penalty': lambda rounding: functools.partial(
    tail_penalty, rounding=rounding
  ),
}
