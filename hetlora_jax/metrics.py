"""A run's record: metrics.jsonl, TensorBoard, summary.json, curves.png."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from hetlora_jax import files

Row = dict[str, Any]
# Lists in rows: how many, or which share, of each rank or slot; and one value a
# client, shown in so many bins.
_COUNTS = ('rank/histogram', 'energy/slots')
_VALUES, _BINS = ('weight/clients',), 30
MOST_SAMPLES = 20  # shown in TensorBoard


def read_rows(path: pathlib.Path) -> list[Row]:
  """Reads metrics.jsonl; a line torn by a crash ends it."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


class Writer:
  """Appends one object a round, from the round that was restored on.

  With `writes` False, as in all processes but the first, it only remembers.
  """

  def __init__(self, workdir: pathlib.Path, first_round: int, writes: bool = True):
    path = workdir / 'metrics.jsonl'
    try:
      kept = [r for r in read_rows(path) if r['round'] < first_round]
    except files.UNEXPECTED as error:  # JSON, but no rows
      remedy = 'delete it, and the run goes on without its earlier rows'
      raise files.damaged(path, error, remedy) from error
    self.rows, self._writes, self._workdir = kept, writes, workdir
    if not writes:
      return
    samples = list(_samples(workdir, kept[-1]['round'] if kept else 0))
    files.write_json_lines(path, kept)
    self._file = path.open('a')
    # Events that a crash cut off are lost: TensorBoard's are made from the rows.
    for old in (workdir / 'tensorboard').glob('events.out.tfevents.*'):
      old.unlink()
    (workdir / 'tensorboard').mkdir(exist_ok=True)
    # In this thread, not `SummaryWriter`'s, so that a full disk is noticed.
    self._board = EventsWriter(str(workdir / 'tensorboard' / 'events'))
    for row in kept:
      self._show(row)
    for event in samples:
      self._board.write_event(event)
    self._board.flush()

  def write(self, row: Row) -> None:
    """Writes a row and makes sure that it has left this process."""
    self.rows.append(row)
    if not self._writes:
      return
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    self._show(row)
    self._board.flush()

  def write_people(self, people: dict) -> None:
    """Replaces people.json by the newest evaluation's."""
    if self._writes:
      files.write_json(self._workdir / 'people.json', people)

  def _show(self, row: Row) -> None:
    event = Event(wall_time=time.time(), step=row['round'])
    for name, value in row.items():
      if not isinstance(value, list):
        event.summary.value.add(tag=name, simple_value=value)
      elif np.isfinite(value).all() and sum(value):
        event.summary.MergeFrom(_histogram(name, np.array(value)))
    self._board.write_event(event)

  def sync(self) -> None:
    """Makes sure that the rows outlive the machine, before a checkpoint does."""
    if self._writes:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._writes:
      self._file.close()
      self._board.close()


def _histogram(name: str, value_K: np.ndarray):
  """Returns a list of a row for TensorBoard; no more than it tells."""
  if name in _VALUES:
    return summary.histogram(name, value_K, bins=_BINS)
  if name not in _COUNTS:
    return summary.Summary()
  at_K = np.arange(len(value_K)) + (name == 'energy/slots')  # slots from 1
  held = at_K[value_K > 0]
  return summary.histogram_raw(
    name, held[0], held[-1], value_K.sum(), (value_K * at_K).sum(),
    (value_K * at_K**2).sum(), at_K + 0.5, value_K,
  )  # fmt: skip


def _samples(workdir: pathlib.Path, step: int) -> Iterator[Event]:
  """Yields the first lines of generations.jsonl as texts."""
  path = workdir / 'generations.jsonl'
  try:
    lines = [line for line in read_rows(path) if isinstance(line, dict)]
  except ValueError as error:  # its UTF-8
    raise files.damaged(path, error, 'delete it, or generate anew') from error
  for number, line in enumerate(lines[:MOST_SAMPLES]):
    parts = [f'{k}: {line.get(k)}' for k in ('prompt', 'reference', 'generated')]
    # Indented, so that Markdown leaves what people wrote alone.
    text = '\n'.join('    ' + x for part in parts for x in part.splitlines())
    text = text.encode(errors='replace').decode()  # JSON may hold half a pair
    name = f'sample_{number}/{line.get("kind")}_{line.get("client")}'
    value = summary.text(name, text)
    yield Event(wall_time=time.time(), step=step, summary=value)


def show_samples(workdir: pathlib.Path, step: int) -> None:
  """Adds generations.jsonl to the TensorBoard of a run that has ended."""
  events = list(_samples(workdir, step))
  (workdir / 'tensorboard').mkdir(exist_ok=True)
  board = EventsWriter(str(workdir / 'tensorboard' / 'events'), '.samples')
  for event in events:
    board.write_event(event)
  board.close()


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
  """Returns the rounds that have a value, and the values."""
  points = [(r['round'], r[name]) for r in rows if name in r]
  return [p[0] for p in points], [p[1] for p in points]


def _draw_energy(figure, axis, rows: list[Row]) -> None:
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


def plot(rows: list[Row], path: pathlib.Path, title: str) -> None:
  """Draws perplexities, loss, ranks and energy a slot against rounds."""
  figure = matplotlib.figure.Figure((16, 3.8))
  figure.suptitle(title)
  # By hand: a layout engine draws everything twice.
  figure.subplots_adjust(0.045, 0.13, 0.985, 0.84, wspace=0.22)
  perplexity, loss, rank, energy = figure.subplots(1, 4)
  for who, marker in (('seen', 'o'), ('unseen', 's')):
    name = f'eval/{who}/perplexity'
    perplexity.plot(*series(rows, name), marker=marker, label=f'{who} people')
  perplexity.set(title='Held-out perplexity', ylabel='perplexity a token')
  perplexity.legend()
  loss.plot(*series(rows, 'train/loss'), color='C2')
  loss.set(title='Training loss of the cohort', ylabel='nats a target token')
  for name, style in (('max', ':'), ('mean', '-'), ('min', '--')):
    rank.plot(*series(rows, f'rank/{name}'), style, color='C3', label=name)
  rank.set(title='Ranks over all people', ylabel='rank')
  rank.legend()
  _draw_energy(figure, energy, rows)
  for axis in (perplexity, loss, rank, energy):
    axis.set_xlabel('round')
    axis.grid(alpha=0.3 if axis is not energy else 0)
    axis.xaxis.set_major_locator(
      matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1)
    )
  figure.savefig(path, dpi=110)
