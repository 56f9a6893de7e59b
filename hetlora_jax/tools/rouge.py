"""ROUGE F1 of generated and of teacher-forced text (Lin, 2004).

Two measures that must not be confused. *Generated*: the model writes on from the
prompt alone. *Teacher-forced*: at every position of the reference it names the
next token from the true text before it, which scores far higher; what papers
report as RougeL near 94 may be this (METHODS, section H).
"""

import functools
from collections.abc import Iterable, Mapping

import numpy as np
from rouge_score import rouge_scorer

KINDS = ('rouge1', 'rouge2', 'rougeL')
Scores = dict[str, float]


@functools.cache
def _scorer() -> rouge_scorer.RougeScorer:
  return rouge_scorer.RougeScorer(KINDS, use_stemmer=False)


def score(reference: str, text: str) -> Scores:
  """Returns the F1 of each kind, as the package `rouge-score` has it.

  Words are runs of a-z and 0-9 in lower case; a text without any scores 0.
  """
  found = _scorer().score(reference, text)
  return {kind: found[kind].fmeasure for kind in KINDS}


def mean(scores: Iterable[Mapping[str, float]]) -> Scores:
  """Averages some scores, e.g. of one person's examples."""
  scores = list(scores)
  return {kind: float(np.mean([s[kind] for s in scores])) for kind in KINDS}
