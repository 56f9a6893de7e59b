"""Paired differences: of the same people and seeds, or a reason why there are none."""

import numpy as np
import pytest

from hetlora_jax import config
from hetlora_jax.tools import bootstrap, paired, tables
from hetlora_jax.tools.paired import Difference, Person

PEOPLE, RNG = 13, np.random.default_rng(5)
TOKENS = RNG.integers(5, 40, PEOPLE)
LOSS = 3 + RNG.normal(0, 1.0, PEOPLE)  # people differ by far more than arms do


def make_arm(worse, seeds=(0, 1, 2), people=PEOPLE, noise=0.0):
  """Returns an arm whose loss lies `worse` nats above everybody's own."""
  rng = np.random.default_rng([len(seeds), int(1e3 * abs(worse))])

  def of_seed():
    loss = LOSS + worse + noise * rng.normal(size=PEOPLE)
    return [
      Person(f'p{i}', int(TOKENS[i]), float(loss[i] * TOKENS[i]), 5)
      for i in range(people)
    ]

  return [(seed, {'seen': of_seed(), 'unseen': of_seed()[:4]}) for seed in seeds]


def test_what_people_have_in_common_cancels():
  worse, base = make_arm(0.3, noise=0.05), make_arm(0.0, noise=0.05)
  got = paired.difference(worse, base, 'seen')
  assert isinstance(got, Difference) and (got.seeds, got.people) == (3, PEOPLE)
  want = np.mean([
    sum(p.loss_sum - q.loss_sum for p, q in zip(a['seen'], b['seen'], strict=True))
    for (_, a), (_, b) in zip(worse, base, strict=True)
  ]) / TOKENS.sum()  # fmt: skip
  assert got.interval.value == pytest.approx(want)
  assert 0.2 < got.interval.low < 0.3 < got.interval.high < 0.4
  # Unpaired, each arm's own interval is wider than the difference.
  loss = [p.loss_sum for p in base[0][1]['seen']]
  assert np.ptp(bootstrap.ratio(loss, TOKENS)[1:]) > 0.5
  back = paired.difference(base, worse, 'seen')
  np.testing.assert_allclose(
    [back.interval.value, back.interval.low, back.interval.high],
    [-got.interval.value, -got.interval.high, -got.interval.low],
  )
  assert paired.difference(worse, base, 'unseen').people == 4


def test_seeds_are_paired_by_their_number():
  base = make_arm(0.0)
  shifted = [
    (seed, {k: [p._replace(loss_sum=p.loss_sum + seed * p.tokens) for p in people]
            for k, people in kinds.items()})
    for seed, kinds in base
  ]  # fmt: skip
  got = paired.difference(shifted[::-1], base, 'seen')
  assert got.interval == pytest.approx((1.0, 0.0, 2.0))
  one = paired.difference(shifted, base[2:], 'seen')
  assert one.seeds == 1 and one.interval == pytest.approx((2.0, 2.0, 2.0))
  assert 'over people alone' in tables.gap_title('x', [{'seen': one}])
  assert 'over people alone' not in tables.gap_title('x', [{'seen': got}])


@pytest.mark.parametrize(
  'arm, why',
  [
    (make_arm(0.1, seeds=(3, 4)), 'no seed in common'),
    (make_arm(0.1, people=12), 'other people'),
    (make_arm(0.1, seeds=(1, 1)), 'a seed ran twice'),
    ([(0, {'seen': [], 'unseen': []})], 'no losses of single people'),
    ([], 'no seed in common'),
  ],
)
def test_where_nobody_can_tell_a_reason_stands(arm, why):
  base = make_arm(0.0)
  got = paired.difference(arm, base, 'seen')
  assert isinstance(got, str) and why in got
  assert paired.surely_best({'a': arm, 'base': base}, 'seen') is None
  assert tables.gap_cells({'seen': got})[0] == f'not paired: {got}'


def test_other_turns_of_the_same_people_are_no_pairs():
  base = make_arm(0.0)
  people = base[0][1]['seen']
  other = [people[0]._replace(tokens=people[0].tokens + 1), *people[1:]]
  got = paired.difference([(0, {'seen': other})], base, 'seen')
  assert got == 'other people or turns are evaluated'


def test_the_best_is_sure_only_if_it_beats_each_other_arm():
  arms = {'a': make_arm(0.5), 'b': make_arm(0.0, noise=0.1), 'c': make_arm(0.4)}
  assert paired.surely_best(arms, 'seen') == 'b'
  alike = arms | {'d': make_arm(0.001, noise=0.1)}
  assert paired.surely_best(alike, 'seen') is None
  assert paired.surely_best({'a': arms['a']}, 'seen') is None


def test_people_without_target_tokens_are_left_out():
  person = {'client': 'a', 'tokens': 3, 'loss_sum': 6.0, 'rank': None}
  content = {'round': 4, 'seen': [person, person | {'tokens': 0}], 'unseen': []}
  found = paired.people_of(content)
  assert found == {'seen': [Person('a', 3, 6.0, None)], 'unseen': []}
  assert found['seen'][0].loss == 2.0
  assert paired.people_of(None) == {'seen': [], 'unseen': []}


def test_the_baseline_is_the_first_or_the_one_that_is_named():
  names = ['method=fedit, r_max=5', 'method=hetlora, r_max=5']
  assert paired.baseline_of(names, None) == names[0]
  assert paired.baseline_of(names, 'method=hetlora,r_max=5') == names[1]
  assert paired.baseline_of([], None) is None
  with pytest.raises(config.ConfigError, match='--baseline=x is no arm: name one of method'):  # fmt: skip
    paired.baseline_of(names, 'x')
