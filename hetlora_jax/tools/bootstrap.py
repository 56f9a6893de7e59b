"""Intervals of means over people: the percentile bootstrap (Efron, 1979).

People are resampled, not tokens or examples, since the texts of one person are
alike. E is the number of people.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


class Interval(NamedTuple):
  """An estimate and the two ends of its interval."""

  value: float
  low: float
  high: float


def mean(values: Sequence[float], seed: int = 0) -> Interval:
  """Returns the mean of one value per person, and its 95 % interval."""
  value_E = np.asarray(values, np.float64)
  return _interval(lambda i: value_E[i].mean(-1), len(value_E), seed)


def ratio(totals: Sequence[float], counts: Sequence[float], seed: int = 0) -> Interval:
  """Returns sum(totals) / sum(counts) and its 95 % interval.

  Every person contributes a total and a count, e.g. summed loss and tokens.
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
  """Estimates from all people, indexed [E], and from resamples of them [2000, E].

  scipy.stats.bootstrap draws the same resamples and gives the same interval, but
  takes 1.7 s to import and refuses a single person.
  """
  if not people:
    raise ValueError('there is nobody to resample: evaluate one person or more.')
  rng = np.random.default_rng(seed)
  resampled = estimate(rng.integers(people, size=(RESAMPLES, people)))
  low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  value = estimate(np.arange(people))
  return Interval(float(value), float(low), float(high))
