"""Who gets which rank, and how ranks map to the matrices of a model.

A person has one rank (G = 1) or one a matrix (G = number of matrices). Every
rule of `methods/` sees ranks spread over matrices, so it need not know.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from hetlora_jax import lora
from hetlora_jax.types import Adapters, Array, Masks, Norms

DISTRIBUTIONS = ('uniform', 'power_law', 'explicit', 'tiers')


def draw(
  rng: np.random.Generator,
  population: int,
  *,
  distribution: str,
  r_min: int,
  r_max: int,
  exponent: float,
  explicit: Sequence[int],
  tiers: Sequence[int],
  tier_fractions: Sequence[float],
) -> np.ndarray:
  """Draws every person's rank, int32 [N], independent of their data.

  Args:
    rng: source of randomness.
    population: N.
    distribution: 'uniform' over r_min..r_max; 'power_law', p(r) ~ r**-exponent
      truncated to r_min..r_max, which favours small ranks; 'explicit', the
      list repeated over the population; 'tiers', each tier with its fraction.
    r_min: smallest rank.
    r_max: largest rank, R.
    exponent: of the power law.
    explicit: ranks of person 0, 1, ...
    tiers: the ranks of the tiers.
    tier_fractions: share of the population in each tier; sums to 1.
  """
  choices = np.arange(r_min, r_max + 1)
  if distribution == 'uniform':
    rank = rng.choice(choices, population)
  elif distribution == 'power_law':
    weight = choices.astype(float) ** -exponent
    rank = rng.choice(choices, population, p=weight / weight.sum())
  elif distribution == 'explicit':
    rank = np.resize(explicit, population)
  elif distribution == 'tiers':
    rank = rng.choice(tiers, population, p=tier_fractions)
  else:
    raise ValueError(f'{distribution=} is not one of {DISTRIBUTIONS}.')
  return rank.astype(np.int32)


def num_groups(adapters: Adapters, scope: str) -> int:
  """Returns G: 1 for scope 'client', the number of matrices for 'matrix'."""
  if scope == 'client':
    return 1
  return sum(adapter.a.shape[0] for adapter in adapters.values())


def spread(group: Array, adapters: Adapters) -> dict[str, Array]:
  """Gives every matrix its group's value: [G] -> target -> [L]."""
  layers = [adapters[t].a.shape[0] for t in sorted(adapters)]
  if group.shape[0] == 1:
    parts = [jnp.broadcast_to(group, (n,)) for n in layers]
  else:
    parts = jnp.split(group, np.cumsum(layers)[:-1])
  return dict(zip(sorted(adapters), parts, strict=True))


def gather(per_matrix: Norms, groups: int) -> Array:
  """Sums per-matrix values within their groups: target -> [L] to [G]."""
  flat = jnp.concatenate([per_matrix[t] for t in sorted(per_matrix)])
  return flat.sum(keepdims=True) if groups == 1 else flat


def masks(rank_G: Array, adapters: Adapters) -> Masks:
  """Marks the slots that a rank owns: [G] -> target -> [L, R]."""
  return {
    t: lora.prefix_mask(rank, adapters[t].a.shape[-1])
    for t, rank in spread(rank_G, adapters).items()
  }
