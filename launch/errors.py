"""Errors in one line, for the launchers and the benchmarks."""

import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import NoReturn

from absl import flags

from hetlora_jax import files

BAD_INPUT = 2
# What absl and ml_collections raise about a flag.
_OF_FLAGS = (flags.Error, AttributeError, KeyError, TypeError, ValueError)
MOST_CHARACTERS = 20_000  # of a message; it may name every field


def fail(message: object, names: Mapping[str, str] | None = None) -> NoReturn:
  """Prints an error of one line and exits with code 2.

  Args:
    message: a text or an exception.
    names: what a program calls some of the fields that the message may name.

  Raises:
    BrokenPipeError: the error given, which `program.call` knows how to end.
  """
  if isinstance(message, BrokenPipeError):
    raise message
  text = str(message)
  for field, name in (names or {}).items():
    text = text.replace(field, name)
  print(f'Error: {files.short(text, MOST_CHARACTERS)}', file=sys.stderr)
  sys.exit(BAD_INPUT)


def _given(argv: Sequence[str]) -> str:
  """Returns --config=FILE as it was given."""
  return next((w for w in argv if w.startswith('--config=')), '--config')


def _is_from(word: str, error: Exception) -> bool:
  """Tells whether an error arose in, or in reading, the file of --config=FILE."""
  frames = traceback.extract_tb(error.__traceback__)
  path = os.path.abspath(word.removeprefix('--config='))
  inside = path in {os.path.abspath(frame.filename) for frame in frames}
  return inside or not isinstance(error, _OF_FLAGS)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags; a bad one is an error of one line."""
  try:
    return flags.FLAGS(argv)
  except BrokenPipeError:
    raise  # of --help | head
  except OSError as error:
    fail(f'--config: {error}')
  except Exception as error:  # a --config file may raise anything
    text = re.sub(r' Other fields present: ".*?}"', '', str(error))
    if _is_from(_given(argv), error):
      text = f'{_given(argv)} cannot be loaded: {type(error).__name__}: {text}'
    else:  # ml_collections puts the repr of one error into another
      text = text.replace('\\n', ' ').replace('\\', '').strip('"\'')
    known = '--print_config shows every field'
    remedy = known if 'print_config' in flags.FLAGS else '--help shows all'
    fail(f'{files.short(text, 350)} ({remedy})')
