"""The few types that every module shares. Imports nothing of ours.

Axes: C clients in a round, N people in the population, G rank groups (1, or
one a matrix), S local steps, P packed rows, T tokens, M target positions,
V vocabulary, D width, R rank slots, L layers.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
PyTree = Any
Row = dict[str, Any]  # a line of metrics.jsonl, or of a summary


class Lora(NamedTuple):
  """One adapted matrix of every layer: `delta_w = scale * a @ b`.

  A rank-r adapter has zeros in slots r.. of BOTH factors; gradients there are
  then zero too, so shapes never depend on ranks (METHODS, fact 1).
  """

  a: Array  # [L, d_in, R]
  b: Array  # [L, R, d_out]


Adapters = dict[str, Lora]  # target module -> factors
Masks = dict[str, Array]  # target module -> [L, R], 1 where a slot is owned
Norms = dict[str, Array]  # target module -> [L]
Deltas = dict[str, Array]  # base parameter, by its own name -> its change


class Batch(NamedTuple):
  """One step's examples packed into P rows, and the positions with a loss."""

  tokens: Array  # [P, T] int32
  segment: Array  # [P, T] int32, example number from 1; 0 is padding
  position: Array  # [P, T] int32, counted from 0 within each example
  target_index: Array  # [M] int32, p * T + t of the position that predicts
  target: Array  # [M] int32, the token to be predicted there
  weight: Array  # [M] float32, 0 is padding


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def _pytree(cls):
  return jax.tree_util.register_dataclass(
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)
  )


@_pytree
class Cohort:
  """The people of one round and the data they train on."""

  client_id: Array  # [C] int32; N (the population size) is a padding client
  num_examples: Array  # [C] float32; 0 is a padding client
  batches: Batch  # leaves [C, S, ...]


@jax.tree_util.register_pytree_with_keys_class
class Hyperparameters:
  """What a sweep may vary without recompiling: scalars, all of them arrays.

  One for each field of a configuration that is declared with `traced=NAME`:
  `hyper.gamma`, `hyper.client_learning_rate`, ... (hetlora_jax/config.py).
  """

  def __init__(self, **scalars: Array):
    vars(self).update(scalars)

  def __getattr__(self, name: str) -> Array:  # only of what is absent
    raise AttributeError(f'no field is declared with traced={name!r}')

  def replace(self, **scalars: Array) -> Hyperparameters:
    """Returns a copy with other values."""
    return Hyperparameters(**vars(self) | scalars)

  def tree_flatten_with_keys(self):
    names = tuple(sorted(vars(self)))
    return [(jax.tree_util.GetAttrKey(n), vars(self)[n]) for n in names], names

  @classmethod
  def tree_unflatten(cls, names, scalars):
    return cls(**dict(zip(names, scalars, strict=True)))


class View(NamedTuple):
  """What a client receives, and which slots of it are its own."""

  adapters: Adapters
  mask: Masks  # slots that it trains and sends back
  scale: Array  # []


class Trained(NamedTuple):
  """What is trained: adapters, or a change of the base (full fine-tuning)."""

  adapters: Adapters | Deltas  # Deltas where a server works on products
  change: Deltas


@_pytree
class Memory:
  """What is kept of every person from round to round."""

  rank: Array  # [N, G] int32, what they can train
  tail_norm: Array  # [N, G] float32, tail norms when they last trained
  # What is never sent, [N, L, ...]: factors 'a', 'b' of clients' own; 'lost_a', 'lost_b',
  # what the wire's rounding has taken of their changes.
  personal: dict[str, dict[str, Array]]


@_pytree
class ClientUpdates:
  """What the clients of a round send; every leaf has a leading client axis."""

  adapters: Adapters
  mask: Masks  # owned slots after pruning, [C, L, R]
  scale: Array  # [C]
  num_examples: Array  # [C]; 0 takes no part
  norm: Norms  # ||scale * a @ b||_F of each matrix, [C, L]

  def owned(self) -> Masks:
    """Marks the slots that somebody trained: target -> [L, R]."""
    here = self.num_examples > 0
    return {
      t: jnp.where(here.reshape(-1, *(1,) * (m.ndim - 1)), m, 0).max(0)
      for t, m in self.mask.items()
    }


class Server(NamedTuple):
  """The global adapters: `delta_w = scale * a @ b`."""

  adapters: Adapters
  scale: Array  # [], that of rank R


class Redistributed(NamedTuple):
  """What becomes of an aggregate."""

  adapters: Adapters
  fold: Deltas  # goes into the base; {} if the method folds nothing
  fold_rank: Norms  # rank of what is folded, where it is data; else {}


@_pytree
class ServerState:
  """The whole checkpoint. Randomness needs no state (see prng.py)."""

  round: Array  # int32, the next round to run
  adapters: Adapters
  residual: Deltas  # float32, what has been folded into the base so far
  opt_state: optax.OptState
  memory: Memory


# The task of a client; the roles of rules are described in methods/.
Loss = Callable[[PyTree, Adapters, Array, Batch], tuple[Array, Array]]
"""(base, adapters, scale, batch) -> (sum of token losses, token count)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """The static choices of a run: pure functions, closed over by the round."""

  loss: Loss
  scale: Callable  # (rank [G], hyper) -> []
  scale_carriers: tuple[float, float]  # powers of A and B; see lora.rescale
  distribute: Callable  # (adapters, masks, scale, key) -> View
  personal: tuple[str, ...]  # factors that stay with the client: 'a', 'b'
  objective: Callable  # (trained, about) -> (loss, (sum, count))
  trainable: Callable  # (round, masks) -> target -> Lora of masks
  trains_base: bool  # full fine-tuning: no adapters
  client_optimizer: Callable  # (hyper, round) -> GradientTransformation
  accumulate: int  # batches of a step
  tamper: Callable  # (received, trained, id, seed) -> Trained; see faults.py
  wire: Any  # what it does to messages, a wire.Wire
  bound: Callable  # (received, trained) -> Trained
  tail_norms: Callable  # (adapters, rank [G], gamma) -> target -> [L]
  prune: Callable  # (before [G], trained, rank [G], hyper) -> rank [G]
  prune_against: str  # 'received' or 'last_trained'
  keep_pruned_rank: bool  # in later rounds too
  weigh: Callable  # (num_examples [C], masks, norms) -> weights
  product_space: bool  # whether `aggregate` returns Deltas
  aggregate: Callable  # (updates, weights, server) -> Adapters or Deltas
  redistribute: Callable  # (aggregate, error(), server, hyper) -> Redistributed
  server_optimizer: Callable  # (learning rate) -> GradientTransformation
  clients_at_once: int  # the memory dial; 0 is all of them
