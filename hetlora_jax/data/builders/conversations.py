"""What every data set of conversations shares: its schema and its order."""

import abc
import dataclasses
import itertools
import operator
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

MAX_CONTEXT_TURNS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
  """One turn that a person wrote, and the turns before it, oldest first."""

  client: str
  time: int  # any unit that only grows
  context: list[str]
  mine: list[bool]  # which context turns the same person wrote
  target: str


def _features() -> tfds.features.FeaturesDict:
  # TFDS has one schema for all splits: a record of 'examples' leaves `first`
  # and `count` at 0, one of 'people' everything but `client`, `first`, `count`.
  # A Tensor of strings encodes at once where a Sequence goes one by one.
  return tfds.features.FeaturesDict(
    {
      'client': tfds.features.Text(),
      'time': np.int64,
      'context': tfds.features.Tensor(shape=(None,), dtype=np.str_),
      'mine': tfds.features.Tensor(shape=(None,), dtype=np.bool_),
      'target': tfds.features.Text(),
      'first': np.int64,
      'count': np.int64,
    }
  )


def _example(turn: Turn) -> dict:
  return dict(
    client=turn.client,
    time=turn.time,
    context=turn.context,
    mine=turn.mine,
    target=turn.target,
    first=0,
    count=0,
  )


def _person(client: str, first: int, count: int) -> dict:
  return dict(
    client=client,
    time=0,
    context=[],
    mine=[],
    target='',
    first=first,
    count=count,
  )


class ConversationBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC):
  """Writes turns by person, then time, and where each person's turns start.

  Split 'examples' has a record a turn, 'people' a record a person with the
  row of their first example and how many follow. A data set gives `turns`.
  """

  VERSION = tfds.core.Version('1.0.0')

  @abc.abstractmethod
  def turns(self) -> Iterator[Turn]:
    """Yields all turns; those of equal time stay in the order given."""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self, features=_features(), disable_shuffling=True
    )

  def _split_generators(self, dl_manager) -> dict:
    del dl_manager  # Nothing is downloaded.
    turns = sorted(self.turns(), key=operator.attrgetter('client', 'time'))
    return {
      'examples': enumerate(map(_example, turns)),
      'people': self._generate_examples(turns),
    }

  def _generate_examples(self, turns: list[Turn]) -> Iterator[tuple[int, dict]]:
    first = 0
    by_client = itertools.groupby(turns, operator.attrgetter('client'))
    for row, (client, group) in enumerate(by_client):
      count = sum(1 for _ in group)
      yield row, _person(client, first, count)
      first += count
