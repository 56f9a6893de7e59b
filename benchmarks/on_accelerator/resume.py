"""Runs that are cut in two, against unbroken ones: equal to the bit or not.

Each stretch is a `launch.train` of its own, as after a preemption: it compiles
anew, so whatever a compiler chooses by measuring is chosen again. All runs share
the device and go on at the same time.
"""

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import machine
from hetlora_jax import metrics

_METHODS = ('hetlora', 'flexlora', 'full_finetuning')
_ROUNDS = 4
_FIELDS = (
  'federated.clients_per_round=4', 'federated.clients_at_once=2',
  'federated.local_steps=2', 'federated.r_max=8',
  'server_optimizer.name=adam', 'server_optimizer.learning_rate=0.01',
  'model.random.num_layers=1', 'eval.num_people=2', 'eval.every=0',
  'checkpoint.every=2',
)  # fmt: skip
_RUNS = {'once': (4,), 'again': (4,), 'halves': (2, 4)}  # rounds, then more


def _train(workdir: pathlib.Path, method: str, stops: tuple[int, ...]) -> None:
  """Runs a method until it has done so many rounds, once for each of them."""
  env = os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}
  for rounds in stops:
    fields = (*_FIELDS, f'method={method}', f'federated.num_rounds={rounds}')
    subprocess.run(
      [
        sys.executable, '-m', 'launch.train', '--config=configs/tiny.py',
        f'--workdir={workdir}', *[f'--config.{field}' for field in fields],
      ],
      env=env, check=True, stdout=subprocess.DEVNULL, cwd=machine.ROOT,
    )  # fmt: skip


def _ends(workdir: pathlib.Path) -> tuple[dict, list[float]]:
  """Returns the sums of all bits of a run's last state, and its losses."""
  about = workdir / 'checkpoints' / str(_ROUNDS) / 'about' / 'metadata'
  rows = metrics.read_rows(workdir / 'metrics.jsonl')
  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  return machine.read(about)['sums'], losses


def measure(keep) -> None:
  """Runs methods once, once more, and in two halves."""
  methods = _METHODS[:1] if machine.SMOKE.value else _METHODS
  result: dict = {}
  with (
    tempfile.TemporaryDirectory() as name,
    concurrent.futures.ThreadPoolExecutor(9) as pool,
  ):
    folder = pathlib.Path(name)
    running = [
      pool.submit(_train, folder / method / run, method, stops)
      for method in methods
      for run, stops in _RUNS.items()
    ]
    for run in running:
      run.result()
    for method in methods:
      ends = {run: _ends(folder / method / run) for run in _RUNS}
      result[method] = {
        'repeats': ends['again'] == ends['once'],
        'resumes': ends['halves'] == ends['once'],
        'losses': {run: losses for run, (_, losses) in ends.items()},
      }
  keep(result)


def report(result: dict) -> str:
  """Tells which methods repeat and resume to the bit."""
  word = {True: 'equal to the bit', False: 'NOT equal'}
  rows = [
    [f'`{method}`', word[found['repeats']], word[found['resumes']]]
    for method, found in result.items()
  ]
  return machine.table(
    'method | the same run again | stopped after two rounds, and resumed', rows
  )
