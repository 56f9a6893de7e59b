"""Ranks, norms, weights and bytes against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetlora_jax import communication, lora, prng, ranks
from hetlora_jax.methods import registry, weighting
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


def _draw(distribution, population=4000, seed=0):
  return ranks.draw(
    prng.host_stream(seed, 'ranks'),
    population,
    distribution=distribution,
    r_min=3,
    r_max=12,
    exponent=1.5,
    explicit=(4, 9, 7),
    tiers=(3, 12),
    tier_fractions=(0.75, 0.25),
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


def test_tiers_and_explicit_ranks():
  values, counts = np.unique(_draw('tiers'), return_counts=True)
  np.testing.assert_array_equal(values, [3, 12])
  assert counts[0] / 4000 == pytest.approx(0.75, abs=0.03)
  assert _draw('explicit', 5).tolist() == [4, 9, 7, 4, 9]


def test_ranks_depend_on_the_seed_alone():
  np.testing.assert_array_equal(_draw('uniform'), _draw('uniform'))
  assert (_draw('uniform') != _draw('uniform', seed=1)).any()


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


@pytest.mark.parametrize('scope', weighting.SCOPES)
def test_norm_weights_by_hand(scope):
  num_examples, masks, norms = _inputs()
  got = weighting.norm(num_examples, masks, norms, scope=scope)
  q, v = (np.asarray(norms[t], np.float64) for t in 'qv')
  for layer in range(2):
    chosen = {
      'model': np.sqrt((q**2 + v**2).sum(1)),
      'layer': np.sqrt(q[:, layer] ** 2 + v[:, layer] ** 2),
      'matrix': q[:, layer],
    }[scope]
    want = chosen * [1, 0, 1]
    np.testing.assert_allclose(
      got['q'][:, layer, 0], want / want.sum(), rtol=1e-5
    )


@pytest.mark.parametrize('rule', weighting.TABLE)
def test_weights_sum_to_one_over_those_present(rule):
  num_examples, masks, norms = _inputs()
  for scale in (1, 0):  # with all norms zero, nobody is preferred
    scaled = {t: scale * x for t, x in norms.items()}
    got = weighting.TABLE[rule]('model')(num_examples, masks, scaled)
    for t, weight in got.items():
      assert weight.shape == masks[t].shape
      np.testing.assert_allclose(weight.sum(0), 1, 1e-6)
      assert not weight[1].any()


def test_size_weights_are_proportional_to_examples():
  got = weighting.size(*_inputs())['q'][:, 0, 0]
  np.testing.assert_allclose(got, [0.2, 0, 0.8], 1e-6)


def test_bytes_follow_the_formula():
  rank = np.array([[3], [5]])
  per_rank = 2 * (7 + 5) + 2 * (7 + 3)
  assert communication.lora_parameters(rank, DIMS) == 8 * per_rank
  by_matrix = np.array([[1, 0, 0, 2]])
  assert communication.lora_parameters(by_matrix, DIMS) == 12 + 20


def test_every_method_names_rules_that_exist():
  from hetlora_jax import config

  for row in registry.METHODS.values():
    for role, table in config.ROLES.items():
      assert getattr(row, role) in table
    assert 'arXiv' in row.citation
