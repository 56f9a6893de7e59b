"""From the aggregate to the server's adapters.

Redistribute = (aggregated, adapters, owned) -> adapters, where `owned`
(target -> [L, R]) marks the slots that somebody trained this round.
"""

from hetlora_jax import lora
from hetlora_jax.types import Adapters, Masks


def keep(aggregated: Adapters, adapters: Adapters, owned: Masks) -> Adapters:
  """Takes the aggregate; a slot that nobody trained keeps the server's value.

  Averaging zeros into such a slot would end it: with both factors zero, its
  gradients are zero for ever.
  """
  return lora.select(owned, aggregated, adapters)


TABLE = {'keep': keep}
