"""Parameters a round trains and sends up and down, by formula, on the host.

The formulas are those of the methods' papers; scalars (norms, counts, seeds)
are left out.
"""

from typing import NamedTuple

import numpy as np

from hetlora_jax.types import Array, Norms

Dims = dict[str, tuple[int, int, int]]  # target -> (num_layers, d_in, d_out)


class Traffic(NamedTuple):
  """Numbers of parameters, of all clients of a round together."""

  trained: int
  up: int
  down: int


def _each_matrix(dims: Dims, values: dict) -> np.ndarray:
  """Lists a value of every matrix, in the order of sorted targets, layers."""
  return np.concatenate([np.broadcast_to(values[t], dims[t][0]) for t in sorted(dims)])


def _sizes(dims: Dims, factors: str) -> np.ndarray:
  """Returns the parameters a rank of `factors` ('ab', 'b') has, a matrix."""
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


def _live(rules: dict[str, str], round: int) -> str:
  """Returns the factors that are trained in a round."""
  if rules['trainable'] == 'alternating':
    return 'ba'[round % 2]
  return 'b' if rules['trainable'] == 'b_only' else 'ab'


def _fold(rules, dims: Dims, kept_CG, fold_rank: Norms) -> int:
  """Counts what one client receives of what was folded into the base.

  Low-rank factors, or the whole matrix where that is less.
  """
  how = rules['redistribution']
  if how == 'fold_all':
    rank = kept_CG.sum(0)
  elif how == 'energy' or fold_rank:
    rank = _each_matrix(dims, fold_rank)
  elif how == 'fold_residual':  # the error of averaging K products
    rank = kept_CG.sum(0) - kept_CG.max(0, initial=0)
  else:
    return 0
  products = {t: d_in * d_out for t, (_, d_in, d_out) in dims.items()}
  whole = _each_matrix(dims, products)
  return int(np.minimum(rank * _sizes(dims, 'ab'), whole).sum())


def of_round(
  rules: dict[str, str],
  dims: Dims,
  base_parameters: int,
  *,
  round: int,
  r_max: int,
  sent_CG: np.ndarray,
  kept_CG: np.ndarray,
  fold_rank: Norms,
) -> Traffic:
  """Counts what a round trains and sends.

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
  clients = len(sent_CG)
  if rules['trainable'] == 'base':
    trained = clients * base_parameters
    up, down = len(kept_CG) * base_parameters, trained
  else:
    live = _live(rules, round)
    own = {'none': '', 'b': 'b', 'both': 'ab'}[rules['personal']]
    shared = ''.join(f for f in live if f not in own)
    received_CG = {
      'random_mask': np.full_like(sent_CG, r_max),
      'reinit': np.zeros_like(sent_CG),
    }.get(rules['distribution'], sent_CG)
    trained = lora_parameters(sent_CG, dims, live)
    up = lora_parameters(kept_CG, dims, shared)
    down = lora_parameters(received_CG, dims, shared)
    down += clients * _fold(rules, dims, kept_CG.astype(np.int64), fold_rank)
  if rules['cohort'] == 'pooled':
    up = down = 0
  return Traffic(trained, up, down)
