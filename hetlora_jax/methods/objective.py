"""What a client minimises.

Objective = (task, trained, received, rank [G], hyper, key) -> (loss, (sum,
count)). `task` maps what is trained to (sum of token losses, token count);
`received` is where training began; the key is of this client and step.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hetlora_jax import lora, ranks
from hetlora_jax.methods import tail
from hetlora_jax.types import Array, Hyperparameters, Trained

Task = Callable[[Trained], tuple[Array, Array]]
Loss = tuple[Array, tuple[Array, Array]]


def task(
  task_: Task,
  trained: Trained,
  received: Trained,
  rank: Array,
  hyper: Hyperparameters,
  key: Array,
) -> Loss:
  """Returns the mean loss a token."""
  del received, rank, hyper, key
  total, count = task_(trained)
  return total / jnp.maximum(count, 1), (total, count)


def tail_penalty(
  task_: Task,
  trained: Trained,
  received: Trained,
  rank: Array,
  hyper: Hyperparameters,
  key: Array,
  *,
  rounding: str,
) -> Loss:
  """Adds lambda sum ||B_tail|| ||A_tail|| (HetLoRA, arXiv 2401.06432)."""
  mean, counts = task(task_, trained, received, rank, hyper, key)
  sizes = tail.norms(trained.adapters, rank, hyper.gamma, rounding)
  penalty = sum(size.sum() for size in sizes.values())
  return mean + hyper.tail_penalty * penalty, counts


def proximal(
  task_: Task,
  trained: Trained,
  received: Trained,
  rank: Array,
  hyper: Hyperparameters,
  key: Array,
) -> Loss:
  """Adds mu / 2 ||theta - theta_received||**2 (FedProx; Li et al., 2018)."""
  mean, counts = task(task_, trained, received, rank, hyper, key)
  change = jax.tree.map(jnp.subtract, trained, received)
  distance = sum((x**2).sum() for x in jax.tree.leaves(change))
  return mean + hyper.proximal / 2 * distance, counts


def draw_prefix(rank: Array, hyper: Hyperparameters, key: Array) -> Array:
  """Draws a rank from r_min to the client's, evenly: [G] int32."""
  low = jnp.minimum(hyper.r_min, rank)
  draw = jax.random.uniform(key)
  return low + jnp.floor(draw * (rank - low + 1)).astype(jnp.int32)


def nested_prefixes(
  task_: Task,
  trained: Trained,
  received: Trained,
  rank: Array,
  hyper: Hyperparameters,
  key: Array,
) -> Loss:
  """Trains one truncation a step, drawn anew (PreLort, arXiv 2606.15963).

  The paper's weights of the truncations were not to be had; these are even
  between r_min and the client's rank. The loss reported is the truncation's.
  """
  masks = ranks.masks(draw_prefix(rank, hyper, key), trained.adapters)
  shorter = trained._replace(adapters=lora.truncate(trained.adapters, masks))
  return task(task_, shorter, received, rank, hyper, key)


TABLE = {
  'task': task,
  'tail_penalty': tail_penalty,
  'nested_prefixes': nested_prefixes,
  'proximal': proximal,
}
