"""Writes a base model as a Hugging Face folder: what safetensors.py reads."""

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from hetlora_jax.formats import hf_folder as reader
from hetlora_jax.models import decoder
from hetlora_jax.models.decoder import DecoderConfig
from hetlora_jax.models.tokenizer import CONTROL, USER_DEFINED, Tokenizer
from hetlora_jax.types import PyTree

CLASSES = {
  'gemma3': ('gemma3_text', 'Gemma3ForCausalLM'),
  'llama': ('llama', 'LlamaForCausalLM'),
}
SPACE = '\N{LOWER ONE EIGHTH BLOCK}'
NORMAL = 1  # a type of piece in SentencePiece
ACTIVATIONS = {ours: theirs for theirs, ours in reader.ACTIVATIONS.items()}
# Copied as they are, where the base is such a folder itself.
TOKENIZER_FILES = (
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
)


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
  dtype = params['embed'].dtype.name
  fields = _fields(config) | _special(tokenizer) | {'dtype': dtype}
  if source:
    fields |= _more(source)
    _copy_tokenizer(source, folder)
  (folder / 'config.json').write_text(json.dumps(fields, indent=2) + '\n')
  tensors = _tensors(config, params)
  path = folder / 'model.safetensors'
  safetensors.numpy.save_file(tensors, path, {'format': 'pt'})
  shutil.copymode(folder / 'config.json', path)  # the library asks for 0600
  if not (folder / 'tokenizer.json').exists():
    for name, content in _tokenizer_files(tokenizer).items():
      if not (folder / name).exists():
        (folder / name).write_bytes(content)


def _fields(c: DecoderConfig) -> dict[str, Any]:
  """Returns config.json as transformers 4 and 5 read it."""
  model_type, architecture = CLASSES[c.family]
  fields = {
    'model_type': model_type,
    'architectures': [architecture],
    'vocab_size': c.vocab_size,
    'num_hidden_layers': c.num_layers,
    'hidden_size': c.width,
    'num_attention_heads': c.num_heads,
    'num_key_value_heads': c.num_kv_heads,
    'head_dim': c.head_dim,
    'intermediate_size': c.mlp_width,
    'rms_norm_eps': c.norm_eps,
    'rope_theta': c.rope_base,
    'rope_scaling': _rope_scaling(c),
    'tie_word_embeddings': c.tied_embeddings,
    'attention_bias': False,
  }
  activation = ACTIVATIONS[c.activation]
  if c.family != 'gemma3':
    return fields | {'hidden_act': activation, 'mlp_bias': False}
  kinds = ('sliding_attention', 'full_attention')
  return fields | {
    'hidden_activation': activation,
    'query_pre_attn_scalar': round(c.query_scale**-2),
    'rope_local_base_freq': c.rope_base_local,
    'sliding_window': c.sliding_window,
    'sliding_window_pattern': c.global_every,
    'layer_types': [kinds[int(g)] for g in decoder.global_layers(c)],
  }


def _rope_scaling(c: DecoderConfig) -> dict[str, Any] | None:
  scaling = dict(c.rope_scaling)
  if 'linear_factor' in scaling:
    return {'rope_type': 'linear', 'factor': scaling['linear_factor']}
  if not scaling:
    return None
  return {
    'rope_type': 'llama3',
    'factor': scaling['llama3_factor'],
    'low_freq_factor': scaling['low_freq_factor'],
    'high_freq_factor': scaling['high_freq_factor'],
    'original_max_position_embeddings': int(scaling['original_max_position']),
  }


def _special(tokenizer: Tokenizer) -> dict[str, int]:
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
  }


def _more(source: pathlib.Path) -> dict[str, Any]:
  """Returns what a folder says besides the shape."""
  raw = json.loads((source / 'config.json').read_text())
  own = raw.get('text_config', raw)
  names = ('max_position_embeddings', 'eos_token_id')
  return {name: own[name] for name in names if own.get(name) is not None}


def _tensors(config: DecoderConfig, params: PyTree) -> dict[str, np.ndarray]:
  """Gives every tensor its name and stores matrices as [d_out, d_in]."""
  names = reader.tensor_names(config.family)
  tensors = {}
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


def _copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
  for name in TOKENIZER_FILES:
    if (source / name).exists():
      shutil.copyfile(source / name, folder / name)


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Returns tokenizer.json with its settings, and SentencePiece's own file.

  A SentencePiece model that is no BPE stays alone.
  """
  model, files = tokenizer.model, {}
  if not isinstance(model, tokenizers.Tokenizer):
    _, content = tokenizer.serialize()
    files['tokenizer.model'] = content
    proto = sentencepiece_model.ModelProto.FromString(content)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
      return files
    model = _from_sentencepiece(proto, tokenizer.bos_id)
  about = {
    name.removesuffix('_id'): model.id_to_token(i)
    for name, i in _special(tokenizer).items()
  }
  about['tokenizer_class'] = 'PreTrainedTokenizerFast'
  files['tokenizer.json'] = model.to_str().encode()
  files['tokenizer_config.json'] = json.dumps(about, indent=2).encode()
  return files


def _from_sentencepiece(
  proto: sentencepiece_model.ModelProto, bos_id: int
) -> tokenizers.Tokenizer:
  """Rebuilds a SentencePiece BPE model for the other library.

  transformers does so too, where its protobuf fits; it has no say here.
  """
  kinds = {kind: [] for kind in (CONTROL, USER_DEFINED)}
  for p in proto.pieces:
    kinds.get(p.type, []).append(p.piece)
  pieces = [p.piece for p in proto.pieces]
  model = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {piece: i for i, piece in enumerate(pieces)},
      _merges(proto),
      unk_token=pieces[proto.trainer_spec.unk_id],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  prefixed = proto.normalizer_spec.add_dummy_prefix
  model.normalizer = tokenizers.normalizers.Sequence(
    [*_cleaning(proto.normalizer_spec)]
  )
  model.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace(SPACE, ' '),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(' ', int(prefixed), 0),
    ]
  )
  model.add_special_tokens(kinds[CONTROL])
  model.add_tokens(
    [tokenizers.AddedToken(p, normalized=True) for p in kinds[USER_DEFINED]]
  )
  bos = pieces[bos_id]
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single=f'{bos} $A', pair=f'{bos} $A {bos} $B',
    special_tokens=[(bos, bos_id)],
  )  # fmt: skip
  return model


def _cleaning(spec: sentencepiece_model.NormalizerSpec) -> Iterator:
  """Yields what is done to a text first; spaces are marked last."""
  if spec.precompiled_charsmap:
    yield tokenizers.normalizers.Precompiled(spec.precompiled_charsmap)
  if spec.remove_extra_whitespaces:
    yield tokenizers.normalizers.Replace(tokenizers.Regex('^ +| +$'), '')
    yield tokenizers.normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')
  if spec.add_dummy_prefix:
    yield tokenizers.normalizers.Prepend(' ')
  yield tokenizers.normalizers.Replace(' ', SPACE)


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
