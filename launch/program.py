"""How a program is started: as python -m launch.train, or as hetlora-train."""

import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

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


def start(main: Callable[..., None], *modules: str, takes_words: bool = False) -> None:
  """Parses flags and calls `main`; whatever is bad ends in one line.

  Args:
    main: what to do.
    *modules: names of the program's module, and of others with flags.
    takes_words: whether `main` takes the words that are no flags.
  """
  _describe((*modules, errors.__name__))
  sys.argv[1:] = map(_found, sys.argv[1:])
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  call(checked(main, takes_words))


def checked(
  main: Callable[..., None], takes_words: bool = False
) -> Callable[[list[str]], None]:
  """Makes a function of `sys.argv` without its flags, whose errors are one line."""

  def run(argv: list[str]) -> None:
    # Libraries log the tracebacks of what they also raise.
    logging.set_verbosity(logging.INFO if errors.VERBOSE.value else logging.FATAL)
    with errors.in_one_line():
      if argv[1:] and not takes_words:
        errors.fail(f'unexpected argument {argv[1]!r}: flags start with --')
      main(*argv[1:])

  return run


def call(main: Callable[[list[str]], None]) -> None:
  """Parses flags, calls `main` and exits.

  Ends without a word if `| head` has enough, and in one line if standard output is
  on a full disk.
  """
  code = None
  try:
    try:
      app.run(main, flags_parser=errors.parse)
    except SystemExit as done:
      code = done.code
    print(end='', flush=True)  # sys.stdout is None after `>&-`
  except OSError as error:
    # What is left of the output is not tried again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    told = code not in (None, 0, _HELP)  # an error, or that a state was saved
    if not told and isinstance(error, BrokenPipeError):
      code = _CLOSED_PIPE
    elif not told:
      errors.fail(error)
  sys.exit(code)


def _found(word: str) -> str:
  """Names our own file if a relative one is absent, as where we are installed."""
  flag, equals, value = word.rpartition('=')
  path, colon, rest = value.partition(':')
  ours = pathlib.Path(configs.__file__).parent.parent / path
  absent = path.startswith('configs/') and not pathlib.Path(path).exists()
  if flag in _FILES and absent and ours.is_file():
    return f'{flag}{equals}{ours}{colon}{rest}'
  return word


def _describe(modules: Sequence[str]) -> None:
  """Makes --help show the docstring of the first module, and the flags of all."""
  sys.modules['__main__'].__doc__ = sys.modules[modules[0]].__doc__
  by_module = flags.FLAGS.flags_by_module_dict()
  for module in modules:
    for flag in by_module.get(module, ()):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
