"""Many runs of one experiment, a point each, and the table that compares them."""

from __future__ import annotations

import json
import pathlib
import runpy
import shlex
from typing import Any

import matplotlib.figure
import ml_collections

from hetlora_jax import console, experiment, metrics
from hetlora_jax.config import Config, ConfigError, resolve, to_dict

Point = dict[str, Any]  # field -> value


def load(spec: str) -> list[Point]:
  """Loads the sweep NAME of a FILE, given as 'FILE:NAME'."""
  path, _, name = spec.partition(':')
  if not pathlib.Path(path).is_file() or not name:
    raise ConfigError(
      f'--sweep={spec} must be FILE:NAME, e.g. configs/ablations.py:methods.'
    )
  get_sweep = runpy.run_path(path)['get_sweep']
  try:
    return get_sweep(name)
  except ValueError as error:
    raise ConfigError(f'--sweep={spec}: {error}') from error


def name_of(point: Point) -> str:
  """Returns a folder's name for a point, e.g. 'method=fedit,r_max=50'."""
  parts = [f'{k.rpartition(".")[2]}={v}' for k, v in point.items()]
  return ','.join(parts).replace('/', '_') or 'default'


def with_point(config: Config, point: Point) -> Config:
  """Returns the configuration of a point; raises ConfigError as usual."""
  raw = ml_collections.ConfigDict(to_dict(config))
  try:
    raw.update_from_flattened_dict(point)
  except (KeyError, TypeError) as error:
    raise ConfigError(f'{name_of(point)}: {error}') from error
  return resolve(raw)


def _finished(config: Config, workdir: pathlib.Path) -> dict | None:
  """Returns the summary of a run that has done all its rounds."""
  experiment.check_workdir(config, workdir)
  path = workdir / 'summary.json'
  summary = json.loads(path.read_text()) if path.exists() else {}
  done = summary.get('last', {}).get('round') == config.federated.num_rounds
  return summary if done else None


def run(
  config: Config, points: list[Point], workdir: pathlib.Path, program: str
) -> list[dict]:
  """Runs every point in a folder of its own and returns their summaries.

  Finished points are not run again; interrupted ones are continued. One that
  cannot run is reported and the others go on.

  Args:
    config: what the points change.
    points: the fields that each changes.
    workdir: the points' folders, sweep.json and sweep.png go here.
    program: the command line of one run, without fields and workdir.
  """
  results = []
  for i, point in enumerate(points, 1):
    name, fields = (
      name_of(point),
      [f'--config.{k}={v}' for k, v in point.items()],
    )
    place = workdir / name
    command = f'{program} {shlex.join([*fields, f"--workdir={place}"])}'
    console.say(f'\n[{i}/{len(points)}] {name}')
    try:
      point_config = with_point(config, point)
      summary = _finished(point_config, place)
      if summary is None:
        summary = experiment.run(point_config, place, command)
      results.append({'name': name, 'command': command, **summary})
    except (ValueError, OSError) as error:
      console.say(f'{name} failed: {error}')
      results.append({'name': name, 'command': command, 'error': str(error)})
  workdir.mkdir(parents=True, exist_ok=True)
  metrics.write_json(workdir / 'sweep.json', results)
  _plot(results, workdir)
  return results


def _size(count: float) -> str:
  """Renders a number of bytes or parameters, e.g. 1.2M."""
  power = min(4, (len(str(int(count))) - 1) // 3)
  return f'{count / 1000**power:.3g}{" kMGT"[power]}'.replace(' ', '')


def table(results: list[dict]) -> str:
  """Returns a Markdown table: losses, bytes, parameters and time of each."""
  heads = ('', 'loss seen', 'loss unseen', 'bytes up', 'bytes down',
           'trained', 'aggregation error', 'seconds')  # fmt: skip
  rows = [heads, ('---', *('---:',) * (len(heads) - 1))]
  for r in results:
    if 'error' in r:
      rows.append((r['name'], 'failed', *('',) * (len(heads) - 2)))
      continue
    rows.append((
      r['name'], f'{r["last"]["eval/seen/loss"]:.3f}',
      f'{r["last"]["eval/unseen/loss"]:.3f}', _size(r['comm/up_bytes']),
      _size(r['comm/down_bytes']), _size(r['train/parameters']),
      f'{r["aggregation/error"]:.3f}', f'{r["time/this_call_s"]:.0f}',
    ))  # fmt: skip
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    f'| {" | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True))} |'
    for row in rows
  )


def _plot(results: list[dict], workdir: pathlib.Path) -> None:
  """Draws every point's held-out loss against rounds and bytes."""
  figure = matplotlib.figure.Figure((13, 5.5), layout='constrained')
  by_round, by_bytes = figure.subplots(1, 2, sharey=True)
  for i, result in enumerate(r for r in results if 'error' not in r):
    rows = metrics.read_rows(workdir / result['name'] / 'metrics.jsonl')
    style = {'color': f'C{i % 10}', 'ls': ('-', '--', ':', '-.')[i // 10 % 4]}
    loss = dict(zip(*metrics.series(rows, 'eval/seen/loss'), strict=True))
    traffic = {0: 0} | {
      r['round']: r['comm/total_up_bytes'] + r['comm/total_down_bytes']
      for r in rows
      if 'train/loss' in r
    }
    by_round.plot(loss.keys(), loss.values(), label=result['name'], **style)
    by_bytes.plot([traffic[r] / 1e6 for r in loss], loss.values(), **style)
  by_round.set(xlabel='round', ylabel='held-out loss of seen people (nats)')
  by_bytes.set(xlabel='megabytes sent up and down', xscale='symlog')
  for axis in (by_round, by_bytes):
    axis.grid(alpha=0.3)
  figure.legend(loc='outside right upper', fontsize='small')
  figure.savefig(workdir / 'sweep.png', dpi=110)
