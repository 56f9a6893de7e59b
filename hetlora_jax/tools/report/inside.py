"""The sections on ranks, on the energy of rank slots, and on people."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hetlora_jax import diagnostics
from hetlora_jax.tools.report import charts, parts, runs
from hetlora_jax.tools.report.charts import Line
from hetlora_jax.tools.report.markup import Markup, join, tag
from hetlora_jax.tools.report.runs import Group

# Classes of a share, drawn darker and darker.
_SHARES = (0.001, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
_DECIBELS = (-40, -35, -30, -25, -20, -15, -10, -5)


def _key(edges: Sequence[float], render: Callable[[float], str]) -> Markup:
  """Returns the classes of a heat map."""
  items = []
  for level, low in enumerate(edges, 1):
    box = tag('svg', tag('rect', width=16, height=12, class_=f'heat h{level}'),
              viewBox='0 0 16 12', width=16, height=12, aria_hidden='true')  # fmt: skip
    items.append(tag('li', box, f' from {render(low)}'))
  return tag('ul', *items, class_='legend')


def _overlay_key(names: Sequence[str]) -> Markup:
  items = []
  for number, name in enumerate(names):
    line = tag('path', class_='over', d='M0 6H34',
               stroke_dasharray=charts.dash(number))  # fmt: skip
    box = tag('svg', line, viewBox='0 0 34 12', width=34, height=12,
              aria_hidden='true')  # fmt: skip
    items.append(tag('li', box, f' {name}'))
  return tag('ul', *items, class_='legend')


_OVER = ('mean', 'smallest', 'largest')


def _ranks_of(number: int, group: Group) -> Markup:
  rounds, count_TK, *_ = runs.mean(group, 'rank/histogram')
  over = [runs.mean(group, f'rank/{x}')[1] for x in ('mean', 'min', 'max')]
  title = f'Ranks of all people, {group.name}'
  if not rounds:
    return parts.figure(parts.named(number, group), charts.empty(title))
  share_TK = count_TK / count_TK.sum(1, keepdims=True).clip(1e-9)
  ends = [
    f'{name} {x[0]:.3g} → {x[-1]:.3g}' for name, x in zip(_OVER, over, strict=True)
  ]
  about = f'{"; ".join(ends)}, after rounds {rounds[0]} → {rounds[-1]}.'
  chart = charts.heat(
    title, about, rounds, share_TK, _SHARES, 0, 'rank',
    list(zip(_OVER, over, strict=True)),
  )  # fmt: skip
  return parts.figure(parts.named(number, group), chart, tag('p', about))


def ranks(groups: Sequence[Group]) -> Markup:
  note = (
    'The stronger the colour, the larger the share of people (or of their '
    'matrices) with that rank after the round; self-pruning moves them down.'
  )
  figures = [_ranks_of(i, group) for i, group in enumerate(groups)]
  return join([
    tag('p', note), _key(_SHARES, lambda x: f'{100 * x:g} %'),
    _overlay_key([f'{name} rank' for name in _OVER]),
    tag('div', *figures, class_='charts'),
  ])  # fmt: skip


def _energy_of(number: int, group: Group) -> Markup:
  rounds, share_TK, *_ = runs.mean(group, 'energy/slots')
  title = f'Energy per rank slot of the server’s adapters, {group.name}'
  held = np.cumsum(share_TK[-1]) if rounds else np.zeros(1)
  about = 'The adapters hold no energy.'
  if held[-1] > 0:
    slots = int(np.searchsorted(held, 0.9 * held[-1]) + 1)
    about = (
      f'After round {rounds[-1]} the first {slots} of {len(held)} slots hold '
      '90 % of the energy.'
    )
  share_TK = 10 * np.log10(np.maximum(share_TK, 1e-9))
  chart = charts.heat(title, about, rounds, share_TK, _DECIBELS, 1, 'rank slot')
  return parts.figure(parts.named(number, group), chart, tag('p', about))


def energy(groups: Sequence[Group]) -> Markup:
  note = (
    'The share of the adapters’ energy, Σ (scale ‖a‖ ‖b‖)², that each rank '
    'slot of the server holds, in decibels (0 dB is all, −10 dB a tenth). '
    'Energy that gathers in the first slots is rank collapse.'
  )
  figures = [_energy_of(i, group) for i, group in enumerate(groups)]
  return join([
    tag('p', note), _key(_DECIBELS, lambda x: f'{x:g} dB'.replace('-', '−')),
    tag('div', *figures, class_='charts'),
  ])  # fmt: skip


def _persons(group: Group, kind: str) -> list[dict]:
  """Returns the people of all the group's runs who have any tokens."""
  return [
    person
    for run in group.runs
    for person in (run.people or {kind: ()})[kind]
    if person['tokens'] > 0
  ]


def _losses(people: Sequence[dict]) -> np.ndarray:
  """Returns each person's loss a token."""
  return np.array([p['loss_sum'] / p['tokens'] for p in people])


def _people_chart(groups: Sequence[Group], kind: str) -> Markup:
  percent = np.linspace(0, 100, 21)
  drawn = [
    Line(group.name, i, np.percentile(loss, percent), percent)
    for i, group in enumerate(groups)
    if len(loss := _losses(_persons(group, kind)))
  ]
  title = f'Loss per person, {kind} people'
  chart = charts.lines(
    title, drawn, 'loss of a person, nats a target token',
    '% of people with at most that loss', tip='{y:.0f} % up to {x:.4g}',
    pad=0.02,
  )  # fmt: skip
  return parts.figure(title, chart)


def _by_rank(number: int, group: Group) -> Line:
  """Returns the mean loss of the seen people of each class of rank."""
  people = _persons(group, 'seen')
  loss, rank = _losses(people), np.array([p['rank'] for p in people])
  cut = diagnostics.rank_classes(int(rank.min()), int(rank.max()))
  inside = [(rank >= low) & (rank < high + 1) for low, high in cut]
  means = [(rank[x].mean(), loss[x].mean()) for x in inside if x.any()]
  return Line(group.name, number, *zip(*means, strict=True))


def _rank_chart(groups: Sequence[Group]) -> Markup:
  title = 'Mean loss by rank, seen people'
  drawn = [_by_rank(i, g) for i, g in enumerate(groups) if _persons(g, 'seen')]
  chart = charts.lines(
    title, drawn, 'mean rank of a class of people', 'nats a target token',
    tip='{y:.4g} at rank {x:.3g}',
  )  # fmt: skip
  return parts.figure(title, chart)


def people(groups: Sequence[Group]) -> Markup:
  if not any(run.people for group in groups for run in group.runs):
    return tag('p', 'No run has left a people.json: none has been evaluated, '
               'or they are of an older version.')  # fmt: skip
  rows = []
  for i, group in enumerate(groups):
    for kind in runs.KINDS:
      if len(loss := _losses(_persons(group, kind))):
        cuts = [f'{x:.3f}' for x in np.percentile(loss, (10, 50, 90))]
        cuts.append(f'{loss.mean():.3f}')
        rows.append([parts.named(i, group), kind, len(loss), *cuts])
  heads = ('runs', 'people', 'how many', 'a tenth is below', 'median',
           'a tenth is above', 'mean of people')  # fmt: skip
  note = (
    'Each person’s held-out loss at the newest evaluation. A steep line is an '
    'even service, a long end to the right people whom the model fails. Of '
    'several seeds, every person counts once a seed.'
  )
  figures = [_people_chart(groups, kind) for kind in runs.KINDS]
  figures.append(_rank_chart(groups))
  return join([
    tag('p', note), parts.legend(groups), tag('div', *figures, class_='charts'),
    parts.table('Loss per person, in nats a target token', heads, rows),
  ])  # fmt: skip
