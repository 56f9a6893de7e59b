"""Makes clients by a rule from all examples, in place of the natural clients.

Each rule is (labels [E], clients, alpha, rng) -> the client of each example,
[E]; a label is the author, or what the data set says an example is about. The
draws depend on the partition's own seed alone, so clients are the same in
every run.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from hetlora_jax import prng

NATURAL = 'natural'
Partitioner = Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
  """Which rule makes how many clients; 'natural' ones are the data set's."""

  name: str = NATURAL
  clients: int = 100
  alpha: float = 1.0
  seed: int = 0


def iid(label_E, clients: int, alpha: float, rng) -> np.ndarray:
  """Shuffles, then deals equal parts (McMahan et al., 2017, 1602.05629)."""
  del alpha
  return rng.permutation(len(label_E)) % clients


def dirichlet(label_E, clients: int, alpha: float, rng) -> np.ndarray:
  """Deals each label's examples by shares drawn from Dirichlet(alpha).

  Yurochkin et al. (2019), 1905.12022; small alphas give a label to few.
  """
  client_E = np.zeros(len(label_E), np.int64)
  for label in np.unique(label_E):
    rows = rng.permutation(np.flatnonzero(label_E == label))
    client_E[rows] = _shared(rows.size, rng.dirichlet([alpha] * clients))
  return client_E


def by_size(label_E, clients: int, alpha: float, rng) -> np.ndarray:
  """Shuffles, then gives client k a share in proportion to (k + 1)**-alpha.

  Sizes of a power law, as in Li et al. (2020), 1812.06127.
  """
  share_N = np.arange(1, clients + 1, dtype=np.float64) ** -alpha
  client_E = _shared(len(label_E), share_N / share_N.sum())
  return rng.permutation(client_E)


def pathological(label_E, clients: int, alpha: float, rng) -> np.ndarray:
  """Gives each client `alpha` shards of the examples sorted by label.

  McMahan et al. (2017), 1602.05629, with two: almost every client has
  examples of so many labels at most.
  """
  shards = clients * int(alpha)
  order = rng.permutation(len(label_E))
  order = order[np.argsort(label_E[order], kind='stable')]
  shard_E = np.arange(len(label_E)) * shards // len(label_E)
  client_E = np.zeros(len(label_E), np.int64)
  client_E[order] = (rng.permutation(shards) % clients)[shard_E]
  return client_E


def _shared(count: int, share_N: np.ndarray) -> np.ndarray:
  """Returns clients 0, 0, ..., 1, ... of `count` examples, by their shares."""
  ends = np.round(np.cumsum(share_N) * count)
  return np.minimum(np.searchsorted(ends, np.arange(count), 'right'), len(share_N) - 1)


PARTITIONERS: dict[str, Partitioner] = {
  'iid': iid,
  'dirichlet': dirichlet,
  'by_size': by_size,
  'pathological': pathological,
}


BY_LABEL = ('dirichlet', 'pathological')  # the others look at no label


def draw(by: Partition, labels: np.ndarray) -> list[np.ndarray]:
  """Returns the rows of each client, shuffled; every row is one client's."""
  if by.name not in PARTITIONERS:
    raise ValueError(
      f'partition={by.name!r} is unknown; one of {[NATURAL, *PARTITIONERS]}.'
    )
  if not 0 < by.clients <= len(labels):
    raise ValueError(
      f'partition_clients={by.clients} must be in [1, {len(labels)}], the examples.'
    )
  rng = prng.host_stream(by.seed, 'partition')
  _, label_E = np.unique(labels, return_inverse=True)
  client_E = PARTITIONERS[by.name](label_E, by.clients, by.alpha, rng)
  order = rng.permutation(len(client_E))
  order = order[np.argsort(client_E[order], kind='stable')]
  ends = np.cumsum(np.bincount(client_E, minlength=by.clients))
  return np.split(order, ends[:-1])
