"""Reads and writes Hugging Face folders: config.json, *.safetensors, a tokenizer."""

import dataclasses
import functools
import json
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

FAMILIES = {'gemma3_text': 'gemma3', 'gemma3': 'gemma3', 'llama': 'llama'}
CLASSES = {  # family -> model_type and architecture, as written
  'gemma3': ('gemma3_text', 'Gemma3ForCausalLM'),
  'llama': ('llama', 'LlamaForCausalLM'),
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
# rope_type -> the items of DecoderConfig.rope_scaling, sorted as it wants them
ROPE_SCALINGS = {
  'default': {},
  'linear': {'linear_factor': 'factor'},
  'llama3': {
    'high_freq_factor': 'high_freq_factor',
    'llama3_factor': 'factor',
    'low_freq_factor': 'low_freq_factor',
    'original_max_position': 'original_max_position_embeddings',
  },
}
ACTIVATION_FIELD = {'gemma3': 'hidden_activation', 'llama': 'hidden_act'}
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
    'rope_local_base_freq': layout.GEMMA_LOCAL_BASE,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'sliding_window_pattern': layout.GEMMA_GLOBAL_EVERY,
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
REFUSED = (
  'attention_bias',
  'mlp_bias',
  'attn_logit_softcapping',
  'final_logit_softcapping',
  'use_bidirectional_attention',
)
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
  inner = MATRICES | NORMS[family]
  return {
    'embed': f'{prefix}{embed}',
    'final_norm': f'{prefix}norm.weight',
    'head': 'lm_head.weight',
    **{k: f'{prefix}layers.{{}}.{name}.weight' for k, name in inner.items()},
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
  for key in REFUSED:
    if fields.get(key):
      what = f'sets {key}={files.short(fields[key])}'
      raise files.unsupported(path, what, 'use a model without it')
  # These two may be null, or left out by models older than they are.
  num_heads = fields['num_attention_heads']
  fields['num_key_value_heads'] = fields.get('num_key_value_heads') or num_heads
  fields['head_dim'] = fields.get('head_dim') or fields['hidden_size'] // num_heads
  activation = fields[ACTIVATION_FIELD[family]]
  files.check_supported(path, 'activation', activation, ACTIVATIONS)
  # What a family shares, unless this model says otherwise.
  gemma = family == 'gemma3'
  rope, local_base = _rope(family, fields)
  shared = layout.family_fields(family)
  shared['activation'] = ACTIVATIONS[activation]
  shared['global_every'] = _global_every(path, fields) if gemma else 1
  return DecoderConfig(
    **shared,
    **{ours: fields[theirs] for ours, theirs in FIELDS.items()},
    rope_base=rope['rope_theta'],
    rope_base_local=local_base,
    rope_scaling=_rope_scaling(path, rope),
    sliding_window=fields['sliding_window'] if gemma else 0,
    query_scale=fields['query_pre_attn_scalar' if gemma else 'head_dim'] ** -0.5,
  )


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
  path: pathlib.Path, rope: Mapping[str, Any]
) -> tuple[tuple[str, float], ...]:
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  files.check_supported(path, 'RoPE scaling', kind, ROPE_SCALINGS)
  items = ROPE_SCALINGS[kind].items()
  return tuple((ours, float(rope[theirs])) for ours, theirs in items)


def _global_every(path: pathlib.Path, fields: Mapping[str, Any]) -> int:
  every = fields.get('_sliding_window_pattern', fields['sliding_window_pattern'])
  layers = range(1, fields['num_hidden_layers'] + 1)
  regular = [LAYER_TYPES[layer % every == 0] for layer in layers]
  if fields.get('layer_types', regular) != regular:
    what = f'has layer_types other than a global layer every {every}'
    raise files.unsupported(path, what, 'use a model with the regular pattern')
  return every


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
  norm = family == 'gemma3' and leaf.endswith('norm')
  return tensor.astype(np.float32) + 1 if norm else tensor


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
  fields = {
    'model_type': model_type,
    'architectures': [architecture],
    **{theirs: getattr(c, ours) for ours, theirs in FIELDS.items()},
    'rope_theta': c.rope_base,
    'rope_scaling': _rope_fields(dict(c.rope_scaling)),
    'attention_bias': False,
    ACTIVATION_FIELD[c.family]: activation,
  }
  if c.family != 'gemma3':
    return fields | {'mlp_bias': False}
  return fields | {
    'query_pre_attn_scalar': round(c.query_scale**-2),
    'rope_local_base_freq': c.rope_base_local,
    'sliding_window': c.sliding_window,
    'sliding_window_pattern': c.global_every,
    'layer_types': [LAYER_TYPES[int(g)] for g in decoder.global_layers(c)],
  }


def _rope_fields(scaling: Mapping[str, float]) -> dict[str, Any] | None:
  """Returns the `rope_scaling` of a config.json."""
  kind = next(k for k, x in ROPE_SCALINGS.items() if x.keys() == scaling.keys())
  if kind == 'default':
    return None
  fields = {theirs: scaling[ours] for ours, theirs in ROPE_SCALINGS[kind].items()}
  if kind == 'llama3':
    position = ROPE_SCALINGS[kind]['original_max_position']
    fields[position] = int(fields[position])
  return {'rope_type': kind} | fields


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
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
  names, tensors = tensor_names(config.family), {}
  for leaf, x in params.items():
    if leaf != 'layers':
      tensors[names[leaf]] = _as_stored(config, leaf, x)
  for leaf, stacked in params['layers'].items():
    for i, x in enumerate(stacked):
      tensors[names[leaf].format(i)] = _as_stored(config, leaf, x.T)
  return tensors


def _as_stored(config: DecoderConfig, leaf: str, x: np.ndarray) -> np.ndarray:
  """Leaves the 1 out of Gemma's norm weights."""
  if config.family == 'gemma3' and leaf.endswith('norm'):
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
    name.removesuffix('_id'): model.id_to_token(i)
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
