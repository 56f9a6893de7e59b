"""Reads and writes Hugging Face folders: config.json, *.safetensors, a tokenizer."""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from hetlora_jax import files
from hetlora_jax.formats import layout
from hetlora_jax.models import decoder
from hetlora_jax.models.decoder import DecoderConfig
from hetlora_jax.models.tokenizer import CONTROL, SPACE, USER_DEFINED, Tokenizer
from hetlora_jax.types import PyTree

# --- Names in config.json and in the weights, both for reading and writing -----

CLASSES = {  # family -> model_type and architecture, as written
  'gemma2': ('gemma2', 'Gemma2ForCausalLM'),
  'gemma3': ('gemma3_text', 'Gemma3ForCausalLM'),
  'llama': ('llama', 'LlamaForCausalLM'),
  'mistral': ('mistral', 'MistralForCausalLM'),
  'phi3': ('phi3', 'Phi3ForCausalLM'),
  'qwen2': ('qwen2', 'Qwen2ForCausalLM'),
  'qwen3': ('qwen3', 'Qwen3ForCausalLM'),
  'smollm3': ('smollm3', 'SmolLM3ForCausalLM'),
}
FAMILIES = {kind: family for family, (kind, _) in CLASSES.items()} | {
  'gemma3': 'gemma3'  # with vision
}
FIELDS = {  # of DecoderConfig
  'vocab_size': 'vocab_size',
  'num_layers': 'num_hidden_layers',
  'width': 'hidden_size',
  'num_heads': 'num_attention_heads',
  'num_kv_heads': 'num_key_value_heads',
  'head_dim': 'head_dim',
  'mlp_width': 'intermediate_size',
  'norm_eps': 'rms_norm_eps',
  'tied_embeddings': 'tie_word_embeddings',
}
# rope_type -> the items of DecoderConfig.rope_scaling, sorted as it wants them.
# `most_positions` of the decoder says where 'dynamic' and 'longrope' would change.
ROPE_SCALINGS = {
  'default': {},
  'dynamic': {
    'dynamic_factor': 'factor',
    'original_max_position': 'max_position_embeddings',
  },
  'linear': {'linear_factor': 'factor'},
  'llama3': {
    'high_freq_factor': 'high_freq_factor',
    'llama3_factor': 'factor',
    'low_freq_factor': 'low_freq_factor',
    'original_max_position': 'original_max_position_embeddings',
  },
  'longrope': {
    'attention_factor': 'attention_factor',
    'long_factor': 'long_factor',
    'original_max_position': 'original_max_position_embeddings',
    'short_factor': 'short_factor',
  },
  'yarn': {
    'attention_factor': 'attention_factor',
    'beta_fast': 'beta_fast',
    'beta_slow': 'beta_slow',
    'original_max_position': 'original_max_position_embeddings',
    'yarn_factor': 'factor',
  },
}
ACTIVATIONS = {'gelu_pytorch_tanh': 'gelu', 'silu': 'silu'}
LAYER_TYPES = ('sliding_attention', 'full_attention')  # of a local, a global layer
MATRICES = {
  'q': 'self_attn.q_proj',
  'k': 'self_attn.k_proj',
  'v': 'self_attn.v_proj',
  'o': 'self_attn.o_proj',
  'gate': 'mlp.gate_proj',
  'up': 'mlp.up_proj',
  'down': 'mlp.down_proj',
}
FUSED = {  # several in one tensor, in this order
  'phi3': {
    **dict.fromkeys(('q', 'k', 'v'), 'self_attn.qkv_proj'),
    **dict.fromkeys(('gate', 'up'), 'mlp.gate_up_proj'),
  }
}
NORMS = {'attention_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
POST_NORMS = {
  'attention_norm': 'input_layernorm',
  'post_attention_norm': 'post_attention_layernorm',
  'mlp_norm': 'pre_feedforward_layernorm',
  'post_mlp_norm': 'post_feedforward_layernorm',
}
HEAD_NORMS = {'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm'}
# transformers leaves a field out of config.json when it has these values.
_USUAL = {
  'rms_norm_eps': 1e-6,
  'rope_theta': 1e4,
  'tie_word_embeddings': False,
  'hidden_act': 'silu',
  'sliding_window': None,
}
_QWEN = _USUAL | {
  'sliding_window': 4096,
  'use_sliding_window': False,
  'max_window_layers': 28,
}
DEFAULTS = {
  'gemma2': {
    'vocab_size': 256_000,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1e4,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'tie_word_embeddings': True,
    'hidden_activation': 'gelu_pytorch_tanh',
  },
  'gemma3': {
    'vocab_size': 262208,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1e6,
    'rope_local_base_freq': layout.GEMMA_LOCAL_BASE,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'sliding_window_pattern': 6,
    'tie_word_embeddings': True,
    'hidden_activation': 'gelu_pytorch_tanh',
  },
  'llama': _USUAL,
  'mistral': _USUAL | {'num_key_value_heads': 8, 'sliding_window': 4096},
  'phi3': _USUAL | {'rms_norm_eps': 1e-5, 'original_max_position_embeddings': 4096},
  'qwen2': _QWEN,
  'qwen3': _QWEN | {'head_dim': 128},
  'smollm3': _USUAL
  | {
    'rope_theta': 2e6,
    'tie_word_embeddings': True,
    'no_rope_layer_interval': 4,
    'use_sliding_window': False,
  },
}
# Fields that ask for what the decoder has not, and the families that have it.
REFUSED: dict[str, tuple[str, ...]] = {
  'attention_bias': ('llama', 'qwen3', 'smollm3'),
  'attn_logit_softcapping': ('gemma2',),
  'final_logit_softcapping': ('gemma2',),
  'layer_types': ('gemma2', 'gemma3', 'qwen2', 'qwen3', 'smollm3'),
  'mlp_bias': ('llama', 'smollm3'),
  'num_experts': (),
  'num_local_experts': (),
  'quantization_config': (),
  'use_bidirectional_attention': (),
}
# The fields of config.json that other families have not.
ONLY_OF: dict[str, tuple[str, ...]] = {
  **{key: families for key, families in REFUSED.items() if families},
  'max_window_layers': ('qwen2', 'qwen3'),
  'no_rope_layers': ('smollm3',),
  'original_max_position_embeddings': ('phi3',),
  'query_pre_attn_scalar': ('gemma2', 'gemma3'),
  'rope_local_base_freq': ('gemma3',),
  'sliding_window': tuple(f for f in CLASSES if f != 'llama'),
  'sliding_window_pattern': ('gemma3',),
  'use_sliding_window': ('qwen2', 'qwen3', 'smollm3'),
}
DTYPES = ('F32', 'F16', 'BF16')
# Copied as they are, where the base is such a folder itself.
TOKENIZER_FILES = (
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
)
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
AGAIN = 'copy it again'


def tensor_names(family: str, tensors: Collection[str] = ()) -> dict[str, str]:
  """Maps leaves to tensors; Gemma 3 with vision nests them under a prefix."""
  embed = 'embed_tokens.weight'
  prefixes = [n.removesuffix(embed) for n in tensors if n.endswith(embed)]
  prefix = prefixes[0] if prefixes else 'model.'
  facts, matrices = layout.family_fields(family), MATRICES | FUSED.get(family, {})
  inner = matrices | (POST_NORMS if facts['post_norms'] else NORMS)
  inner |= HEAD_NORMS if facts['qk_norm'] else {}
  layer = f'{prefix}layers.{{}}.'
  return {
    'embed': f'{prefix}{embed}',
    'final_norm': f'{prefix}norm.weight',
    'head': 'lm_head.weight',
    **{k: f'{layer}{name}.weight' for k, name in inner.items()},
    **{f'{k}_bias': f'{layer}{name}.bias' for k, name in matrices.items()},
  }


# --- Reading ---------------------------------------------------------------


def open_checkpoint(folder: pathlib.Path) -> layout.Checkpoint:
  """Opens a Hugging Face folder; raises ValueError if it cannot be used."""
  path = folder / 'config.json'
  raw = files.read_json(path, AGAIN)
  with files.parsing(path, AGAIN):
    config = read_config(path, raw)
    layout.check_config(path, config, AGAIN)
  tensors = tensor_files(folder)
  names = tensor_names(config.family, tensors)

  def read(name: str) -> np.ndarray:
    return read_tensor(tensors[name], name)

  if config.tied_embeddings and {names['head'], names['embed']} <= tensors.keys():
    # A head that is stored and differs is meant, whatever config.json says.
    tied = np.array_equal(read(names['head']), read(names['embed']))
    config = dataclasses.replace(config, tied_embeddings=tied)
  return layout.Checkpoint(
    path=folder,
    config=config,
    names=names,
    tensors=tensors,
    read=read,
    repair=functools.partial(_repair, config.family),
    tokenizer=Tokenizer.from_folder(folder),
  )


def chat_template(folder: pathlib.Path) -> str:
  """Returns the chat template of a folder, as transformers finds it, or ''."""
  path, config = folder / 'chat_template.jinja', folder / 'tokenizer_config.json'
  if path.exists():
    content = files.read_bytes(path, AGAIN)
    with files.parsing(path, AGAIN):
      return content.decode()
  found = files.read_json(config, AGAIN).get('chat_template') if config.exists() else ''
  with files.parsing(config, AGAIN):
    if isinstance(found, list):  # several, each with a name
      found = {x['name']: x['template'] for x in found}.get('default')
    return '' + (found or '')


def read_config(path: pathlib.Path, raw: Mapping[str, Any]) -> DecoderConfig:
  """Returns the shape that the object in a config.json describes."""
  files.check_supported(path, 'model_type', raw.get('model_type'), FAMILIES)
  family = FAMILIES[raw['model_type']]
  fields = DEFAULTS[family] | raw.get('text_config', raw)
  for key, families in REFUSED.items():
    if fields.get(key) and family not in families:
      what = f'sets {key}={files.short(fields[key])}'
      raise files.unsupported(path, what, 'use a model without it')
  # These two may be null, or left out by models older than they are.
  num_heads = fields['num_attention_heads']
  fields['num_key_value_heads'] = fields.get('num_key_value_heads') or num_heads
  fields['head_dim'] = fields.get('head_dim') or fields['hidden_size'] // num_heads
  if family == 'smollm3' and fields.get('no_rope_layers') is None:
    layers = range(1, fields['num_hidden_layers'] + 1)
    rotated = [layer % fields['no_rope_layer_interval'] != 0 for layer in layers]
    fields['no_rope_layers'] = rotated
  activation = fields[_activation_field(family)]
  files.check_supported(path, 'activation', activation, ACTIVATIONS)
  # What a family shares, unless this model says otherwise.
  shared = layout.family_fields(family)
  shared['activation'] = ACTIVATIONS[activation]
  shared |= {ours: fields[theirs] for ours, theirs in FIELDS.items()}
  shared |= _positions(path, family, fields) | _windows(path, family, fields)
  if fields.get('attention_bias'):
    shared['biases'] = ('q', 'k', 'v', 'o')
  if fields.get('mlp_bias'):
    shared['biases'] = (*shared.get('biases', ()), 'gate', 'up', 'down')
  scalar = fields.get('query_pre_attn_scalar', fields['head_dim'])
  return DecoderConfig(
    **shared,
    query_scale=scalar**-0.5,
    attention_softcap=fields.get('attn_logit_softcapping') or 0.0,
    logit_softcap=fields.get('final_logit_softcapping') or 0.0,
  )


def _activation_field(family: str) -> str:
  gemma = family.startswith('gemma')
  return 'hidden_activation' if gemma else 'hidden_act'


def _positions(
  path: pathlib.Path, family: str, fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns what says how positions rotate."""
  rope, local_base = _rope(family, fields)
  share = rope.get('partial_rotary_factor') or 1
  if share != 1 and family != 'phi3':
    what = f'sets partial_rotary_factor={files.short(share)}'
    raise files.unsupported(path, what, 'use a model that rotates whole heads')
  rotated = tuple(map(bool, fields['no_rope_layers'] if family == 'smollm3' else ()))
  return dict(
    rope_base=rope['rope_theta'],
    rope_base_local=local_base,
    rope_scaling=_rope_scaling(path, family, rope, fields),
    rotary_dim=int(fields['head_dim'] * share) if share != 1 else 0,
    rotated_layers=() if all(rotated) else rotated,
  )


def _rope(family: str, fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
  """Returns the RoPE of global layers and the base of local ones, if it is another.

  transformers 5 writes `rope_parameters`, before it `rope_theta` and others.
  """
  new = fields.get('rope_parameters')
  if new and family == 'gemma3':
    return new['full_attention'], new['sliding_attention']['rope_theta']
  outside = {
    k: fields[k] for k in ('rope_theta', 'partial_rotary_factor') if k in fields
  }
  whole = outside | (new or fields.get('rope_scaling') or {})
  local = {'gemma3': 'rope_local_base_freq', 'llama': 'rope_theta'}.get(family)
  return whole, fields.get(local, whole['rope_theta']) if local else 0.0


def _rope_scaling(
  path: pathlib.Path, family: str, rope: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[tuple[str, Any], ...]:
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if family == 'phi3' and kind in ('su', 'yarn'):  # LongRoPE's names before it had one
    kind = 'longrope'
  files.check_supported(path, 'RoPE scaling', kind, ROPE_SCALINGS)
  if rope.get('truncate') is False:
    what = 'sets truncate=False in its RoPE scaling'
    raise files.unsupported(path, what, 'use a model without it')
  whole = _completed(kind, family, rope, fields)
  return tuple(
    (ours, tuple(map(float, x)) if isinstance(x := whole[theirs], list) else float(x))
    for ours, theirs in ROPE_SCALINGS[kind].items()
  )


def _completed(
  kind: str, family: str, rope: Mapping[str, Any], fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Adds what transformers infers of a RoPE scaling that does not say it."""
  whole, key = dict(rope), 'original_max_position_embeddings'
  if kind not in ('dynamic', 'longrope', 'yarn'):
    return whole
  whole['max_position_embeddings'] = longest = fields['max_position_embeddings']
  first = fields if family == 'phi3' else rope
  whole[key] = original = first.get(key) or rope.get(key) or longest
  whole['factor'] = factor = rope.get('factor') or longest / original
  whole['beta_fast'] = rope.get('beta_fast') or 32
  whole['beta_slow'] = rope.get('beta_slow') or 1
  waves = math.log(max(factor, 1))
  up, down = rope.get('mscale'), rope.get('mscale_all_dim')
  up, down = (up, down) if up and down else (1, 0)
  inferred = (0.1 * up * waves + 1) / (0.1 * down * waves + 1)
  if kind == 'longrope':
    inferred = math.sqrt(1 + waves / math.log(original))
  whole['attention_factor'] = rope.get('attention_factor') or inferred
  return whole


def _windows(
  path: pathlib.Path, family: str, fields: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns which layers have a sliding window."""
  every = layout.family_fields(family)['global_every']
  if family == 'gemma3':
    every = fields.get('_sliding_window_pattern', fields['sliding_window_pattern'])
  layers = range(1, fields['num_hidden_layers'] + 1)
  types = fields.get('layer_types')
  for kind in types or ():
    files.check_supported(path, 'layer type', kind, LAYER_TYPES)
  optional = family in ONLY_OF['use_sliding_window']
  unused = optional and not fields['use_sliding_window']
  if unused or family not in ONLY_OF['sliding_window']:
    return layout.windows(None, (), every)
  # What each family does where it does not say of every layer.
  first = fields.get('max_window_layers', 0)
  windowed = {
    'gemma2': [layer % every != 0 for layer in layers],
    'gemma3': [layer % every != 0 for layer in layers],
    'qwen2': [layer > first for layer in layers],
    'qwen3': [layer > first for layer in layers],
    'smollm3': [not rotated for rotated in fields.get('no_rope_layers', ())],
  }.get(family, [True for _ in layers])
  if types:
    windowed = [kind == LAYER_TYPES[0] for kind in types]
  return layout.windows(fields['sliding_window'], windowed, every)


def tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Maps every tensor to its file, by the index if the weights have one."""
  if shards := indexed(folder):
    return {name: folder / shard for name, shard in shards.items()}
  whole = folder / WEIGHTS  # alone, as transformers takes it
  paths = [whole] if whole.exists() else sorted(folder.glob('*.safetensors'))
  if not paths:
    raise FileNotFoundError(
      f'{folder} has no *.safetensors file: save the model with '
      'safe_serialization=True.'
    )
  found: dict[str, pathlib.Path] = {}
  for path in paths:
    for name in open_file(path).offset_keys():
      if name in found:
        why = f'it and {found[name].name} both hold {name}'
        raise files.damaged(path, why, 'move one of the files out of the folder')
      found[name] = path
  return found


def indexed(folder: pathlib.Path) -> dict[str, str]:
  """Returns the name of every tensor's file by the index; {} if there is none."""
  index = folder / INDEX
  if not index.exists():
    return {}
  shards = files.read_json(index, AGAIN).get('weight_map')
  if (
    not shards
    or not isinstance(shards, dict)
    or not all(map(_is_name, shards.values()))
  ):
    raise files.damaged(index, 'its weight_map names no files', AGAIN)
  return shards


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
      what = f'has type {dtype}'
      remedy = f'save it as one of {", ".join(DTYPES)}'
      raise files.unsupported(f'tensor {name} of {path}', what, remedy)
    return file.get_tensor(name)


def open_file(path: pathlib.Path) -> safetensors.safe_open:
  """Opens a file; the library compares sizes and offsets with the file's."""
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing or no file: copy it into the folder.')
  try:
    return safetensors.safe_open(path, 'numpy')
  except safetensors.SafetensorError as error:
    why = 'truncated or not a safetensors file'
    raise files.Damaged(f'{path} is {why} ({files.short(error)}): {AGAIN}.') from error


def _repair(family: str, leaf: str, tensor: np.ndarray) -> np.ndarray:
  """Adds the 1 that Gemma leaves out of its norm weights."""
  norm = _lacks_one(family) and leaf.endswith('norm')
  return tensor.astype(np.float32) + 1 if norm else tensor


def _lacks_one(family: str) -> bool:
  return layout.FAMILIES[family].get('plus_one', False)


# --- Writing ---------------------------------------------------------------


def write(
  folder: pathlib.Path,
  config: DecoderConfig,
  params: PyTree,
  tokenizer: Tokenizer,
  source: pathlib.Path | None = None,
) -> None:
  """Writes model.safetensors, config.json and the tokenizer.

  Args:
    folder: an empty one.
    config: the shape.
    params: numpy leaves of one type, layers stacked on axis 0.
    tokenizer: the model's.
    source: the folder that the model is from, if it is from one.
  """
  fields = _fields(config) | _special_ids(tokenizer)
  fields['dtype'] = params['embed'].dtype.name
  if source:
    fields |= _fields_besides_shape(source)
    for name in TOKENIZER_FILES:
      if (source / name).exists():
        shutil.copyfile(source / name, folder / name)
  files.write_json(folder / 'config.json', fields)
  write_tensors(folder / WEIGHTS, _tensors(config, params))
  if not (folder / 'tokenizer.json').exists():
    for name, content in _tokenizer_files(tokenizer).items():
      if not (folder / name).exists():
        (folder / name).write_bytes(content)


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file that whoever may read its folder's others may read."""
  path.touch()
  mode = path.stat().st_mode
  safetensors.numpy.save_file(dict(tensors), path, {'format': 'pt'})
  path.chmod(mode)  # the library asks for 0600


def _fields(c: DecoderConfig) -> dict[str, Any]:
  """Returns config.json as transformers 4 and 5 read it."""
  model_type, architecture = CLASSES[c.family]
  activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[c.activation]
  global_layers, gemma = decoder.global_layers(c), c.family.startswith('gemma')
  fields = {
    'model_type': model_type,
    'architectures': [architecture],
    **{theirs: getattr(c, ours) for ours, theirs in FIELDS.items()},
    'rope_theta': c.rope_base,
    **_rope_fields(c),
    'attention_bias': 'o' in c.biases,
    # Gemma's masks are made of it even where no layer has a window.
    'sliding_window': c.sliding_window or (0 if gemma else None),
    'use_sliding_window': c.sliding_window > 0,
    'layer_types': [LAYER_TYPES[int(g)] for g in global_layers],
    'max_window_layers': int(global_layers.argmin()) if c.sliding_window else 0,
    'mlp_bias': 'down' in c.biases,
    'query_pre_attn_scalar': round(c.query_scale**-2),
    'attn_logit_softcapping': c.attention_softcap or None,
    'final_logit_softcapping': c.logit_softcap or None,
    'rope_local_base_freq': c.rope_base_local,
    'sliding_window_pattern': c.global_every,
    'no_rope_layers': [int(x) for x in c.rotated_layers or (True,) * c.num_layers],
    _activation_field(c.family): activation,
  }
  return {k: x for k, x in fields.items() if c.family in ONLY_OF.get(k, (c.family,))}


def _rope_fields(c: DecoderConfig) -> dict[str, Any]:
  """Returns `rope_scaling`, and what it needs beside it."""
  scaling, beside = dict(c.rope_scaling), {}
  if c.rotary_dim:
    beside['partial_rotary_factor'] = c.rotary_dim / c.head_dim
  kind = next(k for k, x in ROPE_SCALINGS.items() if x.keys() == scaling.keys())
  if kind == 'default':
    return beside | {'rope_scaling': None}
  fields = {theirs: scaling[ours] for ours, theirs in ROPE_SCALINGS[kind].items()}
  for key in ('max_position_embeddings', 'original_max_position_embeddings'):
    if key in fields:
      fields[key] = int(fields[key])
      if key in ONLY_OF and c.family not in ONLY_OF[key]:
        continue
      beside[key] = fields[key]
  return beside | {'rope_scaling': {'rope_type': kind} | fields}


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
  }


def _fields_besides_shape(source: pathlib.Path) -> dict[str, Any]:
  """Returns what the config.json of a folder says besides the shape."""
  raw = files.read_json(source / 'config.json', AGAIN)
  own = raw.get('text_config', raw)
  names = ('max_position_embeddings', 'eos_token_id')
  return {name: own[name] for name in names if own.get(name) is not None}


def _tensors(config: DecoderConfig, params: PyTree) -> dict[str, np.ndarray]:
  """Gives every tensor its name and stores matrices as [d_out, d_in]."""
  names, parts = tensor_names(config.family), collections.defaultdict(list)
  for leaf, x in params.items():
    if leaf != 'layers':
      parts[names[leaf]].append(_as_stored(config, leaf, x))
  layers = params['layers']
  in_order = [*(m for m in decoder.TARGETS if m in layers), *layers]
  for leaf in dict.fromkeys(in_order):  # of one tensor, as they are in it
    for i, x in enumerate(layers[leaf]):
      parts[names[leaf].format(i)].append(_as_stored(config, leaf, x.T))
  return {n: np.concatenate(x) if len(x) > 1 else x[0] for n, x in parts.items()}


def _as_stored(config: DecoderConfig, leaf: str, x: np.ndarray) -> np.ndarray:
  """Leaves the 1 out of Gemma's norm weights."""
  if _lacks_one(config.family) and leaf.endswith('norm'):
    x = (x.astype(np.float32) - 1).astype(x.dtype)
  return np.ascontiguousarray(x)


# --- Writing a tokenizer ---------------------------------------------------

NORMAL = 1  # a type of piece in SentencePiece


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Returns tokenizer.json with its settings, and SentencePiece's own file.

  A SentencePiece model that is no BPE stays alone.
  """
  model, contents = tokenizer.model, {}
  if not isinstance(model, tokenizers.Tokenizer):
    _, content = tokenizer.serialize()
    contents['tokenizer.model'] = content
    proto = sentencepiece_model.ModelProto.FromString(content)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
      return contents
    model = _from_sentencepiece(proto, tokenizer.bos_id)
  about = {
    name.removesuffix('_id'): None if i is None else model.id_to_token(i)
    for name, i in _special_ids(tokenizer).items()
  }
  about['tokenizer_class'] = 'PreTrainedTokenizerFast'
  contents['tokenizer.json'] = model.to_str().encode()
  contents['tokenizer_config.json'] = json.dumps(about, indent=2).encode()
  return contents


def _from_sentencepiece(
  proto: sentencepiece_model.ModelProto, bos_id: int
) -> tokenizers.Tokenizer:
  """Rebuilds a SentencePiece BPE model for the other library.

  transformers 5.23 converts tokenizer.model only where its generated code is of
  the installed protobuf's version, and refuses the folder otherwise.
  """
  pieces = [p.piece for p in proto.pieces]
  control, own = (
    [p.piece for p in proto.pieces if p.type == kind]
    for kind in (CONTROL, USER_DEFINED)
  )
  bpe = tokenizers.models.BPE(
    {piece: i for i, piece in enumerate(pieces)},
    _merges(proto),
    unk_token=pieces[proto.trainer_spec.unk_id],
    fuse_unk=True,
    byte_fallback=True,
  )
  model, bos = tokenizers.Tokenizer(bpe), pieces[bos_id]
  model.normalizer = tokenizers.normalizers.Sequence(
    [*_cleaning(proto.normalizer_spec)]
  )
  decoders = tokenizers.decoders
  steps = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  steps.append(decoders.Strip(' ', int(proto.normalizer_spec.add_dummy_prefix), 0))
  model.decoder = decoders.Sequence(steps)
  model.add_special_tokens(control)
  model.add_tokens([tokenizers.AddedToken(p, normalized=True) for p in own])
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single=f'{bos} $A', pair=f'{bos} $A {bos} $B', special_tokens=[(bos, bos_id)]
  )
  return model


def _cleaning(spec: sentencepiece_model.NormalizerSpec) -> Iterator:
  """Yields what is done to a text first; spaces are marked last."""
  normalizers = tokenizers.normalizers
  if spec.precompiled_charsmap:
    yield normalizers.Precompiled(spec.precompiled_charsmap)
  if spec.remove_extra_whitespaces:
    yield normalizers.Replace(tokenizers.Regex('^ +| +$'), '')
    yield normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')
  if spec.add_dummy_prefix:
    yield normalizers.Prepend(' ')
  yield normalizers.Replace(' ', SPACE)


def _merges(proto: sentencepiece_model.ModelProto) -> list[tuple[str, str]]:
  """Returns the pairs that make a piece, those of high scores first."""
  kinds = (NORMAL, USER_DEFINED)
  score = {p.piece: p.score for p in proto.pieces if p.type in kinds}
  return [
    (piece[:i], piece[i:])
    for piece in sorted(score, key=lambda p: -score[p])
    for i in range(1, len(piece))
    if piece[:i] in score and piece[i:] in score
  ]
