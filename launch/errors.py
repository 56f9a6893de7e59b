"""Errors in one line, for the launchers and the benchmarks."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

BAD_INPUT = 2


def fail(message: object) -> NoReturn:
  """Prints an error of one line and exits with code 2."""
  print(f'Error: {" ".join(str(message).split())}', file=sys.stderr)
  sys.exit(BAD_INPUT)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags; a bad one is an error of one line."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    # ml_collections puts the repr of one error into another.
    text = str(e).replace('\\n', ' ').replace('\\', '').strip('"\'')
    fail(f'{text} (--print_config shows every field)')
  except OSError as error:
    fail(f'--config: {error}')
