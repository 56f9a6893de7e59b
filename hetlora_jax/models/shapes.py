"""The shapes of published models, to compile for them without weights.

They are those of each config.json on Hugging Face; for Gemma 3 4B and 12B, those
of the text decoder. `formats` reads shapes from checkpoints instead.
"""

import dataclasses
import math

from hetlora_jax.models.decoder import DecoderConfig


def _gemma3(
  layers: int,
  width: int,
  mlp_width: int,
  heads: tuple[int, int],
  window: int,
  vocab_size: int = 262_144,
  rope_factor: float = 0.0,
) -> DecoderConfig:
  return DecoderConfig(
    family='gemma3',
    vocab_size=vocab_size,
    num_layers=layers,
    width=width,
    num_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=256,
    mlp_width=mlp_width,
    norm_eps=1e-6,
    rope_base=1e6,
    rope_base_local=1e4,
    rope_scaling=(('linear_factor', rope_factor),) if rope_factor else (),
    sliding_window=window,
    global_every=6,
    qk_norm=True,
    post_norms=True,
    embed_scale=True,
    activation='gelu',
    query_scale=256**-0.5,
    tied_embeddings=True,
  )


def _llama(
  layers: int,
  width: int,
  mlp_width: int,
  heads: tuple[int, int],
  head_dim: int,
  vocab_size: int = 128_256,
  rope_base: float = 5e5,
  rope_factor: float = 0.0,
  tied: bool = True,
  **others,
) -> DecoderConfig:
  scaling = (
    ('high_freq_factor', 4.0),
    ('llama3_factor', rope_factor),
    ('low_freq_factor', 1.0),
    ('original_max_position', 8192.0),
  )
  usual = dict(family='llama', norm_eps=1e-5, sliding_window=0, qk_norm=False)
  usual |= dict(rope_scaling=scaling if rope_factor else (), rope_base_local=rope_base)
  return DecoderConfig(
    vocab_size=vocab_size,
    num_layers=layers,
    width=width,
    num_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=head_dim,
    mlp_width=mlp_width,
    rope_base=rope_base,
    global_every=1,
    post_norms=False,
    embed_scale=False,
    activation='silu',
    query_scale=head_dim**-0.5,
    tied_embeddings=tied,
    **(usual | others),
  )


def _gemma2(
  layers: int, width: int, mlp_width: int, heads: tuple[int, int]
) -> DecoderConfig:
  return dataclasses.replace(
    _gemma3(layers, width, mlp_width, heads, 4096, 256_000),
    family='gemma2',
    rope_base=1e4,
    rope_base_local=0.0,
    global_every=2,
    qk_norm=False,
    attention_softcap=50.0,
    logit_softcap=30.0,
  )


_ALIKE = dict(rope_base_local=0.0)  # layers with a window rotate as the others
_QWEN = _ALIKE | dict(vocab_size=151_936, rope_base=1e6, norm_eps=1e-6)
_QWEN2 = _QWEN | dict(family='qwen2', biases=('q', 'k', 'v'))
_QWEN3 = _QWEN | dict(family='qwen3', qk_norm=True)
_MISTRAL = _ALIKE | dict(
  family='mistral',
  vocab_size=32_000,
  rope_base=1e4,
  sliding_window=4096,
  windowed_layers=(True,) * 32,
  tied=False,
)
_SMOLLM3 = _ALIKE | dict(
  family='smollm3',
  rope_base=5e6,
  norm_eps=1e-6,
  rotated_layers=(True, True, True, False) * 9,
)
# As in rows of up to 4096 tokens; what changes in longer ones is left out.
_PHI4 = _ALIKE | dict(
  family='phi3',
  vocab_size=200_064,
  rope_base=1e4,
  rope_scaling=(
    ('attention_factor', math.sqrt(1 + math.log(32) / math.log(4096))),
    ('long_factor', (1.0,) * 48),
    ('original_max_position', 4096.0),
    ('short_factor', (1.0,) * 48),
  ),
  rotary_dim=96,
  sliding_window=262_144,
  windowed_layers=(True,) * 32,
)


SHAPES: dict[str, DecoderConfig] = {
  'gemma2_2b': _gemma2(26, 2304, 9216, (8, 4)),
  'gemma3_270m': _gemma3(18, 640, 2048, (4, 1), 512),
  'gemma3_1b': _gemma3(26, 1152, 6912, (4, 1), 512),
  'gemma3_4b': _gemma3(34, 2560, 10240, (8, 4), 1024, 262_208, 8.0),
  'gemma3_12b': _gemma3(48, 3840, 15360, (16, 8), 1024, 262_208, 8.0),
  'llama32_1b': _llama(16, 2048, 8192, (32, 8), 64, rope_factor=32.0),
  'llama32_3b': _llama(28, 3072, 8192, (24, 8), 128, rope_factor=32.0),
  'llama31_8b': _llama(32, 4096, 14336, (32, 8), 128, rope_factor=8.0, tied=False),
  'mistral_7b': _llama(32, 4096, 14336, (32, 8), 128, **_MISTRAL),
  'phi4_mini': _llama(32, 3072, 8192, (24, 8), 128, **_PHI4),
  'qwen25_05b': _llama(24, 896, 4864, (14, 2), 64, **_QWEN2),
  'qwen25_7b': _llama(
    28, 3584, 18944, (28, 4), 128, tied=False, **(_QWEN2 | dict(vocab_size=152_064))
  ),
  'qwen3_06b': _llama(28, 1024, 3072, (16, 8), 128, **_QWEN3),
  'qwen3_8b': _llama(36, 4096, 12288, (32, 8), 128, tied=False, **_QWEN3),
  'smollm3_3b': _llama(36, 2048, 11008, (16, 4), 128, **_SMOLLM3),
  'smollm2_135m': _llama(30, 576, 1536, (9, 3), 64, vocab_size=49_152, rope_base=1e5),
}
