"""Charts as inline SVG; colours, light or dark, are the page's CSS classes.

A series is told by its colour, its dashes and its marker alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hetlora_jax.tools.report.markup import Markup, join, tag

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 24, 36  # margins
COLOURS, MOST_MARKERS, MOST_COLUMNS = 8, 16, 80
_DASHES = ('none', '6 3', '2 2', '8 3 2 3', '12 3')
_MARKERS = (
  'M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0', 'M-3-3h6v6h-6z', 'M0-4L4 3H-4z',
  'M0-4L4 0L0 4L-4 0z', 'M0 4L4-3H-4z', 'M-1-4h2v3h3v2h-3v3h-2v-3h-3v-2h3z',
)  # fmt: skip


class Line(NamedTuple):
  """A series of a chart; `low` and `high` bound a band around it."""

  name: str
  style: int
  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] = ()
  high: Sequence[float] = ()


class Axis(NamedTuple):
  """A scale from data to the page."""

  low: float
  high: float
  start: float  # where `low` is on the page
  end: float
  log: bool = False

  def at(self, value: float) -> float:
    """Returns where a value is."""
    low, high, x = (
      (math.log10(v) for v in (self.low, self.high, value))
      if self.log
      else (self.low, self.high, value)
    )
    return self.start + (x - low) / (high - low) * (self.end - self.start)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
  """Returns four to eight round numbers within a range, or fewer whole ones."""
  step = 10 ** math.floor(math.log10((high - low) / 4))
  step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 7)
  step = max(step, 1) if whole else step
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
  powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  within = lambda ms: [  # noqa: E731
    m * 10.0**p for p in powers for m in ms if low <= m * 10.0**p <= high
  ]
  return within((1,)) if len(within((1,))) > 2 else within((1, 2, 5))


def _range(values: Sequence[float], log: bool, pad: float) -> tuple[float, float]:
  low, high = min(values), max(values)
  if log:
    return low / 1.1, high * 1.1
  room = (high - low) * pad or abs(high) * 0.05 or 1
  return low - room, high + room


def _finite(pairs, log: bool) -> list[tuple[float, float]]:
  return [
    (float(x), float(y))
    for x, y in pairs
    if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log)
  ]


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
  return 'M' + 'L'.join(f'{x.at(a):.1f} {y.at(b):.1f}' for a, b in points)


def style(number: int) -> dict[str, str]:
  """Returns the class of a series' colour; its dashes are `dash`'s."""
  return {'class_': f's{number % COLOURS}'}


def dash(number: int) -> str:
  """Returns a series' dashes."""
  return _DASHES[number % len(_DASHES)]


def marker(number: int, x: float, y: float, label: str = '') -> Markup:
  """Returns a series' marker; its label shows under the pointer."""
  shape = _MARKERS[number % len(_MARKERS)]
  about = [tag('title', label)] if label else []
  at = f'translate({x:.1f} {y:.1f})'
  return tag('path', *about, class_='mark', d=shape, transform=at)


def swatch(number: int) -> Markup:
  """Returns a series' line and marker, for a legend."""
  line = tag('path', class_='line', d='M0 6H34', stroke_dasharray=dash(number))
  return tag(
    'svg', tag('g', line, marker(number, 17, 6), **style(number)),
    viewBox='0 0 34 12', width=34, height=12, aria_hidden='true',
  )  # fmt: skip


def _draw(line: Line, x: Axis, y: Axis, tip: str) -> Markup:
  parts = []
  if len(line.low):
    edge = _finite(zip(line.x, line.low, strict=True), x.log)
    edge += _finite(zip(line.x, line.high, strict=True), x.log)[::-1]
    if len(edge) > 2:
      parts.append(tag('path', class_='band', d=_path(edge, x, y) + 'z'))
  points = _finite(zip(line.x, line.y, strict=True), x.log)
  if points:
    d = _path(points, x, y)
    parts.append(tag('path', class_='line', d=d, stroke_dasharray=dash(line.style)))
  every = math.ceil(len(points) / MOST_MARKERS)
  for a, b in points[::every] if points else ():
    label = f'{line.name}: {tip.format(x=a, y=b)}'
    parts.append(marker(line.style, x.at(a), y.at(b), label))
  return tag('g', *parts, **style(line.style))


def _axes(
  x: Axis, y: Axis, x_ticks, y_ticks, x_title: str, y_title: str, grid: bool
) -> Iterator[Markup]:
  bottom = HEIGHT - BOTTOM
  for value in y_ticks:
    at = f'{y.at(value):.1f}'
    if grid:
      yield tag('path', class_='grid', d=f'M{LEFT} {at}H{WIDTH - RIGHT}')
    else:
      yield tag('path', class_='tick', d=f'M{LEFT} {at}h-4')
    label = f'{value:g}'
    yield tag('text', label, x=LEFT - 6, y=at, dy='.35em', text_anchor='end')
  for value in x_ticks:
    at = f'{x.at(value):.1f}'
    yield tag('path', class_='tick', d=f'M{at} {bottom}v4')
    label = f'{value:g}'
    yield tag('text', label, x=at, y=bottom + 15, text_anchor='middle')
  yield tag('path', class_='axis', d=f'M{LEFT} {bottom}H{WIDTH - RIGHT}')
  middle = (LEFT + WIDTH - RIGHT) / 2
  yield tag('text', x_title, x=middle, y=HEIGHT - 4, text_anchor='middle')
  yield tag('text', y_title, x=4, y=12)


def _svg(title: str, about: str, *parts: Markup) -> Markup:
  return tag(
    'svg', tag('title', title), tag('desc', about), *parts,
    class_='chart', role='img', aria_label=f'{title}. {about}',
    viewBox=f'0 0 {WIDTH} {HEIGHT}',
  )  # fmt: skip


def empty(title: str) -> Markup:
  """Draws a chart of which nothing has been measured."""
  text = tag('text', 'nothing measured', x=WIDTH / 2, y=HEIGHT / 2,
             text_anchor='middle')  # fmt: skip
  return _svg(title, 'Nothing has been measured.', text)


def lines(
  title: str, drawn: Sequence[Line], x_title: str, y_title: str, *,
  tip: str, log: bool = False, whole: bool = False, pad: float = 0.05,
) -> Markup:  # fmt: skip
  """Draws series.

  Args:
    title: what the chart shows; its ends are told beside it.
    drawn: the series.
    x_title: of the x axis, with its unit.
    y_title: likewise.
    tip: of a marker, with {x} and {y}.
    log: the x axis is logarithmic; what is at 0 is left out.
    whole: the x axis has whole numbers alone.
    pad: room above and below, a share of the range.
  """
  inside = [_finite(zip(s.x, s.y, strict=True), log) for s in drawn]
  points = [point for part in inside for point in part]
  if not points:
    return empty(title)
  edges = [
    b for s in drawn for side in (s.low, s.high) if len(side)
    for _, b in _finite(zip(s.x, side, strict=True), log)
  ]  # fmt: skip
  x = Axis(*_range([a for a, _ in points], log, 0.02), LEFT, WIDTH - RIGHT, log)
  y = Axis(*_range([b for _, b in points] + edges, False, pad), HEIGHT - BOTTOM, TOP)
  x_ticks = _log_ticks(x.low, x.high) if log else ticks(x.low, x.high, whole)
  about = ' '.join(
    f'{s.name}: {part[0][1]:.4g} at first, {part[-1][1]:.4g} at last.'
    for s, part in zip(drawn, inside, strict=True)
    if part
  )
  axes = _axes(x, y, x_ticks, ticks(y.low, y.high), x_title, y_title, True)
  return _svg(title, about, *axes, *[_draw(s, x, y, tip) for s in drawn])


def _cells(level_TK: np.ndarray, x: Axis, y: Axis, first: int) -> Markup:
  """Draws cells of the same level as one path, neighbours in time joined."""
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
  return join(
    tag('path', class_=f'heat h{level}', d=d)
    for level, d in sorted(paths.items())
    if level
  )


def heat(
  title: str, about: str, rounds: Sequence[int], value_TK: np.ndarray,
  edges: Sequence[float], first: int, y_title: str,
  over: Sequence[tuple[str, Sequence[float]]] = (),
) -> Markup:  # fmt: skip
  """Draws a value a round and rank or slot, and lines over it.

  Args:
    title: what the chart shows.
    about: the same in numbers, for those who do not see it.
    rounds: [T].
    value_TK: a value a round and row.
    edges: of the classes of values; below the first nothing is drawn.
    first: what row 0 is, e.g. slot 1.
    y_title: of the y axis.
    over: name and values [T] of lines, dashed in their order.
  """
  if not len(rounds):
    return empty(title)
  rows = value_TK.shape[1]
  x = Axis(rounds[0] - 0.5, rounds[-1] + 0.5, LEFT, WIDTH - RIGHT)
  y = Axis(first - 0.5, first + rows - 0.5, HEIGHT - BOTTOM, TOP)
  columns = np.unique(np.linspace(0, len(rounds) - 1, MOST_COLUMNS).round().astype(int))
  parts = [_cells(np.digitize(value_TK[columns], edges), x, y, first)]
  for number, (name, values) in enumerate(over):
    d = _path(_finite(zip(rounds, values, strict=True), False), x, y)
    parts += [
      tag('path', class_='halo', d=d),
      tag(
        'path', tag('title', name), class_='over', d=d,
        stroke_dasharray=dash(number),
      ),
    ]  # fmt: skip
  y_ticks, x_ticks = ticks(y.low, y.high, True), ticks(x.low, x.high, True)
  axes = _axes(x, y, x_ticks, y_ticks, 'round', y_title, False)
  return _svg(title, about, *parts, *axes)
