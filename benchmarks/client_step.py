"""One training step: clients at once, recomputation, and where its time goes.

python -m benchmarks.client_step [--source=gemma3_270m] [--dtype=float32]
  [--repeats=5] [--tokens=128] [--targets=48] [--profile]

Variants are timed in turn: seconds a client, their ratio to one client at a time,
and the temporary memory. With --profile, instead, where the time of a step of five
clients goes, summed by operation; that is printed and not kept.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import machine, profiling
from hetlora_jax import base_model, config, formats, lora, sharding
from hetlora_jax.models import decoder, readout
from hetlora_jax.types import Batch, PyTree

_SOURCE = flags.DEFINE_string('source', 'gemma3_270m', 'Base model.')
_DTYPE = flags.DEFINE_enum(
  'dtype', 'float32', ['float32', 'bfloat16'], 'Type of the base model.'
)
_TOKENS = flags.DEFINE_integer('tokens', 128, 'Tokens a client.', 1)
_TARGETS = flags.DEFINE_integer('targets', 48, 'Loss-bearing positions.', 1)
_PROFILE = flags.DEFINE_bool('profile', False, 'Print where the time goes.')
_RANK = 50
_CLIENTS = 5  # of the profile
_AT_ONCE = (1, 2, 5, 10)
_OPERATIONS = 30


def load_model() -> tuple[decoder.DecoderConfig, PyTree]:
  """Returns shape and parameters of --source, or with --smoke of a tiny model."""
  if machine.smoke():
    c = config.resolve(machine.smoke_config())
    model = base_model.of_config(c, sharding.make_mesh())
    assert model.decoder, 'of a model that a configuration names'
    return model.decoder, model.params
  model = formats.load(_SOURCE.value, dtype=jnp.dtype(_DTYPE.value))
  return model.config, jax.device_put(model.params)


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


def variant(shape: decoder.DecoderConfig, base: PyTree, clients: int, remat: bool):
  """Returns a compiled step of so many clients at once, and its arguments."""
  dims = decoder.adapter_dims(shape, ('q', 'v'))
  adapters = lora.init(jax.random.key(0), dims, _RANK, 'gaussian')
  loss = readout.make_loss(shape, base['embed'].dtype, remat)

  def step(base, adapters, batch):
    total = lambda a: loss(base, a, jnp.float32(2), batch)[0]  # noqa: E731
    return jax.grad(total)(adapters)

  many = jax.tree.map(lambda x: jnp.stack([x] * clients), adapters)
  batch = _batch(np.random.default_rng(0), clients, shape.vocab_size)
  args = base, many, batch
  return jax.jit(jax.vmap(step, (None, 0, 0))).lower(*args).compile(), args


def profile() -> None:
  """Prints the operations that take the most of a step."""
  run, args = variant(*load_model(), _CLIENTS, False)
  machine.seconds(run, *args)
  rows = profiling.top(run, lambda: run(*args), _OPERATIONS)
  print(profiling.told(rows))


def measure() -> dict:
  """Times all variants in turn."""
  at_once = _AT_ONCE[:2] if machine.smoke() else _AT_ONCE
  model = load_model()
  variants = {
    (n, remat): variant(*model, n, remat)
    for remat in (False, True) for n in at_once
  }  # fmt: skip
  times = collections.defaultdict(list)
  for repeat in range(machine.repeats() + 1):
    for key, (run, args) in variants.items():
      seconds = machine.seconds(run, *args) / key[0]
      if repeat:  # the first warms up
        times[key].append(seconds)
  rows = [
    {
      'at_once': n, 'remat': remat,
      'seconds_a_client': float(np.median(times[n, remat])),
      'ratio': float(np.median(np.divide(times[n, remat], times[1, False]))),
      'temporary_mb': run.memory_analysis().temp_size_in_bytes / 1e6,
    }
    for (n, remat), (run, _) in variants.items()
  ]  # fmt: skip
  return {
    'model': _SOURCE.value, 'dtype': _DTYPE.value, 'tokens': _TOKENS.value,
    'targets': _TARGETS.value, 'variants': rows,
  }  # fmt: skip


def report(result: dict) -> str:
  """Tells the variants."""
  rows = [
    [str(row['at_once']), 'all of a layer' if row['remat'] else 'but products',
     f'{row["seconds_a_client"]:.3f}', f'{row["ratio"]:.2f}',
     f'{row["temporary_mb"]:.0f}']
    for row in result['variants']
  ]  # fmt: skip
  head = 'clients at once | recomputed | s a client | ratio | temporary MB'
  return (
    f'{machine.table(head, rows)}\n\n{result["model"]} in {result["dtype"]}, '
    f'{result["tokens"]} tokens and {result["targets"]} targets a client. '
    f'{machine.told(result["machine"])}.'
  )


if __name__ == '__main__':
  machine.start(
    lambda: (
      profile() if _PROFILE.value else machine.tell('client_step', measure, report)
    )
  )
