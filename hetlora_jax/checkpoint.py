"""Saving and restoring servers' states with Orbax."""

import pathlib
from collections.abc import Iterable, Sequence

import orbax.checkpoint as ocp

from hetlora_jax.types import ServerState


def steps(folder: pathlib.Path) -> set[int]:
  """Returns the steps saved in a folder, which need not exist."""
  return {int(path.name) for path in folder.glob('*') if path.name.isdigit()}


class Checkpoints:
  """The checkpoints of points that run together, each in a folder of its own.

  A step is the number of rounds done.
  """

  def __init__(self, folders: Sequence[pathlib.Path], keep: int):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._managers = [
      ocp.CheckpointManager(folder.resolve(), options=options)
      for folder in folders
    ]

  def newest(self) -> int | None:
    """Returns the newest step that all points have, or None."""
    return max(
      set.intersection(*[set(m.all_steps()) for m in self._managers]),
      default=None,
    )

  def save(self, step: int, states: Iterable[ServerState]) -> None:
    """Starts to save; the arrays are copied before this returns."""
    for manager, state in zip(self._managers, states, strict=False):
      if step not in manager.all_steps():
        manager.save(step, args=ocp.args.StandardSave(state))

  def restore(self, step: int, like: ServerState) -> list[ServerState]:
    """Returns the points' states, laid out as `like`.

    Raises:
      ValueError: a checkpoint has other shapes than the configuration.
    """
    return [self._restore(m, step, like) for m in self._managers]

  def _restore(self, manager, step: int, like: ServerState) -> ServerState:
    try:
      return manager.restore(step, args=ocp.args.StandardRestore(like))
    except (ValueError, KeyError) as error:
      raise ValueError(
        f'{manager.directory}/{step} does not fit this configuration '
        f'(population, ranks, targets or optimizer differ): use another '
        f'--workdir. ({error})'.splitlines()[0]
      ) from error

  def close(self) -> None:
    """Waits for the last save."""
    for manager in self._managers:
      manager.wait_until_finished()
      manager.close()
