"""Curves of a run, as matplotlib draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hetlora_jax.types import Row

if TYPE_CHECKING:
  import matplotlib.figure


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
  """Returns the rounds that have a value, and the values."""
  points = [(r['round'], r[name]) for r in rows if name in r]
  return [p[0] for p in points], [p[1] for p in points]


def _draw_energy(figure, axis, rows: Sequence[Row]) -> None:
  """Draws each slot's share of energy: rank collapse darkens the top."""
  rounds, shares = series(rows, 'energy/slots')
  axis.set(title="Energy of the server's adapters", ylabel='rank slot')
  if not rounds:
    return
  decibel = 10 * np.log10(np.maximum(np.array(shares).T, 1e-4))
  half = (rounds[-1] - rounds[0]) / max(len(rounds) - 1, 1) / 2 or 0.5
  span = (rounds[0] - half, rounds[-1] + half, 0.5, len(decibel) + 0.5)
  image = axis.imshow(
    decibel, aspect='auto', origin='lower', extent=span, vmin=-40, vmax=0
  )
  figure.colorbar(image, ax=axis, label='share (dB)')


def _scale_perplexity(axis) -> None:
  """Makes the axis logarithmic, since perplexity may fall by orders of magnitude."""
  import matplotlib.ticker as ticker

  axis.set_yscale('log')
  low, high = axis.get_ylim()
  wide = high > 5 * low
  axis.yaxis.set_major_locator(
    ticker.LogLocator(subs=(1, 2, 5)) if wide else ticker.MaxNLocator(6)
  )
  axis.yaxis.set_major_formatter('{x:g}')
  axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def plot(rows: Sequence[Row], title: str) -> matplotlib.figure.Figure:
  """Draws perplexities, loss, ranks and energy of each slot against rounds.

  Of a task with labels it also draws the accuracies.
  """
  # Half a second, which a program that draws nothing need not wait for.
  import matplotlib.figure
  import matplotlib.ticker

  labelled = any('eval/seen/accuracy' in row for row in rows)
  panels = 4 + labelled
  figure = matplotlib.figure.Figure((4 * panels, 3.8))
  figure.suptitle(title)
  # By hand: a layout engine draws everything twice.
  figure.subplots_adjust(0.045, 0.13, 0.985, 0.84, wspace=0.22)
  perplexity, *more, loss, rank, energy = figure.subplots(1, panels)
  for axis, name in zip((perplexity, *more), ('perplexity', 'accuracy'), strict=False):
    for who, marker in (('seen', 'o'), ('unseen', 's')):
      column = series(rows, f'eval/{who}/{name}')
      axis.plot(*column, marker=marker, label=f'{who} people')
    axis.set(title=f'Held-out {name}', ylabel=name)
  perplexity.set(ylabel='perplexity per token')
  _scale_perplexity(perplexity)
  perplexity.legend()
  loss.plot(*series(rows, 'train/loss'), color='C2')
  loss.set(title='Training loss of the cohort', ylabel='nats per target token')
  for name, style in (('max', ':'), ('mean', '-'), ('min', '--')):
    rank.plot(*series(rows, f'rank/{name}'), style, color='C3', label=name)
  rank.set(title='Ranks of all clients', ylabel='rank')
  rank.legend()
  _draw_energy(figure, energy, rows)
  for axis in (perplexity, *more, loss, rank, energy):
    axis.set_xlabel('round')
    axis.grid(alpha=0.3 if axis is not energy else 0)
    axis.xaxis.set_major_locator(
      matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1)
    )
  return figure
