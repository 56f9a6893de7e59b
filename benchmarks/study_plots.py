"""The figures of docs/results.md: a row each for three groups of arms."""

import pathlib
from collections.abc import Callable

import matplotlib.figure
import numpy as np

from benchmarks.study_stats import OURS, Arm

NAMES = {'chat': 'chitchat', 'mail': 'mail_subject'}  # data sets
_LATER = (
  'raFLoRA', 'RBLA', 'FLoRA', 'FedEx', 'PreLort', 'LoRA r = 5, uniform weights',
)  # fmt: skip

# The label of an axis and what it shows of an arm.
Axis = tuple[str, Callable[[Arm], np.ndarray]]


def _of_round(name: str) -> Callable[[Arm], np.ndarray]:
  return lambda arm: arm.rounds(name)


_EVALUATED: Axis = ('round', lambda arm: arm.curve('round'))
_ROUND: Axis = (
  'round',
  lambda arm: 1 + np.arange(len(arm.rounds('rank/mean'))),
)
_SENT: Axis = (
  'MB sent, both ways',
  lambda arm: (arm.curve('up_bytes') + arm.curve('down_bytes')) / 1e6,
)
_SEEN: Axis = ('loss, people seen', lambda arm: arm.curve('seen'))
_UNSEEN: Axis = ('loss, people never seen', lambda arm: arm.curve('unseen'))


def _groups(found: dict[str, Arm]) -> dict[str, list[Arm]]:
  """Returns the paper's methods, parts of HetLoRA changed, and the others."""
  changed = [a for n, a in found.items() if n.startswith('HetLoRA') and n != OURS]
  later = [found[name] for name in _LATER if name in found]
  rest = [a for a in found.values() if a not in changed and a not in later]
  ours = [found[OURS]] if OURS in found else []
  groups = {
    "the paper's methods": rest,
    'parts of HetLoRA changed': [*ours, *changed] if changed else [],
    'later methods, and a control': [*ours, *later] if later else [],
  }
  return {name: group for name, group in groups.items() if group}


def _draw(axis, group: list[Arm], x: Axis, y: Axis) -> None:
  for i, arm in enumerate(group):
    ours = arm.name == OURS
    color, width = ('black', 2.4) if ours else (f'C{i}', 1.4)
    axis.plot(x[1](arm), y[1](arm), color=color, lw=width, label=arm.name,
              marker='.')  # fmt: skip
  axis.set(xlabel=x[0], ylabel=y[0])
  if x[0] == 'round':
    axis.xaxis.get_major_locator().set_params(integer=True)
  axis.grid(alpha=0.3)


def _figure(found, pairs: list[tuple[Axis, Axis]], title: str):
  groups = _groups(found)
  size = (3.6 * len(pairs) + 2.2, 3.0 * len(groups) + 0.4)
  figure = matplotlib.figure.Figure(size, layout='constrained')
  axes = figure.subplots(len(groups), len(pairs), sharey='col', squeeze=False)
  for row, (name, group) in zip(axes, groups.items(), strict=True):
    for axis, (x, y) in zip(row, pairs, strict=True):
      _draw(axis, group, x, y)
      axis.tick_params(labelleft=True)
    row[-1].legend(title=name, fontsize='small', loc='center left',
                   bbox_to_anchor=(1.02, 0.5))  # fmt: skip
  figure.suptitle(title)
  return figure, axes


def curves(found: dict[str, Arm], path: pathlib.Path, task: str) -> None:
  """Draws loss against rounds and bytes, of people seen and unseen."""
  pairs = [(_EVALUATED, _SEEN), (_EVALUATED, _UNSEEN), (_SENT, _SEEN)]
  figure, axes = _figure(found, pairs, f'{NAMES[task]}: nats a token, mean of seeds')
  for axis in axes[:, -1]:
    axis.set(xscale='symlog')
  figure.savefig(path, dpi=100)


def inside(found: dict[str, Arm], path: pathlib.Path, task: str) -> None:
  """Draws ranks, averaging error, slots in use and weights against rounds."""
  numbers = {
    'rank/mean': 'mean rank of all people',
    'aggregation/error': 'aggregation error',
    'energy/effective_slots': 'effective slots of the server',
    'weight/effective_clients': 'effective clients a round',
  }
  pairs = [(_ROUND, (label, _of_round(n))) for n, label in numbers.items()]
  figure, _ = _figure(found, pairs, f'{NAMES[task]}: what happens inside')
  figure.savefig(path, dpi=100)
