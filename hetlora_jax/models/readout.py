"""What is computed from the decoder's last hidden states: the loss, or log p."""

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
  config: decoder.DecoderConfig, dtype, remat: bool, chunk_size: int | None = None
) -> Loss:
  """Returns the clients' task: the summed loss at targets, and their count.

  `chunk_size` is that of `kernels.linear_cross_entropy`.
  """
  at_targets = _make_at_targets(config, dtype, remat)

  def loss(base, adapters, scale, batch: Batch):
    h_MD, embed = at_targets(base, adapters, scale, batch)
    total = kernels.linear_cross_entropy(
      h_MD, embed, batch.target, batch.weight, chunk_size, config.logit_softcap
    )
    return total, batch.weight.sum()

  return loss


def make_nats(config: decoder.DecoderConfig, dtype, chunk_size: int | None = None):
  """Returns (base, adapters, scale, batch) -> the loss of each target, [M]."""
  at_targets = _make_at_targets(config, dtype, remat=False)

  def nats(base, adapters, scale, batch: Batch):
    h_MD, embed = at_targets(base, adapters, scale, batch)
    return kernels.cross_entropies(
      h_MD, embed, batch.target, chunk_size, config.logit_softcap
    )

  return nats


def make_argmax_and_log_prob(config: decoder.DecoderConfig, dtype):
  """Returns (base, adapters, scale, batch) -> top tokens [M] and log p [M].

  Both at the batch's targets, each given the true text before it (teacher
  forcing): the most likely token there, and log p of the target.
  """
  at_targets = _make_at_targets(config, dtype, remat=False)

  def argmax_and_log_prob(base, adapters, scale, batch: Batch):
    h_MD, embed = at_targets(base, adapters, scale, batch)
    return kernels.argmax_and_log_prob(
      h_MD, embed, batch.target, softcap=config.logit_softcap
    )

  return argmax_and_log_prob
