"""Ranks follow their distribution, and people's data as closely as asked."""

import numpy as np
import pytest

from hetlora_jax import prng, ranks


def _draw(distribution, population=4000, seed=0, **overrides):
  arguments = dict(
    r_min=3,
    r_max=12,
    exponent=1.5,
    explicit=(4, 9, 7),
    tiers=(3, 12),
    tier_fractions=(0.75, 0.25),
  )
  return ranks.draw(
    prng.host_stream(seed, 'ranks'),
    population,
    distribution=distribution,
    **arguments | overrides,
  )


def test_uniform_ranks_take_every_value_alike():
  values, counts = np.unique(_draw('uniform'), return_counts=True)
  np.testing.assert_array_equal(values, np.arange(3, 13))
  assert counts.min() > 0.8 * 400 and counts.max() < 1.2 * 400


def test_power_law_ranks_follow_the_law():
  values, counts = np.unique(_draw('power_law'), return_counts=True)
  law = np.arange(3, 13.0) ** -1.5
  np.testing.assert_array_equal(values, np.arange(3, 13))
  np.testing.assert_allclose(counts / 4000, law / law.sum(), atol=0.03)


def test_normal_ranks_have_their_mean_and_deviation():
  rank = _draw('normal', r_min=5, r_max=65)
  assert rank.dtype == np.int32
  assert rank.mean() == pytest.approx(35, abs=5 * 10 / np.sqrt(4000))
  assert rank.std() == pytest.approx(10, rel=0.06)
  # A normal variable is within one standard deviation 68 % of the time.
  assert (np.abs(rank - 35) <= 10).mean() == pytest.approx(0.69, abs=0.04)
  assert rank.min() >= 5 and rank.max() <= 65


def test_normal_ranks_are_clipped_and_may_be_all_the_same():
  rank = _draw('normal', population=200_000, r_min=3, r_max=9)
  values, counts = np.unique(rank, return_counts=True)
  assert values.tolist() == [3, 4, 5, 6, 7, 8, 9]
  assert (counts[:3] < counts[1:4]).all() and (counts[3:-1] > counts[4:]).all()
  assert set(_draw('normal', r_min=7, r_max=7)) == {7}


def test_tiers_and_explicit_ranks():
  values, counts = np.unique(_draw('tiers'), return_counts=True)
  np.testing.assert_array_equal(values, [3, 12])
  assert counts[0] / 4000 == pytest.approx(0.75, abs=0.03)
  assert _draw('explicit', 5).tolist() == [4, 9, 7, 4, 9]


def test_an_unknown_distribution_is_named():
  with pytest.raises(ValueError, match="distribution='unifrom' is not one of"):
    _draw('unifrom')


@pytest.mark.parametrize('distribution', ranks.DISTRIBUTIONS)
def test_ranks_depend_on_the_seed_alone(distribution):
  data = dict(num_examples=_data(), data_correlation=0.5)
  for change in ({}, data):
    one = _draw(distribution, **change)
    np.testing.assert_array_equal(one, _draw(distribution, **change))
    if distribution != 'explicit' or change:
      assert (one != _draw(distribution, seed=1, **change)).any()


def _data(population=4000):
  """Draws how much data people have, with many ties."""
  rng = np.random.default_rng(5)
  return np.floor(rng.lognormal(3, 1, population)).astype(np.int64)


def _spearman(x, y):
  """Returns the correlation of the orders of x and y, ties at their mean."""

  def order(values):
    _, inverse, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[inverse]

  return np.corrcoef(order(x), order(y))[0, 1]


@pytest.mark.parametrize('distribution', ranks.DISTRIBUTIONS)
def test_no_correlation_is_exactly_independence(distribution):
  plain = _draw(distribution)
  given = _draw(distribution, num_examples=_data(), data_correlation=0.0)
  np.testing.assert_array_equal(given, plain)


@pytest.mark.parametrize('rho', [-1.0, -0.4, 0.3, 1.0])
@pytest.mark.parametrize('distribution', ranks.DISTRIBUTIONS)
def test_correlation_hands_the_same_ranks_out(distribution, rho):
  given = _draw(distribution, num_examples=_data(), data_correlation=rho)
  assert given.dtype == np.int32
  assert (given != _draw(distribution)).any()
  np.testing.assert_array_equal(np.sort(given), np.sort(_draw(distribution)))


@pytest.mark.parametrize('rho', [-0.8, -0.3, 0.2, 0.5, 0.9])
def test_ranks_follow_data_as_closely_as_asked(rho):
  size, few = 20_000, dict(r_min=1, r_max=200)
  given = _draw('uniform', size, num_examples=_data(size), data_correlation=rho, **few)
  # Of two normal variables the rank correlation is 6 / pi asin(rho / 2).
  expected = 6 / np.pi * np.arcsin(rho / 2)
  assert abs(expected - rho) < 0.02
  assert _spearman(_data(size), given) == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize('distribution', ranks.DISTRIBUTIONS)
@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_perfect_correlation_sorts_people_by_data(distribution, sign):
  data = _data()
  given = _draw(distribution, num_examples=data, data_correlation=sign)
  lowest = {n: given[data == n].min() for n in np.unique(data)}
  highest = {n: given[data == n].max() for n in np.unique(data)}
  if sign < 0:
    lowest, highest = highest, lowest
  for small, large in zip(list(lowest)[:-1], list(lowest)[1:], strict=True):
    assert sign * highest[small] <= sign * lowest[large]


def test_ties_are_broken_at_random():
  alike = np.full(4000, 30)
  given = _draw('uniform', num_examples=alike, data_correlation=1.0)
  assert abs(_spearman(np.arange(4000), given)) < 0.08


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(data_correlation=1.5), r'data_correlation=1.5 must be in \[-1, 1\]'),
    (dict(data_correlation=-2), 'data_correlation=-2 must be'),
    (dict(data_correlation=float('nan')), 'data_correlation=nan must be'),
    (
      dict(data_correlation=0.5, num_examples=None),
      'data_correlation=0.5 needs num_examples',
    ),
    (dict(num_examples=np.ones(3)), '3 num_examples do not fit population=4'),
  ],
)
def test_impossible_correlations_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    _draw('uniform', 4, **dict(num_examples=np.ones(4)) | change)
