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
import optax

Array = jax.Array
PyTree = Any


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


@_pytree
class Hyperparameters:
  """What a sweep may vary without recompiling: scalars, all of them arrays."""

  seed: Array  # uint32
  client_learning_rate: Array
  server_learning_rate: Array
  tail_penalty: Array  # lambda of HetLoRA
  gamma: Array  # decay factor of self-pruning, in (0, 1]
  r_min: Array  # int32, no client prunes below it
  lora_scale: Array


@_pytree
class ClientUpdates:
  """What the clients of a round send; every leaf has a leading client axis."""

  adapters: Adapters
  mask: Masks  # owned slots after pruning, [C, L, R]
  scale: Array  # [C]
  num_examples: Array  # [C]; 0 takes no part
  norm: Norms  # ||scale * a @ b||_F of each matrix, [C, L]


@_pytree
class ServerState:
  """The whole checkpoint. Randomness needs no state (see prng.py)."""

  round: Array  # int32, the next round to run
  adapters: Adapters
  opt_state: optax.OptState
  rank: Array  # [N, G] int32, what each person can train
  tail_norm: Array  # [N, G] float32, tail norms when each last trained


# The task of a client; the roles of rules are described in methods/.
Loss = Callable[[PyTree, Adapters, Array, Batch], tuple[Array, Array]]
"""(base, adapters, scale, batch) -> (sum of token losses, token count)."""
