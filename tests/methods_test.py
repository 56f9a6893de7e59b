"""What must be true of every method, over the whole registry."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic

from hetlora_jax import client, config, lora
from hetlora_jax.methods import aggregation, redistribution, registry
from hetlora_jax.types import ClientUpdates, Lora, Server

RANKS = [2, 9, 5, 7, 3, 9, 6, 2, 4, 8, 5]
METHODS = sorted(registry.METHODS)


@functools.cache
def make_run(method, **overrides):
  """Compiles a method once for all tests of a process."""
  return quadratic.make_run(RANKS, method=method, **overrides)


def warmed_up(method, rounds=2, **overrides):
  """Returns a run, its base and a state in which B is not zero."""
  run, rng = make_run(method, **overrides), np.random.default_rng(1)
  base, state = quadratic.make_base(rng), run.state
  for _ in range(rounds):
    state, _ = run.step(base, state, quadratic.make_cohort(rng))
  return run, base, state, rng


def total(run, base, state):
  """Returns the matrices of the global model: target -> [L, d_in, d_out]."""
  now = lora.deltas(state.adapters, run.server_scale)
  return {t: base[t] + state.residual.get(t, 0) + now.get(t, 0) for t in base}


def assert_close(a, b, tolerance=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance), a, b
  )


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def global_part(run, state):
  """Returns what an SVD's freedom of sign and order cannot change."""
  if run.rules.product_space:
    return state.residual, lora.deltas(state.adapters, run.server_scale)
  return state.residual, state.adapters


@pytest.mark.parametrize('method', METHODS)
def test_six_rounds_are_finite_learn_and_compile_once(method):
  run, base, state, rng = warmed_up(method)
  cohort = quadratic.make_cohort(rng)
  _, before = run.step(base, run.state, cohort)
  for _ in range(4):
    state, out = run.step(base, state, cohort)
  assert float(out['loss_sum'].sum()) < 0.95 * float(before['loss_sum'].sum())
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((state, out)))
  assert run.round._cache_size() == 1


@pytest.mark.parametrize('method', METHODS)
def test_order_of_clients_does_not_matter(method):
  run, base, state, rng = warmed_up(method)
  cohort = quadratic.make_cohort(rng)
  turned = jax.tree.map(lambda x: x[np.array([2, 0, 3, 1])], cohort)
  one, other = (run.step(base, state, c)[0] for c in (cohort, turned))
  assert_close(global_part(run, one), global_part(run, other))
  assert_close(one.memory, other.memory)


@pytest.mark.parametrize('method', METHODS)
def test_padding_changes_nothing(method):
  run, base, state, rng = warmed_up(method)
  few = quadratic.make_cohort(rng, (3, 0, 7, 0))
  # The same two people with other padding beside them.
  swapped = jax.tree.map(lambda x: x[np.array([0, 2, 1, 1])], few)
  one, other = (run.step(base, state, c)[0] for c in (few, swapped))
  assert_close(global_part(run, one), global_part(run, other))
  nobody = quadratic.make_cohort(rng, (0, 0, 0, 0))
  after, _ = run.step(base, state, nobody)
  assert_same(after, dataclasses.replace(state, round=state.round + 1))


@pytest.mark.parametrize('method', METHODS)
def test_a_client_that_drops_out_is_as_if_it_had_not_been_there(method):
  run, base, state, rng = warmed_up(method)
  cohort = quadratic.make_cohort(rng)
  hyper = run.hyper.replace(dropout=np.float32(0.5))
  lossy, out = run.round(base, state, cohort, hyper)
  reports = np.asarray(out['reports'])
  assert 0 < reports.sum() < 4
  there = dataclasses.replace(
    cohort, num_examples=np.where(reports, cohort.num_examples, 0)
  )
  without, _ = run.step(base, state, there)
  assert_close(global_part(run, lossy), global_part(run, without))
  assert_close(lossy.memory, without.memory)
  # It trained nevertheless.
  assert float(out['tokens'].sum()) == sum((3, 18, 7, 11))


@pytest.mark.parametrize('method', ['full_finetuning', 'fedit', 'flexlora'])
def test_weights_by_size_are_shares_of_the_examples(method):
  run, base, state, rng = warmed_up(method)
  _, out = run.step(base, state, quadratic.make_cohort(rng))
  assert out['weight']
  for weight_C in out['weight'].values():
    np.testing.assert_allclose(weight_C, np.array([3, 18, 7, 11]) / 39, 1e-6)


@pytest.mark.parametrize('method', METHODS)
def test_one_client_alone_is_taken_as_it_is(method):
  """K = 1 is the identity: the global model becomes the client's own."""
  run, base, state, rng = warmed_up(method)
  # Client 1 has rank R, so that nothing is truncated.
  cohort = quadratic.make_cohort(rng, (0, 18, 0, 0), clients=[1] * 4)
  after, out = run.step(base, state, cohort)
  assert int(out['rank'][1, 0]) in (9, 6, 0)  # HetLoRA may prune
  weights = np.asarray(list(out['weight'].values()))
  assert len(weights)
  np.testing.assert_allclose(weights, [[0, 1, 0, 0]] * len(weights), atol=1e-6)
  assert float(out['aggregation_error']) < 1e-5
  if run.rules.personal:
    return
  one = jax.tree.map(lambda x: x[1:2], cohort)
  alone, _ = run.round(base, state, one, run.hyper)
  assert_close(total(run, base, after), total(run, base, alone), 1e-4)


# Rules on updates of three clients, whose scales, ranks and sizes differ.
SCALES, SIZES = np.array([1.7, 0.6, 1.1]), np.array([3.0, 18.0, 7.0])
SERVER_SCALE = jnp.float32(0.9)


def draw_updates(rank=(9, 4, 6), seed=0):
  """Draws what three clients send, and the server's adapters."""
  rng, slots = np.random.default_rng(seed), quadratic.SLOTS
  mask = (np.arange(slots) < np.array(rank)[:, None]).astype(np.float32)

  def draw(*lead):
    return {
      t: Lora(
        rng.normal(size=(*lead, n, d_in, slots)).astype(np.float32),
        rng.normal(size=(*lead, n, slots, d_out)).astype(np.float32),
      )
      for t, (n, d_in, d_out) in quadratic.DIMS.items()
    }

  masks = {t: jnp.asarray(np.repeat(mask[:, None], 2, 1)) for t in quadratic.DIMS}
  sent = lora.truncate(draw(3), masks)
  updates = ClientUpdates(
    adapters=sent,
    mask=masks,
    scale=jnp.float32(SCALES),
    num_examples=jnp.float32(SIZES),
    norm={
      t: jnp.asarray(SCALES[:, None]) * lora.delta_norm(x) for t, x in sent.items()
    },
  )
  return updates, Server(draw(), SERVER_SCALE)


def become(method, updates, server, **overrides):
  """Returns the change of the global model that updates lead to."""
  run = make_run(method, **overrides)
  rules, hyper = run.rules, run.hyper
  weights = rules.weigh(updates.num_examples, updates.mask, updates.norm)
  error = functools.partial(aggregation.averaging_error, updates, weights, server)
  got = rules.redistribute(
    rules.aggregate(updates, weights, server), lambda: error()[0], server, hyper
  )
  return got, {
    t: x + got.fold.get(t, 0)
    for t, x in lora.deltas(got.adapters, server.scale).items()
  }


def mean_product(updates, weight):
  """Returns sum_k w_k s_k A_k B_k, in float64."""
  return {
    t: sum(
      w * s * np.asarray(a, float) @ np.asarray(b, float)
      for w, s, a, b in zip(weight, SCALES, x.a, x.b, strict=True)
    )
    for t, x in updates.adapters.items()
  }


@pytest.mark.parametrize(
  'method, overrides',
  [
    ('fedex', {}),
    ('flora', {}),
    ('flexlora', {}),  # R exceeds d_out: nothing is cut off
    ('florist', {'methods__energy': 1.0}),
    ('fedmomentum', {'methods__energy': 1.0}),
    ('flexlora', {'methods__redistribution': 'svd_a'}),
    ('flexlora', {'methods__redistribution': 'svd_b'}),
    ('hetlora', {'methods__redistribution': 'fold_residual'}),
    ('hetlora', {'methods__aggregation': 'product',
                 'methods__redistribution': 'fold_all'}),
  ],
)  # fmt: skip
def test_product_identity(method, overrides):
  """s A B + D is the weighted mean of the clients' s_k A_k B_k."""
  updates, server = draw_updates()
  _, got = become(method, updates, server, **overrides)
  weight = SIZES / SIZES.sum()
  if method == 'hetlora':
    norm = np.sqrt(sum(np.asarray(x) ** 2 for x in updates.norm.values()).sum(1))
    weight = norm / norm.sum()
  assert_close(got, mean_product(updates, weight))


def test_flora_with_a_cut_keeps_only_the_strongest_directions():
  updates, server = draw_updates()
  got, delta = become('florist', updates, server, methods__energy=0.9)
  for t, whole in mean_product(updates, SIZES / SIZES.sum()).items():
    for layer in range(2):
      u, sigma, v = np.linalg.svd(whole[layer], full_matrices=False)
      held = np.cumsum(sigma**2) / (sigma**2).sum()
      rank = int((held < 0.9).sum()) + 1
      assert int(got.fold_rank[t][layer]) == rank < len(sigma)
      assert_close(delta[t][layer], (u[:, :rank] * sigma[:rank]) @ v[:rank])


SPLITS = {'svd_balanced': 0.5, 'svd_a': 1.0, 'svd_b': 0.0}


@pytest.mark.parametrize('split', SPLITS)
def test_svd_is_the_best_approximation_whatever_the_split(split):
  slots = 2
  rng = np.random.default_rng(0)
  delta = {'q': jnp.float32(rng.normal(size=(2, 7, 5)))}
  before = Lora(jnp.ones((2, 7, slots)), jnp.ones((2, slots, 5)))
  rule = registry.ROLES['redistribution'][split]
  got = rule.function(delta, dict, Server({'q': before}, SERVER_SCALE), None)
  assert rule.power_a(True) == rule.power_a(False) == SPLITS[split]
  a, b = got.adapters['q']
  for layer in range(2):
    u, sigma, v = np.linalg.svd(np.asarray(delta['q'][layer], float), False)
    best = (u[:, :slots] * sigma[:slots]) @ v[:slots]
    assert_close(SERVER_SCALE * a[layer] @ b[layer], best)
    share = sigma[:slots] / SERVER_SCALE
    power = SPLITS[split]
    np.testing.assert_allclose(np.linalg.norm(a[layer], axis=0), share**power, 1e-5)
    # Signs are fixed, so that a run can be repeated elsewhere.
    place = np.abs(a[layer]).argmax(0)
    assert (np.take_along_axis(a[layer], place[None], 0) > 0).all()


def test_a_slot_without_a_singular_value_can_be_trained_again():
  updates, server = draw_updates()
  got, _ = become('flexlora', updates, server)
  for t, (_, _, d_out) in quadratic.DIMS.items():
    assert_same(got.adapters[t].a[..., d_out:], server.adapters[t].a[..., d_out:])
    assert not got.adapters[t].b[:, d_out:].any()
    assert got.adapters[t].a.any(1).all()


def test_a_mean_of_low_rank_leaves_the_other_slots_to_be_trained():
  _, server = draw_updates()
  rng = np.random.default_rng(4)
  low = {
    t: jnp.float32(rng.normal(size=(n, d_in, 1)) @ rng.normal(size=(n, 1, d_out)))
    for t, (n, d_in, d_out) in quadratic.DIMS.items()
  }
  nothing = jax.tree.map(jnp.zeros_like, low)
  for delta, live in ((low, 1), (nothing, 0)):
    got = redistribution.svd(delta, {}, server, None, power_a=0.5).adapters
    assert_close(lora.deltas(got, server.scale), delta)
    for t, x in got.items():
      assert_same(x.a[..., live:], server.adapters[t].a[..., live:])
      assert not x.b[:, live:].any()


def test_products_do_not_depend_on_a_clients_basis_but_factors_do():
  updates, server = draw_updates((9, 9, 9))
  rng = np.random.default_rng(3)
  turned = {}
  for t, x in updates.adapters.items():
    q = rng.normal(size=(3, 2, 9, 9)) + 3 * np.eye(9)
    turned[t] = Lora(
      jnp.float32(x.a @ q), jnp.float32(np.linalg.inv(q) @ np.asarray(x.b))
    )
  other = dataclasses.replace(updates, adapters=turned)
  for method, same in (('flexlora', True), ('flora', True), ('fedit', False)):
    _, one = become(method, updates, server)
    _, two = become(method, other, server)
    gap = max(np.abs(one[t] - two[t]).max() for t in one)
    assert (gap < 1e-3) == same


@pytest.mark.parametrize(
  'one, other',
  [('rbla', 'fedit'), ('raflora', 'flexlora'), ('prelort', 'rbla')],
)
def test_equal_ranks_reduce_one_method_to_another(one, other):
  updates, server = draw_updates((9, 9, 9))
  (a, _), (b, _) = (become(m, updates, server) for m in (one, other))
  assert_close(a.adapters, b.adapters)


def test_equal_ranks_reduce_hetlora_to_homogeneous_lora():
  """Its three switches off, and everybody at R: FedIT, to the bit."""
  off = {
    'methods__weighting': 'size',
    'methods__objective': 'task',
    'methods__pruning': 'none',
  }
  rng = np.random.default_rng(2)
  base = quadratic.make_base(rng)
  cohorts = [quadratic.make_cohort(rng) for _ in range(3)]
  states = []
  for run in (
    quadratic.make_run([9] * 11, method='hetlora', **off),
    make_run('fedit'),
  ):
    state = run.state
    for cohort in cohorts:
      state, _ = run.step(base, state, cohort)
    states.append(state)
  assert_same(*states)


@pytest.mark.parametrize('method', ['rbla', 'prelort', 'hetlora', 'zero_pad'])
def test_a_cohort_of_small_ranks_leaves_the_high_slots(method):
  run, base, state, rng = warmed_up(method)
  small = quadratic.make_cohort(rng, clients=[0, 4, 7, 2])  # ranks 2 to 5
  after, _ = run.step(base, state, small)
  for t, x in state.adapters.items():
    assert_same(after.adapters[t].a[..., 5:], x.a[..., 5:])
    assert_same(after.adapters[t].b[:, 5:], x.b[:, 5:])
    assert (after.adapters[t].b[:, 0] != x.b[:, 0]).any()


def test_a_cohort_of_small_ranks_leaves_what_it_does_not_own_of_a_product():
  updates, server = draw_updates((2, 4, 3))
  for method in ('flexlora', 'raflora'):
    _, got = become(method, updates, server)
    weights = make_run(method).rules.weigh(
      updates.num_examples, updates.mask, updates.norm
    )
    for t, x in server.adapters.items():
      rest = SERVER_SCALE * x.a[..., 4:] @ x.b[:, 4:]
      theirs = sum(
        SCALES[k]
        * (updates.adapters[t].a[k] * weights[t][k][:, None])
        @ updates.adapters[t].b[k]
        for k in range(3)
      )
      assert_close(got[t], rest + theirs, 1e-4)


@pytest.mark.parametrize(
  'overrides',
  [
    {'method': 'zero_pad', 'lora__fold_scale': True},
    {'method': 'flexlora'},
    {'method': 'flexlora', 'methods__redistribution': 'svd_a'},
    {'method': 'flexlora', 'methods__redistribution': 'svd_b'},
    {'method': 'fedmomentum'},
  ],
)
def test_a_client_of_another_scale_receives_the_same_product(overrides):
  """And what it sends back untrained is what it received."""
  run, base, state, rng = warmed_up(
    lora__scale_rule='alpha_over_r', client_optimizer__learning_rate=0.01,
    **overrides,
  )  # fmt: skip
  server = client.global_adapters(run.rules, state, run.hyper)
  view, _ = client.share_of(run.rules, state, run.hyper, 2)  # rank 5
  assert float(view.scale) == pytest.approx(quadratic.SCALE / 5)
  assert float(server.scale) == pytest.approx(quadratic.SCALE / 9)
  sent = lora.deltas(view.adapters, view.scale)
  first_five = lora.truncate(server.adapters, view.mask)
  assert_close(sent, lora.deltas(first_five, server.scale))
  still = run.hyper.replace(client_learning_rate=np.float32(0))
  alone = quadratic.make_cohort(rng, (0, 18, 0, 0), clients=[2] * 4)
  after, _ = run.round(base, state, alone, still)
  assert_close(total(run, base, after), total(run, base, state), 1e-4)


@pytest.mark.parametrize('method', ['ffa_lora', 'rolora'])
def test_methods_that_share_a_factor_average_without_error(method):
  run, base, state, rng = warmed_up(method)
  for _ in range(2):
    state, out = run.step(base, state, quadratic.make_cohort(rng))
    assert float(out['aggregation_error']) < 1e-6


@pytest.mark.parametrize(
  'method, name',
  [
    ('hetlora', 'momentum'),
    ('hetlora', 'adam'),
    ('hetlora', 'yogi'),
    ('rolora', 'adam'),
    ('ffa_lora', 'momentum'),
  ],
)
def test_what_nobody_trained_keeps_values_and_moments(method, name):
  run, base, state, rng = warmed_up(
    method, server_optimizer__name=name, server_optimizer__learning_rate=0.1
  )
  cohort = quadratic.make_cohort(rng, clients=[0, 4, 7, 2])  # ranks 2 to 5
  after, _ = run.step(base, state, cohort)  # the third round: RoLoRA's B
  start = 5 if method == 'hetlora' else 0
  factor = 'a' if method != 'hetlora' else 'b'

  def frozen(tree):
    """Lists the frozen parts of every Lora in a state."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Lora))
    found = [getattr(x, factor) for x in leaves if isinstance(x, Lora)]
    assert found
    return [x[:, start:] if factor == 'b' else x for x in found]

  for tree in ('adapters', 'opt_state'):
    assert_same(frozen(getattr(after, tree)), frozen(getattr(state, tree)))
  assert any(x.any() for x in frozen(state.adapters))
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), after.adapters, state.adapters)  # fmt: skip
  assert all(x.b for x in moved.values())


def test_momentum_of_products_moves_on_in_their_own_space():
  run, base, state, rng = warmed_up('flexlora', server_optimizer__name='momentum')
  trace = jax.tree.leaves(state.opt_state)
  assert {x.shape for x in trace} == {(2, 7, 5), (2, 7, 3)}
  after, _ = run.step(base, state, quadratic.make_cohort(rng))
  assert any((x != y).any() for x, y in zip(trace, jax.tree.leaves(after.opt_state), strict=True))  # fmt: skip


def test_a_clients_own_factors_never_reach_the_server():
  for method, own, factors in (
    ('fedsa_lora', 'b', 'b'), ('fedsa_lora', 'a', 'a'), ('local_only', 'both', 'ab'),
  ):  # fmt: skip
    run, base, state, rng = warmed_up(method, methods__personal=own)
    for f in factors:
      start = getattr(run.state.adapters['q'], f)
      assert_same(getattr(state.adapters['q'], f), start)
      bank = state.memory.personal['q'][f]
      assert bank.shape == (11, *start.shape)
    cohort = quadratic.make_cohort(rng, clients=[0, 4, 7, 2])
    after, _ = run.step(base, state, cohort)
    f = factors[-1]
    changed = after.memory.personal['q'][f] != state.memory.personal['q'][f]
    who = np.flatnonzero(np.asarray(changed).any((1, 2, 3)))
    assert who.tolist() == [0, 2, 4, 7]


def test_a_new_rule_is_one_function_and_one_declaration():
  @registry.rule('aggregation')
  def first(updates, weights, server):
    """Takes the first client's factors."""
    return jax.tree.map(lambda x: x[0], updates.adapters)

  try:
    run = quadratic.make_run(RANKS, methods__aggregation='first')
  finally:
    del registry.ROLES['aggregation']['first']
  rng = np.random.default_rng(0)
  state, _ = run.step(quadratic.make_base(rng), run.state, quadratic.make_cohort(rng))
  assert bool(jnp.isfinite(state.adapters['q'].a).all())


def _random_rules(seed):
  """Draws a rule for every role."""
  rng = np.random.default_rng(seed)
  return {
    f'methods__{role}': str(rng.choice(sorted(table)))
    for role, table in registry.ROLES.items()
    if role not in ('trainable', 'cohort')
  } | {'methods__trainable': str(rng.choice(['both', 'mask', 'b_only']))}


def _fitting_rules(count):
  """Lists the first combinations that the checks let through."""
  found = []
  for seed in range(2000):
    try:
      quadratic.make_config(**_random_rules(seed))
    except config.ConfigError:
      continue
    found.append(seed)
    if len(found) == count:
      return found
  raise AssertionError('too few combinations fit')


@pytest.mark.parametrize('seed', _fitting_rules(6))
def test_untested_combinations_of_rules_run_and_stay_finite(seed):
  run = quadratic.make_run(RANKS, **_random_rules(seed))
  rng = np.random.default_rng(1)
  base, state = quadratic.make_base(rng), run.state
  for _ in range(3):
    state, out = run.step(base, state, quadratic.make_cohort(rng))
  assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((state, out)))
  nobody = quadratic.make_cohort(rng, (0, 0, 0, 0))
  after, _ = run.step(base, state, nobody)
  assert_same(after, dataclasses.replace(state, round=state.round + 1))
  assert run.round._cache_size() == 1
