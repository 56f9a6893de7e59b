"""The server's optimizer step, which freezes what no client trained."""

import jax
import jax.numpy as jnp
import optax

from hetlora_jax import lora
from hetlora_jax.types import (
  Adapters,
  Array,
  Deltas,
  Hyperparameters,
  Lora,
  Masks,
  Rules,
  Server,
  ServerState,
  Trained,
)


def parameters(rules: Rules, server: Server, residual: Deltas) -> Trained:
  """Returns what the server optimizer updates: factors, products, or the base."""
  in_products = rules.product_space
  return Trained(
    lora.deltas(*server) if in_products else server.adapters,
    residual if rules.trains_base else {},
  )


def _live(
  rules: Rules, round: Array, target: Trained, owned: Masks, anybody: Array
) -> Trained:
  """Marks what the step may change: the slots that some client trained and sent.

  Products and the base, which have no slots, may change in any round in which a
  client reports.
  """
  trained, sent = rules.trainable(round, owned), lora.slot_masks(owned)

  def factor(t: str, name: str) -> Array:
    shared = name not in rules.personal
    return getattr(trained[t], name) * getattr(sent[t], name) * shared

  def mark_all(x: Array) -> Array:
    return anybody.astype(jnp.float32).reshape((1,) * x.ndim)

  adapters = {
    t: Lora(factor(t, 'a'), factor(t, 'b')) if isinstance(x, Lora) else mark_all(x)
    for t, x in target.adapters.items()
  }
  return Trained(adapters, jax.tree.map(mark_all, target.change))


def step(
  rules: Rules,
  state: ServerState,
  server: Server,
  hyper: Hyperparameters,
  aggregate: Adapters | Deltas,
  base_change: Deltas,
  owned: Masks,
  anybody: Array,
) -> tuple[Trained, optax.OptState]:
  """Steps along the pseudo-gradient, from what the server has to the aggregate.

  The pseudo-gradient is the difference of the two. What no client trained and
  sent keeps its value and its moments: factors, slots and, in a round without
  reports, everything.
  """
  now = parameters(rules, server, state.residual)
  target = Trained(aggregate, {})
  if base_change:
    moved_base = jax.tree.map(jnp.add, state.residual, base_change)
    target = target._replace(change=moved_base)
  live = _live(rules, state.round, target, owned, anybody)
  gradient = jax.tree.map(lambda n, t, m: (n - t) * m, now, target, live)

  # The step, then zeros for what is frozen: momentum would move it.
  optimizer = rules.server_optimizer(hyper.server_learning_rate)
  updates, opt_state = optimizer.update(gradient, state.opt_state, now)
  moved = jax.tree.map(lambda u, m: jnp.where(m > 0, u, 0), updates, live)

  # Moments follow their parameters; a step count advances if any client reported.
  masks = optax.tree_utils.tree_map_params(
    optimizer,
    lambda _, mask: mask,
    state.opt_state,
    live,
    transform_non_params=lambda x: anybody.reshape((1,) * jnp.ndim(x)),
  )
  opt_state = jax.tree.map(
    lambda m, n, o: jnp.where(m > 0, n, o), masks, opt_state, state.opt_state
  )
  return optax.apply_updates(now, moved), opt_state
