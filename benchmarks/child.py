"""A peer in a child process, in a virtual environment of its own."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile

from absl import flags

PYTHON = flags.DEFINE_string(
  'peers_python', '.venv-bench/bin/python', 'Python with torch, peft, flwr.'
)


PEERS = flags.DEFINE_bool(
  'peers', True, 'Time the peers too; --nopeers runs only what is ours.'
)


def check() -> None:
  """Raises ValueError if there is no Python to run peers with."""
  if not pathlib.Path(PYTHON.value).exists():
    raise ValueError(
      f'--peers_python={PYTHON.value} does not exist: `make bench` makes it, '
      'or name a Python with the extra `bench`.'
    )


def python_with(package: str) -> str:
  """Returns this Python if it has a package, else that of --peers_python."""
  if importlib.util.find_spec(package):
    return sys.executable
  check()
  return PYTHON.value


class Peer:
  """A script that answers a JSON object a line by another."""

  def __init__(self, script: str, work: dict, python: str = ''):
    """Starts the script.

    Args:
      script: a file beside this one.
      work: what it is told.
      python: that runs it; that of --peers_python if it is left out.
    """
    self._folder, self._script = tempfile.TemporaryDirectory(), script
    self._python = python or PYTHON.value
    path = pathlib.Path(self._folder.name, 'workload.json')
    path.write_text(json.dumps(work))
    self._child = subprocess.Popen(
      [self._python, str(pathlib.Path(__file__).with_name(script)), str(path)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

  def __call__(self, ask: dict) -> dict:
    print(json.dumps(ask), file=self._child.stdin, flush=True)
    for line in self._child.stdout:
      if line.startswith('{"seconds"'):
        return json.loads(line)
    raise ValueError(
      f'{self._script} ended under {self._python}, for the reason above: has '
      'it the extra `bench`?'
    )

  def close(self):
    self._child.stdin.close()
    self._child.wait()
    self._folder.cleanup()
