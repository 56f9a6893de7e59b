"""The defaults: HetLoRA as its paper runs it. Start from these.

Every field is declared, with its meaning, in hetlora_jax/config.py; `--print_config`
shows them all. Other files here change some of them; flags (`--config.seed=1`) change
any.
"""

import ml_collections

from hetlora_jax import config


def get_config() -> ml_collections.ConfigDict:
  """Returns every field at its default."""
  return config.default_config()
