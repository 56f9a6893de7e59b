"""The host's side of a run: restore, run rounds, evaluate, log, save."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

from hetlora_jax import (
  build,
  checkpoint,
  console,
  experiment,
  files,
  metrics,
  results,
  workdirs,
)
from hetlora_jax.base_model import BaseModel
from hetlora_jax.config import Config, ConfigError, to_dict
from hetlora_jax.experiment import Experiment
from hetlora_jax.types import ServerState


class Interrupted(Exception):
  """Somebody asked the run to stop; its state has been saved."""


class Point(NamedTuple):
  """A run: what, where, and how to repeat it."""

  config: Config
  workdir: pathlib.Path
  command: str = ''


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
  saved = checkpoint.steps(branch.workdir / 'checkpoints')
  if branch.round not in saved:
    raise ConfigError(
      f'--branch_from={text}: {branch.workdir} has saved '
      f'{f"rounds {sorted(saved)}" if saved else "nothing"}.'
    )
  return branch


def run(
  config: Config,
  workdir: pathlib.Path,
  command: str = '',
  branch: Branch | None = None,
  model: BaseModel | None = None,
) -> dict:
  """Runs or continues an experiment and returns its summary; see `run_points`."""
  return run_points([Point(config, workdir, command)], branch, model)[0]


def run_points(
  points: Sequence[Point],
  branch: Branch | None = None,
  model: BaseModel | None = None,
) -> list[dict]:
  """Runs or continues points in one program and returns their summaries.

  Args:
    points: differ in `experiment.VARIES` alone. Each workdir gets config.json,
      metrics.jsonl, tensorboard/, checkpoints/, summary.json and curves.png;
      an earlier run in it is continued, all of them from the newest round that
      all have saved. Of several processes the first alone writes.

    branch: what to start from if nothing was saved in the workdirs.
    model: your own, instead of what the configurations name.

  Raises:
    ConfigError: a point cannot run; nothing has been written.
    Interrupted: Ctrl-C or SIGTERM; the states have been saved.
  """
  for point in points:
    workdirs.check(point.config, point.workdir)
    workdirs.check_free(point.workdir)
  started, c = time.time(), points[0].config
  console.say(
    f'Loading {c.model.source} and {c.data.name}; the first time takes a while.'
  )
  x = experiment.prepare(*[p.config for p in points], model=model)
  console.say(_introduction(x, len(points)))
  folders = [p.workdir / 'checkpoints' for p in points]
  begun = any(checkpoint.steps(folder) for folder in folders)
  branched = _branched(x, branch) if branch and not begun else None
  writes = jax.process_index() == 0
  with _on_disk(points), contextlib.ExitStack() as stack:
    for point in points:
      stack.enter_context(workdirs.held(point.workdir))
    checkpoints = checkpoint.Checkpoints(folders, x.base_identity, c.checkpoint)
    stack.callback(checkpoints.close)
    state, first = _start(x, checkpoints, branched)
    for point in points if writes else ():
      files.write_json(point.workdir / 'config.json', to_dict(point.config))
    # Rows up to the restored round were written before its checkpoint.
    writers = [
      metrics.Writer(p.workdir, first + 1 if first else 0, writes) for p in points
    ]
    for writer in writers:
      stack.callback(writer.close)
    stack.enter_context(console.not_left_alone())
    stack.enter_context(_in_memory(x.config))
    _run_rounds(x, state, first, writers, checkpoints)
  seconds = (time.time() - started) / len(points)
  summaries = []
  for point, writer in zip(points, writers, strict=True):
    summary = results.summarise(x, writer.rows, seconds, point.command)
    summary['points_together'] = len(points)
    summaries.append(summary)
    if writes:
      files.write_json(point.workdir / 'summary.json', summary)
      title = f'{c.method}: {c.model.source} on {c.data.name}'
      metrics.plot(writer.rows, point.workdir / 'curves.png', title)
  return summaries


@contextlib.contextmanager
def _on_disk(points: Sequence[Point]) -> Iterator[None]:
  """Says what to do when a disk is full or cannot be written to."""
  try:
    yield
  except OSError as error:
    raise OSError(
      f'{error} (--workdir={points[0].workdir}). What has been saved is kept: '
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


def evaluate_checkpoint(
  config: Config, workdir: pathlib.Path, model: BaseModel | None = None
) -> metrics.Row:
  """Evaluates the newest undamaged checkpoint of a run."""
  folder = workdir / 'checkpoints'
  if not checkpoint.steps(folder):
    raise ConfigError(f'--workdir={workdir} holds no checkpoints: train first.')
  workdirs.check(config, workdir)
  x = experiment.prepare(config, model=model)
  like = experiment.shape_of_one(x)
  first, state = checkpoint.newest(workdir, x.base_identity, like)
  with experiment.in_memory('lower eval.examples_per_person.'):
    found = experiment.evaluate(x, experiment.join(x, [state]))
  return {'round': first, **results.evaluation_row(found, 0)}


def _introduction(x: Experiment, points: int) -> str:
  rank_N, d = x.initial_rank, x.description
  they = f'of rank {rank_N.min()} to {rank_N.max()} (mean {rank_N.mean():.1f})'
  if not rank_N.any():
    they = f'who train all {d["base_parameters"]:,} parameters'
  together = f'{points} points together: ' if points > 1 else ''
  return (
    f'{together}{x.config.method} on {x.config.data.name}: '
    f'{d["training_people"]} people {they}, '
    f'{d["unseen_people"]} more never trained on; {d["model"]} in {d["dtype"]} '
    f'on {x.mesh.size} {jax.default_backend()} device(s). The first evaluation '
    'and round include compiling.'
  )


def _start(x: Experiment, checkpoints, branched) -> tuple[ServerState, int]:
  """Returns the state to go on from, and how many rounds it has done."""
  found = checkpoints.restore_newest(experiment.shape_of_one(x))
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
  return experiment.join(x, states), step


def _exactness() -> str:
  """Says what a resumed run on a GPU lacks, if it does (docs/reliability.md)."""
  flag = '--xla_gpu_deterministic_ops=true'
  if jax.default_backend() != 'gpu' or flag in os.environ.get('XLA_FLAGS', ''):
    return ''
  return f'; to the bit as an unbroken run only if both have XLA_FLAGS={flag}'


def _branched(x: Experiment, branch: Branch) -> tuple[int, list[ServerState]]:
  """Returns the round and the states to branch from."""
  other = checkpoint.Checkpoints([branch.workdir / 'checkpoints'], x.base_identity)
  states = other.restore(branch.round, experiment.shape_of_one(x))
  other.close()
  return branch.round, states * len(x.points)


def _rows(x: Experiment, out: dict, done: int, seconds: float, waited: float):
  """Yields each round of a call as rows, one a point.

  Times are a round's and a point's share of the call's.
  """
  rounds, points = x.config.federated.rounds_per_call, len(x.points)
  share = 1 / (rounds * points)
  for i in range(rounds):
    yield [
      results.round_row(
        x, config, done - rounds + i + 1,
        jax.tree.map(lambda leaf: leaf[i, k], out),  # noqa: B023
        seconds * share, waited * share,
      )
      for k, config in enumerate(x.points)
    ]  # fmt: skip


def _write(rows, writers, progress) -> None:
  for row, writer in zip(rows, writers, strict=False):
    writer.write(row)
  progress.update(rows[: len(writers)])


def _evaluate(x: Experiment, state, round: int, writers) -> list[metrics.Row]:
  """Evaluates all points, writes people.json and returns the rows' part."""
  found = experiment.evaluate(x, state)
  for k, writer in enumerate(writers):
    writer.write_people({'round': round, **results.people(x, found, k)})
  return [results.evaluation_row(found, k) for k in range(len(x.points))]


def _evaluated(writer: metrics.Writer) -> bool:
  return any('eval/seen/loss' in row for row in writer.rows)


def _run_rounds(x: Experiment, state, first: int, writers, checkpoints) -> None:
  """Runs the rounds that remain, a call at a time."""
  c = x.config
  last, every = c.federated.num_rounds, c.eval.every
  progress = console.Progress(min(first, last), last)

  def call(state, cohorts):
    return jax.block_until_ready(x.run_rounds(x.base, state, cohorts, x.hyper))

  with console.StopSignal() as stop, console.background() as in_background:
    if not all(map(_evaluated, writers)):
      found = _evaluate(x, state, first, writers)
      _write([{'round': first, **row} for row in found], writers, progress)
    free = time.perf_counter()  # when the devices had last finished
    done = first
    for cohorts in experiment.cohorts_ahead(x, first, last):
      done += c.federated.rounds_per_call
      start = time.perf_counter()
      state, out = in_background(call, state, cohorts)
      waited, free = start - free, time.perf_counter()
      rounds = _rows(x, jax.device_get(out), done, free - start, waited)
      for rows in rounds:
        for row, writer in zip(rows, writers, strict=False):
          results.cumulate(row, writer.rows)
        ends_call = rows[0]['round'] == done
        if ends_call and (done == last or (every and done % every == 0)):
          found = _evaluate(x, state, done, writers)
          for row, losses in zip(rows, found, strict=True):
            row |= losses
          free = time.perf_counter()
        _write(rows, writers, progress)
      stopping = workdirs.anywhere(stop.received)
      if done == last or done % c.checkpoint.every == 0 or stopping:
        for writer in writers:
          writer.sync()
        checkpoints.save(done, experiment.split(x, state))
      if stopping and done < last:
        progress.close()
        raise Interrupted(f'Stopped after round {done} of {last}.')
  progress.close()
