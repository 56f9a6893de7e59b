"""Times one training step against clients at once and recomputation.

python -m benchmarks.client_step [--source=gemma3_270m] [--repeats=5]

Prints seconds a client (median) and its ratio to one client at a time without
recomputation, in the same run.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from hetlora_jax import lora
from hetlora_jax.models import decoder, pretrained
from hetlora_jax.types import Batch

_SOURCE = flags.DEFINE_string('source', 'gemma3_270m', 'Base model.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls of each.')
_TOKENS, _TARGETS, _RANK = 128, 48, 50


def _median_seconds(function, *args) -> float:
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return float(np.median(times))


def _batch(rng, clients: int, vocabulary: int) -> Batch:
  shape = (clients, 1, _TOKENS)
  return Batch(
    tokens=rng.integers(3, vocabulary, shape).astype(np.int32),
    segment=np.ones(shape, np.int32),
    position=np.broadcast_to(np.arange(_TOKENS, dtype=np.int32), shape),
    target_index=np.tile(np.arange(_TARGETS, dtype=np.int32), (clients, 1)),
    target=rng.integers(3, vocabulary, (clients, _TARGETS)).astype(np.int32),
    weight=np.ones((clients, _TARGETS), np.float32),
  )


def main(argv) -> None:
  del argv
  model = pretrained.load(_SOURCE.value, dtype=np.float32)
  base, rng = jax.device_put(model.params), np.random.default_rng(0)
  dims = decoder.adapter_dims(model.config, ('q', 'v'))
  adapters = lora.init(jax.random.key(0), dims, _RANK, 'gaussian')
  print(f'{"remat":>6}{"clients":>9}{"s a client":>12}{"ratio":>8}')
  first = None
  for remat in (False, True):
    loss = decoder.make_loss(model.config, jnp.float32, remat)

    def step(base, adapters, batch, loss=loss):
      def total(adapters):
        return loss(base, adapters, jnp.float32(2), batch)[0]

      return jax.grad(total)(adapters)

    for clients in (1, 2, 4):
      many = jax.tree.map(lambda leaf, n=clients: jnp.stack([leaf] * n), adapters)  # fmt: skip
      batch = _batch(rng, clients, model.config.vocab_size)
      run = jax.jit(jax.vmap(step, (None, 0, 0)))
      seconds = _median_seconds(run, base, many, batch) / clients
      first = first or seconds
      print(
        f'{remat!s:>6}{clients:>9}{seconds:>12.2f}{seconds / first:>8.2f}',
        flush=True,
      )


if __name__ == '__main__':
  app.run(main)
