"""Perplexity a target token, of people seen in training and of others."""

import jax
import jax.numpy as jnp

from hetlora_jax import lora, ranks
from hetlora_jax.types import Array, Cohort, Hyperparameters, Loss, ServerState


def person_losses(
  loss: Loss,
  scale,
  own_rank: bool,
  base,
  state: ServerState,
  cohort: Cohort,
  hyper: Hyperparameters,
) -> tuple[Array, Array]:
  """Returns summed losses and token counts of each person: [E], [E].

  Args:
    loss: the task.
    scale: the rule of the LoRA scale.
    own_rank: whether each person gets the adapter truncated to their own rank
      (rather than the whole one, at r_max).
    base: frozen parameters.
    state: the server's.
    cohort: an evaluation set; `batches` [E, 1, ...].
    hyper: hyper-parameters.
  """
  slots = next(iter(state.adapters.values())).a.shape[-1]
  groups = state.rank.shape[1]
  whole_G = jnp.full((groups,), slots, jnp.int32)

  def one_person(person):
    client_id, batches = person
    rank_G = state.rank.at[client_id].get(mode='clip') if own_rank else whole_G
    masks = ranks.masks(rank_G, state.adapters)
    sent = lora.truncate(state.adapters, masks)
    batch = jax.tree.map(lambda x: x[0], batches)
    return loss(base, sent, scale(rank_G, hyper), batch)

  return jax.lax.map(one_person, (cohort.client_id, cohort.batches))


def make_evaluate(loss: Loss, scale, own_rank: bool):
  """Returns (base, state, cohort, hyper) -> mean loss a token, jitted."""

  @jax.jit
  def evaluate(base, state, cohort, hyper):
    total_E, count_E = person_losses(
      loss, scale, own_rank, base, state, cohort, hyper
    )
    return total_E.sum() / count_E.sum()

  return evaluate
