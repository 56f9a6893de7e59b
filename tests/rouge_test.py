"""ROUGE by hand, and the two texts that it is taken of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetlora_jax.models import kernels
from hetlora_jax.tools import rouge


def test_scores_by_hand():
  got = rouge.score('The cat sat on the mat!', 'the cat lay on a mat')
  # Words in common: the, cat, on, mat, of six each; pairs: "the cat", of five.
  assert got == pytest.approx({'rouge1': 4 / 6, 'rouge2': 1 / 5, 'rougeL': 4 / 6})
  got = rouge.score('a b c', 'c b a')
  assert got == pytest.approx({'rouge1': 1, 'rouge2': 0, 'rougeL': 1 / 3})
  got = rouge.score('a b c d', 'a b')  # precision 1, recall 2/4 and 1/3
  assert got == pytest.approx({'rouge1': 2 / 3, 'rouge2': 1 / 2, 'rougeL': 2 / 3})
  assert set(rouge.score(':)', ':)').values()) == {0}  # no words


def test_words_are_not_stemmed():
  assert rouge.score('he runs', 'he running')['rouge1'] == 0.5


def test_a_mean_is_over_examples():
  some = [dict.fromkeys(rouge.KINDS, x) for x in (0.0, 0.5, 0.7)]
  assert rouge.mean(some) == pytest.approx(dict.fromkeys(rouge.KINDS, 0.4))


@pytest.mark.parametrize('words', [1, 4, 17, 100])  # 4: the last are padding
def test_judged_words_are_those_of_all_logits(words):
  rng = np.random.default_rng(words)
  h, embed = rng.normal(size=(11, 6)), rng.normal(size=(17, 6))
  h, embed = jnp.asarray(h, jnp.float32), jnp.asarray(embed, jnp.float32)
  target = jnp.asarray(rng.integers(0, 17, 11), jnp.int32)
  best, log_prob = jax.jit(kernels.judge_words, static_argnums=3)(
    h, embed, target, words
  )
  want = jax.nn.log_softmax(h @ embed.T)
  np.testing.assert_array_equal(best, want.argmax(1))
  picked = jnp.take_along_axis(want, target[:, None], 1)[:, 0]
  np.testing.assert_allclose(log_prob, picked, atol=1e-5)


@pytest.mark.parametrize('size', [12, 17, 36])  # 17 words are one group
def test_the_likeliest_word_is_the_first_of_the_best(size):
  rng = np.random.default_rng(size)
  h = jnp.asarray(rng.normal(size=(5, 6)), jnp.float32)
  embed = jnp.asarray(rng.normal(size=(size, 6)), jnp.float32)
  embed = embed.at[size - 2].set(embed[1])  # a tie
  got = jax.jit(kernels.likeliest_word)(h, embed)
  np.testing.assert_array_equal(got, (h @ embed.T).argmax(1))
