"""Saving and restoring servers' states with Orbax.

A checkpoint is a server's state and what is to be known about it: the base model
it belongs to, shapes, and a sum of every array's bits, by which damage is noticed.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from hetlora_jax import config, console, fields, files
from hetlora_jax.config import ConfigError
from hetlora_jax.types import Array, ServerState


class Damaged(ValueError):
  """A checkpoint cannot be read, or is not what was written."""


def steps(folder: pathlib.Path) -> set[int]:
  """Returns the steps saved in a folder, which need not exist."""
  return {int(path.name) for path in folder.glob('*') if path.name.isdigit()}


def _sum_of_bits(leaf: Array) -> Array:
  """Sums the words of an array, each times an odd number of its place.

  Modulo 2**32: the same in any order, so on any devices, and another if one bit
  is, since an odd number times a power of two is not 0.
  """
  width = f'uint{8 * leaf.dtype.itemsize}'
  words = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
  place = jnp.uint32(0)
  for axis, size in enumerate(leaf.shape):
    index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    place = place * jnp.uint32(size) + index
  return (words * (2 * place + 1)).sum(dtype=jnp.uint32)


@functools.cache
def _summing(where: jax.sharding.Sharding):
  return jax.jit(lambda state: jax.tree.map(_sum_of_bits, state), out_shardings=where)


def _by_path(tree) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def sums(state: ServerState) -> dict[str, int]:
  """Returns the sum of every array's bits, by path."""
  found = jax.device_get(_summing(state.round.sharding)(state))
  return {path: int(x) for path, x in _by_path(found).items()}


def _shapes(state: ServerState) -> dict[str, str]:
  return {p: f'{x.dtype}{list(x.shape)}' for p, x in _by_path(state).items()}


def _digest(about: dict[str, Any]) -> str:
  text = json.dumps({k: v for k, v in about.items() if k != 'digest'})
  return hashlib.sha256(text.encode()).hexdigest()


class _Kept:
  """Which steps stay, as Orbax asks: the newest, every n-th, and the best."""

  def __init__(self, keep: config.Checkpoint):
    self._newest, self._every = keep.keep, keep.keep_every
    self.best: int | None = None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = [found.step for found in checkpoints]
    return [
      step in steps[-self._newest :]
      or step == self.best
      or bool(self._every and step % self._every == 0)
      for step in steps
    ]


class Checkpoints:
  """The checkpoints of points that run together, each in a folder of its own.

  A step is the number of rounds done.
  """

  def __init__(
    self,
    folders: Sequence[pathlib.Path],
    base: dict[str, Any],
    keep: config.Checkpoint | None = None,
  ):
    """Opens folders.

    Args:
      folders: one a point.
      base: what identifies the base model, and data of one's own, for JSON.
      keep: which checkpoints are kept; None only reads.
    """
    self._base = json.loads(json.dumps(fields.flat(base)))  # tuples to lists
    self._writes = keep is not None
    self._kept = [_Kept(keep or config.Checkpoint()) for _ in folders]
    self._managers = [
      ocp.CheckpointManager(
        folder.resolve(),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=kept,
          cleanup_tmp_directories=self._writes,
          create=self._writes,
          read_only=not self._writes,
          save_interval_steps=int(self._writes),
        ),
      )
      for folder, kept in zip(folders, self._kept, strict=True)
    ]

  def save(
    self,
    step: int,
    states: Iterable[ServerState | None],
    best: Iterable[int | None] = itertools.repeat(None),
  ) -> None:
    """Starts to save; the arrays are copied before this returns.

    Args:
      step: the rounds done.
      states: the points'; None of one that is left as it is.
      best: the step of each that stays while newer ones come.
    """
    points = zip(self._managers, self._kept, states, best, strict=False)
    for manager, kept, state, best_step in points:
      if state is None or step in manager.all_steps():
        continue
      kept.best = best_step
      about = {
        'base': self._base, 'shapes': _shapes(state), 'sums': sums(state)
      }  # fmt: skip
      about['digest'] = _digest(about)
      with _naming(manager):
        manager.save(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
          ),
        )

  def restore_newest(self, like: ServerState) -> tuple[int, list[ServerState]] | None:
    """Restores the newest step that all points have undamaged, if there is one.

    Damaged ones are named and put aside.

    Args:
      like: shapes and places of a point's state.

    Raises:
      ConfigError: all are damaged; or they belong to another base model or have
        other shapes than the configuration.
    """
    common = set.intersection(*[set(m.all_steps()) for m in self._managers])
    damaged: dict[pathlib.Path, Damaged] = {}
    for step in sorted(common, reverse=True):
      try:
        states = self.restore(step, like, damaged)
      except Damaged:
        continue
      self._put_aside(damaged)
      return step, states
    if damaged:
      raise ConfigError(
        'no checkpoint is undamaged: '
        + '; '.join(map(str, damaged.values()))
        + ' To start anew, use another --workdir or delete this one.'
      )
    return None

  def restore(
    self,
    step: int,
    like: ServerState,
    damaged: dict[pathlib.Path, Damaged] | None = None,
  ) -> list[ServerState]:
    """Returns the points' states of a step, laid out as `like`.

    Raises:
      Damaged: one of them is; `damaged` gets its folder and why.
      ConfigError: see `restore_newest`.
    """
    states = []
    for manager in self._managers:
      path = pathlib.Path(str(manager.directory), str(step))
      try:
        states.append(self._restore(manager, path, like))
      except Damaged as error:
        if damaged is not None:
          damaged[path] = error
        raise
    return states

  def _restore(self, manager, path: pathlib.Path, like) -> ServerState:
    about = _read(manager, path, about=ocp.args.JsonRestore()).about
    if not isinstance(about, dict) or about.get('digest') != _digest(about):
      raise Damaged(f'{path} is damaged: its description is not as written.')
    self._check(about, path, like)
    state = _read(manager, path, state=ocp.args.StandardRestore(like)).state
    found = sums(state)
    wrong = [name for name, x in about['sums'].items() if found[name] != x]
    if wrong:
      raise Damaged(f'{path} is damaged: the checksum of {wrong[0]} is wrong.')
    return state

  def _check(self, about, path: pathlib.Path, like: ServerState) -> None:
    """Raises if a checkpoint is whole, but not for this run."""
    for name, value in self._base.items():
      if name.startswith('revisions.'):
        continue
      found = about['base'].get(name, value)  # earlier releases do not say all
      if found != value:
        what, remedy, of = 'another base model', 'that model (config.model)', 'model'
        if name == 'data':
          what, of = 'other data', 'data'
          remedy = (
            'the data as they were, whose content has this digest (config.data.path, or '
            'config.data.name of the Hub)'
          )
        if commit := about['base'].get(f'revisions.{of}'):
          remedy += f', which was its revision @{commit}'
        raise ConfigError(
          f"{path} belongs to {what}: its {name} is {found!r}, this one's {value!r}. "
          f'Give {remedy}, or use another --workdir.'
        )
    old, new = about['shapes'], _shapes(like)
    for name in sorted(set(old) | set(new)):
      if old.get(name) != new.get(name):
        raise ConfigError(
          f'{path} does not fit this configuration: {name} is '
          f'{old.get(name, "absent")} there and {new.get(name, "absent")} here '
          '(population, ranks, targets or optimizer differ).'
        )

  def _put_aside(self, damaged: dict[pathlib.Path, Damaged]) -> None:
    """Renames damaged steps, so that they can be saved anew."""
    for path, why in damaged.items():
      console.say(f'Warning: {why} Going on from an earlier one.')
      if self._writes and jax.process_index() == 0:
        aside = path.with_name(f'{path.name}.damaged')
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    if damaged and jax.process_count() > 1:
      multihost_utils.sync_global_devices('put aside')
    for manager in self._managers if damaged else ():
      manager.reload()

  def wait(self) -> None:
    """Waits for the last save."""
    for manager in self._managers:
      with _naming(manager):
        manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save, and lets go of the folders."""
    self.wait()
    for manager in self._managers:
      manager.close()


@contextlib.contextmanager
def _naming(manager) -> Iterator[None]:
  """Says where, if saving fails; an earlier save may be the one that did."""
  try:
    yield
  except Exception as error:  # from files, tensorstore, orbax
    full = os.strerror(errno.ENOSPC)
    why = full if full in str(error) else _first_line(error)
    raise OSError(f'saving to {manager.directory} failed: {why}') from error


def _read(manager, path: pathlib.Path, **args):
  """Reads a part of a checkpoint; what fails in it is damage, or full memory."""
  try:
    return manager.restore(int(path.name), args=ocp.args.Composite(**args))
  except PermissionError:
    raise
  except Exception as error:  # from JSON, zarr, tensorstore, orbax
    if files.out_of_memory(error):
      raise ConfigError(
        f'{path} cannot be read, out of memory ({_first_line(error)}): free '
        'some, and run the same line again. It is left as it is.'
      ) from error
    raise Damaged(f'{path} is damaged: {_first_line(error)}.') from error


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]
