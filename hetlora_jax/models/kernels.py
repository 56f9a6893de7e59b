"""The arithmetic that dominates a step: frozen products, attention, the loss.

Axes: M positions, V the vocabulary, v one chunk of it, D width, B positions of
one decoding step.
"""

import functools

import jax
import jax.numpy as jnp

from hetlora_jax.types import Array, Lora


def _product(x: Array, w: Array) -> Array:
  # bfloat16 operands with a float32 result are what AMX and GPUs are fast at.
  return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
  """Returns `x @ w` in the type of `x`, summed in float32 in both passes.

  Args:
    x: [..., d_in].
    w: [d_in, d_out], of the type of `x`. Its gradient is a separate product,
      which XLA drops when the weight is frozen.
  """
  return _product(x, w)


def _matmul_forward(x, w):
  return _product(x, w), (x, w)


def _matmul_backward(residuals, d_out):
  x, w = residuals
  d_w = jnp.einsum('...i,...o->io', x, d_out, preferred_element_type=jnp.float32)
  return _product(d_out, w.T), d_w.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def low_rank(x: Array, adapter: Lora, scale: Array) -> Array:
  """Returns `scale * x A B` in the type of `x`: [..., d_in] -> [..., d_out]."""
  low = scale.astype(x.dtype) * matmul(x, adapter.a.astype(x.dtype))
  return matmul(low, adapter.b.astype(x.dtype))


def soft_cap(x: Array, cap: float) -> Array:
  """Returns `cap tanh(x / cap)`, or x as it is for a cap of 0."""
  return cap * jnp.tanh(x / cap) if cap else x


def attention(q: Array, k: Array, v: Array, mask: Array, softcap: float = 0.0) -> Array:
  """Computes grouped-query attention, with the softmax in float32.

  Args:
    q: [P, T, H, d], already scaled.
    k: [P, S, K, d] with K dividing H.
    v: [P, S, K, d].
    mask: [P, T, S], True where a query may attend to a key.
    softcap: of the scores, see `soft_cap`.

  Returns:
    [P, T, H, d]. A query that may attend to no key attends evenly to all of them.
  """
  if softcap:
    return _capped_attention(q, k, v, mask, softcap)
  # Not cuDNN, which refuses a vmapped mask unless every head has a mask of its
  # own (jax 0.11). benchmarks.accelerator measures whether it would be faster.
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask[:, None], scale=1.0, implementation='xla'
  )


def _capped_attention(q, k, v, mask, softcap: float) -> Array:
  """Computes `attention` as XLA's own does, which caps no scores."""
  grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
  score = jnp.einsum(
    'ptkgd,pskd->pkgts', grouped, k, preferred_element_type=jnp.float32
  )
  score = soft_cap(score, softcap)
  score = jnp.where(mask[:, None, None], score, 0.7 * jnp.finfo(jnp.float32).min)
  p = jax.nn.softmax(score, -1).astype(v.dtype)
  return jnp.einsum('pkgts,pskd->ptkgd', p, v).reshape(q.shape)


VOCAB_CHUNK_SIZE_ON_ACCELERATORS = 32768


def vocab_chunk_size() -> int:
  """Returns of how many tokens of the vocabulary the logits exist at a time.

  On a CPU the embeddings of 2048 tokens and their logits stay in its cache, which
  made the loss 1.3 to 1.9 times as fast as the whole vocabulary at once
  (WORKSPACE_NOTES); accelerators want few, large products.
  """
  on_cpu = jax.default_backend() == 'cpu'
  return 2048 if on_cpu else VOCAB_CHUNK_SIZE_ON_ACCELERATORS


def _split_vocab(embed: Array, chunk_size: int | None) -> Array:
  """Splits the vocabulary into n interleaved chunks: [V, D] -> [V/n, n, D].

  Neighbours go to different chunks, so every chunk is spread over all devices
  that hold a part of the vocabulary. Zeros pad a vocabulary that no suitable n
  divides.
  """
  size, width = embed.shape
  fewest = -(-size // (chunk_size or vocab_chunk_size()))
  # Padding copies the embedding: up to twice as many chunks are better.
  even = (n for n in range(fewest, 2 * fewest + 1) if size % n == 0)
  count = next(even, fewest)
  if size % count:
    embed = jnp.pad(embed, ((0, -size % count), (0, 0)))
  return embed.reshape(-1, count, width)


def _chunk_logits(
  h: Array, chunks: Array, i: Array, vocab_size: int, softcap: float
) -> tuple[Array, Array, Array]:
  """Returns chunk i's embeddings [v, D], its tokens [1, v] and logits [M, v]."""
  embed = jax.lax.dynamic_index_in_dim(chunks, i, axis=1, keepdims=False)
  token = jnp.arange(chunks.shape[0])[None] * chunks.shape[1] + i
  logit = jnp.einsum('md,vd->mv', h, embed, preferred_element_type=jnp.float32)
  logit = soft_cap(logit, softcap)
  # The rows that pad the vocabulary are no tokens and get no probability.
  return embed, token, jnp.where(token < vocab_size, logit, -jnp.inf)


def _slope(capped: Array, cap: float) -> Array:
  """Returns the derivative of `soft_cap` where its value is `capped`; cap > 0."""
  return 1 - (capped / cap) ** 2


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_cross_entropy(
  h: Array,
  embed: Array,
  target: Array,
  weight: Array,
  chunk_size: int | None = None,
  softcap: float = 0.0,
) -> Array:
  """Sums the weighted cross-entropies of `softmax(h embed^T)`, in float32.

  The gradient in `h` is attention of `h` over the vocabulary minus the target's
  embedding, so one pass over the vocabulary, with a running maximum as in
  FlashAttention (Dao et al., 2022, arXiv 2205.14135), yields the loss and this
  gradient; the [M, V] logits never exist. The gradient in `embed` costs nothing
  unless it is asked for.

  Args:
    h: [M, D].
    embed: [V, D].
    target: [M] int32.
    weight: [M] float32; 0 marks padding.
    chunk_size: how many tokens of the vocabulary are scored at a time; None
      stands for `vocab_chunk_size()`.
    softcap: of the logits, see `soft_cap`; static.
  """
  return _forward(h, embed, target, weight, chunk_size, softcap)[0]


def cross_entropies(
  h: Array,
  embed: Array,
  target: Array,
  chunk_size: int | None = None,
  softcap: float = 0.0,
) -> Array:
  """Returns the cross-entropies that `linear_cross_entropy` sums: [M] float32."""
  return _in_one_pass(h, embed, target, chunk_size, softcap)[0]


def _forward(h, embed, target, weight, chunk_size, softcap):
  """Returns the loss, and what the backward pass needs, `d_h` included."""
  nats, log_sum, d_h = _in_one_pass(h, embed, target, chunk_size, softcap)
  loss = (nats * weight).sum()
  return loss, (d_h * weight[:, None], log_sum, h, embed, target, weight)


def _in_one_pass(h, embed, target, chunk_size, softcap):
  """Returns each position's loss [M], log_sum_exp [M, 1] and gradient [M, D].

  XLA drops the work of what is not used.
  """
  chunks = _split_vocab(embed, chunk_size)

  def step(carry, i):
    top, total, mixed = carry
    embed_c, _, logit = _chunk_logits(h, chunks, i, embed.shape[0], softcap)
    new_top = jnp.maximum(top, logit.max(1, keepdims=True))
    # Subtract the running maximum, so p of the top token is exactly 1 in bfloat16.
    shrink, p = jnp.exp(top - new_top), jnp.exp(logit - new_top)
    total = total * shrink + p.sum(1, keepdims=True)
    if softcap:  # padded rows have p = 0 and an infinite slope
      p = jnp.where(p > 0, p * _slope(logit, softcap), 0)
    mixed_c = jnp.matmul(p.astype(h.dtype), embed_c, preferred_element_type=jnp.float32)
    return (new_top, total, mixed * shrink + mixed_c), None

  # Scan over the chunks: the top logit, the sum of exponentials and the sum of
  # embeddings that these weigh.
  zero = jnp.zeros((h.shape[0], 1))
  start = (zero - jnp.inf, zero, jnp.zeros(h.shape))
  (top, total, mixed), _ = jax.lax.scan(step, start, jnp.arange(chunks.shape[1]))

  # The loss is log_sum_exp - h . embed[target]; its gradient is the mean
  # embedding minus the target's, each times the slope of a soft cap.
  log_sum, target_embed = top + jnp.log(total), embed[target].astype(jnp.float32)
  target_logit = soft_cap((h.astype(jnp.float32) * target_embed).sum(1), softcap)
  if softcap:  # rounded as above, so that of a sure target the difference is exact
    slope = _slope(target_logit, softcap).astype(h.dtype).astype(jnp.float32)
    target_embed = target_embed * slope[:, None]
  return log_sum[:, 0] - target_logit, log_sum, mixed / total - target_embed


def _backward(chunk_size, softcap, residuals, cotangent):
  """Scales the gradient in `h`, and computes the one in `embed` chunk by chunk."""
  d_h, log_sum, h, embed, target, weight = residuals
  chunks = _split_vocab(embed, chunk_size)

  def step(_, i):
    _, token, logit = _chunk_logits(h, chunks, i, embed.shape[0], softcap)
    p = jnp.exp(logit - log_sum)
    d_logit = (p - (token == target[:, None])) * weight[:, None]
    if softcap:
      d_logit = jnp.where(jnp.isfinite(logit), d_logit * _slope(logit, softcap), 0)
    d_embed_c = jnp.einsum(
      'mv,md->vd', d_logit.astype(h.dtype), h,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    return None, (d_embed_c * cotangent).astype(embed.dtype)

  # A separate loop, which XLA drops when the embedding is frozen.
  _, d_chunks = jax.lax.scan(step, None, jnp.arange(chunks.shape[1]))
  d_embed = d_chunks.swapaxes(0, 1).reshape(-1, h.shape[1])[: embed.shape[0]]
  return (d_h * cotangent).astype(h.dtype), d_embed, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def argmax_and_log_prob(
  h: Array,
  embed: Array,
  target: Array,
  chunk_size: int | None = None,
  softcap: float = 0.0,
) -> tuple[Array, Array]:
  """Returns the most likely token and log p of the target at many positions.

  One pass over the vocabulary as in `linear_cross_entropy`, without gradients.

  Args:
    h: [M, D].
    embed: [V, D].
    target: [M] int32.
    chunk_size: see `linear_cross_entropy`.
    softcap: likewise.

  Returns:
    [M] int32 and [M] float32.
  """
  chunks = _split_vocab(embed, chunk_size)

  def step(carry, i):
    top, total, best = carry
    _, token, logit = _chunk_logits(h, chunks, i, embed.shape[0], softcap)
    chunk_top, place = jax.lax.top_k(logit, 1)
    new_top = jnp.maximum(top, chunk_top[:, 0])
    p = jnp.exp(logit - new_top[:, None]).sum(1)
    best = jnp.where(chunk_top[:, 0] > top, token[0, place[:, 0]], best)
    return (new_top, total * jnp.exp(top - new_top) + p, best), None

  # Scan over the chunks: the top logit, the sum of exponentials, the top token.
  zero = jnp.zeros(h.shape[0])
  start = (zero - jnp.inf, zero, jnp.zeros_like(target))
  (top, total, best), _ = jax.lax.scan(step, start, jnp.arange(chunks.shape[1]))
  target_embed = embed[target].astype(jnp.float32)
  target_logit = soft_cap((h.astype(jnp.float32) * target_embed).sum(1), softcap)
  return best, target_logit - top - jnp.log(total)


def argmax_token(h: Array, embed: Array) -> Array:
  """Returns the most likely token at few positions: h [B, D] -> [B] int32.

  On a CPU it takes half the time of a plain product and argmax to have the
  embedding on the left of the product and to take a maximum of maxima.
  """
  size, _ = embed.shape
  across = (((1,), (1,)), ((), ()))
  logit = jax.lax.dot_general(embed, h, across, preferred_element_type=jnp.float32)
  groups = next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)
  logit = logit.reshape(groups, size // groups, -1)
  group_B = logit.max(1).argmax(0)
  in_group = jnp.take_along_axis(logit, group_B[None, None], 0)[0]
  return (group_B * (size // groups) + in_group.argmax(0)).astype(jnp.int32)


def top_k_tokens(
  h: Array, embed: Array, k: int, softcap: float = 0.0
) -> tuple[Array, Array, Array]:
  """Returns the k most likely tokens at few positions, from all logits at once.

  Args:
    h: [..., D].
    embed: [V, D].
    k: at most V.
    softcap: of the logits, see `soft_cap`.

  Returns:
    The tokens [..., k], the most likely first, their logits [..., k] in float32,
    and the log of the summed exponentials of all logits, [...].
  """
  logit = jnp.einsum('...d,vd->...v', h, embed, preferred_element_type=jnp.float32)
  logit = soft_cap(logit, softcap)
  top, token = jax.lax.top_k(logit, k)
  return token, top, jax.nn.logsumexp(logit, -1)
