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
)


def _reports(state: ServerState, cohort: Cohort, hyper: Hyperparameters) -> Array:
  """Draws who reports: not padding, nor those that drop out mid-round."""
  keys = jax.vmap(lambda i: prng.stream(hyper.seed, 'dropout', state.round, i))(
    cohort.client_id
  )
  stays = jax.vmap(jax.random.uniform)(keys) >= hyper.dropout
  return (cohort.num_examples > 0) & stays


def _remember(memory: Memory, new: Memory, who_C: Array, reports_C: Array) -> Memory:
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
  measure: Array | bool = True,
) -> tuple[ServerState, dict[str, Array]]:
  """Returns the next state and the round's metrics.

  Clients that are padding (no examples) or do not report change nothing; what nobody
  trained keeps the server's value. With `measure`, the error of averaging factors is
  among the metrics, which costs a product of every matrix; else it is NaN.
  """
  base = lora.fold(base, rules.wire.base_down(state.residual))
  reports_C = _reports(state, cohort, hyper)

  # 1. Distribute by truncation, and 2. train and self-prune, each client for itself.
  found, base_change, share_C = client.train(
    rules, base, state, cohort, hyper, reports_C
  )
  nonfinite_C = reports_C & ~found.finite  # not sent
  reports_C &= found.finite

  # 3. Weigh and aggregate; the server steps along the pseudo-gradient.
  updates, now = found.updates, client.global_adapters(rules, state, hyper)
  weights = rules.weigh(updates.num_examples, updates.mask, updates.norm)
  error = functools.partial(aggregation.averaging_error, updates, weights, now)
  stepped, opt_state = server.step(
    rules, state, now, hyper, rules.aggregate(updates, weights, now), base_change,
    updates.owned(), reports_C.any(),
  )  # fmt: skip
  new = rules.redistribute(stepped.adapters, lambda: error()[0], now, hyper)

  def if_anybody(new, old):
    return jax.tree.map(lambda n, o: jnp.where(reports_C.any(), n, o), new, old)

  residual = lora.add(state.residual | stepped.change, new.fold)
  new_state = ServerState(
    round=state.round + 1,
    adapters=if_anybody(new.adapters, state.adapters),
    residual=if_anybody(residual, state.residual),
    opt_state=opt_state,
    memory=_remember(state.memory, found.memory, cohort.client_id, reports_C),
  )
  return new_state, diagnostics.measure(new_state, weights, share_C, now.scale) | {
    'present': cohort.num_examples > 0,
    'reports': reports_C,
    'nonfinite': nonfinite_C,
    'sent_rank': client.recall(state, cohort.client_id).rank,
    'rank': found.rank,
    'loss_sum': found.loss,
    'tokens': found.tokens,
    'aggregation_error': diagnostics.if_asked(measure, lambda: error()[1]),
    'fold_rank': new.fold_rank,
  }
