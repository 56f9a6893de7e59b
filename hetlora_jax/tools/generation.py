"""Completes prompts with a KV cache, greedily or by beam search.

Axes: B prompts, P rows that hold them, S token slots of a row, K beams, T new
tokens, V vocabulary, D width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetlora_jax.data import packing
from hetlora_jax.models import decoder, kernels
from hetlora_jax.models.decoder import DecoderConfig, KVCache
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.types import Array, PyTree


class Prompts(NamedTuple):
  """Prompts of different lengths, one or several of them in a row."""

  tokens: Array  # [P, S] int32
  segment: Array  # [P, S] int32, the prompt's number from 1; 0 is padding
  position: Array  # [P, S] int32, counted from 0 in each prompt
  length: Array  # [B] int32
  slot: Array  # [B, S] int32, each token's place among P * S; 0 past the end


class Completions(NamedTuple):
  """The generated tokens, up to and including the one that stops them."""

  tokens: Array  # [B, T] int32, 0 past the end
  count: Array  # [B] int32


def _place(prompts, row_B, start_B, rows: int, slots: int) -> Prompts:
  """Writes each prompt into its row, from the slot where it starts."""
  tokens, segment, position = np.zeros((3, rows, slots), np.int32)
  slot = np.zeros((len(prompts), slots), np.int32)
  for i, (prompt, row, start) in enumerate(zip(prompts, row_B, start_B, strict=True)):
    n = len(prompt)
    at = np.s_[row, start : start + n]
    tokens[at], segment[at], position[at] = prompt, i + 1, np.arange(n)
    slot[i, :n] = row * slots + start + np.arange(n)
  length = np.array([len(prompt) for prompt in prompts], np.int32)
  return Prompts(tokens, segment, position, length, slot)


def _truncate(prompts: Sequence[np.ndarray], slots: int) -> list[np.ndarray]:
  """Shortens long prompts to bos and their last tokens."""
  return [np.concatenate([p[:1], p[1:][-(slots - 1) :]])[:slots] for p in prompts]


def pad(prompts: Sequence[np.ndarray], slots: int) -> Prompts:
  """Puts each prompt into a row of its own, in NumPy.

  A prompt longer than `slots` keeps bos and its last tokens.
  """
  count = len(prompts)
  starts = np.zeros(count, int)
  return _place(_truncate(prompts, slots), range(count), starts, count, slots)


def pack(prompts: Sequence[np.ndarray], slots: int, multiple: int = 1) -> Prompts:
  """Packs prompts into few rows; they must share adapters. Otherwise as `pad`.

  The number of rows is rounded up to a multiple of `multiple`, since every
  number of rows compiles a program of its own.
  """
  short = _truncate(prompts, slots)
  length_B = np.array([len(prompt) for prompt in short])
  row_B, start_B, _ = packing.first_fit(length_B, len(short), slots)
  rows = -(-int(row_B.max() + 1) // multiple) * multiple
  return _place(short, row_B, start_B, rows, slots)


def stop_token_mask(
  tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int] | None = None
) -> np.ndarray:
  """Marks the tokens that end a completion: [V] bool.

  These are `ends`; or, of a completion of one line, the end of the text and every
  token that contains a newline.
  """
  stop_V = np.zeros(vocab_size, bool)
  if ends is not None:
    stop_V[[*ends]] = True
    return stop_V
  for token in range(min(vocab_size, tokenizer.vocab_size)):
    stop_V[token] = '\n' in tokenizer.decode([token])
  stop_V[tokenizer.eos_id] = True
  return stop_V


class _Prefilled(NamedTuple):
  """The state after reading the prompts, and the function that reads on."""

  h: Array  # [B, D], at the last token of each prompt
  cache: list[tuple[Array, Array]]  # each layer's keys and values
  head: Array  # [V, D]
  softcap: float  # of logits; greedy search needs none, their order is the same
  # (step, tokens [B, K], visible [B, K, T * K], cache) -> h [B, K, D], cache
  decode: Callable


def _prefill(
  config: DecoderConfig, dtype, beams: int, max_tokens: int,
  base: PyTree, adapters, scale: Array, prompts: Prompts,
) -> _Prefilled:  # fmt: skip
  """Reads the prompts, and makes room in the cache for all beams' new tokens.

  Beams share the prompt's keys and one pool of slots for new tokens: which of
  these a beam attends to is a mask, so nothing is copied when one beam replaces
  another.
  """
  num_layers, (count, slots) = config.num_layers, prompts.slot.shape

  # Read all rows at once; then give each prompt a row of its own again, with
  # free slots behind it.
  h, (k, v) = decoder.make_prefill(config, dtype)(
    base, adapters, scale, prompts.tokens, prompts.segment, prompts.position
  )

  def take(x, slot):
    return x.reshape(-1, *x.shape[2:])[slot]

  def with_room(x):
    by_prompt = take(x, prompts.slot)
    return jnp.pad(by_prompt, ((0, 0), (0, max_tokens * beams), (0, 0), (0, 0)))

  # Positions of all slots, and a mask of those that a prompt fills.
  slot_BS = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (count, slots))
  real_BS = slot_BS < prompts.length[:, None]
  new = jnp.arange(max_tokens * beams, dtype=jnp.int32) // beams
  position = jnp.concatenate([slot_BS, prompts.length[:, None] + new[None]], 1)
  prompt_BKS = jnp.broadcast_to(real_BS[:, None], (count, beams, slots))

  # Unstacked and cast once, not in every step.
  layers = decoder.unstack((base['layers'], adapters), num_layers)
  step = decoder.make_decode_step(config, dtype)

  def decode(i, token_BK, visible, cache):
    mask = jnp.concatenate([prompt_BKS, visible], 2)
    caches = [KVCache(k, v, slots + i * beams, position, mask) for k, v in cache]
    at = jnp.broadcast_to(prompts.length[:, None] + i, token_BK.shape)
    return step(base, layers, scale, token_BK, at, caches)

  last_B = prompts.slot[jnp.arange(count), prompts.length - 1]
  return _Prefilled(
    h=take(h, last_B),
    cache=[(with_room(k[i]), with_room(v[i])) for i in range(num_layers)],
    head=decoder.head(config, base).astype(dtype),
    softcap=config.logit_softcap,
    decode=decode,
  )


def _greedy(prefilled: _Prefilled, max_tokens: int, stop_V: Array) -> Completions:
  """Appends the most likely token until every completion has stopped."""
  count, steps = prefilled.h.shape[0], jnp.arange(max_tokens)

  def go_on(carry):
    i, _, done_B, *_ = carry
    return (i < max_tokens - 1) & ~done_B.all()

  def step(carry):
    i, token_B, done_B, out, cache = carry
    visible = jnp.broadcast_to(steps <= i, (count, 1, max_tokens))
    h, cache = prefilled.decode(i, token_B[:, None], visible, cache)
    top_B = kernels.argmax_token(h[:, 0], prefilled.head)
    # A completion that has stopped is filled with zeros.
    token_B = jnp.where(done_B, 0, top_B)
    count_B = out.count + ~done_B
    out = Completions(out.tokens.at[:, i + 1].set(token_B), count_B)
    return i + 1, token_B, done_B | stop_V[token_B], out, cache

  # The first token follows from the prompt alone.
  token_B = kernels.argmax_token(prefilled.h, prefilled.head)
  tokens = jnp.zeros((count, max_tokens), jnp.int32).at[:, 0].set(token_B)
  out = Completions(tokens, jnp.ones(count, jnp.int32))
  start = (jnp.int32(0), token_B, stop_V[token_B], out, prefilled.cache)
  return jax.lax.while_loop(go_on, step, start)[3]


class _Beams(NamedTuple):
  """Hypotheses of each prompt, the best first; a score of -inf marks no beam."""

  score: Array  # [B, K]
  tokens: Array  # [B, K, T]
  count: Array  # [B, K]


def _no_beams(prompts: int, beams: int, max_tokens: int) -> _Beams:
  count = jnp.zeros((prompts, beams), jnp.int32)
  tokens = jnp.zeros((prompts, beams, max_tokens), jnp.int32)
  return _Beams(jnp.full((prompts, beams), -jnp.inf), tokens, count)


def _take(tree: PyTree, index_BK: Array) -> PyTree:
  """Selects hypotheses [B, K, ...] of each prompt by their index."""
  rows = jnp.arange(index_BK.shape[0])[:, None]
  return jax.tree.map(lambda x: x[rows, index_BK], tree)


def _best(some: _Beams, others: _Beams, beams: int) -> _Beams:
  """Returns the best `beams` hypotheses of both."""
  both = jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), some, others)
  return _take(both, jax.lax.top_k(both.score, beams)[1])


def _extend(
  prefilled: _Prefilled, i, h_BKD: Array, live: _Beams
) -> tuple[_Beams, Array]:
  """Returns each prompt's 2K best hypotheses of one more token, and their parents.

  At most K of the 2K end with a stop token, so at least K can go on.
  """
  prompts, beams, _ = live.tokens.shape
  n = min(2 * beams, prefilled.head.shape[0])
  # The best n of a prompt are among the best n of each of its beams.
  token, logit, log_sum = kernels.top_k_tokens(
    h_BKD, prefilled.head, n, prefilled.softcap
  )
  score = live.score[..., None] + logit - log_sum[..., None]
  score, index = jax.lax.top_k(score.reshape(prompts, -1), n)
  parent = index // n
  token = jnp.take_along_axis(token.reshape(prompts, -1), index, 1)
  tokens = _take(live.tokens, parent).at[:, :, i].set(token)
  return _Beams(score, tokens, jnp.full_like(parent, i + 1)), parent


def _beam(
  prefilled: _Prefilled, max_tokens: int, stop_V: Array, beams: int, alpha: float
) -> Completions:
  """Searches for the highest log p / length**alpha of completions that ended.

  A completion ends at a stop token or at `max_tokens`. The search ends when no
  live beam can still win; this rule is exact, not a heuristic.
  """
  prompts, beam_K = prefilled.h.shape[0], jnp.arange(beams)

  def extend(i, h_BKD, live, done, visible):
    longer, parent = _extend(prefilled, i, h_BKD, live)
    # Sort them into those that ended, by normalized score, and those that live.
    stopped = stop_V[longer.tokens[:, :, i]] | (i + 1 == max_tokens)
    score = longer.score / longer.count.astype(jnp.float32) ** alpha
    ended = longer._replace(score=jnp.where(stopped, score, -jnp.inf))
    score = jnp.where(stopped, -jnp.inf, longer.score)
    live_score, index = jax.lax.top_k(score, beams)
    live = _take(longer, index)._replace(score=live_score)
    # A beam attends to the slots that its parent attended to.
    visible = _take(visible, jnp.take_along_axis(parent, index, 1))
    return live, _best(done, ended, beams), visible

  def go_on(carry):
    i, live, done, *_ = carry
    # Log p only falls with more tokens, and the longest completion divides it most.
    bound_B = live.score[:, 0] / max_tokens**alpha
    return (i < max_tokens - 1) & (done.score[:, 0] < bound_B).any()

  def step(carry):
    i, live, done, visible, cache = carry
    visible = visible.at[:, beam_K, i * beams + beam_K].set(True)
    h, cache = prefilled.decode(i, live.tokens[:, :, i], visible, cache)
    return i + 1, *extend(i + 1, h, live, done, visible), cache

  # All beams start as one, whose first token follows from the prompt alone.
  none = _no_beams(prompts, beams, max_tokens)
  first = none._replace(score=none.score.at[:, 0].set(0.0))
  h_BKD = jnp.broadcast_to(
    prefilled.h[:, None], (prompts, beams, prefilled.h.shape[-1])
  )
  visible = jnp.zeros((prompts, beams, max_tokens * beams), bool)
  start = extend(0, h_BKD, first, none, visible)
  carry = (jnp.int32(0), *start, prefilled.cache)
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

  Adapters and scale are shared by all prompts. Or each prompt has a row and
  adapters of its own: factors [L, B, ...] and a scale [B, 1, 1]. `stop_V` marks
  the tokens that end a completion.

  Args:
    config: the model's shape.
    dtype: to compute in.
    max_tokens: the longest completion, with the token that stops it.
    beams: how many hypotheses are searched; 1 is greedy.
    alpha: of beam search: scores are log p / length**alpha (Wu et al., 2016,
      arXiv 1609.08144, have a similar power); 0 is log p.

  Raises:
    ValueError: an argument is out of its range.
  """
  if max_tokens < 1 or beams < 1 or alpha < 0:
    raise ValueError(
      f'{max_tokens=} and {beams=} must be 1 at least, {alpha=} 0 at least.'
    )

  def generate(base, adapters, scale, prompts: Prompts, stop_V: Array):
    prefilled = _prefill(
      config, dtype, beams, max_tokens, base, adapters, scale, prompts
    )
    if beams == 1:
      return _greedy(prefilled, max_tokens, stop_V)
    return _beam(prefilled, max_tokens, stop_V, beams, alpha)

  return generate
