"""What a trained (or untouched) model writes for held-out prompts, scored.

Writes generations.jsonl, a line an example, and evaluation.json: losses and
ROUGE of seen and unseen people, a value a person, with intervals over people.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from hetlora_jax import (
  base_model,
  client,
  console,
  experiment,
  files,
  lora,
  prng,
  tracking,
)
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example, Kind, evenly_spaced
from hetlora_jax.experiment import Experiment
from hetlora_jax.models import readout
from hetlora_jax.points import Points
from hetlora_jax.run import Run
from hetlora_jax.tools import generation, scores
from hetlora_jax.types import Hyperparameters, Rules, ServerState

SEARCHES = ('greedy', 'beam')
ROWS = 16  # prompts at a time
KINDS: dict[str, Kind] = dict(zip(scores.SETS, ('heldout', 'unseen'), strict=True))


class Choice(NamedTuple):
  """How to generate, and from what; people and examples are `config.eval`'s."""

  search: str = 'greedy'  # of SEARCHES
  beams: int = 4
  alpha: float = 1.0  # see generation.make_generate
  max_tokens: int | None = None  # None: data.targets_per_example
  shots: int = 0  # examples of other people before each prompt
  untouched: bool = False  # the base model, without a checkpoint


class Task(NamedTuple):
  """A prompt to be completed, and whose it is."""

  kind: str  # of scores.SETS
  person: int  # among those of that kind
  name: str
  rank: int | None  # of a person who takes part
  example: Example  # shots included, cut to what is evaluated


class Answer(NamedTuple):
  """What was written for a task, as it comes from the devices."""

  generated: np.ndarray  # tokens
  forced: np.ndarray  # tokens
  log_prob: np.ndarray  # of the reference's tokens


def run(run: Run, choice: Choice, c: Config | None = None) -> dict[str, Any]:
  """Generates, scores and writes both files, each whole or not at all.

  Args:
    run: whose newest checkpoint writes; its folder gets the files.
    choice: how.
    c: the run's configuration with another section `eval`; None: its own.

  Returns:
    What evaluation.json holds.

  Raises:
    ConfigError: there is no checkpoint, or a choice that cannot be.
  """
  c = c or run.config
  _check(run, c, choice)
  x = run.prepare(c)
  if x.experiment.model.decoder is None:
    raise ConfigError(
      'a model of your own cannot write: `base_model.own` has no cache of keys and '
      'values. Its losses are in people.json.'
    )
  done, state = (0, x.take(x.initial_state, 0)) if choice.untouched else run.newest(x)
  tokenizer = x.experiment.model.tokenizer
  tasks = list(_tasks(x.experiment, tokenizer, state, choice))
  with experiment.in_memory('lower --max_tokens, --shots or --beams.'):
    answers = _answer(x, state, tasks, choice)
  lines = [
    _line(tokenizer, task, answer) for task, answer in zip(tasks, answers, strict=True)
  ]
  found = {
    'round': done,
    'settings': choice._asdict()
    | {'max_tokens': _max_tokens(c, choice), 'own_rank': c.eval.own_rank},
    **scores.of_lines(lines, c.seed),
  }
  run.folder.mkdir(parents=True, exist_ok=True)
  files.write_json_lines(run.folder / 'generations.jsonl', lines)
  files.write_json(run.folder / 'evaluation.json', found)
  tracking.show_samples(run.folder, done)
  return found


def _check(run: Run, c: Config, choice: Choice) -> None:
  """Raises ConfigError for what can be told before anything is loaded."""
  if choice.search not in SEARCHES:
    raise ConfigError(f'--generate={choice.search}: take one of {SEARCHES}.')
  low = {'beams': 1, 'alpha': 0, 'max_tokens': 1, 'shots': 0}
  for field, least in low.items():
    value = getattr(choice, field)
    if value is not None and value < least:
      raise ConfigError(f'--{field}={value} must be {least} at least.')
  if choice.untouched and c.eval.own_rank:
    raise ConfigError(
      '--own_rank and --untouched: a base model has no ranks; drop one.'
    )
  if not choice.untouched:
    run.check_saved(', or evaluate the base model by --untouched')
    run.check(c)


def _max_tokens(c: Config, choice: Choice) -> int:
  return choice.max_tokens or c.data.targets_per_example


def _tasks(x: Experiment, tokenizer, state, choice: Choice) -> Iterator[Task]:
  """Yields the examples that are evaluated, as `cohorts.evaluation_set` does."""
  e, rank_NG = x.config.eval, np.asarray(state.memory.rank)
  between = tokenizer.encode('\n')
  room = x.config.data.row_tokens * (1 + choice.shots)
  for name_of_set, kind in KINDS.items():
    group = x.population.groups[kind]
    for person in evenly_spaced(len(group.ids), e.num_people):
      name = group.ids[person]
      rank = None if kind == 'unseen' else int(rank_NG[person].max())
      for i in evenly_spaced(int(group.count[person]), e.examples_per_person):
        example = x.population.example(kind, int(person), int(i))
        rng = prng.host_stream(0, f'shots {kind}', int(person), int(i))
        shots = _draw_shots(x, name, choice.shots, rng)
        example = _cut(_with_shots(example, shots, between), room)
        yield Task(name_of_set, int(person), name, rank, example)


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
  parts = [example.tokens[:1]]
  for shot in shots:
    parts += [shot.tokens[1:], np.asarray(between, np.int32)]
  return Example(np.concatenate([*parts, example.tokens[1:]]), example.num_target)


def _cut(example: Example, room: int) -> Example:
  """Drops what follows bos first, until prompt and target fit."""
  tokens, most = example.tokens, max(room, example.num_target + 1)
  if len(tokens) <= most:
    return example
  tokens = np.concatenate([tokens[:1], tokens[len(tokens) - most + 1 :]])
  return Example(tokens, example.num_target)


def own_adapters(rules: Rules, state: ServerState, hyper: Hyperparameters, client_B):
  """Returns what a round would send to each: factors [L, B, ...], [B, 1, 1]."""

  def one(client_id):
    view, _ = client.sent_to(rules, state, hyper, client_id)
    return view.adapters, view.scale

  adapters, scale = jax.vmap(one)(client_B)
  by_layer = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), adapters)
  return by_layer, scale[:, None, None]


def _adapters(
  x: Points, state: ServerState, choice: Choice
) -> Callable[[Sequence[Task]], tuple]:
  """Returns what gives a batch of one kind its adapters and scale."""
  if choice.untouched:
    return lambda batch: ({}, jnp.float32(1))
  hyper = jax.tree.map(lambda leaf: leaf[0], x.hyper)
  rules = x.experiment.rules
  server = tuple(client.global_adapters(rules, state, hyper))
  own = jax.jit(functools.partial(own_adapters, rules))

  def of_batch(batch: Sequence[Task]):
    wanted = x.config.eval.own_rank or rules.personal
    if batch[0].kind == 'unseen' or not wanted:
      return server
    return own(state, hyper, np.array([task.person for task in batch]))

  return of_batch


def _bucket(size: int, least: int) -> int:
  """Returns the power of two that holds `size`: a program each, so few."""
  return max(least, 1 << (size - 1).bit_length())


@functools.lru_cache(maxsize=4)  # runs of one process share what is compiled
def _programs(config, dtype, max_tokens: int, beams: int, alpha: float):
  """Returns what writes and what judges, of models alike."""
  generate = generation.make_generate(
    config, dtype, max_tokens=max_tokens, beams=beams, alpha=alpha
  )
  return jax.jit(generate), jax.jit(readout.make_argmax_and_log_prob(config, dtype))


def _answer(
  x: Points, state: ServerState, tasks: Sequence[Task], choice: Choice
) -> list[Answer]:
  """Completes all tasks, those of like length together."""
  model, shape = x.experiment.model, x.experiment.model.decoder
  assert shape, '`run` asks before'
  generate, judge = _programs(
    shape,
    base_model.compute_dtype(x.config),
    _max_tokens(x.config, choice),
    choice.beams if choice.search == 'beam' else 1,
    choice.alpha,
  )
  stop_V = generation.stop_token_mask(model.tokenizer, shape.vocab_size)
  base = lora.fold(x.base, state.residual)
  adapters, answers = _adapters(x, state, choice), {}
  for chunk in _with_progress(_chunks(tasks), len(tasks)):
    batch = [tasks[i] for i in chunk]
    full = batch + batch[-1:] * (ROWS - len(batch))
    about = (base, *adapters(full))
    prompts = [t.example.tokens[: -t.example.num_target] for t in full]
    out = generate(*about, _arranged(prompts, np.ndim(about[-1]) > 0), stop_V)
    said = _judged(functools.partial(judge, *about), full)
    out = jax.device_get(out)
    for i, row, n, (best, log_prob) in zip(
      chunk, out.tokens, out.count, said, strict=False
    ):
      answers[i] = Answer(row[:n], best, log_prob)
  return [answers[i] for i in range(len(tasks))]


def _arranged(prompts: Sequence[np.ndarray], own_adapters: bool) -> generation.Prompts:
  """Packs prompts, unless each has adapters of its own; in few shapes."""
  slots = _bucket(max(map(len, prompts)), 32)
  if own_adapters:
    return generation.pad(prompts, slots)
  return generation.pack(prompts, slots, multiple=4)


def _chunks(tasks: Sequence[Task]) -> list[list[int]]:
  """Splits tasks by kind and then by length, the longest first."""
  chunks = []
  for kind in scores.SETS:
    own = [i for i, task in enumerate(tasks) if task.kind == kind]
    own.sort(key=lambda i: -len(tasks[i].example.tokens))
    chunks += [own[i : i + ROWS] for i in range(0, len(own), ROWS)]
  return chunks


def _with_progress(
  chunks: Sequence[Sequence[int]], total: int
) -> Iterator[Sequence[int]]:
  """Yields chunks under a bar, or with a line after each elsewhere."""
  start, done = time.time(), 0
  quiet = not sys.stderr.isatty()
  with tqdm.tqdm(total=total, unit='example', disable=quiet) as bar:
    for chunk in chunks:
      yield chunk
      done += len(chunk)
      bar.update(len(chunk))
      if quiet:
        seconds = time.time() - start
        console.say(f'{done}/{total} examples completed  {seconds:.0f} s')


def _judged(judge: Callable, batch: Sequence[Task]) -> Iterator[tuple]:
  """Yields the likeliest tokens and log p of each task's target."""
  examples = [task.example for task in batch]
  count_B = [example.num_target for example in examples]
  length = _bucket(max(len(e.tokens) - 1 for e in examples), 32)
  # One a row, so that adapters of rows are those of people.
  packed = [
    packing.pack([e], packing.BatchShape(1, length, e.num_target)) for e in examples
  ]
  targets = _bucket(sum(count_B), 128)
  index = [b.target_index + i * length for i, b in enumerate(packed)]
  fill = np.zeros(targets - sum(count_B), np.int32)
  batched = packed[0]._replace(
    tokens=np.concatenate([b.tokens for b in packed]),
    segment=np.concatenate([b.segment for b in packed]),
    position=np.concatenate([b.position for b in packed]),
    target_index=np.concatenate([*index, fill]),
    target=np.concatenate([*[b.target for b in packed], fill]),
    weight=(np.arange(targets) < sum(count_B)).astype(np.float32),
  )
  ends = np.cumsum(count_B)
  best, log_prob = jax.device_get(judge(batched))
  yield from zip(
    np.split(best[: ends[-1]], ends[:-1]),
    np.split(log_prob[: ends[-1]], ends[:-1]),
    strict=True,
  )


def _line(tokenizer, task: Task, answer: Answer) -> dict[str, Any]:
  """Returns a line of generations.jsonl."""
  tokens, count = task.example
  generated = tokenizer.decode(answer.generated).partition('\n')[0]
  return {
    'client': task.name,
    'kind': task.kind,
    'rank': task.rank,
    'prompt': tokenizer.decode(tokens[1:-count]),
    'reference': tokenizer.decode(tokens[-count:]).strip(),
    'generated': generated.strip(),
    'teacher_forced': tokenizer.decode(answer.forced).strip(),
    'loss_sum': -float(answer.log_prob.astype(np.float64).sum()),
    'tokens': count,
  }
