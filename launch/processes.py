"""Programs that a program starts, some at a time, and stops with itself."""

import os
import pathlib
import subprocess

from hetlora_jax import console
from launch import signals

CHILD = 'HETLORA_JAX_CHILD'  # in the environment of a process started here


def start_all(
  commands: dict[str, list[str]], logs: pathlib.Path, parallel: int
) -> bool:
  """Runs commands, some at a time; returns False if they were interrupted.

  With several at a time each writes to a file of its own in `logs`. Signals
  are passed on; after one, and after a run that was interrupted, no other is
  started. A process that loses its parent ends (`signals.end_with_parent`).
  """
  waiting, running, received = dict(commands), {}, []

  def pass_on(number, frame):
    del frame
    received.append(number)
    for process in running.values():
      process.send_signal(number)

  with signals.handled_by(pass_on):
    while running or (waiting and not received):
      # Start as many as may run.
      while waiting and len(running) < parallel and not received:
        name = next(iter(waiting))
        number = len(commands) - len(waiting) + 1
        console.say(f'\n[{number}/{len(commands)}] {name}')
        running[name] = _start(waiting.pop(name), logs, name, parallel > 1)

      # Wait a little for each, and see how it ended.
      for name, process in list(running.items()):
        try:
          code = process.wait(0.2)
        except subprocess.TimeoutExpired:
          continue
        del running[name]
        if code in (console.SAVED, signals.INTERRUPTED):
          received.append(code)
        elif code:
          console.say(f'{name} failed: exit code {code}')
  return not received


def _start(command, logs: pathlib.Path, name: str, to_file: bool):
  out = None
  if to_file:
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f'{name.replace(" ", "-")}.log'
    console.say(f'writes to {path}')
    out = path.open('w')
  return subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=out, stderr=out,
    env=os.environ | {CHILD: '1'}, start_new_session=True,
  )  # fmt: skip
