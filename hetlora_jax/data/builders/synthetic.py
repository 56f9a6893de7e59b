"""Made-up people who speak four small grammars; needs nothing downloaded."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, cast

import numpy as np
import tensorflow_datasets as tfds

from hetlora_jax import prng
from hetlora_jax.data import builders
from hetlora_jax.data.builders import records

NUM_PEOPLE = 64
NUM_GRAMMARS = 4
_FEWEST, _MOST = 20, 200  # examples a person
_FAVOURITE = 0.85  # how often a word is followed by its favourite

_ADJECTIVES = 'big small red blue old new warm cold dark kind'.split()
_NOUNS = 'dog cat bird fish tree house river stone boat child king song'.split()
_VERBS = 'sees likes finds moves calls paints hears carries wants'.split()
_ADVERBS = 'today slowly often never gladly again here soon'.split()


@dataclasses.dataclass(frozen=True)
class _Grammar:
  """Orders shared words its own way and pairs them with other favourites."""

  number: int

  def _follow(self, rng, word: int, choices: Sequence[str]) -> int:
    """Draws the number of the word after `word`: most often its favourite."""
    if rng.random() < _FAVOURITE:
      return (word + 2 * self.number) % len(choices)
    return int(rng.integers(len(choices)))

  def _thing(self, rng) -> tuple[str, int]:
    adjective = int(rng.integers(3)) + 2 * self.number
    noun = self._follow(rng, adjective, _NOUNS)
    words = [_ADJECTIVES[adjective], _NOUNS[noun]]
    if self.number % 2:  # e.g. 'the dog big'
      words.reverse()
    return ' '.join(['the', *words]), noun

  def sentence(self, rng: np.random.Generator) -> str:
    """Draws eight words, such as 'the big dog sees the red boat today'."""
    subject, noun = self._thing(rng)
    verb = self._follow(rng, noun, _VERBS)
    thing, noun = self._thing(rng)
    adverb = _ADVERBS[self._follow(rng, noun, _ADVERBS)]
    if self.number >= 2:  # e.g. 'today the big dog sees the red boat'
      return f'{adverb} {subject} {_VERBS[verb]} {thing}'
    return f'{subject} {_VERBS[verb]} {thing} {adverb}'


def _records_of(person: int, rng: np.random.Generator) -> Iterator[records.Record]:
  """Yields a person's answers to strangers of any grammar.

  A stranger's grammar is no hint, so only adapting to the person tells it.
  """
  grammar = _Grammar(person % NUM_GRAMMARS)
  count = int(np.clip(rng.lognormal(mean=4.0, sigma=0.7), _FEWEST, _MOST))
  for time in range(count):
    stranger = _Grammar(int(rng.integers(NUM_GRAMMARS)))
    yield records.Record(
      client=f'person-{person:03d}',
      time=time,
      context=[stranger.sentence(rng)],
      mine=[False],
      target=grammar.sentence(rng),
    )


@dataclasses.dataclass(eq=False)
class Config(tfds.core.BuilderConfig):
  """Names the seed that all people and sentences are drawn from."""

  seed: int = 0


class Synthetic(records.RecordBuilder):
  """Lets 64 people answer strangers; person i speaks grammar i modulo 4."""

  limits: ClassVar[builders.Limits] = builders.Limits(20, 32, 12, 128)
  BUILDER_CONFIGS: ClassVar = [
    Config(name=f'seed{seed}', seed=seed) for seed in range(3)
  ]

  def examples(self) -> Iterator[records.Record]:
    config = cast(Config, self.builder_config)
    for person in range(NUM_PEOPLE):
      rng = prng.host_stream(config.seed, 'synthetic', person)
      yield from _records_of(person, rng)
