"""Reads and writes Hugging Face folders: config.json, *.safetensors, a tokenizer."""

import collections
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from hetlora_jax import files
from hetlora_jax.formats import hf_config, hf_tokenizer, layout
from hetlora_jax.models import decoder
from hetlora_jax.models.decoder import DecoderConfig
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.types import PyTree

# --- Names of the weights, both for reading and writing ------------------------

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
    config = hf_config.read_config(path, raw)
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
  fields = hf_config.fields_of(config) | hf_tokenizer.special_ids(tokenizer)
  fields['dtype'] = params['embed'].dtype.name
  if source:
    fields |= _fields_besides_shape(source)
    for name in TOKENIZER_FILES:
      if (source / name).exists():
        shutil.copyfile(source / name, folder / name)
  files.write_json(folder / 'config.json', fields)
  write_tensors(folder / WEIGHTS, _tensors(config, params))
  if not (folder / 'tokenizer.json').exists():
    for name, content in hf_tokenizer.files_of(tokenizer).items():
      if not (folder / name).exists():
        (folder / name).write_bytes(content)


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file that whoever may read its folder's others may read."""
  path.touch()
  mode = path.stat().st_mode
  safetensors.numpy.save_file(dict(tensors), path, {'format': 'pt'})
  path.chmod(mode)  # the library asks for 0600


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
