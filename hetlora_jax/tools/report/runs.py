"""Reads the folders of runs, and averages over runs that differ in the seed alone."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetlora_jax import files, metrics, results
from hetlora_jax.config import ConfigError, flat
from hetlora_jax.tools import sweep

KINDS = ('seen', 'unseen')
# Columns of metrics.jsonl that the page draws, and sums over the rounds so far.
_DRAWN = (
  'train/loss', 'eval/seen/loss', 'eval/unseen/loss', 'energy/slots',
  'rank/mean', 'rank/min', 'rank/max', 'rank/histogram',
)  # fmt: skip
_SUMS = {
  'bytes so far': ('comm/up_bytes', 'comm/down_bytes'),
  'tokens so far': ('train/tokens',),
}
_OF_A_SAMPLE = ('client', 'kind', 'prompt', 'reference', 'generated')
_REMEDY = 'leave this run out, or run or evaluate it again'
_MOST_CHARACTERS = 48  # of a group's name


class Person(NamedTuple):
  """A person's held-out loss at the newest evaluation."""

  loss: float  # nats per target token
  rank: int | None  # drawn for training; unseen people have none


class Entry(NamedTuple):
  """A run of the page, with as much as its folder holds."""

  name: str  # of its folder, or the whole path where two folders share a name
  fields: dict[str, Any]  # its configuration, flat
  columns: dict[str, dict[int, Any]]  # name -> round -> a number or array
  summary: dict[str, Any]  # summary.json if there is one, and totals so far
  rounds: int  # done so far
  finished: bool  # ended after all the rounds of its configuration
  people: dict[str, list[Person]]  # by KINDS
  samples: list[dict[str, Any]]


class Group(NamedTuple):
  """Runs that differ in the seed alone."""

  name: str
  number: int  # chooses colour, dashes and marker
  entries: list[Entry]


def read(folders: Sequence[pathlib.Path]) -> list[Entry]:
  """Reads the runs in some folders, which may be sweeps, each run once."""
  paths = [path.resolve() for folder in folders for path in _run_folders(folder)]
  if not paths:
    raise ConfigError('no folder is given: name the --workdir of runs or of a sweep.')
  found = dict.fromkeys(paths)
  names = [path.name for path in found]
  return [
    _read(path, path.name if names.count(path.name) == 1 else str(path))
    for path in found
  ]


def _run_folders(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the folder itself if it is a run's, or those of a sweep's runs."""
  if not folder.is_dir():
    raise ConfigError(f'{folder} is no folder: name that of a run or a sweep.')
  if (folder / 'config.json').exists():
    return [folder]
  inner = sorted(path.parent for path in folder.glob('*/config.json'))
  if not inner:
    raise ConfigError(
      f'{folder} holds no runs: neither it nor a folder in it has a '
      'config.json; name the --workdir of launch.train or launch.sweep.'
    )
  return inner


def _read(folder: pathlib.Path, name: str) -> Entry:
  fields = _defaults() | flat(files.read_json(folder / 'config.json', _REMEDY))
  ended, last_round = _summary(folder / 'summary.json')
  path = folder / 'metrics.jsonl'
  history = _lines(path)
  with _naming(path):
    evaluated = any('eval/seen/loss' in row for row in history)
    totals = results.totals(history) if evaluated else {}
    columns = _columns(history)
  return Entry(
    name=name,
    fields=fields,
    columns=columns,
    summary=ended | totals,
    rounds=history[-1]['round'] if history else 0,
    finished=last_round == fields['federated.num_rounds'],
    people=_people(folder / 'people.json'),
    samples=_samples(folder / 'generations.jsonl'),
  )


def _summary(path: pathlib.Path) -> tuple[dict[str, Any], int | None]:
  """Returns summary.json and its last round, or nothing before a run has ended."""
  if not path.exists():
    return {}, None
  summary = files.read_json(path, _REMEDY)
  with _naming(path):
    return summary, summary['last']['round']


def _defaults() -> dict[str, Any]:
  """Returns the defaults, for fields that older runs lack."""
  from configs import default

  return flat(json.loads(default.get_config().to_json()))


def _columns(history: list[metrics.Row]) -> dict[str, dict[int, Any]]:
  columns = {}
  for name in _DRAWN:
    rounds, values = metrics.series(history, name)
    columns[name] = dict(zip(rounds, np.array(values, float), strict=True))
  for name, parts in _SUMS.items():
    steps = [sum(row.get(part, 0) for part in parts) for row in history]
    rounds = [row['round'] for row in history]
    columns[name] = dict(zip([0, *rounds], np.cumsum([0.0, *steps]), strict=True))
  return columns


def _people(path: pathlib.Path) -> dict[str, list[Person]]:
  """Returns the people of each kind who have any target tokens."""
  people = files.read_json(path, _REMEDY) if path.exists() else dict.fromkeys(KINDS, [])
  with _naming(path):
    return {
      kind: [
        Person(person['loss_sum'] / person['tokens'], person['rank'])
        for person in people[kind]
        if person['tokens'] > 0
      ]
      for kind in KINDS
    }


def _samples(path: pathlib.Path) -> list[dict[str, Any]]:
  lines = _lines(path) if path.exists() else []
  with _naming(path):
    return [{name: line[name] for name in _OF_A_SAMPLE} for line in lines]


def _lines(path: pathlib.Path) -> list[dict]:
  """Returns the JSON objects of a file, one a line, without a torn last line."""
  *lines, last = files.read_bytes(path, _REMEDY).split(b'\n')
  if last.endswith(b'}'):
    lines.append(last)
  return [files.parse_json(line, path, _REMEDY) for line in lines if line]


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Raises an error that names the file if its content is not as expected."""
  try:
    yield
  except files.UNEXPECTED as error:
    raise files.damaged(path, error, _REMEDY) from error


def differing(entries: Sequence[Entry]) -> list[str]:
  """Returns the fields whose values are not the same in all runs."""
  values: dict[str, set[str]] = {}
  for entry in entries:
    for name, value in entry.fields.items():
      values.setdefault(name, set()).add(json.dumps(value))
  return [name for name, different in values.items() if len(different) > 1]


def grouped(entries: Sequence[Entry]) -> list[Group]:
  """Groups runs that differ in the seed alone, as a sweep's table does."""
  names = differing(entries)
  found = sweep.over_seeds(
    [{'fields': {n: x.fields.get(n) for n in names}, 'entry': x} for x in entries]
  )
  too_long = any(len(name) > _MOST_CHARACTERS for name in found)
  groups = []
  for number, (name, members) in enumerate(found.items()):
    inside = [member['entry'] for member in members]
    method = str(inside[0].fields['method'])
    if name == 'default':  # nothing differs but the seed
      name = method
    elif too_long:
      name = f'{method} in {inside[0].name}'
    name = re.sub(',(?! )', ', ', name)  # so that a line can break there
    groups.append(Group(files.short(name, _MOST_CHARACTERS), number, inside))
  return groups


def mean(group: Group, name: str) -> tuple[list[int], np.ndarray, np.ndarray]:
  """Averages a column over a group's runs.

  Returns:
    rounds [T], means [T, ...] and standard deviations [T, ...] of the runs that have a
    value at that round; the deviation of a single run is 0.
  """
  columns = [entry.columns[name] for entry in group.entries]
  rounds = sorted(set().union(*columns))
  values = [np.array([x[r] for x in columns if r in x]) for r in rounds]
  deviations = [x.std(0, ddof=len(x) > 1) for x in values]
  return rounds, np.array([x.mean(0) for x in values]), np.array(deviations)
