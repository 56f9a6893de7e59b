"""Runs killed at random moments end as unbroken ones; `make chaos` does thirty."""

import pytest
from experiment_test import SMALL

from tests import chaos


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize(
  ('trials', 'first'),
  [
    (1, 1),  # one process, killed within a round and then while it saves
    pytest.param(5, 0, marks=pytest.mark.slow),
  ],
)
def test_killed_runs_equal_unbroken_ones(trials, first, capsys):
  small = {k.replace('.', '__'): v for k, v in SMALL.items()}
  assert chaos.main(trials=trials, seed=1, first=first, **small)
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith(f'{trials} trials')
  assert last.endswith(f'{trials} equal to the bit')
