"""Errors in one line, for the launchers and the benchmarks."""

import contextlib
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from absl import flags

from hetlora_jax import config, fields, files
from hetlora_jax.run import Run

VERBOSE = flags.DEFINE_bool(
  'verbose', False, "Show libraries' messages and the tracebacks of errors."
)
BAD_INPUT = 2
# What absl and ml_collections raise about a flag.
_OF_FLAGS = (flags.Error, AttributeError, KeyError, TypeError, ValueError)
_OF_RUN = pathlib.Path(__file__).with_name('of_run.py')
MOST_CHARACTERS = 20_000  # of a message; it may name every field


def fail(message: object) -> NoReturn:
  """Prints an error, a text or an exception, in one line and exits with code 2.

  Raises:
    BrokenPipeError: the error given, which `program.call` knows how to end.
  """
  if isinstance(message, BrokenPipeError):
    raise message
  print(f'Error: {files.short(message, MOST_CHARACTERS)}', file=sys.stderr)
  sys.exit(BAD_INPUT)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
  """Ends the program in one line where input is bad, and with --verbose raises."""
  try:
    yield
  except (ImportError, MemoryError, OSError, ValueError) as error:
    if VERBOSE.value:
      raise
    if isinstance(error, MemoryError):
      fail(
        f'there is not enough memory ({error}): take fewer clients at once, '
        'a smaller model, or look whether its files are damaged.'
      )
    fail(error)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags; a bad one, or a bad --config file, is an error of one line."""
  try:
    return flags.FLAGS(_with_config_of_run(argv))
  except BrokenPipeError:
    raise  # of --help | head
  except OSError as error:
    fail(f'--config: {error}')
  except Exception as error:  # a --config file may raise anything
    known = '--print_config shows every field'
    remedy = known if 'print_config' in flags.FLAGS else '--help shows all'
    fail(f'{files.short(_told(argv, error), 350)} ({remedy})')


def _with_config_of_run(argv: Sequence[str]) -> list[str]:
  """Adds the configuration of the run in --workdir, if there is one and no other."""
  if 'config' not in flags.FLAGS or 'workdir' not in flags.FLAGS:
    return list(argv)
  words = flags.FLAGS.read_flags_from_files(argv)
  given = [word.partition('=') for word in words]
  if any(name in ('--config', '-config') for name, *_ in given):
    return words
  for i, (name, _, value) in enumerate(given):
    if name == '--workdir':
      folder = pathlib.Path(value or [*words, ''][i + 1]).expanduser()
      if (folder / 'config.json').is_file():
        _ = Run(folder).unchecked  # ml_collections would tell a traceback
        return [words[0], f'--config={_OF_RUN}:{folder}', *words[1:]]  # flags follow
  return words


def _told(argv: Sequence[str], error: Exception) -> str:
  """Renders what was raised while flags were parsed."""
  text = re.sub(r' Other fields present: ".*?}"', '', str(error))
  given = next((word for word in argv if word.startswith('--config=')), '--config')
  if _is_from(given, error):
    return f'{given} cannot be loaded: {type(error).__name__}: {text}'
  for name in unknown_fields(argv):
    return f'config.{name} does not exist{fields.remedy(name, config.FIELDS)}'
  if isinstance(error, flags.UnrecognizedFlagError):
    name = error.flagname
    if name.startswith('config.'):
      return '--config is missing, whose field that is, or the --workdir of a run'
    meant = fields.meant(name, config.FIELDS) if 'config' in flags.FLAGS else None
    if meant and 'Did you mean' not in text:
      return f'--{name} does not exist; did you mean --config.{meant}?'
  # ml_collections puts the repr of one error into another.
  text = text.replace('\\n', ' ').replace('\\', '')
  quoted = len(text) > 1 and text[0] == text[-1] and text[0] in '"\''
  return text[1:-1] if quoted else text


def unknown_fields(argv: Sequence[str]) -> list[str]:
  """Returns the fields that flags name and that do not exist."""
  named = [re.match(r'--config\.([^=]+)', word) for word in argv]
  return [m[1] for m in named if m and m[1] not in config.FIELDS]


def _is_from(word: str, error: Exception) -> bool:
  """Tells whether an error arose in, or in reading, the file of --config=FILE."""
  frames = traceback.extract_tb(error.__traceback__)
  path = os.path.abspath(word.removeprefix('--config='))
  inside = path in {os.path.abspath(frame.filename) for frame in frames}
  return inside or not isinstance(error, _OF_FLAGS)
