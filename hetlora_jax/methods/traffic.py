"""Parameters a round trains and sends up and down, by formula, on the host.

The formulas are those of the methods' papers, stated by their rules; scalars (norms,
counts, seeds) are left out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hetlora_jax.methods.registry import Rule, traits_of
from hetlora_jax.types import Array, Norms

Dims = dict[str, tuple[int, int, int]]  # target -> (num_layers, d_in, d_out)


class Traffic(NamedTuple):
  """Numbers of parameters, of all clients of a round together; None: not stated."""

  trained: int | None
  up: int | None
  down: int | None


def _each_matrix(dims: Dims, values: dict) -> np.ndarray:
  """Lists a value of every matrix, in the order of sorted targets, layers: [M]."""
  return np.concatenate([np.broadcast_to(values[t], dims[t][0]) for t in sorted(dims)])


def _sizes(dims: Dims, factors: str) -> np.ndarray:
  """Returns how many parameters a rank of `factors` ('ab', 'b') has, [M]."""
  place = {'a': 1, 'b': 2}
  return _each_matrix(
    dims, {t: sum(dim[place[f]] for f in factors) for t, dim in dims.items()}
  )


def lora_parameters(rank_CG: Array, dims: Dims, factors: str = 'ab') -> int:
  """Counts the parameters of rank-r adapters: sum of (d_in + d_out) r.

  Args:
    rank_CG: ranks of the clients that take part, one each or one a matrix (in
      the order of sorted targets, then layers).
    dims: target -> (num_layers, d_in, d_out).
    factors: which of A and B count.

  >>> lora_parameters(np.array([[2], [5]]), {'q': (3, 10, 20)})
  630
  """
  rank = np.asarray(rank_CG, np.int64)
  return int((rank * _sizes(dims, factors)).sum()) if rank.size else 0


def _folded(rank_M: np.ndarray | int, dims: Dims) -> int:
  """Counts what one client receives of a change of the base of these ranks.

  Low-rank factors, or the whole matrix where that is less.
  """
  products = {t: d_in * d_out for t, (_, d_in, d_out) in dims.items()}
  whole = _each_matrix(dims, products)
  return int(np.minimum(rank_M * _sizes(dims, 'ab'), whole).sum())


def of_round(
  rules: Mapping[str, Rule],
  dims: Dims,
  base_parameters: int,
  *,
  round: int,
  r_max: int,
  sent_CG: np.ndarray,
  kept_CG: np.ndarray,
  fold_rank: Norms,
) -> Traffic:
  """Counts what a round trains and sends, from what its rules state.

  Args:
    rules: role -> rule.
    dims: target -> (num_layers, d_in, d_out).
    base_parameters: of the base model.
    round: from 0; methods that alternate send other factors in odd rounds.
    r_max: rank slots.
    sent_CG: ranks of the clients that received and trained.
    kept_CG: ranks of those that reported, after pruning.
    fold_rank: target -> [L], ranks of what was folded where they are data.
  """
  clients, traits = len(sent_CG), traits_of(rules)
  trained = up = down = None
  trains, receives, changes = (
    rules[role].traffic for role in ('trainable', 'distribution', 'redistribution')
  )
  if 'trains base' in traits:
    trained = down = clients * base_parameters
    up = len(kept_CG) * base_parameters
  elif trains:
    live = trains(round)
    shared = ''.join(f for f in live if f not in rules['personal'].own_factors)
    trained = lora_parameters(sent_CG, dims, live)
    up = lora_parameters(kept_CG, dims, shared)
    if receives and changes:
      fold_rank_M = _each_matrix(dims, fold_rank) if fold_rank else None
      down = lora_parameters(receives(sent_CG, r_max), dims, shared)
      down += clients * _folded(changes(kept_CG.astype(np.int64), fold_rank_M), dims)
  if 'pools data' in traits:
    up = down = 0
  return Traffic(trained, up, down)
