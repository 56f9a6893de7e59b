"""What every result says of where and when it was measured."""

import datetime
import json
import os
import pathlib
import platform

import jax
from absl import logging


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


def quiet() -> None:
  """Leaves the libraries' notices out of what a benchmark prints."""
  logging.set_verbosity(logging.WARNING)


def dtypes() -> list[str]:
  """Returns the types that this processor multiplies in earnest.

  On one without bfloat16 products torch took over six minutes for one client's
  two steps in bfloat16, and three seconds in float32.
  """
  info = pathlib.Path('/proc/cpuinfo')
  features = info.read_text() if info.exists() else ''
  able = 'amx_bf16' in features or 'avx512_bf16' in features
  return ['float32', 'bfloat16'] if able else ['float32']


def _processor() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line for line in lines if line.startswith('model name')]
  return names[0].partition(': ')[2] if names else platform.processor()
