"""Runs what is missing of the reproduction study: python -m benchmarks.study.

Arm by arm of configs/study.py, so that what is done early can be compared: both
tasks at three learning rates, and more while the best for validation people is at
the edge, with the first seed, then, at the best rate, with the other seeds. Every
run ends in docs/results/raw/TASK/RUN.json; one that has its file is not run again,
and one that was killed goes on from its checkpoint. Subject lines are also written,
and scored by ROUGE. The untouched model, without and with examples in its prompt, is
the floor. `benchmarks.study_report` makes docs/results.md of these files.
"""

import hashlib
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
from absl import flags

from benchmarks import machine
from configs import study
from hetlora_jax import (
  config,
  console,
  files,
  points,
  rows,
  training,
)
from hetlora_jax.run import Run
from hetlora_jax.tools import completions, scores, sweep
from hetlora_jax.types import Row
from launch import processes, signals

_RAW = flags.DEFINE_string('raw', 'docs/results/raw', 'Folder of the results.')
_WORKDIR = flags.DEFINE_string('workdir', 'runs/study', 'Folder of the runs.')
_TASKS = flags.DEFINE_list('tasks', list(study.TASKS), 'Tasks to run.')
flags.register_validator(
  'tasks',
  lambda tasks: bool(tasks) and set(tasks) <= set(study.TASKS),
  f'one or more of {", ".join(study.TASKS)}',
)
_TOGETHER = flags.DEFINE_integer(
  'together', 3, 'Most runs in one program.', lower_bound=1
)
_ONLY = flags.DEFINE_list(
  'only', [], 'Names of runs that share a program, to run in this process.'
)


_FLOORS = 'floors'  # in the place of names


def slug(arm: str) -> str:
  """Returns an arm's name as part of a file's, e.g. 'hetlora_0.85'."""
  return re.sub(r'[^a-z0-9.]+', '_', arm.lower())


def _task_config(task: str):
  """Returns what all arms of a task share; with --smoke next to nothing."""
  return machine.smoke_config() if machine.smoke() else study.get_config(task)


def name_of(arm: str, rate: float, seed: int) -> str:
  return f'{slug(arm)}-lr{rate:g}-seed{seed}'


def load(folder: pathlib.Path, task: str) -> dict[str, dict]:
  """Returns all results of a task by name."""
  paths = sorted((folder / task).glob('*.json'))
  return {path.stem: json.loads(path.read_text()) for path in paths}


def for_validation(client: str) -> bool:
  """Tells whether a person never trained on chooses rates, or is reported."""
  return bool(hashlib.blake2b(client.encode()).digest()[0] % 2)


def validation_loss(result: dict) -> float:
  """Returns the loss a token of the validation people, inf if it is NaN."""
  people = [p for p in result['people']['unseen'] if for_validation(p['client'])]
  loss = sum(p['loss_sum'] for p in people) / sum(p['tokens'] for p in people)
  return loss if math.isfinite(loss) else math.inf


def rates_wanted(arm: str, results: dict[str, dict]) -> list[float]:
  """Returns the rates to try: three of the ladder, more where the best is last."""
  _, ladder = study.rates(arm)
  names = [name_of(arm, rate, study.SEEDS[0]) for rate in ladder]
  middle = len(ladder) // 2
  wanted = {middle - 1, middle, middle + 1}
  wanted |= {i for i, name in enumerate(names) if name in results}
  if all(names[i] in results for i in wanted):
    best = min(sorted(wanted), key=lambda i: validation_loss(results[names[i]]))
    wanted |= {best - 1, best + 1}
  return [rate for i, rate in enumerate(ladder) if i in wanted]


def best_rate(arm: str, results: dict[str, dict]) -> float | None:
  """Returns the rate whose run of the first seed validates best, if all ran."""
  names = {
    rate: name_of(arm, rate, study.SEEDS[0]) for rate in rates_wanted(arm, results)
  }
  if not all(name in results for name in names.values()):
    return None
  return min(names, key=lambda rate: validation_loss(results[names[rate]]))


def _run(
  task: str, arm: str, rate: float, seed: int, folder: pathlib.Path
) -> sweep.Job:
  field, _ = study.rates(arm)
  fields = study.ARMS[arm] | {field: rate, 'seed': seed}
  name = name_of(arm, rate, seed)
  workdir = folder / task / name
  words = [f'--config.{k}={v}' for k, v in fields.items()]
  command = shlex.join(
    ['python', '-m', 'launch.train', f'--config=configs/study.py:{task}',
     *words, f'--workdir={workdir}']
  )  # fmt: skip
  resolved = config.built(_task_config(task)).replace(**fields)
  return sweep.Job(name, fields, resolved, workdir, command)


def runs(
  task: str, arm: str, results: dict[str, dict], folder: pathlib.Path
) -> Iterator[sweep.Job]:
  """Yields an arm's runs: all rates of the first seed, then other seeds.

  The latter only if the rate can be chosen; `folder` gets their folders.
  """
  for rate in rates_wanted(arm, results):
    yield _run(task, arm, rate, study.SEEDS[0], folder)
  rate = best_rate(arm, results)
  for seed in study.SEEDS[1:] if rate else ():
    yield _run(task, arm, rate, seed, folder)


def _curve(rows: Sequence[Row]) -> dict[str, list]:
  """Returns losses, and what was sent and seen until then, at evaluations."""
  sent = {0: (0, 0, 0)}
  for row in rows:
    if 'train/loss' in row:
      up, down = row['comm/total_up_bytes'], row['comm/total_down_bytes']
      tokens = sent[row['round'] - 1][2] + row['train/tokens']
      sent[row['round']] = (up, down, tokens)
  evaluated = [row for row in rows if 'eval/seen/loss' in row]
  return {
    'round': [row['round'] for row in evaluated],
    'seen': [row['eval/seen/loss'] for row in evaluated],
    'unseen': [row['eval/unseen/loss'] for row in evaluated],
    'up_bytes': [sent[row['round']][0] for row in evaluated],
    'down_bytes': [sent[row['round']][1] for row in evaluated],
    'target_tokens': [sent[row['round']][2] for row in evaluated],
  }


_OF_ROUNDS = (
  'train/loss', 'aggregation/error', 'rank/mean', 'rank/pruned',
  'energy/effective_slots', 'weight/effective_clients', 'time/round_s',
)  # fmt: skip


def collect(task: str, arm: str, run: sweep.Job, summary: dict) -> dict:
  """Returns what is kept of a finished run."""
  rows = files.read_rows(run.workdir / 'metrics.jsonl')
  rounds = [row for row in rows if 'train/loss' in row]
  return {
    'task': task, 'arm': arm, 'fields': run.fields, 'command': run.command,
    'finished': summary['finished'], 'machine': machine.describe(),
    'curve': _curve(rows),
    'rounds': {name: [row[name] for row in rounds] for name in _OF_ROUNDS},
    'energy/slots': rounds[-1]['energy/slots'],
    'rank/histogram': [rounds[0]['rank/histogram'], rounds[-1]['rank/histogram']],
    'train/parameters': summary['train/parameters'],
    'people': json.loads((run.workdir / 'people.json').read_text()),
  }  # fmt: skip


def _texts(found: dict) -> dict[str, list[dict]]:
  """Returns everybody's RougeL, of texts written and teacher-forced."""
  return {
    name: [
      {'client': p['client'], **{t: p[t]['rougeL'] for t in scores.TEXTS}}
      for p in found[name]['people']
    ]
    for name in scores.SETS
  }


def _untouched(c: config.Config) -> dict[str, list[dict]]:
  """Returns everybody's loss before the first round, as runs evaluate it."""
  x = points.prepare(c)
  (found,) = points.evaluate(x, x.initial_state)
  return rows.people(x.experiment, x.initial_rank[0], found)


def _do_floors(task: str) -> None:
  """Evaluates the untouched model with so many examples in its prompt.

  `people` is measured as that of runs is, `whole` on all of every target, with
  the examples in view.
  """
  folder = pathlib.Path(_RAW.value) / task / 'floor'
  folder.mkdir(parents=True, exist_ok=True)
  workdir = pathlib.Path(_WORKDIR.value) / task / 'floor'
  c = config.resolve(_task_config(task))
  people = _untouched(c)
  for shots in study.SHOTS:
    settings = completions.Settings(untouched=True, shots=shots)
    found = completions.complete(Run(workdir / f'shots{shots}'), settings, c)
    whole = {name: found[name]['people'] for name in scores.SETS}
    files.write_json(
      folder / f'shots{shots}.json',
      {'shots': shots, 'whole': whole, 'texts': _texts(found)}
      | ({} if shots else {'people': people}),
    )


def _do(task: str, arm: str, chosen: Sequence[sweep.Job]) -> None:
  """Runs points of one program in this process and writes their results."""
  folder = pathlib.Path(_RAW.value) / task
  folder.mkdir(parents=True, exist_ok=True)
  console.guard = signals.stop_after_the_round
  trained = training.train_points(
    [training.Point(r.config, r.workdir, r.command) for r in chosen]
  )
  results = {
    run.name: collect(task, arm, run, done.summary)
    for run, done in zip(chosen, trained, strict=True)
  }
  for run in chosen:
    if task in study.WRITTEN and _may_be_chosen(run, results):
      found = completions.complete(Run(run.workdir), completions.Settings(), run.config)
      results[run.name]['texts'] = _texts(found)
    files.write_json(folder / f'{run.name}.json', results[run.name])
    shutil.rmtree(run.workdir / 'checkpoints')  # a whole model, of some


def _may_be_chosen(run: sweep.Job, results: dict[str, dict]) -> bool:
  """Tells whether no rate beside this one validates better."""
  if run.fields['seed'] != study.SEEDS[0]:
    return True
  loss = validation_loss(results[run.name])
  return loss <= min(map(validation_loss, results.values()))


def _missing(task: str, arm: str) -> list[sweep.Job]:
  results = load(pathlib.Path(_RAW.value), task)
  every = runs(task, arm, results, pathlib.Path(_WORKDIR.value))
  return [run for run in every if run.name not in results]


def _command(task: str, names: str) -> list[str]:
  return [
    sys.executable, '-m', 'benchmarks.study', f'--raw={_RAW.value}',
    f'--workdir={_WORKDIR.value}', f'--tasks={task}', f'--only={names}',
  ]  # fmt: skip


def _start(commands: dict[str, list[str]]) -> None:
  logs = pathlib.Path(_WORKDIR.value) / 'logs'
  if not processes.start_all(commands, logs, parallel=1):
    console.say('Stopped; the same line goes on.')
    sys.exit(console.SAVED)


def _start_floors(task: str) -> None:
  if _floors_missing(task):
    _start({f'{task}: the untouched model': _command(task, _FLOORS)})


def _start_arm(task: str, arm: str) -> None:
  """Starts the programs that an arm lacks, until none that was not tried is left."""
  # States of full fine-tuning are whole models: one at a time.
  full = study.ARMS[arm]['method'] == 'full_finetuning'
  together = 1 if full else _TOGETHER.value
  tried = set()
  while True:
    missing = [run for run in _missing(task, arm) if run.name not in tried]
    if not missing:
      return
    groups = sweep.programs(missing, together)
    names = [','.join(run.name for run in group) for group in groups]
    _start({f'{task}: {n}': _command(task, n) for n in names})
    tried |= {run.name for run in missing}


def _floors_missing(task: str) -> bool:
  folder = pathlib.Path(_RAW.value) / task / 'floor'
  return not all((folder / f'shots{n}.json').exists() for n in study.SHOTS)


def _only(names: Sequence[str]) -> None:
  """Does what one process was started for."""
  if processes.CHILD in os.environ:
    signals.end_with_parent()
  if len(_TASKS.value) != 1:
    raise ValueError(f'--only={",".join(names)} needs one of --tasks.')
  (task,) = _TASKS.value
  if names == [_FLOORS]:
    _do_floors(task)
    return
  chosen = {
    arm: [run for run in _missing(task, arm) if run.name in names] for arm in study.ARMS
  }
  if not any(chosen.values()):
    raise ValueError(f'--only={",".join(names)}: {task} lacks no such run.')
  try:
    for arm, runs_of in chosen.items():
      if runs_of:
        _do(task, arm, runs_of)
  except training.Interrupted:
    sys.exit(console.SAVED)


def smoke() -> None:
  """Does one run and the floors of a task in this process, and drops them."""
  task, arm = study.WRITTEN[0], next(iter(study.ARMS))
  with tempfile.TemporaryDirectory() as folder:
    flags.FLAGS.raw, flags.FLAGS.workdir = f'{folder}/raw', f'{folder}/runs'
    _do_floors(task)
    run = _missing(task, arm)[0]
    _do(task, arm, [run])
    if run.name not in load(pathlib.Path(_RAW.value), task):
      raise ValueError(f'{run.name} left no result.')
  console.say(f'{task}: {run.name} has run.')


def main() -> None:
  if machine.smoke():
    return smoke()
  jax.config.update('jax_platforms', 'cpu' if not _ONLY.value else None)
  if _ONLY.value:
    _only(_ONLY.value)
    return
  for task in _TASKS.value:
    _start_floors(task)
  for number, arm in enumerate(study.ARMS, 1):
    console.say(f'\nArm {number} of {len(study.ARMS)}: {arm}')
    for task in _TASKS.value:
      _start_arm(task, arm)
  left = sum(_floors_missing(task) for task in _TASKS.value)
  left += sum(len(_missing(t, a)) for t in _TASKS.value for a in study.ARMS)
  console.say(f'{left} runs failed.' if left else 'The study is complete.')
  sys.exit(1 if left else 0)


if __name__ == '__main__':
  machine.start(main)
