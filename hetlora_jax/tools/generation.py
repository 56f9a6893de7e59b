"""Completes prompts, greedily or by beam search, with keys and values kept.

Axes: B prompts, S their slots, K beams, T new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetlora_jax.data import packing
from hetlora_jax.models import decoder, kernels
from hetlora_jax.models.decoder import DecoderConfig, Past
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.types import Array, PyTree


class Prompts(NamedTuple):
  """Prompts of their own lengths, one or several in a row (P rows)."""

  tokens: Array  # [P, S] int32
  segment: Array  # [P, S] int32, a prompt's number from 1; 0 is padding
  position: Array  # [P, S] int32, from 0 in each prompt
  length: Array  # [B] int32
  slot: Array  # [B, S] int32, where its tokens are, of P * S; 0 past its end


class Completions(NamedTuple):
  """What was generated; a token that stops it is its last."""

  tokens: Array  # [B, T] int32, 0 past the end
  count: Array  # [B] int32


def _laid_out(prompts, row_B, start_B, rows: int, slots: int) -> Prompts:
  """Writes prompts into rows, where each starts."""
  tokens, segment, position = np.zeros((3, rows, slots), np.int32)
  slot = np.zeros((len(prompts), slots), np.int32)
  for i, (prompt, row, start) in enumerate(zip(prompts, row_B, start_B, strict=True)):
    n = len(prompt)
    at = np.s_[row, start : start + n]
    tokens[at], segment[at], position[at] = prompt, i + 1, np.arange(n)
    slot[i, :n] = row * slots + start + np.arange(n)
  length = np.array([len(prompt) for prompt in prompts], np.int32)
  return Prompts(tokens, segment, position, length, slot)


def _cut(prompts: Sequence[np.ndarray], slots: int) -> list[np.ndarray]:
  """Takes from longer prompts what follows bos."""
  return [np.concatenate([p[:1], p[1:][-(slots - 1) :]])[:slots] for p in prompts]


def pad(prompts: Sequence[np.ndarray], slots: int) -> Prompts:
  """Gives each prompt a row; longer ones lose what follows bos. In numpy."""
  count = len(prompts)
  starts = np.zeros(count, int)
  return _laid_out(_cut(prompts, slots), range(count), starts, count, slots)


def pack(prompts: Sequence[np.ndarray], slots: int, multiple: int = 1) -> Prompts:
  """Packs prompts, which must share adapters, into few rows; else as `pad`.

  The number of rows is a multiple of `multiple`: programs depend on it.
  """
  kept = _cut(prompts, slots)
  length_B = np.array([len(prompt) for prompt in kept])
  row_B, start_B, _ = packing.first_fit(length_B, len(kept), slots)
  rows = -(-int(row_B.max() + 1) // multiple) * multiple
  return _laid_out(kept, row_B, start_B, rows, slots)


def stops(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
  """Marks the tokens that end a completion, which is one line: [V] bool."""
  stop_V = np.zeros(vocab_size, bool)
  for token in range(min(vocab_size, tokenizer.vocab_size)):
    stop_V[token] = '\n' in tokenizer.decode([token])
  stop_V[tokenizer.eos_id] = True
  return stop_V


class _Text(NamedTuple):
  """Prompts as the decoder has read them, and how it reads on."""

  h: Array  # [B, D], where the first new token is predicted
  kept: list[tuple[Array, Array]]  # keys and values of each layer
  words: Array  # [V, D]
  # (step, tokens [B, K], visible [B, K, T * K], kept) -> h [B, K, D], kept
  read: Callable


def _read_prompts(
  config: DecoderConfig, dtype, beams: int, max_tokens: int,
  base: PyTree, adapters, scale: Array, prompts: Prompts,
) -> _Text:  # fmt: skip
  """Reads prompts, and makes room for the new tokens of all beams.

  Beams share the prompt's keys, and each other's: what a beam sees is a mask,
  so that nothing is copied when one takes another's place.
  """
  count, (rows, slots) = config.num_layers, prompts.slot.shape
  h, (k, v) = decoder.make_prefill(config, dtype)(
    base, adapters, scale, prompts.tokens, prompts.segment, prompts.position
  )

  def take(x, slot):
    return x.reshape(-1, *x.shape[2:])[slot]

  def with_room(x):
    own = take(x, prompts.slot)
    return jnp.pad(own, ((0, 0), (0, max_tokens * beams), (0, 0), (0, 0)))

  slot_BS = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows, slots))
  real_BS = slot_BS < prompts.length[:, None]
  new = jnp.arange(max_tokens * beams, dtype=jnp.int32) // beams
  position = jnp.concatenate([slot_BS, prompts.length[:, None] + new[None]], 1)
  prompt_BKS = jnp.broadcast_to(real_BS[:, None], (rows, beams, slots))
  # Taken apart and cast once, not in every step.
  layers = decoder.unstack((base['layers'], adapters), count)
  step = decoder.make_step(config, dtype)

  def read(i, token_BK, visible, kept):
    seen = jnp.concatenate([prompt_BKS, visible], 2)
    pasts = [Past(k, v, slots + i * beams, position, seen) for k, v in kept]
    at = jnp.broadcast_to(prompts.length[:, None] + i, token_BK.shape)
    return step(base, layers, scale, token_BK, at, pasts)

  last_B = prompts.slot[jnp.arange(rows), prompts.length - 1]
  return _Text(
    h=take(h, last_B),
    kept=[(with_room(k[i]), with_room(v[i])) for i in range(count)],
    words=decoder.head(config, base).astype(dtype),
    read=read,
  )


def _greedy(text: _Text, max_tokens: int, stop_V: Array) -> Completions:
  """Takes the likeliest token, again and again, until all rows have stopped."""
  rows, steps = text.h.shape[0], jnp.arange(max_tokens)

  def go_on(carry):
    i, _, done_B, *_ = carry
    return (i < max_tokens - 1) & ~done_B.all()

  def step(carry):
    i, token_B, done_B, out, kept = carry
    visible = jnp.broadcast_to(steps <= i, (rows, 1, max_tokens))
    h, kept = text.read(i, token_B[:, None], visible, kept)
    word_B = kernels.likeliest_word(h[:, 0], text.words)
    token_B = jnp.where(done_B, 0, word_B)
    count_B = out.count + ~done_B
    out = Completions(out.tokens.at[:, i + 1].set(token_B), count_B)
    return i + 1, token_B, done_B | stop_V[token_B], out, kept

  token_B = kernels.likeliest_word(text.h, text.words)
  tokens = jnp.zeros((rows, max_tokens), jnp.int32).at[:, 0].set(token_B)
  out = Completions(tokens, jnp.ones(rows, jnp.int32))
  start = (jnp.int32(0), token_B, stop_V[token_B], out, text.kept)
  return jax.lax.while_loop(go_on, step, start)[3]


class _Beams(NamedTuple):
  """Hypotheses of each prompt, the best first; scores -inf are none."""

  score: Array  # [B, K]
  tokens: Array  # [B, K, T]
  count: Array  # [B, K]


def _no_beams(rows: int, beams: int, max_tokens: int) -> _Beams:
  count = jnp.zeros((rows, beams), jnp.int32)
  tokens = jnp.zeros((rows, beams, max_tokens), jnp.int32)
  return _Beams(jnp.full((rows, beams), -jnp.inf), tokens, count)


def _take(tree: PyTree, index_BK: Array) -> PyTree:
  """Takes hypotheses [B, K, ...] of each prompt by their index."""
  rows = jnp.arange(index_BK.shape[0])[:, None]
  return jax.tree.map(lambda x: x[rows, index_BK], tree)


def _best(some: _Beams, others: _Beams, beams: int) -> _Beams:
  """Keeps the best of both."""
  both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), some, others)
  return _take(both, jax.lax.top_k(both.score, beams)[1])


def _extend(words, i, h_BKD, live: _Beams) -> tuple[_Beams, Array]:
  """Returns the 2K best of each prompt, a token longer, and their parents.

  At most K of them stop, so that K are left.
  """
  rows, beams, _ = live.tokens.shape
  n = min(2 * beams, words.shape[0])
  word, logit, log_sum = kernels.best_words(h_BKD, words, n)
  score = live.score[..., None] + logit - log_sum[..., None]
  score, index = jax.lax.top_k(score.reshape(rows, -1), n)
  parent = index // n
  token = jnp.take_along_axis(word.reshape(rows, -1), index, 1)
  tokens = _take(live.tokens, parent).at[:, :, i].set(token)
  return _Beams(score, tokens, jnp.full_like(parent, i + 1)), parent


def _beam(
  text: _Text, max_tokens: int, stop_V: Array, beams: int, alpha: float
) -> Completions:
  """Beam search: the highest log p / length**alpha of what stopped or is full.

  The rule by which a search ends is exact: no live beam could still win.
  """
  rows, own = text.h.shape[0], jnp.arange(beams)

  def extend(i, h_BKD, live, done, visible):
    longer, parent = _extend(text.words, i, h_BKD, live)
    stopped = stop_V[longer.tokens[:, :, i]] | (i + 1 == max_tokens)
    score = longer.score / longer.count.astype(jnp.float32) ** alpha
    ended = longer._replace(score=jnp.where(stopped, score, -jnp.inf))
    score = jnp.where(stopped, -jnp.inf, longer.score)
    live_score, index = jax.lax.top_k(score, beams)
    live = _take(longer, index)._replace(score=live_score)
    visible = _take(visible, jnp.take_along_axis(parent, index, 1))
    return live, _best(done, ended, beams), visible

  def go_on(carry):
    i, live, done, *_ = carry
    hope_B = live.score[:, 0] / max_tokens**alpha
    return (i < max_tokens - 1) & (done.score[:, 0] < hope_B).any()

  def step(carry):
    i, live, done, visible, kept = carry
    visible = visible.at[:, own, i * beams + own].set(True)
    h, kept = text.read(i, live.tokens[:, :, i], visible, kept)
    return i + 1, *extend(i + 1, h, live, done, visible), kept

  none = _no_beams(rows, beams, max_tokens)
  first = none._replace(score=none.score.at[:, 0].set(0.0))
  h_BKD = jnp.broadcast_to(text.h[:, None], (rows, beams, text.h.shape[-1]))
  visible = jnp.zeros((rows, beams, max_tokens * beams), bool)
  start = extend(0, h_BKD, first, none, visible)
  carry = (jnp.int32(0), *start, text.kept)
  done = jax.lax.while_loop(go_on, step, carry)[2]
  return Completions(done.tokens[:, 0], done.count[:, 0])


def make_generate(
  config: DecoderConfig,
  dtype,
  *,
  max_tokens: int,
  beams: int = 1,
  alpha: float = 1.0,
) -> Callable[..., Completions]:
  """Returns (base, adapters, scale, prompts, stop_V) -> Completions.

  Adapters and scale are of all prompts, or, if each has a row, of each: factors
  [L, B, ...] and [B, 1, 1]. `stop_V` marks the tokens that end a completion.

  Args:
    config: the model's shape.
    dtype: to compute in.
    max_tokens: of a completion, the one that stops it included.
    beams: 1 is greedy.
    alpha: of beam search: scores are log p / length**alpha (Wu et al., 2016,
      arXiv 1609.08144, have a similar power); 0 is log p.
  """
  if max_tokens < 1 or beams < 1 or alpha < 0:
    raise ValueError(
      f'{max_tokens=} and {beams=} must be 1 at least, {alpha=} 0 at least.'
    )

  def generate(base, adapters, scale, prompts: Prompts, stop_V: Array):
    text = _read_prompts(
      config, dtype, beams, max_tokens, base, adapters, scale, prompts
    )
    if beams == 1:
      return _greedy(text, max_tokens, stop_V)
    return _beam(text, max_tokens, stop_V, beams, alpha)

  return generate
