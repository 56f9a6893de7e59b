"""Intervals of means over people, and over seeds too: the percentile bootstrap.

People are resampled (Efron, 1979), not tokens or examples, since the texts of one
person are alike. Where all people were measured under several seeds, people and seeds
are resampled each on their own and met again, since neither lies within the other:
the pigeonhole bootstrap (Owen, 2007), whose variance errs to the large side (Owen and
Eckles, 2012, arXiv 1106.2125). A difference between two arms that met the same people
and seeds is a ratio of differences, so what people have in common cancels (pairing).
E is the number of people, S of seeds, D of resamples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hetlora_jax import prng

RESAMPLES, LEVEL = 2000, 0.95


class Interval(NamedTuple):
  """An estimate and the two ends of its interval."""

  value: float
  low: float
  high: float

  def signed(self, digits: int = 3) -> str:
    """Renders a difference.

    >>> Interval(0.5, -0.25, 1.0).signed(2)
    '+0.50 [-0.25, +1.00]'
    """
    value, low, high = (f'{x:+.{digits}f}' for x in self)
    return f'{value} [{low}, {high}]'


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
  """Returns the mean of one value per person, and its 95 % interval.

  Args:
    values: [E], or of several seeds [S, E].
    seed: of the resamples.
  """
  return ratio(values, np.ones(np.shape(values)[-1]), seed)


def ratio(
  totals: Sequence[float] | np.ndarray,
  counts: Sequence[float] | np.ndarray,
  seed: int = 0,
) -> Interval:
  """Returns sum(totals) / sum(counts), the mean over seeds, and its 95 % interval.

  The interval of a single seed tells of people only. That of few seeds is too short,
  as every bootstrap of few: by a factor sqrt(1 - 1/S) as far as seeds make it wide.

  Args:
    totals: what every person contributes, e.g. summed loss: [E], or [S, E].
    counts: e.g. tokens, the same under all seeds: [E].
    seed: of the resamples; intervals of equally many people and seeds share them.
  """
  total_SE, count_E = np.atleast_2d(np.asarray(totals, float)), np.asarray(counts)
  seeds, people = total_SE.shape
  if not people:
    raise ValueError('there is nobody to resample: evaluate one person or more.')
  if not (count_E > 0).all():
    raise ValueError(f'{counts=} must be positive: leave out who has nothing.')
  rng = prng.host_stream(seed, 'bootstrap')
  times_DS, times_DE = (
    rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) for n in (seeds, people)
  )
  total_DE = times_DS @ total_SE / seeds
  value_D = (times_DE * total_DE).sum(1) / (times_DE @ count_E)
  low, high = np.quantile(value_D, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  value = total_SE.mean(0).sum() / count_E.sum()
  return Interval(float(value), float(low), float(high))
