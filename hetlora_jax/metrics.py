"""What an evaluation tells beyond the loss: scores of guesses, and metrics of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from hetlora_jax import client, lora
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.data.labels import NOTHING
from hetlora_jax.experiment import Experiment
from hetlora_jax.points import Evaluation, Points
from hetlora_jax.types import Hyperparameters, PyTree, Row, Server, ServerState

OF_LABELS = ('accuracy', 'macro_f1')  # columns eval/SET/NAME of a task with labels


def of_labels(found: Evaluation) -> Row:
  """Returns accuracy and macro F1 over all examples; {} of a task without labels.

  A guess of NOTHING is wrong. As in scikit-learn, F1 is averaged over the labels that
  are right or guessed anywhere: one that is guessed and never right has an F1 of 0.
  """
  if found.answer_EX is None or found.guess_EX is None:
    return {}
  asked = found.answer_EX != NOTHING
  answer, guess = found.answer_EX[asked], found.guess_EX[asked]
  f1 = []
  for label in set(answer) | set(guess) - {NOTHING}:
    right, guessed = answer == label, guess == label
    f1.append(2 * (right & guessed).sum() / (right.sum() + guessed.sum()))
  scores = (answer == guess).mean(), np.mean(f1)
  return dict(zip(OF_LABELS, map(float, scores), strict=True))


class Snapshot(NamedTuple):
  """A run at an evaluation: what a metric of one's own may look at.

  Its arrays live on the devices. Of several processes all call a metric, so it may
  compute with them.
  """

  experiment: Experiment  # model, population and its examples, evaluation sets, rules
  config: Config  # of this run
  round: int  # rounds done
  state: ServerState
  hyper: Hyperparameters
  found: Mapping[str, Evaluation]  # losses and guesses: 'seen', 'unseen', 'seen_own'

  @property
  def base(self) -> PyTree:
    """The base model, with what has been folded into it."""
    return lora.fold(self.experiment.model.params, self.state.residual)

  @property
  def server(self) -> Server:
    """The global adapters, and their scale."""
    return client.global_adapters(self.experiment.rules, self.state, self.hyper)


Metric = Callable[[Snapshot], float]


def check_own(own: Mapping[str, Metric]) -> None:
  """Raises ConfigError if a metric of one's own has no name, or is no function."""
  for name, metric in own.items():
    if not (isinstance(name, str) and name.strip() and callable(metric)):
      raise ConfigError(
        f'metrics={{{name!r}: {metric!r}}}: give a name, and a function of a '
        'metrics.Snapshot that returns a number.'
      )


def own_columns(
  own: Mapping[str, Metric],
  x: Points,
  state: ServerState,
  done: int,
  found: Mapping[str, Evaluation],
  k: int,
) -> Row:
  """Calls metrics of one's own for point k; raises ConfigError if one gives no number."""
  if not own:
    return {}
  hyper = jax.tree.map(lambda leaf: leaf[k], x.hyper)
  at = Snapshot(x.experiment, x.configs[k], done, x.take(state, k), hyper, found)
  row = {}
  for name, metric in own.items():
    value = metric(at)
    try:
      row[f'eval/own/{name}'] = float(value)
    except (TypeError, ValueError) as error:
      raise ConfigError(
        f'metrics={{{name!r}: ...}} returned {value!r}, which is no number.'
      ) from error
  return row
