"""The host's side of a run: restore, run rounds, evaluate, log, save."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import runpy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from hetlora_jax import (
  base_model,
  build,
  checkpoint,
  config,
  console,
  experiment,
  points,
  rows,
  stopping,
)
from hetlora_jax.base_model import BaseModel
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.data import coverage
from hetlora_jax.data.people import Population
from hetlora_jax.metrics import Metric, check_own
from hetlora_jax.points import Points
from hetlora_jax.record import Point, Record
from hetlora_jax.run import Run, anywhere
from hetlora_jax.types import Row, ServerState


class Interrupted(Exception):
  """Somebody asked the run to stop; its state has been saved."""


class Branch(NamedTuple):
  """A saved state that a new run starts from, whatever its configuration."""

  workdir: pathlib.Path
  round: int


def parse_branch(text: str) -> Branch:
  """Parses DIR@ROUND; raises ConfigError if nothing was saved there."""
  found = re.fullmatch(r'(.+)@(\d+)', text)
  if not found:
    raise ConfigError(f'--branch_from={text} must be DIR@ROUND, e.g. runs/tiny@10.')
  branch = Branch(pathlib.Path(found[1]), int(found[2]))
  saved = Run(branch.workdir).steps()
  if branch.round not in saved:
    raise ConfigError(
      f'--branch_from={text}: {branch.workdir} has saved '
      f'{f"rounds {sorted(saved)}" if saved else "nothing"}.'
    )
  return branch


def load_config(source: Config | ConfigDict | str | os.PathLike) -> Config:
  """Resolves a configuration, or that of a file: 'configs/tiny.py', 'FILE.py:NAME'.

  A file has a function get_config, which gets NAME if there is one.
  """
  if not isinstance(source, (str, os.PathLike)):
    return config.resolve(source)
  path, colon, name = str(source).partition(':')
  if not pathlib.Path(path).is_file():
    raise ConfigError(f'the configuration {path} is no file: name one, or pass it.')
  get_config = runpy.run_path(path).get('get_config')
  if not get_config:
    raise ConfigError(f'{path} has no get_config(): start from configs/default.py.')
  return config.resolve(get_config(name) if colon else get_config())


def train(
  config: Config | ConfigDict | str | os.PathLike,
  workdir: str | os.PathLike,
  on_round: Callable[[Row], Any] | None = None,
  *,
  model: BaseModel | None = None,
  population: Population | None = None,
  branch: Branch | None = None,
  metrics: Mapping[str, Metric] | None = None,
  command: str = '',
) -> Run:
  """Runs an experiment, or continues it, and returns the run.

  Args:
    config: a configuration, resolved or not, or the path of a file of one; see
      `load_config`.
    workdir: the folder of the run; see `train_points`.
    on_round: called with every row as soon as it is written, and again with those that
      were not yet saved when a run was killed. If it returns 'stop', the run ends with
      the round's call of the compiled program: it is saved, has ended, and goes on only
      once its summary.json is deleted. Any other answer is ignored.
    model: a base model of your own (`base_model.own`).
    population: clients and examples of your own.
    branch: a saved state to start from.
    metrics: your own: name -> function of a `metrics.Snapshot`, called at every
      evaluation; the number that it returns is the column eval/own/NAME.
    command: a line that repeats this call, for summary.json.

  Raises:
    ConfigError: the run cannot be; nothing has been written.
    Interrupted: somebody asked to stop (`console.guard`); the state has been saved.
  """
  point = Point(load_config(config), pathlib.Path(workdir), command)
  return train_points(
    [point],
    on_round,
    model=model,
    population=population,
    branch=branch,
    metrics=metrics,
  )[0]


def train_points(
  chosen: Sequence[Point],
  on_round: Callable[[Row], Any] | None = None,
  *,
  model: BaseModel | None = None,
  population: Population | None = None,
  branch: Branch | None = None,
  metrics: Mapping[str, Metric] | None = None,
) -> list[Run]:
  """Runs or continues points in one program.

  Args:
    chosen: differ in `config.VARIES` alone. Each workdir gets config.json,
      metrics.jsonl, tensorboard/, checkpoints/, summary.json and curves.png; an
      earlier run in it is continued, all of them from the newest round that all have
      saved. Of several processes the first alone writes.
    on_round: called with every row of every point; see `train`. It stops the point
      whose row it got.
    model: see `train`.
    population: see `train`.
    branch: what to start from if nothing was saved in the workdirs.
    metrics: see `train`.

  Raises:
    ConfigError: a point cannot run; nothing has been written.
    Interrupted: see `train`.
  """
  check_own(own := metrics or {})
  every, runs, chosen = _that_go_on(chosen, model, branch.round if branch else 0)
  if not runs:
    return every
  started, c = time.time(), chosen[0].config
  console.say(
    f'Loading {c.model.source} and {c.data.name}; the first time takes a while.'
  )
  x = points.prepare(*[p.config for p in chosen], model=model, population=population)
  console.say(_introduction(x, len(chosen)))
  console.say(coverage.told(x.experiment.coverage))
  for warning in coverage.warnings(x.experiment.coverage):
    console.say(f'Warning: {warning}')
  own_names = [f'eval/own/{name}' for name in own]
  stopping.check(c.eval, [*rows.evaluation_columns(x), *own_names])
  branched = branch and not any(run.steps() for run in runs)
  start = _branched(x, branch) if branched else None
  with _on_disk(runs), contextlib.ExitStack() as stack:
    for run in runs:
      stack.enter_context(run.locked())
    checkpoints = checkpoint.Checkpoints(
      [run.checkpoints for run in runs], x.identity, c.checkpoint
    )
    stack.callback(checkpoints.close)
    state, first = _start(x, checkpoints, start)
    record = stack.enter_context(Record(x, runs, chosen, first, on_round, started, own))
    stack.enter_context(console.not_left_alone())
    stack.enter_context(_in_memory(c))
    _run_rounds(x, state, first, record, checkpoints)
    record.finish(record.running)
  return every


def _that_go_on(
  chosen: Sequence[Point], model: BaseModel | None, start: int
) -> tuple[list[Run], list[Run], list[Point]]:
  """Returns all runs, and runs and points of those that were not stopped early.

  Raises ConfigError where a folder cannot be used.
  """
  every = [Run(point.workdir, model) for point in chosen]
  for run, point in zip(every, chosen, strict=True):
    run.check(point.config)
    run.check_free()
  left = []
  for run, point in zip(every, chosen, strict=True):
    if told := run.stopped(point.config):
      console.say(f'{run.folder} was stopped after round {told}.')
    else:
      run.check_rows(start)
      left.append((run, point))
  return every, [run for run, _ in left], [point for _, point in left]


@contextlib.contextmanager
def _on_disk(runs: Sequence[Run]) -> Iterator[None]:
  """Says what to do when a disk is full or cannot be written to."""
  try:
    yield
  except OSError as error:
    raise OSError(
      f'{error} (--workdir={runs[0].folder}). What has been saved is kept: '
      'make room or mend the disk, and run the same line to go on.'
    ) from error


def _in_memory(c: Config) -> contextlib.AbstractContextManager[None]:
  at_once = build.clients_at_once(c)[0] // c.mesh.clients
  return experiment.in_memory(
    f'{at_once} clients train at once on a device; lower that, '
    'federated.clients_at_once, or federated.local_batch, for evaluations '
    'eval.examples_per_person, or run fewer points together. What has been '
    'saved is kept.'
  )


def evaluate(run: Run, c: Config | None = None, round: str | int = 'newest') -> Row:
  """Evaluates a checkpoint of a run.

  Args:
    run: the run.
    c: its configuration with another section `eval`; None: its own.
    round: 'newest', 'best' or the number of a saved one; see `Run.state`.
  """
  run.check(c or run.config)
  run.saved_round(round, c and c.eval)
  x = run.prepare(c)
  done, state = run.state(x, round)
  with experiment.in_memory('lower eval.examples_per_person.'):
    found = points.evaluate(x, points.join(x, [state]))
  return {'round': done, **rows.evaluation_row(found[0])}


def _introduction(x: Points, count: int) -> str:
  rank_N, d = x.initial_rank, experiment.describe(x.experiment)
  they = f'of rank {rank_N.min()} to {rank_N.max()} (mean {rank_N.mean():.1f})'
  if not rank_N.any():
    they = f'that train all {d["base_parameters"]:,} parameters'
  revisions = x.experiment.revisions.items()
  at = {of: f' at {commit}' if commit else '' for of, commit in revisions}
  together = f'{count} points together: ' if count > 1 else ''
  why = base_model.why_dtype(x.config) if x.experiment.model.decoder else ''
  return (
    f'{together}{x.config.method} on {x.config.data.name}{at["data"]}: '
    f'{d["training_people"]} clients {they}, '
    f'{d["unseen_people"]} people never trained on; {d["model"]}{at["model"]} '
    f'in {d["dtype"]}{why} '
    f'on {x.experiment.mesh.size} {jax.default_backend()} device(s). Compiling.'
  )


def _start(x: Points, checkpoints, branched) -> tuple[ServerState, int]:
  """Returns the state to go on from, and how many rounds it has done."""
  found = checkpoints.restore_newest(points.shape_of_one(x))
  if branched and not found:
    found = branched
    checkpoints.save(*found)  # a start of its own, should it be interrupted
  if not found:
    return x.initial_state, 0
  step, states = found
  n = x.config.federated.rounds_per_call
  if step % n:
    raise ConfigError(
      f'config.federated.rounds_per_call={n} does not divide the {step} rounds '
      'done: give a divisor.'
    )
  console.say(f'Continuing after round {step}{_exactness()}.')
  return points.join(x, states), step


def _exactness() -> str:
  """Says what a resumed run on a GPU lacks, if it does (docs/reliability.md)."""
  flag = '--xla_gpu_deterministic_ops=true'
  if jax.default_backend() != 'gpu' or flag in os.environ.get('XLA_FLAGS', ''):
    return ''
  return f'; to the bit as an unbroken run only if both have XLA_FLAGS={flag}'


def _branched(x: Points, branch: Branch) -> tuple[int, list[ServerState]]:
  """Returns the round and the states to branch from."""
  model = x.experiment.model.identity  # its data may be others
  other = checkpoint.Checkpoints([Run(branch.workdir).checkpoints], model)
  states = other.restore(branch.round, points.shape_of_one(x))
  other.close()
  return branch.round, states * len(x.configs)


def _run_rounds(
  x: Points, state: ServerState, first: int, record: Record, checkpoints
) -> None:
  """Runs the rounds that remain, a call of the compiled program at a time."""
  c, done = x.config, first
  last, every, each = c.federated.num_rounds, c.eval.every, c.federated.rounds_per_call

  def call(state, cohorts, done):
    return jax.block_until_ready(points.call(x, state, cohorts, done))

  with console.guard(), console.background() as in_background:
    # Compile ahead of all that is timed; nothing if no round is left.
    ahead = points.cohorts_ahead(x, first, last)
    cohorts = next(ahead, None)
    if cohorts is not None:
      start = time.perf_counter()
      in_background(points.compile, x, state, cohorts)
      record.compiled(time.perf_counter() - start)
    if not record.evaluated:
      found = record.evaluation(state, first)
      record.write([{'round': first, **row} for row in found])
    _settle(x, state, first, record, checkpoints)
    free = time.perf_counter()  # when the devices had last finished
    while cohorts is not None and record.running:
      # The rounds of a call, while the next call's cohorts are built.
      done += each
      start = time.perf_counter()
      state, out = in_background(call, state, cohorts, done)
      waited, free = start - free, time.perf_counter()

      # Their rows; the last one has the evaluation, if it is due.
      share = 1 / (each * len(x.configs))  # of a round and a run in the times
      for i, found in enumerate(points.by_round(x, out, done)):
        now = done - each + i + 1
        of_runs = record.round(found, now, (free - start) * share, waited * share)
        if now == done and (done == last or (every and done % every == 0)):
          for row, losses in zip(of_runs, record.evaluation(state, done), strict=True):
            row |= losses
          free = time.perf_counter()
        record.write(of_runs)

      # A checkpoint; and whether to stop.
      asked = anywhere(console.stopping())
      _settle(x, state, done, record, checkpoints, asked)
      if asked and done < last and record.running:
        raise Interrupted(f'Stopped after round {done} of {last}.')
      cohorts = next(ahead, None)


def _settle(
  x: Points, state: ServerState, done: int, record: Record, checkpoints, asked=False
) -> None:
  """Saves, if it is due, rows that are safe on the disk; ends runs that stop early."""
  c, ending, best = x.config, record.ending(done), record.best
  due = done == c.federated.num_rounds or (done and done % c.checkpoint.every == 0)
  if due or asked or ending or done in [best[k] for k in record.running]:
    record.sync()
    states = enumerate(points.split(x, state))
    of_running = (s if k in record.running else None for k, s in states)
    checkpoints.save(done, of_running, best)
  if ending:
    checkpoints.wait()  # what has ended is not done again
    record.finish(list(ending), ending)
