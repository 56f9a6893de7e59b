"""One decoder for all families that docs/models.md lists; no other module uses Flax.

The base ('params') and the adapters ('lora') are two arguments of one pure
function: `Decoder(config).apply({'params': base, 'lora': adapters}, ...)`.

Axes: P packed rows, T tokens, S slots of keys (T without a cache), H query
heads, K key-value heads, d of a head, D width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

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

  family: str  # of `formats.layout.FAMILIES`; for messages and fingerprints
  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  mlp_width: int
  norm_eps: float
  rope_base: float
  # Of layers with a sliding window, which then have no scaling; 0: as the others.
  rope_base_local: float
  # Sorted items of one kind: `formats.hf_config.ROPE_SCALINGS` names them.
  rope_scaling: tuple[tuple[str, Any], ...]
  sliding_window: int  # tokens; 0 for none
  global_every: int  # 6: layers 5, 11, 17, ... have no window; 1: none has one
  qk_norm: bool
  post_norms: bool
  embed_scale: bool
  activation: str
  query_scale: float
  tied_embeddings: bool
  # Added since, so left out of a description that needs none of them.
  biases: tuple[str, ...] = ()  # the matrices that have one
  windowed_layers: tuple[bool, ...] = ()  # in place of `global_every`
  rotated_layers: tuple[bool, ...] = ()  # the others have no positions; () for all
  rotary_dim: int = 0  # coordinates of a head that are rotated; 0 for all
  attention_softcap: float = 0.0  # c of c tanh(score / c); 0 for none
  logit_softcap: float = 0.0

  def described(self) -> dict[str, Any]:
    """Returns the fields, but for those that have their default."""
    fields = dataclasses.fields(self)
    own = {f.name: getattr(self, f.name) for f in fields}
    return {f.name: own[f.name] for f in fields if own[f.name] != f.default}


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
  """Returns by what angle each layer rotates per position: [L, rotary_dim / 2].

  A layer without positions has zeros.
  """
  dim = c.rotary_dim or c.head_dim
  exponent = -np.arange(0, dim, 2) / dim
  of_global = _scaled(c.rope_base**exponent, c.rope_base, dict(c.rope_scaling))
  local = c.rope_base_local**exponent if c.rope_base_local else of_global
  rows = [of_global if is_global else local for is_global in global_layers(c)]
  rotated_L = np.array(c.rotated_layers or (True,) * c.num_layers)
  return np.where(rotated_L[:, None], np.stack(rows), 0).astype(np.float32)


def most_positions(c: DecoderConfig) -> int | None:
  """Returns after how many positions the frequencies would become others, if ever."""
  s = dict(c.rope_scaling)
  changes = 'dynamic_factor' in s or s.get('long_factor') != s.get('short_factor')
  return int(s['original_max_position']) if changes else None


def _scaled(frequency: np.ndarray, base: float, s: dict[str, Any]) -> np.ndarray:
  if 'linear_factor' in s:
    return frequency / s['linear_factor']
  if 'llama3_factor' in s:
    return _llama3_frequencies(frequency, s)
  if 'yarn_factor' in s:
    return _yarn_frequencies(frequency, base, s)
  if 'short_factor' in s:  # LongRoPE (Ding et al., 2024, arXiv 2402.13753)
    return frequency / np.asarray(s['short_factor'])
  return frequency


def _yarn_frequencies(frequency: np.ndarray, base: float, s: dict) -> np.ndarray:
  """Slows down waves that turn seldom (Peng et al., 2023, arXiv 2309.00071)."""
  half = len(frequency)

  def place(turns: float) -> float:  # of the wave with so many turns
    waves = s['original_max_position'] / (2 * np.pi * turns)
    return half * np.log(waves) / np.log(base)

  low = max(np.floor(place(s['beta_fast'])), 0)
  high = min(np.ceil(place(s['beta_slow'])), 2 * half - 1)
  high += 1e-3 * (low == high)
  slowed = np.clip((np.arange(half) - low) / (high - low), 0, 1)
  return (1 - slowed + slowed / s['yarn_factor']) * frequency


def _llama3_frequencies(frequency: np.ndarray, s: dict) -> np.ndarray:
  """Slows down the waves longer than the original context (Llama 3.1)."""
  # Waves that turn more often than `high` within the original context stay as
  # they are, those below `low` are slowed down in full, with a ramp between.
  turns = s['original_max_position'] * frequency / (2 * np.pi)
  low, high = s['low_freq_factor'], s['high_freq_factor']
  unscaled = np.clip((turns - low) / (high - low), 0, 1)
  return (unscaled + (1 - unscaled) / s['llama3_factor']) * frequency


def global_layers(c: DecoderConfig) -> np.ndarray:
  """Marks the layers whose attention has no sliding window: [L] bool."""
  every = np.arange(1, c.num_layers + 1) % c.global_every == 0
  if c.windowed_layers:
    every = ~np.array(c.windowed_layers)
  return every | (c.sliding_window == 0)


def _sines(angle_PTr: Array, frequency_r: Array, factor: float) -> tuple[Array, Array]:
  """Returns sines and cosines, [P, T, 1, r], times the scaling's factor, if any."""
  sin, cos = jnp.sin(angle_PTr)[:, :, None], jnp.cos(angle_PTr)[:, :, None]
  if factor != 1:  # but a layer without positions has none
    own = jnp.where(frequency_r.any(), factor, 1)
    sin, cos = sin * own, cos * own
  return sin, cos


def _rotate(x: Array, sin: Array, cos: Array) -> Array:
  """Applies rotary embeddings of r angles in float32: x [P, T, H, d].

  Coordinate i is paired with coordinate i + r; those from 2 r on stay.
  """
  r = sin.shape[-1]
  wide = x.astype(jnp.float32)
  x1, x2 = wide[..., :r], wide[..., r : 2 * r]
  parts = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
  if 2 * r < x.shape[-1]:
    parts.append(wide[..., 2 * r :])
  return jnp.concatenate(parts, -1).astype(x.dtype)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
  """Normalizes the last axis in float32, then multiplies by `weight` as it is.

  Gemma on Hugging Face stores `weight - 1`; `formats` adds the 1.
  """
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + eps)
  weight = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
  return (wide * inverse * weight).astype(x.dtype)


class KVCache(NamedTuple):
  """Keys and values of one layer, with free slots that new tokens fill."""

  k: Array  # [P, S, K, d]
  v: Array  # [P, S, K, d]
  slot: Array  # [], the first slot that the new tokens fill
  position: Array  # [P, S] int32, of the token in each slot
  mask: Array  # [P, T, S] bool, the slots that each new token attends to


class Layer(nn.Module):
  """One transformer block, which reads parameters and adapters by their names.

  Besides the hidden states it returns None, or with `return_cache` its keys and
  values: those of the tokens given, or of a cache in which these are filled in.
  """

  config: DecoderConfig
  return_cache: bool = False

  def _norm(self, name: str, x: Array) -> Array:
    weight = self.param(name, nn.initializers.ones, (x.shape[-1],))
    return rms_norm(x, weight, self.config.norm_eps)

  def _linear(self, name: str, x: Array, scale: Array) -> Array:
    shape = matrix_dims(self.config)[name]
    weight = self.param(name, nn.initializers.lecun_normal(), shape)
    out = kernels.matmul(x, weight.astype(x.dtype))
    if name in self.config.biases:
      bias = self.param(f'{name}_bias', nn.initializers.zeros, shape[1:])
      out += bias.astype(x.dtype)[None, None]
    if self.has_variable('lora', name):
      out += kernels.low_rank(x, self.get_variable('lora', name), scale)
    return out

  @nn.compact
  def __call__(self, h, frequency, is_global, segment, position, scale, cache=None):
    # Attention, added to the residual stream.
    out, keys_and_values = self._attend(
      h, frequency, is_global, segment, position, scale, cache
    )
    h = h + out
    # The gated MLP, added likewise.
    x = self._norm('mlp_norm', h)
    gate = ACTIVATIONS[self.config.activation](self._linear('gate', x, scale))
    x = self._linear('down', gate * self._linear('up', x, scale), scale)
    if self.config.post_norms:
      x = self._norm('post_mlp_norm', x)
    return h + x, keys_and_values if self.return_cache else None

  def _attend(
    self, h_PTD, frequency_r, is_global, segment_PT, position_PT, scale, cache
  ):
    """Returns the attention block's output [P, T, D], and keys and values."""
    c = self.config
    x_PTD = self._norm('attention_norm', h_PTD)

    def heads(name):
      y = self._linear(name, x_PTD, scale)
      return y.reshape(*y.shape[:2], -1, c.head_dim)

    # Queries, keys and values of the new tokens, rotated by their positions.
    q_PTHd, k_PTKd, v_PTKd = heads('q'), heads('k'), heads('v')
    if c.qk_norm:
      q_PTHd, k_PTKd = self._norm('q_norm', q_PTHd), self._norm('k_norm', k_PTKd)
    angle_PTr = position_PT.astype(jnp.float32)[..., None] * frequency_r[None, None]
    factor = dict(c.rope_scaling).get('attention_factor', 1.0)
    sin, cos = _sines(angle_PTr, frequency_r, factor)
    q_PTHd = _rotate(q_PTHd, sin, cos) * c.query_scale
    k_PTKd = _rotate(k_PTKd, sin, cos)

    # What they attend to: their own example, or the cache with them filled in.
    if cache is None:
      k_PSKd, v_PSKd = k_PTKd, v_PTKd
      mask_PTS, distance_PTS = _causal_mask(segment_PT, position_PT)
    else:
      at = (0, cache.slot, 0, 0)
      k_PSKd = jax.lax.dynamic_update_slice(cache.k, k_PTKd, at)
      v_PSKd = jax.lax.dynamic_update_slice(cache.v, v_PTKd, at)
      distance_PTS = position_PT[:, :, None] - cache.position[:, None, :]
      mask_PTS = cache.mask
    mask_PTS = _within_window(mask_PTS, distance_PTS, is_global, c.sliding_window)

    out_PTHd = kernels.attention(q_PTHd, k_PSKd, v_PSKd, mask_PTS, c.attention_softcap)
    out_PTD = self._linear('o', out_PTHd.reshape(*h_PTD.shape[:2], -1), scale)
    if c.post_norms:
      out_PTD = self._norm('post_attention_norm', out_PTD)
    return out_PTD, (k_PSKd, v_PSKd)


def _causal_mask(segment_PT: Array, position_PT: Array) -> tuple[Array, Array]:
  """Returns a causal mask within each example, and distances: [P, T, T] each."""
  distance_PTS = position_PT[:, :, None] - position_PT[:, None, :]
  same_example = segment_PT[:, :, None] == segment_PT[:, None, :]
  return same_example & (distance_PTS >= 0), distance_PTS


def _within_window(mask_PTS, distance_PTS, is_global, window: int) -> Array:
  """Limits the mask of local layers to the sliding window: [P, T, S] bool."""
  return mask_PTS & (is_global | (distance_PTS < window)) if window else mask_PTS


def embed_tokens(c: DecoderConfig, embed: Array, tokens: Array, dtype) -> Array:
  """Looks up the embeddings of tokens: [P, T] -> [P, T, D]."""
  h = jnp.take(embed, tokens, axis=0).astype(dtype)
  if c.embed_scale:
    # The factor is rounded to the type of the activations, as in training.
    h = h * jnp.asarray(c.width**0.5, dtype)
  return h


class Decoder(nn.Module):
  """Maps tokens to the last hidden states, after the final norm.

  With `return_cache` it also returns the keys and values of all layers,
  [L, P, T, K, d] each.
  """

  config: DecoderConfig
  dtype: jnp.dtype
  remat: bool
  return_cache: bool = False

  @nn.compact
  def __call__(self, tokens, segment, position, scale):
    """Returns h [P, T, D] in `dtype`.

    Args:
      tokens: [P, T] int32.
      segment: [P, T] int32; tokens attend to their own segment only.
      position: [P, T] int32, counted within the segment.
      scale: [], the LoRA scale.
    """
    c = self.config
    embed = self.param(
      'embed', nn.initializers.normal(c.width**-0.5), (c.vocab_size, c.width)
    )
    h = embed_tokens(c, embed, tokens, self.dtype)

    # One block, scanned over stacked layers. Even without `remat` only products
    # are stored for the backward pass: recomputing the rest is faster.
    policy = None if self.remat else jax.checkpoint_policies.dots_saveable
    block = nn.remat(Layer, prevent_cse=False, policy=policy)
    layers = nn.scan(
      block,
      variable_axes={'params': 0, 'lora': 0},
      split_rngs={'params': True},
      in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.num_layers,
    )(c, self.return_cache, name='layers')
    frequency, is_global = rope_frequencies(c), global_layers(c)
    h, keys_and_values = layers(
      h, jnp.asarray(frequency), jnp.asarray(is_global), segment, position,
      scale,
    )  # fmt: skip

    # The head is a parameter here, but `readout` multiplies by it.
    if not c.tied_embeddings:
      self.param('head', nn.initializers.normal(c.width**-0.5), embed.shape)
    weight = self.param('final_norm', nn.initializers.ones, (c.width,))
    h = rms_norm(h, weight, c.norm_eps)
    return (h, keys_and_values) if self.return_cache else h


def head(config: DecoderConfig, base: PyTree) -> Array:
  """Returns the output embedding [V, D]."""
  return base['embed' if config.tied_embeddings else 'head']


def init_params(config: DecoderConfig, key: Array, dtype) -> PyTree:
  """Draws the parameters of a base that is not pretrained."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  model = Decoder(config, dtype, remat=False)
  params = model.init(key, tokens, tokens, tokens, jnp.float32(0))['params']
  return jax.tree.map(lambda x: x.astype(dtype), params)


def make_hidden(config: DecoderConfig, dtype, remat: bool):
  """Returns (base, adapters, scale, tokens, segment, position) -> h [P, T, D]."""
  return _make_apply(Decoder(config, dtype, remat))


def _make_apply(model: Decoder):
  """Returns the module as a function of base, adapters, scale and inputs."""

  def apply(base, adapters: Adapters, scale, tokens, segment, position):
    variables = {'params': base, 'lora': {'layers': adapters}}
    return model.apply(variables, tokens, segment, position, scale)

  return apply


def make_prefill(config: DecoderConfig, dtype):
  """Returns a function of `hidden`'s arguments to h and (keys, values).

  Keys and values are [L, P, T, K, d]. Every row may have adapters and a scale of
  its own: factors [L, P, ...] and a scale [P, 1, 1].
  """
  return _make_apply(Decoder(config, dtype, remat=False, return_cache=True))


def unstack(layers: PyTree, count: int) -> list[PyTree]:
  """Splits parameters or adapters, stacked on axis 0, into one tree per layer."""
  return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)]


def make_decode_step(config: DecoderConfig, dtype):
  """Returns the decoder on new tokens that attend to caches, one per layer.

  The layers are a Python loop: a scan over stacked layers would copy their
  weights, and all keys and values, in every step.
  """
  layer = Layer(config, return_cache=True)
  frequency, is_global = rope_frequencies(config), global_layers(config)

  def step(base, layers, scale, tokens, position, caches: list[KVCache]):
    """Returns h [P, T, D], and each layer's keys and values, [P, S, K, d].

    Args:
      base: gives the embedding and the final norm.
      layers: (parameters, adapters) of each layer, see `unstack`.
      scale: [] or [P, 1, 1].
      tokens: [P, T].
      position: [P, T].
      caches: of each layer.
    """
    h, filled = embed_tokens(config, base['embed'], tokens, dtype), []
    for i, ((params, adapters), cache) in enumerate(zip(layers, caches, strict=True)):
      h, keys_and_values = layer.apply(
        {'params': params, 'lora': adapters}, h, jnp.asarray(frequency[i]),
        bool(is_global[i]), None, position, scale, cache,
      )  # fmt: skip
      filled.append(keys_and_values)
    return rms_norm(h, base['final_norm'], config.norm_eps), filled

  return step
