"""Makes all randomness a function of (seed, stream name, counters).

No generator is stored. So a client's randomness does not depend on which other
clients were sampled, and a resumed run equals an uninterrupted one to the bit.
"""

import zlib

import jax
import numpy as np

from hetlora_jax.types import Array


def _number(name: str) -> int:
  return zlib.crc32(name.encode())


def stream(seed: Array | int, name: str, *counters: Array | int) -> Array:
  """Returns the JAX key of a named stream, for use in compiled code."""
  key = jax.random.fold_in(jax.random.key(seed), _number(name))
  for counter in counters:
    key = jax.random.fold_in(key, counter)
  return key


def host_stream(seed: int, name: str, *counters: int) -> np.random.Generator:
  """Returns the NumPy generator of a named stream, for use on the host.

  >>> a, b = host_stream(0, 'batches', 7), host_stream(0, 'batches', 7)
  >>> a.bytes(4) == b.bytes(4)
  True
  """
  return np.random.default_rng([seed, _number(name), *counters])
