"""What a client is sent. Distribute = (adapters, masks, scale, key) -> ..."""

from hetlora_jax import lora
from hetlora_jax.types import Adapters, Array, Masks


def prefix(adapters: Adapters, masks: Masks, key: Array) -> Adapters:
  """Truncates to the client's rank (HetLoRA; Cho et al., 2024, 2401.06432)."""
  del key
  return lora.truncate(adapters, masks)


TABLE = {'prefix': prefix}
