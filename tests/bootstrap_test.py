"""Intervals over people are what the textbook says they are."""

import numpy as np
import pytest

from hetlora_jax.tools import bootstrap


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
  value_E = np.random.default_rng(0).exponential(size=400)
  got = bootstrap.mean(value_E)
  assert got.value == pytest.approx(value_E.mean())
  half = 1.96 * value_E.std() / 20
  assert got.high - got.value == pytest.approx(half, rel=0.1)
  assert got.value - got.low == pytest.approx(half, rel=0.1)
  assert bootstrap.mean(value_E) == got != bootstrap.mean(value_E, 1)


def test_the_interval_holds_the_truth_as_often_as_it_says():
  rng, held = np.random.default_rng(1), 0
  for seed in range(200):
    got = bootstrap.mean(rng.normal(3.0, 1.0, 40), seed)
    held += got.low <= 3.0 <= got.high
  assert 180 <= held <= 198  # 190 expected, a few less of so few people


def test_a_ratio_weighs_people_by_their_counts():
  got = bootstrap.ratio([10.0, 90.0], [10.0, 30.0])
  assert got == pytest.approx((2.5, 1.0, 3.0))
  # Resampling people, not tokens: those who are alike leave no doubt.
  alike = bootstrap.ratio([3.0, 6.0, 30.0], [1.0, 2.0, 10.0])
  assert alike == pytest.approx((3.0, 3.0, 3.0))


def test_one_person_leaves_no_interval_and_nobody_is_refused():
  assert bootstrap.mean([4.0]) == (4.0, 4.0, 4.0)
  with pytest.raises(ValueError, match='nobody'):
    bootstrap.mean([])
  with pytest.raises(ValueError, match='must be positive'):
    bootstrap.ratio([1.0, 2.0], [3.0, 0.0])


def _slow_ratio(total_SE, count_E, rng):
  """One resample, written out: seeds and people are drawn each on their own."""
  seeds, people = total_SE.shape
  drawn_seeds, drawn_people = (rng.integers(n, size=n) for n in (seeds, people))
  pairs = [(s, e) for s in drawn_seeds for e in drawn_people]
  total = sum(total_SE[pair] for pair in pairs)
  return total / (seeds * sum(count_E[e] for e in drawn_people))


def test_people_and_seeds_are_resampled_each_on_their_own():
  rng = np.random.default_rng(2)
  count_E = rng.integers(5, 50, 17).astype(float)
  loss_SE = 2 + rng.normal(0, 0.3, (4, 1)) + rng.normal(0, 0.5, 17)
  total_SE = loss_SE * count_E
  got = bootstrap.ratio(total_SE, count_E)
  slow = [_slow_ratio(total_SE, count_E, rng) for _ in range(2000)]
  assert got.value == pytest.approx(total_SE.sum() / (4 * count_E.sum()))
  width = got.high - got.low
  np.testing.assert_allclose(
    got[1:], np.quantile(slow, [0.025, 0.975]), atol=width / 12
  )
  # Wider than people alone make it, and than seeds alone do.
  alone = bootstrap.ratio(total_SE.mean(0), count_E)
  assert got.value == alone.value and alone.high - alone.low < 0.9 * width
  same = bootstrap.ratio(np.repeat(loss_SE.mean(1)[:, None], 17, 1) * count_E, count_E)
  assert 0 < same.high - same.low < 0.9 * width
  # What seeds and people have in common cancels in a paired difference.
  worse = total_SE + 0.01 * count_E
  assert bootstrap.ratio(worse - total_SE, count_E) == pytest.approx((0.01,) * 3)


def test_seeds_alike_are_as_one():
  total_E, count_E = [3.0, 8.0, 30.0], [1.0, 2.0, 10.0]
  once = bootstrap.ratio(total_E, count_E)
  assert bootstrap.ratio([total_E] * 3, count_E).value == once.value
  assert bootstrap.mean(np.ones((3, 5))) == (1.0, 1.0, 1.0)
