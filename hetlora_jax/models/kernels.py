"""The arithmetic that takes the time: frozen products, attention, the loss."""

import functools

import jax
import jax.numpy as jnp

from hetlora_jax.types import Array


def _product(x: Array, w: Array) -> Array:
  # bfloat16 operands with a float32 result are what AMX and GPUs are fast at.
  return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def matmul(x: Array, w: Array) -> Array:
  """Returns `x @ w` in the type of `x`, summed in float32 in both passes.

  Args:
    x: [..., d_in].
    w: [d_in, d_out], of the type of `x`. Its gradient is a product of its own,
      which XLA drops when the weight is frozen.
  """
  return _product(x, w)


def _matmul_forward(x, w):
  return _product(x, w), (x, w)


def _matmul_backward(residuals, d_out):
  x, w = residuals
  d_w = jnp.einsum(
    '...i,...o->io', x, d_out, preferred_element_type=jnp.float32
  )
  return _product(d_out, w.T), d_w.astype(w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """Attends with grouped heads; softmax in float32.

  Args:
    q: [P, T, H, d], already scaled.
    k: [P, T, K, d] with K dividing H.
    v: [P, T, K, d].
    mask: [P, T, T], True where a query may look.

  Returns:
    [P, T, H, d]. Rows without any True attend to everything, evenly.
  """
  rows, length, heads, depth = q.shape
  groups = heads // k.shape[2]
  q = q.reshape(rows, length, k.shape[2], groups, depth)
  score = jnp.einsum('ptkgd,pskd->pkgts', q, k).astype(jnp.float32)
  score = jnp.where(mask[:, None, None], score, jnp.float32(-1e30))
  weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
  out = jnp.einsum('pkgts,pskd->ptkgd', weight, v)
  return out.reshape(rows, length, heads, depth)


def _chunks(size: int, *arrays: Array) -> tuple[Array, ...]:
  """Pads arrays [M, ...] with zeros and cuts them to [M/size, size, ...]."""
  pad = -arrays[0].shape[0] % size
  return tuple(
    jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(
      -1, size, *x.shape[1:]
    )
    for x in arrays
  )


def _chunk_loss(h, embed, target, weight):
  """Returns the weighted loss sum of one chunk, and d loss / d logit."""
  logit = jnp.einsum('md,vd->mv', h, embed, preferred_element_type=jnp.float32)
  log_sum = jax.nn.logsumexp(logit, axis=1, keepdims=True)
  picked = jnp.take_along_axis(logit, target[:, None], axis=1)
  loss = ((log_sum - picked)[:, 0] * weight).sum()
  is_target = jnp.arange(embed.shape[0])[None] == target[:, None]
  return loss, (jnp.exp(logit - log_sum) - is_target) * weight[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(
  h: Array, embed: Array, target: Array, weight: Array, chunk: int = 256
) -> Array:
  """Sums weighted cross-entropies of `softmax(h embed^T)`, in float32.

  The [M, V] logits exist for `chunk` positions at a time. When differentiated,
  the forward pass keeps d loss / d h, so the logits are computed once; the
  gradient of `embed` costs nothing unless it is asked for.

  Args:
    h: [M, D].
    embed: [V, D].
    target: [M] int32.
    weight: [M] float32; 0 is padding.
    chunk: positions at a time; a shorter list is one chunk.
  """

  def step(total, xs):
    h_c, target_c, weight_c = xs
    return total + _chunk_loss(h_c, embed, target_c, weight_c)[0], None

  xs = _chunks(min(chunk, h.shape[0]), h, target, weight)
  return jax.lax.scan(step, jnp.float32(0), xs)[0]


def _forward(h, embed, target, weight, chunk):
  def step(total, xs):
    h_c, target_c, weight_c = xs
    loss, d_logit = _chunk_loss(h_c, embed, target_c, weight_c)
    return total + loss, matmul(d_logit.astype(h.dtype), embed)

  xs = _chunks(min(chunk, h.shape[0]), h, target, weight)
  total, d_h = jax.lax.scan(step, jnp.float32(0), xs)
  d_h = d_h.reshape(-1, h.shape[1])[: h.shape[0]]
  return total, (d_h, h, embed, target, weight)


def _backward(chunk, residuals, cotangent):
  d_h, h, embed, target, weight = residuals

  def step(d_embed, xs):
    h_c, target_c, weight_c = xs
    d_logit = _chunk_loss(h_c, embed, target_c, weight_c)[1]
    d_embed_c = jnp.einsum(
      'mv,md->vd', d_logit.astype(h.dtype), h_c,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    return d_embed + d_embed_c, None

  # A loop of its own, which XLA drops when the embedding is frozen.
  xs = _chunks(min(chunk, h.shape[0]), h, target, weight)
  d_embed, _ = jax.lax.scan(step, jnp.zeros(embed.shape, jnp.float32), xs)
  d_h, d_embed = d_h * cotangent, d_embed * cotangent  # in float32
  return d_h.astype(h.dtype), d_embed.astype(embed.dtype), None, None


linear_cross_entropy.defvjp(_forward, _backward)
