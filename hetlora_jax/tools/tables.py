"""The tables and the figure that compare the arms of a sweep.

An arm is the points that differ in the seed alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hetlora_jax import curves, files
from hetlora_jax.run import Run
from hetlora_jax.tools import figures, paired
from hetlora_jax.tools.figures import Line
from hetlora_jax.tools.paired import KINDS, Difference
from hetlora_jax.tools.sweep import name_of

# What the CSV calls the means of these.
_MEANS = {
  'bytes_up': 'comm/up_bytes', 'bytes_down': 'comm/down_bytes',
  'trained_parameters': 'train/parameters', 'aggregation_error': 'aggregation/error',
  'seconds_in_rounds': 'time/rounds_s', 'seconds_compiling': 'time/compile_s',
}  # fmt: skip
_LATEX = str.maketrans(
  {c: rf'\{c}' for c in '&%$#_{}'}
  | {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
  | {'<': r'\textless{}', '>': r'\textgreater{}', '|': r'\textbar{}'}
)


class Arm(NamedTuple):
  """A row of the tables."""

  name: str
  fields: dict[str, Any]  # without the seed
  results: list[dict]  # of the points that ended
  failed: int
  people: paired.Arm
  gaps: dict[str, Difference | str]  # by kind: to the baseline, which has none itself


def write(found: list[dict], workdir: pathlib.Path, baseline: str | None = None) -> str:
  """Writes sweep.json, .csv, .tex, .png, .pdf and .svg, and returns tables to print.

  Points that an earlier grid had in the folder stay in all of them.

  Args:
    found: of `sweep.results`.
    workdir: the folder of the sweep.
    baseline: the arm that all are compared with; None: the first.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  found = joined(found, workdir)
  arms, base = compared(found, workdir, baseline)
  told = {name: _told(arm, base) for arm in arms for name in _names(arm)}
  about = [r | told.get(r['name'], {}) for r in found]
  files.write_json(workdir / 'sweep.json', about)
  files.write_text(workdir / 'sweep.csv', to_csv(arms))
  files.write_text(workdir / 'sweep.tex', to_latex(arms, base))
  lines = [_line(arm, workdir) for arm in arms if arm.results]
  figures.save(figures.compare(lines), workdir / 'sweep')
  return '\n\n'.join(filter(None, (table(found), _gap_table(arms, base))))


def joined(found: Sequence[dict], workdir: pathlib.Path) -> list[dict]:
  """Adds what other points of sweep.json have become, of those that are finished."""
  path = workdir / 'sweep.json'
  if not path.exists():
    return [*found]
  names, remedy = {result['name'] for result in found}, 'delete it, it is made anew'
  with files.parsing(path, remedy):
    earlier = [
      {name: result[name] for name in ('name', 'fields', 'command')}
      for result in json.loads(files.read_bytes(path, remedy))
      if result['name'] not in names
    ]
  there = [about for about in earlier if (workdir / about['name']).is_dir()]
  ended = [(about, Run(workdir / about['name']).finished) for about in there]
  return [*[about | summary for about, summary in ended if summary], *found]


# --- Arms --------------------------------------------------------------------


def over_seeds(found: Sequence[dict]) -> dict[str, list[dict]]:
  """Groups results that differ in the seed alone."""
  groups: dict[str, list[dict]] = {}
  for result in found:
    fields = {k: v for k, v in result['fields'].items() if k != 'seed'}
    groups.setdefault(name_of(fields), []).append(result)
  return groups


def compared(
  found: Sequence[dict], workdir: pathlib.Path, baseline: str | None
) -> tuple[list[Arm], str | None]:
  """Returns the arms, each with its differences from the baseline, and its name."""
  groups = over_seeds(found)
  base = paired.baseline_of([*groups], baseline)
  arms = [_arm(name, seeds, workdir) for name, seeds in groups.items()]
  other = next((arm.people for arm in arms if arm.name == base), ())
  return [
    arm._replace(gaps=gaps_to(arm.people, other)) if arm.name != base else arm
    for arm in arms
  ], base


def _arm(name: str, seeds: list[dict], workdir: pathlib.Path) -> Arm:
  good = [result for result in seeds if 'error' not in result]
  runs = [Run(workdir / result['name']) for result in good]
  people = []
  for run in runs:
    with files.parsing(run.folder / 'people.json', 'delete this run, or run it again'):
      people.append((run.fields['seed'], paired.people_of(run.people)))
  fields = {k: v for k, v in seeds[0]['fields'].items() if k != 'seed'}
  return Arm(name, fields, good, len(seeds) - len(good), people, {})


def gaps_to(arm: paired.Arm, other: paired.Arm) -> dict[str, Difference | str]:
  """Returns an arm's differences from another, of each kind of people."""
  return {kind: paired.difference(arm, other, kind) for kind in KINDS}


def _names(arm: Arm) -> list[str]:
  return [result['name'] for result in arm.results]


def _told(arm: Arm, base: str | None) -> dict[str, Any]:
  """Returns what sweep.json says of an arm's differences."""
  if not arm.gaps:
    return {}
  told = {
    kind: {'not_paired': gap}
    if isinstance(gap, str)
    else {**gap.interval._asdict(), 'seeds': gap.seeds, 'people': gap.people}
    for kind, gap in arm.gaps.items()
  }
  return {'paired': {'baseline': base, **told}}


def _mean(results: Sequence[dict], field: str) -> float | None:
  """Returns the mean of a number in summaries; None if one does not state it."""
  values = [result.get(field) for result in results]
  return None if not values or None in values else statistics.mean(values)


# --- In Markdown --------------------------------------------------------------


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


def seconds(value: float | None) -> str:
  """Renders seconds; None are those that an earlier release did not tell apart.

  >>> seconds(40.2), seconds(0.53), seconds(None)
  ('40', '0.5', 'not measured')
  """
  return 'not measured' if value is None else f'{value:.{int(value < 10)}f}'


def spread(values: Sequence[float], digits: int) -> str:
  """Renders a mean and, of several, their standard deviation."""
  text = f'{statistics.mean(values):.{digits}f}'
  if len(values) > 1:
    text += f' ± {statistics.stdev(values):.{digits}f}'
  return text


_ACCURACIES = ('eval/seen/accuracy', 'eval/unseen/accuracy')  # of tasks with labels


def _losses(results: Sequence[dict], kind: str) -> list[float]:
  return [result['last'][f'eval/{kind}/loss'] for result in results]


def _cells(name: str, seeds: list[dict], labelled: bool) -> Iterator[str]:
  """Yields the cells of a row: of the seeds that did not fail."""
  good = [result for result in seeds if 'error' not in result]
  missing = len(seeds) - len(good)
  yield name
  if not good:
    yield from ('failed', *[''] * (7 + 2 * labelled))
    return
  for kind in KINDS:
    text = spread(_losses(good, kind), 3)
    yield f'{text} ({missing} failed)' if missing else text
  for column in _ACCURACIES if labelled else ():
    known = [result['last'][column] for result in good if column in result['last']]
    yield spread(known, 3) if len(known) == len(good) else '-'
  for field in ('comm/up_bytes', 'comm/down_bytes', 'train/parameters'):
    yield size(_mean(good, field))
  error = _mean(good, 'aggregation/error')
  yield 'not measured' if error is None else f'{error:.3f}'
  for field in ('time/rounds_s', 'time/compile_s'):
    yield seconds(_mean(good, field))


def table(found: Sequence[dict]) -> str:
  """Returns a Markdown table: losses, bytes, parameters and time of each arm.

  Several seeds are told as their mean and deviation. Accuracies are there if any arm has
  them.
  """
  labelled = any(_ACCURACIES[0] in result.get('last', {}) for result in found)
  heads = (
    '', 'loss seen', 'loss unseen',
    *(('accuracy seen', 'accuracy unseen') if labelled else ()), 'bytes up', 'bytes down', 'trained',
    'aggregation error', 'seconds in rounds', 'compiling',
  )  # fmt: skip
  groups = over_seeds(found).items()
  return _markdown(heads, [(*_cells(*group, labelled),) for group in groups])


GAP_HEADS = (
  'seen people', 'perplexity, seen', 'unseen people', 'perplexity, unseen', 'pairs',
)  # fmt: skip


def gap_cells(gaps: dict[str, Difference | str]) -> list[str]:
  """Renders an arm's differences, or why there are none, under `GAP_HEADS`."""
  cells, people, seeds = [], [], 1
  for gap in gaps.values():
    if isinstance(gap, str):
      cells += [f'not paired: {gap}', '']
      continue
    cells += [gap.interval.signed(), f'{100 * math.expm1(gap.interval.value):+.1f} %']
    people.append(str(gap.people))
    seeds = gap.seeds
  who = f'{" and ".join(people)} people, {seeds} seed{"s" * (seeds > 1)}'
  return [*cells, who * bool(people)]


def gap_title(base: str | None, gaps: Sequence[dict[str, Difference | str]]) -> str:
  """Says what differences are, and what a single seed does not tell."""
  seeds = [g.seeds for x in gaps for g in x.values() if isinstance(g, Difference)]
  single = '; of one seed the interval is over people alone' if 1 in seeds else ''
  return (
    f'Loss less that of {base} (--baseline), in nats per target token, below 0 where '
    f'it is better: paired, with 95 % intervals over people and seeds{single}'
  )


def _gap_table(arms: Sequence[Arm], base: str | None) -> str:
  others = [arm for arm in arms if arm.gaps]
  if not others:
    return ''
  rows = [(arm.name, *gap_cells(arm.gaps)) for arm in others]
  title = gap_title(base, [arm.gaps for arm in others])
  return f'{title}:\n\n{_markdown(("", *GAP_HEADS), rows)}'


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  rows = [heads, ('---', *('---:',) * (len(heads) - 1)), *rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    f'| {" | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True))} |'
    for row in rows
  )


# --- For papers ----------------------------------------------------------------


def to_csv(arms: Sequence[Arm]) -> str:
  """Returns a line for each arm: its fields, and every number with all its digits."""
  rows = [_numbers(arm) for arm in arms]
  names = dict.fromkeys(name for row in rows for name in row)
  out = io.StringIO(newline='')
  writer = csv.DictWriter(out, [*names], restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  return out.getvalue()


def _numbers(arm: Arm) -> dict[str, Any]:
  row = {'arm': arm.name, **arm.fields}
  row |= {'seeds': len(arm.results), 'failed': arm.failed}
  for kind in KINDS if arm.results else ():
    losses = _losses(arm.results, kind)
    row[f'loss_{kind}'] = statistics.mean(losses)
    row[f'loss_{kind}_deviation'] = statistics.stdev(losses) if losses[1:] else ''
  for kind, gap in arm.gaps.items():
    if isinstance(gap, str):
      row[f'not_paired_{kind}'] = gap
      continue
    names = (f'difference_{kind}{end}' for end in ('', '_low', '_high'))
    row |= dict(zip(names, gap.interval, strict=True))
    row |= {f'paired_people_{kind}': gap.people, 'paired_seeds': gap.seeds}
  return row | {name: _mean(arm.results, field) for name, field in _MEANS.items()}


def to_latex(arms: Sequence[Arm], base: str | None) -> str:
  """Returns a table for the package booktabs.

  A loss is bold if its paired differences from all other arms lie below 0 with their
  whole intervals: so a column may have none.
  """
  who = {arm.name: arm.people for arm in arms if arm.results}
  best = {kind: paired.surely_best(who, kind) for kind in KINDS}
  rows = [_latex_cells(arm, best) for arm in arms]
  heads = ('', *(rf'\multicolumn{{2}}{{c}}{{{kind} people}}' for kind in KINDS))
  below = ('', *('loss', 'difference') * 2, 'up', 'down', 'trained')
  lines = [
    '% Made by hetlora_jax; needs \\usepackage{booktabs}. '
    f'Differences are from {base}, in nats per target token,',
    '% paired, with 95 % intervals over people and seeds; bold: below all others, surely.',
    rf'\begin{{tabular}}{{l{"r" * (len(below) - 1)}}}',
    r'\toprule',
    rf'{" & ".join(heads)} & \multicolumn{{2}}{{c}}{{bytes}} & \\',
    r'\cmidrule(lr){2-3} \cmidrule(lr){4-5} \cmidrule(lr){6-7}',
    rf'{" & ".join(below)} \\',
    r'\midrule',
    *[rf'{" & ".join(row)} \\' for row in rows],
    r'\bottomrule',
    r'\end{tabular}',
  ]
  for arm in arms:
    reasons = {g for g in arm.gaps.values() if isinstance(g, str)}
    lines += [f'% {arm.name} is not paired: {reason}.' for reason in sorted(reasons)]
  return '\n'.join(lines) + '\n'


def _latex_cells(arm: Arm, best: dict[str, str | None]) -> list[str]:
  cells = [arm.name.replace(',', ', ').translate(_LATEX)]
  if not arm.results:
    return [*cells, 'failed', *[''] * 6]
  for kind in KINDS:
    loss = spread(_losses(arm.results, kind), 3).replace('±', r'\pm')
    cells.append(rf'$\mathbf{{{loss}}}$' if best[kind] == arm.name else f'${loss}$')
    gap = arm.gaps.get(kind, '')
    cells.append('--' if isinstance(gap, str) else f'${gap.interval.signed()}$')
  up, down = (size(_mean(arm.results, f'comm/{x}_bytes'), 'B') for x in ('up', 'down'))
  return [*cells, up, down, size(_mean(arm.results, 'train/parameters'))]


# --- The figure ------------------------------------------------------------------


def _curve(folder: pathlib.Path):
  """Returns the rounds with an evaluation of a run, and their losses and megabytes.

  The megabytes are all that was sent until then; NaN if a rule does not state them.
  """
  history = Run(folder).history
  rounds, losses = curves.series(history, 'eval/seen/loss')
  traffic = {row['round']: 0.0 for row in history[:1]}
  for row in history:
    if 'train/loss' in row:
      sent = [row['comm/total_up_bytes'], row['comm/total_down_bytes']]
      traffic[row['round']] = float('nan') if None in sent else sum(sent) / 1e6
  return rounds, np.array(losses, float), np.array([traffic[r] for r in rounds])


def _line(arm: Arm, workdir: pathlib.Path) -> Line:
  """Returns the mean over an arm's seeds, and their deviation.

  They end where the first seed ends.
  """
  found = [_curve(workdir / name) for name in _names(arm)]
  count = min(len(rounds) for rounds, _, _ in found)
  losses = np.array([one[:count] for _, one, _ in found])
  megabytes = np.mean([one[:count] for _, _, one in found], 0)
  deviation = losses.std(0, ddof=len(losses) > 1)
  return Line(arm.name, found[-1][0][:count], megabytes, losses.mean(0), deviation)
