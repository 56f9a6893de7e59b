"""Reads GGUF files, llama.cpp's format, of the decoder's families.

Constants and dequantization are the `gguf` package's; the header is read here.
The package's GGUFReader takes 9.2 s and 730 MB for Gemma 3 270M, this reader
0.28 s, and it compares every count, length and offset with the file's size
before it uses them, which GGUFReader does not.
"""

from __future__ import annotations

import math
import pathlib
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np

from hetlora_jax import files
from hetlora_jax.formats import layout
from hetlora_jax.models.decoder import TARGETS, DecoderConfig
from hetlora_jax.models.tokenizer import Tokenizer

WRITTEN_AS = {'mistral': 'llama'}  # the other architectures are families
FAMILIES = tuple(family for family in layout.FAMILIES if family not in WRITTEN_AS)
# Those of which llama.cpp's converter interleaves the halves of q's and k's heads.
INTERLEAVED = ('llama', 'smollm3')
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
NAMES |= {f'{m}_bias': NAMES[m].replace('weight', 'bias') for m in TARGETS}
FUSED = dict.fromkeys(('q', 'k', 'v'), 'blk.{}.attn_qkv.weight') | dict.fromkeys(
  ('gate', 'up'), 'blk.{}.ffn_up.weight'
)
# The fields of a DecoderConfig that every file has, after the family's name.
FIELDS = {
  'num_layers': 'block_count',
  'width': 'embedding_length',
  'num_heads': 'attention.head_count',
  'mlp_width': 'feed_forward_length',
  'norm_eps': 'attention.layer_norm_rms_epsilon',
}
# Of files that say nothing of RoPE's base.
ROPE_BASES = {'gemma3': 1e6}
# The 27Bs, told by their depth, scale queries by width / num_heads.
WIDE_LAYERS = {'gemma2': 46, 'gemma3': 62}
# Where a file says no window; Gemma 3's always does.
WINDOWS = dict.fromkeys(FAMILIES, 0) | {'gemma2': 4096, 'gemma3': None}
SMOLLM3_ROTATED = 4  # layers, of which the last does not rotate; llama.cpp's constant
ROPE_SCALINGS = ('none', 'linear', 'longrope', 'yarn')
WORDS = 'tokenizer.ggml.'  # before the names of the tokenizer's metadata
AGAIN = 'fetch it again'
CONVERT = 'fetch it again, or convert the model again with a newer llama.cpp'


def architecture(family: str) -> str:
  """Returns llama.cpp's name for a family."""
  return WRITTEN_AS.get(family, family)


def names(config: DecoderConfig) -> dict[str, str]:
  """Returns the names of tensors, of a layer's with a place for its number."""
  return NAMES | (FUSED if config.family == 'phi3' else {})


def open_checkpoint(path: pathlib.Path) -> layout.Checkpoint:
  """Opens a GGUF file; raises ValueError if it is not one we can read."""
  file = read(path)
  with files.parsing(path, CONVERT):
    config = _config(path, file)
    layout.check_config(path, config, AGAIN)
    tokenizer = Tokenizer.from_gguf(path, _under(WORDS, file.metadata))
  return layout.Checkpoint(
    path=path,
    config=config,
    names=names(config),
    tensors=file.tensors,
    read=lambda name: _dequantized(path, name, file.tensors[name]),
    repair=repairing(config),
    tokenizer=tokenizer,
  )


def chat_template(path: pathlib.Path) -> str:
  """Returns the chat template that a file has, or ''."""
  return str(read(path).metadata.get('tokenizer.chat_template', ''))


# --- The configuration -----------------------------------------------------


def _config(path: pathlib.Path, file: File) -> DecoderConfig:
  family = file.metadata['general.architecture']
  files.check_supported(path, 'architecture', family, FAMILIES)
  own = _under(f'{family}.', file.metadata)
  if own.get('expert_count'):
    raise files.unsupported(path, 'is a mixture of experts', 'use a dense model')
  shape = {ours: own[theirs] for ours, theirs in FIELDS.items()}
  width_a_head = shape['width'] // shape['num_heads']
  head_dim = own.get('attention.key_length', width_a_head)
  base = own.get('rope.freq_base', ROPE_BASES.get(family, 1e4))
  local = {'gemma3': layout.GEMMA_LOCAL_BASE, 'llama': base}
  rotary_dim = own.get('rope.dimension_count', head_dim)
  if rotary_dim != head_dim and family != 'phi3':
    what = f'rotates {files.short(rotary_dim)} of {head_dim} coordinates'
    raise files.unsupported(path, what, 'use a model that rotates whole heads')
  wide = WIDE_LAYERS.get(family) == shape['num_layers']
  fields = layout.family_fields(family) | _windows(family, own, shape['num_layers'])
  fields['biases'] = tuple(
    m for m in TARGETS if NAMES[f'{m}_bias'].format(0) in file.tensors
  )
  gemma2 = family == 'gemma2'
  return DecoderConfig(
    **fields,
    **shape,
    vocab_size=len(file.metadata[f'{WORDS}tokens']),
    num_kv_heads=own.get('attention.head_count_kv', shape['num_heads']),
    head_dim=head_dim,
    rope_base=base,
    rope_base_local=local.get(family, 0.0),
    rope_scaling=_rope_scaling(path, own, file.tensors),
    rotary_dim=0 if rotary_dim == head_dim else rotary_dim,
    query_scale=(width_a_head if wide else head_dim) ** -0.5,
    attention_softcap=own.get('attn_logit_softcapping', 50.0) if gemma2 else 0.0,
    logit_softcap=own.get('final_logit_softcapping', 30.0) if gemma2 else 0.0,
    tied_embeddings=NAMES['head'] not in file.tensors,
  )


def _windows(family: str, own: dict[str, Any], num_layers: int) -> dict[str, Any]:
  """Returns which layers have a sliding window, and which do not rotate.

  Of the Llama family llama.cpp reads no window, so files do not say Mistral's.
  """
  every = layout.family_fields(family)['global_every']
  window = own.get('attention.sliding_window', WINDOWS.get(family))
  if window is None:
    raise KeyError('attention.sliding_window')
  layers = range(1, num_layers + 1)
  windowed = [every == 1 or layer % every != 0 for layer in layers]
  fields = layout.windows(window, windowed, every)
  if family == 'smollm3':
    rotated = tuple(layer % SMOLLM3_ROTATED != 0 for layer in layers)
    fields['rotated_layers'] = () if all(rotated) else rotated
  return fields


def _under(prefix: str, metadata: dict[str, Any]) -> dict[str, Any]:
  """Returns the metadata whose keys have a prefix, without it."""
  return {
    key.removeprefix(prefix): value
    for key, value in metadata.items()
    if key.startswith(prefix)
  }


def _rope_scaling(
  path: pathlib.Path, own: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[tuple[str, Any], ...]:
  """Returns the scaling; of Llama 3 and Phi, what frequencies are divided by."""
  kind = own.get('rope.scaling.type', 'none')
  files.check_supported(path, 'RoPE scaling', kind, ROPE_SCALINGS)

  def divisors(name: str) -> tuple[float, ...]:
    tensor = tensors[f'{name}.weight']
    return tuple(_dequantized(path, name, tensor).ravel().tolist())

  always = 'rope_freqs.weight' in tensors
  if always and kind != 'none':
    what = f'has a tensor rope_freqs beside RoPE scaling {kind!r}'
    raise files.unsupported(path, what, "load the model's Hugging Face folder instead")
  if always or kind == 'longrope' or 'rope_factors_short.weight' in tensors:
    length = own['context_length']
    short = divisors('rope_freqs' if always else 'rope_factors_short')
    return (
      ('attention_factor', own.get('rope.scaling.attn_factor', 1.0)),
      ('long_factor', short if always else divisors('rope_factors_long')),
      (
        'original_max_position',
        own.get('rope.scaling.original_context_length', length),
      ),
      ('short_factor', short),
    )
  if kind == 'linear':
    return (('linear_factor', own['rope.scaling.factor']),)
  if kind == 'yarn':
    factor = own['rope.scaling.factor']
    return (
      ('attention_factor', 0.1 * math.log(max(factor, 1)) + 1),
      ('beta_fast', own.get('rope.scaling.yarn_beta_fast', 32.0)),
      ('beta_slow', own.get('rope.scaling.yarn_beta_slow', 1.0)),
      ('original_max_position', own['rope.scaling.original_context_length']),
      ('yarn_factor', factor),
    )
  return ()


def _dequantized(path: pathlib.Path, name: str, tensor: Tensor) -> np.ndarray:
  try:
    with np.errstate(all='ignore'):  # `layout` looks for what is not finite
      return gguf.quants.dequantize(tensor.data, tensor.kind)
  except NotImplementedError as error:
    what = f'tensor {name} of {path}'
    kind = f'has type {tensor.kind.name}'
    raise files.unsupported(what, kind, 'requantize it, to Q8_0 for example') from error


def repairing(config: DecoderConfig) -> Callable[[str, np.ndarray], np.ndarray]:
  """Puts the halves of llama's heads, interleaved by GGUF, back apart."""
  heads = {'q': config.num_heads, 'k': config.num_kv_heads}

  def repair(leaf: str, tensor: np.ndarray) -> np.ndarray:
    leaf = leaf.removesuffix('_bias')
    if config.family not in INTERLEAVED or leaf not in heads:
      return tensor
    pairs = tensor.reshape(heads[leaf], -1, 2, *tensor.shape[1:])
    return pairs.swapaxes(1, 2).reshape(tensor.shape)

  return repair


# --- The layout of the file ------------------------------------------------

VERSIONS = (2, 3)
ALIGNMENTS = (8, 16, 32, 64, 128, 256)
MOST_DIMS = 4
MOST_STRINGS = 1 << 24  # of an array; Gemma has 2**18 words
SCALARS = dict(
  UINT8='<u1', INT8='<i1', UINT16='<u2', INT16='<i2', UINT32='<u4', INT32='<i4',
  UINT64='<u8', INT64='<i8', FLOAT32='<f4', FLOAT64='<f8', BOOL='?',
)  # fmt: skip


class Tensor(NamedTuple):
  """A tensor as stored: its bytes, [..., bytes of a row]."""

  kind: gguf.GGMLQuantizationType
  data: np.ndarray


class File(NamedTuple):
  """What a GGUF file holds; tensors stay on disk until they are used."""

  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


class _Place(NamedTuple):
  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # in bytes, rows last
  offset: int  # from where the tensors start


class _Cursor:
  """Reads a file from its start; raises ValueError where it ends too early."""

  def __init__(self, data: np.ndarray):
    self.data, self.at = data, 0

  def take(self, count: int, what: str) -> np.ndarray:
    """Returns the next so many bytes."""
    left = len(self.data) - self.at
    if count > left:
      raise ValueError(f'{what} at byte {self.at} needs {count} of {left} left')
    self.at += count
    return self.data[self.at - count : self.at]

  def number(self, what: str, code: str = '<Q') -> int:
    taken = self.take(struct.calcsize(code), what)
    return struct.unpack(code, taken.tobytes())[0]

  def string(self, what: str) -> str:
    length = self.number(what)
    text = self.take(length, what).tobytes()
    try:
      return text.decode()
    except UnicodeDecodeError as error:
      raise ValueError(f'{what} is no UTF-8: {error}') from error


def read(path: pathlib.Path) -> File:
  """Reads a file's layout; raises Damaged if it is not what its header says."""
  try:
    # A memory map of no bytes is refused, in NumPy's words.
    return _parse(np.memmap(path, mode='r').view(np.ndarray))
  except ValueError as error:
    why = files.short(error)
    raise files.Damaged(
      f'{path} is truncated or not a GGUF file ({why}): {AGAIN}.'
    ) from error


def _parse(data: np.ndarray) -> File:
  cursor = _Cursor(data)
  if cursor.take(4, 'magic').tobytes() != b'GGUF':
    raise ValueError('it does not start with GGUF')
  version = cursor.number('version', '<I')
  if version not in VERSIONS:
    raise ValueError(f'version {version} is none of {VERSIONS}')
  num_tensors, num_fields = cursor.number('count'), cursor.number('count')
  metadata = _metadata(cursor, num_fields)
  places = _places(cursor, num_tensors)
  alignment = metadata.get('general.alignment', gguf.GGUF_DEFAULT_ALIGNMENT)
  if type(alignment) is not int or alignment not in ALIGNMENTS:
    raise ValueError(f'alignment {alignment}')
  start = -(-cursor.at // alignment) * alignment
  return File(metadata, _tensors(data[start:], places, alignment))


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
  metadata = {}
  for _ in range(count):  # ends at the end of the file, whatever the count
    key = cursor.string('key')
    if key in metadata:
      raise ValueError(f'metadata {key!r} is there twice')
    kind = gguf.GGUFValueType(cursor.number('type', '<I'))
    metadata[key] = _value(cursor, kind, f'metadata {key!r}')
  return metadata


def _value(cursor: _Cursor, kind: gguf.GGUFValueType, what: str) -> Any:
  if kind.name == 'STRING':
    return cursor.string(what)
  if kind.name != 'ARRAY':
    return _numbers(cursor, kind, 1, what)[0]
  kind = gguf.GGUFValueType(cursor.number(what, '<I'))
  count = cursor.number(what)
  if kind.name == 'ARRAY':
    raise ValueError(f'{what} is an array of arrays')
  if kind.name != 'STRING':
    return _numbers(cursor, kind, count, what)
  if count > MOST_STRINGS:
    raise ValueError(f'{what} has {count} strings')
  return [cursor.string(what) for _ in range(count)]


def _numbers(cursor: _Cursor, kind: gguf.GGUFValueType, count: int, what: str) -> list:
  dtype = np.dtype(SCALARS[kind.name])
  taken = cursor.take(count * dtype.itemsize, what)
  return np.frombuffer(taken.tobytes(), dtype).tolist()


def _places(cursor: _Cursor, count: int) -> dict[str, _Place]:
  places = {}
  for _ in range(count):
    name = cursor.string('name of a tensor')
    if name in places:
      raise ValueError(f'tensor {name} is there twice')
    num_dims = cursor.number(name, '<I')
    if not 1 <= num_dims <= MOST_DIMS:
      raise ValueError(f'tensor {name} has {num_dims} axes')
    dims = [cursor.number(name) for _ in range(num_dims)]
    kind = gguf.GGMLQuantizationType(cursor.number(name, '<I'))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if dims[0] % block or not all(dims):
      raise ValueError(f'tensor {name} has shape {dims}, in blocks of {block}')
    shape = (*reversed(dims[1:]), dims[0] // block * size)
    places[name] = _Place(kind, shape, cursor.number(name))
  return places


def _tensors(
  data: np.ndarray, places: dict[str, _Place], alignment: int
) -> dict[str, Tensor]:
  tensors, total = {}, 0
  for name, (kind, shape, offset) in places.items():
    size = math.prod(shape)
    total += size
    # Tensors that overlapped could ask for more memory than the file has.
    if offset % alignment or offset + size > len(data) or total > len(data):
      raise ValueError(f'tensor {name} needs {size} bytes from {offset} of {len(data)}')
    tensors[name] = Tensor(kind, data[offset : offset + size].reshape(shape))
  return tensors
