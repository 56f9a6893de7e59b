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
