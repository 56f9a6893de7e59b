"""A 3 x 3 x 2 grid of `tiny`: one program, against a run a point.

python -m benchmarks.grid [--fake_devices=1,2] [--fields=federated.num_rounds=9]

First the 18 runs one after another, each `launch.train` in a process of its
own; then `launch.sweep` with one program, on one device and on one a core. All start
without compiled programs and keep theirs. Told are the times, their ratio, and the
largest relative difference between the losses of a point and of its own run: the
one that was timed, on one device, and (of every sixth point) one on the devices of
the grid; ranks are compared too.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import flags

from benchmarks import machine
from configs import tiny
from hetlora_jax import config, files
from hetlora_jax.tools import sweep

_DEVICES = flags.DEFINE_list(
  'fake_devices', ['1', str(os.cpu_count())], 'Of the grid, in turn.'
)
_FIELDS = flags.DEFINE_list(
  'fields', [], 'Fields of both, e.g. federated.num_rounds=3.'
)
_SMOKE_GRID = 'federated.gamma=[0.85]'
_GRID = (
  'federated.gamma=[0.85,0.95,0.99] x federated.tail_penalty=[0.0,0.1,1.0] x seed=[0,1]'
)
_EVERY = 6  # points between those that also run alone on the grid's devices


def _timed(folder: pathlib.Path, program: str, *words: str, **env: str) -> float:
  """Runs a launcher with programs of its own; returns its seconds."""
  if not machine.smoke():
    env['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'programs')
  fields = [f'--config.{field}' for field in _FIELDS.value]
  if machine.smoke():
    smoke = machine.SMOKE_FIELDS.items()
    fields = [f'--config.{name}={value}' for name, value in smoke]
  start = time.perf_counter()
  subprocess.run(
    [
      sys.executable, '-m', f'launch.{program}', '--config=configs/tiny.py',
      *fields, *words,
    ],
    env=os.environ | env, check=True, stdout=subprocess.DEVNULL,
  )  # fmt: skip
  return time.perf_counter() - start


def _difference(alone: pathlib.Path, together: pathlib.Path) -> tuple[float, bool]:
  """Compares two runs: losses, and whether all ranks are equal."""
  rows = [files.read_rows(x / 'metrics.jsonl') for x in (alone, together)]
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


def _grid() -> str:
  return _SMOKE_GRID if machine.smoke() else _GRID


def _together(folder: pathlib.Path, alone: pathlib.Path, devices: str, points):
  """Runs the grid as one program and compares each point with its own run."""
  seconds = _timed(
    folder, 'sweep', f'--grid={_grid()}', f'--workdir={folder}',
    f'--config.mesh.sweep={devices}', JAX_NUM_CPU_DEVICES=devices,
  )  # fmt: skip
  found = json.loads((folder / 'sweep.json').read_text())
  grid = {
    'devices': int(devices), 'seconds': seconds,
    'points_together': found[0]['points_together'],
    'from_one_device': _compare(alone, folder, points),
  }  # fmt: skip
  if grid['devices'] > 1:
    here = folder / 'alone'
    for point in points[::_EVERY]:
      _alone(here, point, f'--config.mesh.sweep={devices}', devices=devices)
    grid['from_these_devices'] = _compare(here, folder, points[::_EVERY])
  return grid


def _compare(alone: pathlib.Path, together: pathlib.Path, points) -> dict:
  """Compares points of a grid with their own runs."""
  names = [sweep.name_of(point) for point in points]
  gaps, same = zip(
    *[_difference(alone / name, together / name) for name in names], strict=True
  )
  return {'largest_relative_difference': max(gaps), 'ranks_equal': all(same)}


def _alone(folder: pathlib.Path, point, *words: str, devices='1') -> float:
  """Runs one point by itself; returns its seconds."""
  return _timed(
    folder, 'train', f'--workdir={folder / sweep.name_of(point)}', *words,
    *[f'--config.{k}={v}' for k, v in point.items()], JAX_NUM_CPU_DEVICES=devices,
  )  # fmt: skip


def measure() -> dict:
  """Runs all points alone, and the grid on so many devices."""
  points = sweep.parse_grid(_grid(), config.resolve(tiny.get_config()))
  with tempfile.TemporaryDirectory() as name:
    alone = pathlib.Path(name, 'alone')
    each = [_alone(alone, point) for point in points]
    print(f'{len(each)} runs: {sum(each):.0f} s', flush=True)
    grids = []
    for devices in _DEVICES.value[: 1 if machine.smoke() else None]:
      folder = pathlib.Path(name, f'together_{devices}')
      grids.append(_together(folder, alone, devices, points))
      print(f'{devices} devices: {grids[-1]["seconds"]:.0f} s', flush=True)
  return {'fields': _FIELDS.value, 'seconds_each': each, 'grids': grids}


def _say(compared: dict) -> str:
  apart = compared['largest_relative_difference']
  ranks = '' if compared['ranks_equal'] else ', some ranks too'
  return f'losses {apart:.1e} at most{ranks}' if apart else 'not at all'


def report(result: dict) -> str:
  """Tells the seconds, and how far points are from their own runs."""
  whole = sum(result['seconds_each'])
  count = len(result['seconds_each'])
  rows = [[f'{count} runs one after another', f'{whole:.0f}', '1', '', '']]
  for grid in result['grids']:
    devices = grid['devices']
    name = 'one device' if devices == 1 else f'`mesh.sweep={devices}`'
    rows.append([
      f'one program, {name}', f'{grid["seconds"]:.0f}',
      f'{whole / grid["seconds"]:.1f}', _say(grid['from_one_device']),
      _say(grid.get('from_these_devices', grid['from_one_device'])),
    ])  # fmt: skip
  head = (
    'how | seconds | times as fast | apart from its own run on one device | on '
    'the same devices'
  )
  return f'{machine.table(head, rows)}\n\n{machine.told(result["machine"])}.'


if __name__ == '__main__':
  machine.run('grid', measure, report)
