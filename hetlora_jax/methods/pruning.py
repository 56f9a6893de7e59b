"""Which rank a client keeps after training.

Prune = (before [G], trained, rank [G], hyper) -> rank [G], where `before` is
the size of the tail to be beaten.
"""

import jax.numpy as jnp

from hetlora_jax import lora, ranks
from hetlora_jax.methods import tail
from hetlora_jax.methods.registry import rule
from hetlora_jax.types import Adapters, Array, Hyperparameters

_DECIDES = {
  'truncates': 'a rank can only be given up where it decides what a client is sent'
}


@rule('pruning')
def none(
  before: Array, trained: Adapters, rank: Array, hyper: Hyperparameters
) -> Array:
  """Keeps every rank."""
  del before, trained, hyper
  return rank


@rule('pruning', traits=['tail'], needs=_DECIDES)
def norm_tail(
  before: Array,
  trained: Adapters,
  rank: Array,
  hyper: Hyperparameters,
) -> Array:
  """Gives up a tail that became strictly smaller (HetLoRA, 2401.06432).

  Nobody prunes below r_min, nor in the first round: B starts at zero, so does
  the tail, and nothing is smaller.
  """
  sizes = tail.norms(trained, rank, hyper.gamma)
  shrunk = ranks.gather(sizes, rank.shape[0]) < before
  kept = tail.kept_rank(rank, hyper.gamma)
  floor = jnp.minimum(hyper.r_min, rank)
  return jnp.where(shrunk, jnp.maximum(kept, floor), rank)


@rule('pruning', needs=_DECIDES)
def energy(
  before: Array, trained: Adapters, rank: Array, hyper: Hyperparameters
) -> Array:
  """Keeps the fewest slots that hold a share `hyper.energy` of all energy.

  A slot's energy is (||a_j|| ||b_j||)**2. Nobody prunes below r_min.
  """
  del before
  groups = rank.shape[0]
  slots = {t: (x.a**2).sum(-2) * (x.b**2).sum(-1) for t, x in trained.items()}
  slot_GR = ranks.gather(slots, groups)
  kept = lora.energy_rank(slot_GR, hyper.energy)
  return jnp.where(
    slot_GR.sum(-1) > 0,
    jnp.clip(kept, jnp.minimum(hyper.r_min, rank), rank),
    rank,
  )
