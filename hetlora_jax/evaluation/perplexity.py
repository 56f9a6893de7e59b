"""Perplexity a target token, of people seen in training and of others."""

import jax

from hetlora_jax import client, lora, prng
from hetlora_jax.types import Array, Cohort, Hyperparameters, Rules, ServerState


def person_losses(
  rules: Rules,
  own: bool,
  base,
  state: ServerState,
  cohort: Cohort,
  hyper: Hyperparameters,
) -> tuple[Array, Array]:
  """Returns summed losses and token counts of each person: [E], [E].

  Args:
    rules: the method's.
    own: whether each person gets what a round would send to them, with the
      factors that they keep to themselves (rather than the server's adapters,
      whole).
    base: frozen parameters.
    state: the server's.
    cohort: an evaluation set; `batches` [E, 1, ...].
    hyper: hyper-parameters.
  """
  base = lora.fold(base, state.residual)
  server = client.global_adapters(rules, state, hyper)

  def one_person(person):
    client_id, batches = person
    adapters, scale = server
    if own:
      memory = jax.tree.map(
        lambda x: x.at[client_id].get(mode='clip'), state.memory
      )
      key = prng.stream(hyper.seed, 'client', state.round, client_id)
      view, _ = client.receive(rules, server, memory, hyper, key)
      adapters, scale = view.adapters, view.scale
    batch = jax.tree.map(lambda x: x[0], batches)
    return rules.loss(base, adapters, scale, batch)

  return jax.lax.map(one_person, (cohort.client_id, cohort.batches))


def make_evaluate(rules: Rules, own: bool):
  """Returns (base, state, cohort, hyper) -> mean loss a token, jitted."""

  @jax.jit
  def evaluate(base, state, cohort, hyper):
    total_E, count_E = person_losses(rules, own, base, state, cohort, hyper)
    return total_E.sum() / count_E.sum()

  return evaluate
