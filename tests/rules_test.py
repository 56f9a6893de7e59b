"""Ranks, norms, weights and bytes against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetlora_jax import communication, lora, ranks
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
    kind = {'scope': 'model'} if rule == 'norm' else {}
    got = weighting.TABLE[rule](num_examples, masks, scaled, **kind)
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

  for row in registry.METHODS.values():
    for role, table in registry.ROLES.items():
      assert getattr(row, role) in table
    assert 'arXiv' in row.citation
