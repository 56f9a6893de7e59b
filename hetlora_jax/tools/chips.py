"""Accelerators as their makers describe them, and devices to compile for them.

Devices are fake CPU ones or, where libtpu is installed (`pip install 'jax[tpu]'`),
those of a TPU topology, whose own compiler then answers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from hetlora_jax.config import ConfigError


class Chip(NamedTuple):
  """An accelerator, as its maker describes it."""

  memory: float  # bytes
  flops: float  # a second, dense bfloat16
  topology: str = ''  # family of TPU topologies


CHIPS = {
  'v5e': Chip(16e9, 197e12, 'v5e'),
  'v5p': Chip(95e9, 459e12, 'v5p'),
  'v6e': Chip(32e9, 918e12, 'v6e'),
  'a100': Chip(80e9, 312e12),
  'h100': Chip(80e9, 989e12),
  'h200': Chip(141e9, 989e12),
}


def _grid(family: str, count: int) -> str:
  """Returns the roundest topology of so many chips, e.g. 'v5e:8x16'."""
  sides = [1, 1, 1] if family == 'v5p' else [1, 1]
  for prime in sorted(_factors(count), reverse=True):
    sides[sides.index(min(sides))] *= prime
  return f'{family}:{"x".join(map(str, sorted(sides)))}'


def _factors(n: int) -> list[int]:
  for p in range(2, math.isqrt(n) + 1):
    if n % p == 0:
      return [p, *_factors(n // p)]
  return [n] if n > 1 else []


def compiler_of(chip: str) -> str:
  """Returns whose compiler answers for a chip: a TPU family's, or 'cpu'."""
  has_libtpu = importlib.util.find_spec('libtpu') is not None
  return (has_libtpu and CHIPS[chip].topology) or 'cpu'


def devices(chip: str, count: int) -> tuple[Sequence, str]:
  """Returns the devices to compile for, and what they are; raises ConfigError."""
  if compiler_of(chip) == 'cpu':
    return jax.devices(), 'cpu'
  name = _grid(CHIPS[chip].topology, count)
  try:
    found = topologies.get_topology_desc(name, 'tpu').devices
  except Exception as error:  # jaxlib raises whatever libtpu says
    raise ConfigError(
      f'config.mesh needs {count} devices, and there is no topology {name}: '
      f'{str(error).splitlines()[0]}'
    ) from error
  return found, f'{found[0].device_kind} {name}'
