"""The params tree of a decoder, filled from any checkpoint format."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  # numpy learns bfloat16 from it
import numpy as np

from hetlora_jax import files
from hetlora_jax.models import decoder
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.types import PyTree

AGAIN = 'fetch the whole model again'
MOST_LAYERS = 10_000
NONE_IS_ZERO = ('rope_base_local', 'attention_softcap', 'logit_softcap')
LARGEST = 1e30  # weight; beyond it bits have flipped, and bfloat16 may overflow
GEMMA_LOCAL_BASE = 1e4  # of Gemma 3, where a checkpoint does not say so
# What follows from a model's family, where it is not as in Llama. `plus_one`: the
# family's norm weights lack a 1 on Hugging Face.
_GEMMA = dict(plus_one=True, post_norms=True, embed_scale=True, activation='gelu')
FAMILIES: dict[str, dict[str, Any]] = {
  'gemma2': _GEMMA | dict(global_every=2),
  'gemma3': _GEMMA | dict(global_every=6, qk_norm=True),
  'llama': {},
  'mistral': {},
  'phi3': {},
  'qwen2': dict(biases=('q', 'k', 'v')),
  'qwen3': dict(qk_norm=True),
  'smollm3': {},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """An open checkpoint: what is in it and how to read one tensor.

  `names` maps a leaf to its tensor, with {} for the layer; `tensors` are those
  that are there. `read` returns a tensor as stored (matrices [d_out, d_in]) and
  raises ValueError if it cannot; `repair(leaf, tensor)` undoes what the format
  did to the values.
  """

  path: pathlib.Path
  config: decoder.DecoderConfig
  names: Mapping[str, str]
  tensors: Collection[str]
  read: Callable[[str], np.ndarray]
  repair: Callable[[str, np.ndarray], np.ndarray]
  tokenizer: Tokenizer


def family_fields(family: str) -> dict[str, Any]:
  """Returns the fields of a DecoderConfig that follow from the model's family."""
  usual = dict(qk_norm=False, post_norms=False, embed_scale=False)
  usual |= dict(activation='silu', global_every=1, family=family)
  return usual | {k: x for k, x in FAMILIES[family].items() if k != 'plus_one'}


def windows(window: int | None, windowed: Sequence[bool], every: int) -> dict[str, Any]:
  """Returns the fields that say which layers have a sliding window.

  Args:
    window: tokens; None or 0 for none.
    windowed: the layers that have it.
    every: one layer of so many is without it in this family.
  """
  fields: dict[str, Any] = dict(sliding_window=window or 0, global_every=every)
  regular = [layer % every != 0 for layer in range(1, len(windowed) + 1)]
  if window and list(windowed) != regular:
    fields['windowed_layers'] = tuple(windowed)
  return fields


def check_config(path: pathlib.Path, c: decoder.DecoderConfig, remedy: str) -> None:
  """Raises Damaged if no model has these sizes."""
  of_kind = {
    'int': lambda value: type(value) is int and 0 <= value < 2**31,
    'float': is_positive,
    'bool': lambda value: type(value) is bool,
  }
  for name, kind in decoder.DecoderConfig.__annotations__.items():
    value = getattr(c, name)
    none = name in NONE_IS_ZERO and value == 0
    if kind in of_kind and not none and not of_kind[kind](value):
      raise files.damaged(path, f'{name} is {value!r}', remedy)
  sizes = (c.vocab_size, c.num_layers, c.width, c.num_heads, c.num_kv_heads)
  sizes += (c.head_dim, c.mlp_width, c.global_every)
  if not all(sizes) or c.num_layers > MOST_LAYERS or c.head_dim % 2:
    raise files.damaged(path, f'sizes {sizes}', remedy)
  if c.num_heads % c.num_kv_heads:
    why = f'{c.num_kv_heads} key heads do not divide {c.num_heads} heads'
    raise files.damaged(path, why, remedy)
  _check_rope(path, c, remedy)


def _check_rope(path: pathlib.Path, c: decoder.DecoderConfig, remedy: str) -> None:
  """Raises Damaged if positions cannot be rotated so."""
  dim = c.rotary_dim or c.head_dim
  if dim % 2 or dim > c.head_dim:
    raise files.damaged(path, f'{dim} of {c.head_dim} coordinates rotate', remedy)
  for name, value in c.rope_scaling:
    several = isinstance(value, tuple)
    numbers = value if several else (value,)
    if not all(map(is_positive, numbers)) or len(numbers) != (
      dim // 2 if several else 1
    ):
      what = f'RoPE scaling {name} {files.short(value)} for {dim // 2} waves'
      raise files.damaged(path, what, remedy)
  for name in ('windowed_layers', 'rotated_layers'):
    if len(getattr(c, name)) not in (0, c.num_layers):
      why = f'{name} has {len(getattr(c, name))} of {c.num_layers} layers'
      raise files.damaged(path, why, remedy)


def is_positive(value: Any) -> bool:
  """Tells whether a file holds a number above 0 that float32 holds too."""
  return type(value) in (int, float) and 0 < value < LARGEST


def is_finite(tensor: np.ndarray) -> bool:
  """Tells whether weights are there and none is NaN, infinite or beyond LARGEST."""
  # No comparison holds of a NaN; float16 has no LARGEST to compare with.
  return bool(
    tensor.size and -LARGEST < float(tensor.min()) and float(tensor.max()) < LARGEST
  )


def check_tokenizer(
  path: pathlib.Path, config: decoder.DecoderConfig, tokenizer: Tokenizer
) -> None:
  """Raises ValueError if the tokenizer has ids that the model has not.

  Gemma 3's names one more, for images, than its text models have.
  """
  special = (tokenizer.bos_id or 0, tokenizer.eos_id, tokenizer.pad_id)
  fits = all(type(i) is int and 0 <= i < config.vocab_size for i in special)
  if not fits or tokenizer.vocab_size > config.vocab_size + 1:
    raise ValueError(
      f'{path} has a tokenizer of {tokenizer.vocab_size} words with special '
      f'ids {files.short(special)}, but a model of {config.vocab_size} words: '
      'take both from one model.'
    )


def assemble(checkpoint: Checkpoint, dtype: np.dtype) -> PyTree:
  """Reads every tensor and stacks the layers on axis 0."""
  _check_number_of_layers(checkpoint)
  tree: dict = {
    leaf: _fetch(checkpoint, leaf, shape).astype(dtype)
    for leaf, shape in _outer_shapes(checkpoint.config).items()
  }
  tree['layers'] = {
    leaf: _stack(checkpoint, leaf, shape, dtype)
    for leaf, shape in _layer_shapes(checkpoint.config).items()
  }
  return tree


def _check_number_of_layers(checkpoint: Checkpoint) -> None:
  """Raises Damaged if there are tensors of layers beyond the last."""
  num_layers = checkpoint.config.num_layers
  surplus = checkpoint.names['q'].format(num_layers)
  if surplus in checkpoint.tensors:
    why = f'it has a tensor {surplus}, but {num_layers} layers by its configuration'
    raise files.damaged(checkpoint.path, why, AGAIN)


def _outer_shapes(c: decoder.DecoderConfig) -> dict[str, tuple[int, ...]]:
  shapes = {'embed': (c.vocab_size, c.width), 'final_norm': (c.width,)}
  if not c.tied_embeddings:
    shapes['head'] = (c.vocab_size, c.width)
  return shapes


def _layer_shapes(c: decoder.DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes as stored: matrices are [d_out, d_in]."""
  dims, norms = decoder.matrix_dims(c), ['attention_norm', 'mlp_norm']
  if c.post_norms:
    norms += ['post_attention_norm', 'post_mlp_norm']
  head_norms = ['q_norm', 'k_norm'] if c.qk_norm else []
  return {
    **{m: (d_out, d_in) for m, (d_in, d_out) in dims.items()},
    **{f'{m}_bias': dims[m][1:] for m in c.biases},
    **dict.fromkeys(norms, (c.width,)),
    **dict.fromkeys(head_norms, (c.head_dim,)),
  }


def _stack(
  checkpoint: Checkpoint, leaf: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
  num_layers = checkpoint.config.num_layers
  for layer in range(num_layers):  # before memory is taken for all
    _find(checkpoint, leaf, layer)
  stacked = np.empty((num_layers, *reversed(shape)), dtype)
  for layer in range(num_layers):
    stacked[layer] = _fetch(checkpoint, leaf, shape, layer).T
  return stacked


def _fetch(
  checkpoint: Checkpoint, leaf: str, shape: tuple[int, ...], layer: int = 0
) -> np.ndarray:
  name = _find(checkpoint, leaf, layer)
  tensor = checkpoint.read(name)
  # Matrices of one name are one tensor, in their order.
  dims = decoder.matrix_dims(checkpoint.config)
  together = [m for m in dims if checkpoint.names[m] == checkpoint.names[leaf]]
  rows = {m: dims[m][1] for m in together} or {leaf: shape[0]}
  want = (sum(rows.values()), *shape[1:])
  if tensor.shape != want:
    why = f'{name} has shape {tensor.shape}, want {want} by its configuration'
    raise files.damaged(checkpoint.path, why, AGAIN)
  if len(rows) > 1:
    start = sum(rows[m] for m in together[: together.index(leaf)])
    tensor = tensor[start : start + rows[leaf]]
  if not is_finite(tensor):
    why = f'{name} has weights that are not finite'
    raise files.damaged(checkpoint.path, why, AGAIN)
  return checkpoint.repair(leaf, tensor)


def _find(checkpoint: Checkpoint, leaf: str, layer: int) -> str:
  """Returns the name of a leaf's tensor."""
  name = checkpoint.names[leaf].format(layer)
  if name not in checkpoint.tensors:
    if leaf == 'head':
      why = f'it lacks {name}, and its configuration ties no embedding to the output'
      remedy = f'say tie_word_embeddings if the model does, or {AGAIN}'
      raise files.damaged(checkpoint.path, why, remedy)
    raise files.damaged(checkpoint.path, f'it lacks the tensor {name}', AGAIN)
  return name
