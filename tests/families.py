"""Tiny models of every family, whose weights follow from the names of tensors.

Weights are drawn, not kept: golden/families.npz has what transformers makes of
them. To make it and golden/families.json again, in the environment with torch:

  PYTHONPATH=. .venv/bin/python tests/families.py [NAME ...]
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import zlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizer_test
from log_probs import make_log_probs

from hetlora_jax import files, formats
from hetlora_jax.formats import hf_config, hf_folder, layout
from hetlora_jax.models import decoder

ROOT = pathlib.Path(__file__).parent.parent
BENCH = ROOT / '.venv-bench'  # with torch and transformers
GOLDEN = ROOT / 'tests/golden'
REFERENCE, DIFFERENCES = GOLDEN / 'families.npz', GOLDEN / 'families.json'
TOKENS = 40  # more than every window and every original context that may be exceeded

_SHAPE = {
  'vocab_size': 300,
  'num_hidden_layers': 2,
  'hidden_size': 24,
  'intermediate_size': 40,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'tie_word_embeddings': False,
}
_YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}
_LONGROPE = {
  'type': 'longrope',
  'short_factor': [1.0, 1.4, 2.5],
  'long_factor': [1.1, 3.0, 9.0],
}
# What each config.json says besides the shape; the first word is the model_type.
MODELS: dict[str, dict] = {
  'gemma2': {
    'head_dim': 8,
    'num_hidden_layers': 3,
    'query_pre_attn_scalar': 11,
    'sliding_window': 6,
    'attn_logit_softcapping': 2.0,  # small enough to bend what is capped
    'final_logit_softcapping': 3.0,
    'tie_word_embeddings': True,
  },
  'gemma3': {
    'head_dim': 8,
    'num_hidden_layers': 3,
    'query_pre_attn_scalar': 11,
    'sliding_window': 6,
    'layer_types': ['full_attention', 'sliding_attention', 'sliding_attention'],
    'tie_word_embeddings': True,
  },
  'llama llama3': {
    'rope_scaling': {
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 16,
    }
  },
  'llama linear': {
    'attention_bias': True,
    'mlp_bias': True,
    'rope_scaling': {'type': 'linear', 'factor': 3.0},
  },
  'llama dynamic': {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}},
  'mistral': {'head_dim': 8, 'sliding_window': 6},
  'phi3': {'sliding_window': 7, 'num_key_value_heads': 4},
  'phi3 longrope': {  # Phi-4-mini
    'hidden_size': 32,
    'partial_rotary_factor': 0.75,
    'original_max_position_embeddings': 48,
    'rope_scaling': _LONGROPE,
    'tie_word_embeddings': True,
  },
  'qwen2': {'rope_theta': 1e6},
  'qwen2 yarn': {
    'num_hidden_layers': 3,
    'use_sliding_window': True,
    'sliding_window': 9,
    'max_window_layers': 1,
    'rope_scaling': _YARN,
    'tie_word_embeddings': True,
  },
  'qwen3': {'head_dim': 8, 'rope_theta': 1e6, 'tie_word_embeddings': True},
  'smollm3': {'num_hidden_layers': 4, 'rope_theta': 5e6},
  'smollm3 yarn': {
    'num_hidden_layers': 4,
    'rope_scaling': _YARN,
    'attention_bias': True,
    'no_rope_layers': [1, 0, 1, 1],
    'use_sliding_window': True,
    'sliding_window': 5,
  },
}


def config_of(name: str) -> dict:
  """Returns a model's config.json."""
  own = _SHAPE | MODELS[name] | {'pad_token_id': 0, 'eos_token_id': 1}
  kind = name.split()[0]
  return own | {'model_type': {'gemma3': 'gemma3_text'}.get(kind, kind)}


def draw(name: str, shape: tuple[int, ...], plus_one: bool) -> np.ndarray:
  """Returns a tensor that depends on its name and shape alone."""
  x = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
  if name.endswith('norm.weight'):
    x = 0.3 * x + (0 if plus_one else 1)
  elif name.endswith('.bias'):
    x *= 0.5
  else:
    x *= (1 if 'embed' in name else 1.5) / shape[-1] ** 0.5
  return x.astype(np.float32)


def stored_shapes(config: decoder.DecoderConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a folder's tensors; fused ones are as high as their parts."""
  names, shapes = hf_folder.tensor_names(config.family), {}
  by_leaf = layout._outer_shapes(config)
  for leaf, shape in (by_leaf | layout._layer_shapes(config)).items():
    for i in range(1 if leaf in by_leaf else config.num_layers):
      name = names[leaf].format(i)
      rows = shapes.get(name, (0,))[0]
      shapes[name] = (rows + shape[0], *shape[1:])
  return shapes


def write_folder(folder: pathlib.Path, name: str, **change) -> pathlib.Path:
  """Writes a model as transformers would, with a byte-level tokenizer."""
  raw = config_of(name) | change
  files.write_json(folder / 'config.json', raw)
  config = hf_config.read_config(folder, dict(raw))
  one = layout.FAMILIES[config.family].get('plus_one', False)
  tensors = {n: draw(n, s, one) for n, s in stored_shapes(config).items()}
  path = folder / 'model.safetensors'
  safetensors.numpy.save_file(tensors, path, {'format': 'pt'})
  tokenizer_test._folder_with_bpe(folder)
  if config.family.startswith('qwen'):  # which have no bos
    special = {'bos_token': None, 'eos_token': '</s>'}
    files.write_json(folder / 'tokenizer_config.json', special)
  return folder


def write_gguf(path: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Writes a folder's model as llama.cpp's converter does, in float32.

  Names of tensors are the gguf package's.
  """
  raw = json.loads((folder / 'config.json').read_text())
  config = hf_config.read_config(folder, dict(raw))
  architecture = {'mistral': 'llama'}.get(config.family, config.family)
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_context_length(raw['max_position_embeddings'])
  writer.add_block_count(config.num_layers)
  writer.add_embedding_length(config.width)
  writer.add_feed_forward_length(config.mlp_width)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  if raw.get('head_dim'):
    writer.add_key_length(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
  if config.family in ('gemma2', 'gemma3', 'phi3'):
    writer.add_sliding_window(config.sliding_window)
  if config.family == 'gemma2':
    writer.add_attn_logit_softcapping(config.attention_softcap)
    writer.add_final_logit_softcapping(config.logit_softcap)
  _add_rope(writer, config)
  _add_words(writer, folder, config.vocab_size)
  kind = {of: kind for kind, of in gguf.MODEL_ARCH_NAMES.items()}[architecture]
  names = gguf.get_tensor_name_map(kind, config.num_layers)
  stored = safetensors.numpy.load_file(folder / 'model.safetensors')
  for name, tensor in stored.items():
    theirs = names.get_name(name, try_suffixes=('.weight', '.bias'))
    if config.family in ('llama', 'mistral', 'smollm3') and '_proj' in name:
      tensor = _interleaved(config, name, tensor)
    if config.family.startswith('gemma') and 'norm' in name:
      tensor = tensor + 1
    writer.add_tensor(theirs, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def _add_rope(writer: gguf.GGUFWriter, config: decoder.DecoderConfig) -> None:
  s = dict(config.rope_scaling)
  if 'original_max_position' in s and 'llama3_factor' not in s:
    writer.add_rope_scaling_orig_ctx_len(int(s['original_max_position']))
  for key, kind in (('linear_factor', 'LINEAR'), ('yarn_factor', 'YARN')):
    if key in s:
      writer.add_rope_scaling_type(gguf.RopeScalingType[kind])
      writer.add_rope_scaling_factor(s[key])
  if 'short_factor' in s:
    writer.add_rope_scaling_attn_factors(s['attention_factor'])
    for length in ('long', 'short'):
      factors = np.float32(s[f'{length}_factor'])
      writer.add_tensor(f'rope_factors_{length}.weight', factors)
  if 'llama3_factor' in s:
    plain = config.rope_base ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    factors = np.float32(plain / decoder.rope_frequencies(config)[0])
    writer.add_tensor('rope_freqs.weight', factors)


def _add_words(writer: gguf.GGUFWriter, folder: pathlib.Path, count: int) -> None:
  words = json.loads((folder / 'tokenizer.json').read_text())['model']
  tokens = sorted(words['vocab'], key=words['vocab'].get)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  more = [f'[PAD{i}]' for i in range(count - len(tokens))]
  writer.add_token_list(tokens + more)
  writer.add_token_types([1] * len(tokens) + [5] * len(more))
  writer.add_token_merges([' '.join(pair) for pair in words['merges']])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)


def _interleaved(config: decoder.DecoderConfig, name: str, tensor: np.ndarray):
  """Does what LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py does."""
  heads = {'q_proj': config.num_heads, 'k_proj': config.num_kv_heads}
  count = heads.get(name.split('.')[-2])
  if not count:
    return tensor
  halves = tensor.reshape(count, 2, -1, *tensor.shape[1:])
  return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def ids_of(name: str) -> np.ndarray:
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.integers(3, _SHAPE['vocab_size'], TOKENS).astype(np.int32)


def args_of(ids) -> tuple:
  """Returns scale, tokens, segments and positions of one text."""
  tokens = jnp.asarray(ids)[None]
  position = jnp.arange(tokens.shape[1])[None]
  return jnp.float32(1), tokens, jnp.ones_like(tokens), position


def ours(folder: pathlib.Path, ids: np.ndarray) -> np.ndarray:
  """Returns our log-probabilities [T, V]."""
  model = formats.load(folder, dtype=np.float32, cached=False)
  log_probs = jax.jit(make_log_probs(model.config, jnp.float32))
  return np.asarray(log_probs(model.params, {}, *args_of(ids))[0])


def theirs(
  folder: pathlib.Path, ids: np.ndarray, adapter: pathlib.Path | str = ''
) -> dict[str, np.ndarray]:
  """Returns what `make_reference_logprobs.reference` writes of a folder."""
  with tempfile.TemporaryDirectory() as scratch:
    given, out = (pathlib.Path(scratch) / x for x in ('ids.npz', 'out.npz'))
    np.savez(given, ids_0=ids)
    program = [BENCH / 'bin/python', ROOT / 'tests/peft_parity.py', folder]
    subprocess.run([*program, adapter, given, out], check=True, capture_output=True)
    return {key.removesuffix('_0'): x for key, x in np.load(out).items()}


def difference(log_probs: np.ndarray, want: dict[str, np.ndarray]) -> float:
  """Returns the largest difference; raises AssertionError at another argmax."""
  np.testing.assert_array_equal(log_probs.argmax(1), want['argmax'])
  picked = np.take_along_axis(log_probs, want['where'].astype(int), 1)
  return float(np.abs(picked - want['log_prob']).max())


def reference_of(name: str) -> dict[str, np.ndarray]:
  with np.load(REFERENCE) as kept:
    keys = ('argmax', 'where', 'log_prob')
    return {key: kept[f'{name}/{key}'] for key in keys}


def main(*names):
  with np.load(REFERENCE) as before:
    kept = dict(before)
  differences = json.loads(DIFFERENCES.read_text())
  for name in names or MODELS:
    with tempfile.TemporaryDirectory() as folder:
      folder = write_folder(pathlib.Path(folder), name)
      want = theirs(folder, ids_of(name))
      differences[name] = float(f'{difference(ours(folder, ids_of(name)), want):.1e}')
    print(name, differences[name], want['log_prob'].min())
    for key, dtype in (('argmax', np.int16), ('where', np.int16), ('log_prob', None)):
      kept[f'{name}/{key}'] = want[key].astype(dtype or np.float32)
  np.savez_compressed(REFERENCE, **kept)
  DIFFERENCES.write_text(json.dumps(differences, indent=2) + '\n')
  print(REFERENCE.stat().st_size, 'bytes')


if __name__ == '__main__':
  main(*sys.argv[1:])
