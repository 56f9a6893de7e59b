"""The population: who the clients are, and each one's examples as tokens.

People are set aside as unseen by a hash of their name (or, where the data set
says so, by how much they wrote) and examples are held out by time, so runs of
every seed are evaluated on the same people and examples. What is held out of
one person may still be context, which bears no loss, of another.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from hetlora_jax import config
from hetlora_jax.config import MAX_CONTEXT_TURNS
from hetlora_jax.data import builders, partition

if TYPE_CHECKING:
  from hetlora_jax.data import rendering

Kind = Literal['train', 'heldout', 'unseen']

_CACHED_EXAMPLES = 1 << 16


class Tokenizer(Protocol):
  """What is needed of a tokenizer; one without `bos_id` has an `eos_id`."""

  bos_id: int | None

  def encode(self, text: str) -> list[int]:
    """Returns the tokens of a text, without special ones."""
    ...


class Example(NamedTuple):
  """A text as tokens, of which the last `num_target` bear the loss.

  Those at `earlier` do too: what its writer said before, where a conversation is one
  example.
  """

  tokens: np.ndarray  # [L] int32, bos first if there is one, L > num_target
  num_target: int
  cut: int = 0  # tokens of its context that are left out already
  num_bos: int = 1  # 0 where nothing begins a text
  earlier: Sequence[int] = ()  # places, in order

  @property
  def all_targets(self) -> int:
    """How many tokens bear the loss."""
    return len(self.earlier) + self.num_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """Some clients, and which rows of the data set are theirs."""

  ids: tuple[str, ...]
  first: np.ndarray  # [N] int64, a client's first row
  count: np.ndarray  # [N] int64, how many rows are the client's

  def select(self, mask_N: np.ndarray) -> Group:
    """Returns the clients at which the mask is true, in their order."""
    keep_N = np.flatnonzero(mask_N)
    ids = tuple(self.ids[i] for i in keep_N)
    return Group(ids=ids, first=self.first[keep_N], count=self.count[keep_N])

  def repeat(self, copies: int) -> Group:
    """Returns all clients in their order, `copies` times over."""
    first, count = np.tile([self.first, self.count], copies)
    return Group(ids=self.ids * copies, first=first, count=count)


class LeftOut(NamedTuple):
  """The clients that a data set has, and those that are left out and why."""

  clients: int  # of the data set
  examples: int
  too_few: int  # clients with fewer examples than `min_examples`
  examples_of_too_few: int
  not_kept: int  # clients beyond `num_people`, which only training could use


@dataclasses.dataclass(frozen=True, kw_only=True)
class Population:
  """All clients by the kind of their examples, and how an example is read.

  'train' and 'heldout' are earlier and later examples of the same people;
  'train' repeats them all in their order if each stands for several clients.
  """

  groups: dict[Kind, Group]
  # row -> its example, and for tasks with labels (row, target) -> it with that target
  read: Callable[..., Example]
  left_out: LeftOut | None = None  # None: nobody knows of a population of one's own
  digest: str = ''  # of the user's data that it was made of
  revision: str | None = None  # of a repository of the Hub, the commit

  @property
  def client_ids(self) -> tuple[str, ...]:
    return self.groups['train'].ids

  @property
  def num_examples(self) -> np.ndarray:
    """Counts each client's training examples, [N]."""
    return self.groups['train'].count

  def example(self, kind: Kind, client: int, i: int, *target: str) -> Example:
    """Returns example `i` of the client at index `client` of that kind.

    Given a target, it has that one in place of its own.
    """
    group = self.groups[kind]
    if not 0 <= i < group.count[client]:
      raise IndexError(
        f'{kind} example {i} of {group.ids[client]}, who has {group.count[client]}.'
      )
    return self.read(int(group.first[client]) + i, *target)


def load(
  data: config.Data, tokenizer: Tokenizer, dataset: builders.Dataset | None = None
) -> Population:
  """Splits the clients of the configured data set, which is prepared if needed.

  Clients with fewer than `min_examples` are left out. The latest
  `heldout_fraction` of the others' examples, one at least, is held out. Of those
  trained on, `num_people` are kept, by a hash of their id, or all if it is not
  given. Each of them stands for `copies` clients, who share their examples but
  have ranks and draws of their own. Clients that are made by a partition have
  examples in no order, so what is held out of them is drawn, not the latest.

  Args:
    data: what is taken of it, with all limits (limits.filled).
    tokenizer: of the model.
    dataset: the data set, if it is open already.

  Raises ValueError, which names the field, if nobody is left to train on.
  """
  dataset = dataset or builders.of(data)
  by = partition_of(data)
  everyone, order_E = all_clients(dataset, by)
  clients = _with_enough(everyone, data.min_examples)
  natural = by.name == partition.NATURAL
  unseen_N = _unseen(clients, data, dataset.builder.train_from if natural else 0)
  groups = _split(clients, unseen_N, data.heldout_fraction)
  trainable = len(groups['train'].ids)
  if data.num_people:
    groups = _keep(groups, data.num_people)
  left_out = LeftOut(
    clients=len(everyone.ids),
    examples=int(everyone.count.sum()),
    too_few=len(everyone.ids) - len(clients.ids),
    examples_of_too_few=int(everyone.count.sum() - clients.count.sum()),
    not_kept=trainable - len(groups['train'].ids),
  )
  groups['train'] = groups['train'].repeat(data.copies)
  read = reader(dataset, tokenizer, data, order_E)
  return Population(
    groups=groups,
    read=read,
    left_out=left_out,
    digest=dataset.digest,
    revision=dataset.revision,
  )


def partition_of(data: config.Data) -> partition.Partition:
  """Returns the rule that makes the clients."""
  return partition.Partition(
    name=data.partition,
    clients=data.partition_clients,
    alpha=data.partition_alpha,
    seed=data.partition_seed,
  )


def all_clients(
  dataset: builders.Dataset, by: partition.Partition
) -> tuple[Group, np.ndarray | None]:
  """Returns all clients, and which example each of their rows is.

  None means that a row is an example's own, as it is with natural clients.
  """
  people = list(dataset.people)
  ids = tuple(person['client'].decode() for person in people)
  count = np.array([person['count'] for person in people])
  if by.name == partition.NATURAL:
    if '' in ids:
      raise config.ConfigError(
        f'config.data.partition={by.name!r}: the data have no clients: name their '
        'column by config.data.client, or make clients, as by partition=iid.'
      )
    return Group(ids=ids, first=np.cumsum(count) - count, count=count), None
  labels = np.repeat(ids, count)
  if dataset.builder.labelled:
    labels = np.concatenate([person['labels'] for person in people])
  if by.name in partition.BY_LABEL and not any(labels):
    raise config.ConfigError(
      f'config.data.partition={by.name!r} goes by labels: name their column by '
      'config.data.label, or take partition=iid or by_size.'
    )
  rows = partition.draw(by, labels)
  count = np.array([len(r) for r in rows])
  ids = tuple(f'{by.name}-{i:06d}' for i in range(len(rows)))
  made = Group(ids=ids, first=np.cumsum(count) - count, count=count)
  return made, np.concatenate(rows)


def _with_enough(clients: Group, min_examples: int) -> Group:
  if min_examples > clients.count.max():
    raise ValueError(
      f'{min_examples=} leaves nobody: the busiest client has '
      f'{clients.count.max()} examples; lower min_examples.'
    )
  return clients.select(clients.count >= min_examples)


def _unseen(clients: Group, data: config.Data, train_from: int) -> np.ndarray:
  """Tells who is never trained on: who has too few examples, or by a hash."""
  if train_from:
    unseen_N = clients.count < train_from
    why = (
      f'{data.name!r} trains on people of {train_from} examples or more, and '
      'there are none: give it all of its data.'
    )
  else:
    unseen_N = _is_unseen(clients.ids, data.unseen_fraction)
    why = (
      f'unseen_fraction={data.unseen_fraction} sets aside all {len(clients.ids)} '
      f'people with min_examples={data.min_examples}; lower either.'
    )
  if unseen_N.all():
    raise ValueError(why)
  return unseen_N


def _is_unseen(ids: tuple[str, ...], fraction: float) -> np.ndarray:
  return np.array([_hash(i) < fraction * 2**64 for i in ids])


def _hash(client_id: str, salt: bytes = b'') -> int:
  """Returns a number below 2**64, uniform over ids; salts are independent."""
  id_bytes = client_id.encode()
  digest = hashlib.blake2b(id_bytes, digest_size=8, salt=salt).digest()
  return int.from_bytes(digest, 'big')


def _split(
  clients: Group, unseen_N: np.ndarray, heldout_fraction: float
) -> dict[Kind, Group]:
  """Sets the unseen aside, and the latest examples of all others."""
  seen = clients.select(~unseen_N)
  late_N = np.maximum(1, (seen.count * heldout_fraction).astype(np.int64))
  early_N = seen.count - late_N
  return {
    'train': dataclasses.replace(seen, count=early_N),
    'heldout': dataclasses.replace(seen, first=seen.first + early_N, count=late_N),
    'unseen': clients.select(unseen_N),
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
  return {
    'train': groups['train'].select(keep_N),
    'heldout': groups['heldout'].select(keep_N),
    'unseen': groups['unseen'],
  }


def reader(
  dataset: builders.Dataset,
  tokenizer: Tokenizer,
  data: config.Data,
  order_E: np.ndarray | None = None,
) -> Callable[[int], Example]:
  """Returns (row, target) -> its example; rows are those of `order_E`, if given.

  Without a target the example has its own.
  """
  from hetlora_jax.data import rendering  # only who reads data needs Jinja

  render = rendering.make(data.format, tokenizer).render
  record_of = functools.lru_cache(1)(dataset.examples.__getitem__)  # label after label

  @functools.lru_cache(_CACHED_EXAMPLES)
  def read(row: int, target: str | None = None) -> Example:
    record = record_of(row if order_E is None else int(order_E[row]))
    if target is not None:
      record = record | {'target': target.encode()}
    chat = _chat(dataset.builder, record, data.context_turns)
    return encode(tokenizer, render(chat), data.tokens_per_example)

  return read


def _chat(builder: Any, record: dict, max_context_turns: int) -> rendering.Chat:
  """Returns the conversation of a record of the split 'examples'."""
  from hetlora_jax.data import rendering

  bears_from = record.get('bears_from', -1)
  bears_from = None if bears_from < 0 else int(bears_from)
  first = -max_context_turns if bears_from is None else 0
  texts = [text.decode() for text in record['context'][first:]]
  mine = record['mine'][first:].tolist()
  mine = [own and not builder.cue for own in mine]  # no turn of a chat
  roles = [rendering.CLIENT if own else rendering.USER for own in [*mine, True]]
  if record.get('system'):
    roles[0] = rendering.SYSTEM
  turns = [*zip(roles, [*texts, record['target'].decode()], strict=True)]
  return rendering.Chat(turns, bears_from, builder.cue)


def encode(
  tokenizer: Any, text: rendering.Rendered, most_tokens: int | None = None
) -> Example:
  """Encodes prompt, cue and completion apart, as they are in generation.

  A prompt that has a cue is cut before it so that all three take at most
  `most_tokens` positions; one without is left whole, for packing to cut.
  """
  to_ids = tokenizer.encode_special if text.special else tokenizer.encode
  spelled = text.special or tokenizer.bos_id is None
  start, earlier = [] if spelled else [tokenizer.bos_id], []
  for prompt, completion in text.earlier:
    start += to_ids(prompt)
    said = to_ids(completion)
    earlier += range(len(start), len(start) + len(said))
    start += said
  prompt_tokens, target_tokens = to_ids(text.prompt), to_ids(text.completion)
  first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
  if not start and (not prompt_tokens or prompt_tokens[0] == first):
    start, prompt_tokens = [first], prompt_tokens[1:]  # something must come first
  cut = 0
  if text.cue:
    cue_tokens = to_ids(text.cue)
    if most_tokens is not None:
      room = max(0, most_tokens - len(cue_tokens) - len(target_tokens))
      cut = max(0, len(prompt_tokens) - room)
      prompt_tokens = prompt_tokens[:room]
    prompt_tokens = prompt_tokens + cue_tokens
  tokens = np.asarray([*start, *prompt_tokens, *target_tokens], np.int32)
  num_bos = int(tokens[0] == first)
  return Example(tokens, len(target_tokens), cut, num_bos, earlier)


def corpus(dataset: builders.Dataset, num_texts: int = 4096) -> Iterator[str]:
  """Yields texts, spread evenly over clients, to train a tokenizer on."""
  from hetlora_jax.data import rendering

  for row in evenly_spaced(len(dataset.examples), num_texts):
    record = dataset.examples[int(row)]
    text = rendering.as_data_set(_chat(dataset.builder, record, MAX_CONTEXT_TURNS))
    yield ''.join(itertools.chain(*text.earlier, text[:1], [text.cue, text.completion]))


def evenly_spaced(available: int, count: int) -> np.ndarray:
  """Returns `count` numbers below `available`, or all if there are fewer."""
  count = min(count, available)
  return np.arange(count) * available // max(count, 1)
