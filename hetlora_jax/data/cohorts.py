"""The clients of a round and their batches: a function of (seed, round).

What a client trains on is a function of (seed, round, client) alone, so it
does not depend on who else was sampled nor on which host builds it. Pooled
cohorts, of centralised training, draw the very same examples.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from hetlora_jax import config, prng
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example, Kind, Population, evenly_spaced
from hetlora_jax.types import Batch, Cohort


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
  """How cohorts are drawn, the same in every round of a run.

  A pooled cohort, of centralised training, has instead of the sampled clients
  one of id 0 with all of their examples, shuffled, in as many steps as theirs
  together; its `num_examples` is their sum.
  """

  federated: config.Federated
  shape: packing.BatchShape  # of the batch of a step
  # What `num_examples` is: all training examples that a client has (n_k of
  # FedAvg), or those that it trains on in this round.
  count: Literal['dataset', 'round']
  pooled: bool
  pad_to: int  # padding clients, of id N and no examples, fill up to so many

  def __post_init__(self):
    """Raises ValueError if `pad_to` leaves no room for the clients."""
    if self.pad_to < self.num_clients:
      raise ValueError(f'pad_to={self.pad_to} is below {self.num_clients} clients.')

  @property
  def num_clients(self) -> int:
    return 1 if self.pooled else self.federated.clients_per_round

  @property
  def num_steps(self) -> int:
    """Returns how many steps a client takes at most."""
    return self.federated.num_steps(self.pooled)

  @property
  def num_batches(self) -> int:
    """Returns how many batches these are."""
    return self.num_steps * self.federated.accumulate


class _Share(NamedTuple):
  """What a client trains on in a round, in order, and how much it counts."""

  num_examples: int
  examples: list[Example]


_NOTHING = _Share(0, [])


def make_cohort(
  population: Population,
  draw: Draw,
  *,
  seed: int,
  round: int,
  only: slice = slice(None),
) -> Cohort:
  """Samples a round's clients and packs their batches; leaves are in numpy.

  A client sees each example at most once a round, or once in each of `local_epochs`;
  one who has too few for all steps has padding in the last. `only` builds just that
  slice of the clients.
  """
  padding = len(population.client_ids)
  by_size = draw.federated.sampling == 'by_size'
  sampled_C = sample_clients(
    seed,
    round,
    padding,
    draw.federated.clients_per_round,
    population.num_examples if by_size else None,
  )
  client_C = np.full(draw.pad_to, padding)
  client_C[: draw.num_clients] = 0 if draw.pooled else sampled_C
  share = functools.partial(_share, population, draw, seed, round)

  def share_at(place: int) -> _Share:
    if client_C[place] == padding:
      return _NOTHING
    if draw.pooled:
      rng = prng.host_stream(seed, 'pool', round)
      return _pool([share(int(client)) for client in sampled_C], rng)
    return share(int(client_C[place]))

  shares = [share_at(place) for place in range(draw.pad_to)[only]]
  batch = draw.federated.local_batch
  starts = range(0, draw.num_batches * batch, batch)
  batches = [[share.examples[i : i + batch] for i in starts] for share in shares]
  return pack(client_C[only], [s.num_examples for s in shares], batches, draw.shape)


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


def _share(
  population: Population, draw: Draw, seed: int, round: int, client: int
) -> _Share:
  """Draws a client's examples; fewer steps are a prefix."""
  f = draw.federated
  rng = prng.host_stream(seed, 'examples', round, client)
  available = int(population.num_examples[client])
  steps = _num_steps(seed, round, client, f)
  chosen = _order(rng, available, f)[: steps * f.step_examples]
  examples = [population.example('train', client, int(i)) for i in chosen]
  return _Share(available if draw.count == 'dataset' else len(examples), examples)


def _order(rng: np.random.Generator, available: int, f: config.Federated) -> np.ndarray:
  """Draws which of its examples a client goes through, each once in a pass."""
  if f.local_epochs is None:
    wanted = min(f.local_steps * f.step_examples, available)
    return rng.choice(available, wanted, replace=False)
  passes = [rng.permutation(available) for _ in range(math.ceil(f.local_epochs))]
  return np.concatenate(passes)[: examples_of_epochs(available, f.local_epochs)]


def examples_of_epochs(available: int, epochs: float) -> int:
  """Returns how many examples so many passes have, one at least."""
  return max(1, round(epochs * available))


def _num_steps(seed: int, round: int, client: int, f: config.Federated) -> int:
  """Draws how many of the local steps a client takes in a round."""
  fewest = f.min_local_steps or f.local_steps
  if fewest == f.local_steps:
    return f.local_steps
  rng = prng.host_stream(seed, 'steps', round, client)
  return int(rng.integers(fewest, f.local_steps, endpoint=True))


def _pool(shares: Sequence[_Share], rng: np.random.Generator) -> _Share:
  """Shuffles all clients' examples together; what they count adds up."""
  examples = [example for share in shares for example in share.examples]
  order = rng.permutation(len(examples))
  total = sum(share.num_examples for share in shares)
  return _Share(total, [examples[i] for i in order])


def pack(
  client_id: np.ndarray,
  num_examples: Sequence[int],
  batches: Sequence[Sequence[Sequence[Example]]],
  shape: packing.BatchShape,
) -> Cohort:
  """Packs the examples of each client and batch: batches[client][step]."""
  return Cohort(
    client_id=client_id.astype(np.int32),
    num_examples=np.array(num_examples, np.float32),
    batches=_stack(
      [_stack([packing.pack(batch, shape) for batch in own]) for own in batches]
    ),
  )


def _stack(batches: Sequence) -> Batch:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def evaluation_set(
  population: Population,
  kind: Kind,
  *,
  num_people: int,
  examples_per_person: int,
  shape: packing.BatchShape,
  multiple_of: int = 1,
) -> Cohort:
  """Packs one batch a person, of people and examples spread evenly over all.

  The same for every seed. Leaves of `batches` are [E, 1, ...]; `client_id` is
  N for the unseen, who have no place among the clients. People without any
  target fill up to a multiple of `multiple_of`.
  """
  client_E, chosen = evaluated(
    population, kind, num_people, examples_per_person, multiple_of
  )
  batches = [[[population.example(kind, *at) for at in own]] for own in chosen]
  return pack(client_E, [len(own) for own in chosen], batches, shape)


def evaluated(
  population: Population,
  kind: Kind,
  num_people: int,
  examples_per_person: int,
  multiple_of: int = 1,
) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
  """Returns who is evaluated on what: see `evaluation_set`.

  Returns:
    The ids of the clients [E], and for each of them (person, example) of all that
    they are evaluated on; those who fill up have none.
  """
  group = population.groups[kind]
  if not 0 < num_people <= len(group.ids):
    raise ValueError(
      f'{num_people=} must be in [1, {len(group.ids)}], the {kind} people; '
      'change it, unseen_fraction or min_examples.'
    )
  person_E = evenly_spaced(len(group.ids), num_people)
  padding = -num_people % multiple_of
  client_E = np.full(num_people + padding, len(population.client_ids))
  if kind != 'unseen':
    client_E[:num_people] = person_E
  chosen = [
    [
      (person, int(i))
      for i in evenly_spaced(int(group.count[person]), examples_per_person)
    ]
    for person in map(int, person_E)
  ]
  return client_E, [*chosen, *[[] for _ in range(padding)]]
