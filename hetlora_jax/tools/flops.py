"""How many floating-point operations a round needs, counted analytically."""

from typing import NamedTuple

import numpy as np

from hetlora_jax.models import decoder
from hetlora_jax.types import Cohort


class Work(NamedTuple):
  """What a cohort's batches hold; padding is not in it."""

  tokens: int
  tokens_times_rank: int
  pairs: int  # of a query and a key that it sees
  targets: int


def held(cohort: Cohort, rank_N: np.ndarray) -> Work:
  """Counts tokens, pairs and targets of a cohort."""
  batches = cohort.batches
  live = np.asarray(batches.segment) > 0  # [C, S, P, T]
  population = len(rank_N)
  rank_C = rank_N[np.minimum(cohort.client_id, population - 1)]
  return Work(
    tokens=int(live.sum()),
    tokens_times_rank=int((live.sum((1, 2, 3)) * rank_C).sum()),
    pairs=int((np.asarray(batches.position)[live] + 1).sum()),
    targets=int((np.asarray(batches.weight) > 0).sum()),
  )


def needed(
  c: decoder.DecoderConfig, dims: dict, work: Work, trains_base: bool = False
) -> dict[str, float]:
  """Counts the floating-point operations of a round, by kind.

  Args:
    c: the model.
    dims: target -> (num_layers, d_in, d_out) of the adapters.
    work: what the round's batches hold.
    trains_base: whether the base has gradients too (full fine-tuning).
  """
  matrices = decoder.matrix_dims(c).items()
  forward = c.num_layers * sum(d_in * d_out for _, (d_in, d_out) in matrices)
  # Nothing before the first layer is trained: its inputs need no gradient.
  backward = forward - sum(a * b for name, (a, b) in matrices if name in 'qkv')
  slots = sum(layers * (a + b) for layers, a, b in dims.values())
  # Scores and mixing, each once forward and twice back.
  attention = 6 * c.num_layers * c.num_heads * c.head_dim
  if trains_base:
    backward = 2 * forward
  # Logits and their mean of the words; for gradients of the words both again.
  passes = 8.0 if trains_base else 4.0
  return {
    'frozen': 2.0 * work.tokens * (forward + backward),
    # x A and (x A) B, and two gradients of each.
    'lora': 6.0 * work.tokens_times_rank * slots,
    'attention': 2.0 * work.pairs * attention,
    'head': passes * work.targets * c.width * c.vocab_size,
  }
