"""Runs killed at random moments end as unbroken ones; `make chaos` does thirty."""

import pytest
from experiment_test import SMALL

from tests import chaos


@pytest.mark.slow  # by default one run is, in experiment_test.py
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_killed_runs_equal_unbroken_ones(capsys):
  small = {k.replace('.', '__'): v for k, v in SMALL.items()}
  assert chaos.main(trials=5, seed=1, **small)
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith('5 trials')
  assert last.endswith('5 equal to the bit')
