"""The base model of a run: a pretrained one, or a random one for `tiny`."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hetlora_jax import prng, sharding
from hetlora_jax.config import Config, ConfigError, RandomModel
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


def load(config: Config, mesh: Mesh) -> pretrained.Pretrained:
  """Loads or draws the base model, in the type to compute in, on its devices.

  The last one is kept, and only there: the points of a sweep share it.
  """
  c, dtype = config.model, compute_dtype(config)
  if c.source == 'random':
    model = _draw(c.random, config.data.name, dtype, mesh)
  else:
    model = _load(c.source, dtype, mesh)
  check_split(config, model.config)
  return model


def check_split(config: Config, shape: decoder.DecoderConfig) -> None:
  """Raises ConfigError if devices would have to share a head."""
  if shape.num_heads % config.mesh.model:
    raise ConfigError(
      f'config.mesh.model={config.mesh.model} does not divide the '
      f'{shape.num_heads} heads of {config.model.source}: take a divisor.'
    )


@functools.lru_cache(1)
def _load(source: str, dtype: jnp.dtype, mesh: Mesh) -> pretrained.Pretrained:
  return _place(pretrained.load(source, dtype=dtype), mesh)


@functools.lru_cache(1)
def _draw(
  c: RandomModel, data: str, dtype: jnp.dtype, mesh: Mesh
) -> pretrained.Pretrained:
  tokenizer = Tokenizer.train(people.corpus(data), c.vocab_size)
  shape = random_shape(c, tokenizer.vocab_size)
  params = decoder.init_params(shape, prng.stream(c.seed, 'base'), dtype)
  model = pretrained.Pretrained(shape, params, f'random-{c.seed}', tokenizer)
  return _place(model, mesh)


def _place(model: pretrained.Pretrained, mesh: Mesh) -> pretrained.Pretrained:
  where = sharding.by_name(mesh, model.params)
  placed = jax.block_until_ready(sharding.place(model.params, where))
  return dataclasses.replace(model, params=placed)


def random_shape(c: RandomModel, vocab_size: int) -> decoder.DecoderConfig:
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
