"""What a client minimises.

Objective = (trained, about) -> (loss, (sum, count)): the loss to minimise, and
the sum of token losses with its count, to be logged.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetlora_jax import lora, ranks
from hetlora_jax.methods import tail
from hetlora_jax.methods.registry import rule
from hetlora_jax.types import Array, Hyperparameters, Trained


class About(NamedTuple):
  """What an objective may look at besides what is trained."""

  task: Callable[[Trained], tuple[Array, Array]]  # -> (sum of losses, count)
  received: Trained  # where training began
  rank: Array  # [G]
  hyper: Hyperparameters
  key: Array  # of this client and step


Loss = tuple[Array, tuple[Array, Array]]


@rule('objective')
def task(trained: Trained, about: About) -> Loss:
  """Returns the mean loss a token."""
  total, count = about.task(trained)
  return total / jnp.maximum(count, 1), (total, count)


@rule(
  'objective',
  traits=['tail', 'own ranks'],
  needs={'prefixes': 'only a prefix has a tail'},
)
def tail_penalty(trained: Trained, about: About) -> Loss:
  """Adds lambda sum ||B_tail|| ||A_tail|| (HetLoRA, arXiv 2401.06432)."""
  mean, counts = task(trained, about)
  sizes = tail.norms(trained.adapters, about.rank, about.hyper.gamma)
  penalty = sum(size.sum() for size in sizes.values())
  return mean + about.hyper.tail_penalty * penalty, counts


@rule('objective')
def proximal(trained: Trained, about: About) -> Loss:
  """Adds mu / 2 ||theta - theta_received||**2 (FedProx; Li et al., 2018)."""
  mean, counts = task(trained, about)
  change = jax.tree.map(jnp.subtract, trained, about.received)
  distance = sum((x**2).sum() for x in jax.tree.leaves(change))
  return mean + about.hyper.proximal / 2 * distance, counts


def draw_prefix(rank: Array, hyper: Hyperparameters, key: Array) -> Array:
  """Draws a rank from r_min to the client's, evenly: [G] int32."""
  low = jnp.minimum(hyper.r_min, rank)
  draw = jax.random.uniform(key)
  return low + jnp.floor(draw * (rank - low + 1)).astype(jnp.int32)


@rule('objective', traits=['own ranks'], needs={'prefixes': 'only prefixes nest'})
def nested_prefixes(trained: Trained, about: About) -> Loss:
  """Trains one truncation a step, drawn anew (PreLort, arXiv 2606.15963).

  The paper does not publish its weights of the truncations; here every rank from
  r_min to the client's is as likely. The loss reported is the truncation's.
  """
  rank = draw_prefix(about.rank, about.hyper, about.key)
  masks = ranks.masks(rank, trained.adapters)
  shorter = lora.truncate(trained.adapters, masks)
  return task(trained._replace(adapters=shorter), about)
