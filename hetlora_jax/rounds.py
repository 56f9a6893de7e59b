"""One federated round, top to bottom: start reading here.

HetLoRA (Cho, Liu, Xu, Fahrezi, Joshi, 2024, arXiv 2401.06432) in its three
steps; every other method changes rules, never this function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from hetlora_jax import lora, prng, ranks
from hetlora_jax.types import (
  Array,
  ClientUpdates,
  Cohort,
  Hyperparameters,
  PyTree,
  ServerState,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """The static choices of a run: pure functions, closed over by the round."""

  scale: Callable  # (rank [G], hyper) -> []
  distribute: Callable  # (adapters, masks, key) -> adapters
  local_update: Callable  # client.local_update, its first arguments bound
  tail_norms: Callable  # (adapters, rank [G], gamma) -> target -> [L]
  prune: Callable  # (before [G], trained, rank [G], hyper) -> rank [G]
  prune_against: str  # 'received' or 'last_trained'
  keep_pruned_rank: bool  # in later rounds too
  weigh: Callable  # (num_examples [C], masks, norms) -> weights
  aggregate: Callable  # (updates, weights) -> aggregated
  redistribute: Callable  # (aggregated, adapters, owned) -> adapters
  server_optimizer: Callable  # (learning rate) -> GradientTransformation
  clients_at_once: int  # the memory dial; 0 is all of them


def _train(rules: Rules, base, hyper, state: ServerState, client):
  """Runs one client's round: receive, train, prune."""
  client_id, rank_G, tail_G, batches = client
  key = prng.stream(hyper.seed, 'client', state.round, client_id)
  scale = rules.scale(rank_G, hyper)
  sent = rules.distribute(
    state.adapters, ranks.masks(rank_G, state.adapters), key
  )
  trained, loss, tokens = rules.local_update(
    base, sent, rank_G, scale, batches, hyper
  )
  groups = rank_G.shape[0]
  if rules.prune_against == 'received':
    sizes = rules.tail_norms(sent, rank_G, hyper.gamma)
    tail_G = ranks.gather(sizes, groups)
  rank_G = rules.prune(tail_G, trained, rank_G, hyper)
  mask = ranks.masks(rank_G, trained)
  trained = lora.truncate(trained, mask)
  tail_G = ranks.gather(rules.tail_norms(trained, rank_G, hyper.gamma), groups)
  norm = lora.delta_norms(trained, scale)
  return trained, mask, scale, norm, rank_G, tail_G, loss, tokens


def federated_round(
  rules: Rules,
  base: PyTree,
  state: ServerState,
  cohort: Cohort,
  hyper: Hyperparameters,
) -> tuple[ServerState, dict[str, Array]]:
  """Returns the next state and the round's metrics.

  Padding clients (no examples) change nothing; a slot that no client trains
  keeps the server's value.
  """
  who_C, present_C = cohort.client_id, cohort.num_examples > 0
  sent_rank_CG = state.rank.at[who_C].get(mode='clip')
  tail_CG = state.tail_norm.at[who_C].get(mode='clip')

  # 1. Truncate, and 2. train and self-prune, every client for itself.
  one_client = functools.partial(_train, rules, base, hyper, state)
  clients = (who_C, sent_rank_CG, tail_CG, cohort.batches)
  if rules.clients_at_once:
    trained = jax.lax.map(one_client, clients, batch_size=rules.clients_at_once)
  else:
    trained = jax.vmap(one_client)(clients)
  adapters, mask, scale_C, norm, rank_CG, tail_CG, loss_C, tokens_C = trained

  # 3. Weigh and aggregate; the server steps along the pseudo-gradient.
  updates = ClientUpdates(
    adapters=adapters,
    mask=mask,
    scale=scale_C,
    num_examples=cohort.num_examples,
    norm=norm,
  )
  weights = rules.weigh(updates.num_examples, updates.mask, updates.norm)
  owned = {t: (m * present_C[:, None, None]).max(0) for t, m in mask.items()}
  target = rules.redistribute(
    rules.aggregate(updates, weights), state.adapters, owned
  )
  pseudo_gradient = jax.tree.map(jnp.subtract, state.adapters, target)
  optimizer = rules.server_optimizer(hyper.server_learning_rate)
  step, opt_state = optimizer.update(
    pseudo_gradient, state.opt_state, state.adapters
  )

  def remember(old, new_CG):
    absent = old.shape[0]
    return old.at[jnp.where(present_C, who_C, absent)].set(new_CG, mode='drop')

  new_state = ServerState(
    round=state.round + 1,
    adapters=optax.apply_updates(state.adapters, step),
    opt_state=opt_state,
    rank=remember(state.rank, rank_CG)
    if rules.keep_pruned_rank
    else state.rank,
    tail_norm=remember(state.tail_norm, tail_CG),
  )
  return new_state, {
    'loss_sum': loss_C.sum(),
    'tokens': tokens_C.sum(),
    'present': present_C,
    'sent_rank': sent_rank_CG,
    'rank': rank_CG,
    'rank_mean': new_state.rank.astype(jnp.float32).mean(),
    'rank_min': new_state.rank.min(),
    'rank_max': new_state.rank.max(),
    'weight': {t: w.mean((1, 2)) for t, w in weights.items()},
  }
