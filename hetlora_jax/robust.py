"""What clients may send that a server should not believe, and what it does then."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hetlora_jax import lora, prng
from hetlora_jax.types import Array, PyTree, Trained


def moved(received: Trained, trained: Trained, factor: Array) -> Trained:
  """Returns received + factor (trained - received); at factor 1, `trained`."""
  return jax.tree.map(
    lambda r, t: jnp.where(factor == 1, t, r + factor * (t - r)),
    received,
    trained,
  )


def scaled_by_malicious(
  received: Trained,
  trained: Trained,
  client_id: Array,
  seed: Array,
  *,
  share: float,
  scale: float,
) -> Trained:
  """Scales the change that a malicious client sends (model replacement).

  Bagdasaryan et al., 2018, arXiv 1807.00459. Whether a person is malicious is
  drawn once, from the seed and their id.

  Args:
    received: what the client started from.
    trained: what it ended with.
    client_id: [].
    seed: [] uint32.
    share: of the people that are malicious.
    scale: of their change; inf makes what they send not finite.
  """
  draw = jax.random.uniform(prng.stream(seed, 'malicious', client_id))
  return moved(received, trained, jnp.where(draw < share, scale, 1.0))


def bounded(received: Trained, trained: Trained, *, norm: float) -> Trained:
  """Shortens a change whose joint L2 norm exceeds a bound to the bound.

  Sun, Kairouz, Suresh, McMahan, 2019, arXiv 1911.07963.
  """
  change = jax.tree.leaves(jax.tree.map(jnp.subtract, trained, received))
  size = lora.safe_norm(sum(((x**2).sum() for x in change), jnp.float32(0)))
  factor = jnp.where(size > norm, norm / jnp.maximum(size, 1e-30), 1.0)
  return moved(received, trained, factor)


def sound(tree: PyTree) -> Array:
  """Tells whether every number of what a client sends is finite: []."""
  finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
  return jnp.stack(finite).all()


def only_if(condition: Array, tree: PyTree) -> PyTree:
  """Returns zeros instead of a tree unless a condition holds."""
  return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)
