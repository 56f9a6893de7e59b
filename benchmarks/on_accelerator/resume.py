"""Runs that are cut in two, against unbroken ones: equal to the bit or not.

Each stretch is a `launch.train` of its own, as after a preemption. It compiles anew,
so what a compiler chooses by measuring is chosen again, unless it is told not to
measure. Runs share the device and go on at the same time.
"""

import concurrent.futures
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import machine
from hetlora_jax import files

DETERMINISTIC = '--xla_gpu_deterministic_ops=true'
_SETTINGS = {'as it is': '', 'deterministic': DETERMINISTIC}  # flags of XLA
_RUNS = (
  ('hetlora', 'as it is'),
  ('hetlora', 'deterministic'),
  ('full_finetuning', 'deterministic'),
)
_ROUNDS = 4
_FIELDS = (
  'federated.clients_per_round=4', 'federated.clients_at_once=2',
  'federated.local_steps=2', 'federated.r_max=8',
  'server_optimizer.name=adam', 'server_optimizer.learning_rate=0.01',
  'model.random.num_layers=1', 'eval.num_people=2', 'eval.every=None',
  'checkpoint.every=2',
)  # fmt: skip
_STRETCHES = {'once': (_ROUNDS,), 'halves': (_ROUNDS // 2, _ROUNDS)}


def _train(folder: pathlib.Path, method: str, setting: str) -> None:
  """Runs a method unbroken, and in two halves, into folders of that name."""
  env = machine.child_env(_SETTINGS[setting])
  for run, stops in _STRETCHES.items():
    for rounds in stops:
      fields = (*_FIELDS, f'method={method}', f'federated.num_rounds={rounds}')
      subprocess.run(
        [
          sys.executable, '-m', 'launch.train', '--config=configs/tiny.py',
          f'--workdir={folder / run}', *[f'--config.{x}' for x in fields],
        ],
        env=env, check=True, stdout=subprocess.DEVNULL, cwd=machine.ROOT,
      )  # fmt: skip


def _ends(workdir: pathlib.Path) -> tuple[dict, list[float]]:
  """Returns the sums of all bits of a run's last state, and its losses."""
  about = workdir / 'checkpoints' / str(_ROUNDS) / 'about' / 'metadata'
  rows = files.read_rows(workdir / 'metrics.jsonl')
  losses = [row['train/loss'] for row in rows if 'train/loss' in row]
  return machine.read(about)['sums'], losses


def measure(keep) -> None:
  """Compares unbroken and halved runs, of several methods and settings."""
  runs = _RUNS[:1] if machine.smoke() else _RUNS
  with (
    tempfile.TemporaryDirectory() as name,
    concurrent.futures.ThreadPoolExecutor(len(runs)) as pool,
  ):
    folders = [pathlib.Path(name, str(i)) for i in range(len(runs))]
    list(pool.map(_train, folders, *zip(*runs, strict=True)))
    rows = []
    for (method, setting), folder in zip(runs, folders, strict=True):
      (bits, losses), (other, after) = (_ends(folder / x) for x in _STRETCHES)
      apart = max(abs(a / b - 1) for a, b in zip(losses, after, strict=True))
      rows.append({
        'method': method, 'setting': setting, 'equal': bits == other,
        'losses_apart': apart,
      })  # fmt: skip
  keep({'runs': rows})


def report(result: dict) -> str:
  """Tells which runs resume to the bit."""
  rows = [
    [f'`{x["method"]}`', x['setting'], 'yes' if x['equal'] else 'NO',
     f'{x["losses_apart"]:.0e}']
    for x in result['runs']
  ]  # fmt: skip
  return machine.table(
    'stopped after two rounds of four, and resumed | compiled | equal to the '
    'bit | losses apart', rows
  )  # fmt: skip
