"""The decoder, its kernels, shapes and tokenizers."""

import dataclasses

from hetlora_jax.models.decoder import DecoderConfig
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A base model; `params` has layers stacked on axis 0."""

  config: DecoderConfig
  params: PyTree
  fingerprint: str  # SHA-256 of the source, hex
  tokenizer: Tokenizer
  revision: str | None = None  # of a repository of the Hub, the commit
