"""Which evaluation of a run is the best, and whether the run ends early.

Both are read from the rows alone, so a run that was interrupted ends where an unbroken
one does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import NamedTuple

from hetlora_jax.config import ConfigError, Eval
from hetlora_jax.types import Row

STOP = 'stop'  # what `on_round` returns to end a run


class Judged(NamedTuple):
  """What the evaluations so far say."""

  round: int  # of the best, the first of equals
  value: float
  stop: int | None  # the round at which patience ended


def judge(rows: Iterable[Row], e: Eval) -> Judged | None:
  """Judges a run by its rows; None without an evaluation. NaN is the worst."""
  sign = -1 if e.better_side == 'higher' else 1
  best, waited, stop = None, 0, None
  mark = lowest = math.inf
  for row in rows:
    if e.metric not in row:
      continue
    value = sign * row[e.metric]
    value = math.inf if math.isnan(value) else value
    waited = 0 if best is None or value < mark - e.min_delta else waited + 1
    mark = mark if waited else value
    if best is None or value < lowest:
      best, lowest = (row['round'], row[e.metric]), value
    if stop is None and waited == e.patience:
      stop = row['round']
  return Judged(*best, stop) if best else None


def why(judged: Judged, e: Eval) -> str:
  """Says why patience ended."""
  least = f' by eval.min_delta={e.min_delta}' if e.min_delta else ''
  return (
    f'{e.metric} did not get better{least} in eval.patience={e.patience} evaluations '
    f'(best: {judged.value:.4g} after round {judged.round})'
  )


def check(e: Eval, columns: Collection[str]) -> None:
  """Raises ConfigError unless the metric is among the columns of an evaluation."""
  if e.metric not in columns:
    raise ConfigError(
      f'config.eval.metric={e.metric!r} is nothing that this run evaluates: '
      f'{", ".join(columns)}.'
    )
