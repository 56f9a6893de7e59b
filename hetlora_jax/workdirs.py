"""A run's folder: may this run go on in it, and does another one use it?"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import json
import os
import pathlib
import shlex
import socket
import sys
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from hetlora_jax import files
from hetlora_jax.config import Config, ConfigError, flat, to_dict

# A run may be continued with other values of these. Whether dtype 'auto' still is
# the same type is checked with the checkpoint.
_MAY_CHANGE = (
  'federated.num_rounds', 'federated.clients_at_once',
  'federated.rounds_per_call', 'eval.', 'checkpoint.', 'mesh.', 'model.dtype',
)  # fmt: skip


def anywhere(flag: object) -> bool:
  """Tells whether a flag is set in any process, in all of them alike."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


def check(config: Config, workdir: pathlib.Path) -> None:
  """Raises if the run in `workdir` was made with another configuration."""
  path = workdir / 'config.json'
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f'--workdir={workdir} is a file: name a folder.')
  if not path.exists():
    return
  try:
    old = flat(json.loads(path.read_text()))
  except (AttributeError, RecursionError, ValueError) as error:
    raise ConfigError(f'{path} is damaged ({error}): use another --workdir.') from error
  differ = _differences(old, flat(json.loads(json.dumps(to_dict(config)))))
  if differ:
    fields = [
      f'config.{n}={files.short(repr(a), 60)}, not {files.short(repr(b), 60)}'
      for n, a, b in differ
      if n in _defaults()
    ]
    if unknown := len(differ) - len(fields):
      fields.append(f'{unknown} that no configuration has')
    raise ConfigError(
      f'--workdir={workdir} holds a run of another configuration (use another '
      '--workdir, the old values to continue it, or --branch_from to start a '
      f'new run from its state): {"; ".join(fields)}.'
    )


@functools.cache
def _defaults() -> dict:
  from configs import default

  return flat(json.loads(default.get_config().to_json()))


def _differences(old: dict, new: dict) -> list[tuple]:
  """Returns (field, old value, new value) where a run may not differ.

  A field that the run did not have yet counts as its default.
  """
  old = {n: _defaults().get(n) for n in new} | old
  return [
    (name, old.get(name), new.get(name))
    for name in sorted(set(old) | set(new))
    if old.get(name) != new.get(name) and not name.startswith(_MAY_CHANGE)
  ]


def config_of(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads the configuration of a run; what it did not have yet is the default."""
  from configs import default

  path, remedy = workdir / 'config.json', 'give --config'
  own = files.read_json(path, remedy)
  try:
    return ml_collections.ConfigDict(_updated(default.get_config().to_dict(), own))
  except files.UNEXPECTED as error:
    raise files.damaged(path, error, remedy) from error


def _updated(values: dict, new: dict) -> dict:
  """Returns nested dicts with the values of `new`, where it has any."""
  out = values | new
  for name, value in new.items():
    if isinstance(value, dict) and isinstance(values.get(name), dict):
      out[name] = _updated(values[name], value)
  return out


def check_free(workdir: pathlib.Path) -> None:
  """Raises if another run is in `workdir`; the first process looks for all."""
  with _in_the_first(workdir, make=False):
    pass


@contextlib.contextmanager
def _lock(workdir: pathlib.Path, make: bool) -> Iterator:
  """Holds the lock of a folder; the system lets go of it when a process dies.

  Unless it is to be made, a folder without a lock is free.
  """
  path = workdir / '.lock'
  if make:
    workdir.mkdir(parents=True, exist_ok=True)
  elif not path.exists():
    yield None
    return
  with path.open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ConfigError(
        f'--workdir={workdir} is in use by {path.read_text().strip()}: wait '
        'for it, stop it, or use another --workdir.'
      ) from error
    yield file


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of a folder, which is made; the first process does so.

  Raises:
    ConfigError: another run is in it, which is named; in all processes alike.
    OSError: the folder cannot be made or written to; likewise.
  """
  with _in_the_first(workdir, make=True) as file:
    if file:
      file.truncate(0)
      file.write(_who())
      file.flush()
    yield


@contextlib.contextmanager
def _in_the_first(workdir: pathlib.Path, make: bool) -> Iterator:
  """Holds the lock in the first process; raises in all if that fails."""
  file, error = None, None
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        file = stack.enter_context(_lock(workdir, make))
      except (ConfigError, OSError) as e:
        error = e
    if anywhere(error):
      raise error or ConfigError(
        f'the first process cannot use --workdir={workdir}: see its message.'
      )
    yield file


def _who() -> str:
  now = datetime.datetime.now().strftime('%Y-%m-%d %H:%M:%S')
  return (
    f'process {os.getpid()} on {socket.gethostname()} since {now} '
    f'({shlex.join(sys.argv)[:200]})\n'
  )
