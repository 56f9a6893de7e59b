"""One decoder for the Gemma 3 and Llama families; the only Flax here.

The base ('params') and the adapters ('lora') are two arguments of one pure
function: `Decoder(config).apply({'params': base, 'lora': adapters}, ...)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from hetlora_jax.models import kernels
from hetlora_jax.types import Adapters, Array, PyTree

TARGETS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
ACTIVATIONS = {
  'gelu': lambda x: jax.nn.gelu(x, approximate=True),
  'silu': jax.nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """The shape of a model; `formats` reads it from a checkpoint."""

  family: str  # 'gemma3' or 'llama'; for messages and fingerprints
  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  norm_eps: float
  rope_base: float
  rope_base_local: float  # of layers with a sliding window
  # Sorted items: 'linear_factor', or 'llama3_factor', 'low_freq_factor',
  # 'high_freq_factor', 'original_max_position'. Global layers only.
  rope_scaling: tuple[tuple[str, float], ...] = ()
  sliding_window: int  # tokens; 0 for none
  global_every: int  # 6: layers 5, 11, 17, ... see everything; 1: all do
  qk_norm: bool
  post_norms: bool
  embed_scale: bool
  activation: str
  query_scale: float
  tied_embeddings: bool


def matrix_dims(c: DecoderConfig) -> dict[str, tuple[int, int]]:
  """Returns (d_in, d_out) of every matrix that can be adapted."""
  q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  return {
    'q': (c.width, q),
    'k': (c.width, kv),
    'v': (c.width, kv),
    'o': (q, c.width),
    'gate': (c.width, c.mlp_width),
    'up': (c.width, c.mlp_width),
    'down': (c.mlp_width, c.width),
  }


def adapter_dims(
  c: DecoderConfig, targets: Sequence[str]
) -> dict[str, tuple[int, int, int]]:
  """Returns target -> (num_layers, d_in, d_out)."""
  dims = matrix_dims(c)
  unknown = sorted(set(targets) - set(dims))
  if unknown or not targets:
    raise ValueError(
      f'lora.targets={tuple(targets)} has unknown modules {unknown} or is '
      f'empty: choose from {", ".join(TARGETS)}.'
    )
  return {t: (c.num_layers, *dims[t]) for t in targets}


def rope_frequencies(c: DecoderConfig) -> np.ndarray:
  """Returns the angle a position of every layer turns by: [L, head_dim/2]."""
  exponent = -np.arange(0, c.head_dim, 2) / c.head_dim
  local, whole = c.rope_base_local**exponent, c.rope_base**exponent
  scaling = dict(c.rope_scaling)
  if 'linear_factor' in scaling:
    whole = whole / scaling['linear_factor']
  elif 'llama3_factor' in scaling:
    whole = _llama3_frequencies(whole, scaling)
  rows = [whole if g else local for g in global_layers(c)]
  return np.stack(rows).astype(np.float32)


def _llama3_frequencies(frequency: np.ndarray, s: dict) -> np.ndarray:
  """Slows down the waves longer than the original context (Llama 3.1)."""
  turns = s['original_max_position'] * frequency / (2 * np.pi)
  low, high = s['low_freq_factor'], s['high_freq_factor']
  keep = np.clip((turns - low) / (high - low), 0, 1)
  return (keep + (1 - keep) / s['llama3_factor']) * frequency


def global_layers(c: DecoderConfig) -> np.ndarray:
  """Marks the layers that see the whole text: [L] bool."""
  whole = np.arange(1, c.num_layers + 1) % c.global_every == 0
  return whole | (c.sliding_window == 0)


def _rotate(x: Array, angle: Array) -> Array:
  """Turns x [P, T, H, d] by angle [P, T, d/2], halves paired, in float32."""
  sin, cos = jnp.sin(angle)[:, :, None], jnp.cos(angle)[:, :, None]
  x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)
  return turned.astype(x.dtype)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
  """Normalises the last axis in float32; `weight` is the whole factor."""
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + eps)
  weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (wide * inverse * weight).astype(x.dtype)


class Past(NamedTuple):
  """What new tokens look back on: slots of keys and values, themselves too."""

  k: Array  # [P, S, K, d]
  v: Array
  slot: Array  # [], the first that the new tokens fill
  position: Array  # [P, S] int32
  seen: Array  # [P, T, S] bool, the slots that each new token may look at


class Layer(nn.Module):
  """One block. Parameters and adapters are read by their plain names.

  Besides the hidden states it returns None, or keys and values if they are to
  be kept: its own if it has no past, else the past's with its own among them.
  """

  config: DecoderConfig
  keep: bool = False

  def _norm(self, name: str, x: Array) -> Array:
    weight = self.param(name, nn.initializers.ones, (x.shape[-1],))
    return rms_norm(x, weight, self.config.norm_eps)

  def _linear(self, name: str, x: Array, scale: Array) -> Array:
    shape = matrix_dims(self.config)[name]
    weight = self.param(name, nn.initializers.lecun_normal(), shape)
    out = kernels.matmul(x, weight.astype(x.dtype))
    if self.has_variable('lora', name):
      out += kernels.low_rank(x, self.get_variable('lora', name), scale)
    return out

  @nn.compact
  def __call__(self, h, frequency, is_global, segment, position, scale, past=None):
    out, kept = self._attend(h, frequency, is_global, segment, position, scale, past)
    h = h + out
    x = self._norm('mlp_norm', h)
    gate = ACTIVATIONS[self.config.activation](self._linear('gate', x, scale))
    x = self._linear('down', gate * self._linear('up', x, scale), scale)
    if self.config.post_norms:
      x = self._norm('post_mlp_norm', x)
    return h + x, kept if self.keep else None

  def _attend(self, h, frequency, is_global, segment, position, scale, past):
    c = self.config
    x = self._norm('attention_norm', h)

    def heads(name):
      y = self._linear(name, x, scale)
      return y.reshape(*y.shape[:2], -1, c.head_dim)

    q, k, v = heads('q'), heads('k'), heads('v')
    if c.qk_norm:
      q, k = self._norm('q_norm', q), self._norm('k_norm', k)
    angle = position.astype(jnp.float32)[..., None] * frequency[None, None]
    q, k = _rotate(q, angle) * c.query_scale, _rotate(k, angle)
    if past is None:
      seen, distance = _own_example(segment, position)
    else:
      at = (0, past.slot, 0, 0)
      k = jax.lax.dynamic_update_slice(past.k, k, at)
      v = jax.lax.dynamic_update_slice(past.v, v, at)
      distance = position[:, :, None] - past.position[:, None, :]
      seen = past.seen
    mask = _windowed(seen, distance, is_global, c.sliding_window)
    out = kernels.attention(q, k, v, mask)
    out = self._linear('o', out.reshape(*h.shape[:2], -1), scale)
    if c.post_norms:
      out = self._norm('post_attention_norm', out)
    return out, (k, v)


def _own_example(segment, position) -> tuple[Array, Array]:
  """Lets a token see its own example's past; and how far all are: [P, T, T]."""
  distance = position[:, :, None] - position[:, None, :]
  seen = (segment[:, :, None] == segment[:, None, :]) & (distance >= 0)
  return seen, distance


def _windowed(seen, distance, is_global, window) -> Array:
  """Ends the sight of local layers at the window: [P, T, S] bool."""
  return seen & (is_global | (distance < window)) if window else seen


def embed_tokens(c: DecoderConfig, embed: Array, tokens: Array, dtype) -> Array:
  """Looks tokens up: [P, T] -> [P, T, D]."""
  h = jnp.take(embed, tokens, axis=0).astype(dtype)
  if c.embed_scale:
    # Rounded as the model was trained: in the type of its activations.
    h = h * jnp.asarray(c.width**0.5, dtype)
  return h


class Decoder(nn.Module):
  """Maps tokens to final, normed hidden states.

  With `keep` also to the keys and values of all layers, [L, P, T, K, d] each.
  """

  config: DecoderConfig
  dtype: jnp.dtype
  remat: bool
  keep: bool = False

  @nn.compact
  def __call__(self, tokens, segment, position, scale):
    """Returns h [P, T, D] in `dtype`.

    Args:
      tokens: [P, T] int32.
      segment: [P, T] int32; tokens see their own segment only.
      position: [P, T] int32, within the segment.
      scale: [], the LoRA scale.
    """
    c = self.config
    embed = self.param(
      'embed', nn.initializers.normal(c.width**-0.5), (c.vocab_size, c.width)
    )
    h = embed_tokens(c, embed, tokens, self.dtype)
    # To recompute what is not a product is faster than to store it.
    keep = None if self.remat else jax.checkpoint_policies.dots_saveable
    block = nn.remat(Layer, prevent_cse=False, policy=keep)
    layers = nn.scan(
      block,
      variable_axes={'params': 0, 'lora': 0},
      split_rngs={'params': True},
      in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.num_layers,
    )(c, self.keep, name='layers')
    frequency, is_global = rope_frequencies(c), global_layers(c)
    h, kept = layers(
      h, jnp.asarray(frequency), jnp.asarray(is_global), segment, position,
      scale,
    )  # fmt: skip
    if not c.tied_embeddings:
      self.param('head', nn.initializers.normal(c.width**-0.5), embed.shape)
    weight = self.param('final_norm', nn.initializers.ones, (c.width,))
    h = rms_norm(h, weight, c.norm_eps)
    return (h, kept) if self.keep else h


def head(config: DecoderConfig, base: PyTree) -> Array:
  """Returns the output embedding [V, D]."""
  return base['embed' if config.tied_embeddings else 'head']


def init_params(config: DecoderConfig, key: Array, dtype) -> PyTree:
  """Draws a random base, for models too small to have been pretrained."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  model = Decoder(config, dtype, remat=False)
  params = model.init(key, tokens, tokens, tokens, jnp.float32(0))['params']
  return jax.tree.map(lambda x: x.astype(dtype), params)


def make_hidden(config: DecoderConfig, dtype, remat: bool):
  """Returns (base, adapters, scale, tokens, segment, position) -> h."""
  return _applied(Decoder(config, dtype, remat))


def _applied(model: Decoder):
  """Returns a function of the module's variables and inputs."""

  def apply(base, adapters: Adapters, scale, tokens, segment, position):
    variables = {'params': base, 'lora': {'layers': adapters}}
    return model.apply(variables, tokens, segment, position, scale)

  return apply


def make_prefill(config: DecoderConfig, dtype):
  """Returns a function of `hidden`'s arguments to h and (keys, values).

  These are [L, P, T, K, d]. Adapters and scale may be of each row: factors
  [L, P, ...] and [P, 1, 1].
  """
  return _applied(Decoder(config, dtype, remat=False, keep=True))


def unstack(layers: PyTree, count: int) -> list[PyTree]:
  """Takes parameters or adapters, stacked on axis 0, apart by layer."""
  return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]


def make_step(config: DecoderConfig, dtype):
  """Returns the decoder on new tokens that look back, layer after layer.

  It has no loop over stacked layers, which would copy their weights and all
  keys and values in every step.
  """
  layer = Layer(config, keep=True)
  frequency, is_global = rope_frequencies(config), global_layers(config)

  def step(base, layers, scale, tokens, position, pasts: list[Past]):
    """Returns h [P, T, D], and the new keys and values of each layer.

    Args:
      base: what is not in layers is read from it.
      layers: (parameters, adapters) of each.
      scale: [] or [P, 1, 1].
      tokens: [P, T].
      position: [P, T].
      pasts: of each layer.
    """
    h, kept = embed_tokens(config, base['embed'], tokens, dtype), []
    for i, ((params, adapters), past) in enumerate(zip(layers, pasts, strict=True)):
      h, own = layer.apply(
        {'params': params, 'lora': adapters}, h, jnp.asarray(frequency[i]),
        bool(is_global[i]), None, position, scale, past,
      )  # fmt: skip
      kept.append(own)
    return rms_norm(h, base['final_norm'], config.norm_eps), kept

  return step
