"""Runs many points: python -m launch.sweep --sweep=configs/ablations.py:methods.

Points that differ only in what a compiled program takes as data (seeds,
learning rates, gamma, lambda, scale, ranks) run together in one program; every
program is a process. Each point gets a folder of its own in --workdir; finished
ones are not run again, interrupted ones are continued. Ends in a table,
sweep.json and sweep.png.
"""

import os
import pathlib
import shlex
import sys

from absl import flags as absl_flags

from hetlora_jax import config as config_lib
from hetlora_jax import console, training
from hetlora_jax.tools import sweep, tables
from launch import flags, processes, signals

SWEEP = absl_flags.DEFINE_string(
  'sweep', None, 'Points to run, FILE:NAME, e.g. configs/ablations.py:gamma.'
)
GRID = absl_flags.DEFINE_string(
  'grid',
  None,
  "Points to run, e.g. 'federated.gamma=[0.85,0.95,0.99] x seed=[0,1,2]'; with "
  '--sweep, every combination of both.',
)
PARALLEL = absl_flags.DEFINE_integer(
  'parallel', 1, 'Programs that run at the same time.', lower_bound=1
)
TOGETHER = absl_flags.DEFINE_integer(
  'together', 0, 'Most points in one program; 0: all that can.', lower_bound=0
)
GROUP = absl_flags.DEFINE_integer(
  'group', None, 'Run only the program of this number, counted from 0.'
)
PRINT = absl_flags.DEFINE_bool(
  'print', False, 'Print one command a program, for a scheduler, and exit.'
)


def _points(config: config_lib.Config) -> list[sweep.Fields]:
  if not SWEEP.value and not GRID.value:
    raise config_lib.ConfigError(
      '--sweep and --grid are missing: try --sweep=configs/ablations.py:methods'
      " or --grid='federated.gamma=[0.85,0.99] x seed=[0,1]'"
    )
  named = sweep.load(SWEEP.value) if SWEEP.value else [{}]
  grid = sweep.parse_grid(GRID.value, config) if GRID.value else [{}]
  return [a | b for a in named for b in grid]


def _plan(config: config_lib.Config, workdir: pathlib.Path):
  """Returns all runs, and those of each program."""
  own = (
    '--sweep',
    '--grid',
    '--workdir',
    '--parallel',
    '--together',
    '--group',
  )
  kept = [a for a in flags.arguments() if not a.startswith(own)]
  program = shlex.join(['python', '-m', 'launch.train', *kept])
  runs = sweep.plan(config, _points(config), workdir, program)
  return runs, sweep.programs(runs, TOGETHER.value)


def _command(number: int) -> list[str]:
  """Returns the command line of one program."""
  kept = [
    a
    for a in flags.arguments()
    if not a.startswith(('--parallel', '--print', '--group'))
  ]
  return ['-m', 'launch.sweep', *kept, f'--group={number}']


def dry_run(config: config_lib.Config) -> None:
  """Compiles every program, or that of --group, for fake devices."""
  _, programs = _plan(config, pathlib.Path('.'))
  for number, runs in enumerate(programs):
    if GROUP.value in (None, number):
      console.say(f'program {number}: {len(runs)} points')
      flags.dry_run(*[run.config for run in runs])


def run(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Runs all points and prints the table that compares them."""
  runs, programs = _plan(config, workdir)
  if PRINT.value:
    for number in range(len(programs)):
      print(shlex.join(['python', *_command(number)]))
    return
  if GROUP.value is not None:
    if not 0 <= GROUP.value < len(programs):
      raise config_lib.ConfigError(
        f'--group={GROUP.value} is no program of this sweep: it has '
        f'{len(programs)}, counted from 0.'
      )
    if processes.CHILD in os.environ:
      signals.end_with_parent()
    sweep.run_program(programs[GROUP.value])
    return
  unfinished = {
    f'program {number} ({len(group)} of {len(runs)} points)': [
      sys.executable, *_command(number)
    ]
    for number, group in enumerate(programs)
    if any(sweep.summary_of(r) is None for r in group)
  }  # fmt: skip
  if not processes.start_all(unfinished, workdir / 'logs', PARALLEL.value):
    raise training.Interrupted('Stopped.')
  found = sweep.results(runs)
  print(f'\n{tables.write(found, workdir)}\n\nResults are in {workdir}/')
  failed = [f'{r["name"]} ({r["error"]})' for r in found if 'error' in r]
  if failed:
    raise config_lib.ConfigError(f'these points failed: {"; ".join(failed)}')


def main() -> None:
  """Starts the program, hetlora-sweep too."""
  flags.run(run, dry_run, needs_devices=lambda: GROUP.value is not None)


if __name__ == '__main__':
  main()
