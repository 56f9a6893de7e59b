"""Diagnostics of every method: measured in the round, then put into its row."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hetlora_jax import lora
from hetlora_jax.types import Array, Masks, ServerState


def measure(state: ServerState, weights: Masks, share_C: Array, scale: Array) -> dict:
  """Measures the new state, and the weight that each client had.

  Returns:
    slot_energy: [R], sum over matrices of (scale ||a_j|| ||b_j||)**2; if a few
      first slots have nearly all of it, ranks have collapsed (raFLoRA, arXiv
      2602.13486).
    rank_histogram: [R + 1], how many clients (or matrices of clients) have
      rank 0..R.
    weight: target -> [C], a client's weight, averaged over layers and slots;
      without adapters 'base' -> [C], its weight in the mean of the base's deltas.
  """
  slots = max((x.a.shape[-1] for x in state.adapters.values()), default=0)
  return {
    'slot_energy': lora.slot_energy(state.adapters, scale),
    'rank_histogram': jnp.bincount(state.memory.rank.ravel(), length=slots + 1),
    'weight': jax.tree.map(lambda w: w.mean((1, 2)), weights) or {'base': share_C},
  }


def if_asked(asked: Array | bool, compute: Callable[[], Array]) -> Array:
  """Computes a number [] only if it is asked for; it is NaN otherwise.

  `asked` must be the same for all that is vmapped, or both branches are computed.
  """
  if isinstance(asked, bool):
    return compute() if asked else jnp.float32(jnp.nan)
  return jax.lax.cond(asked, compute, lambda: jnp.float32(jnp.nan))


def rank_classes(r_min: int, r_max: int) -> list[tuple[int, int]]:
  """Splits r_min..r_max into four classes, or one per rank if ranks are fewer."""
  edges = np.unique(np.linspace(r_min, r_max + 1, 5).astype(int))
  return [(int(a), int(b) - 1) for a, b in zip(edges, edges[1:], strict=False)]


def _by_class(out: dict, r_min: int) -> dict[str, float]:
  """Returns the loss and weight of the clients that reported, by class of rank."""
  r_max = len(out['rank_histogram']) - 1
  rank = out['sent_rank'].mean(1)
  weight = np.mean(list(out['weight'].values()), axis=0)
  row = {}
  for low, high in rank_classes(min(r_min, r_max), r_max):
    here = out['reports'] & (rank >= low) & (rank < high + 1)
    tokens = out['tokens'][here].sum()
    if tokens:
      name = f'rank_{low}' if low == high else f'rank_{low}-{high}'
      row[f'train/loss/{name}'] = float(out['loss_sum'][here].sum() / tokens)
      row[f'weight/{name}'] = float(weight[here].sum())
  return row


def _effective(share: np.ndarray) -> float:
  """Returns the effective number of shares, 1 / sum p**2 (n if n are equal)."""
  total = share.sum()
  return float(total**2 / (share**2).sum()) if total > 0 else 0.0


def row(out: dict, r_min: int) -> dict:
  """Returns the diagnostics of a finished round, as fields of its row.

  Args:
    out: the metrics of `federated_round`, in numpy; without `aggregation_error` if
      that was not measured.
    r_min: smallest rank of the population.

  Returns:
    rank/{mean,min,max}, rank/histogram (clients of rank 0..R), energy/slots
    (shares), energy/effective_slots, weight/clients (of those that reported),
    weight/effective_clients, aggregation/error if it was measured, and loss and weight by class of
    rank.
  """
  histogram, energy = out['rank_histogram'], np.asarray(out['slot_energy'])
  occurring = np.flatnonzero(histogram)
  mean = (histogram * np.arange(len(histogram))).sum() / histogram.sum()
  weight_C = np.mean(list(out['weight'].values()), axis=0)
  total, error = energy.sum(), out.get('aggregation_error')
  shares = energy / total if total > 0 else energy
  return {
    'rank/mean': float(mean),
    'rank/min': int(occurring[0]),
    'rank/max': int(occurring[-1]),
    'rank/histogram': [int(n) for n in histogram],
    'energy/slots': [float(x) for x in np.atleast_1d(shares)],
    'energy/effective_slots': _effective(energy),
    'weight/clients': [float(w) for w in weight_C[out['reports']]],
    'weight/effective_clients': _effective(weight_C),
    **({} if error is None else {'aggregation/error': float(error)}),
    **_by_class(out, r_min),
  }
