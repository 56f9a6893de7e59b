"""Who gets which rank, and how ranks map to the matrices of a model.

A person has one rank (G = 1) or one a matrix (G = number of matrices). Every
rule of `methods/` sees ranks spread over matrices, so it need not know.
"""

import statistics
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from hetlora_jax import lora
from hetlora_jax.types import Adapters, Array, Masks, Norms

DISTRIBUTIONS = ('uniform', 'power_law', 'normal', 'explicit', 'tiers')


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
  num_examples: np.ndarray | None = None,
  data_correlation: float = 0.0,
) -> np.ndarray:
  """Draws every person's rank, int32 [N].

  They are independent of people's data at a `data_correlation` of 0. Otherwise
  the same ranks are handed out anew, the larger to those with more examples.

  Args:
    rng: source of randomness.
    population: N.
    distribution: 'uniform' over r_min..r_max; 'power_law', p(r) ~ r**-exponent
      truncated to r_min..r_max, which favours small ranks; 'normal' about the
      middle of r_min..r_max, three standard deviations from either, rounded
      and clipped; 'explicit', the list repeated over the population; 'tiers',
      each tier with its fraction.
    r_min: smallest rank.
    r_max: largest rank, R.
    exponent: of the power law.
    explicit: ranks of person 0, 1, ...
    tiers: the ranks of the tiers.
    tier_fractions: share of the population in each tier; sums to 1.
    num_examples: how much data each person has, [N].
    data_correlation: rho in [-1, 1], about the rank correlation of a person's
      LoRA rank and data: 1 sorts people by data, -1 in reverse; ties at random.

  >>> draw(
  ...   np.random.default_rng(0), 8, distribution='power_law', r_min=2, r_max=16,
  ...   exponent=1.0, explicit=(), tiers=(), tier_fractions=(),
  ... ).tolist()
  [7, 3, 2, 2, 11, 13, 6, 9]
  """
  _check_correlation(population, num_examples, data_correlation)
  choices = np.arange(r_min, r_max + 1)
  if distribution == 'uniform':
    rank = rng.choice(choices, population)
  elif distribution == 'power_law':
    weight = choices.astype(float) ** -exponent
    rank = rng.choice(choices, population, p=weight / weight.sum())
  elif distribution == 'normal':
    middle, deviation = (r_min + r_max) / 2, (r_max - r_min) / 6
    rank = np.rint(rng.normal(middle, deviation, population))
    rank = rank.clip(r_min, r_max)
  elif distribution == 'explicit':
    rank = np.resize(explicit, population)
  elif distribution == 'tiers':
    rank = rng.choice(tiers, population, p=tier_fractions)
  else:
    raise ValueError(f'{distribution=} is not one of {DISTRIBUTIONS}.')
  if num_examples is not None and data_correlation:
    rank = _follow_data(rng, rank, num_examples, data_correlation)
  return rank.astype(np.int32)


def _check_correlation(
  population: int, num_examples: np.ndarray | None, data_correlation: float
) -> None:
  """Raises ValueError unless ranks can follow the data so closely."""
  if not -1 <= data_correlation <= 1:
    raise ValueError(f'{data_correlation=} must be in [-1, 1].')
  if data_correlation and num_examples is None:
    raise ValueError(f'{data_correlation=} needs num_examples; give them.')
  if num_examples is not None and len(num_examples) != population:
    raise ValueError(
      f'{len(num_examples)} num_examples do not fit {population=}; give one a person.'
    )


def _follow_data(
  rng: np.random.Generator,
  rank_N: np.ndarray,
  num_examples_N: np.ndarray,
  rho: float,
) -> np.ndarray:
  """Hands the same ranks out in the order of rho * data + noise, [N]."""
  population = len(rank_N)
  order_N = np.lexsort((rng.random(population), num_examples_N))
  inv_cdf = statistics.NormalDist().inv_cdf
  data_N = np.empty(population)
  data_N[order_N] = [inv_cdf((i + 0.5) / population) for i in range(population)]
  noise_N = rng.standard_normal(population)
  score_N = rho * data_N + np.sqrt(1 - rho**2) * noise_N
  out_N = np.empty_like(rank_N)
  out_N[np.argsort(score_N, kind='stable')] = np.sort(rank_N)
  return out_N


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
  """Sums per-matrix values in groups: target -> [L, ...] to [G, ...]."""
  if not per_matrix:
    return jnp.zeros(groups)
  flat = jnp.concatenate([per_matrix[t] for t in sorted(per_matrix)])
  return flat.sum(0, keepdims=True) if groups == 1 else flat


def masks(rank_G: Array, adapters: Adapters) -> Masks:
  """Marks the slots that a rank owns: [G] -> target -> [L, R].

  >>> import jax
  >>> adapters = lora.init(jax.random.key(0), {'q': (2, 5, 7)}, 3, 'gaussian')
  >>> masks(jnp.array([2]), adapters)['q'].tolist()
  [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
  """
  return {
    t: lora.prefix_mask(rank, adapters[t].a.shape[-1])
    for t, rank in spread(rank_G, adapters).items()
  }
