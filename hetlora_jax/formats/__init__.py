"""Pretrained base models: from a name or a path to params and a tokenizer."""

import dataclasses
import os
import pathlib

import numpy as np

from hetlora_jax.formats import cache, gguf, hf_folder, layout, sources
from hetlora_jax.models import Pretrained
from hetlora_jax.models.tokenizer import Tokenizer


def load(
  source: str | os.PathLike, *, dtype: np.typing.DTypeLike, cached: bool = True
) -> Pretrained:
  """Loads a base model.

  Args:
    source: 'gemma3_270m', 'smollm2_135m', a .gguf file, a Hugging Face folder with
      config.json, *.safetensors and a tokenizer, or ORG/NAME[:FILE.gguf][@REVISION] of
      the Hugging Face Hub.
    dtype: of the params.
    cached: go through the bfloat16 cache, filled on first use; False reads
      the source itself and rounds only to `dtype`.

  Raises:
    FileNotFoundError: a file of the source is absent.
    ValueError: the source is damaged or of a kind that is not supported.
  """
  found = sources.resolve(source)
  fingerprint, revision = found.fingerprint, found.revision
  if not cached:
    checkpoint = _open(found.path)
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    params = layout.assemble(checkpoint, np.dtype(dtype))
    return Pretrained(config, params, fingerprint, tokenizer, revision)
  if not cache.contains(fingerprint):
    cache.write(fingerprint, _open(found.path))
  config, params, tokenizer = cache.read(fingerprint, np.dtype(dtype))
  return Pretrained(config, params, fingerprint, tokenizer, revision)


def load_tokenizer(source: str | os.PathLike) -> Tokenizer:
  """Loads the tokenizer of a base model alone, with its chat template; see `load`."""
  tokenizer = _open(sources.resolve(source).path).tokenizer
  return dataclasses.replace(tokenizer, chat_template=chat_template(source))


def chat_template(source: str | os.PathLike) -> str:
  """Returns the chat template that comes with a base model, or ''; see `load`."""
  path = sources.resolve(source).path
  return (hf_folder if path.is_dir() else gguf).chat_template(path)


def _open(path: pathlib.Path) -> layout.Checkpoint:
  reader = hf_folder if path.is_dir() else gguf
  checkpoint = reader.open_checkpoint(path)
  layout.check_tokenizer(path, checkpoint.config, checkpoint.tokenizer)
  return checkpoint
