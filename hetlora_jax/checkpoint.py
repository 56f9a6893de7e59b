"""Saving and restoring the server's state with Orbax."""

import pathlib

import jax
import orbax.checkpoint as ocp

from hetlora_jax.types import ServerState


class Checkpoints:
  """The checkpoints of one run; a step is the number of rounds done."""

  def __init__(self, directory: pathlib.Path, keep: int):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    self._manager = ocp.CheckpointManager(directory.resolve(), options=options)

  def save(self, state: ServerState) -> None:
    """Starts to save; the arrays are copied before this returns."""
    step = int(state.round)
    if step not in self._manager.all_steps():
      self._manager.save(step, args=ocp.args.StandardSave(state))

  def restore(self, like: ServerState) -> ServerState | None:
    """Returns the newest state, laid out as `like`, or None if there is none.

    Raises:
      ValueError: the checkpoint has other shapes than the configuration.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      return self._manager.restore(
        step, args=ocp.args.StandardRestore(abstract)
      )
    except (ValueError, KeyError) as error:
      raise ValueError(
        f'{self._manager.directory}/{step} does not fit this configuration '
        f'(population, ranks, targets or optimizer differ): use another '
        f'--workdir. ({error})'.splitlines()[0]
      ) from error

  def close(self) -> None:
    """Waits for the last save."""
    self._manager.wait_until_finished()
    self._manager.close()
