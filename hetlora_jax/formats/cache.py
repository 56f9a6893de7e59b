"""Loaded models, kept as one bfloat16 safetensors file each."""

import dataclasses
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from hetlora_jax import files
from hetlora_jax.formats import layout
from hetlora_jax.models.decoder import DecoderConfig
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.types import PyTree

DTYPE = np.dtype(ml_dtypes.bfloat16)
# Part of the file name: raise it when the tree or its values change meaning.
VERSION = 2
ANEW = 'delete it and load again, it is made anew'


def weights_path(fingerprint: str) -> pathlib.Path:
  """Returns where the model of a source with this SHA-256 is kept."""
  return files.cache_folder() / f'{fingerprint}.v{VERSION}.safetensors'


def contains(fingerprint: str) -> bool:
  """Tells whether the model was written whole."""
  path = weights_path(fingerprint)
  return path.exists() and _seal(path).exists()


def write(fingerprint: str, checkpoint: layout.Checkpoint) -> None:
  """Keeps a checkpoint's weights, configuration and tokenizer."""
  kind, tokenizer = checkpoint.tokenizer.serialize()
  tensors = _flatten(layout.assemble(checkpoint, DTYPE))
  tensors['tokenizer'] = np.frombuffer(tokenizer, np.uint8)
  config = json.dumps(dataclasses.asdict(checkpoint.config))
  metadata = {'config': config, 'tokenizer': kind}
  path = weights_path(fingerprint)
  files.write_whole(path, lambda p: safetensors.numpy.save_file(tensors, p, metadata))
  # The seal comes last, so that a crash leaves no model that seems whole.
  files.write_text(_seal(path), files.digest(path))


def read(fingerprint: str, dtype: np.dtype) -> tuple[DecoderConfig, PyTree, Tokenizer]:
  """Returns a kept model; raises ValueError if its file was altered."""
  path = weights_path(fingerprint)
  seal = files.read_bytes(_seal(path), ANEW).decode(errors='replace')
  files.check_digest(path, seal)
  with files.parsing(path, ANEW), safetensors.safe_open(path, 'numpy') as file:
    metadata = file.metadata()
    config = _parse_config(metadata['config'])
    serialized = file.get_tensor('tokenizer').tobytes()
    tokenizer = Tokenizer.deserialize(metadata['tokenizer'], serialized)
    tensors = {  # one by one, so that both types never exist of all
      name: file.get_tensor(name).astype(dtype, copy=False)
      for name in file.offset_keys()
      if name != 'tokenizer'
    }
  return config, _unflatten(tensors), tokenizer


def _seal(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix('.sha256')


def _parse_config(text: str) -> DecoderConfig:
  return DecoderConfig(**{k: _hashable(x) for k, x in json.loads(text).items()})


def _hashable(value: Any) -> Any:
  """Makes lists tuples."""
  return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _flatten(tree: PyTree) -> dict[str, np.ndarray]:
  outer = {key: leaf for key, leaf in tree.items() if key != 'layers'}
  return outer | {f'layers.{k}': leaf for k, leaf in tree['layers'].items()}


def _unflatten(tensors: dict[str, np.ndarray]) -> PyTree:
  tree: dict = {'layers': {}}
  for name, tensor in tensors.items():
    *inner, leaf = name.split('.')
    (tree['layers'] if inner else tree)[leaf] = tensor
  return tree
