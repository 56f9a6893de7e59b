"""Algebra on zero-padded adapters.

An adapter always has R slots; rank r means slots r.. are zero in BOTH factors.
Functions act on the last two axes, those of a matrix; any axes may come before
them (layers, clients).
"""

import jax
import jax.numpy as jnp

from hetlora_jax.types import Adapters, Array, Deltas, Lora, Masks, Norms, PyTree

INITS = ('gaussian', 'kaiming_uniform')


def safe_norm(square_sum: Array) -> Array:
  """Returns the square root, with gradient 0 (not NaN) at 0."""
  positive = square_sum > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square_sum, 1.0)), 0)


def init(key: Array, dims: dict, slots: int, rule: str) -> Adapters:
  """Draws A and leaves B at zero, so that the first round starts at the base.

  Args:
    key: of the initialization's stream.
    dims: target -> (num_layers, d_in, d_out).
    slots: R, the rank slots of every adapter.
    rule: 'gaussian', N(0, 1/d_in) (Hu et al., 2021, arXiv 2106.09685), or
      'kaiming_uniform', U(-1/sqrt(d_in), 1/sqrt(d_in)), as PEFT draws it.
  """
  adapters = {}
  for i, (target, (layers, d_in, d_out)) in enumerate(sorted(dims.items())):
    key_t, shape = jax.random.fold_in(key, i), (layers, d_in, slots)
    if rule == 'gaussian':
      a = jax.random.normal(key_t, shape)
    else:
      a = jax.random.uniform(key_t, shape, minval=-1.0)
    adapters[target] = Lora(a / d_in**0.5, jnp.zeros((layers, slots, d_out)))
  return adapters


def prefix_mask(rank: Array, slots: int) -> Array:
  """Marks the first `rank` of `slots` slots: [...] int -> [..., R] float.

  >>> prefix_mask(jnp.array([1, 3]), 4).tolist()
  [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
  """
  index = jax.lax.broadcasted_iota(jnp.int32, (*rank.shape, slots), rank.ndim)
  return (index < rank[..., None]).astype(jnp.float32)


def energy_rank(energy: Array, share: Array) -> Array:
  """Counts how many first entries of [..., R] reach a share of the sum: [...].

  The count is at least 1, even where all entries are zero.

  >>> int(energy_rank(jnp.array([6.0, 3.0, 1.0]), 0.9))
  2
  """
  cumulative = energy.cumsum(-1)
  too_few = cumulative < share * cumulative[..., -1:]
  return jnp.minimum(1 + too_few.sum(-1), energy.shape[-1]).astype(jnp.int32)


def masked(adapter: Lora, mask: Array) -> Lora:
  """Zeroes the slots where `mask` [..., R] is 0, in both factors."""
  return Lora(adapter.a * mask[..., None, :], adapter.b * mask[..., :, None])


def truncate(adapters: Adapters, masks: Masks) -> Adapters:
  """Zeroes every slot outside `masks`; shapes stay the same.

  >>> whole = {'q': Lora(jnp.ones((1, 2, 3)), jnp.ones((1, 3, 4)))}
  >>> one = truncate(whole, {'q': prefix_mask(jnp.array([1]), 3)})
  >>> one['q'].a.tolist()
  [[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]
  >>> one['q'].b.sum(-1).tolist()
  [[4.0, 0.0, 0.0]]
  """
  return {t: masked(adapters[t], masks[t]) for t in adapters}


def slot_masks(masks: Masks) -> Adapters:
  """Shapes masks [L, R] to broadcast over the factors: [L, 1, R] and [L, R, 1]."""
  return {t: Lora(m[..., None, :], m[..., :, None]) for t, m in masks.items()}


def rescale(adapters: Adapters, ratio: Array, powers: tuple[float, float]):
  """Multiplies A by ratio**powers[0] and B by ratio**powers[1].

  This moves adapters from one LoRA scale to another: if the powers sum to 1 and
  s is divided by the ratio, `s A B` stays the same.
  """
  ratio_a, ratio_b = (ratio**power for power in powers)
  return {t: Lora(x.a * ratio_a, x.b * ratio_b) for t, x in adapters.items()}


def fold(base: PyTree, change: Deltas) -> PyTree:
  """Adds deltas to the base parameters of the same names, in float32.

  >>> fold({'layers': {'q': jnp.ones(2), 'k': jnp.ones(1)}}, {'q': 0.5})
  {'layers': {'k': Array([1.], dtype=float32), 'q': Array([1.5, 1.5], dtype=float32)}}
  """

  def add(path, leaf):
    name = path[-1].key
    if name not in change:
      return leaf
    return (leaf.astype(jnp.float32) + change[name]).astype(leaf.dtype)

  return jax.tree.map_with_path(add, base) if change else base


def delta_norm(adapter: Lora) -> Array:
  """Returns ||A B||_F from two R x R Gram matrices, without forming A B.

  >>> a, b = jnp.array([[1.0], [1.0]]), jnp.array([[3.0, 4.0]])
  >>> delta_norm(Lora(a, b)), jnp.linalg.norm(a @ b)
  (Array(7.071068, dtype=float32), Array(7.071068, dtype=float32))
  """
  gram_a = jnp.einsum('...dr,...ds->...rs', adapter.a, adapter.a)
  gram_b = jnp.einsum('...rd,...sd->...rs', adapter.b, adapter.b)
  # Rounding can make the sum slightly negative where A B is zero.
  return safe_norm(jnp.maximum((gram_a * gram_b).sum((-2, -1)), 0.0))


def factor_norm_product(adapter: Lora) -> Array:
  """Returns ||A||_F ||B||_F, by which HetLoRA measures the size of a tail."""
  norm_a = safe_norm((adapter.a**2).sum((-2, -1)))
  norm_b = safe_norm((adapter.b**2).sum((-2, -1)))
  return norm_a * norm_b


def delta_norms(adapters: Adapters, scale: Array) -> Norms:
  """Returns ||scale A B||_F of every matrix: target -> [L]; scale is []."""
  return {t: scale * delta_norm(x) for t, x in adapters.items()}


def deltas(adapters: Adapters, scale: Array) -> Deltas:
  """Forms `scale A B` of every matrix: target -> [..., d_in, d_out]."""
  return {t: scale * (x.a @ x.b) for t, x in adapters.items()}


def add(some: Deltas, others: Deltas) -> Deltas:
  """Adds each delta of `others` to the one of the same name in `some`."""
  return some | {name: some[name] + x for name, x in others.items()}


def slot_energy(adapters: Adapters, scale: Array) -> Array:
  """Sums (scale ||a_j|| ||b_j||)**2 over all matrices, for each slot: [R]."""
  return scale**2 * sum(
    ((x.a**2).sum(-2) * (x.b**2).sum(-1)).sum(0) for x in adapters.values()
  )
