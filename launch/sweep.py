"""Runs many points: python -m launch.sweep --sweep=configs/ablations.py:methods.

Points that differ only in what a compiled program takes as data (seeds,
learning rates, gamma, lambda, scale, ranks) run together in one program; every
program is a process. Each point gets a folder of its own in --workdir; finished
ones are not run again, interrupted ones are continued. Ends in tables, which
sweep.json, .csv and .tex hold too, and the curves as sweep.png, .pdf and .svg.
"""

import os
import pathlib
import shlex
import sys

from absl import flags as absl_flags

from hetlora_jax import config as config_lib
from hetlora_jax import console, training
from hetlora_jax.tools import paired, sweep, tables
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
  'together', None, 'Most points in one program; by default all that can.', 1
)
GROUP = absl_flags.DEFINE_integer(
  'group', None, 'Run only the program of this number, counted from 0.'
)
PRINT = absl_flags.DEFINE_bool(
  'print', False, 'Print one command a program, for a scheduler, and exit.'
)
BASELINE = absl_flags.DEFINE_string(
  'baseline',
  None,
  'Points that all are compared with, by their fields without the seed, e.g. '
  'method=fedit; by default the first.',
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
  """Returns the jobs of all points, and those of each program."""
  kept = _flags_without(
    'sweep', 'grid', 'workdir', 'parallel', 'together', 'group', 'baseline'
  )
  program = shlex.join(['python', '-m', 'launch.train', *kept])
  jobs = sweep.plan(config, _points(config), workdir, program)
  return jobs, sweep.programs(jobs, TOGETHER.value)


def _command(number: int) -> list[str]:
  """Returns the command line of one program."""
  kept = _flags_without('parallel', 'print', 'group')
  return ['-m', 'launch.sweep', *kept, f'--group={number}']


def _flags_without(*names: str) -> list[str]:
  """Returns this call's flags but for some, `--name value` joined to one word."""
  words = []
  for word in sys.argv[1:]:
    if words and not word.startswith('-') and '=' not in words[-1]:
      words[-1] = f'{words[-1]}={word}'
    else:
      words.append(word)
  return [w for w in words if w.lstrip('-').partition('=')[0] not in names]


def dry_run(config: config_lib.Config) -> None:
  """Compiles every program, or that of --group, for fake devices."""
  _, programs = _plan(config, pathlib.Path('.'))
  for number, jobs in enumerate(programs):
    if GROUP.value in (None, number):
      console.say(f'program {number + 1} of {len(programs)}: {len(jobs)} points')
      flags.dry_run(*[job.config for job in jobs])


def run(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Runs all points and prints the table that compares them."""
  jobs, programs = _plan(config, workdir)
  # At once, not after all have run.
  known = tables.joined(sweep.results(jobs), workdir)
  paired.baseline_of([*tables.over_seeds(known)], BASELINE.value)
  if PRINT.value:
    for number in range(len(programs)):
      print(shlex.join(['python', *_command(number)]))
  elif GROUP.value is not None:
    _run_group(programs, GROUP.value)
  else:
    _start_programs(programs, len(jobs), workdir)
    _compare(sweep.results(jobs), workdir)


def _run_group(programs: list[list[sweep.Job]], number: int) -> None:
  """Runs one program in this process."""
  if not 0 <= number < len(programs):
    raise config_lib.ConfigError(
      f'--group={number} is no program of this sweep: it has {len(programs)}, '
      'counted from 0.'
    )
  if processes.CHILD in os.environ:
    signals.end_with_parent()
  sweep.run_program(programs[number])


def _start_programs(
  programs: list[list[sweep.Job]], count: int, workdir: pathlib.Path
) -> None:
  """Runs every program that is not finished in a process of its own."""
  unfinished = {
    f'program {number + 1} ({len(jobs)} of {count} points)': [
      sys.executable,
      *_command(number),
    ]
    for number, jobs in enumerate(programs)
    if any(sweep.summary_of(job) is None for job in jobs)
  }
  if not processes.start_all(unfinished, workdir / 'logs', PARALLEL.value):
    raise training.Interrupted('Stopped.')


def _compare(found: list[dict], workdir: pathlib.Path) -> None:
  """Prints the table; raises ConfigError if a point failed."""
  print(
    f'\n{tables.write(found, workdir, BASELINE.value)}\n\nResults are in {workdir}/'
  )
  failed = [f'{r["name"]} ({r["error"]})' for r in found if 'error' in r]
  if failed:
    raise config_lib.ConfigError(f'these points failed: {"; ".join(failed)}')


def main() -> None:
  """Starts the program, hetlora-sweep too."""
  flags.run(run, dry_run, needs_devices=lambda: GROUP.value is not None)


if __name__ == '__main__':
  main()
