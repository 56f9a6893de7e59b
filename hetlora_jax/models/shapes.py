"""The shapes of published models, to compile for them without weights.

They are those of each config.json on Hugging Face; for Gemma 3 4B and 12B, those
of the text decoder. `formats` reads shapes from checkpoints instead.
"""

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
) -> DecoderConfig:
  scaling = (
    ('high_freq_factor', 4.0),
    ('llama3_factor', rope_factor),
    ('low_freq_factor', 1.0),
    ('original_max_position', 8192.0),
  )
  return DecoderConfig(
    family='llama',
    vocab_size=vocab_size,
    num_layers=layers,
    width=width,
    num_heads=heads[0],
    num_kv_heads=heads[1],
    head_dim=head_dim,
    mlp_width=mlp_width,
    norm_eps=1e-5,
    rope_base=rope_base,
    rope_base_local=rope_base,
    rope_scaling=scaling if rope_factor else (),
    sliding_window=0,
    global_every=1,
    qk_norm=False,
    post_norms=False,
    embed_scale=False,
    activation='silu',
    query_scale=head_dim**-0.5,
    tied_embeddings=tied,
  )


SHAPES: dict[str, DecoderConfig] = {
  'gemma3_270m': _gemma3(18, 640, 2048, (4, 1), 512),
  'gemma3_1b': _gemma3(26, 1152, 6912, (4, 1), 512),
  'gemma3_4b': _gemma3(34, 2560, 10240, (8, 4), 1024, 262_208, 8.0),
  'gemma3_12b': _gemma3(48, 3840, 15360, (16, 8), 1024, 262_208, 8.0),
  'llama32_1b': _llama(16, 2048, 8192, (32, 8), 64, rope_factor=32.0),
  'llama32_3b': _llama(28, 3072, 8192, (24, 8), 128, rope_factor=32.0),
  'llama31_8b': _llama(32, 4096, 14336, (32, 8), 128, rope_factor=8.0, tied=False),
  'smollm2_135m': _llama(30, 576, 1536, (9, 3), 64, vocab_size=49_152, rope_base=1e5),
}
