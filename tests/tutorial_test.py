"""The tutorial and the notebooks run and do what they say."""

import os
import pathlib
import re
import runpy
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest

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


@pytest.fixture
def notebook(monkeypatch, tmp_path):
  """Runs a script of docs/notebooks, and returns its names and how much it drew."""
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path))
  plt.switch_backend('agg')

  def run(name):
    shown = []
    monkeypatch.setattr(plt, 'show', lambda: shown.append(plt.gcf()))
    names = runpy.run_path(str(ROOT / f'docs/notebooks/{name}.py'))
    plt.close('all')
    return names, len(shown)

  return run


def test_a_round_taken_apart_is_the_round(notebook):
  names, drawn = notebook('first_round')  # which compares both
  assert drawn == 6
  assert (names['pruned_C'] < names['rank_C']).any()
  assert names['metrics']['rank'][:, 0].tolist() == names['pruned_C'].tolist()


@pytest.mark.slow  # a minute; `make docs` executes it too
def test_three_methods_are_compared(notebook):
  names, drawn = notebook('compare_methods')
  assert drawn == 1 and len(names['table']) == 6
  assert (names['table']['unseen'] < names['table']['unseen, untrained'] - 1).all()
