"""What a run writes as it goes: metrics.jsonl, people.json and TensorBoard."""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event

from hetlora_jax import files
from hetlora_jax.types import Row

# Lists in rows: how many, or which share, of each rank or slot; and one value a
# client, shown in so many bins.
_COUNTS = ('rank/histogram', 'energy/slots')
_VALUES, _BINS = ('weight/clients',), 30
MOST_SAMPLES = 20  # shown in TensorBoard


class Writer:
  """Appends one object a round to those that are kept.

  With `writes` False, as in all processes but the first, it only remembers.
  """

  def __init__(self, workdir: pathlib.Path, kept: Sequence[Row], writes: bool = True):
    path = workdir / 'metrics.jsonl'
    self.rows, self._writes, self._workdir = list(kept), writes, workdir
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
      if value is None:
        continue
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
    lines = [line for line in files.read_rows(path) if isinstance(line, dict)]
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
