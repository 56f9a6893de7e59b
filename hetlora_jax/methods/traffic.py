"""What a round trains and sends up and down, by formula, on the host.

The formulas are those of the methods' papers, stated by their rules; scalars (norms,
counts, seeds) are left out. A message is made of vectors, the rank slots of A and B or
the rows of the base: each takes so many bytes, and each of its values.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hetlora_jax import wire
from hetlora_jax.methods.registry import Rule, traits_of
from hetlora_jax.types import Array, Norms

Dims = dict[str, tuple[int, int, int]]  # target -> (num_layers, d_in, d_out)


class Traffic(NamedTuple):
  """Of all clients of a round together; None: not stated."""

  trained: int | None  # parameters
  up: int | None  # bytes, as `down`
  down: int | None


PARAMETERS = wire.Type(1, 0, None)  # counts values instead of bytes


def _each_matrix(dims: Dims, values: dict) -> np.ndarray:
  """Lists a value of every matrix, in the order of sorted targets, layers: [M]."""
  return np.concatenate([np.broadcast_to(values[t], dims[t][0]) for t in sorted(dims)])


def _sizes(dims: Dims, factors: str, each: wire.Type) -> np.ndarray:
  """Returns how many bytes a rank of `factors` ('ab', 'b') has, [M]."""
  place = {'a': 1, 'b': 2}
  sizes = {
    t: sum(dim[place[f]] * each.value_bytes + each.vector_bytes for f in factors)
    for t, dim in dims.items()
  }
  return _each_matrix(dims, sizes)


def lora_parameters(
  rank_CG: Array, dims: Dims, factors: str = 'ab', each: wire.Type = PARAMETERS
) -> int:
  """Counts the parameters of rank-r adapters: sum of (d_in + d_out) r.

  Args:
    rank_CG: ranks of the clients that take part, one each or one a matrix (in
      the order of sorted targets, then layers).
    dims: target -> (num_layers, d_in, d_out).
    factors: which of A and B count.
    each: by the bytes of which type; by default it counts parameters.

  >>> lora_parameters(np.array([[2], [5]]), {'q': (3, 10, 20)})
  630
  """
  rank = np.asarray(rank_CG, np.int64)
  return int((rank * _sizes(dims, factors, each)).sum()) if rank.size else 0


def _folded(rank_M: np.ndarray | int, dims: Dims, each: wire.Type) -> int:
  """Counts what one client receives of a change of the base of these ranks.

  Low-rank factors, or where that is less the whole matrix, their very product.
  """
  exact = wire.TYPES['float32'] if each.round else each
  products = {
    t: d_in * d_out * exact.value_bytes for t, (_, d_in, d_out) in dims.items()
  }
  whole = _each_matrix(dims, products)
  return int(np.minimum(rank_M * _sizes(dims, 'ab', each), whole).sum())


def of_round(
  rules: Mapping[str, Rule],
  dims: Dims,
  base: tuple[int, int],
  *,
  round: int,
  r_max: int,
  sent_CG: np.ndarray,
  kept_CG: np.ndarray,
  fold_rank: Norms,
  each: wire.Type = PARAMETERS,
) -> Traffic:
  """Counts what a round trains and sends, from what its rules state.

  Args:
    rules: role -> rule.
    dims: target -> (num_layers, d_in, d_out).
    base: how many parameters and rows the base model has.
    round: from 0; methods that alternate send other factors in odd rounds.
    r_max: rank slots.
    sent_CG: ranks of the clients that received and trained.
    kept_CG: ranks of those that reported, after pruning.
    fold_rank: target -> [L], ranks of what was folded where they are data.
    each: the type of what is sent.
  """
  clients, traits = len(sent_CG), traits_of(rules)
  trained = up = down = None
  trains, receives, changes = (
    rules[role].traffic for role in ('trainable', 'distribution', 'redistribution')
  )
  if 'trains base' in traits:
    whole = base[0] * each.value_bytes + base[1] * each.vector_bytes
    trained, up, down = clients * base[0], len(kept_CG) * whole, clients * whole
  elif trains:
    live = trains(round)
    shared = ''.join(f for f in live if f not in rules['personal'].own_factors)
    trained = lora_parameters(sent_CG, dims, live)
    up = lora_parameters(kept_CG, dims, shared, each)
    if receives and changes:
      fold_rank_M = _each_matrix(dims, fold_rank) if fold_rank else None
      down = lora_parameters(receives(sent_CG, r_max), dims, shared, each)
      ranks_M = changes(kept_CG.astype(np.int64), fold_rank_M)
      down += clients * _folded(ranks_M, dims, each)
  if 'pools data' in traits:
    up = down = 0
  return Traffic(trained, up, down)
