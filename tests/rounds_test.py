"""HetLoRA's round: pruning, padding, chunks, devices, open choices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from hetlora_jax import client, lora, points, sharding
from hetlora_jax.methods import tail
from hetlora_jax.types import Trained

RANKS = [2, 9, 5, 7, 3, 9, 6, 2, 4, 8, 5]


def _run(run, rounds, seed=1):
  """Runs some rounds and returns the state, metrics and cohorts."""
  rng = np.random.default_rng(seed)
  base, state, outs, cohorts = quadratic.make_base(rng), run.state, [], []
  for _ in range(rounds):
    cohorts.append(quadratic.make_cohort(rng))
    state, out = run.step(base, state, cohorts[-1])
    outs.append(out)
  return base, state, outs, cohorts


def _assert_close(a, b, tolerance=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b
  )


def test_pruning_fires_with_the_penalty_and_not_without():
  for penalty in (0.0, 8.0):
    run = quadratic.make_run(RANKS, federated__tail_penalty=penalty)
    _, state, _, _ = _run(run, 8)
    fell = int((state.memory.rank[:, 0] < np.asarray(RANKS)).sum())
    assert (fell > 0) == (penalty > 0)


def test_first_round_cannot_prune():
  _, state, _, _ = _run(quadratic.make_run(RANKS, federated__tail_penalty=50.0), 1)
  np.testing.assert_array_equal(state.memory.rank[:, 0], RANKS)


def test_a_tail_that_stays_as_it_was_is_kept():
  run = quadratic.make_run(RANKS, client_optimizer__learning_rate=0.0)
  _, state, _, _ = _run(run, 2)
  np.testing.assert_array_equal(state.memory.rank[:, 0], RANKS)


def test_nobody_prunes_below_r_min():
  run = quadratic.make_run(RANKS, federated__r_min=4, federated__gamma=0.3)
  _, state, _, _ = _run(run, 12)
  np.testing.assert_array_less(
    np.minimum(RANKS, 4) - 1, np.asarray(state.memory.rank[:, 0])
  )


def test_one_compilation_for_20_rounds():
  run = quadratic.make_run(RANKS)
  _run(run, 20)
  assert run.round._cache_size() == 1


def test_donated_state_is_gone():
  run = quadratic.make_run(RANKS)
  mesh, one = sharding.make_mesh(), lambda tree: quadratic.stack([tree])
  step = points.make_rounds(run.rules, mesh, one(run.state))
  state = sharding.place(one(run.state), sharding.over_points(mesh))
  rng = np.random.default_rng(0)
  cohort = one(one(quadratic.make_cohort(rng)))
  step(quadratic.make_base(rng), state, cohort, one(run.hyper), np.array([True]))
  assert state.memory.rank.is_deleted()


def test_padding_clients_change_nothing():
  rng = np.random.default_rng(3)
  base, run = quadratic.make_base(rng), quadratic.make_run(RANKS)
  run.state, _ = run.step(base, run.state, quadratic.make_cohort(rng))
  whole = quadratic.make_cohort(rng, (3, 0, 7, 0))
  present = np.array([0, 2])
  small = jax.tree.map(lambda x: x[present], whole)
  padded, out = run.step(base, run.state, whole)
  alone, _ = run.step(base, run.state, small)
  _assert_close(padded, alone, 1e-6)
  assert float(out['weight']['q'][1]) == 0


def test_round_of_padding_leaves_the_state():
  rng = np.random.default_rng(3)
  base, run = quadratic.make_base(rng), quadratic.make_run(RANKS)
  # After a round B is not zero, so that a wrong write would show.
  trained = quadratic.make_cohort(rng, clients=[0, 1, 2, 3])
  before, _ = run.step(base, run.state, trained)
  cohort = quadratic.make_cohort(rng, (0, 0, 0, 0))
  state, _ = run.step(base, before, cohort)
  expected = dataclasses.replace(before, round=jnp.int32(2))
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_order_of_clients_does_not_matter():
  rng = np.random.default_rng(4)
  base, run = quadratic.make_base(rng), quadratic.make_run(RANKS)
  run.state = run.step(base, run.state, quadratic.make_cohort(rng))[0]
  cohort = quadratic.make_cohort(rng)
  turned = jax.tree.map(lambda x: x[np.array([2, 0, 3, 1])], cohort)
  _assert_close(
    run.step(base, run.state, cohort)[0], run.step(base, run.state, turned)[0]
  )


def test_slots_nobody_trains_keep_the_servers_value():
  run = quadratic.make_run([3] * quadratic.POPULATION)
  _, state, _, _ = _run(run, 2)
  for t, x in state.adapters.items():
    np.testing.assert_array_equal(x.a[..., 3:], run.state.adapters[t].a[..., 3:])
    assert float(jnp.abs(x.a[..., :3] - run.state.adapters[t].a[..., :3]).max())


@pytest.mark.parametrize('chunk', [1, 2])
def test_chunks_of_clients_change_nothing(chunk):
  _, whole, _, _ = _run(quadratic.make_run(RANKS), 3)
  run = quadratic.make_run(RANKS, federated__clients_at_once=chunk)
  _, chunked, _, _ = _run(run, 3)
  _assert_close(whole, chunked)


def test_many_rounds_of_many_points_equal_each_alone():
  runs = [
    quadratic.make_run(RANKS, seed=seed, federated__tail_penalty=penalty)
    for seed, penalty in ((0, 8.0), (1, 8.0), (1, 0.0))
  ]
  rng = np.random.default_rng(1)
  base = quadratic.make_base(rng)
  cohorts = [[quadratic.make_cohort(rng) for _ in runs] for _ in range(4)]
  stack = quadratic.stack
  state = stack([run.state for run in runs])
  step = points.make_rounds(runs[0].rules, sharding.make_mesh(), state)
  together, out = step(
    base, state, stack([stack(row) for row in cohorts]),
    stack([run.hyper for run in runs]), np.full(4, True),
  )  # fmt: skip
  assert out['rank'].shape[:3] == (4, 3, quadratic.CLIENTS)
  for k, run in enumerate(runs):
    alone = run.state
    for row in cohorts:
      alone, _ = run.step(base, alone, row[k])
    _assert_close(alone, jax.tree.map(lambda x: x[k], together))  # noqa: B023
  assert not np.array_equal(*np.asarray(together.memory.rank[1:]))


OPEN_CHOICES = [
  {'methods__prune_scope': 'matrix'},
  {'methods__weight_scope': 'layer'},
  {'methods__weight_scope': 'matrix'},
  {'methods__prune_against': 'last_trained'},
  {'methods__keep_pruned_rank': False},
  {'methods__weighting': 'uniform'},
  {'methods__weighting': 'size'},
  {'methods__objective': 'task', 'methods__pruning': 'none'},
  {'lora__scale_rule': 'alpha_over_r'},
  {'lora__scale_rule': 'alpha_over_sqrt_r'},
  {'lora__init': 'kaiming_uniform'},
  {'server_optimizer__name': 'momentum'},
  {'server_optimizer__name': 'adam'},
  {'server_optimizer__name': 'yogi'},
]


@pytest.mark.parametrize(
  'choice', OPEN_CHOICES, ids=lambda c: ','.join(map(str, c.values()))
)
def test_every_open_choice_matters_and_stays_finite(choice):
  usual, other = quadratic.make_run(RANKS), quadratic.make_run(RANKS, **choice)
  _, default, _, _ = _run(usual, 6)
  _, state, _, _ = _run(other, 6)
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state))
  gap = max(
    float(jnp.abs(x.a - state.adapters[t].a).max()) for t, x in default.adapters.items()
  )
  assert gap > 1e-6


def test_scope_of_a_client_prunes_all_matrices_alike():
  _, state, _, _ = _run(quadratic.make_run(RANKS, methods__prune_scope='matrix'), 8)
  assert state.memory.rank.shape == (quadratic.POPULATION, 4)
  assert bool((state.memory.rank.min(1) < state.memory.rank.max(1)).any())


def test_pruned_rank_is_forgotten_on_request():
  run = quadratic.make_run(RANKS, methods__keep_pruned_rank=False)
  _, state, outs, _ = _run(run, 8)
  np.testing.assert_array_equal(state.memory.rank[:, 0], RANKS)
  assert any(bool((o['rank'] < o['sent_rank']).any()) for o in outs)


def test_sent_adapters_are_exactly_of_the_rank():
  run = quadratic.make_run(RANKS)
  masks = {
    t: lora.prefix_mask(jnp.full((2,), 4), quadratic.SLOTS) for t in quadratic.DIMS
  }
  sent, _, _ = run.rules.distribute(
    run.state.adapters, masks, jnp.float32(1), jax.random.key(0)
  )
  for t, x in sent.items():
    assert not x.a[..., 4:].any() and not x.b[:, 4:].any()
    np.testing.assert_array_equal(x.a[..., :4], run.state.adapters[t].a[..., :4])


@pytest.mark.parametrize(
  'rank, gamma, kept',
  [
    (20, 0.95, 19),
    (10, 0.9, 9),
    (50, 0.99, 49),
    (5, 0.99, 4),
    (7, 1.0, 7),
  ],
)
def test_kept_rank(rank, gamma, kept):
  got = tail.kept_rank(jnp.array([rank]), jnp.float32(gamma))
  assert int(got[0]) == kept


def test_kept_rank_is_the_exact_floor():
  rank = np.arange(1, 201)
  for percent in range(1, 101):
    got = tail.kept_rank(jnp.asarray(rank), jnp.float32(percent / 100))
    np.testing.assert_array_equal(got, percent * rank // 100)


def test_empty_tails_are_refused():
  with pytest.raises(ValueError, match='empty tail'):
    quadratic.make_config(federated__gamma=0.999999)


def test_the_error_of_averaging_is_measured_where_it_is_asked_for():
  run = quadratic.make_run(RANKS)
  state = quadratic.stack([run.state])
  rng = np.random.default_rng(1)
  base = quadratic.make_base(rng)
  cohorts = quadratic.stack(
    [quadratic.stack([quadratic.make_cohort(rng)]) for _ in range(4)]
  )
  asked = np.array([False, True, False, True])
  found = {}
  for measure in (None, True, False):
    step = points.make_rounds(run.rules, sharding.make_mesh(), state, 1, measure)
    copy = jax.tree.map(jnp.array, state)
    after, out = step(base, copy, cohorts, quadratic.stack([run.hyper]), asked)
    found[measure] = np.asarray(out['aggregation_error'])[:, 0], after
  assert np.isnan(found[None][0]).tolist() == (~asked).tolist()
  assert np.isnan(found[False][0]).all() and np.isfinite(found[True][0]).all()
  np.testing.assert_allclose(found[None][0][asked], found[True][0][asked], 1e-5)
  for measure in (None, False):  # it changes nothing else
    _assert_close(found[measure][1], found[True][1], 1e-6)


def test_a_clipped_gradient_moves_a_client_no_further_than_its_steps():
  moved = {}
  for clip in (None, 0.01):
    run = quadratic.make_run(RANKS, client_optimizer__clip_norm=clip)
    rng = np.random.default_rng(2)
    base, cohort = quadratic.make_base(rng), quadratic.make_cohort(rng)
    trained, _, _ = client.local_update(
      run.rules, base, *received(run), jax.tree.map(lambda x: x[1], cohort.batches),
      jnp.int32(0), run.hyper, jax.random.key(0),
    )  # fmt: skip
    start = received(run)[0]
    gaps = jax.tree.leaves(
      jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), trained, start)
    )
    moved[clip] = float(np.sqrt(sum(gaps)))
  steps = jax.tree.leaves(cohort.batches)[0].shape[1]
  assert 0 < moved[0.01] <= 1.0001 * steps * 0.02 * 0.01 < moved[None]


def received(run):
  """Returns what client 1 trains from: adapters, view and rank."""
  view, _ = client.share_of(run.rules, run.state, run.hyper, jnp.int32(1))
  return Trained(view.adapters, {}), view, run.state.memory.rank[1]
