"""Tasks with labels: which of some texts a model finds likeliest as the target.

So text classification runs on any decoder. A label's score is log p of all of its tokens,
what ends it included, given the prompt: the probability of that answer. It is not
divided by the number of tokens, which would favour long labels, whose last tokens are
almost certain once the first ones are known.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hetlora_jax.config import Config, ConfigError
from hetlora_jax.data import cohorts, packing
from hetlora_jax.data.people import Example, Kind, Population
from hetlora_jax.types import Cohort

NOTHING = -1  # the label of what fills up, and the guess of a model that has diverged


def ask(
  population: Population,
  kind: Kind,
  person: int,
  i: int,
  labels: Sequence[str],
  tokenizer,
) -> tuple[list[Example], int]:
  """Returns an example with each label as its target, and which of them is right.

  All have one prompt, which leaves room for the longest label.

  Raises:
    ConfigError: its target is none of the labels, or several to the tokenizer.
  """
  example = population.example(kind, person, i)
  versions = [population.example(kind, person, i, label) for label in labels]
  right = [
    k for k, x in enumerate(versions) if np.array_equal(x.tokens, example.tokens)
  ]
  if len(right) != 1:
    decode = getattr(tokenizer, 'decode', lambda tokens: str(list(tokens)))
    target = decode(example.tokens[-example.num_target :]).strip()
    why = 'are the same to the tokenizer as' if right else 'do not have'
    raise ConfigError(
      f'config.eval.labels={tuple(labels)} {why} the target {target!r} of '
      f'{population.groups[kind].ids[person]!r}: give every target that the data have, '
      'as they write it, once.'
    )
  prompt = min((x.tokens[: -x.num_target] for x in versions), key=len)
  targets = [x.tokens[-x.num_target :] for x in versions]
  bos = example.num_bos
  joined = [Example(np.concatenate([prompt, x]), len(x), num_bos=bos) for x in targets]
  return joined, right[0]


def _cut_alike(
  asked: Sequence[list[Example]], shape: packing.BatchShape
) -> Iterator[list[Example]]:
  """Cuts a person's prompts as evaluations without labels do, for all labels alike."""
  longest = [max(versions, key=lambda x: x.num_target) for versions in asked]
  room = packing.kept(longest, shape) if asked else []
  for versions, one, text in zip(asked, longest, room, strict=True):
    if len(text.targets) < one.num_target:
      raise ConfigError(
        f'config.eval.labels has a label of {one.num_target} tokens, which would be cut '
        'off: raise config.data.targets_per_example, and tokens_per_example with it.'
      )
    cut = len(one.tokens) - len(text.tokens)
    bos = one.num_bos
    yield [
      x._replace(tokens=np.concatenate([x.tokens[:bos], x.tokens[bos + cut :]]))
      for x in versions
    ]


def evaluation_sets(
  population: Population,
  config: Config,
  tokenizer: Any,
  people: Mapping[str, tuple[Kind, int, int]],
) -> tuple[dict[str, Cohort], dict[str, np.ndarray]]:
  """Returns the sets that `cohorts.evaluation_set` does, with each of the labels.

  Args:
    population: its people.
    config: the experiment's, with all limits of `data`.
    tokenizer: of the model; only messages decode.
    people: name of a set -> whom of them: kind, num_people and multiple_of.

  Returns:
    Sets with batches [E, labels, ...]: one a label, of all examples of a person; and
    which label is right, [E, examples], NOTHING where there is no example.

  Raises:
    ConfigError: see `ask`; or an example cannot be read with another target.
  """
  _check_reads(population, config)
  e = config.eval
  usual = packing.batch_shape(config.data, e.examples_per_person)
  clients, batches, answers = {}, {}, {}
  for name, (kind, num_people, multiple_of) in people.items():
    clients[name], chosen = cohorts.evaluated(
      population, kind, num_people, e.examples_per_person, multiple_of
    )
    batches[name] = []
    answers[name] = np.full((len(chosen), e.examples_per_person), NOTHING)
    for answer_X, own in zip(answers[name], chosen, strict=True):
      asked = [ask(population, kind, *at, e.labels, tokenizer) for at in own]
      answer_X[: len(own)] = [right for _, right in asked]
      cut = list(_cut_alike([versions for versions, _ in asked], usual))
      batches[name].append([[x[k] for x in cut] for k in range(len(e.labels))])

  # One shape for all sets, so that one program evaluates them.
  everybody = itertools.chain(*batches.values())
  shape = _shape_for(list(itertools.chain(*everybody)), usual)
  sets = {
    name: cohorts.pack(clients[name], (answers[name] != NOTHING).sum(1), of_set, shape)
    for name, of_set in batches.items()
  }
  return sets, answers


def _check_reads(population: Population, config: Config) -> None:
  """Raises ConfigError if a population of one's own has its own targets alone."""
  try:
    inspect.signature(population.read).bind(0, '')
  except TypeError as error:
    raise ConfigError(
      f'config.eval.labels={config.eval.labels}: the population that was given must '
      'read a row with another target too, population.read(row, target).'
    ) from error


def _shape_for(
  batches: Sequence[Sequence[Example]], usual: packing.BatchShape
) -> packing.BatchShape:
  """Returns a shape that cuts nothing off any batch: as many rows and targets as needed."""
  rows = targets = 1
  for batch in filter(None, batches):
    length = np.array([len(x.tokens) - 1 for x in batch])
    row, _, _ = packing.first_fit(length, len(batch), usual.row_tokens)
    rows = max(rows, int(row.max()) + 1)
    targets = max(targets, sum(x.num_target for x in batch))
  return usual._replace(rows=rows, num_targets=targets)
