"""Attention by cuDNN and by XLA, and how many words of the vocabulary at once.

The shapes are those of 64 clients that train at once, vmapped as in a round;
forward and backward pass together.
"""

import concurrent.futures
import math

import jax
import jax.numpy as jnp

from benchmarks import machine
from hetlora_jax.models import kernels

# Clients, tokens of their one row, query heads, key heads, width of a head.
_ATTENTION = (
  (64, 128, 4, 1, 256),
  (64, 128, 9, 3, 64),
  (64, 128, 24, 8, 128),
  (8, 1024, 4, 1, 256),
  (8, 1024, 24, 8, 128),
)
_SMOKE_ATTENTION = ((2, 16, 4, 1, 16), (2, 16, 9, 3, 16))
_IMPLEMENTATIONS = ('xla', 'cudnn')
_WORDS = (8192, 32768, 262144)
_CLIENTS, _TARGETS, _WIDTH = 64, 48, 640
_CALLS = 20


def _time(function, *args) -> float:
  """Returns the seconds of a call, of many that follow each other."""
  jax.block_until_ready(function(*args))
  calls = 1 if machine.smoke() else _CALLS

  def many():
    for _ in range(calls):
      out = function(*args)
    jax.block_until_ready(out)

  return min(machine.seconds(many) for _ in range(3)) / calls


def _inputs(clients, tokens, heads, key_heads, width):
  """Draws queries, keys, values and cotangents, and masks two examples a row."""
  draw = [
    jax.random.normal(jax.random.key(i), (clients, 1, tokens, n, width), jnp.bfloat16)
    for i, n in enumerate((heads, key_heads, key_heads, heads))
  ]
  second = jnp.arange(tokens) >= tokens * 2 // 3
  past = jnp.tril(jnp.ones((tokens, tokens), bool))
  mask = (second[:, None] == second[None]) & past
  return draw, jnp.broadcast_to(mask, (clients, 1, tokens, tokens))


def attention(implementation: str):
  """Returns (q, k, v, cotangent, mask) of clients -> output and gradients."""

  def both(q, k, v, cotangent, mask):
    def attend(q, k, v):
      # cuDNN, vmapped, wants a mask for every head.
      heads = q.shape[2] if implementation == 'cudnn' else 1
      shape = (mask.shape[0], heads, *mask.shape[1:])
      return jax.nn.dot_product_attention(
        q, k, v, mask=jnp.broadcast_to(mask[:, None], shape),
        scale=q.shape[-1] ** -0.5, implementation=implementation,
      )  # fmt: skip

    out, back = jax.vjp(attend, q, k, v)
    return out, back(cotangent)

  return jax.jit(jax.vmap(both))


def _distance(a, b) -> float:
  """Returns the largest relative distance of two trees' leaves."""
  far = [
    float(jnp.linalg.norm((x - y).astype(jnp.float32).ravel())
          / jnp.linalg.norm(y.astype(jnp.float32).ravel()))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  ]  # fmt: skip
  return max(far)


def _compiled(lower):
  """Compiles what a function lowers, or returns why that is refused."""
  try:
    return lower().compile()
  except Exception as error:  # jax, XLA and cuDNN refuse in many ways
    return (str(error).splitlines() or [repr(error)])[0][:300]


def _together(lowers: list) -> list:
  """Compiles several programs at the same time."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(_compiled, lowers))


def measure_attention(shapes) -> list[dict]:
  """Times both implementations; says why, if one refuses a shape."""
  inputs = [_inputs(*shape) for shape in shapes]
  programs = iter(_together([
    lambda name=name, draw=draw, mask=mask: attention(name).lower(*draw, mask)
    for draw, mask in inputs for name in _IMPLEMENTATIONS
  ]))  # fmt: skip
  rows = []
  for shape, (draw, mask) in zip(shapes, inputs, strict=True):
    wide = [x.astype(jnp.float32) for x in draw]
    with jax.default_matmul_precision('highest'):
      want = attention('xla')(*wide, mask)
    rows.append({'shape': shape})
    for name in _IMPLEMENTATIONS:
      run = next(programs)
      if isinstance(run, str):
        rows[-1][name] = {'refused': run}
      else:
        rows[-1][name] = {
          's': _time(run, *draw, mask),
          'error': _distance(run(*draw, mask), want),
        }
    print(rows[-1], flush=True)
  return rows


def measure_words(at_once: tuple[int, ...]) -> list[dict]:
  """Times the loss of all clients' targets over chunks of the vocabulary.

  Args:
    at_once: words of a chunk; the largest is the vocabulary.
  """
  vocabulary = max(at_once)
  clients = 2 if machine.smoke() else _CLIENTS
  keys = jax.random.split(jax.random.key(0), 3)
  h = jax.random.normal(keys[0], (clients, _TARGETS, _WIDTH), jnp.bfloat16)
  embed = jax.random.normal(keys[1], (vocabulary, _WIDTH), jnp.bfloat16)
  target = jax.random.randint(keys[2], h.shape[:2], 0, vocabulary)

  def lower(words):
    def loss(h, embed, target):
      one = lambda h, t: kernels.linear_cross_entropy(  # noqa: E731
        h, embed, t, jnp.ones(t.shape), words
      )
      return jax.vmap(one)(h, target).sum()

    return jax.jit(jax.grad(loss)).lower(h, embed, target)

  programs = _together([lambda words=words: lower(words) for words in at_once])
  rows = []
  for words, run in zip(at_once, programs, strict=True):
    seconds = _time(run, h, embed, target)
    rows.append({
      'words': words, 's': seconds,
      'temporary_mb': run.memory_analysis().temp_size_in_bytes / 1e6,
      'flops_per_s': 4 * math.prod(h.shape) * vocabulary / seconds,
    })  # fmt: skip
    print(rows[-1], flush=True)
  return rows


def measure(keep) -> None:
  """Times attention at all shapes, then the loss."""
  smoke = machine.smoke()
  shapes = _SMOKE_ATTENTION if smoke else _ATTENTION
  result: dict = {'attention': measure_attention(shapes)}
  keep(result)
  result['words'] = measure_words((256, 1024) if smoke else _WORDS)
  keep(result)


def report(result: dict) -> str:
  """Tells milliseconds and errors of attention, and of words at once."""

  def cell(found: dict) -> str:
    if 'refused' in found:
      return f'refused: {found["refused"][:60]}'
    return f'{1e3 * found["s"]:.3f} ms, error {found["error"]:.0e}'

  rows = [
    [' x '.join(map(str, row['shape'])), cell(row['xla']), cell(row['cudnn'])]
    for row in result['attention']
  ]
  head = 'clients x tokens x heads x key heads x width | XLA | cuDNN'
  text = machine.table(head, rows)
  rows = [
    [f'{row["words"]:,}', f'{1e3 * row["s"]:.2f}', f'{row["temporary_mb"]:,.0f}',
     f'{row["flops_per_s"] / 1e12:.0f}']
    for row in result.get('words', [])
  ]  # fmt: skip
  head = 'vocabulary chunk | ms, loss and its gradient | temporary MB | TFLOP/s'
  return f'{text}\n\n{machine.table(head, rows)}'
