"""What saving and resuming cost: a trace of a run that saves every round.

python -m benchmarks.resume [--config=configs/chitchat_gemma3.py] [--rounds=4]

Runs some rounds, each of which is saved, then some more of the same run after a
restore. Prints how long the loop stood still for each save, when its writing ended
within the next round, and what restoring took; writes the trace in Chrome's format
(for ui.perfetto.dev) and benchmarks/results/resume.json. Programs are warmed up
by the first rounds, as by a cache.
"""

import dataclasses
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
from hetlora_jax import checkpoint, config, experiment, training

_CONFIG = machine.define_config()
_ROUNDS = flags.DEFINE_integer('rounds', 4, 'Rounds before and after.')
_OUT = flags.DEFINE_string('out', 'benchmarks/results/resume.json', 'Result.')
_TRACE = flags.DEFINE_string(
  'trace', 'benchmarks/results/resume_trace.json', 'Trace.'
)


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
  prepare, save = experiment.prepare, checkpoint.Checkpoints.save

  def traced(*points):
    x = prepare(*points)
    rounds = trace.timed('round', 'devices', x.run_rounds)
    return dataclasses.replace(x, run_rounds=rounds)

  def watched(self, step, states):
    begin = time.perf_counter()
    save(self, step, states)
    trace.add('save', 'main loop', begin, time.perf_counter())
    folder = workdir / 'checkpoints' / str(step)
    threading.Thread(target=_watch, args=(folder, trace, begin)).start()

  restore = trace.timed(
    'restore', 'main loop', checkpoint.Checkpoints.restore_newest
  )
  patch = mock.patch.object
  with (
    patch(experiment, 'prepare', traced),
    patch(checkpoint.Checkpoints, 'save', watched),
    patch(checkpoint.Checkpoints, 'restore_newest', restore),
  ):
    training.run(config.resolve(raw), workdir)


def main() -> None:
  raw, trace = _CONFIG.value.copy_and_resolve_references(), Trace()
  with tempfile.TemporaryDirectory() as name:
    workdir = pathlib.Path(name, 'run')
    _run(raw, workdir, _ROUNDS.value, trace)
    begin = time.perf_counter()
    _run(raw, workdir, 2 * _ROUNDS.value, trace)
    again = time.perf_counter() - begin
  pathlib.Path(_TRACE.value).write_text(json.dumps(trace.events))
  rounds, saves = trace.seconds('round'), trace.seconds('save')
  round_s, restore_s = np.median(rounds), trace.seconds('restore')[-1]
  # The first of each call also traces and compiles what saving needs.
  stall = np.median(saves)
  print(f'a round: {round_s:.2f} s; {len(saves)} saves, of which the loop waits '
        f'{stall:.3f} s each, {100 * stall / round_s:.1f} % of a round (the first '
        f'{saves[0]:.3f} s); whole on disk after '
        f'{np.median(trace.seconds("write")):.3f} s')  # fmt: skip
  print(f'restoring: {restore_s:.3f} s, {100 * restore_s / again:.2f} % of the '
        f'{again:.1f} s that the resumed {_ROUNDS.value} rounds took')  # fmt: skip
  machine.write(
    _OUT.value,
    {
      'machine': machine.describe(), 'round_s': rounds, 'save_s': saves,
      'write_s': trace.seconds('write'), 'restore_s': restore_s,
      'resumed_s': again,
    },
  )  # fmt: skip


if __name__ == '__main__':
  machine.run(main)
