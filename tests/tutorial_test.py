"""The tutorial runs and does what it says."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def _run(folder: pathlib.Path) -> str:
  done = subprocess.run(
    [sys.executable, 'docs/tutorial.py', str(folder)],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': '.', 'HETLORA_CACHE': str(folder)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert not done.returncode, done.stderr
  return done.stdout


def test_tutorial(tmp_path):
  said = _run(tmp_path)
  before = float(re.findall(r'bytes (?:.*\n)+?.*: seen ([\d.]+)', said)[0])
  own, *votes = map(float, re.findall(r'(?:own model|vote): ([\d.]+)', said))
  assert own < before / 5
  assert len(votes) == 2 and votes[0] != votes[1]
  assert all(perplexity < before / 5 for perplexity in votes)
  assert 'ranks of the first point' in said
