"""Reads Hugging Face folders: config.json, *.safetensors and a tokenizer."""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import safetensors

from hetlora_jax import files
from hetlora_jax.formats import layout
from hetlora_jax.models.decoder import DecoderConfig
from hetlora_jax.models.tokenizer import Tokenizer

FAMILIES = {'gemma3_text': 'gemma3', 'gemma3': 'gemma3', 'llama': 'llama'}
MATRICES = {
  'q': 'self_attn.q_proj',
  'k': 'self_attn.k_proj',
  'v': 'self_attn.v_proj',
  'o': 'self_attn.o_proj',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
}
NORMS = {
  'llama': {
    'attention_norm': 'input_layernorm',
    'mlp_norm': 'post_attention_layernorm',
  },
  'gemma3': {
    'attention_norm': 'input_layernorm',
    'post_attention_norm': 'post_attention_layernorm',
    'mlp_norm': 'pre_feedforward_layernorm',
    'post_mlp_norm': 'post_feedforward_layernorm',
    'q_norm': 'self_attn.q_norm',
    'k_norm': 'self_attn.k_norm',
  },
}
# transformers leaves a field out of config.json when it has these values.
DEFAULTS = {
  'gemma3': {
    'vocab_size': 262208,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1e6,
    'rope_local_base_freq': 1e4,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'tie_word_embeddings': True,
    'hidden_activation': 'gelu_pytorch_tanh',
  },
  'llama': {
    'rms_norm_eps': 1e-6,
    'rope_theta': 1e4,
    'tie_word_embeddings': False,
    'hidden_act': 'silu',
  },
}
ACTIVATIONS = {'gelu_pytorch_tanh': 'gelu', 'silu': 'silu'}
GEMMA_GLOBAL_EVERY = 6
REFUSED = (
  'attention_bias',
  'mlp_bias',
  'attn_logit_softcapping',
  'final_logit_softcapping',
  'use_bidirectional_attention',
)
DTYPES = ('F32', 'F16', 'BF16')
AGAIN = 'copy it again'


def open_checkpoint(folder: pathlib.Path) -> layout.Checkpoint:
  """Opens a Hugging Face folder; raises ValueError if it cannot be used."""
  path = folder / 'config.json'
  raw = files.read_json(path, AGAIN)
  try:
    config = _config(folder, raw)
  except (ArithmeticError, AttributeError, TypeError) as error:
    raise files.damaged(path, error, AGAIN) from error
  layout.check_config(path, config, AGAIN)
  tensors = _tensor_files(folder)
  return layout.Checkpoint(
    path=folder,
    config=config,
    names=tensor_names(config.family, tensors),
    tensors=tensors,
    read=lambda name: read_tensor(tensors[name], name),
    repair=_whole_norms if config.family == 'gemma3' else _unchanged,
    tokenizer=Tokenizer.from_folder(folder),
  )


def _config(folder: pathlib.Path, raw: Mapping[str, Any]) -> DecoderConfig:
  family = FAMILIES.get(raw.get('model_type', ''))
  if family is None:
    raise ValueError(
      f'{folder} has model_type {files.short(raw.get("model_type"))!r}, which is not '
      f'supported: use one of {", ".join(FAMILIES)}.'
    )
  fields = DEFAULTS[family] | dict(raw.get('text_config', raw))
  _refuse_unsupported(folder, fields)
  try:
    return _decoder_config(folder, family, fields)
  except KeyError as error:
    raise ValueError(
      f'{folder}/config.json lacks {error.args[0]!r}: copy the file again.'
    ) from error


def _refuse_unsupported(folder: pathlib.Path, fields: Mapping[str, Any]) -> None:
  for key in REFUSED:
    if fields.get(key):
      raise ValueError(
        f'{folder} sets {key}={files.short(fields[key])}, which is not supported: use a '
        'model without it.'
      )


def _decoder_config(
  folder: pathlib.Path, family: str, fields: Mapping[str, Any]
) -> DecoderConfig:
  gemma = family == 'gemma3'
  whole, local = _rope(family, fields)
  width, num_heads = fields['hidden_size'], fields['num_attention_heads']
  head_dim = fields.get('head_dim') or width // num_heads
  scaled_by = fields['query_pre_attn_scalar'] if gemma else head_dim
  return DecoderConfig(
    family=family,
    vocab_size=fields['vocab_size'],
    num_layers=fields['num_hidden_layers'],
    width=width,
    num_heads=num_heads,
    num_kv_heads=fields.get('num_key_value_heads') or num_heads,
    head_dim=head_dim,
    mlp_width=fields['intermediate_size'],
    norm_eps=fields['rms_norm_eps'],
    rope_base=whole['rope_theta'],
    rope_base_local=local,
    rope_scaling=_rope_scaling(folder, whole),
    sliding_window=fields['sliding_window'] if gemma else 0,
    global_every=_global_every(folder, fields) if gemma else 1,
    qk_norm=gemma,
    post_norms=gemma,
    embed_scale=gemma,
    activation=_activation(folder, family, fields),
    query_scale=scaled_by**-0.5,
    tied_embeddings=fields['tie_word_embeddings'],
  )


def _activation(folder: pathlib.Path, family: str, fields: Mapping[str, Any]) -> str:
  name = fields['hidden_activation' if family == 'gemma3' else 'hidden_act']
  if name not in ACTIVATIONS:
    raise ValueError(
      f'{folder} has activation {files.short(name)!r}, which is not supported: use one of '
      f'{", ".join(ACTIVATIONS)}.'
    )
  return ACTIVATIONS[name]


def _rope(family: str, fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
  """Returns the RoPE of global layers and the base of local ones.

  transformers 5 writes `rope_parameters`, before it `rope_theta` and others.
  """
  new = fields.get('rope_parameters')
  if new and family == 'gemma3':
    return new['full_attention'], new['sliding_attention']['rope_theta']
  if new:
    return new, new['rope_theta']
  base = fields['rope_theta']
  whole = {**(fields.get('rope_scaling') or {}), 'rope_theta': base}
  return whole, fields.get('rope_local_base_freq', base)


def _rope_scaling(
  folder: pathlib.Path, rope: Mapping[str, Any]
) -> tuple[tuple[str, float], ...]:
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if kind == 'default':
    return ()
  if kind == 'linear':
    return (('linear_factor', float(rope['factor'])),)
  if kind == 'llama3':
    return (
      ('high_freq_factor', float(rope['high_freq_factor'])),
      ('llama3_factor', float(rope['factor'])),
      ('low_freq_factor', float(rope['low_freq_factor'])),
      (
        'original_max_position',
        float(rope['original_max_position_embeddings']),
      ),
    )
  raise ValueError(
    f'{folder} has RoPE scaling {files.short(kind)!r}, which is not supported: use a model '
    'with none, linear or llama3.'
  )


def _global_every(folder: pathlib.Path, fields: Mapping[str, Any]) -> int:
  old = fields.get('sliding_window_pattern', GEMMA_GLOBAL_EVERY)
  every = fields.get('_sliding_window_pattern', old)
  layers = range(1, fields['num_hidden_layers'] + 1)
  names = ('sliding_attention', 'full_attention')
  regular = [names[layer % every == 0] for layer in layers]
  if fields.get('layer_types', regular) != regular:
    raise ValueError(
      f'{folder} has layer_types other than a global layer every {every}, '
      'which is not supported: use a model with the regular pattern.'
    )
  return every


def tensor_names(family: str, files: Collection[str] = ()) -> dict[str, str]:
  """Maps leaves to tensors; Gemma 3 with vision nests them under a prefix."""
  embed = 'embed_tokens.weight'
  prefixes = [n.removesuffix(embed) for n in files if n.endswith(embed)]
  prefix = prefixes[0] if prefixes else 'model.'
  inner = MATRICES | NORMS[family]
  return {
    'embed': f'{prefix}{embed}',
    'final_norm': f'{prefix}norm.weight',
    'head': 'lm_head.weight',
    **{k: f'{prefix}layers.{{}}.{name}.weight' for k, name in inner.items()},
  }


def _tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Maps every tensor to its file, by the index if the weights have one."""
  index = folder / 'model.safetensors.index.json'
  if index.exists():
    shards = files.read_json(index, AGAIN).get('weight_map')
    if not isinstance(shards, dict) or not all(map(_is_name, shards.values())):
      raise files.damaged(index, 'its weight_map names no files', AGAIN)
    return {name: folder / shard for name, shard in shards.items()}
  paths = sorted(folder.glob('*.safetensors'))
  if not paths:
    raise FileNotFoundError(
      f'{folder} has no *.safetensors file: save the model with '
      'safe_serialization=True.'
    )
  return {name: path for path in paths for name in open_file(path).offset_keys()}


def _is_name(shard: Any) -> bool:
  """Tells whether this is a file of the folder itself."""
  plain = isinstance(shard, str) and pathlib.PurePath(shard).name == shard
  return plain and len(shard) < 200


def read_tensor(path: pathlib.Path, name: str) -> np.ndarray:
  """Returns a tensor as it is stored; raises ValueError if it cannot."""
  with open_file(path) as file:
    try:
      dtype = file.get_slice(name).get_dtype()
    except safetensors.SafetensorError as error:
      raise files.damaged(path, f'it lacks {name}', AGAIN) from error
    if dtype not in DTYPES:
      raise ValueError(
        f'tensor {name} of {path} has type {dtype}, which is not supported: '
        f'save it as one of {", ".join(DTYPES)}.'
      )
    return file.get_tensor(name)


def open_file(path: pathlib.Path) -> safetensors.safe_open:
  """Opens a file; the library compares sizes and offsets with the file's."""
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing or no file: copy it into the folder.')
  try:
    return safetensors.safe_open(path, 'numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{path} is truncated or not a safetensors file ({files.short(error)}): {AGAIN}.'
    ) from error


def _whole_norms(leaf: str, tensor: np.ndarray) -> np.ndarray:
  """Adds the 1 that Gemma leaves out of its norm weights."""
  return tensor.astype(np.float32) + 1 if leaf.endswith('norm') else tensor


def _unchanged(leaf: str, tensor: np.ndarray) -> np.ndarray:
  del leaf
  return tensor
