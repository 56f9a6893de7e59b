"""Starts programs of launch/ without importing JAX and its like anew for each.

Importing takes two seconds of a core, and the tests start some eighty programs. So a
process imports all of it, starts nothing, not even a thread, and forks for each program:
the module then runs from its first line, with an environment and a folder of its own.
"""

import atexit
import functools
import gc
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
_MOST_SECONDS = 300
_READ_AT_START = ('JAX_', 'PYTHON')
# For XLA_FLAGS: a program that has not the eight devices of the tests.
ONE_DEVICE = re.sub(r'--\S*device_count=8', '', os.environ.get('XLA_FLAGS', ''))


def run(*words: object, **env: str) -> subprocess.CompletedProcess:
  """Runs `python -m` of some words, with more variables, and returns what it said.

  Python and JAX read their variables as they start, so programs with others of theirs
  are started as usual.
  """
  command = [str(word) for word in words]
  here = os.environ | {'PYTHONWARNINGS': 'ignore'}
  if any(x.startswith(_READ_AT_START) and env[x] != here.get(x) for x in env):
    return subprocess.run(
      [sys.executable, '-m', *command], cwd=ROOT, env=here | env,
      capture_output=True, text=True, check=False, timeout=_MOST_SECONDS,
    )  # fmt: skip
  with tempfile.TemporaryDirectory() as folder:
    said = [pathlib.Path(folder, name) for name in ('stdout', 'stderr')]
    asked = {'words': command, 'env': here | env, 'said': list(map(str, said))}
    print(json.dumps(asked), file=_server().stdin, flush=True)
    code = int(_server().stdout.readline())
    return subprocess.CompletedProcess(command, code, *[x.read_text() for x in said])


@functools.cache
def _server() -> subprocess.Popen:
  """Starts the process that forks; it ends with this one."""
  server = subprocess.Popen(
    [sys.executable, '-m', 'tests.programs'], cwd=ROOT, text=True,
    env=os.environ | {'PYTHONWARNINGS': 'ignore', 'TF_CPP_MIN_LOG_LEVEL': '2'},
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip
  atexit.register(server.communicate)
  return server


def _become(words: list[str], env: dict[str, str], said: list[str]) -> None:
  """Turns this process, just forked, into a program."""
  os.environ.clear()
  os.environ.update(env)
  for number, path in ((0, os.devnull), (1, said[0]), (2, said[1])):
    flags = os.O_RDWR | os.O_CREAT if number else os.O_RDONLY
    os.dup2(os.open(path, flags), number)
  signal.alarm(_MOST_SECONDS)
  sys.argv = words
  runpy.run_module(words[0], run_name='__main__', alter_sys=True)


def _serve() -> None:
  """Forks for each line of standard input, and prints the program's exit code."""
  import matplotlib.backends.backend_agg
  import tensorboardX
  import tensorflow_datasets

  import hetlora_jax.data.builders.synthetic
  import hetlora_jax.tools.dryrun
  import hetlora_jax.training

  del matplotlib, tensorboardX, tensorflow_datasets, hetlora_jax
  gc.freeze()  # what is shared is neither looked through nor copied
  answers = os.dup(1)  # standard output is each program's own
  while line := sys.stdin.readline():
    child = os.fork()
    if not child:
      return _become(**json.loads(line))
    _, status = os.waitpid(child, 0)
    os.write(answers, f'{os.waitstatus_to_exitcode(status)}\n'.encode())


if __name__ == '__main__':
  _serve()
