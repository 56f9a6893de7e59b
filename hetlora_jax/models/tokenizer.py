"""Text to token ids and back, for every tokenizer a base model comes with."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from hetlora_jax import files

# Token types, the same numbers in GGUF and SentencePiece.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPECIAL_KEYS = {
  'bos': 'bos_token_id',
  'eos': 'eos_token_id',
  'unk': 'unknown_token_id',
  'pad': 'padding_token_id',
}
PAD, EOS, BOS, UNK = 0, 1, 2, 3  # Gemma's ids, which `Tokenizer.train` keeps
SPACE = '\N{LOWER ONE EIGHTH BLOCK}'  # of SentencePiece
AGAIN = 'copy it again'
# How a byte-level tokenizer splits text before it merges, by llama.cpp's name for
# it: the regular expression of the model's tokenizer.json; '' for GPT-2's, with each
# digit alone.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER = r'[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_LLAMA3 = (
  rf'{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}'
  rf'| ?[^\s\p{{L}}\p{{N}}]+{_AFTER}'
)
_LEAD, _UPPER, _LOWER = (
  r'[^\r\n\p{L}\p{N}]?',
  r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]',
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]',
)
_CASED = (f'{_LEAD}{_UPPER}*{_LOWER}+', f'{_LEAD}{_UPPER}+{_LOWER}*')
_SIGNS = rf'| ?[^\s\p{{L}}\p{{N}}]+{_AFTER.replace("n]*", "n/]*", 1)}'
SPLITS = {
  'gpt-4o': '|'.join(f'{x}{_ENDINGS}?' for x in _CASED) + rf'|\p{{N}}{{1,3}}{_SIGNS}',
  'llama-bpe': _LLAMA3,
  'qwen2': _LLAMA3.replace('{1,3}', ''),
  'smaug-bpe': _LLAMA3,  # of SmolLM3
  'smollm': '',
  'tekken': '|'.join(_CASED) + rf'|\p{{N}}{_SIGNS}',
}
WHOLE_WORDS = ('llama-bpe', 'tekken')  # take a word of the vocabulary without merging


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
  """A tokenizer of either library: 'sentencepiece' or 'tokenizers'.

  `encode` adds no special tokens and `decode` drops them. A tokenizer without
  a padding token pads with its end-of-text token. Some models (Qwen, Phi-4) are
  trained on texts that no token begins: their `bos_id` is None. `chat_template` is
  Jinja's, of models made for chats (formats.chat_template).
  """

  model: sentencepiece.SentencePieceProcessor | tokenizers.Tokenizer
  bos_id: int | None
  eos_id: int
  pad_id: int
  chat_template: str = ''

  @property
  def bos_token(self) -> str:
    return self._token(self.bos_id)

  @property
  def eos_token(self) -> str:
    return self._token(self.eos_id)

  def _token(self, i: int | None) -> str:
    if i is None:
      return ''
    if isinstance(self.model, tokenizers.Tokenizer):
      return self.model.id_to_token(i) or ''
    return self.model.id_to_piece(i)

  @property
  def vocab_size(self) -> int:
    if isinstance(self.model, tokenizers.Tokenizer):
      return self.model.get_vocab_size()
    return self.model.get_piece_size()

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens."""
    if isinstance(self.model, tokenizers.Tokenizer):
      return self.model.encode(text, add_special_tokens=False).ids
    return self.model.encode(text)

  @functools.cached_property
  def _control(self) -> re.Pattern:
    """Finds the special tokens of SentencePiece in a text, the longest first."""
    model, ids = self.model, range(self.vocab_size)
    pieces = [model.id_to_piece(i) for i in ids if model.is_control(i)]
    return re.compile('|'.join(map(re.escape, sorted(pieces, key=len, reverse=True))))

  def encode_special(self, text: str) -> list[int]:
    """Returns the ids of a text in which special tokens are spelled out.

    Raises ValueError if the tokenizer would put a space behind each of them.
    """
    if isinstance(self.model, tokenizers.Tokenizer):
      return self.encode(text)  # finds them itself
    if self.model.id_to_piece(self.model.encode('a')[0]).startswith(SPACE):
      raise ValueError(
        'this SentencePiece model begins every text with a space, also behind special '
        'tokens: put the tokenizer.json of the model into its folder instead of '
        'tokenizer.model.'
      )
    ids, at = [], 0
    for found in self._control.finditer(text):
      ids += [*self.encode(text[at : found.start()]), self.model.piece_to_id(found[0])]
      at = found.end()
    return ids + self.encode(text[at:])

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; special tokens, and ids without one, are dropped."""
    return self.model.decode([int(i) for i in ids if i < self.vocab_size])

  def spell(self, ids: Sequence[int]) -> str:
    """Returns the text of ids in which special tokens are spelled out."""
    ids = [int(i) for i in ids]
    if isinstance(self.model, tokenizers.Tokenizer):
      return self.model.decode(ids, skip_special_tokens=False)
    runs = itertools.groupby(ids, self.model.is_control)
    return ''.join(
      ''.join(map(self.model.id_to_piece, run)) if special else self.decode([*run])
      for special, run in runs
    )

  def serialize(self) -> tuple[str, bytes]:
    """Returns the library's name and what `deserialize` needs."""
    if not isinstance(self.model, tokenizers.Tokenizer):
      return 'sentencepiece', self.model.serialized_model_proto()
    ids = dict(bos_id=self.bos_id, eos_id=self.eos_id, pad_id=self.pad_id)
    saved = {'ids': ids, 'model': self.model.to_str()}
    return 'tokenizers', json.dumps(saved).encode()

  @classmethod
  def deserialize(cls, kind: str, serialized: bytes) -> Tokenizer:
    """Rebuilds a tokenizer from what `serialize` returned."""
    if kind == 'sentencepiece':
      return cls.from_model_proto(serialized)
    saved = json.loads(serialized)
    model = tokenizers.Tokenizer.from_str(saved['model'])
    return cls(model=model, **saved['ids'])

  @classmethod
  def from_model_proto(cls, serialized: bytes) -> Tokenizer:
    """Reads the bytes of a SentencePiece tokenizer.model."""
    model = sentencepiece.SentencePieceProcessor()
    try:
      model.LoadFromSerializedProto(serialized)
    except RuntimeError as error:
      raise ValueError('the SentencePiece model is damaged') from error
    bos, eos, pad = model.bos_id(), model.eos_id(), model.pad_id()
    if min(bos, eos) < 0:
      raise ValueError('the SentencePiece model lacks a <bos> or an <eos> token')
    return cls(model=model, bos_id=bos, eos_id=eos, pad_id=pad if pad >= 0 else eos)

  @classmethod
  def from_folder(cls, folder: pathlib.Path) -> Tokenizer:
    """Reads tokenizer.model or else tokenizer.json of a model's folder.

    Where the second has tokens that were added to the first, it is the whole.
    """
    path, plain = folder / 'tokenizer.json', folder / 'tokenizer.model'
    if plain.exists():
      with files.parsing(plain, AGAIN):
        found = cls.from_model_proto(files.read_bytes(plain, AGAIN))
      if not path.exists() or not _added(path, found):
        return found
    if not path.exists():
      raise FileNotFoundError(
        f'{folder} has no tokenizer.model and no tokenizer.json: copy one '
        'from where the weights are from.'
      )
    content = files.read_bytes(path, AGAIN)
    with files.parsing(path, AGAIN):
      model = tokenizers.Tokenizer.from_str(content.decode())
    # They belong to how somebody used it; 'Fixed' padding may be endless.
    model.no_padding()
    model.no_truncation()
    return cls(model=model, **_special_ids(folder, model))

  @classmethod
  def from_gguf(cls, path: pathlib.Path, metadata: Mapping[str, Any]) -> Tokenizer:
    """Rebuilds the tokenizer of a file's `tokenizer.ggml.*`, prefix removed.

    Raises Damaged, which names the file, if the metadata are not what they should
    be.
    """
    with files.parsing(path, 'fetch it again'):
      kind = metadata['model']
      files.check_supported(path, 'tokenizer', kind, ('llama', 'gpt2'))
      if kind == 'llama':
        return cls.from_model_proto(_model_proto(metadata))
      if metadata.get('pre') not in SPLITS:
        # How text is split before merging is known to llama.cpp by name only.
        what = f'has pre-tokenizer {files.short(metadata.get("pre"))!r}'
        known = f'use one of {", ".join(SPLITS)}'
        remedy = f"{known}, or load the model's Hugging Face folder instead"
        raise files.unsupported(path, what, remedy)
      eos = metadata['eos_token_id']
      pad = metadata.get('padding_token_id', eos)
      bos = _own_bos(metadata, metadata.get('bos_token_id'), eos, pad)
      model = _byte_level_bpe(metadata)
      return cls(model=model, bos_id=bos, eos_id=eos, pad_id=pad)

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a SentencePiece BPE: same texts, same tokenizer.

    No text is lost: characters not in the vocabulary become bytes.
    """
    lines = [line for text in texts for line in text.splitlines() if line]
    proto = io.BytesIO()
    try:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=proto,
        vocab_size=vocab_size,
        **_training_options(lines),
      )
    except RuntimeError as error:
      reason = str(error).strip().splitlines()[-1]
      raise ValueError(
        f'no tokenizer of {vocab_size:,} words can be trained on {len(lines):,} lines '
        f'({reason}): give more text or another size.'
      ) from error
    return cls.from_model_proto(proto.getvalue())


def _added(path: pathlib.Path, plain: Tokenizer) -> list[str]:
  """Returns the tokens of a tokenizer.json that the model of SentencePiece lacks."""
  added = files.read_json(path, AGAIN).get('added_tokens') or ()
  with files.parsing(path, AGAIN):
    return [x['content'] for x in added if x['id'] >= plain.vocab_size]


def _training_options(lines: Sequence[str]) -> dict[str, Any]:
  longest = max((len(line.encode()) for line in lines), default=1)
  return dict(
    model_type='bpe',
    byte_fallback=True,
    normalization_rule_name='identity',
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    pad_id=PAD,
    eos_id=EOS,
    bos_id=BOS,
    unk_id=UNK,
    num_threads=1,  # more may break ties in another order
    max_sentence_length=max(10, longest + 1),  # longer lines would be left out
    minloglevel=3,
  )


def _model_proto(metadata: Mapping[str, Any]) -> bytes:
  """Rebuilds the SentencePiece model that llama.cpp's converter took apart."""
  proto = sentencepiece_model.ModelProto()
  columns = (metadata[key] for key in ('tokens', 'scores', 'token_type'))
  for i, (piece, score, kind) in enumerate(zip(*columns, strict=True)):
    if i == metadata.get('unknown_token_id'):
      kind = UNKNOWN  # the converter may call it CONTROL
    if kind == USER_DEFINED:  # the converter put plain spaces into these
      piece = piece.replace(' ', SPACE)
    proto.pieces.add(piece=piece, score=score, type=kind)
  spec = proto.trainer_spec
  spec.model_type = spec.BPE
  spec.byte_fallback = True
  spec.vocab_size = len(proto.pieces)
  # SentencePiece finds a special token by its piece, not by its id.
  for name, key in SPECIAL_KEYS.items():
    if key in metadata:
      setattr(spec, f'{name}_id', metadata[key])
      setattr(spec, f'{name}_piece', metadata['tokens'][metadata[key]])
  normalizer = proto.normalizer_spec
  normalizer.name = 'identity'
  normalizer.add_dummy_prefix = metadata.get('add_space_prefix', True)
  normalizer.remove_extra_whitespaces = False
  return proto.SerializeToString()


def _byte_level_bpe(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
  tokens = metadata['tokens']
  vocab = {token: i for i, token in enumerate(tokens)}
  merges = [tuple(merge.split(' ')) for merge in metadata['merges']]
  split, pattern = tokenizers.pre_tokenizers, SPLITS[metadata['pre']]
  if pattern:
    regex = tokenizers.Regex(pattern)
    steps = [split.Split(regex, 'isolated'), split.ByteLevel(False, use_regex=False)]
  else:
    steps = [split.Digits(individual_digits=True), split.ByteLevel(False)]
  whole = metadata['pre'] in WHOLE_WORDS
  bpe = tokenizers.models.BPE(vocab, merges, ignore_merges=whole)
  model = tokenizers.Tokenizer(bpe)
  model.pre_tokenizer = split.Sequence(steps)
  if metadata['pre'] == 'qwen2':
    model.normalizer = tokenizers.normalizers.NFC()
  model.decoder = tokenizers.decoders.ByteLevel()
  for kind, add in (
    (CONTROL, model.add_special_tokens),
    (USER_DEFINED, model.add_tokens),
  ):
    kinds = zip(tokens, metadata['token_type'], strict=True)
    add([token for token, of in kinds if of == kind])
  return model


def _own_bos(
  settings: Mapping[str, Any], bos: int | None, eos: int, pad: int
) -> int | None:
  """Returns the token that begins a text, or None.

  Some files name the end of a text where they mean that nothing begins it.
  """
  unused = settings.get('add_bos_token') is False and bos in (eos, pad)
  return None if unused else bos


def _special_ids(folder: pathlib.Path, model: tokenizers.Tokenizer) -> dict[str, int]:
  """Reads the special ids from tokenizer_config.json, then config.json."""
  path = folder / 'tokenizer_config.json'
  names, ids = (
    files.read_json(p, AGAIN) if p.exists() else {}
    for p in (path, folder / 'config.json')
  )
  found = {}
  with files.parsing(path, f'{AGAIN}, and config.json beside it'):
    for key in ('bos', 'eos', 'pad'):
      name, number = names.get(f'{key}_token'), ids.get(f'{key}_token_id')
      token = name['content'] if isinstance(name, dict) else name
      number = number[0] if isinstance(number, list) else number
      found[f'{key}_id'] = model.token_to_id(token) if token else number
  if found['eos_id'] is None:
    raise files.Damaged(
      f'{folder} names no eos token: set eos_token in its tokenizer_config.json.'
    )
  if found['pad_id'] is None:
    found['pad_id'] = found['eos_id']
  # A tokenizer that says null of bos means none, whatever the model's file says.
  bos = found['bos_id'] if names.get('bos_token', '') is not None else None
  found['bos_id'] = _own_bos(names, bos, found['eos_id'], found['pad_id'])
  return found
