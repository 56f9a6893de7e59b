"""How a program is started: as python -m launch.train, or as hetlora-train."""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

import configs
from launch import errors

_PREFIX = 'hetlora-'  # of the console scripts in setup.py
_HELP = 1  # how absl ends after --help
_CLOSED_PIPE = 128 + 13  # SIGPIPE, as a shell reports it
_FILES = ('--config', '--sweep', '')  # flags, or none before a word of its own


def words() -> list[str]:
  """Returns the words that start this program again."""
  stem = pathlib.Path(sys.argv[0]).stem
  if stem.startswith(_PREFIX):
    return [stem]
  return ['python', '-m', f'launch.{stem}']


def _found(word: str) -> str:
  """Names our own file if a relative one is absent, as where we are installed."""
  flag, equals, value = word.rpartition('=')
  path, colon, rest = value.partition(':')
  ours = pathlib.Path(configs.__file__).parent.parent / path
  absent = path.startswith('configs/') and not pathlib.Path(path).exists()
  if flag in _FILES and absent and ours.is_file():
    return f'{flag}{equals}{ours}{colon}{rest}'
  return word


def _tell(modules: Sequence[str]) -> None:
  """Makes --help show the docstring of the first module, and the flags of all."""
  sys.modules['__main__'].__doc__ = sys.modules[modules[0]].__doc__
  by_module = flags.FLAGS.flags_by_module_dict()
  for module in modules:
    for flag in by_module.get(module, ()):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def call(main: Callable[[list[str]], None]) -> None:
  """Parses flags and calls `main`.

  Ends without a word if `| head` has enough, and in one line if standard output is
  on a full disk.
  """
  code = None
  try:
    try:
      app.run(main, flags_parser=errors.parse)
    except SystemExit as done:
      code = done.code
      raise
    finally:
      print(end='', flush=True)  # sys.stdout is None after `>&-`
  except OSError as error:
    # What is left of the output is not tried again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code not in (None, 0, _HELP):
      sys.exit(code)  # an error that was told, or a state that was saved
    if isinstance(error, BrokenPipeError):
      sys.exit(_CLOSED_PIPE)
    if '--verbose' in sys.argv:
      raise
    errors.fail(error)


def start(main: Callable[[list[str]], None], *modules: str) -> None:
  """Parses flags, a bad one being an error of one line, and calls `main`.

  Args:
    main: takes the words that are no flags, after the program's name.
    *modules: names of the program's module, and of others with flags.
  """
  _tell(modules)
  sys.argv[1:] = map(_found, sys.argv[1:])
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  call(main)
