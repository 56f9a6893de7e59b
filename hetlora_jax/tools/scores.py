"""What evaluation.json tells of generations: a value a person, means, intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hetlora_jax.tools import bootstrap, rouge

SETS = ('seen', 'unseen')
TEXTS = ('generated', 'teacher_forced')
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
RANK_CLASSES = 3


def of_lines(lines: Sequence[dict], seed: int = 0) -> dict[str, Any]:
  """Scores the lines of generations.jsonl, by set, person and class of rank."""
  found = {}
  for name in SETS:
    own = [line for line in lines if line['kind'] == name]
    clients = dict.fromkeys(line['client'] for line in own)
    people = [
      _person([line for line in own if line['client'] == who]) for who in clients
    ]
    found[name] = _summary(people, seed)
    found[name]['without_words'] = sum(
      not any(c.isascii() and c.isalnum() for c in line['reference']) for line in own
    )
    if name != 'unseen':
      found[name]['by_rank'] = _by_rank(people, seed)
    found[name]['people'] = people
  return found


def _person(lines: Sequence[dict]) -> dict[str, Any]:
  loss, tokens = (sum(x[k] for x in lines) for k in ('loss_sum', 'tokens'))
  return {
    'client': lines[0]['client'],
    'rank': lines[0]['rank'],
    'examples': len(lines),
    'loss_sum': loss,
    'tokens': tokens,
    'perplexity': float(np.exp(min(loss / tokens, 700.0))),
    **{
      text: rouge.mean(rouge.score(x['reference'], x[text]) for x in lines)
      for text in TEXTS
    },
  }


def _summary(people: Sequence[dict], seed: int) -> dict[str, Any]:
  """Returns means over people, intervals and quantiles."""
  loss = bootstrap.ratio(
    [p['loss_sum'] for p in people], [p['tokens'] for p in people], seed
  )
  perplexity = bootstrap.Interval(*np.exp(np.minimum(loss, 700.0)).tolist())
  return {
    'num_people': len(people),
    'loss': loss._asdict(),
    'perplexity': perplexity._asdict() | _quantiles([p['perplexity'] for p in people]),
    **{
      text: {
        kind: bootstrap.mean([p[text][kind] for p in people], seed)._asdict()
        | _quantiles([p[text][kind] for p in people])
        for kind in rouge.KINDS
      }
      for text in TEXTS
    },
  }


def _quantiles(values: Sequence[float]) -> dict[str, dict[str, float]]:
  """Returns quantiles over people."""
  found = np.quantile(values, QUANTILES).tolist()
  return {'quantiles': dict(zip(map(str, QUANTILES), found, strict=True))}


def _by_rank(people: Sequence[dict], seed: int) -> dict[str, Any]:
  """Summarises people in classes of rank, as equal in size as ties allow."""
  rank_E = np.array([p['rank'] for p in people])
  cuts = np.quantile(rank_E, np.arange(1, RANK_CLASSES) / RANK_CLASSES)
  class_E = np.searchsorted(cuts, rank_E)
  found = {}
  for number in range(RANK_CLASSES):
    own = [p for p, n in zip(people, class_E, strict=True) if n == number]
    if not own:
      continue
    low, high = (f(p['rank'] for p in own) for f in (min, max))
    found[f'{low}-{high}'] = _summary(own, seed)
  return found


def table(found: dict[str, Any]) -> str:
  """Returns the means and their intervals, as lines for people."""
  lines = [f'{"mean over people":<26}' + ''.join(f'{s:>26}' for s in SETS)]

  def add(name: str, pick: Callable[[dict], dict]):
    cells = [pick(found[s]) for s in SETS]
    lines.append(f'{name:<26}' + ''.join(f'{_cell(c):>26}' for c in cells))

  add('perplexity', lambda s: s['perplexity'])
  for text in TEXTS:
    for kind in rouge.KINDS:
      name = f'{text.replace("_", " ")} {kind}'
      add(name, lambda s, t=text, k=kind: s[t][k])
  return '\n'.join(lines)


def _cell(interval: dict) -> str:
  value, low, high = (interval[k] for k in ('value', 'low', 'high'))
  return f'{value:.3f} [{low:.3f}, {high:.3f}]'
