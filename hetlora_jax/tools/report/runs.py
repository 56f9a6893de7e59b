"""Reads the folders of runs, and averages over runs that differ in the seed alone."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetlora_jax import curves, files, rows
from hetlora_jax.config import ConfigError
from hetlora_jax.run import Run
from hetlora_jax.tools import paired, tables
from hetlora_jax.types import Row

# Columns of metrics.jsonl that the page draws, and sums over the rounds so far.
_DRAWN = (
  'train/loss', 'eval/seen/loss', 'eval/unseen/loss', 'energy/slots',
  'eval/seen/accuracy', 'eval/unseen/accuracy',
  'rank/mean', 'rank/min', 'rank/max', 'rank/histogram',
)  # fmt: skip
_SUMS = {
  'bytes so far': ('comm/up_bytes', 'comm/down_bytes'),
  'tokens so far': ('train/tokens',),
}
_OF_A_SAMPLE = ('client', 'kind', 'prompt', 'reference', 'generated')
_REMEDY = 'leave this run out, or run or evaluate it again'
_MOST_CHARACTERS = 48  # of a group's name


class Entry(NamedTuple):
  """A run of the page, with as much as its folder holds."""

  name: str  # of its folder, or the whole path where two folders share a name
  fields: dict[str, Any]  # its configuration, flat
  columns: dict[str, dict[int, Any]]  # name -> round -> a number or array
  summary: dict[str, Any]  # summary.json if there is one, and totals so far
  rounds: int  # done so far
  finished: bool  # ended after all the rounds of its configuration
  people: paired.People
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
  run = Run(folder)
  with _naming(folder / 'metrics.jsonl'):
    if not (folder / 'metrics.jsonl').exists():
      raise FileNotFoundError(f'{folder / "metrics.jsonl"} is missing: {_REMEDY}.')
    history = run.history
    evaluated = any('eval/seen/loss' in row for row in history)
    totals = rows.totals(history) if evaluated else {}
    columns = _columns(history)
  with _naming(folder / 'summary.json'):
    finished, ended = bool(run.finished), run.summary or {}
  return Entry(
    name=name,
    fields=run.fields,
    columns=columns,
    summary=ended | totals,
    rounds=history[-1]['round'] if history else 0,
    finished=finished,
    people=_people(run),
    samples=_samples(run),
  )


def _columns(history: list[Row]) -> dict[str, dict[int, Any]]:
  columns = {}
  for name in _DRAWN:
    rounds, values = curves.series(history, name)
    columns[name] = dict(zip(rounds, np.array(values, float), strict=True))
  rounds = [row['round'] for row in history]
  for name, parts in _SUMS.items():
    sent = [[row.get(part, 0) for part in parts] for row in history]
    if parts[0].startswith('comm/') and any(None in x for x in sent):
      # The rules of this run do not state what they send.
      columns[name] = {}
      continue
    steps = [sum(x) for x in sent]
    columns[name] = dict(zip([0, *rounds], np.cumsum([0.0, *steps]), strict=True))
  return columns


def _people(run: Run) -> paired.People:
  with _naming(run.folder / 'people.json'):
    return paired.people_of(run.people)


def _samples(run: Run) -> list[dict[str, Any]]:
  with _naming(run.folder / 'generations.jsonl'):
    return [{name: line[name] for name in _OF_A_SAMPLE} for line in run.samples]


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Raises an error that names the file if its content is not as expected."""
  try:
    yield
  except (files.Damaged, ConfigError):
    raise
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
  found = tables.over_seeds(
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
