"""What the benchmarks share: flags, running, timing, where it was measured.

A benchmark is two functions: `measure` returns its result as a dictionary, and
`report` tells such a result in Markdown, on the terminal and in the pages
(benchmarks/figures.py). With --smoke it runs in seconds at sizes that mean
nothing, so that a test can see that it runs.
"""

import datetime
import functools
import json
import os
import pathlib
import platform
import resource
import subprocess
import time
import warnings
from collections.abc import Callable

import jax
import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from configs import tiny
from launch import errors, program

ROOT = pathlib.Path(__file__).parent.parent
_SMOKE = flags.DEFINE_bool(
  'smoke', False, 'Tiny sizes, in seconds: shows that it runs, no more.'
)
RESULT = flags.DEFINE_string(
  'result', None,
  'JSON file of the result; benchmarks/results/NAME.json, with --smoke none.',
)  # fmt: skip
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs of each.', 1)
_COMMIT = flags.DEFINE_string(
  'commit', None, 'What is measured, where there is no git to say so.'
)
# A round of next to nothing, without any download.
SMOKE_FIELDS = {
  'federated.num_rounds': 2,
  'federated.clients_per_round': 2,
  'federated.clients_at_once': 2,
  'federated.local_steps': 2,
  'federated.local_batch': 2,
  'federated.r_max': 4,
  'lora.targets': ('q', 'v'),
  'model.random.num_layers': 1,
  'model.random.width': 32,
  'model.random.mlp_width': 48,
  'eval.num_people': 2,
  'eval.every': None,
}


def smoke() -> bool:
  """Tells whether this is a smoke; it is none where flags are not parsed."""
  return flags.FLAGS.is_parsed() and _SMOKE.value


def repeats() -> int:
  """Returns how often to time, once after what warms up if it is a smoke."""
  return 1 if smoke() else _REPEATS.value


@functools.cache
def define_config():
  """Defines --config, the main job by default; a bad field ends in one line.

  Fields given on the command line are set already here.
  """
  try:
    with warnings.catch_warnings():
      # ml_collections loads the default in a way that Python 3.12 has dropped.
      warnings.simplefilter('ignore', DeprecationWarning)
      return config_flags.DEFINE_config_file(
        'config', 'configs/chitchat_gemma3.py',
        'Experiment whose round is timed.',
      )  # fmt: skip
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    errors.fail(f'--config: {error}')


def config() -> ml_collections.ConfigDict:
  """Returns a copy of the experiment of --config, or with --smoke a tiny one."""
  return smoke_config() if smoke() else define_config().value.copy_and_resolve_references()  # fmt: skip


def smoke_config() -> ml_collections.ConfigDict:
  raw = tiny.get_config()
  raw.update_from_flattened_dict(SMOKE_FIELDS)
  return raw


def describe() -> dict[str, str]:
  """Returns processor, cores, device, versions, date and commit."""
  return {
    'processor': _processor(),
    'cores': str(os.cpu_count()),
    'device': jax.devices()[0].device_kind,
    'python': platform.python_version(),
    'jax': jax.__version__,
    'date': datetime.date.today().isoformat(),
    'commit': commit(),
  }


def told(found: dict[str, str]) -> str:
  """Tells what `describe` returned in half a sentence."""
  commit = f', commit {found["commit"]}' if found.get('commit') else ''
  where = f'{found["cores"]} cores, {found["processor"]}'
  if found['device'] != 'cpu':
    where = f'{found["device"]}, {where}'
  return f'{where}, jax {found["jax"]}, {found["date"]}{commit}'


def commit() -> str:
  """Returns the commit's name, with a + if files but results differ from it."""
  if _COMMIT.value:
    return _COMMIT.value
  try:
    name = _git('rev-parse', '--short=10', 'HEAD')
    changed = _git(
      'status', '--porcelain', '--untracked-files=no', '--', '.',
      ':!benchmarks/results',
    )  # fmt: skip
  except (OSError, subprocess.CalledProcessError):
    return ''
  return f'{name}+' if changed else name


def _git(*words: str) -> str:
  done = subprocess.run(
    ['git', *words], cwd=ROOT, capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


def write(path: str | os.PathLike, result: dict) -> None:
  """Writes a result as JSON at once, making its folder."""
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  temporary = file.with_name(f'.{file.name}.{os.getpid()}')
  temporary.write_text(json.dumps(result, indent=1) + '\n')
  os.replace(temporary, file)


def read(path: str | os.PathLike) -> dict:
  return json.loads(pathlib.Path(path).read_text())


def save(name: str, result: dict) -> dict:
  """Writes what a benchmark has found so far to where its result goes.

  Returns it with `machine`.
  """
  result = {'machine': describe()} | result
  path = RESULT.value
  if not path and not smoke():
    path = ROOT / 'benchmarks' / 'results' / f'{name}.json'
  if path:
    write(path, result)
  return result


def tell(name: str, measure: Callable[[], dict], report: Callable[[dict], str]) -> None:
  """Measures, writes and tells.

  Args:
    name: of the module and of its file in benchmarks/results/.
    measure: returns the result, for JSON.
    report: tells a result that has `machine` too.
  """
  print('\n' + report(save(name, measure())))


def run(name: str, measure: Callable[[], dict], report: Callable[[dict], str]) -> None:
  """Measures, writes and tells as a program; see `tell`."""
  start(lambda: tell(name, measure, report))


def start(benchmark: Callable[[], None]) -> None:
  """Runs a function of nothing as a program; bad input ends in one line."""

  def main(argv):
    logging.set_verbosity(logging.WARNING)  # not the libraries' notices
    try:
      if len(argv) > 1:
        raise ValueError(f'unexpected argument {argv[1]!r}: flags start with --')
      benchmark()
    except (ValueError, OSError) as error:
      errors.fail(error)

  program.call(main)


def child_env(xla_flags: str = '', **more: str) -> dict[str, str]:
  """Returns the environment of a child that shares the device with others.

  Args:
    xla_flags: added to those that are set.
    **more: variables.
  """
  flags_set = f'{os.environ.get("XLA_FLAGS", "")} {xla_flags}'.strip()
  more |= {'XLA_FLAGS': flags_set} if flags_set else {}  # XLA refuses an empty one
  return os.environ | {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} | more


def seconds(function, *args) -> float:
  """Times one call of a function of arrays, until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def peak_mb() -> float:
  """Returns the most memory that this process ever held, in 10^6 bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def table(head: str, rows: list[list[str]]) -> str:
  """Returns a Markdown table; columns but the first are aligned to the right.

  Args:
    head: names of the columns, divided by ' | '.
    rows: cells.
  """
  names = head.split(' | ')
  lines = [names, ['---', *['---:'] * (len(names) - 1)], *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def dtypes() -> list[str]:
  """Returns the types that this processor multiplies in earnest.

  On one without bfloat16 products torch took over six minutes for one client's
  two steps in bfloat16, and about five seconds in float32.
  """
  able = 'amx_bf16' in _cpuinfo() or 'avx512_bf16' in _cpuinfo()
  return ['float32', 'bfloat16'] if able else ['float32']


def _cpuinfo() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  return info.read_text() if info.exists() else ''


def _processor() -> str:
  """Returns the processor's name, and which products of bfloat16 it has."""
  info = _cpuinfo()
  names = [x for x in info.splitlines() if x.startswith('model name')]
  name = names[0].partition(': ')[2] if names else platform.processor()
  able = [
    words
    for flag, words in (('amx_bf16', 'AMX'), ('avx512_bf16', 'avx512_bf16'))
    if flag in info
  ]
  return f'{name} ({able[0] if able else "no bfloat16"})'
