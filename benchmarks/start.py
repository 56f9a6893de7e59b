"""From launch to the first round, its memory, and how long devices wait.

python -m benchmarks.start [--config=configs/chitchat_gemma3.py]

Starts a process without compiled programs, and one that finds them; each
reports seconds since its own start, and the most memory it held (on Linux). Then
a run of a few rounds tells which share of the time the devices waited for the
host (`time/wait_s`).
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
from absl import flags

from benchmarks import machine
from hetlora_jax import config, points, training

machine.define_config()
_ROUNDS = 4  # of the run
_CHILD = flags.DEFINE_bool('child', False, 'Be the process that is timed.')


def _age() -> float:
  """Returns the seconds since this process started."""
  ticks = int(pathlib.Path('/proc/self/stat').read_text().split()[21])
  up = float(pathlib.Path('/proc/uptime').read_text().split()[0])
  return up - ticks / os.sysconf('SC_CLK_TCK')


def child() -> dict[str, float]:
  """Prepares, compiles and runs one round; returns when each was done."""
  done = {'imported': _age()}
  x = points.prepare(config.resolve(machine.config()))
  cohorts = points.make_cohorts(x, 0)
  done['prepared'] = _age()
  lowered = x.run_rounds.lower(*points.arguments(x, x.initial_state, cohorts))
  done['traced'] = _age()
  lowered.compile()
  done['compiled'] = _age()
  # The program is in the cache now; calling finds it there.
  jax.block_until_ready(points.call(x, x.initial_state, cohorts))
  done['first round'] = _age()
  return done | {'peak MB': machine.peak_mb()}


def start(programs: str) -> dict[str, float]:
  """Starts a child that keeps its programs in a folder."""
  env = os.environ | {
    'JAX_COMPILATION_CACHE_DIR': programs,
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  command = [sys.executable, '-m', 'benchmarks.start', '--child', *sys.argv[1:]]
  out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE)
  return json.loads(out.stdout.decode().splitlines()[-1])


def waiting() -> dict:
  """Runs a few rounds as the launcher does."""
  raw = machine.config()
  raw.federated.num_rounds = _ROUNDS
  with tempfile.TemporaryDirectory() as folder:
    began = time.perf_counter()
    training.train(config.resolve(raw), pathlib.Path(folder, 'run'))
    seconds = time.perf_counter() - began
    rows = (pathlib.Path(folder, 'run', 'metrics.jsonl')).read_text()
  rows = [json.loads(line) for line in rows.splitlines()]
  rows = [row for row in rows if 'time/wait_s' in row][1:]  # the first compiles
  waited = sum(row['time/wait_s'] for row in rows)
  busy = sum(row['time/round_s'] for row in rows)
  return {
    'share_waiting': waited / (waited + busy), 'wait_s': waited,
    'rounds_s': busy, 'rounds': len(rows), 'whole_run_s': seconds,
  }  # fmt: skip


def measure() -> dict:
  """Starts cold and warm, and runs."""
  config.resolve(machine.config())  # a bad one ends here
  with tempfile.TemporaryDirectory() as programs:
    return {
      'model': machine.config().model.source, 'cold': start(programs),
      'warm': start(programs), 'host': waiting(),
    }  # fmt: skip


def report(result: dict) -> str:
  """Tells seconds since the start, cold and warm."""
  rows = [
    [name, f'{result["cold"][name]:,.1f}', f'{result["warm"][name]:,.1f}']
    for name in result['cold']
  ]
  host = result['host']
  return (
    machine.table('s since the start, until | cold | programs kept', rows)
    + f'\n\n{result["model"]}; devices waited for the host '
    f'{host["share_waiting"]:.2%} of the time of {host["rounds"]} rounds. '
    f'{machine.told(result["machine"])}.'
  )


def main() -> None:
  if _CHILD.value:
    print(json.dumps(child()))
  else:
    machine.tell('start', measure, report)


if __name__ == '__main__':
  machine.start(main)
