"""What a model is asked to complete: prompts of held-out examples, with shots or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np

from hetlora_jax import prng
from hetlora_jax.config import ConfigError
from hetlora_jax.data.people import Example, Kind, evenly_spaced
from hetlora_jax.experiment import Experiment
from hetlora_jax.tools import scores

KINDS: dict[str, Kind] = dict(zip(scores.SETS, ('heldout', 'unseen'), strict=True))


class Task(NamedTuple):
  """A prompt to be completed, and whose it is."""

  kind: str  # of scores.SETS
  person: int  # among those of that kind
  name: str
  rank: int | None  # of a person who takes part
  example: Example  # shots included, cut to what is evaluated


def tasks(x: Experiment, rank_N: np.ndarray, shots: int) -> Iterator[Task]:
  """Yields the examples that are evaluated, as `cohorts.evaluation_set` does.

  Args:
    x: the experiment; its `config.eval` says how many people and examples.
    rank_N: every client's rank.
    shots: examples of other people before each prompt.

  Raises:
    ConfigError: there are not so many other people.
  """
  e, between = x.config.eval, x.model.tokenizer.encode('\n')
  room = cast(int, x.config.data.row_tokens) * (1 + shots)
  for name_of_set, kind in KINDS.items():
    group = x.population.groups[kind]
    for person in map(int, evenly_spaced(len(group.ids), e.num_people)):
      name = group.ids[person]
      rank = None if kind == 'unseen' else int(rank_N[person])
      for i in map(int, evenly_spaced(int(group.count[person]), e.examples_per_person)):
        rng = prng.host_stream(0, f'shots {kind}', person, i)
        example = x.population.example(kind, person, i)._replace(earlier=())
        example = _with_shots(example, _draw_shots(x, name, shots, rng), between)
        yield Task(name_of_set, person, name, rank, _cut(example, room))


def _draw_shots(
  x: Experiment, name: str, count: int, rng: np.random.Generator
) -> list[Example]:
  """Draws training examples of other people."""
  group = x.population.groups['train']
  others = np.flatnonzero(np.array(group.ids) != name) if count else ()
  if count > len(others):
    raise ConfigError(
      f'--shots={count} exceeds the {len(others)} other people: lower it.'
    )
  chosen = rng.choice(others, count, replace=False) if count else ()
  return [
    x.population.example('train', int(p), int(rng.integers(group.count[p])))
    for p in chosen
  ]


def _with_shots(
  example: Example, shots: Sequence[Example], between: Sequence[int]
) -> Example:
  """Puts examples, a blank line after each, before the prompt's text."""
  bos = example.num_bos
  parts = [example.tokens[:bos]]
  for shot in shots:
    parts += [shot.tokens[shot.num_bos :], np.asarray(between, np.int32)]
  tokens = np.concatenate([*parts, example.tokens[bos:]])
  return example._replace(tokens=tokens, cut=0)


def _cut(example: Example, room: int) -> Example:
  """Drops what follows bos first, until prompt and target fit."""
  tokens, most = example.tokens, max(room, example.num_target + 1)
  if len(tokens) <= most:
    return example
  bos = example.num_bos
  tokens = np.concatenate([tokens[:bos], tokens[len(tokens) - most + bos :]])
  return example._replace(tokens=tokens, cut=0)
