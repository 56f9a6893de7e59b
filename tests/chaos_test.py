"""Five trials of chaos on a smaller model; `make chaos` runs thirty on `tiny`."""

import pytest
from experiment_test import SMALL

from tests import chaos


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_killed_runs_equal_unbroken_ones(capsys):
  small = {k.replace('.', '__'): v for k, v in SMALL.items()}
  assert chaos.main(trials=5, seed=1, **small)
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith('5 trials') and last.endswith('5 equal to the bit')
