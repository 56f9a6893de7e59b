"""What saving and resuming cost: a trace of a run that saves every round.

python -m benchmarks.resume [--config=configs/chitchat_gemma3.py] [--trace=FILE]

Runs some rounds, each of which is saved, then some more of the same run after a
restore: how long the loop stood still for each save, when its writing ended within
the next round, and what restoring took; --trace keeps the trace in Chrome's format
(for ui.perfetto.dev). Programs are warmed up by the first rounds, as by a cache.
"""

import json
import pathlib
import tempfile
import threading
import time
from unittest import mock

import jax
import numpy as np
from absl import flags

from benchmarks import machine
from hetlora_jax import checkpoint, config, points, training

machine.define_config()
_TRACE = flags.DEFINE_string('trace', None, 'File of the trace.')
_ROUNDS = 4  # before, and after


class Trace:
  """What happened when, in Chrome's format."""

  def __init__(self):
    self.events, self._begun = [], time.perf_counter()

  def add(self, name: str, row: str, begin: float, end: float) -> None:
    self.events.append(
      {
        'name': name, 'ph': 'X', 'pid': 0, 'tid': row,
        'ts': (begin - self._begun) * 1e6, 'dur': (end - begin) * 1e6,
      }
    )  # fmt: skip

  def seconds(self, name: str) -> list[float]:
    return [e['dur'] / 1e6 for e in self.events if e['name'] == name]

  def timed(self, name: str, row: str, function):
    """Returns a function that also notes when it ran, to its very end."""

    def run(*args, **kwargs):
      begin = time.perf_counter()
      out = jax.block_until_ready(function(*args, **kwargs))
      self.add(name, row, begin, time.perf_counter())
      return out

    return run


def _watch(folder: pathlib.Path, trace: Trace, begin: float) -> None:
  """Notes when a checkpoint is whole."""
  while not folder.exists():
    time.sleep(0.002)
  trace.add('write', 'saving', begin, time.perf_counter())


def _run(raw, workdir: pathlib.Path, rounds: int, trace: Trace) -> None:
  """Runs until so many rounds are done, tracing rounds, saves and restores."""
  raw.federated.num_rounds, raw.checkpoint.every = rounds, 1
  save = checkpoint.Checkpoints.save

  def watched(self, step, *what):
    begin = time.perf_counter()
    save(self, step, *what)
    trace.add('save', 'main loop', begin, time.perf_counter())
    folder = workdir / 'checkpoints' / str(step)
    threading.Thread(target=_watch, args=(folder, trace, begin)).start()

  restore = trace.timed('restore', 'main loop', checkpoint.Checkpoints.restore_newest)
  patch = mock.patch.object
  with (
    patch(points, 'call', trace.timed('round', 'devices', points.call)),
    patch(checkpoint.Checkpoints, 'save', watched),
    patch(checkpoint.Checkpoints, 'restore_newest', restore),
  ):
    training.train(config.resolve(raw), workdir)


def measure() -> dict:
  """Runs, restores and runs on."""
  raw, trace = machine.config(), Trace()
  with tempfile.TemporaryDirectory() as name:
    workdir = pathlib.Path(name, 'run')
    _run(raw, workdir, _ROUNDS, trace)
    begin = time.perf_counter()
    _run(raw, workdir, 2 * _ROUNDS, trace)
    again = time.perf_counter() - begin
  if _TRACE.value:
    pathlib.Path(_TRACE.value).write_text(json.dumps(trace.events))
  return {
    'model': raw.model.source, 'rounds': _ROUNDS,
    'round_s': trace.seconds('round'), 'save_s': trace.seconds('save'),
    'write_s': trace.seconds('write'),
    'restore_s': trace.seconds('restore')[-1], 'resumed_s': again,
  }  # fmt: skip


def report(result: dict) -> str:
  """Tells what saving and restoring cost."""
  # The first save also compiles what saving needs.
  round_s, stall = np.median(result['round_s']), np.median(result['save_s'])
  restore_s, again = result['restore_s'], result['resumed_s']
  return (
    f'{result["model"]}, every round saved: of a round of {round_s:.1f} s the '
    f'loop waits {stall:.3f} s for a save, {stall / round_s:.1%}; the rest is '
    'written while the next round runs, and is whole on disk after '
    f'{np.median(result["write_s"]):.2f} s. Restoring takes {restore_s:.2f} s, '
    f'{restore_s / again:.2%} of a run of {result["rounds"]} rounds. '
    f'{machine.told(result["machine"])}.'
  )


if __name__ == '__main__':
  machine.run('resume', measure, report)
