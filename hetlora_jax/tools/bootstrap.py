"""Intervals of means over people: the percentile bootstrap (Efron, 1979).

People are what is resampled, not tokens or examples, since those of one person
are alike.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


class Interval(NamedTuple):
  """An estimate and the ends of its interval."""

  value: float
  low: float
  high: float


def mean(values: Sequence[float], seed: int = 0) -> Interval:
  """Returns the mean of a value a person, and its 95 % interval."""
  value_E = np.asarray(values, np.float64)
  return _interval(lambda i: value_E[i].mean(-1), len(value_E), seed)


def ratio(totals: Sequence[float], counts: Sequence[float], seed: int = 0) -> Interval:
  """Returns sum(totals) / sum(counts) and its 95 % interval.

  Every person brings a total and a count, e.g. summed loss and tokens.
  """
  total_E, count_E = np.asarray([totals, counts], np.float64)
  if not (count_E > 0).all():
    raise ValueError(f'{counts=} must be positive: leave out who has nothing.')
  return _interval(
    lambda i: total_E[i].sum(-1) / count_E[i].sum(-1), len(total_E), seed
  )


def _interval(
  estimate: Callable[[np.ndarray], np.ndarray], people: int, seed: int
) -> Interval:
  """Estimates from people's places [E], and from resampled ones [2000, E]."""
  if not people:
    raise ValueError('there is nobody to resample: evaluate one person or more.')
  rng = np.random.default_rng(seed)
  resampled = estimate(rng.integers(people, size=(RESAMPLES, people)))
  low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  value = estimate(np.arange(people))
  return Interval(float(value), float(low), float(high))
