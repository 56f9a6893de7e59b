"""Reads GGUF files, the format of llama.cpp, of the two families."""

import pathlib
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np

from hetlora_jax import files
from hetlora_jax.formats import gguf_file, layout
from hetlora_jax.models.decoder import DecoderConfig
from hetlora_jax.models.tokenizer import Tokenizer

FAMILIES = ('gemma3', 'llama')
NAMES = {
  'embed': 'token_embd.weight',
  'final_norm': 'output_norm.weight',
  'head': 'output.weight',
  'q': 'blk.{}.attn_q.weight',
  'k': 'blk.{}.attn_k.weight',
  'v': 'blk.{}.attn_v.weight',
  'o': 'blk.{}.attn_output.weight',
  'gate': 'blk.{}.ffn_gate.weight',
  'up': 'blk.{}.ffn_up.weight',
  'down': 'blk.{}.ffn_down.weight',
  'attention_norm': 'blk.{}.attn_norm.weight',
  'mlp_norm': 'blk.{}.ffn_norm.weight',
  'post_attention_norm': 'blk.{}.post_attention_norm.weight',
  'post_mlp_norm': 'blk.{}.post_ffw_norm.weight',
  'q_norm': 'blk.{}.attn_q_norm.weight',
  'k_norm': 'blk.{}.attn_k_norm.weight',
}
# GGUF does not record these two of Gemma 3.
GEMMA_LOCAL_BASE = 1e4
GEMMA_GLOBAL_EVERY = 6
# Gemma 3 27B, told by its depth, scales queries by width / num_heads.
GEMMA_27B_LAYERS = 62
ABSENT = object()
AGAIN = 'fetch it again'


def open_checkpoint(path: pathlib.Path) -> layout.Checkpoint:
  """Opens a GGUF file; raises ValueError if it is not one we can read."""
  file = _open(path)
  try:
    config = _config(path, file)
  except (ArithmeticError, TypeError) as error:
    raise files.damaged(path, f'its metadata: {error}', AGAIN) from error
  layout.check_config(path, config, AGAIN)
  return layout.Checkpoint(
    path=path,
    config=config,
    names=NAMES,
    tensors=file.tensors,
    read=lambda name: _read(path, file.tensors[name], name),
    repair=_unpermute(config),
    tokenizer=_tokenizer(path, file.metadata),
  )


def _open(path: pathlib.Path) -> gguf_file.File:
  if not path.exists():
    raise FileNotFoundError(f'{path} does not exist: check the path.')
  try:
    return gguf_file.read(path)
  except ValueError as error:
    raise ValueError(
      f'{path} is truncated or not a GGUF file ({files.short(error)}): {AGAIN}.'
    ) from error


def _config(path: pathlib.Path, file: gguf_file.File) -> DecoderConfig:
  family = _value(path, file.metadata, 'general.architecture')
  if family not in FAMILIES:
    raise ValueError(
      f'{path} has architecture {files.short(family)!r}, which is not supported: use one '
      f'of {", ".join(FAMILIES)}.'
    )

  def value(key: str, default: Any = ABSENT) -> Any:
    return _value(path, file.metadata, f'{family}.{key}', default)

  width, num_heads = value('embedding_length'), value('attention.head_count')
  vocab_size = len(_value(path, file.metadata, 'tokenizer.ggml.tokens'))
  _refuse_unsupported(path, file.tensors)
  shape = dict(
    family=family,
    vocab_size=vocab_size,
    num_layers=value('block_count'),
    width=width,
    num_heads=num_heads,
    num_kv_heads=value('attention.head_count_kv', num_heads),
    head_dim=value('attention.key_length', width // num_heads),
    mlp_width=value('feed_forward_length'),
    norm_eps=value('attention.layer_norm_rms_epsilon'),
    rope_scaling=_rope_scaling(path, value),
    tied_embeddings=NAMES['head'] not in file.tensors,
  )
  return DecoderConfig(**shape, **_family_fields(shape, value))


def _family_fields(shape: dict[str, Any], value: Callable) -> dict[str, Any]:
  """Returns what follows from the family."""
  gemma = shape['family'] == 'gemma3'
  base = value('rope.freq_base', 1e6 if gemma else 1e4)
  scaled_by = shape['head_dim']
  if gemma and shape['num_layers'] == GEMMA_27B_LAYERS:
    scaled_by = shape['width'] // shape['num_heads']
  return dict(
    rope_base=base,
    rope_base_local=GEMMA_LOCAL_BASE if gemma else base,
    sliding_window=value('attention.sliding_window') if gemma else 0,
    global_every=GEMMA_GLOBAL_EVERY if gemma else 1,
    qk_norm=gemma,
    post_norms=gemma,
    embed_scale=gemma,
    activation='gelu' if gemma else 'silu',
    query_scale=scaled_by**-0.5,
  )


def _rope_scaling(path: pathlib.Path, value: Callable) -> tuple[tuple[str, float], ...]:
  kind = value('rope.scaling.type', 'none')
  if kind == 'none':
    return ()
  if kind == 'linear':
    return (('linear_factor', value('rope.scaling.factor')),)
  raise ValueError(
    f'{path} has RoPE scaling {files.short(kind)!r}, which is not supported: use a model '
    'with none or linear.'
  )


def _refuse_unsupported(path: pathlib.Path, tensors: dict[str, Any]) -> None:
  if 'rope_freqs.weight' in tensors:
    raise ValueError(
      f'{path} keeps its RoPE scaling as a tensor, which is not supported: '
      "load the model's Hugging Face folder instead."
    )
  biases = sorted(name for name in tensors if name.endswith('.bias'))
  if biases:
    raise ValueError(
      f'{path} has an attention or MLP bias ({biases[0]}), which is not '
      'supported: use a model without biases.'
    )


def _value(
  path: pathlib.Path,
  metadata: dict[str, Any],
  key: str,
  default: Any = ABSENT,
) -> Any:
  found = metadata.get(key, default)
  if found is ABSENT:
    raise ValueError(
      f'{path} lacks the metadata {files.short(key)!r}: convert the model '
      'again with a newer llama.cpp.'
    )
  return found


def _read(path: pathlib.Path, tensor: gguf_file.Tensor, name: str) -> np.ndarray:
  try:
    with np.errstate(all='ignore'):  # `layout` looks for what is not finite
      return gguf.quants.dequantize(tensor.data, tensor.kind)
  except NotImplementedError as error:
    raise ValueError(
      f'tensor {name} of {path} has type {tensor.kind.name}, which is '
      'not supported: requantize it, to Q8_0 for example.'
    ) from error


def _unpermute(
  config: DecoderConfig,
) -> Callable[[str, np.ndarray], np.ndarray]:
  """Puts the halves of llama's heads, interleaved by GGUF, back apart."""
  heads = {'q': config.num_heads, 'k': config.num_kv_heads}

  def repair(leaf: str, tensor: np.ndarray) -> np.ndarray:
    if config.family != 'llama' or leaf not in heads:
      return tensor
    pairs = tensor.reshape(heads[leaf], -1, 2, tensor.shape[-1])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)

  return repair


def _tokenizer(path: pathlib.Path, metadata: dict[str, Any]) -> Tokenizer:
  prefix = 'tokenizer.ggml.'
  own = {
    key.removeprefix(prefix): value
    for key, value in metadata.items()
    if key.startswith(prefix)
  }
  try:
    return Tokenizer.from_gguf(own)
  except KeyError as error:
    raise ValueError(
      f'{path} lacks the metadata {prefix}{files.short(error.args[0])}: '
      'convert the model again with a newer llama.cpp.'
    ) from error
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
