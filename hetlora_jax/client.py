"""One client's local training: a scan of optimizer steps."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from hetlora_jax.types import (
  Adapters,
  Array,
  Batch,
  Hyperparameters,
  Loss,
  PyTree,
)


def local_update(
  loss: Loss,
  objective: Callable[[Adapters, Array, Hyperparameters], Array],
  optimizer: Callable[[Array], optax.GradientTransformation],
  base: PyTree,
  sent: Adapters,
  rank_G: Array,
  scale: Array,
  batches: Batch,
  hyper: Hyperparameters,
) -> tuple[Adapters, Array, Array]:
  """Takes S steps on mean token loss + objective, from fresh moments.

  A step without target tokens changes nothing, whatever the optimizer.

  Returns:
    The trained adapters, the summed token loss [], and the token count [].
  """
  update = optimizer(hyper.client_learning_rate)

  def penalised(adapters, batch):
    total, count = loss(base, adapters, scale, batch)
    mean = total / jnp.maximum(count, 1)
    return mean + objective(adapters, rank_G, hyper), (total, count)

  def step(carry, batch):
    adapters, opt_state = carry
    grads, (total, count) = jax.grad(penalised, has_aux=True)(adapters, batch)
    updates, new_opt_state = update.update(grads, opt_state, adapters)
    new = (optax.apply_updates(adapters, updates), new_opt_state)
    carry = jax.tree.map(lambda n, o: jnp.where(count > 0, n, o), new, carry)
    return carry, (total, count)

  (adapters, _), (total_S, count_S) = jax.lax.scan(
    step, (sent, update.init(sent)), batches
  )
  return adapters, total_S.sum(), count_S.sum()
