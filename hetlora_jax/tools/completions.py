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
  tracking,
)
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.data import packing, rendering
from hetlora_jax.data.people import Example
from hetlora_jax.models import readout
from hetlora_jax.points import Points
from hetlora_jax.run import Run
from hetlora_jax.tools import generation, prompts, scores
from hetlora_jax.tools.prompts import Task
from hetlora_jax.types import Batch, Hyperparameters, Rules, ServerState

SEARCHES = ('greedy', 'beam')
ROWS = 16  # prompts at a time


class Settings(NamedTuple):
  """How to generate, and from what; people and examples are `config.eval`'s."""

  search: str = 'greedy'  # of SEARCHES
  beams: int = 4
  alpha: float = 1.0  # see generation.make_generate
  max_tokens: int | None = None  # None: data.targets_per_example
  shots: int = 0  # examples of other people before each prompt
  untouched: bool = False  # the base model, without a checkpoint


class Answer(NamedTuple):
  """What was written for a task, as it comes from the devices."""

  generated: np.ndarray  # tokens
  forced: np.ndarray  # tokens
  log_prob: np.ndarray  # of the reference's tokens


def complete(
  run: Run,
  settings: Settings,
  config: Config | None = None,
  round: str | int = 'newest',
) -> dict[str, Any]:
  """Generates, scores and writes both files, each whole or not at all.

  Args:
    run: whose checkpoint writes; its folder gets the files.
    settings: how.
    config: the run's configuration with another section `eval`; None: its own.
    round: of which round; see `Run.state`.

  Returns:
    What evaluation.json holds.

  Raises:
    ConfigError: there is no checkpoint, or a setting that cannot be, or the model is
      one of your own, which cannot write.
  """
  config = config or run.config
  _check(run, config, settings)
  if settings.untouched and round != 'newest':
    raise ConfigError(f'--round={round} and --untouched: give one of them.')
  if not settings.untouched:
    run.saved_round(round, config.eval)
  x = run.prepare(config)
  done, state = 0, x.take(x.initial_state, 0)
  if not settings.untouched:
    done, state = run.state(x, round)

  # Complete every prompt.
  rank_N = np.asarray(state.memory.rank).max(1)
  tasks = list(prompts.tasks(x.experiment, rank_N, settings.shots))
  longest = max((len(task.example.tokens) for task in tasks), default=0)
  total = longest + _max_tokens(x.config, settings)
  field = f'--shots={settings.shots} with {total} tokens of a prompt and its completion'
  base_model.check_positions(x.experiment.model, field, total)
  with experiment.in_memory('lower --max_tokens, --shots or --beams.'):
    answers = _answer(x, state, tasks, settings)

  # Score what was written.
  tokenizer, one_line = x.experiment.model.tokenizer, _ends(x) is None
  lines = [
    _line(tokenizer, *both, one_line) for both in zip(tasks, answers, strict=True)
  ]
  told = {
    'max_tokens': _max_tokens(x.config, settings),
    'own_rank': config.eval.own_rank,
  }
  found = {
    'round': done,
    'settings': settings._asdict() | told,
    **scores.of_lines(lines, config.seed),
  }
  _write(run, lines, found)
  return found


def _write(run: Run, lines: Sequence[dict], found: dict[str, Any]) -> None:
  """Writes both files, and shows the first lines in TensorBoard."""
  run.folder.mkdir(parents=True, exist_ok=True)
  files.write_json_lines(run.folder / 'generations.jsonl', lines)
  files.write_json(run.folder / 'evaluation.json', found)
  tracking.show_samples(run.folder, found['round'])


def _check(run: Run, config: Config, settings: Settings) -> None:
  """Raises ConfigError for what can be told before anything is loaded."""
  if run.model and not run.model.decoder:
    raise ConfigError(
      'a model of your own cannot generate: it has no cache of keys and values '
      '(`base_model.own`). `training.evaluate` tells its losses.'
    )
  if settings.search not in SEARCHES:
    raise ConfigError(f'--generate={settings.search}: take one of {SEARCHES}.')
  low = {'beams': 1, 'alpha': 0, 'max_tokens': 1, 'shots': 0}
  for field, least in low.items():
    value = getattr(settings, field)
    if value is not None and value < least:
      raise ConfigError(f'--{field}={value} must be {least} at least.')
  if settings.shots and config.data.format == 'template':
    raise ConfigError(
      f'--shots={settings.shots}: a chat template writes one conversation, and shots are '
      'others: leave them out.'
    )
  if settings.untouched and config.eval.own_rank:
    raise ConfigError(
      '--own_rank and --untouched: a base model has no ranks; drop one.'
    )
  if not settings.untouched:
    run.check_saved(', or evaluate the base model by --untouched')
    run.check(config)


def _max_tokens(config: Config, settings: Settings) -> int:
  return settings.max_tokens or config.data.targets_per_example


def _ends(x: Points) -> frozenset[int] | None:
  """Returns the tokens that end a completion; None: a line's end."""
  return rendering.make(x.config.data.format, x.experiment.model.tokenizer).ends


def own_adapters(rules: Rules, state: ServerState, hyper: Hyperparameters, client_B):
  """Returns what a round would send to each: factors [L, B, ...], [B, 1, 1]."""

  def one(client_id):
    view = client.sent_to(rules, state, hyper, client_id)
    return view.adapters, view.scale

  adapters, scale = jax.vmap(one)(client_B)
  by_layer = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), adapters)
  return by_layer, scale[:, None, None]


def _adapters(
  x: Points, state: ServerState, settings: Settings
) -> Callable[[Sequence[Task]], tuple]:
  """Returns what gives a batch of one kind its adapters and scale."""
  if settings.untouched:
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
def _programs(shape, dtype, max_tokens: int, beams: int, alpha: float):
  """Returns what writes and what judges, of models alike."""
  generate = generation.make_generate(
    shape, dtype, max_tokens=max_tokens, beams=beams, alpha=alpha
  )
  return jax.jit(generate), jax.jit(readout.make_argmax_and_log_prob(shape, dtype))


def _answer(
  x: Points, state: ServerState, tasks: Sequence[Task], settings: Settings
) -> list[Answer]:
  """Completes all tasks, those of like length together."""
  model, shape = x.experiment.model, x.experiment.model.decoder
  assert shape, '`_check` asks before'
  generate, judge = _programs(
    shape,
    base_model.compute_dtype(x.config),
    _max_tokens(x.config, settings),
    settings.beams if settings.search == 'beam' else 1,
    settings.alpha,
  )
  stop_V = generation.stop_token_mask(model.tokenizer, shape.vocab_size, _ends(x))
  base = lora.fold(x.base, state.residual)
  adapters, answers = _adapters(x, state, settings), {}
  for chunk in _with_progress(_chunks(tasks), len(tasks)):
    # The last chunk of a kind is filled up, so that all have one shape.
    batch = [tasks[i] for i in chunk]
    full = batch + batch[-1:] * (ROWS - len(batch))

    # Write the completions, and judge the references.
    given = (base, *adapters(full))
    texts = [t.example.tokens[: -t.example.num_target] for t in full]
    out = generate(*given, _arranged(texts, np.ndim(given[-1]) > 0), stop_V)
    judged = _judged(functools.partial(judge, *given), full)
    out = jax.device_get(out)
    written = zip(out.tokens, out.count, judged, strict=True)
    for i, (tokens, count, (best, log_prob)) in zip(chunk, written, strict=False):
      answers[i] = Answer(tokens[:count], best, log_prob)
  return [answers[i] for i in range(len(tasks))]


def _arranged(texts: Sequence[np.ndarray], own_adapters: bool) -> generation.Prompts:
  """Packs prompts, unless each has adapters of its own; in few shapes."""
  slots = _bucket(max(map(len, texts)), 32)
  if own_adapters:
    return generation.pad(texts, slots)
  return generation.pack(texts, slots, multiple=4)


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
  ends = np.cumsum([task.example.num_target for task in batch])
  best, log_prob = jax.device_get(judge(_row_each([task.example for task in batch])))
  yield from zip(
    np.split(best[: ends[-1]], ends[:-1]),
    np.split(log_prob[: ends[-1]], ends[:-1]),
    strict=True,
  )


def _row_each(examples: Sequence[Example]) -> Batch:
  """Packs each example into a row of its own, so that rows are people; in few shapes."""
  length = _bucket(max(len(e.tokens) - 1 for e in examples), 32)
  rows = [
    packing.pack([e], packing.BatchShape(1, length, e.num_target)) for e in examples
  ]
  # Targets lie behind each other, then padding.
  count = sum(e.num_target for e in examples)
  room = _bucket(count, 128)
  index = np.concatenate([b.target_index + i * length for i, b in enumerate(rows)])
  target = np.concatenate([b.target for b in rows])
  return rows[0]._replace(
    tokens=np.concatenate([b.tokens for b in rows]),
    segment=np.concatenate([b.segment for b in rows]),
    position=np.concatenate([b.position for b in rows]),
    target_index=np.pad(index, (0, room - count)),
    target=np.pad(target, (0, room - count)),
    weight=(np.arange(room) < count).astype(np.float32),
  )


def _line(tokenizer, task: Task, answer: Answer, one_line: bool) -> dict[str, Any]:
  """Returns a line of generations.jsonl."""
  tokens, count, num_bos = (
    task.example.tokens, task.example.num_target, task.example.num_bos
  )  # fmt: skip
  generated = tokenizer.decode(answer.generated)
  generated = generated.partition('\n')[0] if one_line else generated
  return {
    'client': task.name,
    'kind': task.kind,
    'rank': task.rank,
    'prompt': tokenizer.decode(tokens[num_bos:-count]),
    'reference': tokenizer.decode(tokens[-count:]).strip(),
    'generated': generated.strip(),
    'teacher_forced': tokenizer.decode(answer.forced).strip(),
    'loss_sum': -float(answer.log_prob.astype(np.float64).sum()),
    'tokens': count,
  }
