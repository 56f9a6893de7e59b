"""config.json of Hugging Face folders: the shape that it describes, and the other way."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from hetlora_jax import files
from hetlora_jax.formats import layout
from hetlora_jax.models import decoder
from hetlora_jax.models.decoder import DecoderConfig

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


def fields_of(c: DecoderConfig) -> dict[str, Any]:
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
