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


class Kept(NamedTuple):
  """What of an example has room: its start, and so many positions of its end."""

  tokens: np.ndarray  # bos first, if there is one
  targets: np.ndarray  # places of the tokens that bear the loss
  contexts_cut: int  # tokens without loss that are left out


def _trim(example: Example, length: int, last: int, targets: int) -> Kept:
  """Drops the target's end and the context's start, but not bos.

  Args:
    example: what is trimmed.
    length: how many positions it has.
    last: how many of its `num_target` stay.
    targets: how many tokens bear the loss at most, the last ones.
  """
  tokens = example.tokens[: len(example.tokens) - example.num_target + last]
  gone, bos = len(tokens) - 1 - length, example.num_bos
  tokens = np.concatenate([tokens[:bos], tokens[bos + gone :]])
  earlier = np.asarray(example.earlier, np.int64) - gone
  spoken = earlier[earlier > 0]
  places = np.concatenate([spoken, np.arange(len(tokens) - last, len(tokens))])
  contexts_cut = gone - int((earlier < bos).sum())
  return Kept(tokens, places[max(0, len(places) - targets) :], contexts_cut)


def empty_batch(shape: BatchShape) -> Batch:
  """Returns a batch of padding alone, in numpy."""
  tokens, segment, position = np.zeros((3, shape.rows, shape.row_tokens), np.int32)
  target_index, target = np.zeros((2, shape.num_targets), np.int32)
  weight = np.zeros(shape.num_targets, np.float32)
  return Batch._make(  # numpy arrays, which Batch's types do not know of
    [tokens, segment, position, target_index, target, weight]
  )


def kept(examples: Sequence[Example], shape: BatchShape) -> list[Kept]:
  """Returns what of each example has room.

  Of a conversation the first turns lose their loss, then the last turn its end.
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
  target_E = _cap_targets(np.array([x.all_targets for x in examples]), shape)
  last_E = np.minimum(wanted_E, target_E)
  length_E = length_E - (wanted_E - last_E)
  length_E = _cap_lengths(length_E, last_E, rows, row_tokens)
  return [*map(_trim, examples, length_E, last_E, target_E)]


def pack(examples: Sequence[Example], shape: BatchShape) -> Batch:
  """Packs all examples, in numpy: longest first, each into the first free row.

  What does not fit is cut, the longest first, by one common cap: the end of
  targets beyond `num_targets` in all, then the oldest context, bos kept.
  Raises ValueError if not even one target token of each example fits.
  """
  batch = empty_batch(shape)
  if not examples:
    return batch
  texts = kept(examples, shape)
  length_E = np.array([len(text.tokens) - 1 for text in texts])
  row_E, offset_E, _ = first_fit(length_E, shape.rows, shape.row_tokens)
  filled = 0
  for e, (text, row, offset) in enumerate(zip(texts, row_E, offset_E, strict=True)):
    _write_inputs(batch, text.tokens, e + 1, row, offset)
    _write_targets(batch, text, filled, row * shape.row_tokens + offset)
    filled += len(text.targets)
  return batch


def _write_inputs(
  batch: Batch, tokens: np.ndarray, segment: int, row: int, offset: int
) -> None:
  """Writes all tokens but the last into a row."""
  where = np.s_[row, offset : offset + len(tokens) - 1]
  batch.tokens[where] = tokens[:-1]
  batch.segment[where] = segment
  batch.position[where] = np.arange(len(tokens) - 1)


def _write_targets(batch: Batch, text: Kept, filled: int, start: int) -> None:
  """Writes the targets, each predicted by the position before it."""
  where = np.s_[filled : filled + len(text.targets)]
  batch.target_index[where] = start + text.targets - 1
  batch.target[where] = text.tokens[text.targets]
  batch.weight[where] = 1
