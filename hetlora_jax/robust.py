"""Faulty or malicious client updates, and how the server bounds their effect."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hetlora_jax import lora, prng
from hetlora_jax.types import Array, PyTree, Trained


def _scale_change(received: Trained, trained: Trained, factor: Array) -> Trained:
  """Returns received + factor * (trained - received); exactly `trained` at 1."""
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

  Bagdasaryan et al., 2018, arXiv 1807.00459. Whether a client is malicious is
  drawn once per run, from the seed and the client's id.

  Args:
    received: what the client started from.
    trained: what it ended with.
    client_id: [].
    seed: [] uint32.
    share: of the population that is malicious.
    scale: factor of their change; inf makes what they send not finite.
  """
  draw = jax.random.uniform(prng.stream(seed, 'malicious', client_id))
  return _scale_change(received, trained, jnp.where(draw < share, scale, 1.0))


def bounded(received: Trained, trained: Trained, *, norm: float) -> Trained:
  """Clips a client's change to a bound on its L2 norm over all parameters.

  Sun, Kairouz, Suresh, McMahan, 2019, arXiv 1911.07963.
  """
  change = jax.tree.leaves(jax.tree.map(jnp.subtract, trained, received))
  size = lora.safe_norm(sum(((x**2).sum() for x in change), jnp.float32(0)))
  factor = jnp.where(size > norm, norm / jnp.maximum(size, 1e-30), 1.0)
  return _scale_change(received, trained, factor)


def all_finite(tree: PyTree) -> Array:
  """Returns whether every number in a tree is finite: [] bool."""
  finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
  return jnp.stack(finite).all()


def only_if(condition: Array, tree: PyTree) -> PyTree:
  """Returns the tree if a condition holds, and zeros in its shapes otherwise."""
  return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)
