"""What the benchmarks share: running, timing, where it was measured."""

import datetime
import json
import os
import pathlib
import platform
import resource
import time

import jax
from absl import logging
from ml_collections import config_flags

from launch import errors, program


def describe() -> dict[str, str]:
  """Returns processor, cores, device, date and versions."""
  return {
    'processor': _processor(),
    'cores': str(os.cpu_count()),
    'device': jax.devices()[0].device_kind,
    'python': platform.python_version(),
    'jax': jax.__version__,
    'date': datetime.date.today().isoformat(),
  }


def write(path: str, result: dict) -> None:
  """Writes a result as JSON, making its folder."""
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(result, indent=1) + '\n')


def run(benchmark) -> None:
  """Runs a function of nothing as a program; bad input ends in one line."""

  def main(argv):
    logging.set_verbosity(logging.WARNING)  # not the libraries' notices
    try:
      if len(argv) > 1:
        raise ValueError(
          f'unexpected argument {argv[1]!r}: flags start with --'
        )
      benchmark()
    except (ValueError, OSError) as error:
      errors.fail(error)

  program.call(main)


def define_config():
  """Defines --config, the main job by default; a bad field ends in one line.

  Fields given on the command line are set already here.
  """
  try:
    return config_flags.DEFINE_config_file(
      'config', 'configs/chitchat_gemma3.py', 'Experiment whose round is timed.'
    )
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    errors.fail(f'--config: {error}')


def seconds(function, *args) -> float:
  """Times one call of a function of arrays, until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - start


def peak_mb() -> float:
  """Returns the most memory that this process ever held, in 10^6 bytes."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


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
  lines = _cpuinfo().splitlines()
  names = [line for line in lines if line.startswith('model name')]
  return names[0].partition(': ')[2] if names else platform.processor()
