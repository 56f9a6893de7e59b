"""How much room examples have, and who has too few, where a run does not say."""

import dataclasses

import numpy as np

from hetlora_jax.config import Data
from hetlora_jax.data import builders, people
from hetlora_jax.data.builders import Limits

SHARE = 99  # per cent of one's own examples that have all the room they need
MOST_TOKENS = 1024  # of an example, whatever it needs
MOST_READ = 1024  # examples, spread evenly over the clients, that tell
_MULTIPLE = 8


def filled(
  data: Data,
  dataset: builders.Dataset | None = None,
  tokenizer: people.Tokenizer | None = None,
) -> Data:
  """Returns a section `data` in which no limit is None.

  Args:
    data: the section; what it gives stays.
    dataset: what it names, opened; None: clients that come from elsewhere, or none.
    tokenizer: whose tokens are counted where a data set has no limits of its own.
  """
  given = {x: getattr(data, x) for x in Limits._fields if getattr(data, x) is not None}
  if len(given) == len(Limits._fields):
    return data
  found = (dataset.builder if dataset else builders.builder_of(data.name)).limits
  if found is None:
    found = _needed(data, dataset, tokenizer) if dataset else Limits()
  limits = found._replace(**given)
  # What is given moves what is not: targets leave contexts their room.
  if 'tokens_per_example' not in given:
    more = max(0, limits.targets_per_example - found.targets_per_example)
    limits = limits._replace(tokens_per_example=found.tokens_per_example + more)
  tokens = limits.tokens_per_example
  if 'targets_per_example' not in given:
    fit = max(1, min(limits.targets_per_example, tokens - 1))
    limits = limits._replace(targets_per_example=fit)
  if 'row_tokens' not in given:
    limits = limits._replace(row_tokens=max(limits.row_tokens, tokens))
  return dataclasses.replace(data, **limits._asdict())


def are_known(data: Data) -> bool:
  """Tells whether all limits are known without reading the data."""
  given = all(getattr(data, name) is not None for name in Limits._fields)
  return given or builders.builder_of(data.name).limits is not None


def _needed(
  data: Data, dataset: builders.Dataset, tokenizer: people.Tokenizer
) -> Limits:
  """Returns limits that leave nobody out and cut the longest examples alone."""
  read = people.reader(dataset, tokenizer, data)
  rows = people.evenly_spaced(len(dataset.examples), MOST_READ)
  examples = [read(int(row)) for row in rows]
  return Limits(
    min_examples=2,
    tokens_per_example=_room([len(example.tokens) for example in examples]),
    targets_per_example=_room([example.all_targets for example in examples]),
  )


def _room(tokens: list[int]) -> int:
  """Returns what so many per cent of examples need, a multiple of eight."""
  needed = float(np.percentile(tokens, SHARE, method='higher'))
  return min(MOST_TOKENS, -int(-needed // _MULTIPLE) * _MULTIPLE)
