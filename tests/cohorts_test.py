"""A cohort is a function of (seed, round), a client's data of itself too."""

import jax
import numpy as np
import pytest

from hetlora_jax.data import cohorts
from hetlora_jax.data.people import Example, Group, People

# Uneven, and two people have fewer than a round's 3 x 5 examples.
COUNTS = np.array([40, 4, 90, 17, 60, 25, 300, 11, 33, 52, 71])
N = len(COUNTS)
UNSEEN = np.array([8, 30, 19])
SHAPE = dict(rows=2, row_tokens=16, num_targets=12)
ARGUMENTS = SHAPE | dict(
  seed=7,
  clients_per_round=6,
  local_steps=3,
  local_batch=5,
  sampling='uniform',
  pad_to=8,
)


def make_people(counts=COUNTS):
  """Makes people whose example in row i has i + 1 as its one target."""
  first = np.cumsum(counts + 2) - (counts + 2)
  names = tuple(f'p{i}' for i in range(len(counts)))
  unseen_first = 10_000 + np.cumsum(UNSEEN) - UNSEEN
  return People(
    groups={
      'train': Group(ids=names, first=first, count=counts),
      'heldout': Group(
        ids=names, first=first + counts, count=np.full_like(counts, 2)
      ),
      'unseen': Group(ids=('x', 'y', 'z'), first=unseen_first, count=UNSEEN),
    },
    read=lambda row: Example(np.array([1, 1, row + 1], np.int32), 1),
  )


def make(**overrides):
  return cohorts.make_cohort(
    make_people(), **({'round': 4} | ARGUMENTS | overrides)
  )


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def of_client(cohort, client):
  place = int(np.flatnonzero(cohort.client_id == client)[0])
  return jax.tree.map(lambda leaf: leaf[place], cohort)


def rows_trained_on(cohort, place):
  """Lists the data set's rows among one client's targets."""
  b = jax.tree.map(lambda leaf: leaf[place], cohort.batches)
  return b.target[b.weight > 0] - 1


def test_same_seed_and_round_give_the_same_cohort():
  alone = make()
  for round_ in (0, 3, 9):
    make(round=round_)
  assert_same(make(), alone)


def test_shapes_and_types():
  cohort = make()
  assert cohort.client_id.shape == cohort.num_examples.shape == (8,)
  assert cohort.client_id.dtype == np.int32
  assert cohort.num_examples.dtype == np.float32
  assert cohort.batches.tokens.shape == (8, 3, 2, 16)
  assert cohort.batches.weight.shape == (8, 3, 12)


@pytest.mark.parametrize('change', [dict(seed=8), dict(round=5)])
def test_another_seed_or_round_draws_other_people_and_batches(change):
  one, other = make(), make(**change)
  assert set(one.client_id) != set(other.client_id)
  everyone = dict(clients_per_round=N, pad_to=N)
  one, other = make(**everyone), make(**everyone, **change)
  for client in (2, 6):
    a, b = of_client(one, client), of_client(other, client)
    assert (a.batches.target != b.batches.target).any()


@pytest.mark.parametrize('only', [slice(0, 4), slice(4, 8), slice(5, 6)])
def test_a_host_builds_only_its_own_slice(only):
  whole = jax.tree.map(lambda leaf: leaf[only], make())
  assert_same(make(only=only), whole)


def test_a_clients_data_does_not_depend_on_who_else_was_sampled():
  small, large = make(), make(clients_per_round=N, pad_to=N + 1)
  for client in small.client_id[:6]:
    assert_same(of_client(small, client), of_client(large, client))


def test_nobody_is_sampled_twice_and_padding_fills_the_end():
  for round_ in range(30):
    cohort = make(round=round_)
    assert len(set(cohort.client_id[:6])) == 6
    assert cohort.client_id[:6].max() < N
    assert (cohort.client_id[6:] == N).all()


def test_padding_clients_and_missing_examples_weigh_nothing():
  cohort = make(clients_per_round=N, pad_to=N + 2)
  padding = jax.tree.map(lambda leaf: leaf[N:], cohort)
  assert not any(leaf.any() for leaf in padding.batches)
  assert not padding.num_examples.any()
  few = of_client(cohort, 1)  # has 4 examples for 3 steps of 5
  assert few.num_examples == 4
  assert few.batches.weight.sum(-1).tolist() == [4, 0, 0]


def test_an_example_is_seen_at_most_once_and_is_the_clients_own():
  people = make_people()
  group = people.groups['train']
  cohort = make(clients_per_round=N, pad_to=N)
  for place, client in enumerate(cohort.client_id):
    trained = rows_trained_on(cohort, place)
    assert len(trained) == len(set(trained)) == min(COUNTS[client], 15)
    assert len(trained) == cohort.num_examples[place]
    start = group.first[client]
    assert ((trained >= start) & (trained < start + COUNTS[client])).all()


def test_clients_draw_apart_from_one_another():
  people = make_people(np.full(N, 60))
  arguments = ARGUMENTS | dict(clients_per_round=N, pad_to=N)
  cohort = cohorts.make_cohort(people, round=4, **arguments)
  first = people.groups['train'].first
  draws = {
    tuple(sorted(rows_trained_on(cohort, place) - first[client]))
    for place, client in enumerate(cohort.client_id)
  }
  assert len(draws) == N


def test_by_size_draws_in_proportion():
  counts = np.zeros(N)
  for round_ in range(4000):
    counts[cohorts.sample_clients(0, round_, N, 1, COUNTS)] += 1
  expected = 4000 * COUNTS / COUNTS.sum()
  assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_make_cohort_heeds_sampling():
  def hits(sampling):
    one = dict(clients_per_round=1, pad_to=1, sampling=sampling)
    drawn = [make(round=r, **one).client_id[0] for r in range(60)]
    return drawn.count(6)

  assert hits('by_size') > 15  # 26 expected, of 300 / 703
  assert hits('uniform') < 15  # 5 expected, of 1 / 11


def test_uniform_draws_everyone_alike():
  counts = np.zeros(N)
  for round_ in range(3000):
    counts[cohorts.sample_clients(0, round_, N, 3)] += 1
  expected = 3000 * 3 / N
  assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_evaluation_spreads_over_people_and_turns():
  sets = cohorts.evaluation_set(
    make_people(), 'heldout', num_people=5, examples_per_person=1, **SHAPE
  )
  assert sets.client_id.tolist() == [0, 2, 4, 6, 8]
  assert sets.batches.tokens.shape == (5, 1, 2, 16)
  unseen = cohorts.evaluation_set(
    make_people(), 'unseen', num_people=3, examples_per_person=10, **SHAPE
  )
  assert (unseen.client_id == N).all()
  assert unseen.num_examples.tolist() == [8, 10, 10]
  second = rows_trained_on(unseen, 1) - 10_000 - UNSEEN[0]
  assert sorted(second) == list(range(0, 30, 3))


def test_evaluation_never_meets_training_rows():
  people = make_people()
  trained = set()
  for round_ in range(20):
    cohort = make(round=round_, clients_per_round=N, pad_to=N)
    trained |= {int(r) for i in range(N) for r in rows_trained_on(cohort, i)}
  for kind, num_people in (('heldout', N), ('unseen', 3)):
    sets = cohorts.evaluation_set(
      people, kind, num_people=num_people, examples_per_person=9, **SHAPE
    )
    rows = {int(r) for i in range(num_people) for r in rows_trained_on(sets, i)}
    assert rows
    assert not rows & trained


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(clients_per_round=12, pad_to=12), 'clients_per_round=12 .* 11'),
    (dict(clients_per_round=0), 'clients_per_round=0 '),
    (dict(pad_to=5), 'pad_to=5 is below clients_per_round=6'),
    (dict(sampling='size'), "sampling='size' must be"),
  ],
)
def test_impossible_cohorts_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    make(**change)


def test_too_many_people_to_evaluate_is_named():
  with pytest.raises(ValueError, match=r'num_people=4 .* 3\]'):
    cohorts.evaluation_set(
      make_people(), 'unseen', num_people=4, examples_per_person=1, **SHAPE
    )
