"""The params tree of a decoder, filled from any checkpoint format."""

import dataclasses
from collections.abc import Callable, Mapping

import ml_dtypes  # noqa: F401  # numpy learns bfloat16 from it
import numpy as np

from hetlora_jax.data.tokenizer import Tokenizer
from hetlora_jax.models import decoder
from hetlora_jax.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """An open checkpoint: what is in it and how to read one tensor.

  `names` maps a leaf to its tensor, with {} for the layer. `read` returns a
  tensor as stored (matrices [d_out, d_in]) and raises ValueError if it cannot;
  `repair(leaf, tensor)` undoes what the format did to the values.
  """

  config: decoder.DecoderConfig
  names: Mapping[str, str]
  read: Callable[[str], np.ndarray]
  repair: Callable[[str, np.ndarray], np.ndarray]
  tokenizer: Tokenizer


def assemble(checkpoint: Checkpoint, dtype: np.dtype) -> PyTree:
  """Reads every tensor and stacks the layers on axis 0."""
  tree: dict = {
    leaf: _fetch(checkpoint, leaf, shape).astype(dtype)
    for leaf, shape in _outer_shapes(checkpoint.config).items()
  }
  tree['layers'] = {
    leaf: _stack(checkpoint, leaf, shape, dtype)
    for leaf, shape in _layer_shapes(checkpoint.config).items()
  }
  return tree


def _outer_shapes(c: decoder.DecoderConfig) -> dict[str, tuple[int, ...]]:
  shapes = {'embed': (c.vocab_size, c.width), 'final_norm': (c.width,)}
  if not c.tied_embeddings:
    shapes['head'] = (c.vocab_size, c.width)
  return shapes


def _layer_shapes(c: decoder.DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes as stored: matrices are [d_out, d_in]."""
  norms = ['attention_norm', 'mlp_norm']
  if c.post_norms:
    norms += ['post_attention_norm', 'post_mlp_norm']
  head_norms = ['q_norm', 'k_norm'] if c.qk_norm else []
  return {
    **{m: (d_out, d_in) for m, (d_in, d_out) in decoder.matrix_dims(c).items()},
    **dict.fromkeys(norms, (c.width,)),
    **dict.fromkeys(head_norms, (c.head_dim,)),
  }


def _stack(
  checkpoint: Checkpoint, leaf: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
  num_layers = checkpoint.config.num_layers
  stacked = np.empty((num_layers, *reversed(shape)), dtype)
  for layer in range(num_layers):
    stacked[layer] = _fetch(checkpoint, leaf, shape, layer).T
  return stacked


def _fetch(
  checkpoint: Checkpoint, leaf: str, shape: tuple[int, ...], layer: int = 0
) -> np.ndarray:
  name = checkpoint.names[leaf].format(layer)
  tensor = checkpoint.read(name)
  if tensor.shape != shape:
    raise ValueError(
      f'tensor {name} has shape {tensor.shape}, want {shape}: the weights '
      'and the configuration are of different models.'
    )
  return checkpoint.repair(leaf, tensor)
