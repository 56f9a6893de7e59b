"""Draws every client's rank, and maps ranks to the matrices of a model.

A client has one rank (G = 1) or one for each matrix (G = number of matrices).
The rules of `methods/` get ranks spread over matrices, so they need not know
which.
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
  """Draws the rank of every client in the population, int32 [N].

  A `data_correlation` permutes them so that larger ranks tend to go to clients
  with more examples, or with fewer if it is negative.

  Args:
    rng: source of randomness.
    population: N.
    distribution: 'uniform' or 'power_law' on r_min..r_max; 'normal' about its
      middle; 'explicit', the list repeated over the population; or 'tiers'.
    r_min: smallest rank.
    r_max: largest rank, R.
    exponent: of the power law.
    explicit: ranks of clients 0, 1, ...
    tiers: the ranks of the tiers.
    tier_fractions: share of the population in each tier; sums to 1.
    num_examples: how much data each client has, [N].
    data_correlation: rho in [-1, 1], about the rank correlation of a client's
      LoRA rank and data: 1 sorts clients by data, -1 in reverse; ties at random.

  Raises:
    ValueError: the distribution is unknown, or the correlation is impossible.

  >>> draw(
  ...   np.random.default_rng(0), 8, distribution='power_law', r_min=2, r_max=16,
  ...   exponent=1.0, explicit=(), tiers=(), tier_fractions=(),
  ... ).tolist()
  [7, 3, 2, 2, 11, 13, 6, 9]
  """
  _check_correlation(population, num_examples, data_correlation)
  if distribution == 'uniform':
    rank_N = rng.integers(r_min, r_max + 1, population)
  elif distribution == 'power_law':
    rank_N = _power_law(rng, population, r_min, r_max, exponent)
  elif distribution == 'normal':
    rank_N = _normal(rng, population, r_min, r_max)
  elif distribution == 'explicit':
    rank_N = np.resize(explicit, population)
  elif distribution == 'tiers':
    rank_N = rng.choice(tiers, population, p=tier_fractions)
  else:
    raise ValueError(f'{distribution=} is not one of {DISTRIBUTIONS}.')
  if num_examples is not None and data_correlation:
    rank_N = _follow_data(rng, rank_N, num_examples, data_correlation)
  return rank_N.astype(np.int32)


def _power_law(
  rng: np.random.Generator, population: int, r_min: int, r_max: int, exponent: float
) -> np.ndarray:
  """Draws ranks with p(r) ~ r**-exponent on r_min..r_max: small ones prevail."""
  ranks = np.arange(r_min, r_max + 1)
  weight = ranks.astype(float) ** -exponent
  return rng.choice(ranks, population, p=weight / weight.sum())


def _normal(
  rng: np.random.Generator, population: int, r_min: int, r_max: int
) -> np.ndarray:
  """Draws ranks about the middle of r_min..r_max, rounded and clipped to it.

  Either end is three standard deviations from the middle.
  """
  middle, deviation = (r_min + r_max) / 2, (r_max - r_min) / 6
  return np.rint(rng.normal(middle, deviation, population)).clip(r_min, r_max)


def _check_correlation(
  population: int, num_examples: np.ndarray | None, data_correlation: float
) -> None:
  """Raises ValueError unless ranks can be correlated with the data as asked."""
  if not -1 <= data_correlation <= 1:
    raise ValueError(f'{data_correlation=} must be in [-1, 1].')
  if data_correlation and num_examples is None:
    raise ValueError(f'{data_correlation=} needs num_examples; give them.')
  if num_examples is not None and len(num_examples) != population:
    raise ValueError(
      f'{len(num_examples)} num_examples do not fit {population=}; give one a client.'
    )


def _follow_data(
  rng: np.random.Generator,
  rank_N: np.ndarray,
  num_examples_N: np.ndarray,
  rho: float,
) -> np.ndarray:
  """Permutes ranks into the order of rho * data + noise: [N].

  Data counts by its order alone: it is mapped to normal scores, which makes it
  and the noise two normal variables of correlation rho (a Gaussian copula).
  """
  population = len(rank_N)
  # The normal scores of the clients' data, ties in random order.
  order_N = np.lexsort((rng.random(population), num_examples_N))
  inv_cdf = statistics.NormalDist().inv_cdf
  data_N = np.empty(population)
  data_N[order_N] = [inv_cdf((i + 0.5) / population) for i in range(population)]
  # The smallest rank goes to the smallest score, and so on.
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
  """Spreads the groups' values over the matrices: [G] -> target -> [L]."""
  layers = [adapters[t].a.shape[0] for t in sorted(adapters)]
  if group.shape[0] == 1:
    parts = [jnp.broadcast_to(group, (n,)) for n in layers]
  else:
    parts = jnp.split(group, np.cumsum(layers)[:-1])
  return dict(zip(sorted(adapters), parts, strict=True))


def gather(per_matrix: Norms, groups: int) -> Array:
  """Sums the values of each group's matrices: target -> [L, ...] to [G, ...]."""
  if not per_matrix:
    return jnp.zeros(groups)
  flat = jnp.concatenate([per_matrix[t] for t in sorted(per_matrix)])
  return flat.sum(0, keepdims=True) if groups == 1 else flat


def masks(rank_G: Array, adapters: Adapters) -> Masks:
  """Marks the slots that a client of these ranks owns: [G] -> target -> [L, R].

  >>> import jax
  >>> adapters = lora.init(jax.random.key(0), {'q': (2, 5, 7)}, 3, 'gaussian')
  >>> masks(jnp.array([2]), adapters)['q'].tolist()
  [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
  """
  return {
    t: lora.prefix_mask(rank, adapters[t].a.shape[-1])
    for t, rank in spread(rank_G, adapters).items()
  }
