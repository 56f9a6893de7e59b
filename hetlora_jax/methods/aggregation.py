"""How the clients' adapters become one.

Aggregate = (updates, weights, server) -> Adapters, in the space of factors, or
Deltas, in that of products. A slot that no client owns counts as the server's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hetlora_jax import lora
from hetlora_jax.methods.registry import rule
from hetlora_jax.types import (
  Adapters,
  Array,
  ClientUpdates,
  Deltas,
  Lora,
  Masks,
  Server,
)


@rule('aggregation', traits=['mean of factors'])
def factors(updates: ClientUpdates, weights: Masks, server: Server) -> Adapters:
  """Averages A and B apart, zero-padded to R (HetLoRA, arXiv 2401.06432)."""
  unowned = {t: 1 - m for t, m in updates.owned().items()}
  kept = lora.truncate(server.adapters, unowned)
  return {
    t: Lora(
      jnp.einsum('c...dr,c...r->...dr', x.a, weights[t]) + kept[t].a,
      jnp.einsum('c...rd,c...r->...rd', x.b, weights[t]) + kept[t].b,
    )
    for t, x in updates.adapters.items()
  }


@rule('aggregation', space='product')
def product(updates: ClientUpdates, weights: Masks, server: Server) -> Deltas:
  """Averages s A B without error (FlexLoRA, arXiv 2402.11505)."""
  unowned = {t: 1 - m for t, m in updates.owned().items()}
  kept = lora.deltas(lora.truncate(server.adapters, unowned), server.scale)
  out = {}
  for t, x in updates.adapters.items():
    scale = updates.scale.reshape(-1, *(1,) * (weights[t].ndim - 1))
    a = x.a * (scale * weights[t])[..., None, :]
    out[t] = jnp.einsum('c...dr,c...rf->...df', a, x.b) + kept[t]
  return out


def averaging_error(
  updates: ClientUpdates, weights: Masks, server: Server
) -> tuple[Deltas, Array]:
  """Returns mean(s A B) - s mean(A) mean(B), and its share of mean(s A B).

  Taken a layer at a time, so that products of all layers exist only if they
  are used.
  """
  error, squares = {}, []
  for t, x in updates.adapters.items():

    def one_layer(xs, t=t):
      a, b, weight, mask, server_t = xs
      alone = dataclasses.replace(updates, adapters={t: Lora(a, b)}, mask={t: mask})
      before = Server({t: server_t}, server.scale)
      exact = product(alone, {t: weight}, before)[t]
      mean = factors(alone, {t: weight}, before)
      lost = exact - lora.deltas(mean, server.scale)[t]
      return lost, jnp.stack([(lost**2).sum(), (exact**2).sum()])

    by_layer = jax.tree.map(
      lambda leaf: leaf.swapaxes(0, 1),
      (x.a, x.b, weights[t], updates.mask[t]),
    )
    error[t], square = jax.lax.map(one_layer, (*by_layer, server.adapters[t]))
    squares.append(square.sum(0))
  if not squares:
    return {}, jnp.float32(0)
  lost, whole = jnp.stack(squares).sum(0)
  return error, lora.safe_norm(lost) / jnp.maximum(lora.safe_norm(whole), 1e-30)


@rule('aggregation')
def changes(updates: ClientUpdates, weights: Masks, server: Server) -> Adapters:
  """Adds the averaged changes of the factors (FSLoRA, arXiv 2501.19389).

  A slot that a client did not train counts as unchanged, not as zero.
  """
  share = lora.slot_masks(jax.tree.map(jnp.multiply, weights, updates.mask))
  return jax.tree.map(
    lambda new, old, w: old + (w * (new - old[None])).sum(0),
    updates.adapters,
    server.adapters,
    share,
  )


def _middle(x: Array, owns: Array, trim: float) -> Array:
  """Averages the middle of the owners' values, each coordinate for itself.

  Args:
    x: [C, ...].
    owns: [C, ...], broadcasts to x.
    trim: share cut off at each end; 0.5 leaves the one or two in the middle.
  """
  count = (owns > 0).sum(0, dtype=jnp.int32)
  # float32's 0.26 * 450 is 116.99999: add 1e-4, so that its floor is 117.
  cut = jnp.floor(trim * count + 1e-4).astype(jnp.int32)
  cut = jnp.clip(cut, 0, jnp.maximum(count - 1, 0) // 2)
  place = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
  kept = (place >= cut[None]) & (place < (count - cut)[None])
  ordered = jnp.sort(jnp.where(owns > 0, x, jnp.inf), axis=0)
  total = jnp.where(kept, ordered, 0).sum(0)
  return total / jnp.maximum(kept.sum(0), 1)


@rule('aggregation', weighted=False)
def trimmed_mean(
  updates: ClientUpdates, weights: Masks, server: Server, *, trim: float
) -> Adapters:
  """Averages each coordinate without its extremes, over the slot's owners.

  Yin, Chen, Ramchandran, Bartlett, 2018, arXiv 1803.01498. Unweighted, and in
  the space of factors. Sorting needs every client's value in one place: over a
  mesh the clients' adapters are gathered.

  Args:
    updates: of the clients.
    weights: not used.
    server: what a slot without owners keeps.
    trim: share of the owners cut off at each end, rounded down.
  """
  del weights
  here = (updates.num_examples > 0).astype(jnp.float32)
  owns = {t: m * here[:, None, None] for t, m in updates.mask.items()}
  unowned = {t: 1 - m for t, m in updates.owned().items()}
  kept = lora.truncate(server.adapters, unowned)
  middle = functools.partial(_middle, trim=trim)
  found = jax.tree.map(middle, updates.adapters, lora.slot_masks(owns))
  return jax.tree.map(jnp.add, found, kept)


@rule('aggregation', weighted=False)
def median(updates: ClientUpdates, weights: Masks, server: Server) -> Adapters:
  """Takes each coordinate's median over the slot's owners.

  Yin, Chen, Ramchandran, Bartlett, 2018, arXiv 1803.01498; see `trimmed_mean`.
  """
  return trimmed_mean(updates, weights, server, trim=0.5)
