"""Packed rows bear exactly the losses of the examples packed into them."""

import numpy as np
import pytest

from hetlora_jax.data.packing import BatchShape, pack
from hetlora_jax.data.people import Example

BOS = 1


def make_examples(seed, count, longest_context=13, longest_target=7):
  """Makes examples of unequal lengths in which no token but bos repeats."""
  rng = np.random.default_rng(seed)
  examples, next_token = [], BOS + 1
  for _ in range(count):
    context = int(rng.integers(0, longest_context + 1))
    target = int(rng.integers(1, longest_target + 1))
    tokens = np.arange(next_token, next_token + context + target)
    next_token += context + target
    example = Example(np.array([BOS, *tokens], np.int32), target)
    examples.append(example)
  return examples


def predictions(batch):
  """Lists (all tokens that a position may look at, the token to predict)."""
  segment, tokens = batch.segment.reshape(-1), batch.tokens.reshape(-1)
  position, T = batch.position.reshape(-1), batch.tokens.shape[1]
  out = []
  for index, target, weight in zip(
    batch.target_index, batch.target, batch.weight, strict=True
  ):
    if weight == 0:
      continue
    assert weight == 1
    assert segment[index] > 0
    seen = [
      (position[i], tokens[i])
      for i in range(index // T * T, index + 1)
      if segment[i] == segment[index]
    ]
    assert [p for p, _ in seen] == list(range(len(seen)))
    out.append((tuple(int(token) for _, token in seen), int(target)))
  return sorted(out)


def expected_predictions(examples):
  """Lists the same from the examples, unpacked."""
  return sorted(
    (tuple(example.tokens[:i].tolist()), int(example.tokens[i]))
    for example in examples
    for i in range(len(example.tokens) - example.num_target, len(example.tokens))
  )


@pytest.mark.parametrize('seed', range(20))
def test_every_target_is_predicted_once_from_its_own_context(seed):
  examples = make_examples(seed, count=9)
  batch = pack(examples, BatchShape(rows=7, row_tokens=31, num_targets=70))
  assert predictions(batch) == expected_predictions(examples)


def test_padding_is_zero_and_has_no_weight():
  examples = make_examples(seed=0, count=3)
  batch = pack(examples, BatchShape(rows=5, row_tokens=23, num_targets=41))
  empty = batch.segment == 0
  assert empty.any()
  assert not batch.tokens[empty].any()
  assert not batch.position[empty].any()
  unused = batch.weight == 0
  assert not batch.target_index[unused].any()
  assert not batch.target[unused].any()
  assert batch.weight.sum() == sum(e.num_target for e in examples)


def test_shapes_and_types():
  batch = pack(make_examples(0, 3), BatchShape(rows=5, row_tokens=23, num_targets=41))
  assert batch.tokens.shape == batch.segment.shape == (5, 23)
  assert batch.position.shape == (5, 23)
  assert batch.target.shape == batch.weight.shape == (41,)
  assert batch.target_index.shape == (41,)
  assert [leaf.dtype for leaf in batch] == 5 * [np.int32] + [np.float32]


def test_no_examples_are_a_batch_of_padding():
  batch = pack([], BatchShape(rows=3, row_tokens=5, num_targets=7))
  assert batch.tokens.shape == (3, 5)
  assert not any(leaf.any() for leaf in batch)


def test_several_examples_share_a_row():
  examples = make_examples(seed=1, count=6)
  total = sum(len(e.tokens) - 1 for e in examples)
  batch = pack(examples, BatchShape(rows=1, row_tokens=total, num_targets=50))
  assert (batch.segment > 0).all()
  assert predictions(batch) == expected_predictions(examples)


def test_the_longest_lose_their_oldest_context_but_not_bos():
  long, longer, short = (
    Example(np.array([BOS, *range(start, start + n)], np.int32), 2)
    for start, n in ((100, 10), (200, 20), (300, 4))
  )
  batch = pack([long, longer, short], BatchShape(rows=1, row_tokens=18, num_targets=9))
  cut = [  # 7 + 7 + 4 positions
    Example(np.array([BOS, *range(103, 110)], np.int32), 2),
    Example(np.array([BOS, *range(213, 220)], np.int32), 2),
    short,
  ]
  assert predictions(batch) == expected_predictions(cut)


def test_without_a_bos_nothing_of_the_cut_context_stays():
  example = Example(np.arange(100, 110, dtype=np.int32), 2, num_bos=0)
  batch = pack([example], BatchShape(rows=1, row_tokens=5, num_targets=2))
  cut = Example(np.arange(104, 110, dtype=np.int32), 2, num_bos=0)
  assert predictions(batch) == expected_predictions([cut])


def test_the_longest_targets_are_cut_at_their_end():
  big, small = (
    Example(np.array([BOS, *range(start, start + n)], np.int32), n - 1)
    for start, n in ((100, 9), (200, 4))
  )
  batch = pack([big, small], BatchShape(rows=2, row_tokens=16, num_targets=8))
  cut = Example(big.tokens[:7], 5)  # 5 + 3 targets
  assert predictions(batch) == expected_predictions([cut, small])


@pytest.mark.parametrize('seed', range(60))
def test_packing_succeeds_whenever_one_token_each_fits(seed):
  rng = np.random.default_rng(seed)
  rows, row_tokens = int(rng.integers(1, 5)), int(rng.integers(1, 12))
  count = int(rng.integers(1, rows * row_tokens + 1))
  num_targets = int(rng.integers(count, 3 * count + 1))
  examples = make_examples(seed, count)
  got = predictions(pack(examples, BatchShape(rows, row_tokens, num_targets)))
  targets = {target for _, target in got}
  for example in examples:
    own = example.tokens[len(example.tokens) - example.num_target :].tolist()
    kept = [token for token in own if token in targets]
    assert kept
    assert kept == own[: len(kept)]
  assert all(seen[0] == BOS for seen, _ in got)


@pytest.mark.parametrize('seed', range(30))
def test_no_higher_cap_would_have_fitted(seed):
  examples = make_examples(seed, count=8, longest_context=25)
  rows, row_tokens = 3, 24
  batch = pack(examples, BatchShape(rows, row_tokens, 100))
  kept = np.bincount(batch.segment.reshape(-1), minlength=9)[1:]
  full = np.array([len(e.tokens) - 1 for e in examples])
  if (kept == full).all():
    return
  cap = kept[kept < full].max()
  floor = np.array([e.num_target for e in examples])
  for higher in range(cap + 1, full.max() + 1):
    lengths = np.maximum(floor, np.minimum(full, higher))
    assert not first_fit_succeeds(lengths.tolist(), rows, row_tokens)


def first_fit_succeeds(lengths, rows, row_tokens):
  free = [row_tokens] * rows
  for length in sorted(lengths, reverse=True):
    row = next((i for i, room in enumerate(free) if room >= length), None)
    if row is None:
      return False
    free[row] -= length
  return True


def test_packing_is_deterministic():
  first, second = (pack(make_examples(3, 9), BatchShape(2, 31, 20)) for _ in range(2))
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'shape',
  [
    dict(rows=1, row_tokens=2, num_targets=9),
    dict(rows=4, row_tokens=9, num_targets=2),
  ],
)
def test_too_small_a_batch_is_named(shape):
  with pytest.raises(ValueError, match='3 examples cannot fit in rows='):
    pack(make_examples(0, 3), BatchShape(**shape))
