"""Writes golden/tiny.json, or FILE: python -m tests.make_golden [FILE]; `make golden`."""

import json
import pathlib
import sys
import tempfile

from hetlora_jax import config, rows, training
from tests import experiment_test

PATH = pathlib.Path(__file__).parent / 'golden' / 'tiny.json'


def golden_config() -> config.Config:
  """Returns a small run; SGD, since Adam turns rounding into signs."""
  return experiment_test.small_config(
    client_optimizer__name='sgd', client_optimizer__learning_rate=0.5
  )


def golden_rows() -> list[rows.Row]:
  """Returns what a run must always log, times left out."""
  with tempfile.TemporaryDirectory() as workdir:
    training.train(golden_config(), pathlib.Path(workdir))
    return [_flat(row) for row in experiment_test.timeless(pathlib.Path(workdir))]


def _flat(row: rows.Row) -> rows.Row:
  """Gives every entry of a list a name of its own."""
  out = {}
  for name, value in row.items():
    values = value if isinstance(value, list) else [value]
    out |= {f'{name}/{i}' if i else name: v for i, v in enumerate(values)}
  return out


if __name__ == '__main__':
  out = pathlib.Path(sys.argv[1]) if sys.argv[1:] else PATH
  out.write_text(json.dumps(golden_rows(), indent=1) + '\n')
  print(f'Wrote {out}')
