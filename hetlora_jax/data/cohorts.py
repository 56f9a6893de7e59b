"""The people of a round and their batches: a function of (seed, round).

What a client trains on is a function of (seed, round, client) alone, so it
does not depend on who else was sampled nor on which host builds it. Pooled
cohorts, of centralised training, draw the very same examples.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from hetlora_jax import prng
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example, Kind, People, evenly_spaced
from hetlora_jax.types import Batch, Cohort

Sampling = Literal['uniform', 'by_size']
Count = Literal['dataset', 'round']


class _Share(NamedTuple):
  """What a client trains on in a round, in order, and how much it counts."""

  num_examples: int
  examples: list[Example]


def sample_clients(
  seed: int,
  round: int,
  num_clients: int,
  clients_per_round: int,
  weights: np.ndarray | None = None,
) -> np.ndarray:
  """Draws clients without replacement, each draw in proportion to `weights`.

  Returns indices below `num_clients`, [clients_per_round] int32.
  """
  if not 0 < clients_per_round <= num_clients:
    raise ValueError(
      f'{clients_per_round=} must be in [1, {num_clients}], the population.'
    )
  rng = prng.host_stream(seed, 'cohort', round)
  p_N = None if weights is None else weights / weights.sum()
  client_C = rng.choice(num_clients, clients_per_round, replace=False, p=p_N)
  return client_C.astype(np.int32)


def _weights(people: People, sampling: Sampling) -> np.ndarray | None:
  if sampling not in ('uniform', 'by_size'):
    raise ValueError(f"{sampling=} must be 'uniform' or 'by_size'.")
  return people.num_examples if sampling == 'by_size' else None


def _stack(batches: Sequence) -> Batch:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def _num_steps(
  seed: int, round: int, client: int, min_steps: int, local_steps: int
) -> int:
  """Draws how many of `local_steps` a client takes, `min_steps` at least."""
  if min_steps == local_steps:
    return local_steps
  rng = prng.host_stream(seed, 'steps', round, client)
  return int(rng.integers(min_steps, local_steps, endpoint=True))


def _draw(
  people: People,
  seed: int,
  round: int,
  client: int,
  *,
  count: Count,
  min_steps: int,
  local_steps: int,
  local_batch: int,
) -> _Share:
  """Draws a client's examples, each at most once; fewer steps are a prefix."""
  rng = prng.host_stream(seed, 'examples', round, client)
  available = int(people.num_examples[client])
  wanted = min(local_steps * local_batch, available)
  steps = _num_steps(seed, round, client, min_steps, local_steps)
  chosen = rng.choice(available, wanted, replace=False)[: steps * local_batch]
  examples = [people.example('train', client, int(i)) for i in chosen]
  return _Share(available if count == 'dataset' else len(examples), examples)


def _pool(shares: Sequence[_Share], rng: np.random.Generator) -> _Share:
  """Shuffles everybody's examples together; what they count adds up."""
  examples = [example for share in shares for example in share.examples]
  order = rng.permutation(len(examples))
  total = sum(share.num_examples for share in shares)
  return _Share(total, [examples[i] for i in order])


def _cohort(
  client_id: np.ndarray,
  shares: Sequence[_Share],
  steps: int,
  batch: int,
  shape: dict,
) -> Cohort:
  """Packs the examples of each client, `batch` of them a step."""
  starts = range(0, steps * batch, batch)

  def pack(examples: list[Example]) -> Batch:
    return _stack([packing.pack(examples[i : i + batch], **shape) for i in starts])

  return Cohort(
    client_id=client_id.astype(np.int32),
    num_examples=np.array([s.num_examples for s in shares], np.float32),
    batches=_stack([pack(share.examples) for share in shares]),
  )


def _check_cohort(
  *,
  clients_per_round: int,
  local_steps: int,
  min_steps: int,
  count: Count,
  pooled: bool,
  pad_to: int,
) -> None:
  """Raises ValueError at the first value that cannot work."""
  if pooled and pad_to < 1:
    raise ValueError(f'{pad_to=} leaves no pooled client; raise it to 1.')
  if not pooled and pad_to < clients_per_round:
    raise ValueError(f'{pad_to=} is below {clients_per_round=}; raise it.')
  if not 1 <= min_steps <= local_steps:
    raise ValueError(f'{min_steps=} must be in [1, {local_steps=}].')
  if count not in ('dataset', 'round'):
    raise ValueError(f"{count=} must be 'dataset' or 'round'.")


def make_cohort(
  people: People,
  *,
  seed: int,
  round: int,
  clients_per_round: int,
  local_steps: int,
  min_steps: int,
  local_batch: int,
  rows: int,
  row_tokens: int,
  num_targets: int,
  sampling: Sampling,
  count: Count,
  pooled: bool,
  pad_to: int,
  only: slice = slice(None),
) -> Cohort:
  """Samples a round's clients and packs their batches; leaves are in numpy.

  A client sees each example at most once a round; one who has too few for all
  steps has padding in the last. `only` builds just that slice of the clients.

  Args:
    people: the population, N.
    seed: with `round`, of everything drawn.
    round: counts from 0.
    clients_per_round: how many are sampled.
    local_steps: most steps of a client.
    min_steps: fewest; a client's number is drawn from min_steps..local_steps,
      and its later steps are padding.
    local_batch: examples a step.
    rows: of a step's batch, as are `row_tokens` and `num_targets`.
    row_tokens: positions of a row.
    num_targets: room for target tokens.
    sampling: 'uniform', or 'by_size' of people's data.
    count: what `num_examples` is: 'dataset', all training examples a person
      has (n_k of FedAvg), or 'round', those it trains on in this round.
    pooled: centralised training: instead of the clients, one of id 0 with all
      of their examples, shuffled, in clients_per_round * local_steps steps;
      its `num_examples` is their sum.
    pad_to: padding clients, of id N and no examples, fill up to so many.
    only: which of these to build.
  """
  _check_cohort(
    clients_per_round=clients_per_round,
    local_steps=local_steps,
    min_steps=min_steps,
    count=count,
    pooled=pooled,
    pad_to=pad_to,
  )
  population = len(people.client_ids)
  sampled_C = sample_clients(
    seed, round, population, clients_per_round, _weights(people, sampling)
  )
  real_C = np.zeros(1) if pooled else sampled_C
  client_C = np.full(pad_to, population)
  client_C[: len(real_C)] = real_C
  client_C = client_C[only]
  draw = functools.partial(
    _draw,
    people,
    seed,
    round,
    count=count,
    min_steps=min_steps,
    local_steps=local_steps,
    local_batch=local_batch,
  )

  def share(client: int) -> _Share:
    if client == population:
      return _Share(0, [])
    if pooled:
      rng = prng.host_stream(seed, 'pool', round)
      return _pool([draw(int(c)) for c in sampled_C], rng)
    return draw(client)

  return _cohort(
    client_C,
    [share(int(client)) for client in client_C],
    steps=local_steps * (clients_per_round if pooled else 1),
    batch=local_batch,
    shape=dict(rows=rows, row_tokens=row_tokens, num_targets=num_targets),
  )


def evaluation_set(
  people: People,
  kind: Kind,
  *,
  num_people: int,
  examples_per_person: int,
  rows: int,
  row_tokens: int,
  num_targets: int,
  multiple_of: int = 1,
) -> Cohort:
  """Packs one batch a person, of people and turns spread evenly over all.

  The same for every seed. Leaves of `batches` are [E, 1, ...]; `client_id` is
  N for the unseen, who have no place among the clients. People without any
  target fill up to a multiple of `multiple_of`.
  """
  group = people.groups[kind]
  if not 0 < num_people <= len(group.ids):
    raise ValueError(
      f'{num_people=} must be in [1, {len(group.ids)}], the {kind} people; '
      'change it, unseen_fraction or min_examples.'
    )
  person_E = evenly_spaced(len(group.ids), num_people)

  def share(person: int) -> _Share:
    chosen = evenly_spaced(int(group.count[person]), examples_per_person)
    examples = [people.example(kind, person, int(i)) for i in chosen]
    return _Share(len(examples), examples)

  population = len(people.client_ids)
  padding = -num_people % multiple_of
  client_E = np.full(num_people + padding, population)
  if kind != 'unseen':
    client_E[:num_people] = person_E
  nobody = [_Share(0, [])] * padding
  return _cohort(
    client_E,
    [*[share(int(person)) for person in person_E], *nobody],
    steps=1,
    batch=examples_per_person,
    shape=dict(rows=rows, row_tokens=row_tokens, num_targets=num_targets),
  )
