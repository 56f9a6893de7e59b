"""What was tried to make a step faster, each against the step as it is.

python -m benchmarks.levers [--source=gemma3_270m] [--dtype=float32] [--at_once=5]

Variants patch one thing and are timed in turn in one process: the loss alone,
then the step. The median time is a ratio to the code as it is: the table "lever by
lever" in docs/log.md.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from benchmarks import client_step, machine
from hetlora_jax.models import decoder, kernels

_AT_ONCE = flags.DEFINE_integer('at_once', 5, 'Clients at once.', 1)
_TARGETS = (48, 240)


def compare(runs: dict) -> list[dict]:
  """Times compiled functions in turn; returns ratios to the first, and memory.

  Args:
    runs: name -> (compiled function, its arguments).
  """
  times = {name: [] for name in runs}
  for _ in range(machine.repeats() + 1):
    for name, (run, args) in runs.items():
      times[name].append(machine.seconds(run, *args))
  first = np.array(next(iter(times.values()))[1:])
  return [
    {
      'lever': name,
      'ratio': float(np.median(np.array(times[name][1:]) / first)),
      'temporary_mb': run.memory_analysis().temp_size_in_bytes / 1e6,
    }
    for name, (run, _) in runs.items()
  ]


def losses(embed, targets: int) -> dict:
  """Returns the loss over chunks of so many words; 262,144 is all at once."""
  rng = np.random.default_rng(0)
  h = jnp.asarray(rng.normal(size=(targets, embed.shape[1])), embed.dtype)
  target = jnp.asarray(rng.integers(0, embed.shape[0], targets), jnp.int32)

  def compiled(words):
    def loss(h, embed):
      ones = jnp.ones(targets)
      return kernels.linear_cross_entropy(h, embed, target, ones, words)

    return jax.jit(jax.value_and_grad(loss)).lower(h, embed).compile()

  return {
    f'{words} words at a time': (compiled(words), (h, embed))
    for words in (2048, 512, 1024, 4096, 32768, embed.shape[0])
    if words <= max(embed.shape[0], 2048)
  }  # fmt: skip


def _sines_apart(sines, *args):
  """Keeps sines and cosines from being computed again in every use."""
  return jax.lax.optimization_barrier(sines(*args))


def _heads_first(q, k, v, mask, softcap):
  """Attends with heads moved before positions; without the caps of Gemma 2."""
  assert not softcap
  rows, length, heads, depth = q.shape
  groups = k.shape[2]
  q = q.swapaxes(1, 2).reshape(rows, groups, -1, depth)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  score = jnp.einsum('pkqd,pksd->pkqs', q, k).astype(jnp.float32)
  score = score.reshape(rows, groups, -1, length, length)
  score = jnp.where(mask[:, None, None], score, -1e30)
  weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
  weight = weight.reshape(rows, groups, -1, length)
  out = jnp.einsum('pkqs,pksd->pkqd', weight, v)
  return out.reshape(rows, heads, length, depth).swapaxes(1, 2)


def _storing(policy):
  """Replaces what is stored for the backward pass."""
  return mock.patch.object(nn, 'remat', functools.partial(_remat, keep=policy))


def _remat(layer, *, keep, prevent_cse, policy):
  """Stands in for `nn.remat`; 'all' stores everything."""
  del policy
  if keep == 'all':
    return layer
  return jax_remat(layer, prevent_cse=prevent_cse, policy=keep)


jax_remat = nn.remat


def _unrolled(times: int):
  return mock.patch.object(nn, 'scan', functools.partial(nn.scan, unroll=times))


def levers() -> dict:
  """Returns name -> context in which the step is compiled."""
  policies = jax.checkpoint_policies
  return {
    'as it is': contextlib.nullcontext(),
    'everything stored': _storing('all'),
    'products without batch axes stored': _storing(
      policies.dots_with_no_batch_dims_saveable
    ),
    'nothing stored (model.remat)': _storing(None),
    'layers unrolled, 2 at a time': _unrolled(2),
    'all layers unrolled': _unrolled(100),
    'sines apart': mock.patch.object(
      decoder, '_sines', functools.partial(_sines_apart, decoder._sines)
    ),
    'heads before positions': mock.patch.object(kernels, 'attention', _heads_first),
  }


def measure() -> dict:
  """Times all levers: of the loss, then of the step."""
  shape, base = client_step.load_model()
  embed, result = decoder.head(shape, base), {}
  for targets in _TARGETS[:1] if machine.smoke() else _TARGETS:
    result[f'loss of {targets} targets'] = compare(losses(embed, targets))
  at_once, runs = 2 if machine.smoke() else _AT_ONCE.value, {}
  for name, patch in levers().items():
    with patch:
      runs[name] = client_step.variant(shape, base, at_once, False)
  return {'compared': result | {f'step of {at_once} clients': compare(runs)}}


def report(result: dict) -> str:
  """Tells the levers, a table a comparison."""
  texts = []
  for name, rows in result['compared'].items():
    cells = [
      [row['lever'], f'{row["ratio"]:.2f}', f'{row["temporary_mb"]:.0f}']
      for row in rows
    ]
    texts.append(machine.table(f'{name} | time | temporary MB', cells))
  return '\n\n'.join([*texts, f'{machine.told(result["machine"])}.'])


if __name__ == '__main__':
  machine.run('levers', measure, report)
