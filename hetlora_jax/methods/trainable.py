"""Which factors a client trains in a round.

Trainable = (round, masks) -> target -> Lora of 0/1 masks, [L, 1, R] and
[L, R, 1]; `masks` are the slots that a client owns. Slots beyond a client's
rank cannot train under any rule, being zero in both factors.
"""

import jax
import jax.numpy as jnp

from hetlora_jax import lora
from hetlora_jax.methods.registry import declare, rule
from hetlora_jax.types import Adapters, Array, Lora, Masks


@rule('trainable', traffic=lambda round: 'ab')
def both(round: Array, masks: Masks) -> Adapters:
  """Trains both factors of all slots received."""
  del round
  return lora.slot_masks(jax.tree.map(jnp.ones_like, masks))


@rule('trainable', traffic=lambda round: 'ab')
def mask(round: Array, masks: Masks) -> Adapters:
  """Trains the slots that the client owns (Fed-PLoRA, arXiv 2602.16936)."""
  del round
  return lora.slot_masks(masks)


@rule('trainable', traits=['fixed A'], traffic=lambda round: 'b')
def b_only(round: Array, masks: Masks) -> Adapters:
  """Keeps A as it was drawn (FFA-LoRA, arXiv 2403.12313)."""
  return {t: Lora(0 * x.a, x.b) for t, x in both(round, masks).items()}


@rule('trainable', traffic=lambda round: 'ba'[round % 2])
def alternating(round: Array, masks: Masks) -> Adapters:
  """Trains B in rounds 0, 2, ... and A in the others (RoLoRA, 2409.02346).

  B goes first: while it is zero, A has no gradient.
  """
  odd = (round % 2).astype(jnp.float32)
  trained = both(round, masks)
  return {t: Lora(odd * x.a, (1 - odd) * x.b) for t, x in trained.items()}


# Full fine-tuning (FedAvg; McMahan et al., 2017, arXiv 1602.05629).
declare(
  'trainable',
  'base',
  both,
  traits=['trains base'],
  needs={
    'all slots': 'full fine-tuning sends all of the model',
    'weighted': 'the changes of the base are averaged as they come in',
  },
  excludes={
    'norms': 'full fine-tuning has no adapters to take norms of',
    'own ranks': 'full fine-tuning has no ranks',
    'own factors': 'full fine-tuning has no factors',
  },
  traffic=lambda round: 'ab',
)
