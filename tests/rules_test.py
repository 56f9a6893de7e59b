"""Ranks, norms, weights and bytes against plain formulas."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetlora_jax import diagnostics, lora, ranks
from hetlora_jax.methods import (
  distribution,
  objective,
  pruning,
  registry,
  traffic,
  weighting,
)
from hetlora_jax.types import Lora

DIMS = {'q': (2, 7, 5), 'v': (2, 7, 3)}
SLOTS = 4


def _adapters(seed=0, clients=()):
  rng = np.random.default_rng(seed)
  return {
    t: Lora(
      jnp.float32(rng.normal(size=(*clients, n, d_in, SLOTS))),
      jnp.float32(rng.normal(size=(*clients, n, SLOTS, d_out))),
    )
    for t, (n, d_in, d_out) in DIMS.items()
  }


def test_groups_are_spread_in_the_order_they_are_gathered():
  adapters = _adapters()
  group = jnp.array([3, 1, 4, 2])
  spread = ranks.spread(group, adapters)
  assert spread['q'].tolist() == [3, 1] and spread['v'].tolist() == [4, 2]
  np.testing.assert_array_equal(ranks.gather(spread, 4), group)
  assert ranks.gather(spread, 1).tolist() == [10]


def test_norm_of_the_product_without_forming_it():
  for adapter in _adapters().values():
    want = [np.linalg.norm(adapter.a[i] @ adapter.b[i]) for i in range(2)]
    np.testing.assert_allclose(lora.delta_norm(adapter), want, 1e-5)
  zero = Lora(adapter.a, 0 * adapter.b)
  assert not lora.delta_norm(zero).any()


@pytest.mark.parametrize('norm', [lora.delta_norm, lora.factor_norm_product])
def test_gradient_of_a_norm_at_zero_is_finite(norm):
  adapter = _adapters()['q']
  zero = Lora(adapter.a, 0 * adapter.b)
  grads = jax.grad(lambda x: norm(x).sum())(zero)
  assert all(bool(jnp.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize('rule', lora.INITS)
def test_initialisation_has_variance_one_over_d_in(rule):
  adapters = lora.init(jax.random.key(0), {'q': (3, 400, 5)}, 50, rule)
  variance = float(adapters['q'].a.var()) * 400
  want = 1.0 if rule == 'gaussian' else 1 / 3
  assert variance == pytest.approx(want, rel=0.05)
  assert not adapters['q'].b.any()


def _inputs():
  num_examples = jnp.array([5.0, 0.0, 20.0])
  rng = np.random.default_rng(1)
  norms = {t: jnp.float32(rng.uniform(1, 9, (3, 2))) for t in DIMS}
  masks = {t: jnp.ones((3, 2, SLOTS)) for t in DIMS}
  return num_examples, masks, norms


@pytest.mark.parametrize('scope', ['model', 'layer', 'matrix'])
def test_norm_weights_by_hand(scope):
  num_examples, masks, norms = _inputs()
  got = weighting.norm(num_examples, masks, norms, weight_scope=scope)
  q, v = (np.asarray(norms[t], np.float64) for t in 'qv')
  for layer in range(2):
    chosen = {
      'model': np.sqrt((q**2 + v**2).sum(1)),
      'layer': np.sqrt(q[:, layer] ** 2 + v[:, layer] ** 2),
      'matrix': q[:, layer],
    }[scope]
    want = chosen * [1, 0, 1]
    np.testing.assert_allclose(got['q'][:, layer, 0], want / want.sum(), rtol=1e-5)


def test_who_has_learnt_nothing_weighs_nothing_beside_those_who_have():
  num_examples, masks, norms = _inputs()

  def weights(norms):
    got = weighting.norm(num_examples, masks, norms, weight_scope='layer')
    return got['q'][:, 0, 0].tolist()

  assert weights({t: x.at[0].set(0.0) for t, x in norms.items()}) == [0, 0, 1]
  assert weights({t: 0 * x for t, x in norms.items()}) == [0.5, 0, 0.5]


@pytest.mark.parametrize('rule', registry.ROLES['weighting'])
def test_weights_sum_to_one_over_those_present(rule):
  num_examples, masks, norms = _inputs()
  for scale in (1, 0):  # with all norms zero, nobody is preferred
    scaled = {t: scale * x for t, x in norms.items()}
    kind = {'weight_scope': 'model'} if rule == 'norm' else {}
    got = registry.ROLES['weighting'][rule].function(
      num_examples, masks, scaled, **kind
    )
    for t, weight in got.items():
      assert weight.shape == masks[t].shape
      np.testing.assert_allclose(weight.sum(0), 1, 1e-6)
      assert not weight[1].any()


def test_size_weights_are_proportional_to_examples():
  got = weighting.size(*_inputs())['q'][:, 0, 0]
  np.testing.assert_allclose(got, [0.2, 0, 0.8], 1e-6)


# Parameters a rank: A has 2 * 7 + 2 * 7 = 28, B has 2 * 5 + 2 * 3 = 16.
# Whole matrices: 2 * 35 + 2 * 21 = 112; ranks are 3 and 5 of 9.
@pytest.mark.parametrize(
  'method, round, up, down, trained',
  [
    ('hetlora', 0, 8 * 44, 8 * 44, 8 * 44),
    ('zero_pad', 0, 8 * 44, 8 * 44, 8 * 44),
    ('rbla', 0, 8 * 44, 8 * 44, 8 * 44),
    ('prelort', 0, 8 * 44, 8 * 44, 8 * 44),
    ('fslora', 0, 8 * 44, 8 * 44, 8 * 44),
    ('flexlora', 0, 8 * 44, 8 * 44, 8 * 44),
    ('raflora', 0, 8 * 44, 8 * 44, 8 * 44),
    ('fedit', 0, 18 * 44, 18 * 44, 18 * 44),
    ('fedprox', 0, 18 * 44, 18 * 44, 18 * 44),
    ('ffa_lora', 0, 18 * 16, 18 * 16, 18 * 16),
    ('rolora', 0, 18 * 16, 18 * 16, 18 * 16),
    ('rolora', 1, 18 * 28, 18 * 28, 18 * 28),
    ('fedsa_lora', 0, 18 * 28, 18 * 28, 18 * 44),
    ('fed_plora', 0, 8 * 44, 18 * 44, 8 * 44),
    # (d + l) S = 12 * 8 and 10 * 8 are more than the matrices themselves.
    ('flora', 0, 8 * 44, 2 * 112, 8 * 44),
    # Rank 1 was kept of every matrix.
    ('florist', 0, 8 * 44, 2 * 44, 8 * 44),
    ('fedex', 0, 18 * 44, 18 * 44 + 2 * 112, 18 * 44),
    ('fedmomentum', 0, 8 * 44, 8 * 44 + 2 * 44, 8 * 44),
    ('full_finetuning', 0, 2 * 1000, 2 * 1000, 2 * 1000),
    ('centralized', 0, 0, 0, 18 * 44),
    ('local_only', 0, 0, 0, 8 * 44),
  ],
)
def test_bytes_follow_the_papers_formulas(method, round, up, down, trained):
  rules = registry.rules_of(method)
  whole = 'all slots' in registry.traits_of(rules)
  rank = np.array([[9], [9]] if whole else [[3], [5]])
  one = {t: np.ones(2, int) for t in DIMS}
  folded = one if method in ('florist', 'fedmomentum') else {}
  got = traffic.of_round(
    rules, DIMS, (1000, 40), round=round, r_max=9, sent_CG=rank, kept_CG=rank,
    fold_rank=folded,
  )  # fmt: skip
  assert got == (trained, up, down)


def test_who_drops_out_receives_and_trains_but_sends_nothing():
  rules = registry.rules_of('hetlora')
  rank = np.array([[3], [5]])
  got = traffic.of_round(
    rules, DIMS, (1000, 40), round=0, r_max=9, sent_CG=rank, kept_CG=rank[1:] - 1,
    fold_rank={},
  )  # fmt: skip
  assert got == (8 * 44, 4 * 44, 8 * 44)


def test_ranks_of_single_matrices_are_counted_in_order():
  rank = np.array([[1, 0, 0, 2]])
  assert traffic.lora_parameters(rank, DIMS) == 12 + 20


def test_stacks_are_sent_as_factors_while_they_are_small():
  dims = {'q': (1, 70, 50)}
  rules = registry.rules_of('flora')
  rank = np.array([[3], [5]])
  got = traffic.of_round(
    rules, dims, (0, 0), round=0, r_max=9, sent_CG=rank, kept_CG=rank, fold_rank={}
  )
  assert got.down == 2 * 120 * 8
  residual = traffic.of_round(
    registry.rules_of('fedex'), dims, (0, 0), round=0, r_max=9,
    sent_CG=rank, kept_CG=rank, fold_rank={},
  )  # fmt: skip
  assert residual.down == 120 * 8 + 2 * 120 * 3  # (K - 1) r of the smaller


def _energy(values):
  """Returns adapters whose slots have the given energies, in both layers."""
  a, b = np.zeros((2, 7, SLOTS)), np.zeros((2, SLOTS, 5))
  a[:, 0], b[..., 0] = 1, np.sqrt(values)
  return {'q': Lora(jnp.float32(a), jnp.float32(b))}


@pytest.mark.parametrize(
  'values, share, rank, r_min, want',
  [
    ([8, 1, 1, 0], 0.85, 4, 1, 2),
    ([8, 1, 1, 0], 0.95, 4, 1, 3),
    ([8, 1, 1, 0], 0.5, 4, 1, 1),
    ([1, 1, 0, 0], 0.5, 4, 1, 1),  # just enough is enough
    ([8, 1, 1, 0], 0.5, 4, 2, 2),  # r_min
    ([0, 0, 0, 0], 0.5, 3, 1, 3),  # nothing learnt, nothing given up
  ],
)
def test_energy_pruning_keeps_the_first_slots_that_hold_enough(
  values, share, rank, r_min, want
):
  hyper = types.SimpleNamespace(energy=share, r_min=r_min)
  got = pruning.energy(None, _energy(values), jnp.array([rank]), hyper)
  assert got.tolist() == [want]
  assert got.dtype == jnp.int32


def test_energy_of_slots():
  adapters = _energy([8, 1, 1, 0])
  np.testing.assert_allclose(lora.slot_energy(adapters, 2.0), [64, 8, 8, 0])


def test_owner_weights_by_hand():
  num_examples, masks, norms = _inputs()
  mask = jnp.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]], jnp.float32)
  masks = {t: jnp.broadcast_to(mask[:, None], m.shape) for t, m in masks.items()}
  size = weighting.owner_size(num_examples, masks, norms)['q'][:, 1]
  np.testing.assert_allclose(size, [[0.2, 0.2, 1, 0], [0] * 4, [0.8, 0.8, 0, 0]], 1e-6)
  alike = weighting.owner_uniform(num_examples, masks, norms)['v'][:, 0]
  np.testing.assert_allclose(alike, [[0.5, 0.5, 1, 0], [0] * 4, [0.5, 0.5, 0, 0]], 1e-6)


def test_uniform_weights_ignore_sizes():
  got = weighting.uniform(*_inputs())['q'][:, 0, 0]
  np.testing.assert_allclose(got, [0.5, 0, 0.5], 1e-6)


def test_full_distribution_gives_everybody_every_slot():
  masks = {t: lora.prefix_mask(jnp.full((2,), 2), SLOTS) for t in DIMS}
  adapters = _adapters()
  view = distribution.full(adapters, masks, 1.0, jax.random.key(0))
  assert all(bool(m.all()) for m in view.mask.values())
  assert view.adapters is adapters


def test_prefixes_are_drawn_evenly_from_r_min_to_the_rank():
  hyper = types.SimpleNamespace(r_min=2)
  keys = jax.random.split(jax.random.key(0), 3000)
  drawn = jax.vmap(lambda key: objective.draw_prefix(jnp.array([4, 1]), hyper, key))(
    keys
  )
  values, counts = np.unique(drawn[:, 0], return_counts=True)
  assert values.tolist() == [2, 3, 4]
  np.testing.assert_allclose(counts / 3000, 1 / 3, atol=0.03)
  assert (drawn[:, 1] == 1).all()  # a client below r_min has no other


def test_random_slots_are_as_many_as_the_rank_and_differ():
  masks = {t: lora.prefix_mask(jnp.full((2,), 2), SLOTS) for t in DIMS}
  seen = set()
  for i in range(30):
    view = distribution.random_mask(_adapters(), masks, 1.0, jax.random.key(i))
    for mask in view.mask.values():
      assert mask.sum(-1).tolist() == [2, 2]
      seen |= {tuple(row) for row in np.asarray(mask).tolist()}
  assert len(seen) == 6  # every pair of four slots


def test_rows_of_metrics_sum_up_the_clients():
  out = {
    'rank_histogram': np.array([0, 0, 3, 1, 0, 2]),
    'slot_energy': np.array([3.0, 1.0, 0, 0, 0]),
    'aggregation_error': np.float32(0.25),
    'reports': np.array([True, True, False]),
    'sent_rank': np.array([[2], [5], [5]]),
    'loss_sum': np.array([6.0, 8.0, 100.0]),
    'tokens': np.array([3.0, 2.0, 1.0]),
    'weight': {'q': np.array([0.75, 0.25, 0.0])},
  }
  row = diagnostics.row(out, 2)
  assert row['rank/mean'] == pytest.approx((6 + 3 + 10) / 6)
  assert (row['rank/min'], row['rank/max']) == (2, 5)
  assert row['rank/histogram'] == [0, 0, 3, 1, 0, 2]
  assert row['energy/slots'] == [0.75, 0.25, 0, 0, 0]
  assert row['energy/effective_slots'] == pytest.approx(16 / 10)
  assert row['weight/effective_clients'] == pytest.approx(1 / 0.625)
  assert row['aggregation/error'] == 0.25
  assert row['train/loss/rank_2'] == 2.0 and row['train/loss/rank_5'] == 4.0
  assert row['weight/rank_2'] == 0.75 and 'train/loss/rank_3' not in row


def test_every_method_names_rules_that_exist():

  for row in registry.METHODS.values():
    for role, table in registry.ROLES.items():
      assert getattr(row, role) in table
    assert 'arXiv' in row.citation


def test_a_rule_that_does_not_state_what_it_sends_makes_bytes_unknown():
  rules = registry.rules_of('flora')
  rank = np.array([[3], [5]])
  about = {'round': 0, 'r_max': 9, 'sent_CG': rank, 'kept_CG': rank, 'fold_rank': {}}
  for role, unknown in (
    ('redistribution', (8 * 44, 8 * 44, None)),
    ('distribution', (8 * 44, 8 * 44, None)),
    ('trainable', (None, None, None)),
  ):
    silent = dataclasses.replace(rules[role], name='mine', traffic=None)
    got = traffic.of_round(rules | {role: silent}, DIMS, (1000, 40), **about)
    assert got == unknown
  # The same rule under another name states the same.
  renamed = dataclasses.replace(rules['redistribution'], name='mine')
  got = traffic.of_round(rules | {'redistribution': renamed}, DIMS, (1000, 40), **about)
  assert got == traffic.of_round(rules, DIMS, (1000, 40), **about)


def test_a_declaration_with_an_unknown_trait_role_or_space_is_refused():
  for facts, message in (
    ({'role': 'agregation'}, "role='agregation' is unknown"),
    ({'role': 'pruning', 'traits': ['prefx']}, 'prefx'),
    ({'role': 'pruning', 'needs': {'prefx': 'why'}}, 'prefx'),
    ({'role': 'aggregation', 'space': 'log'}, "space='log' is unknown"),
    ({'role': 'pruning', 'name': 'norm_tail'}, 'declared already'),
  ):
    with pytest.raises(ValueError, match=message):
      registry.declare(**{'name': 'mine', 'function': len} | facts)


def test_what_a_rule_needs_and_excludes_is_told_with_what_would_fit():
  rules = registry.rules_of('hetlora')
  assert not list(registry.conflicts(rules))
  base = rules | {'trainable': registry.ROLES['trainable']['base']}
  told = dict((rule.role, why) for rule, why in registry.conflicts(base))
  assert told['trainable'].startswith("not with objective 'tail_penalty'")
  product = rules | {'aggregation': registry.ROLES['aggregation']['product']}
  ((rule, why),) = registry.conflicts(product)
  assert rule.name == 'keep' and "redistribution 'svd_balanced'" in why


def test_clients_that_keep_their_a_send_b_alone():
  rules = registry.rules_of('fedsa_lora')
  rules |= {'personal': registry.ROLES['personal']['a']}
  rank = np.array([[9], [9]])
  got = traffic.of_round(
    rules, DIMS, (1000, 40), round=0, r_max=9, sent_CG=rank, kept_CG=rank, fold_rank={}
  )
  assert got == (18 * 44, 18 * 16, 18 * 16)
