"""A run's folder: everything that opens one goes through `Run`."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import io
import os
import pathlib
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from hetlora_jax import (
  checkpoint,
  config,
  curves,
  fields,
  files,
  hub,
  points,
  rows,
  stopping,
)
from hetlora_jax.base_model import BaseModel
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.points import Points
from hetlora_jax.types import Row, ServerState


class History(list[Row]):
  """The rows of a run, one a round; a notebook shows them as curves."""

  title = ''

  def plot(self):
    """Returns a matplotlib figure of losses, ranks and energies."""
    return curves.plot(self, self.title)

  def _repr_png_(self) -> bytes:
    out = io.BytesIO()
    self.plot().savefig(out, format='png', dpi=110)
    return out.getvalue()


class Run:
  """A run in a folder, finished or not; nothing is read before it is asked for.

  Attributes:
    folder: where it is.
    model: the base model, if it is one of your own (`base_model.own`).
  """

  def __init__(self, folder: str | os.PathLike, model: BaseModel | None = None):
    """Opens a run.

    Args:
      folder: --workdir of the run.
      model: a base model of your own that it was trained with.
    """
    self.folder = pathlib.Path(folder)
    self.model = model

  def __repr__(self) -> str:
    return f'Run({str(self.folder)!r})'

  # --- What is in the folder ------------------------------------------------

  @functools.cached_property
  def fields(self) -> dict[str, Any]:
    """The values of its fields by path, unchecked; defaults where it had none yet."""
    path = self.folder / 'config.json'
    return config.fields_of_folder(files.read_json(path, 'use another --workdir'))

  @functools.cached_property
  def unchecked(self) -> Config:
    """Its configuration, which may name rules that nobody has registered yet.

    Raises ConfigError or OSError.
    """
    with self._naming_config():
      return config.built(fields.nested(self.fields))

  @functools.cached_property
  def config(self) -> Config:
    """The configuration that it was trained with; raises ConfigError or OSError."""
    with self._naming_config():
      return config.resolve(self.unchecked)

  @contextlib.contextmanager
  def _naming_config(self) -> Iterator[None]:
    try:
      yield
    except ConfigError as error:
      path = self.folder / 'config.json'
      raise ConfigError(
        f'{path} is of another release, or damaged: {error} Use another --workdir.'
      ) from error

  @property
  def history(self) -> History:
    """The rows of metrics.jsonl; raises Damaged if one is missing (`rows.read`)."""
    history = History(rows.read(self.folder / 'metrics.jsonl'))
    history.title = str(self.folder)
    return history

  def plot(self):
    """Returns a matplotlib figure of the history."""
    return self.history.plot()

  @property
  def summary(self) -> dict[str, Any] | None:
    """What summary.json holds; None of a run that has not ended."""
    return self._json('summary.json')

  @property
  def people(self) -> dict[str, Any] | None:
    """The newest losses of every evaluated person: people.json, None without one."""
    return self._json('people.json')

  @property
  def evaluation(self) -> dict[str, Any] | None:
    """The scores of generated texts: evaluation.json, None without one."""
    return self._json('evaluation.json')

  @property
  def samples(self) -> list[dict[str, Any]]:
    """The generated texts: lines of generations.jsonl."""
    return files.read_rows(self.folder / 'generations.jsonl')

  def _json(self, name: str) -> dict[str, Any] | None:
    path = self.folder / name
    remedy = 'delete it, and let the program that wrote it do so again'
    return files.read_json(path, remedy) if path.exists() else None

  @property
  def finished(self) -> dict[str, Any] | None:
    """The summary, of a run that has done all its rounds or was stopped early."""
    found = self.summary
    if found is None:
      return None
    with self._naming_summary():
      done = found['last']['round'] == self.fields['federated.num_rounds']
    return found if done or self.stopped() else None

  def stopped(self, c: Config | None = None) -> str:
    """Says after which round and why the run was stopped early; '' if it was not.

    Args:
      c: its configuration, in which patience may be another by now; None: its own.
    """
    with self._naming_summary():
      found = (self.summary or {}).get('stopped')
      if not found:
        return ''
      number, by, told = (
        found['round'],
        found['by'],
        f'{found["round"]}: {found["why"]}',
      )
    history = self.history
    if number not in self.steps() or not history or history[-1]['round'] != number:
      return ''  # it went on since, or its state is lost
    judged = stopping.judge(history, (c or self.unchecked).eval)
    goes_on = by == 'eval.patience' and not (judged and judged.stop is not None)
    return '' if goes_on else told

  @contextlib.contextmanager
  def _naming_summary(self) -> Iterator[None]:
    try:
      yield
    except (files.Damaged, OSError):
      raise
    except files.UNEXPECTED as error:
      path = self.folder / 'summary.json'
      raise files.damaged(path, error, 'delete it, and the run ends anew') from error

  # --- Its state ------------------------------------------------------------

  @property
  def checkpoints(self) -> pathlib.Path:
    """The folder of its checkpoints."""
    return self.folder / 'checkpoints'

  def steps(self) -> set[int]:
    """Returns the rounds after which its state is saved."""
    return checkpoint.steps(self.checkpoints)

  def check_saved(self, or_else: str = '') -> None:
    """Raises ConfigError if no state is saved."""
    if not self.steps():
      raise ConfigError(
        f'--workdir={self.folder} holds no checkpoints: train first{or_else}.'
      )

  def prepare(self, c: Config | None = None) -> Points:
    """Builds its experiment on one device.

    Args:
      c: the run's configuration with other fields that may change; None: its own.
    """
    c = c or self.config
    return points.prepare(on_one_device(c), model=self.model)

  def saved_round(self, round: str | int, e: config.Eval | None = None) -> int | None:
    """Returns the number of a saved round; None of the 'newest'.

    Args:
      round: 'newest', 'best' or a number.
      e: by which metric the best is chosen; None: the run's own.

    Raises:
      ConfigError: it is none of these, or is not saved.
    """
    self.check_saved()
    if round == 'newest':
      return None
    e = e or self.config.eval
    judged = stopping.judge(self.history, e) if round == 'best' else None
    if not judged and not str(round).isdecimal():
      why = f'no evaluation has {e.metric}' if round == 'best' else (
        'it must be newest, best, or the number of a saved round'
      )  # fmt: skip
      raise ConfigError(f'--round={files.short(round)}: {why}.')
    number, steps = judged.round if judged else int(round), sorted(self.steps())
    if number not in steps:
      told = f' (the best by {e.metric})' if judged else ''
      raise ConfigError(
        f'--round={round}: {self.folder} has saved rounds {steps}, not {number}{told}; '
        'checkpoint.keep_best and checkpoint.keep_every keep more while a run trains.'
      )
    return number

  def state(
    self, x: Points, round: str | int = 'newest', *, any_dtype: bool = False
  ) -> tuple[int, ServerState]:
    """Restores a checkpoint, and how many rounds it has done.

    Args:
      x: of `prepare`.
      round: 'newest', which is the newest undamaged one, 'best', or a number.
      any_dtype: whether the base model may have been in another type.

    Raises:
      ConfigError: there is none, or it belongs to another model or configuration.
      Damaged: that round is.
    """
    identity = x.identity
    if any_dtype:
      identity = {k: v for k, v in identity.items() if k != 'dtype'}
    step, like = self.saved_round(round, x.config.eval), points.shape_of_one(x)
    saved = checkpoint.Checkpoints([self.checkpoints], identity)
    with contextlib.closing(saved):
      if step is not None:
        return step, *saved.restore(step, like)
      found = saved.restore_newest(like)
    if not found:
      self.check_saved()
      raise ConfigError(f'--workdir={self.folder} has no checkpoint that is whole.')
    step, (state,) = found
    return step, state

  # --- Going on in it -------------------------------------------------------

  def check(self, c: Config) -> None:
    """Raises ConfigError if the run in the folder has another configuration."""
    if self.folder.exists() and not self.folder.is_dir():
      raise ConfigError(f'--workdir={self.folder} is a file: name a folder.')
    if not (self.folder / 'config.json').exists():
      return
    differ = _differences(self.config, c)
    if differ:
      told = [
        f'config.{n}={files.short(repr(a), 60)}, not {files.short(repr(b), 60)}'
        for n, a, b in differ
      ]
      raise ConfigError(
        f'--workdir={self.folder} holds a run of another configuration (use another '
        '--workdir, the old values to continue it, or --branch_from to start a '
        f'new run from its state): {"; ".join(told)}.'
      )

  def check_rows(self, start: int = 0) -> None:
    """Raises Damaged if it cannot go on without losing rows.

    Args:
      start: the round that it starts from, if it is a branch.
    """
    history, saved = self.history, max(self.steps(), default=start)
    first, last = (history[i]['round'] if history else start for i in (0, -1))
    if not first <= saved <= last:
      why = f'it has no row of round {saved}, after which the run goes on'
      remedy = rows.mended_by(self.folder, saved)
      raise files.damaged(self.folder / 'metrics.jsonl', why, remedy)

  def check_free(self) -> None:
    """Raises if another run is in the folder, or nothing can be written there.

    The first process looks for all.
    """
    with _in_the_first(self.folder, make=False):
      pass

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Keeps other runs out of the folder, which is made; the first process does so.

    Raises:
      ConfigError: another run is in it, which is named; in all processes alike.
      OSError: the folder cannot be made or written to; likewise.
    """
    with _in_the_first(self.folder, make=True) as file:
      if file:
        file.truncate(0)
        file.write(_who())
        file.flush()
      yield


def on_one_device(c: Config) -> Config:
  """Returns a configuration for one device, one run at a time."""
  mesh = {'points_at_once': 1, 'sweep': 1, 'clients': 1, 'model': 1}
  return c.replace(**{f'mesh.{name}': value for name, value in mesh.items()})


def _differences(old: Config, new: Config) -> list[tuple]:
  """Returns (field, old value, new value) where a run may not differ."""
  fixed = {p for p, f in config.FIELDS.items() if not f.declaration.changeable}
  if (
    old.client_optimizer.schedule != 'constant' and old.decay_rounds != new.decay_rounds
  ):
    fixed.add('federated.num_rounds')
  both = {p: (fields.lookup(old, p), fields.lookup(new, p)) for p in fixed}
  for path in ('model.source', 'data.name'):  # checkpoints know what was in them
    if hub.unpinned(both[path][0]) == hub.unpinned(both[path][1]):
      del both[path]
  return [
    (p, *both[p]) for p in config.FIELDS if p in both and both[p][0] != both[p][1]
  ]


def anywhere(flag: object) -> bool:
  """Tells whether a flag is set in any process, in all of them alike."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


@contextlib.contextmanager
def _lock(folder: pathlib.Path, make: bool) -> Iterator:
  """Holds the lock of a folder; the system lets go of it when a process dies.

  Unless it is to be made, a folder without a lock is free.
  """
  path = folder / '.lock'
  if make:
    folder.mkdir(parents=True, exist_ok=True)
  elif not path.exists():
    yield None
    return
  with path.open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(
        f'--workdir={folder} is in use by {path.read_text().strip()}: wait '
        'for it, stop it, or use another --workdir.'
      ) from error
    yield file


def _check_writable(folder: pathlib.Path) -> None:
  """Raises OSError at once if a folder cannot be made or written to."""
  place = folder
  while not place.exists() and place != place.parent:
    place = place.parent
  try:
    with tempfile.TemporaryDirectory(dir=place, prefix='.writing_'):
      pass
  except OSError as error:
    raise OSError(
      f'--workdir={folder} cannot be written: {error}; name another folder.'
    ) from error


@contextlib.contextmanager
def _in_the_first(folder: pathlib.Path, make: bool) -> Iterator:
  """Holds the lock in the first process; raises in all if that fails."""
  file, error = None, None
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        if not make:
          _check_writable(folder)  # at once, before anything is loaded
        file = stack.enter_context(_lock(folder, make))
      except (ConfigError, OSError) as e:
        error = e
    if anywhere(error):
      raise error or ConfigError(
        f'the first process cannot use --workdir={folder}: see its message.'
      )
    yield file


def _who() -> str:
  now = datetime.datetime.now().strftime('%Y-%m-%d %H:%M:%S')
  return (
    f'process {os.getpid()} on {socket.gethostname()} since {now} '
    f'({shlex.join(sys.argv)[:200]})\n'
  )
