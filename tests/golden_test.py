"""The numbers of a small run, which only a changed algorithm may change."""

import json

import pytest

from tests import make_golden

_REMEDY = (
  'Did you mean to change the algorithm? Then run `make golden` and commit '
  'the new tests/golden/tiny.json on its own, saying why.'
)


def test_small_run_logs_the_golden_numbers():
  want = json.loads(make_golden.PATH.read_text())
  got = make_golden.golden_rows()
  assert len(got) == len(want)
  for row, golden in zip(got, want, strict=True):
    # Releases of jax round differently: 1e-5 in 0.10, 1.4e-5 with 0.12.
    assert row == pytest.approx(golden, rel=5e-5), _REMEDY
