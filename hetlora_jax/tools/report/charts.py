"""Places series and heat maps on a drawing area; `templates/charts.html.j2` draws them.

Coordinates are SVG's: from the top left corner, down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import matplotlib.ticker
import numpy as np

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 42, 348, 24, 194  # the edges of what is drawn
_MOST_MARKERS, _MOST_COLUMNS = 16, 80


class Line(NamedTuple):
  """A series of a chart, in a band that is twice the deviation high."""

  name: str
  number: int  # chooses colour, dashes and marker
  x: Sequence[float]
  y: Sequence[float]
  deviation: Sequence[float] | float = 0.0


class Series(NamedTuple):
  """A placed line; `band` and `line` are the `d` attributes of SVG paths."""

  number: int
  band: str  # empty without deviations
  line: str
  marks: list[tuple[float, float, str]]  # x, y and the label under the pointer


class Chart(NamedTuple):
  """A placed chart, either of series or a heat map."""

  title: str
  about: str  # its ends in words, for those who do not see it
  measured: bool = True
  x_title: str = ''
  y_title: str = ''
  x_ticks: Sequence[tuple[float, float]] = ()  # place and value
  y_ticks: Sequence[tuple[float, float]] = ()
  series: Sequence[Series] = ()
  cells: Sequence[tuple[int, str]] = ()  # of a heat map: level and `d`
  over: Sequence[tuple[str, str]] = ()  # lines over a heat map: name and `d`


class Axis(NamedTuple):
  """A scale from data to the drawing area."""

  low: float
  high: float
  start: float  # where `low` is
  end: float
  log: bool = False

  def at(self, value: float) -> float:
    """Returns where a value is."""
    numbers = (self.low, self.high, value)
    low, high, x = np.log10(numbers) if self.log else numbers
    return self.start + (x - low) / (high - low) * (self.end - self.start)

  def ticks(self, whole: bool = False) -> list[tuple[float, float]]:
    """Returns the place and value of each tick: round numbers or whole ones."""
    if self.log:
      few = self.high < 100 * self.low
      locator = matplotlib.ticker.LogLocator(subs=(1, 2, 5) if few else (1,))
    else:
      locator = matplotlib.ticker.MaxNLocator(
        7, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1
      )
    values = locator.tick_values(self.low, self.high)
    hair = 1e-9 * (self.high - self.low)  # keeps a tick at an end despite rounding
    return [(self.at(v), v) for v in values if self.low - hair <= v <= self.high + hair]


def _range(values: np.ndarray, log: bool, pad: float) -> tuple[float, float]:
  low, high = values.min(), values.max()
  if log:
    return low / 1.1, high * 1.1
  room = (high - low) * pad or abs(high) * 0.05 or 1
  return low - room, high + room


def _points(line: Line, log: bool) -> np.ndarray:
  """Returns x, y and deviation [n, 3] of the points that have a place."""
  columns = np.broadcast_arrays(line.x, line.y, line.deviation)
  points = np.stack(columns, 1).astype(float)
  return points[np.isfinite(points).all(1) & ((points[:, 0] > 0) | (not log))]


def _d(xs: Iterable[float], ys: Iterable[float], x: Axis, y: Axis) -> str:
  points = zip(xs, ys, strict=True)
  return 'M' + 'L'.join(f'{x.at(a):.1f} {y.at(b):.1f}' for a, b in points)


def _placed(line: Line, points: np.ndarray, x: Axis, y: Axis, tip: str) -> Series:
  xs, ys, deviation = points.T
  band = ''
  if deviation.any():  # along the lower edge, and back along the upper
    edges = np.concatenate([ys - deviation, (ys + deviation)[::-1]])
    band = _d(np.concatenate([xs, xs[::-1]]), edges, x, y) + 'z'
  every = math.ceil(len(points) / _MOST_MARKERS)
  marks = [
    (x.at(a), y.at(b), f'{line.name}: {tip.format(x=a, y=b)}')
    for a, b, _ in points[::every]
  ]
  return Series(line.number, band, _d(xs, ys, x, y), marks)


def empty(title: str) -> Chart:
  """Returns a chart of which nothing has been measured."""
  return Chart(title, 'Nothing has been measured.', measured=False)


def lines(
  title: str, drawn: Sequence[Line], x_title: str, y_title: str, *,
  tip: str, log: bool = False, whole: bool = False, pad: float = 0.05,
) -> Chart:  # fmt: skip
  """Places series on two axes.

  Args:
    tip: the label of a marker, with {x} and {y}.
    log: whether the x axis is logarithmic; points at 0 are then left out.
    whole: whether the ticks of the x axis are whole numbers.
    pad: room above and below, a share of the range.
  """
  inside = [(line, _points(line, log)) for line in drawn]
  inside = [(line, points) for line, points in inside if len(points)]
  if not inside:
    return empty(title)
  xs, ys, deviation = np.concatenate([points for _, points in inside]).T
  x = Axis(*_range(xs, log, 0.02), LEFT, RIGHT, log)
  edges = np.concatenate([ys - deviation, ys + deviation])
  y = Axis(*_range(edges, False, pad), BOTTOM, TOP)
  about = ' '.join(
    f'{line.name}: {points[0, 1]:.4g} at first, {points[-1, 1]:.4g} at last.'
    for line, points in inside
  )
  series = [_placed(line, points, x, y, tip) for line, points in inside]
  return Chart(
    title, about, True, x_title, y_title, x.ticks(whole), y.ticks(), series
  )  # fmt: skip


def _cells(level_TK: np.ndarray, x: Axis, y: Axis, first: int) -> list[tuple[int, str]]:
  """Places cells, one path for each level; equal neighbours in time are joined."""
  wide = (x.end - x.start) / len(level_TK)
  high = y.at(0) - y.at(1)
  paths: dict[int, str] = {}
  for k in range(level_TK.shape[1]):
    cuts = np.flatnonzero(np.diff(level_TK[:, k])) + 1
    for run in np.split(np.arange(len(level_TK)), cuts):
      level, left = int(level_TK[run[0], k]), x.start + run[0] * wide
      paths[level] = paths.get(level, '') + (
        f'M{left:.1f} {y.at(k + first + 0.5):.1f}h{len(run) * wide:.1f}'
        f'v{high:.1f}h{-len(run) * wide:.1f}z'
      )
  return [(level, d) for level, d in sorted(paths.items()) if level]


def heat(
  title: str, about: str, rounds: Sequence[int], value_TK: np.ndarray,
  edges: Sequence[float], first: int, y_title: str,
  over: dict[str, Sequence[float]],
) -> Chart:  # fmt: skip
  """Places a value for each round and rank or slot, and lines over them.

  Args:
    edges: lower bounds of the classes; values below the first are not drawn.
    first: what column 0 of the values is, e.g. slot 1.
    over: the lines, name -> values [T].
  """
  x = Axis(rounds[0] - 0.5, rounds[-1] + 0.5, LEFT, RIGHT)
  y = Axis(first - 0.5, first + value_TK.shape[1] - 0.5, BOTTOM, TOP)
  columns = np.linspace(0, len(rounds) - 1, _MOST_COLUMNS).round().astype(int)
  level_TK = np.digitize(value_TK[np.unique(columns)], edges)
  return Chart(
    title, about, True, 'round', y_title, x.ticks(whole=True), y.ticks(whole=True),
    cells=_cells(level_TK, x, y, first),
    over=[(name, _d(rounds, values, x, y)) for name, values in over.items()],
  )  # fmt: skip
