"""Log p of every token at every position, from all logits at once."""

import jax
import jax.numpy as jnp

from hetlora_jax.models import decoder, kernels


def make_log_probs(config: decoder.DecoderConfig, dtype):
  """Returns a function of `hidden`'s arguments to log p [P, T, V], float32."""
  hidden = decoder.make_hidden(config, dtype, remat=False)

  def log_probs(base, *args):
    embed = decoder.head(config, base).astype(dtype)
    logit = jnp.einsum(
      'ptd,vd->ptv', hidden(base, *args), embed,
      preferred_element_type=jnp.float32,
    )  # fmt: skip
    return jax.nn.log_softmax(kernels.soft_cap(logit, config.logit_softcap))

  return log_probs
