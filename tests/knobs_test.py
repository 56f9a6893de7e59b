"""How rates change, LoRA+, and batches that are added up: against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratic
from experiment_test import small_config
from rounds_test import RANKS, received

from hetlora_jax import build, client, config, optimizers, run
from hetlora_jax.types import Lora, Trained

RATE = 0.02


def cosine(share):
  return (1 + np.cos(np.pi * share)) / 2


@pytest.mark.parametrize(
  ('name', 'warmup', 'want'),
  [
    ('constant', 0, [1] * 8),
    ('linear', 0, [1 - t / 8 for t in range(8)]),
    ('cosine', 0, [cosine(t / 8) for t in range(8)]),
    ('constant', 3, [1 / 4, 1 / 2, 3 / 4, 1, 1, 1, 1, 1]),
    ('linear', 3, [1 / 4, 1 / 2, 3 / 4, *[1 - t / 5 for t in range(5)]]),
    ('cosine', 2, [1 / 3, 2 / 3, *[cosine(t / 6) for t in range(6)]]),
  ],
)
def test_rates_rise_and_fall_over_rounds(name, warmup, want):
  factor = optimizers.over_rounds(name, 8, warmup)
  np.testing.assert_allclose([factor(t) for t in range(8)], want, 1e-5, 1e-7)


def steps_of(count=4, round=0, name='sgd', **fields):
  """Returns what an optimizer does to gradients of 1, step by step: A's and B's."""
  overrides = {f'client_optimizer__{k}': v for k, v in fields.items()}
  c = quadratic.make_config(
    client_optimizer__name=name, federated__num_rounds=8,
    federated__local_steps=count, **overrides,
  )  # fmt: skip
  optimizer = build.make_rules(c, quadratic.loss).client_optimizer(
    build.make_hyperparameters(c), jnp.int32(round)
  )
  one = np.ones((1, 2, 2), np.float32)
  ones = Trained({'q': Lora(one, one)}, {})
  state, out = optimizer.init(ones), []
  for _ in range(count):
    updates, state = optimizer.update(ones, state, ones)
    out.append([float(x[0, 0, 0]) for x in updates.adapters['q']])
  return np.array(out).T


@pytest.mark.parametrize('name', ['sgd', 'adam'])
def test_steps_follow_the_schedules(name):
  plain = steps_of(name=name)
  np.testing.assert_allclose(plain, -RATE, 1e-4)
  half = steps_of(name=name, schedule='linear', round=4)
  np.testing.assert_allclose(half, plain / 2, 1e-5)
  fall = steps_of(name=name, local_schedule='linear')
  np.testing.assert_allclose(fall, plain * [1, 3 / 4, 1 / 2, 1 / 4], 1e-5)
  both = steps_of(name=name, local_schedule='cosine', schedule='linear', round=4)
  np.testing.assert_allclose(both, plain / 2 * cosine(np.arange(4) / 4), 1e-5)
  b_faster = steps_of(name=name, b_rate_ratio=16.0)
  np.testing.assert_allclose(b_faster, plain * [[1], [16]], 1e-5)
  longer = steps_of(name=name, schedule='linear', decay_rounds=16, round=4)
  np.testing.assert_allclose(longer, plain * 3 / 4, 1e-5)


def test_a_local_schedule_lasts_as_long_as_pooled_steps():
  pooled = dict(method='centralized', federated__clients_per_round=2)
  c = quadratic.make_config(
    federated__local_steps=2, client_optimizer__local_schedule='linear', **pooled
  )
  optimizer = build.make_rules(c, quadratic.loss).client_optimizer(
    build.make_hyperparameters(c), jnp.int32(0)
  )
  one = np.ones(1, np.float32)
  state, moved = optimizer.init(one), []
  for _ in range(4):  # two steps for each of two clients
    updates, state = optimizer.update(one, state, one)
    moved.append(float(updates[0]))
  np.testing.assert_allclose(moved, [-RATE * x / 4 for x in (4, 3, 2, 1)], 1e-5)


def test_a_round_of_a_schedule_is_one_at_that_rate():
  """The whole round, whose rate is data, against the same at another rate."""
  rng = np.random.default_rng(1)
  base, cohort = quadratic.make_base(rng), quadratic.make_cohort(rng)
  scheduled = quadratic.make_run(
    RANKS, client_optimizer__schedule='cosine', client_optimizer__decay_rounds=6
  )
  plain = quadratic.make_run(RANKS)
  state = scheduled.state
  for t in range(3):
    rate = float(RATE * cosine(t / 6))
    hyper = quadratic.make_run(RANKS, client_optimizer__learning_rate=rate).hyper
    want, _ = plain.round(base, state, cohort, hyper)
    state, _ = scheduled.step(base, state, cohort)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6),
      state.adapters, want.adapters,
    )  # fmt: skip


@pytest.mark.parametrize('method', ['hetlora', 'fedprox', 'full_finetuning'])
def test_batches_that_are_added_up_are_one(method):
  """Two steps of two batches equal two steps of one batch of twice the rows."""
  rng = np.random.default_rng(3)
  base, cohort = quadratic.make_base(rng), quadratic.make_cohort(rng)
  one = jax.tree.map(lambda x: x[1], cohort.batches)  # [STEPS, ROWS, ...]
  steps = one['weight'].shape[0] // 2 * 2
  few = jax.tree.map(lambda x: np.array(x[:steps]), one)
  few['weight'][0] *= np.arange(few['weight'].shape[1]) < 1  # uneven batches
  large = jax.tree.map(lambda x: x.reshape(steps // 2, -1, *x.shape[2:]), few)
  found = []
  for accumulate, batches in ((2, few), (1, large)):
    made = quadratic.make_run(
      RANKS, method=method, federated__accumulate=accumulate,
      federated__tail_penalty=1.0, federated__proximal=2.0,
    )  # fmt: skip
    start, *rest = received(made)
    if method == 'full_finetuning':
      start = start._replace(change=jax.tree.map(jnp.zeros_like, made.state.residual))
    found.append(
      client.local_update(
        made.rules,
        base,
        start,
        *rest,
        batches,
        jnp.int32(0),
        made.hyper,
        jax.random.key(0),
      )  # fmt: skip
    )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), *found)


def test_a_client_of_fewer_batches_loses_none_of_them():
  rng = np.random.default_rng(3)
  base, cohort = quadratic.make_base(rng), quadratic.make_cohort(rng, (1, 0, 0, 0))
  made = quadratic.make_run(RANKS, federated__accumulate=2)
  batches = jax.tree.map(lambda x: x[0, :2], cohort.batches)
  start, *rest = received(made)
  trained, _, tokens = client.local_update(
    made.rules, base, start, *rest, batches, jnp.int32(0), made.hyper, jax.random.key(0)
  )  # fmt: skip
  assert tokens == 1
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), trained, start)
  assert max(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
  ('fields', 'said'),
  [
    ({'schedule': 'linear', 'warmup_rounds': 8}, 'the rate falls in 8 rounds'),
    ({'weight_decay': 0.1}, 'take adamw'),
    ({'schedule': 'step'}, "'cosine'"),
    ({'b_rate_ratio': 16.0}, 'full fine-tuning has no B'),
  ],
)
def test_knobs_that_do_not_fit_are_named(fields, said):
  full = {'method': 'full_finetuning'} if 'b_rate_ratio' in fields else {}
  with pytest.raises(config.ConfigError, match=said):
    quadratic.make_config(
      federated__num_rounds=8,
      **full,
      **{f'client_optimizer__{k}': v for k, v in fields.items()},
    )


def test_a_falling_rate_goes_on_as_it_began():
  def differ(rounds, **fields):
    made = [
      small_config(
        federated__num_rounds=n, client_optimizer__schedule='linear', **fields
      )
      for n in (4, rounds)
    ]
    return [name for name, *_ in run._differences(*made)]

  assert differ(4) == []
  assert differ(8) == ['federated.num_rounds']
  assert differ(8, client_optimizer__decay_rounds=4) == []
