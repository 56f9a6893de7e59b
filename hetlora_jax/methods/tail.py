"""The tail of an adapter, which HetLoRA penalises and prunes.

Cho, Liu, Xu, Fahrezi, Joshi, 2024, arXiv 2401.06432. The tail of a rank-r
adapter is its slots [kept, r) with kept = floor(gamma r); its size is
||B_tail||_F ||A_tail||_F, per matrix.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from hetlora_jax import lora, ranks
from hetlora_jax.types import Adapters, Array, Norms

ROUNDINGS = {'floor': jnp.floor, 'nearest': jnp.round}


def kept_rank(rank: Array, gamma: Array, rounding: str) -> Array:
  """Returns the rank without its tail, before any lower bound: int32.

  >>> kept_rank(jnp.array([5, 20, 50]), 0.95, 'floor').tolist()
  [4, 19, 47]
  """
  # 0.95 * 20 is a hair below 19 in binary; floor must not see that.
  hair = 1e-4 if rounding == 'floor' else 0.0
  return ROUNDINGS[rounding](gamma * rank + hair).astype(jnp.int32)


def check(rank: Sequence[int], gamma: float, rounding: str) -> None:
  """Raises if no person would have a tail, which would turn pruning off."""
  kept = kept_rank(jnp.asarray(rank), jnp.float32(gamma), rounding)
  if gamma < 1 and bool((kept == jnp.asarray(rank)).all()):
    raise ValueError(
      f'federated.gamma={gamma} with {rounding=} leaves an empty tail for '
      f'every rank up to {max(rank)}, so nothing is penalised or pruned: set '
      "methods.tail_rounding='floor', or a smaller gamma, or gamma=1 to turn "
      'pruning off.'
    )


def norms(adapters: Adapters, rank_G: Array, gamma: Array, rounding: str) -> Norms:
  """Returns the size of every matrix's tail: target -> [L]."""
  rank = ranks.spread(rank_G, adapters)
  kept = ranks.spread(kept_rank(rank_G, gamma, rounding), adapters)
  out = {}
  for t, adapter in adapters.items():
    slots = adapter.a.shape[-1]
    head = lora.prefix_mask(kept[t], slots)
    mask = lora.prefix_mask(rank[t], slots) * (1 - head)
    out[t] = lora.factor_norm_product(lora.masked(adapter, mask))
  return out
