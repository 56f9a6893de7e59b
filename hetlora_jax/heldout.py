"""Losses on held-out examples, of people seen in training and of others."""

import jax

from hetlora_jax import client, lora, sharding
from hetlora_jax.types import Array, Cohort, Hyperparameters, Rules, ServerState

# That a device evaluates at once. One after the other would read the whole model
# for each; more than 8 gains little (`python -m benchmarks.evaluation`).
PEOPLE_AT_ONCE = 8


def losses(
  rules: Rules,
  own: bool,
  at_once: int,
  base,
  state: ServerState,
  cohort: Cohort,
  hyper: Hyperparameters,
) -> tuple[Array, Array]:
  """Returns everybody's summed loss and token count: [E] each.

  Args:
    rules: the method's.
    own: whether each person gets what a round would send to them, with the
      factors that they keep to themselves (rather than the server's adapters,
      whole).
    at_once: how many people are evaluated at once, a divisor of E.
    base: frozen parameters.
    state: the server's.
    cohort: an evaluation set; `batches` [E, 1, ...].
    hyper: hyper-parameters.
  """
  base = lora.fold(base, state.residual)
  server = client.global_adapters(rules, state, hyper)

  def one_person(person: Cohort):
    adapters, scale = server
    if own:
      view = client.sent_to(rules, state, hyper, person.client_id)
      adapters, scale = view.adapters, view.scale
    batch = jax.tree.map(lambda x: x[0], person.batches)
    return (), rules.loss(base, adapters, scale, batch)

  _, (loss_E, tokens_E) = client.each(one_person, cohort, at_once)
  return loss_E, tokens_E


def people_at_once(people: int, devices: int) -> int:
  """Returns how many are evaluated at once; to a multiple of it sets are filled."""
  return sharding.chunks(people, PEOPLE_AT_ONCE, devices)[0]
