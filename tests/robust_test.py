"""Clients that are not finite, or not honest; the bound, median, trimmed mean."""

import types

import jax
import numpy as np
import pytest
import quadratic

from hetlora_jax import config, robust, rows
from hetlora_jax.methods import aggregation
from hetlora_jax.types import ClientUpdates, Lora, Server, Trained

RANKS = [2, 9, 5, 7, 3, 9, 6, 2, 4, 8, 5]
METHODS = ('hetlora', 'flexlora', 'flora', 'full_finetuning', 'fedsa_lora')


def _poisoned(cohort, *clients):
  """Gives clients targets that make their loss not finite."""
  y = cohort.batches['q']['y'].copy()
  y[list(clients)] = np.nan
  batches = cohort.batches | {'q': cohort.batches['q'] | {'y': y}}
  return quadratic.Cohort(
    client_id=cohort.client_id,
    num_examples=cohort.num_examples,
    batches=batches,
  )


def _two_rounds(method, last, **fields):
  """Runs a healthy round and then `last(cohort)`; returns states and metrics."""
  run = quadratic.make_run(
    RANKS, method=method, server_optimizer__name='momentum', **fields
  )
  rng = np.random.default_rng(3)
  base = quadratic.make_base(rng)
  before, _ = run.step(base, run.state, quadratic.make_cohort(rng))
  cohort = quadratic.make_cohort(rng, clients=(5, 1, 8, 3))
  after, out = run.step(base, before, last(cohort))
  return before, after, out


def _close(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), a, b)


@pytest.mark.parametrize('method', METHODS)
def test_a_client_that_is_not_finite_counts_as_absent(method):
  def without(cohort):
    count = cohort.num_examples.copy()
    count[2] = 0
    return quadratic.Cohort(
      client_id=cohort.client_id, num_examples=count, batches=cohort.batches
    )

  _, poisoned, out = _two_rounds(method, lambda c: _poisoned(c, 2))
  _, absent, there = _two_rounds(method, without)
  _close(poisoned, absent)
  _close(out['weight'], there['weight'])
  np.testing.assert_array_equal(out['nonfinite'], [False, False, True, False])
  np.testing.assert_array_equal(out['reports'], [True, True, False, True])
  assert np.isfinite(out['loss_sum']).all() and out['tokens'][2] == 0


@pytest.mark.parametrize('method', METHODS)
def test_a_round_in_which_all_fail_changes_nothing(method):
  before, after, out = _two_rounds(method, lambda c: _poisoned(c, 0, 1, 2, 3))
  assert int(after.round) == int(before.round) + 1
  for field in ('adapters', 'residual', 'opt_state', 'memory'):
    jax.tree.map(
      np.testing.assert_array_equal,
      getattr(before, field),
      getattr(after, field),
    )
  assert out['nonfinite'].all() and not out['reports'].any()


def test_lost_rounds_and_clients_are_counted():
  run = quadratic.make_run(RANKS)
  rng = np.random.default_rng(3)
  cohort = quadratic.make_cohort(rng)
  base = quadratic.make_base(rng)

  model = types.SimpleNamespace(dims=quadratic.DIMS, params=base)
  built = types.SimpleNamespace(model=model)
  told = []
  for bad in ((), (1, 2), (0, 1, 2, 3)):
    _, out = run.step(base, run.state, _poisoned(cohort, *bad))
    out = jax.device_get(out)
    told.append(rows.round_row(built, run.config, 1, out, 1.0, 0.0))
  assert [r['fault/nonfinite_clients'] for r in told] == [0, 2, 4]
  assert [r['fault/lost_rounds'] for r in told] == [0, 0, 1]
  assert all(np.isfinite(r['train/loss']) for r in told)


def test_an_infinite_change_of_a_malicious_client_is_left_out():
  _, after, out = _two_rounds(
    'hetlora',
    lambda c: c,
    faults__malicious=1.0,
    faults__malicious_scale=float('inf'),
  )
  assert out['nonfinite'].all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.adapters))


def _trained(rng, scale=1.0):
  adapters = {
    t: Lora(
      scale * rng.normal(size=(n, d_in, 3)).astype(np.float32),
      scale * rng.normal(size=(n, 3, d_out)).astype(np.float32),
    )
    for t, (n, d_in, d_out) in quadratic.DIMS.items()
  }
  return Trained(adapters, {'q': scale * rng.normal(size=4).astype(np.float32)})


@pytest.mark.parametrize('bound', [1e-3, 1.0, 1e3])
def test_a_change_is_shortened_to_the_bound_and_not_turned(bound):
  rng = np.random.default_rng(0)
  received, trained = _trained(rng), _trained(rng)
  found = robust.bounded(received, trained, norm=bound)

  def change(to):
    pairs = zip(jax.tree.leaves(to), jax.tree.leaves(received), strict=True)
    return np.concatenate([np.ravel(a - b) for a, b in pairs]).astype(float)

  want, got = change(trained), change(found)
  size = np.linalg.norm(want)
  np.testing.assert_allclose(
    got, want * min(1, bound / size), 1e-3, 1e-6 * max(1, bound)
  )
  if bound > size:
    jax.tree.map(np.testing.assert_array_equal, found, trained)


def _first_weight(client_scale, **fields):
  """Returns the first client's weight when it alone scales what it sends."""
  seed = next(s for s in range(999) if _malicious(s) == [True] + 3 * [False])
  run = quadratic.make_run(
    RANKS, seed=seed, faults__malicious=0.3,
    faults__malicious_scale=client_scale, **fields,
  )  # fmt: skip
  rng = np.random.default_rng(1)
  cohort = quadratic.make_cohort(rng, (9, 9, 9, 9), (0, 1, 2, 3))
  state, out = run.step(quadratic.make_base(rng), run.state, cohort)
  return float(np.mean([w[0] for w in out['weight'].values()])), state.adapters


def _malicious(seed):
  return [
    float(jax.random.uniform(robust.prng.stream(seed, 'malicious', i))) < 0.3
    for i in range(4)
  ]


def test_a_scaled_client_captures_norm_weights_and_the_bound_frees_them():
  honest, _ = _first_weight(1.0)
  captured, far = _first_weight(100.0)
  bounded, near = _first_weight(100.0, federated__norm_bound=0.5)
  by_size, _ = _first_weight(100.0, methods__weighting='size')
  assert captured > 0.9 > 0.5 > bounded
  assert honest < 0.5 and by_size == pytest.approx(0.25)
  size = lambda x: float(np.linalg.norm(x['q'].b))  # noqa: E731
  assert size(far) > 10 * size(near)
  for rule in ('median', 'trimmed_mean'):
    _, robust = _first_weight(100.0, methods__aggregation=rule, methods__trim=0.25)
    assert size(far) > 10 * size(robust)


def _updates(rng, clients=7):
  rank = rng.integers(0, 6, clients)
  count = np.array([3.0, 0, 5, 2, 9, 1, 4], np.float32)[:clients]
  mask = (np.arange(6) < rank[:, None]).astype(np.float32)
  masks = {t: np.repeat(mask[:, None], n, 1) for t, (n, _, _) in quadratic.DIMS.items()}

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32)

  adapters = {
    t: Lora(
      draw(clients, n, d_in, 6) * mask[:, None, None, :],
      draw(clients, n, 6, d_out) * mask[:, None, :, None],
    )
    for t, (n, d_in, d_out) in quadratic.DIMS.items()
  }
  server = {
    t: Lora(draw(n, d_in, 6), draw(n, 6, d_out))
    for t, (n, d_in, d_out) in quadratic.DIMS.items()
  }
  updates = ClientUpdates(
    adapters=adapters, mask=masks, scale=np.ones(clients, np.float32),
    num_examples=count, norm={},
  )  # fmt: skip
  updates, masks, server = jax.tree.map(
    jax.numpy.asarray, (updates, masks, Server(server, np.float32(1)))
  )
  return updates, masks, server, rank, count > 0


def _plain(values, trim):
  """A coordinate's trimmed mean, or its median, in plain numpy."""
  if trim is None:
    return np.median(values)
  cut = int(trim * len(values) + 1e-9)
  cut = min(cut, (len(values) - 1) // 2)
  return np.sort(values)[cut : len(values) - cut].mean()


@pytest.mark.parametrize('trim', [None, 0.0, 0.2, 0.34, 0.49])
@pytest.mark.parametrize('seed', range(3))
def test_median_and_trimmed_mean_agree_with_numpy(trim, seed):
  updates, masks, server, rank, here = _updates(np.random.default_rng(seed))
  if trim is None:
    found = aggregation.median(updates, masks, server)
  else:
    found = aggregation.trimmed_mean(updates, masks, server, trim=trim)
  found, updates, server = jax.device_get((found, updates, server))
  for t, (n, d_in, d_out) in quadratic.DIMS.items():
    for slot in range(6):
      owners = here & (rank > slot)
      for layer, d in np.ndindex(n, d_in):
        values = updates.adapters[t].a[owners, layer, d, slot]
        want = server.adapters[t].a[layer, d, slot]
        want = _plain(values, trim) if len(values) else want
        assert found[t].a[layer, d, slot] == pytest.approx(want, abs=1e-5)
      for layer, d in np.ndindex(n, d_out):
        values = updates.adapters[t].b[owners, layer, slot, d]
        want = server.adapters[t].b[layer, slot, d]
        want = _plain(values, trim) if len(values) else want
        assert found[t].b[layer, slot, d] == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
  'fields, why',
  [
    ({'methods.trim': 0.5}, r'methods.trim=0.5 must be in \[0, 0.5\)'),
    ({'faults.malicious': 1.5}, r'faults.malicious=1.5 must be in \[0, 1\]'),
    ({'federated.norm_bound': -1.0}, 'norm_bound=-1.0 must be above 0'),
    (
      {'method': 'full_finetuning', 'methods.aggregation': 'median'},
      "trainable='base' does not fit .*take aggregation 'factors'",
    ),
  ],
)  # fmt: skip
def test_what_cannot_be_is_refused(fields, why):
  raw = quadratic.default.get_config()
  raw.update_from_flattened_dict(fields)
  with pytest.raises(config.ConfigError, match=why):
    config.resolve(raw)
