"""Which type this machine multiplies fastest, measured once and kept."""

import functools
import os
import pathlib
import platform
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from hetlora_jax import files
from hetlora_jax.models import kernels

ROWS, D_IN, D_OUT = 1024, 640, 2048  # a product of Gemma 3 270M on packed rows
REPEATS = 8
WORTH_IT = 1.2  # so many times as fast bfloat16 must be for its fewer digits
ANEW = 'delete it, it is made anew'


class Rates(NamedTuple):
  """How fast products are whose operands have a type, in GFLOP/s."""

  float32: float
  bfloat16: float

  @property
  def fastest(self) -> str:
    """The type to compute in: bfloat16 only where it is clearly faster."""
    return 'bfloat16' if self.bfloat16 > WORTH_IT * self.float32 else 'float32'

  def __str__(self) -> str:
    return f'float32 {self.float32:.0f}, bfloat16 {self.bfloat16:.0f} GFLOP/s here'


@functools.cache
def rates() -> Rates:
  """Returns this machine's rates, of the first process where there are several.

  They are measured in a second and kept in the cache folder, for this processor, number
  of cores and jax.
  """
  path = files.cache_folder() / 'arithmetic.json'
  known, machine = files.read_json(path, ANEW) if path.exists() else {}, _machine()
  if machine in known:
    with files.parsing(path, ANEW):
      found = Rates(**{name: float(x) for name, x in known[machine].items()})
  else:
    found = Rates(*(_measure(jnp.dtype(name)) for name in Rates._fields))
    files.write_json(path, known | {machine: found._asdict()})
  if jax.process_count() > 1:  # all must choose alike
    found = Rates(*map(float, multihost_utils.broadcast_one_to_all(found)))
  return found


def _machine() -> str:
  """Names what the rates depend on."""
  info = pathlib.Path('/proc/cpuinfo')
  text = info.read_text() if info.exists() else ''
  named = re.search(r'^model name\s*: (.*)$', text, re.MULTILINE)
  name = named[1] if named else platform.processor() or platform.machine()
  flags = sorted(set(re.findall(r'\b\w*bf16\b', text)))
  return ' '.join([name, *flags, f'{os.cpu_count()} cores', f'jax {jax.__version__}'])


def _measure(dtype: jnp.dtype) -> float:
  """Returns GFLOP/s of a product, the fastest of a few."""
  multiply = jax.jit(kernels.matmul)
  x, w = jnp.ones((ROWS, D_IN), dtype), jnp.ones((D_IN, D_OUT), dtype)
  multiply(x, w).block_until_ready()
  seconds = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    multiply(x, w).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * ROWS * D_IN * D_OUT / min(seconds) / 1e9
