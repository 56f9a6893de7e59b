"""What the wire rounds, by how much, and what is made good of it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import quadratic

from hetlora_jax import client, lora, wire
from hetlora_jax.config import ConfigError
from hetlora_jax.methods import registry, traffic, trainable
from hetlora_jax.types import Lora, Trained, View

CASTS = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
EDGES = [0.0, np.inf, -np.inf, np.nan, 65519.0, 65520.0, 3e-8, 2.9e-8, 6.1e-5, 3.39e38]


@pytest.mark.parametrize('name', CASTS)
def test_casts_are_those_of_numpy(name):
  rng = np.random.default_rng(0)
  x = rng.normal(size=20_000) * 10.0 ** rng.integers(-9, 5, 20_000)
  x = np.concatenate([x, EDGES]).astype(np.float32)
  with np.errstate(over='ignore'):
    want = x.astype(CASTS[name]).astype(np.float32)
  # Compiled, since XLA drops a pair of casts.
  np.testing.assert_array_equal(jax.jit(wire.TYPES[name].round)(x, 0), want)


@pytest.mark.parametrize('axis', [-2, -1])
def test_int8_has_255_steps_in_every_vector(axis):
  x = np.random.default_rng(0).normal(size=(2, 7, 5)).astype(np.float32)
  x *= 10.0 ** np.array([-9, 2]).reshape(2, 1, 1)
  x[0, :, 3], x[1, 4, 2] = 0, 0
  got = np.asarray(wire.TYPES['int8'].round(x, axis))
  scale = np.abs(x).max(axis, keepdims=True) / 127
  assert (np.abs(got - x) <= 0.5001 * scale).all()
  steps = got / np.where(scale > 0, scale, 1)
  np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
  assert np.abs(steps).max() < 127.01 and len(np.unique(np.rint(steps))) > 20
  assert not got[0, :, 3].any() and not got[1, 4, 2]


@pytest.mark.parametrize('name', ['bfloat16', 'float16', 'int8'])
def test_what_is_not_finite_stays_so(name):
  x = np.ones((3, 4), np.float32)
  for bad in (np.nan, np.inf):
    x[1, 2] = bad
    assert not np.isfinite(wire.TYPES[name].round(x, -1)).all()


def test_what_is_lost_comes_later():
  """All that was sent is all that changed, but for what is remembered."""
  rng, slots, rank = np.random.default_rng(0), 5, 3
  mask = {'q': jnp.broadcast_to(lora.prefix_mask(jnp.array([rank]), slots), (2, slots))}
  to_int8 = wire.TYPES['int8'].round
  made = wire.make(
    to_int8, trainable.both, down=('a', 'b'), up=('a', 'b'), fresh=False, base=False,
    feedback=True,
  )  # fmt: skip
  assert made.remembered == ('a', 'b')

  def draw():
    a, b = rng.normal(size=(2, 7, slots)), rng.normal(size=(2, slots, 4))
    return {'q': Lora(jnp.float32(a), jnp.float32(b))}

  server = lora.truncate(draw(), mask)
  lost = {'q': {'lost_a': jnp.zeros((2, 7, slots)), 'lost_b': jnp.zeros((2, slots, 4))}}
  sent = changed = jax.tree.map(jnp.zeros_like, server)
  for _ in range(6):
    exact = View(server, mask, jnp.float32(1))
    view = made.down(exact)
    assert (view.adapters['q'].a != server['q'].a).any()
    change = lora.truncate(draw(), mask)
    trained = Trained(jax.tree.map(jnp.add, view.adapters, change), {})
    got, lost = made.up(exact, view, trained, lost, jnp.int32(0))
    told = jax.tree.map(jnp.subtract, got.adapters, server)
    sent, changed = (
      jax.tree.map(jnp.add, x, y) for x, y in ((sent, told), (changed, change))
    )
    assert not any(
      x[..., rank:].any() for x in (got.adapters['q'].a, lost['q']['lost_a'])
    )
  for f in 'ab':
    left = getattr(changed['q'], f) - lost['q'][f'lost_{f}']
    np.testing.assert_allclose(getattr(sent['q'], f), left, atol=2e-5)
    size = np.abs(np.asarray(lost['q'][f'lost_{f}']))
    assert 0.005 < size.max() < 3 * 3.5 / 127  # less than a step


def test_what_a_client_is_told_is_what_it_is_sent():
  exact = quadratic.make_run()
  run = quadratic.make_run(communication__wire_dtype='int8')
  assert exact.rules.wire == wire.Wire() and run.rules.wire != wire.Wire()
  of_exact, of_run = (
    client.sent_to(r.rules, r.state, r.hyper, 3).adapters['q'] for r in (exact, run)
  )
  np.testing.assert_array_equal(of_run.a, wire.TYPES['int8'].round(of_exact.a, -2))
  assert (of_run.a != of_exact.a).any()


def test_a_factor_that_rests_is_not_corrected():
  """RoLoRA's clients have one factor in common, so their mean is exact."""
  run = quadratic.make_run(
    method='rolora',
    communication__wire_dtype='int8',
    communication__error_feedback=True,
  )
  rng = np.random.default_rng(0)
  base, state = quadratic.make_base(rng), run.state
  for _ in range(3):
    cohort = quadratic.make_cohort(rng, clients=(5, 1, 8, 3))
    state, out = run.step(base, state, cohort)
    assert float(out['aggregation_error']) < 1e-6
  assert all(x.any() for x in jax.tree.leaves(state.memory.personal))


DIMS = {'q': (2, 7, 5), 'v': (2, 7, 3)}


@pytest.mark.parametrize(
  'method, up, down',
  [
    # 2 layers; q has 7 + 5, v 7 + 3 values a slot, in two vectors each.
    ('hetlora', 8 * 2 * (12 + 10 + 4 * 4), 8 * 2 * (12 + 10 + 4 * 4)),
    ('rolora', 18 * 2 * (5 + 3 + 4 * 2), 18 * 2 * (5 + 3 + 4 * 2)),
    ('full_finetuning', 2 * (1000 + 4 * 40), 2 * (1000 + 4 * 40)),
    # A product takes float32: 2 * 4 * (35 + 21), less than a stack of 8.
    ('flora', 8 * 2 * (12 + 10 + 4 * 4), 2 * 2 * 4 * (35 + 21)),
    ('florist', 8 * 2 * (12 + 10 + 4 * 4), 2 * 2 * (12 + 10 + 4 * 4)),
    ('centralized', 0, 0),
  ],
)
def test_scales_are_among_the_bytes(method, up, down):
  rules = registry.rules_of(method)
  whole = 'all slots' in registry.traits_of(rules)
  rank = np.array([[9], [9]] if whole else [[3], [5]])
  folded = {t: np.ones(2, int) for t in DIMS} if method == 'florist' else {}
  got = traffic.of_round(
    rules, DIMS, (1000, 40), round=0, r_max=9, sent_CG=rank, kept_CG=rank,
    fold_rank=folded, each=wire.TYPES['int8'],
  )  # fmt: skip
  assert (got.up, got.down) == (up, down)


@pytest.mark.parametrize(
  'fields, message',
  [
    ({}, "wire_dtype='float32' takes nothing: take int8"),
    ({'method': 'flexlora'}, "method='flexlora' clients share no factors that stay"),
    ({'method': 'flora'}, 'share no factors'),
    ({'method': 'local_only'}, 'share no factors'),
    ({'method': 'full_finetuning'}, 'share no factors'),
    ({'method': 'centralized'}, 'share no factors'),
  ],
)
def test_feedback_needs_something_that_is_lost_and_stays(fields, message):
  wired = {'communication__wire_dtype': 'int8'} if fields else {}
  with pytest.raises(ConfigError, match=message) as error:
    quadratic.make_config(communication__error_feedback=True, **wired, **fields)
  assert 'config.communication.error_feedback=True is impossible' in str(error.value)
