"""The numbers of a small run, which only a changed algorithm may change."""

import json
import os
import subprocess
import sys

import pytest

from tests import make_golden

_REMEDY = (
  'Did you mean to change the algorithm? Then run `make golden` and commit '
  'the new tests/golden/tiny.json on its own, saying why.'
)


def test_small_run_logs_the_golden_numbers(tmp_path):
  # In a process without XLA's flags of the tests: with them jax 0.12 rounds
  # differently (1.4e-5), without them it does as 0.10 (8e-6).
  subprocess.run(
    [sys.executable, '-m', 'tests.make_golden', tmp_path / 'got.json'],
    cwd=make_golden.PATH.parents[2], check=True,
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
  )  # fmt: skip
  want = json.loads(make_golden.PATH.read_text())
  got = json.loads((tmp_path / 'got.json').read_text())
  assert len(got) == len(want)
  for row, golden in zip(got, want, strict=True):
    assert row == pytest.approx(golden, rel=1e-5), _REMEDY
