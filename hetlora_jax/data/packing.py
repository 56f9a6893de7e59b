"""Packs several examples into one row, so that few positions are padding.

An example of L tokens takes L - 1 positions, since nothing follows the last.
"""

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hetlora_jax import config
from hetlora_jax.data.people import Example
from hetlora_jax.types import Batch


class BatchShape(NamedTuple):
  """The room that one batch has: tokens are [rows, row_tokens]."""

  rows: int
  row_tokens: int
  num_targets: int


def batch_shape(data: config.Data, num_examples: int) -> BatchShape:
  """Returns the shape of a batch with the configured room for each example."""
  tokens, targets = data.tokens_per_example, data.targets_per_example
  if tokens is None or targets is None or data.row_tokens is None:
    raise ValueError('a limit of `data` is None: limits.filled gives them all.')
  room = num_examples * tokens
  row_tokens = min(data.row_tokens, room)
  return BatchShape(
    rows=math.ceil(room / row_tokens),
    row_tokens=row_tokens,
    num_targets=num_examples * targets,
  )


def first_fit(
  length_E: np.ndarray, rows: int, row_tokens: int
) -> tuple[np.ndarray, np.ndarray, bool]:
  """Places the longest first, each in the first row with room for it.

  Returns the row and offset of each example, and whether all had room.
  """
  used_P = np.zeros(rows, np.int64)
  row_E, offset_E = np.zeros_like(length_E), np.zeros_like(length_E)
  for e in np.argsort(-length_E, kind='stable'):
    fits_P = used_P + length_E[e] <= row_tokens
    row_E[e] = fits_P.argmax()
    if not fits_P[row_E[e]]:
      return row_E, offset_E, False
    offset_E[e] = used_P[row_E[e]]
    used_P[row_E[e]] += length_E[e]
  return row_E, offset_E, True


def _highest_cap(
  length_at: Callable[[int], np.ndarray], top: int, rows: int, row_tokens: int
) -> int:
  """Lowers a cap from `top` until the lengths at that cap can be placed."""
  cap = _highest_below(length_at, top, rows * row_tokens)
  while cap > 1 and not first_fit(length_at(cap), rows, row_tokens)[-1]:
    cap -= 1
  return cap


def _highest_below(
  length_at: Callable[[int], np.ndarray], top: int, budget: int
) -> int:
  """Returns the highest cap up to `top` whose lengths add up to the budget."""
  caps = range(1, top + 1)
  return bisect.bisect(caps, budget, key=lambda cap: length_at(cap).sum())


def _cap_targets(target_E: np.ndarray, shape: BatchShape) -> np.ndarray:
  """Returns lengths of targets, cut only where bos and targets would not fit."""
  rows, row_tokens, num_targets = shape
  length_at = functools.partial(np.minimum, target_E)
  top = min(target_E.max(), row_tokens)
  top = _highest_below(length_at, top, num_targets)
  return length_at(_highest_cap(length_at, top, rows, row_tokens))


def _cap_lengths(
  length_E: np.ndarray, target_E: np.ndarray, rows: int, row_tokens: int
) -> np.ndarray:
  """Returns lengths of examples, cut in the context but never in the target."""

  def length_at(cap: int) -> np.ndarray:
    return np.maximum(target_E, np.minimum(length_E, cap))

  top = min(length_E.max(), row_tokens)
  return length_at(_highest_cap(length_at, top, rows, row_tokens))


def _trim(example: Example, length: int, num_target: int) -> np.ndarray:
  """Drops the target's end and the context's start, but not bos."""
  cut, bos = example.num_target - num_target, example.num_bos
  tokens = example.tokens[: len(example.tokens) - cut]
  return np.concatenate([tokens[:bos], tokens[len(tokens) - length - 1 + bos :]])


def empty_batch(shape: BatchShape) -> Batch:
  """Returns a batch of padding alone, in numpy."""
  tokens, segment, position = np.zeros((3, shape.rows, shape.row_tokens), np.int32)
  target_index, target = np.zeros((2, shape.num_targets), np.int32)
  weight = np.zeros(shape.num_targets, np.float32)
  return Batch._make(  # numpy arrays, which Batch's types do not know of
    [tokens, segment, position, target_index, target, weight]
  )


def kept(
  examples: Sequence[Example], shape: BatchShape
) -> tuple[np.ndarray, np.ndarray]:
  """Returns how many positions, and how many targets, each example has room for.

  Raises ValueError if not even one target token of each example fits.
  """
  rows, row_tokens, num_targets = shape
  if len(examples) > min(rows * row_tokens, num_targets):
    raise ValueError(
      f'{len(examples)} examples cannot fit in {rows=} of {row_tokens=} with '
      f'{num_targets=}, at one position and one target each; raise these.'
    )
  length_E = np.array([len(example.tokens) - 1 for example in examples])
  wanted_E = np.array([example.num_target for example in examples])
  target_E = _cap_targets(wanted_E, shape)
  length_E = length_E - (wanted_E - target_E)
  return _cap_lengths(length_E, target_E, rows, row_tokens), target_E


def pack(examples: Sequence[Example], shape: BatchShape) -> Batch:
  """Packs all examples, in numpy: longest first, each into the first free row.

  What does not fit is cut, the longest first, by one common cap: the end of
  targets beyond `num_targets` in all, then the oldest context, bos kept.
  Raises ValueError if not even one target token of each example fits.
  """
  batch = empty_batch(shape)
  if not examples:
    return batch
  length_E, target_E = kept(examples, shape)
  row_E, offset_E, _ = first_fit(length_E, shape.rows, shape.row_tokens)
  filled = 0
  for e, (row, offset) in enumerate(zip(row_E, offset_E, strict=True)):
    tokens = _trim(examples[e], length_E[e], target_E[e])
    _write_inputs(batch, tokens, e + 1, row, offset)
    _write_targets(batch, tokens[-target_E[e] :], filled, row, offset + length_E[e])
    filled += target_E[e]
  return batch


def _write_inputs(
  batch: Batch, tokens: np.ndarray, segment: int, row: int, offset: int
) -> None:
  """Writes all tokens but the last into a row."""
  where = np.s_[row, offset : offset + len(tokens) - 1]
  batch.tokens[where] = tokens[:-1]
  batch.segment[where] = segment
  batch.position[where] = np.arange(len(tokens) - 1)


def _write_targets(
  batch: Batch, target: np.ndarray, filled: int, row: int, end: int
) -> None:
  """Writes the targets that the positions up to column `end` predict."""
  where = np.s_[filled : filled + len(target)]
  last = row * batch.tokens.shape[1] + end
  batch.target_index[where] = np.arange(last - len(target), last)
  batch.target[where] = target
  batch.weight[where] = 1
