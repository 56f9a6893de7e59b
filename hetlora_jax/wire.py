"""What the wire does to values: it rounds what is sent to a narrower type.

The server sends parameters. Clients send by how much they changed them, which the
server adds to its own, unrounded ones, so that a small change is not lost beside a
large value (FedPAQ: Reisizadeh et al., 2019, arXiv 1909.13014). In the program all
stays float32; only the values are rounded.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hetlora_jax import lora
from hetlora_jax.types import Adapters, Array, Deltas, Lora, Trained, View

AXIS = {'a': -2, 'b': -1}  # along which the values of a rank slot lie
Rounding = Callable[[Array, int], Array]  # (values, axis of a vector) -> values


class Type(NamedTuple):
  """A type of what is sent: a vector is a rank slot of A or B, or a row of the base."""

  value_bytes: int
  vector_bytes: int  # of what a vector has besides its values
  round: Rounding | None  # None: it holds every float32


def _to_bfloat16(x: Array, axis: int) -> Array:
  # XLA may drop a pair of casts, but not this.
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _to_float16(x: Array, axis: int) -> Array:
  # `reduce_precision` makes subnormal numbers, below 2**-14, zero; float16 has them.
  subnormal = jnp.round(x * 2.0**24) / 2.0**24
  normal = jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
  return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal)


def _to_int8(x: Array, axis: int) -> Array:
  """Rounds to -127..127 times the largest of a vector / 127; zeros stay zeros."""
  scale = jnp.abs(x).max(axis, keepdims=True) / 127
  return jnp.round(x / jnp.where(scale == 0, 1, scale)) * scale


TYPES = {
  'float32': Type(4, 0, None),
  'bfloat16': Type(2, 0, _to_bfloat16),
  'float16': Type(2, 0, _to_float16),
  'int8': Type(1, 4, _to_int8),
}


class Wire(NamedTuple):
  """What becomes of a method's messages; by default nothing."""

  # View -> the View that arrives.
  down: Callable[[View], View] = lambda view: view
  # What full fine-tuning changed of the base -> what arrives of it.
  base_down: Callable[[Deltas], Deltas] = lambda change: change
  # (View before the wire, View that arrived, trained, what the client keeps, round) ->
  # what the server has of the client, and what of its changes was lost.
  up: Callable = lambda exact, view, trained, personal, round: (trained, {})
  remembered: tuple[str, ...] = ()  # factors of which clients keep what was lost


def rounded(x: Lora, factors: Iterable[str], rounding: Rounding | None) -> Lora:
  """Rounds some factors of an adapter, 'a' and 'b', each rank slot for itself."""
  if not rounding:
    return x
  return x._replace(**{f: rounding(getattr(x, f), AXIS[f]) for f in factors})


def make(
  rounding: Rounding,
  trainable: Callable,
  *,
  down: tuple[str, ...],
  up: tuple[str, ...],
  fresh: bool,
  base: bool,
  feedback: bool,
) -> Wire:
  """Makes a wire that rounds.

  Args:
    rounding: of a type.
    trainable: the method's rule.
    down: factors that the server sends, of 'a' and 'b'.
    up: those that clients send.
    fresh: whether clients draw their factors, so that they send them whole.
    base: whether they train the base.
    feedback: whether what rounding lost is added to the client's next change (Seide,
      Fu, Droppo, Li, Yu, 2014; Karimireddy, Rebjock, Stich, Jaggi, 2019, arXiv
      1901.09847). The basis of the factors must stay for that.
  """

  def of_base(change: Deltas) -> Deltas:
    return {name: rounding(x, -1) for name, x in change.items()} if base else change

  def of_view(view: View) -> View:
    adapters = {t: rounded(x, down, rounding) for t, x in view.adapters.items()}
    return view._replace(adapters=adapters)

  def of_trained(exact: View, view: View, trained: Trained, personal, round: Array):
    sends = jax.tree.map(
      jnp.multiply, trainable(round, view.mask), lora.slot_masks(view.mask)
    )
    adapters: Adapters = {}
    lost: dict = {t: {} for t in trained.adapters}
    for t, x in trained.adapters.items():
      for f in up:
        now, start, server, mask = (getattr(z[t], f) for z in (
          trained.adapters, view.adapters, exact.adapters, sends
        ))  # fmt: skip
        change = now if fresh else now - start
        before = personal[t][f'lost_{f}'] if feedback else 0
        told = rounding((change + before) * mask, AXIS[f])
        x = x._replace(**{f: told if fresh else server + told})
        if feedback:
          lost[t][f'lost_{f}'] = jnp.where(mask > 0, change + before - told, before)
      adapters[t] = x
    return Trained(adapters, of_base(trained.change)), lost

  return Wire(of_view, of_base, of_trained, up if feedback else ())
