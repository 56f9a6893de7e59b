"""What the folders of runs hold, checked: a damaged file is named."""

from __future__ import annotations

import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetlora_jax import config, curves, files
from hetlora_jax import rows as of_rows
from hetlora_jax import run as of_folder
from hetlora_jax.config import ConfigError
from hetlora_jax.fields import flat
from hetlora_jax.tools import sweep
from hetlora_jax.types import Row

ANEW = 'run it again in a new folder, or leave it out'
# What every row of a round has, and what only some rows have.
_OF_ROUNDS = (
  'train/loss', 'train/tokens', 'train/parameters', 'aggregation/error',
  'comm/up_bytes', 'comm/down_bytes', 'comm/total_up_bytes',
  'comm/total_down_bytes', 'rank/pruned', 'fault/nonfinite_clients',
  'fault/lost_rounds', 'time/round_s',
)  # fmt: skip
_NUMBERS = ('rank/min', 'rank/mean', 'rank/max', *(
  f'eval/{who}/{what}'
  for who in ('seen', 'unseen')
  for what in ('loss', 'perplexity')
))  # fmt: skip
_LISTS = ('rank/histogram', 'energy/slots')
KINDS = ('seen', 'unseen')


class Run(NamedTuple):
  """A folder of a run, whatever of it exists."""

  name: str  # of its folder, or the whole path if others have the same
  fields: dict[str, Any]  # of config.json, flat
  rows: list[Row]
  summary: dict  # results.totals of the rows, and summary.json if it ended
  finished: bool
  people: dict[str, list[dict]] | None
  samples: list[dict] | None


class Group(NamedTuple):
  """Runs that differ in the seed alone."""

  name: str
  runs: list[Run]


def read(folders: Sequence[pathlib.Path]) -> list[Run]:
  """Reads the runs of some folders, those of sweeps included, each once."""
  found = [workdir for folder in folders for workdir in _workdirs(folder)]
  if not found:
    raise ConfigError('no folder is given: name those of runs or of a sweep.')
  workdirs = list(dict.fromkeys(path.resolve() for path in found))
  names = [path.name for path in workdirs]
  return [
    _read(path, path.name if names.count(path.name) == 1 else str(path))
    for path in workdirs
  ]


def _workdirs(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns a run's own folder, or those of a sweep's runs."""
  if not folder.is_dir():
    raise ConfigError(f'{folder} is no folder: name that of a run or a sweep.')
  if (folder / 'config.json').exists():
    return [folder]
  inner = sorted(p.parent for p in folder.glob('*/config.json'))
  if not inner:
    raise ConfigError(
      f'{folder} holds no runs: neither it nor a folder in it has a '
      'config.json; name the --workdir of launch.train or launch.sweep.'
    )
  return inner


def _read(workdir: pathlib.Path, name: str) -> Run:
  fields = _defaults() | flat(files.read_json(workdir / 'config.json', ANEW))
  path = workdir / 'metrics.jsonl'
  rows = _lines(path, ANEW, _check_row)
  for column in _LISTS:
    if len({len(row[column]) for row in rows if column in row}) > 1:
      raise files.damaged(path, f'{column} has unequal lengths', ANEW)
  ended = of_folder.Run(workdir).summary or {}
  wanted = fields.get('federated.num_rounds')
  evaluated = any('eval/seen/loss' in row for row in rows)
  return Run(
    name=name,
    fields=fields,
    rows=rows,
    summary=ended | (of_rows.totals(rows) if evaluated else {}),
    finished=bool(ended) and ended['last'].get('round') == wanted,
    people=_people(workdir / 'people.json'),
    samples=_samples(workdir / 'generations.jsonl'),
  )


def _defaults() -> dict[str, Any]:
  """Returns what a run of before a field was there counts as having."""
  return {path: f.default for path, f in config.FIELDS.items()}


def _lines(
  path: pathlib.Path, remedy: str, check: Callable[[dict], None]
) -> list[dict]:
  """Reads an object a line; one torn by a crash may only be the last."""
  *whole, torn = files.read_bytes(path, remedy).split(b'\n')
  if torn and not _is_json(torn):
    torn = b''
  lines = [files.parse_json(x, path, remedy) for x in (*whole, torn) if x]
  try:
    for line in lines:
      check(line)
  except files.UNEXPECTED as error:
    raise files.damaged(path, error, remedy) from error
  return lines


def _is_json(text: bytes) -> bool:
  try:
    json.loads(text)
  except (RecursionError, ValueError):
    return False
  return True


def _need(good: object, what: str) -> None:
  if not good:
    raise ValueError(what)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_row(row: dict) -> None:
  """Raises unless what the page shows of a row is numbers, losses maybe NaN."""
  needed = ('round', *(_OF_ROUNDS if 'train/loss' in row else ()))
  if 'eval/seen/loss' in row:
    needed += _NUMBERS[3:]
  for name in (*needed, *(n for n in _NUMBERS if n in row)):
    _need(_is_number(row.get(name)), f'{name} is no number')
    if 'loss' not in name and 'perplexity' not in name and 'error' not in name:
      _need(math.isfinite(row[name]), f'{name} is not finite')
  for name in (n for n in _LISTS if n in row):
    _need(isinstance(row[name], list), f'{name} is no list')
    good = all(_is_number(x) and math.isfinite(x) for x in row[name])
    _need(good and row[name], f'{name} does not hold numbers')


def _people(path: pathlib.Path) -> dict[str, list[dict]] | None:
  """Reads each person's loss, if the run has left any."""
  if not path.exists():
    return None
  remedy = 'delete it, or evaluate the run anew'
  people = files.read_json(path, remedy)
  try:
    for kind, person in ((k, p) for k in KINDS for p in people[k]):
      _need(_is_number(person['loss_sum']), 'loss_sum is no number')
      _need(_is_number(person['tokens']), 'tokens is no number')
      if kind == 'seen':  # others were never given a rank
        _need(_is_number(person['rank']), 'rank is no number')
  except files.UNEXPECTED as error:
    raise files.damaged(path, error, remedy) from error
  return people


def _samples(path: pathlib.Path) -> list[dict] | None:
  """Reads what was generated, if anything was."""
  if not path.exists():
    return None

  def check(line):
    for name in ('client', 'kind', 'prompt', 'reference', 'generated'):
      _need(isinstance(line.get(name), (str, int)), f'{name} is no text')

  return _lines(path, 'delete it, or generate anew', check)


def differing(found: Sequence[Run]) -> list[str]:
  """Returns the fields whose values are not the same in all runs."""
  names = dict.fromkeys(name for run in found for name in run.fields)
  values = {name: {json.dumps(run.fields.get(name)) for run in found} for name in names}
  return [name for name in names if len(values[name]) > 1]


MOST_CHARACTERS = 48  # of a group's name


def grouped(found: Sequence[Run]) -> list[Group]:
  """Groups runs that differ in the seed alone, as a sweep's table does."""
  names = differing(found)
  groups = sweep.over_seeds(
    [{'fields': {n: run.fields.get(n) for n in names}, 'run': run} for run in found]
  )
  out, long = [], any(len(name) > MOST_CHARACTERS for name in groups)
  for name, members in groups.items():
    runs = [member['run'] for member in members]
    method = str(runs[0].fields.get('method', ''))
    if name == 'default':  # nothing differs but the seed
      name = method
    elif long:
      name = f'{method} in {runs[0].name}'
    name = re.sub(',(?! )', ', ', name)  # so that it can be wrapped
    out.append(Group(files.short(name, MOST_CHARACTERS), runs))
  return out


def until(rows: Sequence[Row], names: Sequence[str]) -> dict[int, float]:
  """Returns round -> the sum of some columns until then; round 0 has none."""
  total, out = 0.0, {0: 0.0}
  for row in rows:
    total += sum(row.get(name, 0) for name in names)
    out[row['round']] = total
  return out


def mean(
  group: Group, name: str
) -> tuple[list[int], np.ndarray, np.ndarray, list[int]]:
  """Averages a column over a group's runs.

  Returns:
    rounds [T], means [T, ...] and standard deviations [T, ...] of the runs that
    got so far, and how many those are [T].
  """
  values: dict[int, list] = {}
  for run in group.runs:
    for round_number, value in zip(*curves.series(run.rows, name), strict=True):
      values.setdefault(round_number, []).append(value)
  rounds = sorted(values)
  arrays = [np.array(values[r], float) for r in rounds]
  deviations = [x.std(0, ddof=len(x) > 1) for x in arrays]
  means = np.array([x.mean(0) for x in arrays])
  return rounds, means, np.array(deviations), [len(x) for x in arrays]
