"""The table and the picture that compare the points of a sweep."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from hetlora_jax import curves, files
from hetlora_jax.run import Run
from hetlora_jax.tools.sweep import name_of


def write(found: list[dict], workdir: pathlib.Path) -> str:
  """Writes sweep.json and sweep.png, and returns the table.

  Points that an earlier grid had in the folder stay in all three.

  Args:
    found: of `sweep.results`.
    workdir: the folder of the sweep.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  found = [*_others(found, workdir), *found]
  files.write_json(workdir / 'sweep.json', found)
  _plot(found, workdir)
  return table(found)


def _others(found: Sequence[dict], workdir: pathlib.Path) -> list[dict]:
  """Returns what other points of sweep.json have become, of those that are finished."""
  path = workdir / 'sweep.json'
  if not path.exists():
    return []
  names, remedy = {result['name'] for result in found}, 'delete it, it is made anew'
  with files.parsing(path, remedy):
    earlier = [
      {name: result[name] for name in ('name', 'fields', 'command')}
      for result in json.loads(files.read_bytes(path, remedy))
      if result['name'] not in names
    ]
  there = [about for about in earlier if (workdir / about['name']).is_dir()]
  ended = [(about, Run(workdir / about['name']).finished) for about in there]
  return [about | summary for about, summary in ended if summary]


def size(count: float | None, unit: str = '') -> str:
  """Renders a number of bytes or parameters; None is one that a rule does not state.

  >>> size(950), size(999_950), size(1_234_567), size(1.94e9, 'B')
  ('950', '1M', '1.23M', '1.94 GB')
  """
  if count is None:
    return 'not stated'
  rounded = float(f'{count:.3g}')
  power = min(4, (len(str(int(rounded))) - 1) // 3)
  prefix = ('', 'k', 'M', 'G', 'T')[power]
  return f'{rounded / 1000**power:.3g}{" " if unit else ""}{prefix}{unit}'


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
  """Yields the cells of a row: of the seeds that did not fail."""
  good = [result for result in seeds if 'error' not in result]
  missing = len(seeds) - len(good)
  yield name
  if not good:
    yield from ('failed', *[''] * 6)
    return

  def mean(field: str) -> float | None:
    values = [result[field] for result in good]
    return None if None in values else statistics.mean(values)

  for who in ('seen', 'unseen'):
    text = spread([result['last'][f'eval/{who}/loss'] for result in good], 3)
    yield f'{text} ({missing} failed)' if missing else text
  for field in ('comm/up_bytes', 'comm/down_bytes', 'train/parameters'):
    yield size(mean(field))
  error = mean('aggregation/error')
  yield 'not measured' if error is None else f'{error:.3f}'
  yield f'{mean("time/rounds_s"):.0f}'


def table(found: Sequence[dict]) -> str:
  """Returns a Markdown table: losses, bytes, parameters and time of each.

  Points that differ in the seed alone are one row, of mean and deviation.
  """
  heads = (
    '',
    'loss seen',
    'loss unseen',
    'bytes up',
    'bytes down',
    'trained',
    'aggregation error',
    'seconds in rounds',
  )
  rows = [heads, ('---', *('---:',) * (len(heads) - 1))]
  rows += [tuple(_cells(*group)) for group in over_seeds(found).items()]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    f'| {" | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True))} |'
    for row in rows
  )


def _curve(folder: pathlib.Path):
  """Returns the rounds with an evaluation of a run, and their losses and megabytes.

  The megabytes are all that was sent until then; NaN if a rule does not state them.
  """
  history = Run(folder).history
  rounds, losses = curves.series(history, 'eval/seen/loss')
  traffic = {0: 0.0}
  for row in history:
    if 'train/loss' in row:
      sent = [row['comm/total_up_bytes'], row['comm/total_down_bytes']]
      traffic[row['round']] = float('nan') if None in sent else sum(sent) / 1e6
  return rounds, np.array(losses, float), np.array([traffic[r] for r in rounds])


def _curves(seeds: list[dict], workdir: pathlib.Path):
  """Returns rounds, mean megabytes until then, and the losses of each seed.

  They end where the first seed ends.
  """
  found = [_curve(workdir / result['name']) for result in seeds]
  count = min(len(rounds) for rounds, _, _ in found)
  return (
    found[-1][0][:count],
    np.mean([megabytes[:count] for _, _, megabytes in found], 0),
    np.array([losses[:count] for _, losses, _ in found]),
  )


def _plot(found: Sequence[dict], workdir: pathlib.Path) -> None:
  """Draws every point's held-out loss against rounds and bytes.

  Of several seeds it draws the mean, and one standard deviation to either side.
  """
  import matplotlib.figure  # half a second, which no start should wait for

  figure = matplotlib.figure.Figure((13, 5.5), layout='constrained')
  by_round, by_bytes = figure.subplots(1, 2, sharey=True)
  good = over_seeds([result for result in found if 'error' not in result])
  for i, (name, seeds) in enumerate(good.items()):
    # Ten colours, and other dashes after every ten points.
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
