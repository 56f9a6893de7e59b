"""Writes golden/reference_*.npz: what `transformers` makes of the same files.

The torch environment is no test dependency; to make the files again:

  python3 -m venv /tmp/ref
  /tmp/ref/bin/pip install torch transformers gguf sentencepiece accelerate
  /tmp/ref/bin/python tests/make_reference_logprobs.py \
    --gemma=gemma-3-270m-q4_k_m.gguf --smollm2=SmolLM2-135M-Instruct.Q4_1.gguf \
    --chitchat=dataset.json

Every file holds, for each text, its token ids, the argmax at every position,
and log p of a subset of the vocabulary: the positions' own top 16, the next
token, and every 8192nd word. The tiny folders are random, and kept whole.
"""

import argparse
import json
import pathlib

import numpy as np
import sentencepiece
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def chats(path, count=4):
  """Returns the openings of some real conversations as transcripts."""
  conversations = list(json.loads(pathlib.Path(path).read_text()).values())
  texts = []
  for conversation in conversations[10 : 10 + count]:
    turns = [' '.join(u['text'] for u in turn) for turn in conversation['messages'][:5]]
    texts.append(''.join(f'{"AB"[i % 2]}: {turn}\n' for i, turn in enumerate(turns)))
  return texts


def reference(model, texts_ids, every):
  """Returns the arrays of one golden file."""
  out = {}
  for i, ids in enumerate(texts_ids):
    with torch.no_grad():
      logits = model(torch.tensor([ids])).logits[0].float()
    log_prob = torch.log_softmax(logits, -1).numpy()
    top = np.argsort(-log_prob, axis=1)[:, :16]
    following = np.append(ids[1:], ids[-1])[:, None]
    fixed = np.arange(0, log_prob.shape[1], every)
    where = np.concatenate([top, following, np.tile(fixed, (len(ids), 1))], axis=1)
    out[f'ids_{i}'] = np.asarray(ids, np.int32)
    out[f'argmax_{i}'] = log_prob.argmax(1).astype(np.int32)
    out[f'where_{i}'] = where.astype(np.int32)
    out[f'log_prob_{i}'] = np.take_along_axis(log_prob, where, 1)
  return out


def save(name, arrays):
  np.savez_compressed(GOLDEN / f'reference_{name}.npz', **arrays)
  print(name, (GOLDEN / f'reference_{name}.npz').stat().st_size, 'bytes')


def from_gguf(name, path, texts):
  path = pathlib.Path(path)
  source = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
  tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    **source, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  bos = [tokenizer.bos_token_id] if name == 'gemma3_270m' else []
  ids = [bos + tokenizer.encode(t, add_special_tokens=False) for t in texts]
  save(name, reference(model, [x[:96] for x in ids], 8192))


def tiny(name, config, model_class):
  """Saves a random model and its log-probabilities of random tokens."""
  torch.manual_seed(0)
  model = model_class(config).eval()
  for parameter in model.parameters():  # norms too: a 1 hides a missing "+ 1"
    parameter.data += 0.2 * torch.randn_like(parameter)
  folder = GOLDEN / f'tiny_{name}'
  model.save_pretrained(folder)
  (folder / 'generation_config.json').unlink(missing_ok=True)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['hello there my friend']),
    model_prefix=str(folder / 'tokenizer'),
    vocab_size=config.vocab_size,
    model_type='bpe',
    byte_fallback=True,
    hard_vocab_limit=False,
    normalization_rule_name='identity',
    minloglevel=2,
  )
  (folder / 'tokenizer.vocab').unlink()
  rng = np.random.default_rng(0)
  ids = [rng.integers(3, config.vocab_size, n).tolist() for n in (23, 17)]
  save(f'tiny_{name}', reference(model, ids, 7))


def main():
  parser = argparse.ArgumentParser()
  for flag in ('gemma', 'smollm2', 'chitchat'):
    parser.add_argument(f'--{flag}', required=True)
  flags = parser.parse_args()
  shape = dict(
    vocab_size=320,
    hidden_size=24,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
  )
  tiny(
    'llama',
    transformers.LlamaConfig(
      num_hidden_layers=3,
      rope_parameters={
        'rope_type': 'llama3',
        'rope_theta': 10000.0,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 16,
      },
      tie_word_embeddings=False,
      **shape,
    ),
    transformers.LlamaForCausalLM,
  )
  tiny(
    'gemma3',
    transformers.Gemma3TextConfig(
      num_hidden_layers=7,  # the sixth is global
      sliding_window=6,
      query_pre_attn_scalar=11,
      attn_implementation='eager',
      **shape,
    ),
    transformers.Gemma3ForCausalLM,
  )
  texts = chats(flags.chitchat)
  from_gguf('gemma3_270m', flags.gemma, texts)
  from_gguf('smollm2_135m', flags.smollm2, texts)


if __name__ == '__main__':
  main()
