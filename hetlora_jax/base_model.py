"""The base model of a run: a pretrained one, or a random one for `tiny`."""

import pathlib

import jax
import jax.numpy as jnp

from hetlora_jax import prng
from hetlora_jax.config import Config
from hetlora_jax.data import people
from hetlora_jax.data.tokenizer import Tokenizer
from hetlora_jax.models import decoder, pretrained


def compute_dtype(config: Config) -> jnp.dtype:
  """Returns the type to compute in; 'auto' is what multiplies fastest here.

  A CPU without AMX computes bfloat16 products by way of float32.
  """
  if config.model.dtype != 'auto':
    return jnp.dtype(config.model.dtype)
  if jax.default_backend() != 'cpu':
    return jnp.dtype('bfloat16')
  info = pathlib.Path('/proc/cpuinfo')
  has_amx = info.exists() and 'amx_bf16' in info.read_text()
  return jnp.dtype('bfloat16' if has_amx else 'float32')


def load(config: Config) -> pretrained.Pretrained:
  """Loads or draws the base model, in the type to compute in."""
  dtype = compute_dtype(config)
  if config.model.source != 'random':
    return pretrained.load(config.model.source, dtype=dtype)
  tokenizer = Tokenizer.train(
    people.corpus(config.data.name), config.model.random.vocab_size
  )
  shape = _random_shape(config, tokenizer.vocab_size)
  params = decoder.init_params(shape, prng.stream(config.seed, 'base'), dtype)
  return pretrained.Pretrained(
    shape, params, f'random-{config.seed}', tokenizer
  )


def _random_shape(config: Config, vocab_size: int) -> decoder.DecoderConfig:
  c = config.model.random
  return decoder.DecoderConfig(
    family='gemma3',
    vocab_size=vocab_size,
    num_layers=c.num_layers,
    width=c.width,
    num_heads=c.num_heads,
    num_kv_heads=max(1, c.num_heads // 2),
    head_dim=c.head_dim,
    mlp_width=c.mlp_width,
    norm_eps=1e-6,
    rope_base=1e4,
    rope_base_local=1e4,
    sliding_window=0,
    global_every=1,
    qk_norm=True,
    post_norms=True,
    embed_scale=True,
    activation='gelu',
    query_scale=c.head_dim**-0.5,
    tied_embeddings=False,
  )
