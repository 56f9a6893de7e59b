"""What every data set shares: its schema, its order, how it is rendered."""

import abc
import dataclasses
import itertools
import operator
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

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
  label: str = ''  # what it is about, of a `labelled` data set


class Rendered(NamedTuple):
  """A prompt and its completion, which bears the loss.

  Where the prompt must be cut to fit, it loses its start; or, if it has a cue,
  which ends it, what is right before the cue.
  """

  prompt: str  # without the cue
  completion: str
  cue: str = ''


def render_chat(context: Sequence[str], mine: Sequence[bool], target: str) -> Rendered:
  """Renders a line a turn; A writes the target."""
  names = ['A' if m else 'B' for m in mine]
  turns = [f'{n}: {text}\n' for n, text in zip(names, context, strict=True)]
  return Rendered(''.join(turns) + 'A:', f' {target}\n')


def render_summary(context: Sequence[str], cue: str, target: str) -> Rendered:
  """Renders a text, a line such as 'Subject:', and what sums the text up."""
  return Rendered(' '.join(context), f' {target}\n', f'\n{cue}')


def _features(labelled: bool) -> tfds.features.FeaturesDict:
  # TFDS has one schema for all splits: a record of 'examples' leaves `first`
  # and `count` at 0, one of 'people' everything but `client`, `first`, `count`.
  # A Tensor of strings encodes at once where a Sequence goes one by one.
  # `labels` are those of a person's examples, in the record of the person.
  strings = tfds.features.Tensor(shape=(None,), dtype=np.str_)
  return tfds.features.FeaturesDict(
    {
      'client': tfds.features.Text(),
      'time': np.int64,
      'context': strings,
      'mine': tfds.features.Tensor(shape=(None,), dtype=np.bool_),
      'target': tfds.features.Text(),
      'first': np.int64,
      'count': np.int64,
    }
    | ({'labels': strings} if labelled else {})
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
  row of their first example and how many follow. A data set gives `turns`;
  one that reads a user's files says which in `files`.
  """

  VERSION = tfds.core.Version('1.0.0')
  labelled: ClassVar[bool] = False  # whether turns have a label of their own
  # People with fewer examples are the unseen ones; 0: a hash of the name tells.
  train_from: ClassVar[int] = 0

  def __init__(self, *, path: str = '', **options: Any):
    """Makes a builder that reads `path`, or without one what it finds itself."""
    self.path = path
    super().__init__(**options)

  @classmethod
  def files(cls, path: str) -> list[pathlib.Path]:
    """Returns the files at a user's path; raises ValueError or OSError."""
    raise ValueError(
      f'{cls.name!r} reads no files of yours: leave data.path={path!r} empty.'
    )

  @staticmethod
  def render(context: Sequence[str], mine: Sequence[bool], target: str) -> Rendered:
    """Renders an example for a language model."""
    return render_chat(context, mine, target)

  @abc.abstractmethod
  def turns(self) -> Iterator[Turn]:
    """Yields all turns; those of equal time stay in the order given."""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      features=_features(self.labelled),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager) -> dict:
    del dl_manager  # Nothing is downloaded.
    turns = sorted(self.turns(), key=operator.attrgetter('client', 'time'))
    return {
      'examples': enumerate(map(self._example, turns)),
      'people': self._generate_examples(turns),
    }

  def _example(self, turn: Turn) -> dict:
    return _example(turn) | ({'labels': []} if self.labelled else {})

  def _generate_examples(self, turns: list[Turn]) -> Iterator[tuple[int, dict]]:
    first = 0
    by_client = itertools.groupby(turns, operator.attrgetter('client'))
    for row, (client, group) in enumerate(by_client):
      labels = [turn.label for turn in group]
      person = _person(client, first, len(labels))
      yield row, person | ({'labels': labels} if self.labelled else {})
      first += len(labels)
