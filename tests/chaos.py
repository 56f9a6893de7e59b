"""Kills runs with SIGKILL at random moments and compares them with unbroken ones.

python -m tests.chaos [TRIALS [SEED]]     (make chaos TRIALS=30)

A third of the trials is a run of two processes, one of which is killed. Kills
come at any time, within a round, or while a checkpoint is being written. After
each kill the same line is run again; half of the trials are killed twice. Adapters, ranks, optimizer state, metrics.jsonl and
TensorBoard's events must then equal the unbroken run's to the bit. The last line
counts trials, moments and how many were equal; exit code 1 if not all were.
"""

import collections
import functools
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import logging
from tensorboard.backend.event_processing import event_accumulator

from configs import tiny
from hetlora_jax import checkpoint, config, files, points

ROOT = pathlib.Path(__file__).parent.parent
ROUNDS = 8
FIELDS = {
  'federated.num_rounds': ROUNDS,
  'eval.every': 4,
  'checkpoint.every': 1,
  'server_optimizer.name': 'adam',  # so that there is optimizer state
  'server_optimizer.learning_rate': 1e-2,
}
GRACE = 20  # seconds for a process that lost its partner


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start(
  workdir: pathlib.Path, processes: int, fields: dict
) -> list[subprocess.Popen]:
  """Starts the processes of a run; what they say goes to a file."""
  line = [
    sys.executable, '-m', 'launch.train', '--config=configs/tiny.py',
    f'--workdir={workdir}', *[f'--config.{k}={v}' for k, v in fields.items()],
  ]  # fmt: skip
  if processes > 1:
    line += [
      '--distributed', f'--num_processes={processes}',
      f'--coordinator_address=127.0.0.1:{_free_port()}',
      f'--config.mesh.clients={processes}',
    ]  # fmt: skip
  log = workdir.with_suffix('.log').open('a')
  return [
    subprocess.Popen(
      [*line, *([f'--process_id={i}'] if processes > 1 else [])], cwd=ROOT,
      stdout=log, stderr=log, env=os.environ | {'JAX_NUM_CPU_DEVICES': '1'},
    )
    for i in range(processes)
  ]  # fmt: skip


def finish(workdir: pathlib.Path, processes: int, fields: dict) -> None:
  """Runs to the end; raises if that fails."""
  codes = [p.wait(600) for p in start(workdir, processes, fields)]
  if any(codes):
    log = workdir.with_suffix('.log').read_text()
    raise RuntimeError(f'a run ended with {codes}:\n{log[-3000:]}')


def _saving(workdir: pathlib.Path) -> bool:
  return any(workdir.glob('checkpoints/*.orbax-checkpoint-tmp'))


def _rounds_done(workdir: pathlib.Path) -> int:
  """Returns how many rounds metrics.jsonl has; -1 before the first evaluation."""
  rows = files.read_rows(workdir / 'metrics.jsonl')
  return rows[-1]['round'] if rows else -1


def moment(workdir: pathlib.Path) -> str:
  """Returns what a run was doing, by what it has written."""
  done = _rounds_done(workdir)
  if (workdir / 'summary.json').exists():
    return 'at the end'
  if _saving(workdir):
    return f'saving (round {done})'
  return 'starting' if done < 0 else f'in a round (after {done})'


KINDS = ('clock', 'round', 'save')


def _wait(running, workdir, kind: str, seconds: float, dice) -> bool:
  """Waits for a moment of a kind; returns whether all processes still run."""
  begun, wanted = time.monotonic(), dice.randrange(ROUNDS - 1)
  due = {
    'clock': lambda: time.monotonic() - begun >= seconds,
    'round': lambda: _rounds_done(workdir) >= wanted,
    'save': lambda: _saving(workdir) and _rounds_done(workdir) > wanted,
  }[kind]
  seconds *= dice.random() / 2  # the run may have had to compile
  while all(p.poll() is None for p in running):
    if due():
      time.sleep(dice.uniform(0, 0.2 if kind == 'round' else 0.02))
      return all(p.poll() is None for p in running)
    time.sleep(0.001)
  return False


def strike(running, workdir, kind, seconds, dice) -> str | None:
  """Kills a process of a run; returns the moment, None if it was too late."""
  alive = _wait(running, workdir, kind, seconds, dice)
  found = moment(workdir) if alive else None
  if alive:
    dice.choice(running).send_signal(signal.SIGKILL)
  for process in running:
    try:
      process.wait(GRACE)
    except subprocess.TimeoutExpired:  # as a scheduler would
      process.kill()
      process.wait()
  return found


def _state_of(workdir: pathlib.Path, x: points.Points):
  """Returns the last checkpoint as numpy."""
  reader = checkpoint.Checkpoints([workdir / 'checkpoints'], x.identity)
  (state,) = reader.restore(ROUNDS, points.shape_of_one(x))
  reader.close()
  return jax.device_get(state)


def _timeless(workdir: pathlib.Path) -> list[dict]:
  rows = files.read_rows(workdir / 'metrics.jsonl')
  return [
    {k: v for k, v in r.items() if not k.startswith(('time/', 'memory/'))} for r in rows
  ]


def _events(workdir: pathlib.Path) -> dict[str, list]:
  """Returns TensorBoard's view: name -> (round, value)."""
  board = event_accumulator.EventAccumulator(str(workdir / 'tensorboard'))
  board.Reload()
  return {
    name: [(e.step, e.value) for e in board.Scalars(name)]
    for name in board.Tags()['scalars']
    if not name.startswith(('time/', 'memory/'))
  }


def differences(workdir, unbroken, x: points.Points) -> list[str]:
  """Returns what of a run does not equal the unbroken one to the bit."""
  one, other = _state_of(workdir, x), _state_of(unbroken, x)
  found = [
    jax.tree_util.keystr(path)
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(one),
      jax.tree.leaves(other),
      strict=True,
    )
    if not np.array_equal(a, b)
  ]
  if _timeless(workdir) != _timeless(unbroken):
    found.append('metrics.jsonl')
  if _events(workdir) != _events(unbroken):
    found.append('tensorboard')
  if _saving(workdir):
    found.append('an unfinished checkpoint is left')
  return found


def _unbroken(folder: pathlib.Path, processes: int, fields: dict) -> tuple:
  """Runs undisturbed; returns the folder and the seconds it took."""
  workdir, begun = folder / f'unbroken_{processes}', time.monotonic()
  finish(workdir, processes, fields)
  return workdir, time.monotonic() - begun


def _built(fields: dict) -> points.Points:
  raw = tiny.get_config()
  raw.update_from_flattened_dict(fields)
  return points.prepare(config.resolve(raw))


def main(trials: int = 30, seed: int = 0, first: int = 0, **fields) -> bool:
  """Runs the trials, prints their table, and returns whether all are equal.

  Args:
    trials: how many.
    seed: of the moments.
    first: of the trials; it decides on processes and kinds of moments.
    **fields: of the configuration, dots as `__`, to change `tiny` further.
  """
  logging.set_verbosity(logging.FATAL)  # orbax says that it only reads
  fields = {k.replace('__', '.'): v for k, v in fields.items()} | FIELDS
  dice, moments, equal = random.Random(seed), collections.Counter(), 0
  x = _built(fields)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    whole = functools.cache(lambda n: _unbroken(folder, n, fields))
    print('| trial | processes | killed when | differs from an unbroken run |')
    print('|---:|---:|---|---|')
    for trial in range(first, first + trials):
      processes = 2 if trial % 3 == 2 else 1
      unbroken, seconds = whole(processes)
      workdir, killed = folder / f'trial_{trial}', []
      for i in range(1 + trial % 2):
        running = start(workdir, processes, fields)
        kind = KINDS[(trial + i) % 3]
        found = strike(running, workdir, kind, seconds, dice)
        killed += [found] if found else []
      finish(workdir, processes, fields)
      wrong = differences(workdir, unbroken, x)
      equal += not wrong
      moments.update(text.split(' (')[0] for text in killed)
      print(
        f'| {trial + 1} | {processes} | {", then ".join(killed) or "too late"} '
        f'| {", ".join(wrong) or "in nothing"} |',
        flush=True,
      )
  hit = ', '.join(f'{n} {text}' for text, n in moments.most_common())
  print(f'{trials} trials, {moments.total()} kills ({hit}), {equal} equal to the bit')
  return equal == trials


if __name__ == '__main__':
  sys.exit(not main(*map(int, sys.argv[1:])))
