"""What sections are made of: tables, figures and legends."""

from __future__ import annotations

from collections.abc import Sequence

from hetlora_jax.tools.report import charts
from hetlora_jax.tools.report.markup import Markup, tag
from hetlora_jax.tools.report.runs import Group


def count(number: int, noun: str) -> str:
  return f'{number} {noun}{"s" * (number != 1)}'


def said(values) -> str:
  """Joins different values."""
  return ', '.join(dict.fromkeys(str(v) for v in values if v is not None))


def table(
  caption: str, heads: Sequence[object], rows: Sequence[Sequence[object]]
) -> Markup:
  """Returns a table whose first column names its rows; it scrolls if wide."""
  head = tag('tr', *[tag('th', x, scope='col') for x in heads])
  body = [
    tag('tr', tag('th', row[0], scope='row'), *[tag('td', x) for x in row[1:]])
    for row in rows
  ]
  inner = tag('table', tag('caption', caption), tag('thead', head), tag('tbody', *body))
  return tag(
    'div', inner, class_='scroll', role='group', tabindex=0, aria_label=caption
  )


def named(number: int, group: Group) -> Markup:
  return tag('span', charts.swatch(number), ' ', group.name, class_='name')


def legend(groups: Sequence[Group]) -> Markup:
  items = [tag('li', named(i, group)) for i, group in enumerate(groups)]
  return tag('ul', *items, class_='legend')


def figure(caption: object, *content: Markup) -> Markup:
  return tag('figure', tag('figcaption', caption), *content)
