"""The arithmetic that takes the time: frozen products, attention, the loss."""

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
    w: [d_in, d_out], of the type of `x`. Its gradient is a product of its own,
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
  # Not by cuDNN, which refuses a mask that is vmapped unless every head has its
  # own (jax 0.11); whether it would be faster, benchmarks.accelerator tells.
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask[:, None], scale=1.0, implementation='xla'
  )


WORDS_ON_ACCELERATORS = 32768


def words_at_once() -> int:
  """Returns how many words' logits exist at a time.

  On a CPU the vectors of 2048 words and their logits stay in its cache, which
  made the loss 1.3 to 1.9 times as fast as all words at once (WORKSPACE_NOTES);
  accelerators want few, large products.
  """
  on_cpu = jax.default_backend() == 'cpu'
  return 2048 if on_cpu else WORDS_ON_ACCELERATORS


def _deal(embed: Array, words: int) -> Array:
  """Deals the words out to n chunks: [V, D] -> [V/n, n, D].

  Neighbours go to different chunks, so every chunk is spread over all devices
  that hold a part of the vocabulary.
  """
  size, width = embed.shape
  fewest = -(-size // words)
  # Padding copies the embedding: up to twice as many chunks are better.
  even = (n for n in range(fewest, 2 * fewest + 1) if size % n == 0)
  count = next(even, fewest)
  if size % count:
    embed = jnp.pad(embed, ((0, -size % count), (0, 0)))
  return embed.reshape(-1, count, width)


def _score(h: Array, dealt: Array, i: Array, size: int):
  """Scores chunk i: its embeddings [v, D], its words [1, v], logits [M, v]."""
  embed = jax.lax.dynamic_index_in_dim(dealt, i, axis=1, keepdims=False)
  word = jnp.arange(dealt.shape[0])[None] * dealt.shape[1] + i
  logit = jnp.einsum('md,vd->mv', h, embed, preferred_element_type=jnp.float32)
  return embed, word, jnp.where(word < size, logit, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(
  h: Array, embed: Array, target: Array, weight: Array, words: int = 0
) -> Array:
  """Sums weighted cross-entropies of `softmax(h embed^T)`, in float32.

  Its gradient in `h` is attention of `h` over the words, less the target's
  vector, so one pass over the vocabulary, with a running maximum as in
  FlashAttention (Dao et al., 2022, arXiv 2205.14135), gives both; the [M, V]
  logits never exist. The gradient of `embed` costs nothing unless asked for.

  Args:
    h: [M, D].
    embed: [V, D].
    target: [M] int32.
    weight: [M] float32; 0 is padding.
    words: at a time; 0 is `words_at_once()`.
  """
  return _forward(h, embed, target, weight, words)[0]


def _forward(h, embed, target, weight, words):
  dealt = _deal(embed, words or words_at_once())

  def step(carry, i):
    top, total, mixed = carry
    embed_c, _, logit = _score(h, dealt, i, embed.shape[0])
    new_top = jnp.maximum(top, logit.max(1, keepdims=True))
    # A sure target has the top score: its p is 1 even in bfloat16.
    shrink, p = jnp.exp(top - new_top), jnp.exp(logit - new_top)
    mixed_c = jnp.matmul(p.astype(h.dtype), embed_c, preferred_element_type=jnp.float32)
    total = total * shrink + p.sum(1, keepdims=True)
    return (new_top, total, mixed * shrink + mixed_c), None

  zero = jnp.zeros((h.shape[0], 1))
  start = (zero - jnp.inf, zero, jnp.zeros(h.shape))
  (top, total, mixed), _ = jax.lax.scan(step, start, jnp.arange(dealt.shape[1]))
  log_sum, aim = top + jnp.log(total), embed[target].astype(jnp.float32)
  picked = (h.astype(jnp.float32) * aim).sum(1)
  loss = ((log_sum[:, 0] - picked) * weight).sum()
  d_h = mixed / total - aim
  return loss, (d_h * weight[:, None], log_sum, h, embed, target, weight)


def _backward(words, residuals, cotangent):
  d_h, log_sum, h, embed, target, weight = residuals
  dealt = _deal(embed, words or words_at_once())

  def step(_, i):
    _, word, logit = _score(h, dealt, i, embed.shape[0])
    p = jnp.exp(logit - log_sum)
    d_logit = (p - (word == target[:, None])) * weight[:, None]
    d_embed_c = jnp.einsum(
      'mv,md->vd', d_logit.astype(h.dtype), h,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    return None, (d_embed_c * cotangent).astype(embed.dtype)

  # A loop of its own, which XLA drops when the embedding is frozen.
  _, d_dealt = jax.lax.scan(step, None, jnp.arange(dealt.shape[1]))
  d_embed = d_dealt.swapaxes(0, 1).reshape(-1, h.shape[1])[: embed.shape[0]]
  return (d_h * cotangent).astype(h.dtype), d_embed, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def judge_words(
  h: Array, embed: Array, target: Array, words: int = 0
) -> tuple[Array, Array]:
  """Returns the likeliest word and log p of the target, at many positions.

  A pass over the vocabulary as in `linear_cross_entropy`, without gradients.

  Args:
    h: [M, D].
    embed: [V, D].
    target: [M] int32.
    words: at a time; 0 is `words_at_once()`.

  Returns:
    [M] int32 and [M] float32.
  """
  dealt = _deal(embed, words or words_at_once())

  def step(carry, i):
    top, total, best = carry
    _, word, logit = _score(h, dealt, i, embed.shape[0])
    here, place = jax.lax.top_k(logit, 1)
    new_top = jnp.maximum(top, here[:, 0])
    p = jnp.exp(logit - new_top[:, None]).sum(1)
    best = jnp.where(here[:, 0] > top, word[0, place[:, 0]], best)
    return (new_top, total * jnp.exp(top - new_top) + p, best), None

  zero = jnp.zeros(h.shape[0])
  start = (zero - jnp.inf, zero, jnp.zeros_like(target))
  (top, total, best), _ = jax.lax.scan(step, start, jnp.arange(dealt.shape[1]))
  aim = embed[target].astype(jnp.float32)
  picked = (h.astype(jnp.float32) * aim).sum(1)
  return best, picked - top - jnp.log(total)


def likeliest_word(h: Array, embed: Array) -> Array:
  """Returns the likeliest word at few positions: h [B, D] -> [B] int32.

  On a CPU the embedding on the left of the product, and a maximum of maxima,
  take half the time of the plain forms.
  """
  size, _ = embed.shape
  across = (((1,), (1,)), ((), ()))
  logit = jax.lax.dot_general(embed, h, across, preferred_element_type=jnp.float32)
  groups = next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)
  logit = logit.reshape(groups, size // groups, -1)
  group_B = logit.max(1).argmax(0)
  own = jnp.take_along_axis(logit, group_B[None, None], 0)[0]
  return (group_B * (size // groups) + own.argmax(0)).astype(jnp.int32)


def best_words(h: Array, embed: Array, n: int) -> tuple[Array, Array, Array]:
  """Returns the n likeliest words after few positions, with all logits at once.

  Args:
    h: [..., D].
    embed: [V, D].
    n: at most V.

  Returns:
    Words [..., n], the likeliest first, and their logits [..., n], float32; and
    the log of the summed exponentials of all logits, [...].
  """
  logit = jnp.einsum('...d,vd->...v', h, embed, preferred_element_type=jnp.float32)
  top, word = jax.lax.top_k(logit, n)
  return word, top, jax.nn.logsumexp(logit, -1)
