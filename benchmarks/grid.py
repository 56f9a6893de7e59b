"""A 3 x 3 x 2 grid of `tiny`: one program, against a run a point.

python -m benchmarks.grid [--devices=1,2] [--fields=federated.num_rounds=9,...]

First the 18 runs one after another, each `launch.train` in a process of its
own; then `launch.sweep` with one program, on one device and on one a core. All start
without compiled programs and keep theirs. Prints the times, their ratio, and the
largest relative difference between the losses of a point and of its own run; ranks
are compared too.
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

_DEVICES = flags.DEFINE_list(
  'devices', ['1', str(os.cpu_count())], 'Fake devices of the grid, in turn.'
)
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


def _together(folder: pathlib.Path, alone: pathlib.Path, devices: str, points):
  """Runs the grid as one program and compares each point with its own run."""
  seconds = _timed(
    folder, 'sweep', f'--grid={_GRID}', f'--workdir={folder}',
    f'--config.mesh.sweep={devices}', JAX_NUM_CPU_DEVICES=devices,
  )  # fmt: skip
  names = [sweep.name_of(point) for point in points]
  compared = [_difference(alone / name, folder / name) for name in names]
  found = json.loads((folder / 'sweep.json').read_text())
  return {
    'devices': int(devices), 'seconds': seconds,
    'points_together': found[0]['points_together'],
    'largest_relative_difference': max(gap for gap, _ in compared),
    'ranks_equal': all(same for _, same in compared),
  }  # fmt: skip


def main() -> None:
  points = sweep.parse_grid(_GRID, config.resolve(tiny.get_config()))
  with tempfile.TemporaryDirectory() as name:
    alone = pathlib.Path(name, 'alone')
    each = [
      _timed(
        alone, 'train', f'--workdir={alone / sweep.name_of(point)}',
        *[f'--config.{k}={v}' for k, v in point.items()],
      )
      for point in points
    ]  # fmt: skip
    print(f'{len(each)} runs: {sum(each):.0f} s, the first {each[0]:.0f} s, '
          f'then {np.median(each[1:]):.0f} s each', flush=True)  # fmt: skip
    grids = []
    for devices in _DEVICES.value:
      folder = pathlib.Path(name, f'together_{devices}')
      grid = _together(folder, alone, devices, points)
      grids.append(grid)
      print(
        f'one program of {grid["points_together"]} points on {devices} '
        f'device(s): {grid["seconds"]:.0f} s, '
        f'{sum(each) / grid["seconds"]:.2f} times as fast; losses apart by '
        f'{grid["largest_relative_difference"]:.1e} at most, ranks '
        f'{"equal" if grid["ranks_equal"] else "NOT equal"}',
        flush=True,
      )
  machine.write(
    _OUT.value,
    {
      'machine': machine.describe(), 'fields': _CONFIG.value,
      'seconds_each': each, 'grids': grids,
    },
  )  # fmt: skip


if __name__ == '__main__':
  machine.run(main)
