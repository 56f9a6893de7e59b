"""Many runs of one experiment: points, the programs they need, their table.

Points that differ only in what a compiled program takes as data
(`experiment.VARIES`) run together in one program; every program is a process.
"""

from __future__ import annotations

import ast
import itertools
import math
import pathlib
import re
import runpy
import shlex
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib.figure
import ml_collections
import numpy as np

from hetlora_jax import checkpoint, experiment, files, metrics, training, workdirs
from hetlora_jax.config import Config, ConfigError, flat, resolve, to_dict

MOST_POINTS = 100_000
# What a summary must have for the table.
_NUMBERS = (
  'comm/up_bytes',
  'comm/down_bytes',
  'train/parameters',
  'aggregation/error',
  'time/this_call_s',
)

Fields = dict[str, Any]  # what a point changes: field -> value


class Run(NamedTuple):
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
  """Returns every combination of 'field=[a, b] x field=[c, d]'."""
  known, axes = flat(to_dict(config)), {}
  for part in re.split(r'\s+x\s+', text.strip()):
    name, _, values = part.partition('=')
    try:
      parsed = ast.literal_eval(values)
    except (MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
      parsed = None
    if not isinstance(parsed, list) or not parsed:
      raise ConfigError(
        f'--grid: {files.short(part)!r} must be FIELD=[VALUE, ...], axes joined by " x ", '
        "e.g. 'federated.gamma=[0.85,0.99] x seed=[0,1]'; words in quotes, "
        'method=["hetlora","flexlora"].'
      )
    if name not in known:
      raise ConfigError(
        f'--grid: config.{files.short(name)} does not exist (--print_config shows all).'
      )
    axes[name] = parsed
  if math.prod(map(len, axes.values())) > MOST_POINTS:
    raise ConfigError(f'--grid has more than {MOST_POINTS} points: take fewer.')
  return [
    dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
  ]


def name_of(fields: Fields) -> str:
  """Returns a folder's name for a point.

  >>> name_of({'method': 'fedit', 'federated.r_max': 50})
  'method=fedit,r_max=50'
  """
  parts = [f'{k.rpartition(".")[2]}={v}' for k, v in fields.items()]
  return ','.join(parts).replace('/', '_') or 'default'


def with_fields(config: Config, fields: Fields) -> Config:
  """Returns the configuration of a point; raises ConfigError as usual."""
  raw = ml_collections.ConfigDict(to_dict(config))
  try:
    raw.update_from_flattened_dict(fields)
  except (KeyError, TypeError) as error:
    raise ConfigError(f'{name_of(fields)}: {error}') from error
  return resolve(raw)


def plan(
  config: Config, points: Sequence[Fields], workdir: pathlib.Path, program: str
) -> list[Run]:
  """Gives every point its configuration, folder and command.

  Args:
    config: what the points change.
    points: the fields that each changes.
    workdir: gets a folder a point.
    program: the command line of one run, without fields and workdir.
  """
  runs = []
  for fields in points:
    name = name_of(fields)
    words = [f'--config.{k}={v}' for k, v in fields.items()]
    words.append(f'--workdir={workdir / name}')
    run = Run(name, fields, None, workdir / name, f'{program} {shlex.join(words)}')
    try:
      run = run._replace(config=with_fields(config, fields))
      workdirs.check(run.config, run.workdir)
    except (ValueError, OSError) as error:
      run = run._replace(config=None, error=str(error))
    runs.append(run)
  return runs


def programs(runs: Sequence[Run], together: int = 0) -> list[list[Run]]:
  """Groups the runs that share a program, at most so many; 0 is no limit."""
  groups: dict[tuple, list[Run]] = {}
  for run in runs:
    if run.config:
      groups.setdefault(experiment.program_of(run.config), []).append(run)
  return [
    group[i : i + (together or len(group))]
    for group in groups.values()
    for i in range(0, len(group), together or len(group))
  ]


def read_summary(workdir: pathlib.Path) -> dict | None:
  """Returns the summary of a run if it has one, its numbers checked."""
  path = workdir / 'summary.json'
  if not path.exists():
    return None
  remedy = 'delete it, the run then ends anew from its checkpoint'
  summary = files.read_json(path, remedy)
  last = summary.get('last')
  numbers = [summary.get(name) for name in _NUMBERS]
  sizes = [x for x in numbers[:3] if _is_number(x)]  # losses may be NaN
  last = last if isinstance(last, dict) else {}
  numbers += [last.get(f'eval/{who}/loss') for who in ('seen', 'unseen')]
  if not all(map(_is_number, numbers)) or not all(map(math.isfinite, sizes)):
    raise files.damaged(path, 'numbers are absent', remedy)
  return summary


def summary_of(run: Run) -> dict | None:
  """Returns the summary of a run that has done all its rounds."""
  summary = read_summary(run.workdir)
  if not summary or not run.config:
    return None
  finished = summary['last'].get('round') == run.config.federated.num_rounds
  return summary if finished else None


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _in_step(runs: Sequence[Run]) -> list[list[Run]]:
  """Divides runs into those that can go on from a round all have saved."""
  saved = [checkpoint.steps(run.workdir / 'checkpoints') for run in runs]
  if set.intersection(*saved) or not set.union(*saved):
    return [list(runs)]
  by_step: dict[int, list[Run]] = {}
  for run, steps in zip(runs, saved, strict=True):
    by_step.setdefault(max(steps, default=0), []).append(run)
  return list(by_step.values())


def run_program(runs: Sequence[Run]) -> None:
  """Runs what is not finished of a program's points, in this process."""
  left = [run for run in runs if summary_of(run) is None]
  for batch in _in_step(left) if left else ():
    training.run_points([training.Point(r.config, r.workdir, r.command) for r in batch])


def results(runs: Sequence[Run]) -> list[dict]:
  """Returns every run's summary, or its error."""
  out = []
  for run in runs:
    about = {'name': run.name, 'fields': run.fields, 'command': run.command}
    summary = summary_of(run)
    error = {'error': run.error or 'not finished: see what its program wrote'}
    out.append(about | (summary or error))
  return out


def report(found: list[dict], workdir: pathlib.Path) -> str:
  """Writes sweep.json and sweep.png, and returns the table."""
  workdir.mkdir(parents=True, exist_ok=True)
  files.write_json(workdir / 'sweep.json', found)
  _plot(found, workdir)
  return table(found)


def size(count: float) -> str:
  """Renders a number of bytes or parameters.

  >>> size(950), size(1_234_567)
  ('950', '1.23M')
  """
  power = min(4, (len(str(int(count))) - 1) // 3)
  return f'{count / 1000**power:.3g}{" kMGT"[power]}'.replace(' ', '')


def over_seeds(found: Sequence[dict]) -> dict[str, list[dict]]:
  """Groups results that differ in the seed alone."""
  groups: dict[str, list[dict]] = {}
  for result in found:
    fields = {k: v for k, v in result['fields'].items() if k != 'seed'}
    groups.setdefault(name_of(fields), []).append(result)
  return groups


def spread(values: Sequence[float], digits: int) -> str:
  """Renders a mean and, of several, their standard deviation."""
  text = f'{statistics.mean(values):.{digits}f}'
  if len(values) > 1:
    text += f' ± {statistics.stdev(values):.{digits}f}'
  return text


def _cells(name: str, seeds: list[dict]) -> Iterator[str]:
  good = [r for r in seeds if 'error' not in r]
  missing = len(seeds) - len(good)
  yield name
  if not good:
    yield from ('failed', *[''] * 6)
    return
  mean = lambda field: statistics.mean(r[field] for r in good)  # noqa: E731
  for who in ('seen', 'unseen'):
    text = spread([r['last'][f'eval/{who}/loss'] for r in good], 3)
    yield f'{text} ({missing} failed)' if missing else text
  yield size(mean('comm/up_bytes'))
  yield size(mean('comm/down_bytes'))
  yield size(mean('train/parameters'))
  yield f'{mean("aggregation/error"):.3f}'
  yield f'{mean("time/this_call_s"):.0f}'


def table(found: Sequence[dict]) -> str:
  """Returns a Markdown table: losses, bytes, parameters and time of each.

  Points that differ in the seed alone are one row, of mean and deviation.
  """
  heads = ('', 'loss seen', 'loss unseen', 'bytes up', 'bytes down',
           'trained', 'aggregation error', 'seconds')  # fmt: skip
  rows = [heads, ('---', *('---:',) * (len(heads) - 1))]
  rows += [tuple(_cells(*group)) for group in over_seeds(found).items()]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    f'| {" | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True))} |'
    for row in rows
  )


def _curve(path: pathlib.Path):
  """Returns rounds, losses, and megabytes until then, of a metrics.jsonl."""
  try:
    rows = metrics.read_rows(path)
    rounds, losses = metrics.series(rows, 'eval/seen/loss')
    traffic = {0: 0.0} | {
      r['round']: (r['comm/total_up_bytes'] + r['comm/total_down_bytes']) / 1e6
      for r in rows
      if 'train/loss' in r
    }
    megabytes = [traffic[r] for r in rounds]
    return rounds, np.array(losses, float), np.array(megabytes, float)
  except files.UNEXPECTED as error:
    remedy = "delete its run's folder and run it again"
    raise files.damaged(path, error, remedy) from error


def _curves(seeds: list[dict], workdir: pathlib.Path):
  """Returns rounds, megabytes until then and the losses of each seed."""
  losses, megabytes = [], []
  for result in seeds:
    path = workdir / result['name'] / 'metrics.jsonl'
    rounds, loss, until = _curve(path)
    losses.append(loss)
    megabytes.append(until)
  return rounds, np.mean(megabytes, axis=0), np.array(losses)


def _plot(found: Sequence[dict], workdir: pathlib.Path) -> None:
  """Draws every point's held-out loss against rounds and bytes.

  Of several seeds the mean, and one standard deviation to either side.
  """
  figure = matplotlib.figure.Figure((13, 5.5), layout='constrained')
  by_round, by_bytes = figure.subplots(1, 2, sharey=True)
  good = over_seeds([r for r in found if 'error' not in r])
  for i, (name, seeds) in enumerate(good.items()):
    style = {'color': f'C{i % 10}', 'ls': ('-', '--', ':', '-.')[i // 10 % 4]}
    rounds, megabytes, losses = _curves(seeds, workdir)
    mean, deviation = losses.mean(0), losses.std(0, ddof=len(losses) > 1)
    for axis, x in ((by_round, rounds), (by_bytes, megabytes)):
      axis.plot(x, mean, label=name if axis is by_round else None, **style)
      if len(seeds) > 1:
        low, high = mean - deviation, mean + deviation
        axis.fill_between(x, low, high, color=style['color'], alpha=0.15, lw=0)
  by_round.set(xlabel='round', ylabel='held-out loss of seen people (nats)')
  by_bytes.set(xlabel='megabytes sent up and down', xscale='symlog')
  for axis in (by_round, by_bytes):
    axis.grid(alpha=0.3)
  figure.legend(loc='outside right upper', fontsize='small')
  figure.savefig(workdir / 'sweep.png', dpi=110)
