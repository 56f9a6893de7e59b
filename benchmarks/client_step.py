"""One training step: clients at once, recomputation, and where its time goes.

python -m benchmarks.client_step [--source=gemma3_270m] [--repeats=5]
  [--tokens=128] [--targets=48] [--profile]

Variants are timed in turn; prints the median seconds a client, the ratio to one
client at a time, and the temporary memory. With --profile, a trace of five
clients at once, summed by operation: products that run at the same time each
count their whole time.
"""

import collections
import gzip
import json
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import machine
from hetlora_jax import lora
from hetlora_jax.models import decoder, pretrained, readout
from hetlora_jax.types import Batch

_SOURCE = flags.DEFINE_string('source', 'gemma3_270m', 'Base model.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls of each.')
_TOKENS = flags.DEFINE_integer('tokens', 128, 'Tokens a client.')
_TARGETS = flags.DEFINE_integer('targets', 48, 'Loss-bearing positions.')
_PROFILE = flags.DEFINE_bool('profile', False, 'Print where the time goes.')
_RANK = 50


def _batch(rng, clients: int, vocabulary: int) -> Batch:
  tokens, targets = _TOKENS.value, _TARGETS.value
  shape = (clients, 1, tokens)
  return Batch(
    tokens=rng.integers(3, vocabulary, shape).astype(np.int32),
    segment=np.ones(shape, np.int32),
    position=np.broadcast_to(np.arange(tokens, dtype=np.int32), shape),
    target_index=np.tile(np.arange(targets, dtype=np.int32), (clients, 1)),
    target=rng.integers(3, vocabulary, (clients, targets)).astype(np.int32),
    weight=np.ones((clients, targets), np.float32),
  )


def variant(model, base, clients: int, remat: bool):
  """Returns a compiled step of so many clients at once, and its arguments."""
  dims = decoder.adapter_dims(model.config, ('q', 'v'))
  adapters = lora.init(jax.random.key(0), dims, _RANK, 'gaussian')
  loss = readout.make_loss(model.config, jnp.float32, remat)

  def step(base, adapters, batch):
    total = lambda a: loss(base, a, jnp.float32(2), batch)[0]  # noqa: E731
    return jax.grad(total)(adapters)

  many = jax.tree.map(lambda x: jnp.stack([x] * clients), adapters)
  batch = _batch(np.random.default_rng(0), clients, model.config.vocab_size)
  args = base, many, batch
  return jax.jit(jax.vmap(step, (None, 0, 0))).lower(*args).compile(), args


def profile(run, args) -> None:
  """Prints the operations that take the most time, and what they compute."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, create_perfetto_trace=True):
      jax.block_until_ready(run(*args))
    trace = next(pathlib.Path(folder).rglob('perfetto_trace.json.gz'))
    events = json.loads(gzip.decompress(trace.read_bytes()))
  spent = collections.Counter()
  for event in events if isinstance(events, list) else events['traceEvents']:
    spent[event['name']] += event.get('dur', 0)
  text = run.as_text()
  for name, microseconds in spent.most_common(60):
    found = re.search(rf'%{re.escape(name)} = (\S+) .*op_name="([^"]*)"', text)
    if found:
      shape, what = found.groups()
      what = re.sub(r'while/body/closed_call/|jit\(\w*\)/', '', what)[-60:]
      print(f'{microseconds / 1e3:>9.1f} ms  {shape:<28} {what}')


def main() -> None:
  model = pretrained.load(_SOURCE.value, dtype=np.float32)
  base = jax.device_put(model.params)
  if _PROFILE.value:
    run, args = variant(model, base, 5, False)
    machine.seconds(run, *args)
    return profile(run, args)
  variants = {
    (n, remat): variant(model, base, n, remat)
    for remat in (False, True) for n in (1, 2, 5, 10)
  }  # fmt: skip
  times = collections.defaultdict(list)
  for repeat in range(_REPEATS.value + 1):
    for key, (run, args) in variants.items():
      seconds = machine.seconds(run, *args) / key[0]
      if repeat:  # the first warms up
        times[key].append(seconds)
  print(f'{"at once":>8}{"remat":>7}{"s a client":>12}{"ratio":>7}{"MB":>7}')
  for key, (run, _) in variants.items():
    ratio = np.median(np.divide(times[key], times[1, False]))
    megabytes = run.memory_analysis().temp_size_in_bytes / 1e6
    print(
      f'{key[0]:>8}{key[1]!s:>7}{np.median(times[key]):>12.2f}'
      f'{ratio:>7.2f}{megabytes:>7.0f}'
    )


if __name__ == '__main__':
  machine.run(main)
