"""The tokenizer of a Hugging Face folder that we write."""

import json
from collections.abc import Iterator

import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from hetlora_jax.models.tokenizer import CONTROL, SPACE, USER_DEFINED, Tokenizer

NORMAL = 1  # a type of piece in SentencePiece


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
  """Returns the ids as a config.json names them."""
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
  }


def files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
  """Returns tokenizer.json with its settings, and SentencePiece's own file.

  A SentencePiece model that is no BPE stays alone.
  """
  model, contents = tokenizer.model, {}
  if not isinstance(model, tokenizers.Tokenizer):
    _, content = tokenizer.serialize()
    contents['tokenizer.model'] = content
    proto = sentencepiece_model.ModelProto.FromString(content)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
      return contents
    model = _from_sentencepiece(proto, tokenizer.bos_id)
  about = {
    name.removesuffix('_id'): None if i is None else model.id_to_token(i)
    for name, i in special_ids(tokenizer).items()
  }
  about['tokenizer_class'] = 'PreTrainedTokenizerFast'
  contents['tokenizer.json'] = model.to_str().encode()
  contents['tokenizer_config.json'] = json.dumps(about, indent=2).encode()
  return contents


def _from_sentencepiece(
  proto: sentencepiece_model.ModelProto, bos_id: int
) -> tokenizers.Tokenizer:
  """Rebuilds a SentencePiece BPE model for the other library.

  transformers 5.23 converts tokenizer.model only where its generated code is of
  the installed protobuf's version, and refuses the folder otherwise.
  """
  pieces = [p.piece for p in proto.pieces]
  control, own = (
    [p.piece for p in proto.pieces if p.type == kind]
    for kind in (CONTROL, USER_DEFINED)
  )
  bpe = tokenizers.models.BPE(
    {piece: i for i, piece in enumerate(pieces)},
    _merges(proto),
    unk_token=pieces[proto.trainer_spec.unk_id],
    fuse_unk=True,
    byte_fallback=True,
  )
  model, bos = tokenizers.Tokenizer(bpe), pieces[bos_id]
  model.normalizer = tokenizers.normalizers.Sequence(
    [*_cleaning(proto.normalizer_spec)]
  )
  decoders = tokenizers.decoders
  steps = [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
  steps.append(decoders.Strip(' ', int(proto.normalizer_spec.add_dummy_prefix), 0))
  model.decoder = decoders.Sequence(steps)
  model.add_special_tokens(control)
  model.add_tokens([tokenizers.AddedToken(p, normalized=True) for p in own])
  model.post_processor = tokenizers.processors.TemplateProcessing(
    single=f'{bos} $A', pair=f'{bos} $A {bos} $B', special_tokens=[(bos, bos_id)]
  )
  return model


def _cleaning(spec: sentencepiece_model.NormalizerSpec) -> Iterator:
  """Yields what is done to a text first; spaces are marked last."""
  normalizers = tokenizers.normalizers
  if spec.precompiled_charsmap:
    yield normalizers.Precompiled(spec.precompiled_charsmap)
  if spec.remove_extra_whitespaces:
    yield normalizers.Replace(tokenizers.Regex('^ +| +$'), '')
    yield normalizers.Replace(tokenizers.Regex(' {2,}'), ' ')
  if spec.add_dummy_prefix:
    yield normalizers.Prepend(' ')
  yield normalizers.Replace(' ', SPACE)


def _merges(proto: sentencepiece_model.ModelProto) -> list[tuple[str, str]]:
  """Returns the pairs that make a piece, those of high scores first."""
  kinds = (NORMAL, USER_DEFINED)
  score = {p.piece: p.score for p in proto.pieces if p.type in kinds}
  return [
    (piece[:i], piece[i:])
    for piece in sorted(score, key=lambda p: -score[p])
    for i in range(1, len(piece))
    if piece[:i] in score and piece[i:] in score
  ]
