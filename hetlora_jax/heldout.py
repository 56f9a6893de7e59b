"""Losses on held-out examples, of people seen in training and of others."""

from collections.abc import Callable

import jax

from hetlora_jax import client, lora, sharding
from hetlora_jax.types import (
  Array,
  Batch,
  Cohort,
  Hyperparameters,
  Loss,
  Rules,
  ServerState,
)

# That a device evaluates at once. One after the other would read the whole model
# for each; more than 8 gains little (`python -m benchmarks.evaluation`).
PEOPLE_AT_ONCE = 8


def losses(loss: Loss) -> Callable:
  """Makes a task what `of_people` asks: the summed loss, and the token count."""

  def judge(base, adapters, scale, batches: Batch):
    return loss(base, adapters, scale, jax.tree.map(lambda x: x[0], batches))

  return judge


def label_losses(nats: Callable, num_examples: int) -> Callable:
  """Makes the losses at targets what `of_people` asks in a task with labels.

  Args:
    nats: of a BaseModel.
    num_examples: of a person, at most.

  Returns:
    A function to the summed loss and the tokens of each label in place of each
    example's target: [labels, examples] each.
  """

  def of_label(base, adapters, scale, batch: Batch):
    of_target = nats(base, adapters, scale, batch) * batch.weight, batch.weight
    # A row's segments count a batch's examples from 1.
    example_M = batch.segment.reshape(-1)[batch.target_index] - 1
    return tuple(
      jax.ops.segment_sum(x, example_M, num_segments=num_examples) for x in of_target
    )

  def judge(base, adapters, scale, batches: Batch):
    return jax.lax.map(lambda x: of_label(base, adapters, scale, x), batches)

  return judge


def of_people(
  judge: Callable,
  rules: Rules,
  own: bool,
  at_once: int,
  base,
  state: ServerState,
  cohort: Cohort,
  hyper: Hyperparameters,
) -> tuple[Array, Array]:
  """Returns everybody's losses and token counts: [E, ...] each.

  Args:
    judge: (base, adapters, scale, a person's batches) -> both of that person.
    rules: the method's.
    own: whether each person gets what a round would send to them, with the
      factors that they keep to themselves (rather than the server's adapters,
      whole).
    at_once: how many people are evaluated at once, a divisor of E.
    base: frozen parameters.
    state: the server's.
    cohort: an evaluation set; `batches` [E, batches of a person, ...].
    hyper: hyper-parameters.
  """
  base = lora.fold(base, state.residual)
  server = client.global_adapters(rules, state, hyper)

  def one_person(person: Cohort):
    adapters, scale = server
    if own:
      view = client.sent_to(rules, state, hyper, person.client_id)
      adapters, scale = view.adapters, view.scale
    return (), judge(base, adapters, scale, person.batches)

  _, found = client.each(one_person, cohort, at_once)
  return found


def people_at_once(people: int, devices: int) -> int:
  """Returns how many are evaluated at once; to a multiple of it sets are filled."""
  return sharding.chunks(people, PEOPLE_AT_ONCE, devices)[0]
