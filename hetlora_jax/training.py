"""The host's side of a run: restore, run rounds, evaluate, log, save."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from hetlora_jax import checkpoint, console, experiment, metrics, results
from hetlora_jax.config import Config, ConfigError, flat, to_dict
from hetlora_jax.experiment import Experiment
from hetlora_jax.types import ServerState

# A run may be continued with other values of these.
_MAY_CHANGE = (
  'federated.num_rounds', 'federated.clients_at_once',
  'federated.rounds_per_call', 'eval.', 'checkpoint.', 'mesh.',
)  # fmt: skip


class Interrupted(Exception):
  """Somebody asked the run to stop; its state has been saved."""


class Point(NamedTuple):
  """A run: what, where, and how to repeat it."""

  config: Config
  workdir: pathlib.Path
  command: str = ''


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
  """Raises if the run in `workdir` was made with another configuration."""
  path = workdir / 'config.json'
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f'--workdir={workdir} is a file: name a folder.')
  if not path.exists():
    return
  try:
    old = flat(json.loads(path.read_text()))
  except ValueError as error:
    raise ConfigError(
      f'{path} is damaged ({error}): use another --workdir.'
    ) from error
  new = flat(json.loads(json.dumps(to_dict(config))))
  for name in sorted(set(old) | set(new)):
    if old.get(name) != new.get(name) and not name.startswith(_MAY_CHANGE):
      raise ConfigError(
        f'--workdir={workdir} holds a run with config.{name}='
        f'{old.get(name)!r}, not {new.get(name)!r}: use another --workdir, or '
        'the old value to continue it.'
      )


def run(config: Config, workdir: pathlib.Path, command: str = '') -> dict:
  """Runs or continues an experiment and returns its summary; see `run_points`."""
  return run_points([Point(config, workdir, command)])[0]


def run_points(points: Sequence[Point]) -> list[dict]:
  """Runs or continues points in one program and returns their summaries.

  Args:
    points: differ in `experiment.VARIES` alone. Each workdir gets config.json,
      metrics.jsonl, tensorboard/, checkpoints/, summary.json and curves.png;
      an earlier run in it is continued, all of them from the newest round that
      all have saved. Of several processes the first alone writes.

  Raises:
    ConfigError: a point cannot run; nothing has been written.
    Interrupted: Ctrl-C or SIGTERM; the states have been saved.
  """
  for point in points:
    check_workdir(point.config, point.workdir)
  started, c = time.time(), points[0].config
  console.say(
    f'Loading {c.model.source} and {c.data.name}; the first time takes a while.'
  )
  x = experiment.prepare(*[p.config for p in points])
  console.say(_introduction(x, len(points)))
  writes = jax.process_index() == 0
  for point in points if writes else ():
    point.workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_json(point.workdir / 'config.json', to_dict(point.config))
  folders = [p.workdir / 'checkpoints' for p in points]
  with contextlib.ExitStack() as stack:
    checkpoints = checkpoint.Checkpoints(folders, c.checkpoint.keep)
    stack.callback(checkpoints.close)
    state, first = _restore(x, checkpoints)
    # Rows up to the restored round were written before its checkpoint.
    writers = [
      metrics.Writer(p.workdir, first + 1 if first else 0, writes)
      for p in points
    ]
    for writer in writers:
      stack.callback(writer.close)
    _run_rounds(x, state, first, writers, checkpoints)
  seconds = (time.time() - started) / len(points)
  summaries = []
  for point, writer in zip(points, writers, strict=True):
    summary = results.summarise(x, writer.rows, seconds, point.command)
    summary['points_together'] = len(points)
    summaries.append(summary)
    if writes:
      metrics.write_json(point.workdir / 'summary.json', summary)
      title = f'{c.method}: {c.model.source} on {c.data.name}'
      metrics.plot(writer.rows, point.workdir / 'curves.png', title)
  return summaries


def evaluate_checkpoint(config: Config, workdir: pathlib.Path) -> metrics.Row:
  """Evaluates the newest checkpoint of a run."""
  if not (workdir / 'checkpoints').is_dir():
    raise ConfigError(f'--workdir={workdir} holds no checkpoints: train first.')
  check_workdir(config, workdir)
  x = experiment.prepare(config)
  checkpoints = checkpoint.Checkpoints(
    [workdir / 'checkpoints'], config.checkpoint.keep
  )
  state, first = _restore(x, checkpoints)
  checkpoints.close()
  if not first:
    raise ConfigError(f'{workdir}/checkpoints is empty: train first.')
  return {'round': first, **experiment.evaluate(x, state)[0]}


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


def _restore(x: Experiment, checkpoints) -> tuple[ServerState, int]:
  """Returns the state to go on from, and how many rounds it has done."""
  step, n = checkpoints.newest(), x.config.federated.rounds_per_call
  if step is None:
    return x.initial_state, 0
  if step % n:
    raise ConfigError(
      f'config.federated.rounds_per_call={n} does not divide the {step} rounds '
      'done: give a divisor.'
    )
  states = checkpoints.restore(step, experiment.shape_of_one(x))
  console.say(f'Continuing after round {step}.')
  return experiment.join(x, states), step


def _anywhere(flag: object) -> bool:
  """Tells whether a flag is set in any process, in all of them alike."""
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


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
      rows = [{'round': first, **row} for row in experiment.evaluate(x, state)]
      _write(rows, writers, progress)
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
          for row, losses in zip(
            rows, experiment.evaluate(x, state), strict=True
          ):
            row |= losses
          free = time.perf_counter()
        _write(rows, writers, progress)
      stopping = _anywhere(stop.received)
      if done == last or done % c.checkpoint.every == 0 or stopping:
        checkpoints.save(done, experiment.split(x, state))
      if stopping and done < last:
        progress.close()
        raise Interrupted(f'Stopped after round {done} of {last}.')
  progress.close()
