"""A 3 x 3 x 2 grid of `tiny`: one program, against a run a point.

python -m benchmarks.grid [--devices=2] [--fields=federated.num_rounds=9,...]

First the 18 runs one after another, each `launch.train` in a process of its
own; then `launch.sweep` with one program, its points spread over fake devices, one
a core. Both start without compiled programs and keep theirs. Prints both times,
their ratio, and the largest relative difference between the losses of a point and
of its own run; ranks are compared too.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import flags

from benchmarks import machine
from configs import tiny
from hetlora_jax import config, metrics, sweep

_DEVICES = flags.DEFINE_integer('devices', os.cpu_count(), 'Of the grid.')
_CONFIG = flags.DEFINE_list(
  'fields', [], 'Fields of both, e.g. federated.num_rounds=3.'
)
_OUT = flags.DEFINE_string('out', 'benchmarks/results/grid.json', 'Result.')
_GRID = (
  'federated.gamma=[0.85,0.95,0.99] x federated.tail_penalty=[0.0,0.1,1.0] x '
  'seed=[0,1]'
)


def _timed(
  folder: pathlib.Path, program: str, *words: str, **env: str
) -> float:
  """Runs a launcher with programs of its own; returns its seconds."""
  env = (
    os.environ | {'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs')} | env
  )
  fields = [f'--config.{field}' for field in _CONFIG.value]
  start = time.perf_counter()
  subprocess.run(
    [
      sys.executable, '-m', f'launch.{program}', '--config=configs/tiny.py',
      *fields, *words,
    ],
    env=env, check=True, stdout=subprocess.DEVNULL,
  )  # fmt: skip
  return time.perf_counter() - start


def _difference(
  alone: pathlib.Path, together: pathlib.Path
) -> tuple[float, bool]:
  """Compares two runs: losses, and whether all ranks are equal."""
  rows = [metrics.read_rows(x / 'metrics.jsonl') for x in (alone, together)]
  names = ('train/loss', 'eval/seen/loss', 'eval/unseen/loss')
  gaps = [
    abs(a[name] - b[name]) / abs(a[name])
    for a, b in zip(*rows, strict=True)
    for name in names
    if name in a
  ]
  same = all(
    a.get('rank/histogram') == b.get('rank/histogram')
    for a, b in zip(*rows, strict=True)
  )
  return max(gaps), same


def main() -> None:
  points = sweep.parse_grid(_GRID, config.resolve(tiny.get_config()))
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    alone, together = folder / 'alone', folder / 'together'
    each = [
      _timed(
        alone, 'train', f'--workdir={alone / sweep.name_of(point)}',
        *[f'--config.{k}={v}' for k, v in point.items()],
      )
      for point in points
    ]  # fmt: skip
    print(f'{len(each)} runs: {sum(each):.0f} s, the first {each[0]:.0f} s, '
          f'then {np.median(each[1:]):.0f} s each')  # fmt: skip
    whole = _timed(
      together, 'sweep', f'--grid={_GRID}', f'--workdir={together}',
      f'--config.mesh.sweep={_DEVICES.value}',
      JAX_NUM_CPU_DEVICES=str(_DEVICES.value),
    )  # fmt: skip
    compared = [
      _difference(alone / sweep.name_of(p), together / sweep.name_of(p))
      for p in points
    ]
    found = json.loads((together / 'sweep.json').read_text())
  gap, same = max(g for g, _ in compared), all(s for _, s in compared)
  print(
    f'one program of {found[0]["points_together"]} points: {whole:.0f} s, '
    f'{sum(each) / whole:.2f} times as fast; losses apart by {gap:.1e} at most, '
    f'ranks {"equal" if same else "NOT equal"}'
  )
  machine.write(
    _OUT.value,
    {
      'machine': machine.describe(), 'fields': _CONFIG.value,
      'seconds_each': each, 'seconds_together': whole,
      'ratio': sum(each) / whole, 'points_together': found[0]['points_together'],
      'largest_relative_difference': gap, 'ranks_equal': same,
    },
  )  # fmt: skip


if __name__ == '__main__':
  machine.run(main)
