"""The loss of guesses that ignore all context, which models should beat."""

import numpy as np


def unigram(tokens: np.ndarray) -> float:
  """Returns the nats a token of the best guess that ignores all context."""
  _, count_V = np.unique(tokens, return_counts=True)
  p_V = count_V / count_V.sum()
  return float(-np.sum(p_V * np.log(p_V)))
