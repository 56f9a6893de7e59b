"""The costly arithmetic equals the plain one, in the types and sizes it says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetlora_jax.models import kernels

# Clients, positions, vocabulary, width, width out.
C, M, V, D, K = 3, 11, 17, 6, 5


def _normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _assert_close(got, want):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
    got, want,
  )  # fmt: skip


def _task(rows=M):
  """Returns h, embed, target and weight of a loss with padding."""
  rng = np.random.default_rng(rows)
  target = jnp.asarray(rng.integers(0, V, rows))
  weight = jnp.asarray(rng.integers(0, 2, rows), jnp.float32)
  return _normal(0, rows, D), _normal(1, V, D), target, weight


def _plain_loss(h, embed, target, weight):
  log_prob = jax.nn.log_softmax(h @ embed.T)
  picked = jnp.take_along_axis(log_prob, target[:, None], 1)[:, 0]
  return -(picked * weight).sum()


def test_a_product_has_the_gradients_of_a_plain_one():
  x, w, d_out = _normal(0, 2, 7, D), _normal(1, D, K), _normal(2, 2, 7, K)

  def gradients(product):
    out, pull = jax.vjp(product, x, w)
    many = jax.vmap(lambda x: jax.vjp(product, x, w)[1](d_out[0]))(x)
    return out, pull(d_out), many

  _assert_close(gradients(kernels.matmul), gradients(jnp.matmul))


def test_both_passes_multiply_bfloat16_and_sum_in_float32():
  x = _normal(0, 7, D).astype('bfloat16')
  w = _normal(1, D, K).astype('bfloat16')

  def loss(x, w):
    return kernels.matmul(x, w).astype(jnp.float32).sum()

  lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, w).as_text()
  products = [y for y in lowered.splitlines() if 'dot_general' in y]
  assert len(products) == 3
  for product in products:
    types = re.findall(r'x(bf16|f32)>', product)
    assert types == ['bf16', 'bf16', 'f32'], product


@pytest.mark.parametrize('softcap', [0.0, 1.5])
def test_attention_equals_one_head_at_a_time(softcap):
  q, k, v = (
    _normal(0, 2, 7, 6, 4),
    _normal(1, 2, 7, 3, 4),
    _normal(2, 2, 7, 3, 4),
  )
  mask = jnp.asarray(np.random.default_rng(3).integers(0, 2, (2, 7, 7)), bool)
  mask = mask | jnp.eye(7, dtype=bool)[None]
  mask = mask.at[1, 2].set(False)  # sees nothing: everything, evenly
  got = kernels.attention(q, k, v, mask, softcap)
  for row in range(2):
    for head in range(6):
      score = q[row, :, head] @ k[row, :, head // 2].T
      score = softcap * np.tanh(score / softcap) if softcap else score
      score = jnp.where(mask[row], score, -1e30)
      want = jax.nn.softmax(score) @ v[row, :, head // 2]
      np.testing.assert_allclose(got[row, :, head], want, atol=1e-5)
  np.testing.assert_allclose(got[1, 2, 0], v[1, :, 0].mean(0), atol=1e-5)


@pytest.mark.parametrize('softcap', [0.0, 1e4])
def test_attention_scores_of_bfloat16_are_float32(softcap):
  """Two scores near 50 that bfloat16 would round to one."""
  q = jnp.full((1, 1, 1, 4), 3.53125, 'bfloat16')
  k = jnp.asarray([[3.53125] * 4, [3.53125] * 3 + [3.515625]], 'bfloat16')
  v = jnp.asarray([[1.0, 0, 0, 0], [0, 1, 0, 0]], 'bfloat16')
  mask = jnp.ones((1, 1, 2), bool)
  out = kernels.attention(q, k[None, :, None], v[None, :, None], mask, softcap)
  want = 1 / (1 + np.exp(-3.53125 * (3.53125 - 3.515625)))
  np.testing.assert_allclose(out[0, 0, 0, 0].astype('float32'), want, rtol=4e-3)


@pytest.mark.parametrize('chunk_size', [1, 4, V, 100])  # 4: the last are padding
def test_fused_loss_equals_plain_loss(chunk_size):
  h, embed, target, weight = _task()

  def fused(h, embed):
    return 3 * kernels.linear_cross_entropy(h, embed, target, weight, chunk_size)

  def plain(h, embed):
    return 3 * _plain_loss(h, embed, target, weight)

  got = jax.jit(jax.value_and_grad(fused, (0, 1)))(h, embed)
  _assert_close(got, jax.value_and_grad(plain, (0, 1))(h, embed))


@pytest.mark.parametrize('chunk_size', [1, 4, V, 100])
def test_a_capped_loss_and_its_gradients_are_those_of_the_formula(chunk_size):
  args, cap = _task(), 1.5
  h, embed, target, weight = (np.asarray(x, np.float64) for x in args)
  target = target.astype(int)
  logit = cap * np.tanh(h @ embed.T / cap)
  p = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
  want = -(np.log(p[np.arange(M), target]) * weight).sum()
  d_logit = (p - np.eye(V)[target]) * weight[:, None] * (1 - (logit / cap) ** 2)

  def fused(h, embed):
    return kernels.linear_cross_entropy(h, embed, *args[2:], chunk_size, cap)

  loss, gradients = jax.jit(jax.value_and_grad(fused, (0, 1)))(*args[:2])
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  _assert_close(gradients, (d_logit @ embed, d_logit.T @ h))

  # The log-probabilities that generation and evaluation use are the same.
  best, log_prob = kernels.argmax_and_log_prob(*args[:3], chunk_size, cap)
  np.testing.assert_array_equal(best, p.argmax(1))
  _assert_close(log_prob, np.log(p[np.arange(M), target]))
  token, top, log_sum = kernels.top_k_tokens(*args[:2], 3, cap)
  _assert_close(top - log_sum[:, None], np.log(np.take_along_axis(p, token, 1)))


def test_fused_loss_of_many_clients_shares_the_embedding():
  _, embed, target, weight = _task(C * M)
  h = _normal(2, C, M, D)
  target, weight = target.reshape(C, M), weight.reshape(C, M)

  def total(loss):
    def summed(h, embed):
      return jax.vmap(loss, (0, None, 0, 0))(h, embed, target, weight).sum()

    return jax.value_and_grad(summed, (0, 1))(h, embed)

  _assert_close(total(kernels.linear_cross_entropy), total(_plain_loss))


def test_a_bfloat16_gradient_is_scaled_in_float32():
  h, embed, target, _ = _task()
  h, embed = h.astype('bfloat16'), embed.astype('bfloat16')
  scale = jnp.float32(1.0117)  # between two bfloat16 neighbours

  def gradients(scale):
    def loss(h, embed):
      ones = jnp.ones(M)
      return scale * kernels.linear_cross_entropy(h, embed, target, ones)

    return [x.astype(jnp.float32) for x in jax.grad(loss, (0, 1))(h, embed)]

  for got, one in zip(gradients(scale), gradients(1.0), strict=True):
    np.testing.assert_allclose((got * one).sum() / (one**2).sum(), scale, 1e-3)


def test_logits_exist_a_chunk_at_a_time_and_a_frozen_embedding_is_free():
  rows, vocab, width = 64, 2048, 32
  h, embed = jnp.ones((rows, width)), jnp.ones((vocab, width))
  target, weight = jnp.zeros(rows, jnp.int32), jnp.ones(rows)

  def compiled(chunk, inputs):
    def loss(h, embed):
      return kernels.linear_cross_entropy(h, embed, target, weight, chunk)

    step = jax.jit(jax.value_and_grad(loss, inputs) if inputs else loss)
    return step.lower(h, embed).compile()

  logits = rows * vocab * 4  # bytes
  memory = compiled(128, (0,)).memory_analysis()
  assert memory.temp_size_in_bytes < logits / 4
  product = 2 * rows * vocab * width
  evaluated, frozen, whole = (
    compiled(vocab, x).cost_analysis()['flops'] / product for x in ((), (0,), (0, 1))
  )
  assert 1 <= evaluated < 1.8  # the logits
  assert 2 <= frozen < 2.8  # and d_h
  assert whole > frozen + 0.9  # and d_embed


@pytest.mark.parametrize('softcap', [0.0, 11.0])
def test_a_sure_targets_gradient_keeps_its_digits_in_bfloat16(softcap):
  """1 - p is 1e-3 here, which bfloat16 does not resolve beside 1."""
  h, embed = jnp.eye(1, 2), jnp.asarray([[7.0, 0], [0, 1.0]])
  args = (jnp.zeros(1, jnp.int32), jnp.ones(1))

  def gradient(dtype):
    def loss(h):
      small = embed.astype(dtype)
      return kernels.linear_cross_entropy(h, small, *args, softcap=softcap)

    return jax.grad(loss)(h.astype(dtype)).astype(jnp.float32)

  np.testing.assert_allclose(gradient('bfloat16'), gradient('float32'), rtol=0.01)


def test_attention_of_vmapped_clients_has_a_gradient_on_a_gpu(monkeypatch):
  # cuDNN, once taken there for bfloat16 and narrow heads, refused the mask.
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  q = _normal(0, C, 1, 6, 4, 16).astype(jnp.bfloat16)
  k = _normal(1, C, 1, 6, 2, 16).astype(jnp.bfloat16)
  mask = jnp.ones((C, 1, 6, 6), bool)

  def total(q, k, mask):
    return kernels.attention(q, k, k, mask).astype(jnp.float32).sum()

  grads = jax.vmap(jax.grad(total))(q, k, mask)
  assert grads.shape == q.shape and jnp.isfinite(grads).all()


@pytest.mark.parametrize('chunk_size', [1, 4, 17, 100])  # 4: the last are padding
def test_the_argmax_and_log_prob_are_those_of_all_logits(chunk_size):
  rng = np.random.default_rng(chunk_size)
  h, embed = rng.normal(size=(11, 6)), rng.normal(size=(17, 6))
  h, embed = jnp.asarray(h, jnp.float32), jnp.asarray(embed, jnp.float32)
  target = jnp.asarray(rng.integers(0, 17, 11), jnp.int32)
  best, log_prob = jax.jit(kernels.argmax_and_log_prob, static_argnums=3)(
    h, embed, target, chunk_size
  )
  want = jax.nn.log_softmax(h @ embed.T)
  np.testing.assert_array_equal(best, want.argmax(1))
  picked = jnp.take_along_axis(want, target[:, None], 1)[:, 0]
  np.testing.assert_allclose(log_prob, picked, atol=1e-5)


@pytest.mark.parametrize('size', [12, 17, 36])  # 17 tokens are one group
def test_the_argmax_token_is_the_first_of_the_best(size):
  rng = np.random.default_rng(size)
  h = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
  embed = jnp.asarray(rng.normal(size=(size, 6)), jnp.float32)
  embed = embed.at[size - 2].set(embed[1])  # a tie
  got = jax.jit(kernels.argmax_token)(h, embed)
  np.testing.assert_array_equal(got, (h @ embed.T).argmax(1))
