"""Many runs of one experiment: the points of a sweep, and the programs they need.

Points that differ only in what a compiled program takes as data (`config.VARIES`) run
together in one program; every program is a process.
"""

from __future__ import annotations

import ast
import itertools
import math
import pathlib
import re
import runpy
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from hetlora_jax import files, training
from hetlora_jax.config import Config, ConfigError, to_dict
from hetlora_jax.fields import flat
from hetlora_jax.points import program_of
from hetlora_jax.run import Run

MOST_POINTS = 100_000
Fields = dict[str, Any]  # what a point changes: field -> value


class Job(NamedTuple):
  """One point of a sweep; without a config it cannot run."""

  name: str
  fields: Fields
  config: Config | None
  workdir: pathlib.Path
  command: str  # that would run it alone
  error: str = ''


def load(spec: str) -> list[Fields]:
  """Loads the sweep NAME of a FILE, given as 'FILE:NAME'."""
  path, _, name = spec.partition(':')
  if not pathlib.Path(path).is_file() or not name:
    raise ConfigError(
      f'--sweep={spec} must be FILE:NAME, e.g. configs/ablations.py:methods.'
    )
  try:
    points = runpy.run_path(path)['get_sweep'](name)
  except ValueError as error:
    raise ConfigError(f'--sweep={spec}: {files.short(error, 300)}') from error
  except Exception as error:  # whatever a file of Python may raise
    raise ConfigError(
      f'--sweep={spec} cannot be loaded: {type(error).__name__}: {files.short(error)}.'
    ) from error
  if not isinstance(points, list) or not all(map(_is_point, points)):
    raise ConfigError(
      f'--sweep={spec}: get_sweep must return a list of field -> value.'
    )
  return points


def _is_point(fields: Any) -> bool:
  return isinstance(fields, dict) and all(isinstance(k, str) for k in fields)


def parse_grid(text: str, config: Config) -> list[Fields]:
  """Returns every combination of 'field=[a, b] x field=[c, d]'; raises ConfigError."""
  known = flat(to_dict(config))
  axes = dict(_axis(part, known) for part in re.split(r'\s+x\s+', text.strip()))
  if math.prod(map(len, axes.values())) > MOST_POINTS:
    raise ConfigError(f'--grid has more than {MOST_POINTS} points: take fewer.')
  return [
    dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
  ]


def _axis(text: str, known: Fields) -> tuple[str, list]:
  """Parses one 'field=[a, b]' of a grid."""
  name, _, values = text.partition('=')
  try:
    parsed = ast.literal_eval(values)
  except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
    parsed = None
  if not isinstance(parsed, list) or not parsed:
    raise ConfigError(
      f'--grid: {files.short(text)!r} must be FIELD=[VALUE, ...], axes joined by " x ", '
      "e.g. 'federated.gamma=[0.85,0.99] x seed=[0,1]'; words in quotes, "
      'method=["hetlora","flexlora"].'
    )
  if name not in known:
    raise ConfigError(
      f'--grid: config.{files.short(name)} does not exist (--print_config shows all).'
    )
  return name, parsed


def name_of(fields: Fields) -> str:
  """Returns a folder's name for a point.

  >>> name_of({'method': 'fedit', 'federated.r_max': 50})
  'method=fedit,r_max=50'
  """
  parts = [f'{k.rpartition(".")[2]}={v}' for k, v in fields.items()]
  return ','.join(parts).replace('/', '_') or 'default'


def plan(
  config: Config, points: Sequence[Fields], workdir: pathlib.Path, program: str
) -> list[Job]:
  """Gives every point its configuration, folder and command.

  Args:
    config: what the points change.
    points: the fields that each changes.
    workdir: gets a folder a point.
    program: the command line of one run, without fields and workdir.

  Raises:
    ConfigError: a point is there twice, or its folder has a run of another
      configuration.
  """
  jobs: list[Job] = []
  for fields in points:
    name = name_of(fields)
    if name in {job.name for job in jobs}:
      raise ConfigError(f'the point {name} is there twice: leave one out.')
    words = [f'--config.{k}={v}' for k, v in fields.items()]
    words.append(f'--workdir={workdir / name}')
    job = Job(name, fields, None, workdir / name, f'{program} {shlex.join(words)}')
    # What cannot run is told at the end; the other points go on.
    try:
      job = job._replace(config=config.replace(**fields))
    except (ValueError, OSError) as error:
      job = job._replace(error=f'{name}: {error}')
    else:
      Run(job.workdir).check(job.config)  # a mistaken line must not spoil a table
    jobs.append(job)
  return jobs


def programs(jobs: Sequence[Job], together: int | None = None) -> list[list[Job]]:
  """Groups the jobs that share a program.

  Args:
    jobs: of `plan`; those without a configuration are left out.
    together: the most jobs in a program; None: all that can.
  """
  groups: dict[tuple, list[Job]] = {}
  for job in jobs:
    if job.config:
      groups.setdefault(program_of(job.config), []).append(job)
  return [
    group[i : i + (together or len(group))]
    for group in groups.values()
    for i in range(0, len(group), together or len(group))
  ]


def summary_of(job: Job) -> dict | None:
  """Returns the summary of a job that has done all its rounds or stopped early."""
  if not job.config:
    return None
  run = Run(job.workdir)
  summary = run.finished
  if summary and summary['last']['round'] == job.config.federated.num_rounds:
    return summary
  return summary if run.stopped(job.config) else None


def _in_step(jobs: Sequence[Job]) -> list[list[Job]]:
  """Divides jobs into those that can go on from a round that all have saved."""
  saved = [Run(job.workdir).steps() for job in jobs]
  if set.intersection(*saved) or not set.union(*saved):
    return [list(jobs)]
  by_step: dict[int, list[Job]] = {}
  for job, steps in zip(jobs, saved, strict=True):
    by_step.setdefault(max(steps, default=0), []).append(job)
  return list(by_step.values())


def run_program(jobs: Sequence[Job]) -> None:
  """Runs, in this process, the jobs of a program that are not finished."""
  left = [job for job in jobs if summary_of(job) is None]
  for batch in _in_step(left) if left else ():
    training.train_points(
      [training.Point(job.config, job.workdir, job.command) for job in batch]
    )


def results(jobs: Sequence[Job]) -> list[dict]:
  """Returns every job's summary, or its error."""
  out = []
  for job in jobs:
    about = {'name': job.name, 'fields': job.fields, 'command': job.command}
    error = {'error': job.error or 'not finished: see what its program wrote'}
    out.append(about | (summary_of(job) or error))
  return out
