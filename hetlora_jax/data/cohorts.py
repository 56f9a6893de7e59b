"""The people of a round and their batches: a function of (seed, round).

What a client trains on is a function of (seed, round, client) alone, so it
does not depend on who else was sampled nor on which host builds it.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from hetlora_jax import prng
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example, Kind, People, evenly_spaced
from hetlora_jax.types import Batch, Cohort

Sampling = Literal['uniform', 'by_size']


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


def _draw_examples(
  people: People, seed: int, round: int, client: int, count: int
) -> list[Example]:
  """Draws up to `count` of a client's training examples, each at most once."""
  rng = prng.host_stream(seed, 'examples', round, client)
  available = people.num_examples[client]
  chosen = rng.choice(available, min(count, available), replace=False)
  return [people.example('train', client, int(i)) for i in chosen]


def _cohort(
  client_id: np.ndarray, examples: list[list[list[Example]]], shape: dict
) -> Cohort:
  """Packs the examples of each client and step."""
  return Cohort(
    client_id=client_id.astype(np.int32),
    num_examples=np.array(
      [sum(map(len, steps)) for steps in examples], np.float32
    ),
    batches=_stack(
      [
        _stack([packing.pack(step, **shape) for step in steps])
        for steps in examples
      ]
    ),
  )


def make_cohort(
  people: People,
  *,
  seed: int,
  round: int,
  clients_per_round: int,
  local_steps: int,
  local_batch: int,
  rows: int,
  row_tokens: int,
  num_targets: int,
  sampling: Sampling,
  pad_to: int,
  only: slice = slice(None),
) -> Cohort:
  """Samples a round's clients and packs their batches; leaves are in numpy.

  Padding clients, with id N and no examples, fill up to `pad_to`. A client
  sees each example at most once a round; one who has too few for all steps
  has padding in the last. `only` builds just that slice of the clients.
  """
  if pad_to < clients_per_round:
    raise ValueError(f'{pad_to=} is below {clients_per_round=}; raise it.')
  population = len(people.client_ids)
  weights = _weights(people, sampling)
  client_C = np.full(pad_to, population)
  client_C[:clients_per_round] = sample_clients(
    seed, round, population, clients_per_round, weights
  )
  client_C = client_C[only]

  def steps(client: int) -> list[list[Example]]:
    examples = []
    if client < population:
      count = local_steps * local_batch
      examples = _draw_examples(people, seed, round, client, count)
    starts = range(0, local_steps * local_batch, local_batch)
    return [examples[i : i + local_batch] for i in starts]

  shape = dict(rows=rows, row_tokens=row_tokens, num_targets=num_targets)
  return _cohort(client_C, [steps(int(c)) for c in client_C], shape)


def evaluation_set(
  people: People,
  kind: Kind,
  *,
  num_people: int,
  examples_per_person: int,
  rows: int,
  row_tokens: int,
  num_targets: int,
) -> Cohort:
  """Packs one batch a person, of people and turns spread evenly over all.

  The same for every seed. Leaves of `batches` are [E, 1, ...]; `client_id` is
  N for the unseen, who have no place among the clients.
  """
  group = people.groups[kind]
  if not 0 < num_people <= len(group.ids):
    raise ValueError(
      f'{num_people=} must be in [1, {len(group.ids)}], the {kind} people; '
      'change it, unseen_fraction or min_examples.'
    )
  person_E = evenly_spaced(len(group.ids), num_people)

  def only_step(person: int) -> list[list[Example]]:
    chosen = evenly_spaced(int(group.count[person]), examples_per_person)
    return [[people.example(kind, person, int(i)) for i in chosen]]

  shape = dict(rows=rows, row_tokens=row_tokens, num_targets=num_targets)
  population = len(people.client_ids)
  return _cohort(
    np.full_like(person_E, population) if kind == 'unseen' else person_E,
    [only_step(int(person)) for person in person_E],
    shape,
  )
