"""One federated round, top to bottom: start reading here.

HetLoRA (Cho, Liu, Xu, Fahrezi, Joshi, 2024, arXiv 2401.06432) in its three
steps; every other method changes rules (methods/), never this function.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from hetlora_jax import client, diagnostics, lora, prng, server
from hetlora_jax.methods import aggregation
from hetlora_jax.types import (
  Array,
  Cohort,
  Hyperparameters,
  Memory,
  PyTree,
  Rules,
  ServerState,
  Trained,
)


def _reports(state: ServerState, cohort: Cohort, hyper) -> Array:
  """Draws who reports: not padding, nor those that drop out mid-round."""
  keys = jax.vmap(lambda i: prng.stream(hyper.seed, 'dropout', state.round, i))(
    cohort.client_id
  )
  stays = jax.vmap(jax.random.uniform)(keys) >= hyper.dropout
  return (cohort.num_examples > 0) & stays


def _shares(rules: Rules, num_examples_C: Array) -> Array:
  """Returns every client's weight in the mean of changes of the base."""
  alike = jnp.ones_like(num_examples_C)
  weights = rules.weigh(
    num_examples_C, {'base': alike[:, None, None]}, {'base': alike[:, None]}
  )
  return weights['base'][:, 0, 0]


def _without(change: PyTree, share_C: Array, sound_C: Array) -> tuple[PyTree, Array]:
  """Makes up for clients left out of a mean; returns it and the shares in it."""
  left = (share_C * sound_C).sum()
  more = jnp.where(sound_C.all() | (left == 0), 1.0, 1 / left)
  return jax.tree.map(lambda x: x * more, change), share_C * sound_C * more


def _remember(memory: Memory, new: Memory, who_C: Array, reports_C: Array):
  """Replaces what is remembered of those who reported."""

  def write(old, new_C):
    place = jnp.where(reports_C, who_C, old.shape[0])
    return old.at[place].set(new_C, mode='drop')

  return jax.tree.map(write, memory, new)


def federated_round(
  rules: Rules,
  base: PyTree,
  state: ServerState,
  cohort: Cohort,
  hyper: Hyperparameters,
) -> tuple[ServerState, dict[str, Array]]:
  """Returns the next state and the round's metrics.

  Clients that are padding (no examples) or do not report change nothing; what
  nobody trained keeps the server's value.
  """
  base = lora.fold(base, state.residual)
  reports_C = _reports(state, cohort, hyper)
  num_examples_C = jnp.where(reports_C, cohort.num_examples, 0)
  recalled = jax.tree.map(
    lambda x: x.at[cohort.client_id].get(mode='clip'), state.memory
  )

  # 1. Truncate, and 2. train and self-prune, every client for itself.
  share_C = _shares(rules, num_examples_C)
  change, (updates, memory, rank_CG, loss_C, tokens_C, sound_C) = client.each(
    functools.partial(client.take_part, rules, base, state, hyper),
    client.Client(
      id=cohort.client_id,
      num_examples=num_examples_C,
      share=share_C,
      memory=recalled,
      batches=cohort.batches,
    ),
    rules.clients_at_once,
  )

  # What is not finite is not sent.
  nonfinite_C = reports_C & ~sound_C
  reports_C &= sound_C
  change, share_C = _without(change, share_C, sound_C)

  # 3. Weigh and aggregate; the server steps along the pseudo-gradient.
  weights = rules.weigh(updates.num_examples, updates.mask, updates.norm)
  now = client.global_adapters(rules, state, hyper)
  error, error_share = aggregation.averaging_error(updates, weights, now)
  stepped, opt_state = server.step(
    rules, state, now, hyper,
    Trained(
      rules.aggregate(updates, weights, now),
      jax.tree.map(jnp.add, state.residual, change) if change else {},
    ),
    updates.owned(),
    reports_C.any(),
  )  # fmt: skip
  new = rules.redistribute(stepped.adapters, error, now, hyper)

  def if_anybody(new, old):
    return jax.tree.map(lambda n, o: jnp.where(reports_C.any(), n, o), new, old)

  residual = lora.add(state.residual | stepped.change, new.fold)
  new_state = ServerState(
    round=state.round + 1,
    adapters=if_anybody(new.adapters, state.adapters),
    residual=if_anybody(residual, state.residual),
    opt_state=opt_state,
    memory=_remember(state.memory, memory, cohort.client_id, reports_C),
  )
  return new_state, diagnostics.measure(new_state, weights, share_C, now.scale) | {
    'present': cohort.num_examples > 0,
    'reports': reports_C,
    'nonfinite': nonfinite_C,
    'sent_rank': recalled.rank,
    'rank': rank_CG,
    'loss_sum': loss_C,
    'tokens': tokens_C,
    'aggregation_error': error_share,
    'fold_rank': new.fold_rank,
  }
