"""What a client receives.

Distribute = (adapters, masks, scale, key) -> View, where `masks` mark the first
r slots of a client of rank r, and `scale` is its LoRA scale.
"""

import jax
import jax.numpy as jnp

from hetlora_jax import lora
from hetlora_jax.methods.registry import rule
from hetlora_jax.types import Adapters, Array, Masks, View


def _own_ranks(rank_CM, r_max):
  del r_max
  return rank_CM


def _all_slots(rank_CM, r_max):
  return 0 * rank_CM + r_max


@rule('distribution', traits=['prefixes', 'truncates'], traffic=_own_ranks)
def prefix(adapters: Adapters, masks: Masks, scale: Array, key: Array) -> View:
  """Truncates to the client's rank (HetLoRA; Cho et al., 2024, 2401.06432)."""
  del key
  return View(lora.truncate(adapters, masks), masks, scale)


@rule('distribution', traits=['prefixes', 'all slots'], traffic=_own_ranks)
def full(adapters: Adapters, masks: Masks, scale: Array, key: Array) -> View:
  """Gives everybody every slot: homogeneous LoRA of rank R."""
  del key
  return View(adapters, jax.tree.map(jnp.ones_like, masks), scale)


def _choose(masks: Masks, key: Array) -> Masks:
  """Draws as many slots as each mask has, evenly and without replacement."""
  chosen = {}
  for i, (t, mask) in enumerate(sorted(masks.items())):
    draw = jax.random.uniform(jax.random.fold_in(key, i), mask.shape)
    place = draw.argsort(-1).argsort(-1)
    chosen[t] = (place < mask.sum(-1, keepdims=True)).astype(mask.dtype)
  return chosen


@rule('distribution', traffic=_all_slots)
def random_mask(adapters: Adapters, masks: Masks, scale: Array, key: Array) -> View:
  """Gives every slot, r of them at random to train (Fed-PLoRA, 2602.16936).

  The others serve in the forward pass, which equals folding them into the base.
  """
  return View(adapters, _choose(masks, key), scale)


@rule('distribution', traffic=_own_ranks)
def sketch(adapters: Adapters, masks: Masks, scale: Array, key: Array) -> View:
  """Gives r random slots, scaled by R / r (FSLoRA, arXiv 2501.19389)."""
  chosen = _choose(masks, key)
  slots = jnp.concatenate([m.reshape(-1) for m in chosen.values()])
  return View(lora.truncate(adapters, chosen), chosen, scale / slots.mean())


@rule(
  'distribution',
  traits=['fresh factors'],
  needs={'product space': 'clients that draw their own A have no factors in common'},
  traffic=lambda rank_CM, r_max: 0 * rank_CM,
)
def reinit(
  adapters: Adapters, masks: Masks, scale: Array, key: Array, *, init: str
) -> View:
  """Draws fresh adapters of rank r, with B = 0 (FLoRA, arXiv 2409.05976)."""
  dims = {t: (*x.a.shape[:-1], x.b.shape[-1]) for t, x in adapters.items()}
  slots = next(iter(masks.values())).shape[-1]
  fresh = lora.init(key, dims, slots, init)
  return View(lora.truncate(fresh, masks), masks, scale)
