"""Who takes part, and each person's turns as tokens, read when needed.

People are set aside as unseen by a hash of their name (or, where the data set
says so, by how much they wrote) and turns held out by time, so runs of every
seed are evaluated on the same people and turns. A turn held out for one person
may still be context, which bears no loss, for another.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from hetlora_jax import files
from hetlora_jax.data import builders, partition
from hetlora_jax.data.builders import conversations
from hetlora_jax.data.partition import Partition

Kind = Literal['train', 'heldout', 'unseen']

_CACHED_EXAMPLES = 1 << 16


class Tokenizer(Protocol):
  """What is needed of a tokenizer."""

  bos_id: int

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text, without special ones."""
    ...


class Example(NamedTuple):
  """A transcript whose last `num_target` tokens bear the loss."""

  tokens: np.ndarray  # [L] int32, bos first, L > num_target
  num_target: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """People, and which rows of the data set are theirs."""

  ids: tuple[str, ...]
  first: np.ndarray  # [N] int64, a person's first row
  count: np.ndarray  # [N] int64, how many rows follow


@dataclasses.dataclass(frozen=True, kw_only=True)
class People:
  """The population: one group of people a kind of example.

  'train' and 'heldout' are earlier and later turns of the same people; 'train'
  repeats them all in their order if each stands for several clients.
  """

  groups: dict[Kind, Group]
  read: Callable[[int], Example]  # the example of a row

  @property
  def client_ids(self) -> tuple[str, ...]:
    return self.groups['train'].ids

  @property
  def num_examples(self) -> np.ndarray:
    """Counts each client's training examples, [N]."""
    return self.groups['train'].count

  def example(self, kind: Kind, client: int, i: int) -> Example:
    """Returns example `i` of the person at index `client` of that kind."""
    group = self.groups[kind]
    if not 0 <= i < group.count[client]:
      raise IndexError(
        f'{kind} example {i} of {group.ids[client]}, who has {group.count[client]}.'
      )
    return self.read(int(group.first[client]) + i)


def encode(
  tokenizer: Tokenizer,
  prompt: str,
  completion: str,
  cue: str = '',
  most_tokens: int = 0,
) -> Example:
  """Encodes all apart, as they are when text is generated.

  A prompt that has a cue is cut before it to `most_tokens` positions in all,
  unless that is 0; one without is left whole, for packing to cut.
  """
  prompt_tokens = tokenizer.encode(prompt)
  target_tokens = tokenizer.encode(completion)
  if cue:
    cue_tokens = tokenizer.encode(cue)
    room = max(0, most_tokens - len(cue_tokens) - len(target_tokens))
    prompt_tokens = prompt_tokens[: room if most_tokens else None] + cue_tokens
  tokens = [tokenizer.bos_id, *prompt_tokens, *target_tokens]
  return Example(np.asarray(tokens, np.int32), len(target_tokens))


def _render(
  render: Callable, record: dict, max_context_turns: int
) -> conversations.Rendered:
  """Renders a record of the split 'examples'."""
  return render(
    [text.decode() for text in record['context'][-max_context_turns:]],
    record['mine'][-max_context_turns:],
    record['target'].decode(),
  )


def corpus(
  dataset: str,
  *,
  data_dir: str | os.PathLike | None = None,
  path: str = '',
  num_texts: int = 4096,
) -> Iterator[str]:
  """Yields transcripts, spread evenly over people, to train a tokenizer on."""
  prepared = builders.open_dataset(dataset, data_dir, path)
  most = conversations.MAX_CONTEXT_TURNS
  for row in evenly_spaced(len(prepared.examples), num_texts):
    record = prepared.examples[int(row)]
    text = _render(prepared.builder.render, record, most)
    yield text.prompt + text.cue + text.completion


def evenly_spaced(available: int, count: int) -> np.ndarray:
  """Returns `count` numbers below `available`, or all if there are fewer."""
  count = min(count, available)
  return np.arange(count) * available // max(count, 1)


def _hash(client_id: str, salt: bytes = b'') -> int:
  """Returns a number below 2**64, uniform over ids; salts are independent."""
  id_bytes = client_id.encode()
  digest = hashlib.blake2b(id_bytes, digest_size=8, salt=salt).digest()
  return int.from_bytes(digest, 'big')


def _is_unseen(client_id: str, fraction: float) -> bool:
  return _hash(client_id) < fraction * 2**64


def _split(
  everyone: Group,
  unseen_fraction: float,
  heldout_fraction: float,
  train_from: int = 0,
) -> dict[Kind, Group]:
  if train_from:
    unseen_N = everyone.count < train_from
  else:
    unseen_N = np.array([_is_unseen(i, unseen_fraction) for i in everyone.ids])
  unseen = _select(everyone, unseen_N)
  known = _select(everyone, ~unseen_N)
  late_N = np.maximum(1, (known.count * heldout_fraction).astype(np.int64))
  early_N = known.count - late_N
  return {
    'train': dataclasses.replace(known, count=early_N),
    'heldout': dataclasses.replace(known, first=known.first + early_N, count=late_N),
    'unseen': unseen,
  }


def _keep(groups: dict[Kind, Group], num_people: int) -> dict[Kind, Group]:
  """Keeps so many of the people trained on, in their order; all unseen ones."""
  ids = groups['train'].ids
  if num_people > len(ids):
    raise ValueError(
      f'{num_people=} exceeds the {len(ids)} people to train on; lower it, '
      'min_examples or unseen_fraction, or give 0 for everybody.'
    )
  hash_N = np.array([_hash(i, b'kept') for i in ids], np.uint64)
  keep_N = np.zeros(len(ids), bool)
  keep_N[np.argsort(hash_N, kind='stable')[:num_people]] = True
  kept: dict[Kind, Group] = {
    'train': _select(groups['train'], keep_N),
    'heldout': _select(groups['heldout'], keep_N),
  }
  return groups | kept


def _select(group: Group, mask_N: np.ndarray) -> Group:
  keep_N = np.flatnonzero(mask_N)
  return Group(
    ids=tuple(group.ids[i] for i in keep_N),
    first=group.first[keep_N],
    count=group.count[keep_N],
  )


def everyone(
  dataset: builders.Dataset, by: Partition
) -> tuple[Group, np.ndarray | None]:
  """Returns all clients, and which example each of their rows is.

  None means that a row is an example's own, as it is with natural clients.
  """
  records = list(dataset.people)
  _check_rows(dataset, records)
  ids = tuple(record['client'].decode() for record in records)
  count = np.array([record['count'] for record in records])
  if by.name == partition.NATURAL:
    first = np.array([record['first'] for record in records])
    return Group(ids=ids, first=first, count=count), None
  labels = np.repeat(ids, count)
  if dataset.builder.labelled:
    labels = np.concatenate([record['labels'] for record in records])
  rows = partition.draw(by, labels)
  count = np.array([len(r) for r in rows])
  made = Group(
    ids=tuple(f'{by.name}-{i:06d}' for i in range(len(rows))),
    first=np.cumsum(count) - count,
    count=count,
  )
  return made, np.concatenate(rows)


def _busy(clients: Group, min_examples: int) -> Group:
  if min_examples > clients.count.max():
    raise ValueError(
      f'{min_examples=} leaves nobody: the busiest person has '
      f'{clients.count.max()} examples; lower min_examples.'
    )
  return _select(clients, clients.count >= min_examples)


def _check_rows(dataset: builders.Dataset, records: Sequence[dict]) -> None:
  """Raises ValueError unless people share out all examples, in order."""
  end = 0
  for record in records:
    if record['first'] != end or record['count'] < 1:
      break
    end += record['count']
  if not end or end != len(dataset.examples):
    why = 'its people are not those of its examples'
    raise files.damaged(dataset.folder, why, builders.ANEW)


def _check(field: str, value: float, low: float, high: float) -> None:
  """Raises ValueError unless low <= value < high."""
  if not low <= value < high:
    raise ValueError(f'{field}={value} must be in [{low}, {high}).')


def reader(
  dataset: builders.Dataset,
  tokenizer: Tokenizer,
  max_context_turns: int = conversations.MAX_CONTEXT_TURNS,
  most_tokens: int = 0,
  order_E: np.ndarray | None = None,
) -> Callable[[int], Example]:
  """Returns row -> its example; rows are those of `order_E`, if given."""

  @functools.lru_cache(_CACHED_EXAMPLES)
  def read(row: int) -> Example:
    row = row if order_E is None else int(order_E[row])
    text = _render(dataset.builder.render, dataset.examples[row], max_context_turns)
    return encode(tokenizer, *text, most_tokens=most_tokens)

  return read


def load(
  dataset: str,
  tokenizer: Tokenizer,
  *,
  data_dir: str | os.PathLike | None = None,
  path: str = '',
  min_examples: int,
  unseen_fraction: float,
  heldout_fraction: float,
  max_context_turns: int = conversations.MAX_CONTEXT_TURNS,
  most_tokens: int = 0,
  num_people: int = 0,
  copies: int = 1,
  by: Partition = partition.NATURALLY,
) -> People:
  """Splits a data set's people, preparing it first if it never was.

  People with fewer than `min_examples` are left out. The latest
  `heldout_fraction` of everyone else's turns, one at least, is held out. Of
  those trained on, `num_people` are kept, by a hash of their id; 0 keeps all.
  Each of them stands for `copies` clients, who have the same turns and whatever
  else is a client's (ranks, draws) for themselves. A text to be summed up is cut
  to `most_tokens` positions, its cue and target included; 0 leaves it whole.
  With a partition `by` a rule, clients are made by it; what is held out of them
  is then drawn, not the latest.
  """
  most_turns = conversations.MAX_CONTEXT_TURNS
  _check('min_examples', min_examples, 2, np.inf)
  _check('unseen_fraction', unseen_fraction, 0, 1)
  _check('heldout_fraction', heldout_fraction, 0, 1)
  _check('max_context_turns', max_context_turns, 1, most_turns + 1)
  _check('num_people', num_people, 0, np.inf)
  prepared = builders.open_dataset(dataset, data_dir, path)
  clients, order_E = everyone(prepared, by)
  busy = _busy(clients, min_examples)
  natural = by.name == partition.NATURAL
  train_from = prepared.builder.train_from if natural else 0
  groups = _split(busy, unseen_fraction, heldout_fraction, train_from)
  if not groups['train'].ids:
    if train_from:
      raise ValueError(
        f'{dataset!r} trains on people of {train_from} examples or more, and '
        'there are none: give it all of its data.'
      )
    raise ValueError(
      f'{unseen_fraction=} sets aside all {len(busy.ids)} people with '
      f'{min_examples=}; lower either.'
    )
  if num_people:
    groups = _keep(groups, num_people)
  train = groups['train']
  groups['train'] = Group(
    ids=train.ids * copies,
    first=np.tile(train.first, copies),
    count=np.tile(train.count, copies),
  )
  return People(
    groups=groups,
    read=reader(prepared, tokenizer, max_context_turns, most_tokens, order_E),
  )


def unigram_entropy(tokens: np.ndarray) -> float:
  """Returns the nats a token of the best guess that ignores all context."""
  _, count_V = np.unique(tokens, return_counts=True)
  p_V = count_V / count_V.sum()
  return float(-np.sum(p_V * np.log(p_V)))
