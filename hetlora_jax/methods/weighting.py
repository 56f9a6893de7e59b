"""How much each client counts, for every matrix and rank slot.

Weigh = (num_examples [C], masks [C, L, R], norms [C, L]) -> weights of the
shape of the masks, summing to 1 over the clients (over a slot's owners, in the
owner rules). A client without examples weighs nothing. The rules never see
factors.
"""

import jax.numpy as jnp

from hetlora_jax.methods.registry import rule
from hetlora_jax.types import Array, Masks, Norms


def _share(value: Array) -> Array:
  """Divides by the sum over clients (the first axis); all-zero stays zero."""
  total = value.sum(0, keepdims=True)
  return value / jnp.where(total > 0, total, 1)


def _everywhere(weight_C: Array, masks: Masks) -> Masks:
  """Gives every matrix and slot the client's weight."""
  return {
    t: jnp.broadcast_to(weight_C[:, None, None], m.shape) for t, m in masks.items()
  }


@rule('weighting')
def uniform(num_examples: Array, masks: Masks, norms: Norms) -> Masks:
  """Weighs all clients alike."""
  del norms
  return _everywhere(_share((num_examples > 0).astype(jnp.float32)), masks)


@rule('weighting')
def size(num_examples: Array, masks: Masks, norms: Norms) -> Masks:
  """Weighs clients by their examples (FedAvg; McMahan et al., 2017).

  >>> weights = size(jnp.array([3.0, 0.0, 1.0]), {'q': jnp.ones((3, 1, 2))}, {})
  >>> weights['q'][:, 0, 0].tolist()
  [0.75, 0.0, 0.25]
  """
  del norms
  return _everywhere(_share(num_examples), masks)


@rule('weighting', traits=['norms'])
def norm(
  num_examples: Array, masks: Masks, norms: Norms, *, weight_scope: str
) -> Masks:
  """Weighs clients by ||dW_k||_F, richer updates more (HetLoRA, 2401.06432).

  Args:
    num_examples: [C]; only its zeros matter.
    masks: target -> [C, L, R].
    norms: target -> [C, L].
    weight_scope: 'model', one norm over all matrices; 'layer', over the matrices of
      a layer; 'matrix', each its own.
  """
  present = (num_examples > 0).astype(jnp.float32)
  square = {t: x**2 for t, x in norms.items()}
  if weight_scope != 'matrix':
    layer = sum(square.values())
    square = dict.fromkeys(square, layer)
  if weight_scope == 'model':
    whole = jnp.broadcast_to(layer.sum(1, keepdims=True), layer.shape)
    square = dict.fromkeys(square, whole)
  out = {}
  for t, mask in masks.items():
    weight = jnp.sqrt(square[t]) * present[:, None]
    # Clients that have learnt nothing yet all have norm zero: all are alike.
    silent = weight.sum(0, keepdims=True) == 0
    weight = _share(jnp.where(silent, present[:, None], weight))
    out[t] = jnp.broadcast_to(weight[..., None], mask.shape)
  return out


def _owners(value_C: Array, masks: Masks) -> Masks:
  """Shares every slot among the clients who own it."""
  return {t: _share(value_C[:, None, None] * m) for t, m in masks.items()}


@rule('weighting')
def owner_size(num_examples: Array, masks: Masks, norms: Norms) -> Masks:
  """Weighs a slot's owners by their examples (RBLA, arXiv 2408.08699).

  The same as replication padding (arXiv 2406.17477), as the rank-partitioned
  weights of raFLoRA (2602.13486) and as the segments of PreLort (2606.15963).
  A slot without owners has no weight.
  """
  del norms
  return _owners(num_examples, masks)


@rule('weighting')
def owner_uniform(num_examples: Array, masks: Masks, norms: Norms) -> Masks:
  """Weighs a slot's owners alike."""
  del norms
  return _owners((num_examples > 0).astype(jnp.float32), masks)
