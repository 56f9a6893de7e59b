"""Several processes, as on several hosts: each builds its own clients' data."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from devices_test import METHODS, assert_agree, many_rounds
from experiment_test import SMALL, newest_state

from hetlora_jax import experiment, files, points, training
from hetlora_jax.run import Run

ROOT = pathlib.Path(__file__).parent.parent


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _start(command, count, **where):
  """Starts `count` processes of two devices each; command is of a number."""
  env = os.environ | {
    'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('count=8', 'count=2'),
    'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}',
    'PYTHONWARNINGS': 'ignore',
  }
  return [
    subprocess.Popen(
      [sys.executable, *command(i)], cwd=ROOT, env=env, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **where,
    )
    for i in range(count)
  ]  # fmt: skip


def _outputs(processes):
  """Waits for all; returns exit codes and what they wrote."""
  outs = [process.communicate(timeout=500)[0] for process in processes]
  return [process.returncode for process in processes], outs


def _check(folder, method):
  """Compares a run's checkpoint and rows with one process and one device."""
  one = many_rounds(method)
  alone = folder / 'alone' / method
  training.train(one, alone)
  assert_agree(newest_state(one, folder / method), newest_state(one, alone))
  rows, want = (
    files.read_rows(place / 'metrics.jsonl') for place in (folder / method, alone)
  )
  assert [r['round'] for r in rows] == [0, 1, 2, 3]
  for row, other in zip(rows, want, strict=True):
    # On several devices, only where there is an evaluation.
    unmeasured = set() if 'eval/seen/loss' in row else {'aggregation/error'}
    assert set(row) == set(other) - unmeasured
  for row, other in zip(rows, want, strict=True):
    for name in set(row) & {'train/loss', 'train/tokens', 'eval/unseen/loss'}:
      assert row[name] == pytest.approx(other[name], rel=1e-5)


# By default one method that both prunes and folds a residual, split over `model`.
FOLDING = 'fedmomentum+norm_tail'


@pytest.mark.parametrize(
  ('count', 'methods'),
  [
    (2, (FOLDING,)),
    pytest.param(2, METHODS, marks=pytest.mark.slow),
    pytest.param(4, METHODS, marks=pytest.mark.slow),
  ],
)
def test_processes_agree_with_one(count, methods, tmp_path):
  port = str(_free_port())
  codes, outs = _outputs(
    _start(
      lambda i: [
        'tests/processes.py',
        str(i),
        str(count),
        port,
        str(tmp_path),
        *methods,
      ],
      count,
    )
  )
  assert codes == [0] * count, outs[0][-2000:]
  for method in methods:
    _check(tmp_path, method)
  # One process goes on where several stopped.
  method = methods[-1]
  longer = many_rounds(method, federated__num_rounds=6)
  for place in (tmp_path, tmp_path / 'alone'):
    training.train(longer, place / method)
  assert_agree(
    newest_state(longer, tmp_path / method),
    newest_state(longer, tmp_path / 'alone' / method),
  )
  assert 'round 3/3' in outs[0] and 'round' not in outs[1]  # one speaks


def _two_in_a_long_run(workdir):
  """Starts two launchers and returns them after their second round."""
  port = _free_port()
  given = [f'--config.{k}={v}' for k, v in SMALL.items()]
  processes = _start(
    lambda i: [
      '-m', 'launch.train', '--config=configs/tiny.py', *given,
      '--config.federated.num_rounds=5000', f'--workdir={workdir}',
      '--config.checkpoint.every=5000', '--config.mesh.clients=4',
      '--config.eval.every=None', '--distributed', f'--process_id={i}',
      f'--coordinator_address=127.0.0.1:{port}', '--num_processes=2',
    ],
    2,
  )  # fmt: skip
  for line in processes[0].stdout:
    if line.startswith('round 2/'):
      break
  return processes


def test_one_processs_ctrl_c_stops_all_and_saves(tmp_path):
  processes = _two_in_a_long_run(tmp_path)
  processes[1].send_signal(signal.SIGTERM)
  codes, outs = _outputs(processes)
  assert codes == [75, 75], outs
  saved = [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert len(saved) == 1 and 2 <= int(saved[0].name) < 5000


def test_all_processes_are_told_that_a_folder_is_in_use(tmp_path):
  with Run(tmp_path).locked():
    port, given = _free_port(), [f'--config.{k}={v}' for k, v in SMALL.items()]
    processes = _start(
      lambda i: [
        '-m', 'launch.train', '--config=configs/tiny.py', *given,
        f'--workdir={tmp_path}', '--config.mesh.clients=4', '--distributed',
        f'--coordinator_address=127.0.0.1:{port}', '--num_processes=2',
        f'--process_id={i}',
      ],
      2,
    )  # fmt: skip
    codes, outs = _outputs(processes)
  assert codes == [2, 2]
  assert 'in use by process' in outs[0] and 'first process' in outs[1]


@pytest.mark.slow
def test_a_process_that_loses_another_ends_and_says_so(tmp_path):
  processes = _two_in_a_long_run(tmp_path)
  processes[1].kill()
  codes, outs = _outputs(processes)
  assert codes == [75, -signal.SIGKILL]
  assert 'Error: another process of this run failed' in outs[0]


def test_each_process_builds_its_own_clients_alone(monkeypatch):
  x = points.prepare(many_rounds('hetlora', (1, 4, 2)))
  whole = points.make_cohorts(x, 0)
  built = []
  original = experiment.make_cohort

  def spy(x, seed, i, only):
    built.append(only)
    return original(x, seed, i, only)

  monkeypatch.setattr(experiment, 'make_cohort', spy)
  part = (slice(0, 3), slice(0, 1), slice(2, 4))
  monkeypatch.setattr(points.sharding, 'own_part', lambda *_: part)
  monkeypatch.setattr(points.sharding, 'place_own', lambda own, *_: own)
  own = points.make_cohorts(x, 0)
  assert built == [slice(2, 4)] * 3
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)[:, :, 2:4]),
    own,
    whole,
  )
