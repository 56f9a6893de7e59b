"""Writes adapters for llama.cpp: a GGUF file of type 'adapter'.

llama.cpp adds `alpha / r B A` to the matrix of a name, of lora_a [r, d_in] and
lora_b [d_out, r] as NumPy has them, where r is of the matrix and alpha of the file.
"""

from __future__ import annotations

import dataclasses
import pathlib

import gguf as gguf_lib
import numpy as np

from hetlora_jax.formats import gguf, peft
from hetlora_jax.formats.peft import Layers
from hetlora_jax.models.decoder import DecoderConfig

NAME = 'adapter.gguf'
KINDS = {
  'float32': gguf_lib.GGMLQuantizationType.F32,
  'bfloat16': gguf_lib.GGMLQuantizationType.BF16,
  'float16': gguf_lib.GGMLQuantizationType.F16,
}


def write(
  path: pathlib.Path, layers: Layers, scale: float, config: DecoderConfig, dtype: str
) -> None:
  """Writes an adapter of any ranks whose product counts `scale` times.

  Alpha is that of the largest rank; where a rank is smaller, B takes up the ratio.

  Raises:
    ValueError: a value does not fit into the type.
  """
  file = dataclasses.replace(config, family=gguf.architecture(config.family))
  ours = {
    t: [x._replace(b=x.b[:, _rows(file, t, x.b.shape[-1])]) for x in factors]
    for t, factors in layers.items()
  }
  names = gguf.names(file)
  parts = peft.joined(ours, file, lambda t, i: names[t].format(i))
  most = max(x.a.shape[-1] for x in parts.values())
  writer = gguf_lib.GGUFWriter(path, file.family)
  writer.add_type(gguf_lib.GGUFType.ADAPTER)
  writer.add_string(gguf_lib.Keys.Adapter.TYPE, 'lora')
  # An alpha of 0 would count as none, which means 1.
  writer.add_float32(gguf_lib.Keys.Adapter.LORA_ALPHA, (scale or 1.0) * most)
  for name, x in parts.items():
    ratio = np.float32(x.a.shape[-1] / most if scale else 0.0)
    for part, values in (('a', x.a.T), ('b', x.b.T * ratio)):
      with np.errstate(over='ignore'):  # looked for in the next lines
        stored = gguf_lib.quants.quantize(np.ascontiguousarray(values), KINDS[dtype])
      if not np.isfinite(gguf_lib.quants.dequantize(stored, KINDS[dtype])).all():
        raise ValueError(f'{name} has values that {dtype} cannot hold')
      writer.add_tensor(f'{name}.lora_{part}', stored, raw_dtype=KINDS[dtype])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _rows(config: DecoderConfig, target: str, d_out: int) -> np.ndarray:
  """Returns which of our rows of a matrix each row of GGUF's is."""
  ours = gguf.repairing(config)(target, np.arange(d_out)[:, None])
  return np.argsort(ours[:, 0])
