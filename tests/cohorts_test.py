"""A cohort is a function of (seed, round), a client's data of itself too."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny
from hetlora_jax import config
from hetlora_jax.data import cohorts
from hetlora_jax.data.packing import BatchShape
from hetlora_jax.data.people import Example, Group, Population

# Uneven, and two people have fewer than a round's 3 x 5 examples.
COUNTS = np.array([40, 4, 90, 17, 60, 25, 300, 11, 33, 52, 71])
N = len(COUNTS)
UNSEEN = np.array([8, 30, 19])
SHAPE = BatchShape(rows=2, row_tokens=16, num_targets=12)
FEDERATED = dataclasses.replace(
  config.built(tiny.get_config()).federated, clients_per_round=6, local_steps=3,
  min_local_steps=3, local_batch=5, sampling='uniform',
)  # fmt: skip
DRAW = dict(count='round', pooled=False, pad_to=8)


def make_population(counts=COUNTS):
  """Makes clients whose example in row i has i + 1 as its one target."""
  first = np.cumsum(counts + 2) - (counts + 2)
  names = tuple(f'p{i}' for i in range(len(counts)))
  unseen_first = 10_000 + np.cumsum(UNSEEN) - UNSEEN
  return Population(
    groups={
      'train': Group(ids=names, first=first, count=counts),
      'heldout': Group(ids=names, first=first + counts, count=np.full_like(counts, 2)),
      'unseen': Group(ids=('x', 'y', 'z'), first=unseen_first, count=UNSEEN),
    },
    read=lambda row: Example(np.array([1, 1, row + 1], np.int32), 1),
  )


def make(population=None, *, seed=7, round=4, only=slice(None), **overrides):
  """Makes a cohort; the other arguments are fields of `Draw` and `Federated`."""
  draw = {name: overrides.pop(name, value) for name, value in DRAW.items()}
  return cohorts.make_cohort(
    population or make_population(),
    cohorts.Draw(
      federated=dataclasses.replace(FEDERATED, **overrides), shape=SHAPE, **draw
    ),
    seed=seed, round=round, only=only,
  )  # fmt: skip


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def of_client(cohort, client):
  place = int(np.flatnonzero(cohort.client_id == client)[0])
  return jax.tree.map(lambda leaf: leaf[place], cohort)


def rows_trained_on(cohort, place):
  """Lists the data set's rows among one client's targets."""
  b = jax.tree.map(lambda leaf: leaf[place], cohort.batches)
  return b.target[b.weight > 0] - 1


@pytest.mark.parametrize('epochs', [0.5, 1.0, 2.5])
def test_epochs_pass_over_all_examples_in_other_orders(epochs):
  cohort = make(local_epochs=epochs, local_steps=60, min_local_steps=60)
  orders = []
  for place, client in enumerate(cohort.client_id[:6]):
    count = int(COUNTS[client])
    rows = rows_trained_on(cohort, place)
    assert len(rows) == max(1, round(epochs * count))
    assert cohort.num_examples[place] == len(rows)
    for start in range(0, len(rows) - count + 1, count):  # whole passes
      once = rows[start : start + count]
      assert len(set(once)) == count
      orders.append(tuple(once))
  assert len(set(orders)) == len(orders)
  # Steps at most are the limit all the same.
  short = make(local_epochs=99.0)
  assert all((short.batches.weight[:6].sum((-1, -2)) == 15).tolist())


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
  population = make_population()
  group = population.groups['train']
  cohort = make(clients_per_round=N, pad_to=N)
  for place, client in enumerate(cohort.client_id):
    trained = rows_trained_on(cohort, place)
    assert len(trained) == len(set(trained)) == min(COUNTS[client], 15)
    assert len(trained) == cohort.num_examples[place]
    start = group.first[client]
    assert ((trained >= start) & (trained < start + COUNTS[client])).all()


def test_clients_count_by_all_their_data_or_by_the_rounds():
  everyone = dict(clients_per_round=N, pad_to=N + 2, min_local_steps=1)
  dataset = make(count='dataset', **everyone)
  assert dataset.num_examples.tolist()[N:] == [0, 0]
  client_C = dataset.client_id[:N]
  np.testing.assert_array_equal(dataset.num_examples[:N], COUNTS[client_C])
  trained = make(count='round', **everyone)
  for place in range(N + 2):
    here = len(rows_trained_on(trained, place))
    assert trained.num_examples[place] == here
  assert_same(dataset.batches, trained.batches)


def steps_taken(cohort):
  """Counts each client's steps that have examples, [C]."""
  return (cohort.batches.weight.sum(-1) > 0).sum(-1)


UNEVEN = dict(local_steps=6, min_local_steps=2, clients_per_round=N, pad_to=N)


def test_steps_are_uniform_between_the_bounds():
  federated = dataclasses.replace(FEDERATED, min_local_steps=2, local_steps=6)
  drawn = [
    cohorts._num_steps(7, round_, client, federated)
    for round_ in range(100)
    for client in range(N)
  ]
  steps, counts = np.unique(drawn, return_counts=True)
  assert steps.tolist() == [2, 3, 4, 5, 6]
  assert (np.abs(counts - 220) < 5 * np.sqrt(220)).all()


def test_a_slow_client_takes_the_first_of_its_steps():
  whole = make(**UNEVEN | dict(min_local_steps=6))
  cohort = make(**UNEVEN)
  assert_same(cohort.client_id, whole.client_id)
  taken = steps_taken(cohort)
  assert len(set(taken)) > 2
  for place, steps in enumerate(taken):
    for leaf, full in zip(cohort.batches, whole.batches, strict=True):
      assert not leaf[place, steps:].any()
      np.testing.assert_array_equal(leaf[place, :steps], full[place, :steps])
    assert cohort.num_examples[place] == cohort.batches.weight[place].sum()


def test_a_clients_steps_depend_on_seed_round_and_client_alone():
  large = make(**UNEVEN)
  assert_same(make(**UNEVEN), large)
  small = make(**UNEVEN | dict(clients_per_round=4, pad_to=4))
  for client in small.client_id:
    assert_same(of_client(small, client), of_client(large, client))
  for change in (dict(seed=8), dict(round=5)):
    other = make(**UNEVEN | change)
    order, other_order = (
      np.argsort(large.client_id),
      np.argsort(other.client_id),
    )
    taken, other_taken = steps_taken(large), steps_taken(other)
    assert (taken[order] != other_taken[other_order]).any()


@pytest.fixture
def streams(monkeypatch):
  """Lists (seed, name, counters) of all streams that are drawn from."""
  drawn, stream = [], cohorts.prng.host_stream

  def record(*arguments):
    drawn.append(arguments)
    return stream(*arguments)

  monkeypatch.setattr(cohorts.prng, 'host_stream', record)
  return drawn


def test_equal_bounds_draw_nothing(streams):
  make()
  assert {name for _, name, *_ in streams} == {'cohort', 'examples'}


POOLED = dict(pooled=True, pad_to=1)


@pytest.mark.parametrize('min_steps', [1, 3])
@pytest.mark.parametrize('sampling', ['uniform', 'by_size'])
def test_a_pooled_cohort_trains_on_the_federated_ones_examples(min_steps, sampling):
  change = dict(min_local_steps=min_steps, sampling=sampling)
  federated, pooled = make(**change), make(**POOLED, **change)
  rows = [r for c in range(6) for r in rows_trained_on(federated, c)]
  pooled_rows = rows_trained_on(pooled, 0)
  assert sorted(pooled_rows) == sorted(rows)
  assert len(set(rows)) == len(rows)
  assert pooled.num_examples.tolist() == [len(rows)]


def test_a_pooled_cohort_is_one_client_of_many_steps():
  cohort = make(**POOLED | dict(clients_per_round=N, pad_to=4))
  assert cohort.client_id.tolist() == [0, N, N, N]
  assert cohort.batches.tokens.shape == (4, N * 3, 2, 16)
  full, rest = divmod(int(np.minimum(COUNTS, 15).sum()), 5)
  examples = cohort.batches.weight[0].sum(-1).tolist()  # one target each
  assert examples == [5] * full + [rest] + [0] * (3 * N - full - 1)
  padding = jax.tree.map(lambda leaf: leaf[1:], cohort)
  assert not any(leaf.any() for leaf in padding.batches)
  assert not padding.num_examples.any()


def test_a_pooled_cohort_counts_what_its_clients_do():
  federated = make(count='dataset')
  pooled = make(count='dataset', **POOLED)
  assert pooled.num_examples.tolist() == [federated.num_examples.sum()]


def test_a_pooled_cohort_is_shuffled_by_seed_and_round():
  population = make_population(np.full(N, 60))

  def rows(**change):
    return make(population, clients_per_round=N, **POOLED, **change)

  cohort = rows()
  assert_same(cohort, rows())
  first = population.groups['train'].first
  for step in range(3):  # a client alone has 3 such steps
    b = jax.tree.map(lambda leaf, s=step: leaf[0, s], cohort.batches)
    owners = np.searchsorted(first, b.target[b.weight > 0] - 1, 'right')
    assert len(set(owners)) > 1
  for change in (dict(seed=8), dict(round=5)):
    assert (rows(**change).batches.target != cohort.batches.target).any()


def test_the_shuffle_has_a_stream_of_its_own(streams):
  make(**POOLED)
  assert [s for s in streams if s[1] == 'pool'] == [(7, 'pool', 4)]


@pytest.mark.parametrize('only', [slice(0, 2), slice(2, 4)])
def test_a_host_builds_only_its_slice_of_a_pooled_cohort(only):
  four = POOLED | dict(pad_to=4)
  whole = jax.tree.map(lambda leaf: leaf[only], make(**four))
  assert_same(make(**four, only=only), whole)


def test_clients_draw_apart_from_one_another():
  population = make_population(np.full(N, 60))
  cohort = make(population, clients_per_round=N, pad_to=N)
  first = population.groups['train'].first
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
    make_population(), 'heldout', num_people=5, examples_per_person=1, shape=SHAPE
  )
  assert sets.client_id.tolist() == [0, 2, 4, 6, 8]
  assert sets.batches.tokens.shape == (5, 1, 2, 16)
  unseen = cohorts.evaluation_set(
    make_population(), 'unseen', num_people=3, examples_per_person=10, shape=SHAPE
  )
  assert (unseen.client_id == N).all()
  assert unseen.num_examples.tolist() == [8, 10, 10]
  second = rows_trained_on(unseen, 1) - 10_000 - UNSEEN[0]
  assert sorted(second) == list(range(0, 30, 3))


def test_evaluation_never_meets_training_rows():
  population = make_population()
  trained = set()
  for round_ in range(20):
    cohort = make(round=round_, clients_per_round=N, pad_to=N)
    trained |= {int(r) for i in range(N) for r in rows_trained_on(cohort, i)}
  for kind, num_people in (('heldout', N), ('unseen', 3)):
    sets = cohorts.evaluation_set(
      population, kind, num_people=num_people, examples_per_person=9, shape=SHAPE
    )
    rows = {int(r) for i in range(num_people) for r in rows_trained_on(sets, i)}
    assert rows
    assert not rows & trained


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(clients_per_round=12, pad_to=12), 'clients_per_round=12 .* 11'),
    (dict(clients_per_round=0), 'clients_per_round=0 '),
    (dict(pad_to=5), 'pad_to=5 is below 6 clients'),
    (dict(pooled=True, pad_to=0), 'pad_to=0 is below 1 clients'),
    (dict(pooled=True, clients_per_round=12), 'clients_per_round=12 .* 11'),
  ],
)
def test_impossible_cohorts_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    make(**change)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('federated.sampling', 'size'),
    ('methods.count_examples', 'all'),
    ('federated.min_local_steps', 99),
    ('federated.min_local_steps', -1),
  ],
)
def test_a_configuration_of_impossible_cohorts_is_named(field, value):
  raw = tiny.get_config()
  raw.update_from_flattened_dict({field: value})
  with pytest.raises(config.ConfigError, match=f'{field}={value!r} '):
    config.resolve(raw)


def test_too_many_people_to_evaluate_is_named():
  with pytest.raises(ValueError, match=r'num_people=4 .* 3\]'):
    cohorts.evaluation_set(
      make_population(), 'unseen', num_people=4, examples_per_person=1, shape=SHAPE
    )
