"""Parameters a round sends up and down, by formula, on the host."""

import numpy as np

from hetlora_jax.types import Array


def lora_parameters(
  rank_CG: Array, dims: dict[str, tuple[int, int, int]]
) -> int:
  """Counts the parameters of rank-r adapters: sum of (d_in + d_out) r.

  Args:
    rank_CG: ranks of the clients that take part, one each or one a matrix (in
      the order of sorted targets, then layers).
    dims: target -> (num_layers, d_in, d_out).
  """
  per_matrix = np.concatenate(
    [np.full(dims[t][0], dims[t][1] + dims[t][2]) for t in sorted(dims)]
  )
  rank = np.asarray(rank_CG, np.int64)
  return int((rank * per_matrix).sum()) if rank.size else 0
