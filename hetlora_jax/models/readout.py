"""What is read off a decoder's last layer: a loss, a judgement, log p."""

import jax
import jax.numpy as jnp

from hetlora_jax.models import decoder, kernels
from hetlora_jax.types import Batch, Loss


def _make_at_targets(config: decoder.DecoderConfig, dtype, remat: bool):
  """Returns (base, adapters, scale, batch) -> h [M, D] at targets, head [V, D]."""
  hidden = decoder.make_hidden(config, dtype, remat)

  def at_targets(base, adapters, scale, batch: Batch):
    h = hidden(base, adapters, scale, batch.tokens, batch.segment, batch.position)
    h_MD = h.reshape(-1, h.shape[-1])[batch.target_index]
    return h_MD, decoder.head(config, base).astype(dtype)

  return at_targets


def make_loss(
  config: decoder.DecoderConfig, dtype, remat: bool, words: int = 0
) -> Loss:
  """Returns the task: the summed loss at target positions, and their count.

  `words` are those of `kernels.linear_cross_entropy`.
  """
  at_targets = _make_at_targets(config, dtype, remat)

  def loss(base, adapters, scale, batch: Batch):
    h_MD, embed = at_targets(base, adapters, scale, batch)
    total = kernels.linear_cross_entropy(h_MD, embed, batch.target, batch.weight, words)
    return total, batch.weight.sum()

  return loss


def make_judge(config: decoder.DecoderConfig, dtype):
  """Returns (base, adapters, scale, batch) -> what is said at its targets.

  The likeliest token there and log p of the target, given the true text: [M].
  """
  at_targets = _make_at_targets(config, dtype, remat=False)

  def judge(base, adapters, scale, batch: Batch):
    h_MD, embed = at_targets(base, adapters, scale, batch)
    return kernels.judge_words(h_MD, embed, batch.target)

  return judge


def make_log_probs(config: decoder.DecoderConfig, dtype):
  """Returns a function of `hidden`'s arguments to log p [P, T, V], float32."""
  hidden = decoder.make_hidden(config, dtype, remat=False)

  def log_probs(base, *args):
    embed = decoder.head(config, base).astype(dtype)
    logit = jnp.einsum(
      'ptd,vd->ptv', hidden(base, *args), embed,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jax.nn.log_softmax(logit)

  return log_probs
