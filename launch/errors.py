"""Errors in one line, for the launchers and the benchmarks."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from hetlora_jax import bounds

BAD_INPUT = 2
MOST_CHARACTERS = 2000  # of a message; it may quote what somebody gave us


def fail(message: object) -> NoReturn:
  """Prints an error of one line and exits with code 2."""
  print(f'Error: {bounds.short(message, MOST_CHARACTERS)}', file=sys.stderr)
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
  except Exception as error:  # whatever a file of Python may raise
    given = [word for word in argv if word.startswith('--config=')]
    fail(
      f'{given[0] if given else "--config"} cannot be loaded: '
      f'{type(error).__name__}: {bounds.short(error)}'
    )
