"""Computes what the sections of the page show: numbers, texts and charts."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hetlora_jax import diagnostics
from hetlora_jax.tools import figures, paired, tables
from hetlora_jax.tools.paired import KINDS
from hetlora_jax.tools.report import charts, runs
from hetlora_jax.tools.report.charts import Chart, Line
from hetlora_jax.tools.report.runs import Entry, Group

if TYPE_CHECKING:
  import matplotlib.figure

# Lower bounds of the classes of a heat map, drawn darker and darker.
SHARES = (0.001, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
DECIBELS = (-40, -35, -30, -25, -20, -15, -10, -5)
# What a learning curve is drawn against: a column, its unit and the axis title.
AGAINST = {
  'rounds': ('', 1, 'round'),
  'bytes': ('bytes so far', 1e6, 'megabytes up and down'),
  'tokens': ('tokens so far', 1e3, 'thousand target tokens trained on'),
}
NATS = 'nats per target token'
size, seconds = tables.size, tables.seconds


def distinct(entries: Sequence[Entry], field: str) -> str:
  """Returns the different values of a field."""
  return ', '.join(dict.fromkeys(str(entry.fields[field]) for entry in entries))


def counted(group: Group) -> list[Entry]:
  """Returns the finished runs of a group or, without any, all that were evaluated."""
  evaluated = [entry for entry in group.entries if 'last' in entry.summary]
  return [entry for entry in evaluated if entry.finished] or evaluated


def told(entries: Sequence[Entry], name: str) -> bool:
  """Tells whether the evaluations of all runs have a number, before and after."""
  return all(name in x.summary[when] for x in entries for when in ('first', 'last'))


def learning_curves(entries: Sequence[Entry]) -> Iterator[tuple[str, str, str]]:
  """Yields the columns that are drawn as curves, with their titles and units."""
  for kind in KINDS:
    yield f'eval/{kind}/loss', f'Held-out loss, {kind} people', NATS
  for kind in KINDS:
    if any(entry.columns[f'eval/{kind}/accuracy'] for entry in entries):
      yield f'eval/{kind}/accuracy', f'Held-out accuracy, {kind} people', 'accuracy'
  yield 'train/loss', 'Training loss of the cohorts', NATS


def progress(entries: Sequence[Entry], name: str, digits: int) -> str:
  """Returns the mean of an evaluation's number before and after training, as text."""
  first, last = (
    tables.spread([entry.summary[when][name] for entry in entries], digits)
    for when in ('first', 'last')
  )
  return f'{first} → {last}'


def mean(entries: Sequence[Entry], name: str) -> float | None:
  """Returns the mean over runs of a number in their summaries; None if one has none."""
  values = [entry.summary.get(name) for entry in entries]
  return None if None in values else statistics.mean(values)


def differences_from(
  groups: Sequence[Group], baseline: str | None
) -> tuple[str, list[tuple[Group, list[str]]]]:
  """Returns what the table of paired differences is of, and its rows."""
  base = paired.baseline_of([group.name for group in groups], baseline)
  arms = {
    group.name: [(entry.fields['seed'], entry.people) for entry in counted(group)]
    for group in groups
  }
  found = {
    group.name: tables.gaps_to(arms[group.name], arms[base])
    for group in groups
    if base and group.name != base
  }
  rows = [(g, tables.gap_cells(found[g.name])) for g in groups if g.name in found]
  return tables.gap_title(base, [*found.values()]), rows


def compare(groups: Sequence[Group]) -> matplotlib.figure.Figure:
  """Draws held-out losses against rounds and megabytes, for a paper."""
  drawn = []
  for group in groups:
    rounds, loss, deviation = runs.mean(group, 'eval/seen/loss')
    sent = _curve(group, 'eval/seen/loss', 'bytes').x
    x = sent if len(sent) else np.full(len(rounds), np.nan)
    drawn.append(figures.Line(group.name, rounds, x, loss, deviation))
  return figures.compare(drawn)


def data(groups: Sequence[Group]) -> list[tuple[object, ...]]:
  """Returns what each group's runs took of their data, as rows of a table.

  Runs of earlier releases do not say, nor do those of a population of one's own say how
  many clients there were.
  """
  rows = []
  for group in groups:
    told = [e.summary for e in group.entries if 'data/targets_cut' in e.summary]
    for one in told[:1]:
      counts = [
        one.get(f'data/{name}', 'not known')
        for name in (
          'clients',
          'clients_of_too_few_examples',
          'clients_beyond_num_people',
        )
      ]
      cut = [f'{one[f"data/{name}_cut"]:.2%}' for name in ('contexts', 'targets')]
      people = one['training_people'], one['unseen_people']
      rows.append((group.name, counts[0], *people, *counts[1:], *cut))
  return rows


def _curve(group: Group, name: str, against: str) -> Line:
  """Returns the mean over a group's runs and one standard deviation around it."""
  x, mean, deviation = runs.mean(group, name)
  column, unit, _ = AGAINST[against]
  if column:
    rounds, so_far, _ = runs.mean(group, column)
    if not rounds:  # rules that do not state what they send
      return Line(group.name, group.number, *(np.zeros(0),) * 3)
    x = so_far[np.searchsorted(rounds, x)] / unit
  return Line(group.name, group.number, x, mean, deviation)


def curves(
  groups: Sequence[Group], name: str, title: str, unit: str, against: str
) -> tuple[str, Chart]:
  """Returns a caption and the chart of a column against rounds, bytes or tokens."""
  drawn = [_curve(group, name, against) for group in groups]
  # A log scale where the ends of lines are too far apart for a linear one.
  ends = [float(line.x[-1]) for line in drawn if len(line.x) and line.x[-1] > 0]
  log = against != 'rounds' and max(ends, default=0) > 4 * min(ends, default=0)
  chart = charts.lines(
    f'{title} against {against}', drawn, AGAINST[against][2] + ' (log scale)' * log,
    unit, tip='{y:.4g} at {x:.4g}', log=log,
    whole=against == 'rounds',
  )  # fmt: skip
  return f'Against {against}' + ', without the points at 0' * log, chart


def losses(groups: Sequence[Group]) -> list[tuple[object, ...]]:
  """Returns the curves of held-out loss as rows of a table."""
  rows = []
  for group in groups:
    seen, unseen = (runs.mean(group, f'eval/{kind}/loss') for kind in KINDS)
    for r, a, b in zip(seen[0], seen[1], unseen[1], strict=True):
      rows.append((group.name, r, f'{a:.4f}', f'{b:.4f}'))
  return rows


def ranks(group: Group) -> Chart:
  """Returns the share of clients that has each rank after each round."""
  title = f'Ranks of all clients, {group.name}'
  rounds, count_TK, _ = runs.mean(group, 'rank/histogram')
  if not rounds:
    return charts.empty(title)
  columns = {'mean': 'rank/mean', 'smallest': 'rank/min', 'largest': 'rank/max'}
  over = {name: runs.mean(group, column)[1] for name, column in columns.items()}
  share_TK = count_TK / count_TK.sum(1, keepdims=True).clip(1e-9)
  ends = '; '.join(f'{name} {x[0]:.3g} → {x[-1]:.3g}' for name, x in over.items())
  about = f'{ends}, after rounds {rounds[0]} → {rounds[-1]}.'
  return charts.heat(title, about, rounds, share_TK, SHARES, 0, 'rank', over)


def energy(group: Group) -> Chart:
  """Returns the share of the adapters' energy in each rank slot after each round."""
  title = f'Energy per rank slot of the server’s adapters, {group.name}'
  rounds, share_TK, _ = runs.mean(group, 'energy/slots')
  if not rounds:
    return charts.empty(title)
  cumulative = np.cumsum(share_TK[-1])
  about = 'The adapters hold no energy.'
  if cumulative[-1] > 0:
    slots = np.searchsorted(cumulative, 0.9 * cumulative[-1]) + 1
    about = (
      f'After round {rounds[-1]} the first {slots} of {len(cumulative)} slots hold '
      '90 % of the energy.'
    )
  decibel_TK = 10 * np.log10(np.maximum(share_TK, 1e-9))  # -90: below all classes
  return charts.heat(title, about, rounds, decibel_TK, DECIBELS, 1, 'rank slot', {})


def loss(group: Group, kind: str) -> np.ndarray:
  """Returns the loss of each person, once for each of the group's runs."""
  return np.array([p.loss for entry in group.entries for p in entry.people[kind]])


def quantiles(groups: Sequence[Group]) -> list[tuple[Group, str, int, list[str]]]:
  """Returns each group's 10, 50 and 90 % quantiles of the losses, and their mean."""
  rows = []
  for group, kind in itertools.product(groups, KINDS):
    if len(x := loss(group, kind)):
      numbers = (*np.percentile(x, (10, 50, 90)), x.mean())
      rows.append((group, kind, len(x), [f'{number:.3f}' for number in numbers]))
  return rows


def distribution(groups: Sequence[Group], kind: str) -> Chart:
  """Returns the cumulative distribution of loss over people."""
  percent = np.linspace(0, 100, 21)
  drawn = [
    Line(group.name, group.number, np.percentile(loss(group, kind), percent), percent)
    for group in groups
    if len(loss(group, kind))
  ]
  return charts.lines(
    f'Loss per person, {kind} people', drawn, 'loss of a person, nats per target token',
    '% of people with at most that loss', tip='{y:.0f} % up to {x:.4g}', pad=0.02,
  )  # fmt: skip


def _by_rank(group: Group) -> Line:
  """Returns the mean loss against the mean rank of seen people, by class of ranks."""
  seen = loss(group, 'seen')
  rank = np.array([p.rank for entry in group.entries for p in entry.people['seen']])
  classes = diagnostics.rank_classes(int(rank.min()), int(rank.max()))
  members = [(rank >= low) & (rank < high + 1) for low, high in classes]
  means = [(rank[x].mean(), seen[x].mean()) for x in members if x.any()]
  return Line(group.name, group.number, *zip(*means, strict=True))


def loss_by_rank(groups: Sequence[Group]) -> Chart:
  """Returns the mean loss of seen people by the rank drawn for them."""
  return charts.lines(
    'Mean loss by rank, seen people',
    [_by_rank(group) for group in groups if len(loss(group, 'seen'))],
    'mean rank of a class of clients', 'nats per target token',
    tip='{y:.4g} at rank {x:.3g}',
  )  # fmt: skip


def differences(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
  """Returns the fields that differ as a table with heads; the fewer are its columns."""
  names = runs.differing(entries)
  transposed = len(names) > len(entries)
  rows = [('field' if transposed else 'run', *names)]
  rows += [(x.name, *(str(x.fields.get(n, '–')) for n in names)) for x in entries]
  return list(zip(*rows, strict=True)) if transposed else rows


def samples(entries: Sequence[Entry]) -> list[list[tuple[Entry, dict]]]:
  """Returns what runs say to each prompt; prompts that most runs have come first."""
  by_prompt: dict[tuple, list] = {}
  for entry in entries:
    for line in entry.samples:
      key = tuple(line[n] for n in ('client', 'kind', 'prompt', 'reference'))
      by_prompt.setdefault(key, []).append((entry, line))
  return sorted(by_prompt.values(), key=len, reverse=True)
