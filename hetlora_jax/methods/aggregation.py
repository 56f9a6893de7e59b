"""How the clients' adapters become one. Aggregate = (updates, weights) -> ..."""

import jax.numpy as jnp

from hetlora_jax.types import Adapters, ClientUpdates, Lora, Masks


def factors(updates: ClientUpdates, weights: Masks) -> Adapters:
  """Averages A and B apart, zero-padded to R (HetLoRA, arXiv 2401.06432)."""
  return {
    t: Lora(
      jnp.einsum('cldr,clr->ldr', x.a, weights[t]),
      jnp.einsum('clrd,clr->lrd', x.b, weights[t]),
    )
    for t, x in updates.adapters.items()
  }


TABLE = {'factors': factors}
