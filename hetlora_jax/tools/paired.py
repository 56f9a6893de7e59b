"""Differences between arms of an experiment that met the same people and seeds.

An arm is the runs that differ in the seed alone. What is paired is the loss of each
person under each seed at the newest evaluation (people.json); `bootstrap.py` says how
the interval of a difference is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from hetlora_jax.config import ConfigError
from hetlora_jax.tools import bootstrap

KINDS = ('seen', 'unseen')


class Person(NamedTuple):
  """A person's held-out loss at the newest evaluation."""

  client: str
  tokens: int
  loss_sum: float  # nats
  rank: int | None  # drawn for training; unseen people have none

  @property
  def loss(self) -> float:
    """Nats per target token."""
    return self.loss_sum / self.tokens


People = dict[str, list[Person]]  # by KINDS
Arm = Sequence[tuple[int, People]]  # the seed and the people of each of its runs


class Difference(NamedTuple):
  """The loss of an arm less that of another, in nats per target token."""

  interval: bootstrap.Interval
  seeds: int  # that both have
  people: int


def people_of(content: dict[str, Any] | None) -> People:
  """Returns the people with target tokens of a people.json, None being one without."""
  content = content or dict.fromkeys(KINDS, [])
  return {
    kind: [
      Person(p['client'], p['tokens'], p['loss_sum'], p['rank'])
      for p in content[kind]
      if p['tokens'] > 0
    ]
    for kind in KINDS
  }


def difference(arm: Arm, other: Arm, kind: str) -> Difference | str:
  """Returns by how much an arm's loss lies above another's, or why nobody can tell."""
  if any(len({seed for seed, _ in a}) < len(a) for a in (arm, other)):
    return 'a seed ran twice'
  pairs = [(a, b) for seed, a in arm for other_seed, b in other if seed == other_seed]
  if not pairs:
    return 'no seed in common'
  losses = [(a[kind], b[kind]) for a, b in pairs]
  everybody = losses[0][0]
  if not all(people for pair in losses for people in pair):
    return 'no losses of single people'
  asked = {tuple((p.client, p.tokens) for p in people) for x in losses for people in x}
  if len(asked) > 1:
    return 'other people or turns are evaluated'
  gap_SE = [[p.loss_sum - q.loss_sum for p, q in zip(*x, strict=True)] for x in losses]
  found = bootstrap.ratio(np.array(gap_SE), [p.tokens for p in everybody])
  return Difference(found, len(pairs), len(everybody))


def surely_best(arms: dict[str, Arm], kind: str) -> str | None:
  """Returns the arm whose loss lies below that of each other one, beyond its interval."""
  for name, arm in arms.items():
    gaps = [difference(arm, arms[other], kind) for other in arms if other != name]
    if gaps and all(isinstance(g, Difference) and g.interval.high < 0 for g in gaps):
      return name
  return None


def baseline_of(names: Sequence[str], wanted: str | None) -> str | None:
  """Returns the arm that all are compared with: the first, unless one is wanted."""
  if wanted is None:
    return next(iter(names), None)
  for name in names:
    if name.replace(' ', '') == wanted.replace(' ', ''):
      return name
  raise ConfigError(f'--baseline={wanted} is no arm: name one of {"; ".join(names)}.')
