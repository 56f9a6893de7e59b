"""Randomness as a function of (seed, stream name, counters); none is stored.

A client's randomness therefore does not depend on who else was sampled, and a
resumed run equals an unbroken one to the bit.
"""

import zlib

import jax
import numpy as np

from hetlora_jax.types import Array


def _number(name: str) -> int:
  return zlib.crc32(name.encode())


def stream(seed: Array | int, name: str, *counters: Array | int) -> Array:
  """Returns the key of a named stream, for use on the device."""
  key = jax.random.fold_in(jax.random.key(seed), _number(name))
  for counter in counters:
    key = jax.random.fold_in(key, counter)
  return key


def host_stream(seed: int, name: str, *counters: int) -> np.random.Generator:
  """Returns the generator of a named stream, for use on the host.

  >>> a, b = host_stream(0, 'batches', 7), host_stream(0, 'batches', 7)
  >>> a.bytes(4) == b.bytes(4)
  True
  """
  return np.random.default_rng([seed, _number(name), *counters])
