"""What evaluation.json says about generations: one value a person, and summaries.

ROUGE F1 (Lin, 2004) is measured of two texts that must not be confused.
*Generated*: the model continues the prompt alone. *Teacher-forced*: at every
position of the reference it names the next token given the true text before it,
which scores far higher; what papers report as RougeL near 94 may be this
(METHODS, section H).
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rouge_score import rouge_scorer

from hetlora_jax.tools import bootstrap

SETS = ('seen', 'unseen')
TEXTS = ('generated', 'teacher_forced')
ROUGE_KINDS = ('rouge1', 'rouge2', 'rougeL')
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
RANK_CLASSES = 3
_LOSS_LIMIT = 700.0  # exp(710) is infinite


@functools.cache
def _scorer() -> rouge_scorer.RougeScorer:
  return rouge_scorer.RougeScorer(ROUGE_KINDS, use_stemmer=False)


def rouge(reference: str, text: str) -> dict[str, float]:
  """Returns the F1 of each kind, as the package `rouge-score` computes it.

  Its words are runs of a-z and 0-9 after lower-casing; a text without any
  scores 0.
  """
  found = _scorer().score(reference, text)
  return {kind: found[kind].fmeasure for kind in ROUGE_KINDS}


def mean_rouge(scores: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """Averages the scores of several texts, e.g. of one person's examples."""
  scores = list(scores)
  return {kind: float(np.mean([s[kind] for s in scores])) for kind in ROUGE_KINDS}


def of_lines(lines: Sequence[dict], seed: int = 0) -> dict[str, Any]:
  """Scores the lines of generations.jsonl, by set, person and class of rank."""
  found = {}
  for name in SETS:
    of_set = [line for line in lines if line['kind'] == name]
    ids = dict.fromkeys(line['client'] for line in of_set)
    people = [_person([line for line in of_set if line['client'] == id]) for id in ids]
    found[name] = _summary(people, seed)
    found[name]['without_words'] = sum(
      not any(c.isascii() and c.isalnum() for c in line['reference']) for line in of_set
    )
    if name != 'unseen':  # unseen people have no ranks
      found[name]['by_rank'] = _by_rank(people, seed)
    found[name]['people'] = people
  return found


def _person(lines: Sequence[dict]) -> dict[str, Any]:
  """Returns one person's summed loss, perplexity and mean ROUGE."""
  loss, tokens = (sum(x[k] for x in lines) for k in ('loss_sum', 'tokens'))
  return {
    'client': lines[0]['client'],
    'rank': lines[0]['rank'],
    'examples': len(lines),
    'loss_sum': loss,
    'tokens': tokens,
    'perplexity': float(np.exp(min(loss / tokens, _LOSS_LIMIT))),
    **{
      text: mean_rouge(rouge(x['reference'], x[text]) for x in lines) for text in TEXTS
    },
  }


def _summary(people: Sequence[dict], seed: int) -> dict[str, Any]:
  """Returns means over people, their intervals, and quantiles."""
  loss = bootstrap.ratio(
    [p['loss_sum'] for p in people], [p['tokens'] for p in people], seed
  )
  perplexity = bootstrap.Interval(*np.exp(np.minimum(loss, _LOSS_LIMIT)).tolist())
  return {
    'num_people': len(people),
    'loss': loss._asdict(),
    'perplexity': perplexity._asdict() | _quantiles([p['perplexity'] for p in people]),
    **{
      text: {
        kind: bootstrap.mean([p[text][kind] for p in people], seed)._asdict()
        | _quantiles([p[text][kind] for p in people])
        for kind in ROUGE_KINDS
      }
      for text in TEXTS
    },
  }


def _quantiles(values: Sequence[float]) -> dict[str, dict[str, float]]:
  """Returns quantiles over people."""
  found = np.quantile(values, QUANTILES).tolist()
  return {'quantiles': dict(zip(map(str, QUANTILES), found, strict=True))}


def _by_rank(people: Sequence[dict], seed: int) -> dict[str, Any]:
  """Summarizes people in classes of rank, as equal in size as ties allow."""
  rank_E = np.array([p['rank'] for p in people])
  cuts = np.quantile(rank_E, np.arange(1, RANK_CLASSES) / RANK_CLASSES)
  class_E = np.searchsorted(cuts, rank_E)
  found = {}
  for number in range(RANK_CLASSES):
    in_class = [p for p, n in zip(people, class_E, strict=True) if n == number]
    if not in_class:
      continue
    low, high = (f(p['rank'] for p in in_class) for f in (min, max))
    found[f'{low}-{high}'] = _summary(in_class, seed)
  return found


def table(found: dict[str, Any]) -> str:
  """Renders the means and their intervals as lines to print."""
  lines = [f'{"mean over people":<26}' + ''.join(f'{s:>26}' for s in SETS)]

  def add(name: str, pick: Callable[[dict], dict]):
    cells = [pick(found[s]) for s in SETS]
    lines.append(f'{name:<26}' + ''.join(f'{_cell(c):>26}' for c in cells))

  add('perplexity', lambda s: s['perplexity'])
  for text in TEXTS:
    for kind in ROUGE_KINDS:
      name = f'{text.replace("_", " ")} {kind}'
      add(name, lambda s, t=text, k=kind: s[t][k])
  return '\n'.join(lines)


def _cell(interval: dict) -> str:
  value, low, high = (interval[k] for k in ('value', 'low', 'high'))
  return f'{value:.3f} [{low:.3f}, {high:.3f}]'
