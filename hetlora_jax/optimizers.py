"""The optimizers of clients and servers, by name, and how rates change."""

import functools
from collections.abc import Callable

import optax

from hetlora_jax.types import Array, Trained

# name -> (steps) -> (step) -> the rate's factor, 1 at first.
SCHEDULES = {
  'constant': lambda steps: optax.constant_schedule(1.0),
  'linear': lambda steps: optax.linear_schedule(1.0, 0.0, steps),
  'cosine': lambda steps: optax.cosine_decay_schedule(1.0, steps),
}

# name -> (learning rate, weight decay) -> GradientTransformation.
CLIENT = {
  'adam': lambda rate, decay: optax.adam(rate),
  'adamw': lambda rate, decay: optax.adamw(rate, weight_decay=decay),
  'sgd': lambda rate, decay: optax.sgd(rate),
}
# name -> (learning rate) -> GradientTransformation, of the pseudo-gradient
# (Reddi et al., 2020, arXiv 2003.00295).
SERVER = {
  'sgd': optax.sgd,
  'momentum': functools.partial(optax.sgd, momentum=0.9),
  'adam': functools.partial(optax.adam, b2=0.99, eps=1e-3),
  'yogi': functools.partial(optax.yogi, b2=0.99),
}


def over_rounds(name: str, rounds: int, warmup: int) -> Callable[[Array], Array]:
  """Returns round -> the factor of the rate: it rises for `warmup` rounds, then falls.

  The first round has 1 / (warmup + 1) of the rate, not nothing; a schedule that falls
  ends at 0 after `rounds`.
  """
  fall = SCHEDULES[name](rounds - warmup)
  if not warmup:
    return fall
  rise = optax.linear_schedule(1 / (warmup + 1), 1.0, warmup)
  return optax.join_schedules([rise, fall], [warmup])


def faster_b(ratio: float) -> optax.GradientTransformation:
  """Multiplies the steps of B (LoRA+: Hayou et al., 2024, arXiv 2402.12354)."""

  def scaled(updates: Trained, params: Trained) -> Trained:
    del params
    adapters = {t: x._replace(b=ratio * x.b) for t, x in updates.adapters.items()}
    return updates._replace(adapters=adapters)

  return optax.stateless(scaled)
