"""The figure that compares arms, and how figures are saved for screens and papers."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hetlora_jax import files

if TYPE_CHECKING:
  import matplotlib.figure

# Fonts in a PDF as TrueType, which journals ask for; and no date or random id, so that
# the same numbers give the same file.
_STYLE = {'pdf.fonttype': 42, 'svg.hashsalt': 'hetlora_jax'}
_SUFFIXES = {'.png': {}, '.pdf': {'CreationDate': None}, '.svg': {'Date': None}}


class Line(NamedTuple):
  """The held-out loss of an arm at each evaluation: T."""

  name: str
  rounds: Sequence[int]
  megabytes: np.ndarray  # sent up and down until then; NaN if rules do not state it
  mean: np.ndarray  # over seeds
  deviation: np.ndarray  # 0 of a single seed


def compare(lines: Sequence[Line]) -> matplotlib.figure.Figure:
  """Draws losses of seen people against rounds and megabytes, with deviations."""
  import matplotlib.figure  # half a second, which no start should wait for
  import matplotlib.ticker

  figure = matplotlib.figure.Figure((10, 4.2), layout='constrained')
  by_round, by_bytes = figure.subplots(1, 2, sharey=True)
  # A log scale, without the points at 0, where arms are too far apart for a linear one.
  sent = [line.megabytes[-1] for line in lines if (line.megabytes[-1:] > 0).any()]
  log = bool(sent) and max(sent) > 4 * min(sent)
  for i, line in enumerate(lines):
    # Ten colours, and other dashes after every ten arms.
    style = {'color': f'C{i % 10}', 'ls': ('-', '--', ':', '-.')[i // 10 % 4]}
    low, high = line.mean - line.deviation, line.mean + line.deviation
    for axis, x in ((by_round, line.rounds), (by_bytes, line.megabytes)):
      shown = np.asarray(x) > (0 if log and axis is by_bytes else -1)
      x, mean = np.asarray(x)[shown], line.mean[shown]
      axis.plot(x, mean, marker='.', label=line.name, **style)
      if line.deviation.any():
        axis.fill_between(
          x, low[shown], high[shown], color=style['color'], alpha=0.15, lw=0
        )
  by_round.set(xlabel='round', ylabel='held-out loss of seen people (nats)')
  by_round.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
  by_bytes.set(xlabel='megabytes sent up and down')
  if log:
    by_bytes.set_xscale('log')
    by_bytes.xaxis.set_major_formatter('{x:g}')
  for axis in (by_round, by_bytes):
    axis.grid(alpha=0.3)
  if lines:
    handles = by_round.get_lines()
    figure.legend(handles=handles, loc='outside right upper', fontsize='small')
  return figure


def save(figure: matplotlib.figure.Figure, path: pathlib.Path) -> None:
  """Writes a figure as PNG, PDF and SVG, whose endings are added to a path."""
  import matplotlib

  with matplotlib.rc_context(_STYLE):
    for suffix, metadata in _SUFFIXES.items():
      files.write_whole(
        path.with_name(path.name + suffix),
        lambda file, about=metadata: figure.savefig(file, dpi=140, metadata=about),
      )
