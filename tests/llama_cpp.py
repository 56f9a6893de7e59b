"""What llama.cpp makes of an exported adapter, and small models that it can load.

Runs in the environment of the peers, which has llama.cpp (`make .venv-bench/done`):

  .venv-bench/bin/python tests/llama_cpp.py BASE.gguf ADAPTER.gguf OUT.npy ID...

writes log p of every next word after each prefix of the ids, [T, V].
"""

import math
import sys

import gguf
import numpy as np


def write_base(path, model):
  """Writes a model of ours as llama.cpp's converters do, rounded to bfloat16.

  Without RoPE scaling, which they keep in a tensor, and words that have no name.
  """
  import ml_dtypes
  from sentencepiece import sentencepiece_model_pb2

  from hetlora_jax.formats.gguf import NAMES

  config, params = model.config, dict(model.params)
  _, content = model.tokenizer.serialize()
  proto = sentencepiece_model_pb2.ModelProto.FromString(content)
  for leaf in {'embed', 'head'} & set(params):
    params[leaf] = params[leaf][: len(proto.pieces)]
  writer = gguf.GGUFWriter(path, config.family)
  writer.add_context_length(128)
  writer.add_embedding_length(config.width)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.mlp_width)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope_base)
  if config.sliding_window:
    writer.add_sliding_window(config.sliding_window)
  writer.add_tokenizer_model('llama')
  writer.add_token_list([p.piece for p in proto.pieces])
  writer.add_token_scores([p.score for p in proto.pieces])
  writer.add_token_types([p.type for p in proto.pieces])
  writer.add_bos_token_id(proto.trainer_spec.bos_id)
  writer.add_eos_token_id(proto.trainer_spec.eos_id)
  heads = {'q': config.num_heads, 'k': config.num_kv_heads}
  for leaf, layers in (params | params['layers']).items():
    stacked = leaf in params['layers']
    for i, x in enumerate(layers if stacked else [layers]) if leaf != 'layers' else ():
      x = np.asarray(x, ml_dtypes.bfloat16).astype(np.float32)
      if stacked and x.ndim == 2:
        x = x.T
        if config.family == 'llama' and leaf in heads:  # LlamaModel.permute
          halves = x.reshape(heads[leaf], 2, -1, x.shape[1])
          x = halves.swapaxes(1, 2).reshape(x.shape)
      writer.add_tensor(NAMES[leaf].format(i), np.ascontiguousarray(x))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def main(base, adapter, out, *ids):
  """Writes what llama.cpp predicts after each prefix."""
  import xllamacpp

  params = xllamacpp.CommonParams()
  params.model.path = base
  params.n_ctx, params.n_parallel, params.warmup = 128, 1, False
  params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
  params.flash_attn_type = (
    xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  )
  params.cpuparams.n_threads = 1
  if adapter:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
  server, rows = xllamacpp.Server(params), []
  ids = [int(i) for i in ids]
  words = gguf.GGUFReader(base).fields['tokenizer.ggml.tokens'].contents()
  # What is drawn is a letter, since the server tells nothing of half a character; the
  # probabilities are those from before it was made sure.
  letter = next(i for i, word in enumerate(words) if word.isascii() and word.isalpha())
  for end in range(1, len(ids) + 1):
    asked = {
      'prompt': ids[:end], 'n_predict': 1, 'n_probs': len(words),
      'logit_bias': [[letter, 1e3]], 'cache_prompt': False,
    }  # fmt: skip
    found = server.handle_completions(asked)
    (position,) = found['choices'][0]['logprobs']['content']
    row = np.full(len(words), -math.inf)
    for word in position['top_logprobs']:
      row[word['id']] = word['logprob']
    rows.append(row)
  np.save(out, np.stack(rows))


if __name__ == '__main__':
  main(*sys.argv[1:])
