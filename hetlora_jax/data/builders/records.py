"""What every data set shares: its records and their order."""

import abc
import dataclasses
import hashlib
import itertools
import operator
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import tensorflow_datasets as tfds

from hetlora_jax import files
from hetlora_jax.config import MAX_CONTEXT_TURNS, ConfigError
from hetlora_jax.data import builders


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
  """One text that a client wrote, and what it was written about or after."""

  client: str
  time: int  # any unit that only grows
  context: list[str]  # texts, oldest first
  mine: list[bool]  # which of them the client wrote
  target: str
  label: str = ''  # what it is about, of a `labelled` data set
  bears_from: int = -1  # of a conversation: from which turn the client's bear the loss
  system: bool = False  # whether `context` starts with what the system says


def replies(turns: Sequence[tuple[str, int, str]]) -> Iterator[Record]:
  """Yields a record of every turn of a chat that follows another one.

  Turns are (client, time, text). The context is what was said before by both,
  MAX_CONTEXT_TURNS at most.
  """
  for i, (client, time, text) in enumerate(turns[1:], start=1):
    context = turns[max(0, i - MAX_CONTEXT_TURNS) : i]
    yield Record(
      client=client,
      time=time,
      context=[said for *_, said in context],
      mine=[who == client for who, *_ in context],
      target=text,
    )


MOST_TURNS = 16  # of a piece of a conversation that bear the loss


def conversations(turns: Sequence[tuple[str, int, str]]) -> Iterator[Record]:
  """Yields a record of a chat for everybody who answers in it, with all their turns.

  Turns are as in `replies`. Of more than MOST_TURNS it makes pieces, each after as
  many turns of context, which bear no loss there, as an answer has in `replies`.
  What follows a client's last turn is left out of theirs.
  """
  for start in range(0, len(turns), MOST_TURNS):
    first = max(0, start - MAX_CONTEXT_TURNS)
    piece, bears_from = turns[first : start + MOST_TURNS], start - first
    for client in dict.fromkeys(who for who, *_ in piece[bears_from:]):
      mine = [who == client for who, *_ in piece]
      last = len(mine) - 1 - mine[::-1].index(True)
      if not all(mine[:last]):
        yield Record(
          client=client,
          time=piece[last][1],
          context=[said for *_, said in piece[:last]],
          mine=mine[:last],
          target=piece[last][2],
          bears_from=bears_from,
        )


class RecordBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC):
  """Writes records by client, then time, and where each client's records start.

  Split 'examples' has a row a record, 'people' a row a client, with the row of
  their first example and how many follow. A data set gives its `examples`; one
  that reads a user's files says which in `files`.
  """

  VERSION = tfds.core.Version('1.0.0')
  labelled: ClassVar[bool] = False  # whether records have a label of their own
  has_whole: ClassVar[bool] = False  # whether a record may be a conversation
  cue: ClassVar[str] = ''  # a line such as 'Subject:', where texts are summed up
  # People with fewer examples are the unseen ones; 0: a hash of the name tells.
  train_from: ClassVar[int] = 0
  # None: as its examples need.
  limits: ClassVar[builders.Limits | None] = builders.Limits()

  def __init__(
    self,
    *,
    path: str = '',
    reading: builders.Reading = builders.AS_USUAL,
    **options: Any,
  ):
    """Makes a builder that reads `path`, or without one what it finds itself."""
    self.path, self.reading = path, reading
    self.unread: set[str] = set()  # columns, known once it has prepared
    super().__init__(**options)

  @classmethod
  def located(cls, name: str, path: str) -> tuple[str, str | None]:
    """Returns what is read for a name and a path; of the Hub also at which commit."""
    del name
    return path, None

  @classmethod
  def digest(cls, path: str, reading: builders.Reading) -> str:
    """Returns a number for the content at a path and how it is read."""
    found = files.digest_all(cls.files(path))
    if any(reading.given):
      found = hashlib.sha256(repr((found, *reading.given)).encode()).hexdigest()
    return found[:16]

  @classmethod
  def files(cls, path: str) -> list[pathlib.Path]:
    """Returns the files at a user's path; raises ValueError or OSError."""
    raise ConfigError(
      f'config.data.path={path} is not read by config.data.name={cls.name!r}: for '
      'files of your own set config.data.name=text_folder, else leave the path out.'
    )

  @abc.abstractmethod
  def examples(self) -> Iterator[Record]:
    """Yields all records; those of equal time stay in the order given."""

  def _info(self) -> tfds.core.DatasetInfo:
    # A Tensor of strings encodes at once where a Sequence goes one by one.
    strings = tfds.features.Tensor(shape=(None,), dtype=np.str_)
    features = {
      'client': tfds.features.Text(),
      'time': np.int64,
      'context': strings,
      'mine': tfds.features.Tensor(shape=(None,), dtype=np.bool_),
      'target': tfds.features.Text(),
      'first': np.int64,
      'count': np.int64,
    }
    if self.labelled:
      features['labels'] = strings
    if self.has_whole:
      features |= {'bears_from': np.int64, 'system': np.bool_}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager) -> dict:
    del dl_manager  # Nothing is downloaded.
    records = sorted(self.examples(), key=operator.attrgetter('client', 'time'))
    return {
      'examples': enumerate(map(self._example, records)),
      'people': self._generate_examples(records),
    }

  def _example(self, record: Record) -> dict:
    return self._row(
      client=record.client,
      time=record.time,
      context=record.context,
      mine=record.mine,
      target=record.target,
      bears_from=record.bears_from,
      system=record.system,
    )

  def _generate_examples(self, records: list[Record]) -> Iterator[tuple[int, dict]]:
    first = 0
    by_client = itertools.groupby(records, operator.attrgetter('client'))
    for row, (client, group) in enumerate(by_client):
      labels = [record.label for record in group]
      yield row, self._row(client=client, first=first, count=len(labels), labels=labels)
      first += len(labels)

  def _row(self, **values: Any) -> dict:
    """Returns a row of either split; TFDS has one schema for both."""
    empty = dict(time=0, context=[], mine=[], target='', first=0, count=0, labels=[])
    empty |= dict(bears_from=-1, system=False)
    row, columns = empty | values, cast(Any, self.info.features)
    return {name: row[name] for name in columns}
