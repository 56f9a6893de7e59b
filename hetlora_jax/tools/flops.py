"""Counts the floating-point operations that a round needs, by formula."""

from typing import NamedTuple

import numpy as np

from hetlora_jax.models import decoder
from hetlora_jax.types import Cohort


class Work(NamedTuple):
  """The sizes of a cohort's batches that its work depends on, without padding."""

  tokens: int
  tokens_times_rank: int  # each token counts with its client's rank
  pairs: int  # of a query and a key that it attends to
  targets: int


def count_work(cohort: Cohort, rank_N: np.ndarray) -> Work:
  """Counts the tokens, pairs and targets of a cohort."""
  batches = cohort.batches
  real_CSPT = np.asarray(batches.segment) > 0
  # A padding client has the id N, and no tokens.
  rank_C = rank_N[np.minimum(cohort.client_id, len(rank_N) - 1)]
  return Work(
    tokens=int(real_CSPT.sum()),
    tokens_times_rank=int((real_CSPT.sum((1, 2, 3)) * rank_C).sum()),
    pairs=int((np.asarray(batches.position)[real_CSPT] + 1).sum()),
    targets=int((np.asarray(batches.weight) > 0).sum()),
  )


def count_flops(
  shape: decoder.DecoderConfig, dims: dict, work: Work, trains_base: bool = False
) -> dict[str, float]:
  """Counts the floating-point operations of a round, by kind.

  Args:
    shape: of the model.
    dims: target -> (num_layers, d_in, d_out) of the adapters.
    work: see `count_work`.
    trains_base: whether the base has gradients too (full fine-tuning).

  Returns:
    The operations of frozen products, of adapters ('lora'), of attention and of
    the output head.
  """
  # Multiplications of one token with the base's matrices, each once forward and
  # once for the gradient of its input.
  matrices = decoder.matrix_dims(shape).items()
  forward = shape.num_layers * sum(d_in * d_out for _, (d_in, d_out) in matrices)
  # Nothing before the first layer is trained, so its input needs no gradient.
  backward = forward - sum(a * b for name, (a, b) in matrices if name in 'qkv')
  if trains_base:
    backward = 2 * forward
  per_rank = sum(layers * (a + b) for layers, a, b in dims.values())
  # Scores and the mean of values, each once forward and twice backward.
  attention = 6 * shape.num_layers * shape.num_heads * shape.head_dim
  # Logits and the mean embedding; both again for gradients of the embedding.
  passes = 8.0 if trains_base else 4.0
  return {
    'frozen': 2.0 * work.tokens * (forward + backward),
    # x A and (x A) B, and the two gradients of each.
    'lora': 6.0 * work.tokens_times_rank * per_rank,
    'attention': 2.0 * work.pairs * attention,
    'head': passes * work.targets * shape.width * shape.vocab_size,
  }
