"""The configuration of an earlier run: what programs take without --config."""

import ml_collections

from hetlora_jax import config
from hetlora_jax.fields import flat
from hetlora_jax.run import Run


def get_config(workdir: str) -> ml_collections.ConfigDict:
  """Returns the fields of the run in a folder, which flags may change."""
  raw = config.default_config()
  # Unchecked: modules of --import are not there yet while flags are parsed.
  raw.update_from_flattened_dict(flat(config.to_dict(Run(workdir).unchecked)))
  return raw
