"""ROUGE scores are those computed by hand."""

import pytest

from hetlora_jax.tools import scores


def test_scores_by_hand():
  got = scores.rouge('The cat sat on the mat!', 'the cat lay on a mat')
  # Words in common: the, cat, on, mat, of six each; pairs: "the cat", of five.
  assert got == pytest.approx({'rouge1': 4 / 6, 'rouge2': 1 / 5, 'rougeL': 4 / 6})
  got = scores.rouge('a b c', 'c b a')
  assert got == pytest.approx({'rouge1': 1, 'rouge2': 0, 'rougeL': 1 / 3})
  got = scores.rouge('a b c d', 'a b')  # precision 1, recall 2/4 and 1/3
  assert got == pytest.approx({'rouge1': 2 / 3, 'rouge2': 1 / 2, 'rougeL': 2 / 3})
  assert set(scores.rouge(':)', ':)').values()) == {0}  # no words


def test_words_are_not_stemmed():
  assert scores.rouge('he runs', 'he running')['rouge1'] == 0.5


def test_a_mean_is_over_examples():
  some = [dict.fromkeys(scores.ROUGE_KINDS, x) for x in (0.0, 0.5, 0.7)]
  assert scores.mean_rouge(some) == pytest.approx(
    dict.fromkeys(scores.ROUGE_KINDS, 0.4)
  )
