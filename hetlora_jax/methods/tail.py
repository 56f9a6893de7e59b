"""The tail of an adapter, which HetLoRA penalises and prunes.

Cho, Liu, Xu, Fahrezi, Joshi, 2024, arXiv 2401.06432. The tail of a rank-r
adapter is its slots [kept, r) with kept = floor(gamma r); its size is
||B_tail||_F ||A_tail||_F, per matrix.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from hetlora_jax import lora, ranks
from hetlora_jax.types import Adapters, Array, Norms


def kept_rank(rank: Array, gamma: Array) -> Array:
  """Returns the rank without its tail, floor(gamma r): int32.

  >>> kept_rank(jnp.array([5, 20, 50]), 0.95).tolist()
  [4, 19, 47]
  """
  # float32's 0.42 * 150 is 62.999996: add 1e-4, so that its floor is 63.
  return jnp.floor(gamma * rank + 1e-4).astype(jnp.int32)


def check(rank: Sequence[int], gamma: float) -> None:
  """Raises if no client would have a tail, which would turn pruning off."""
  # In numpy, so that checking a configuration does not start jax.
  kept = np.floor(np.float32(gamma) * np.float32(rank) + np.float32(1e-4))
  if gamma < 1 and (kept == np.asarray(rank)).all():
    raise ValueError(
      f'federated.gamma={gamma} leaves an empty tail for every rank up to '
      f'{max(rank)}, so nothing is penalised or pruned: take a smaller gamma, or '
      'gamma=1 to turn pruning off.'
    )


def norms(adapters: Adapters, rank_G: Array, gamma: Array) -> Norms:
  """Returns the size of the tail of every matrix: target -> [L]."""
  rank = ranks.spread(rank_G, adapters)
  kept = ranks.spread(kept_rank(rank_G, gamma), adapters)
  out = {}
  for t, adapter in adapters.items():
    slots = adapter.a.shape[-1]
    head = lora.prefix_mask(kept[t], slots)
    mask = lora.prefix_mask(rank[t], slots) * (1 - head)
    out[t] = lora.factor_norm_product(lora.masked(adapter, mask))
  return out
