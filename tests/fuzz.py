"""Damages every kind of file that is read, and reads it as a run would.

python -m tests.fuzz                   prints a table of formats and mutations
python -m tests.fuzz MOST GROUP ...    reads the cases of some groups in this
                                       process, under a bound on memory, and prints
                                       a line of JSON each: at most MOST of a
                                       mutation of a format
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from hetlora_jax.run import Run

ROOT = pathlib.Path(__file__).parent.parent
SECONDS = 10  # a case may take
MEMORY = 1 << 30  # bytes a case may ask for, beyond what is mapped when it starts
NOBODY = 65534
ALL = 1_000  # cases of a mutation: more than any format has
CANARY = 'HETLORA_FUZZ_CANARY'  # in the environment: a file that must not come

Content = bytes | None  # None: a directory in the place of the file
Cases = Iterator[tuple[str, Content]]


class Format(NamedTuple):
  """A kind of file.

  `make` fills an empty folder with valid files and returns the one to damage;
  `read` returns what a run would see of the folder, to be compared.
  """

  make: Callable[[pathlib.Path], pathlib.Path]
  read: Callable[[pathlib.Path], Any]
  damage: Callable[[bytes, random.Random], Cases]


class Pickled:
  """Makes a file if somebody unpickles it."""

  def __reduce__(self):
    return os.mknod, (os.environ[CANARY],)


# --- Mutations -------------------------------------------------------------


def any_file(content: bytes, rng: random.Random) -> Cases:
  """Yields what may happen to any file."""
  size = len(content)
  yield 'empty', b''
  for share in (0.1, 0.5, 0.9):
    yield 'truncated', content[: int(size * share)]
  yield 'truncated', content[:-1]
  for _ in range(6):
    yield 'bit flipped in the first KiB', flipped(content, rng, 1024)
  for _ in range(6):
    yield 'bit flipped anywhere', flipped(content, rng, size)
  for start in (0, size // 3):
    block = min(256, size - start)
    zeroed = content[:start] + bytes(block) + content[start + block :]
    yield 'block zeroed', zeroed
    doubled = content[: start + block] + content[start:]
    yield 'block doubled', doubled
  yield 'garbage appended', content + rng.randbytes(64)
  yield 'wrong magic', b'\xde\xad\xbe\xef' + content[4:]
  yield 'text instead', b'version https://git-lfs.github.com/spec/v1\n'
  yield 'pickle instead', pickle.dumps(Pickled())
  yield 'directory instead', None


def flipped(content: bytes, rng: random.Random, most: int) -> bytes:
  out = bytearray(content)
  out[rng.randrange(min(most, len(out)))] ^= 1 << rng.randrange(8)
  return bytes(out)


def own_file(content: bytes, rng: random.Random) -> Cases:
  """Yields damage to a file that this program wrote: nobody sent it."""
  del rng
  yield 'empty', b''
  yield 'truncated', content[: len(content) // 2]


def binary_file(content: bytes, rng: random.Random) -> Cases:
  """Yields damage to a file with lengths in its head, little-endian."""
  yield from any_file(content, rng)
  for start in (4, 8, 16, 24, 32, 48, 64, 96):
    for value in (b'\xff' * 8, (1 << 40).to_bytes(8, 'little')):
      changed = content[:start] + value + content[start + 8 :]
      yield 'length overwritten', changed


def text_file(content: bytes, rng: random.Random) -> Cases:
  yield from any_file(content, rng)
  yield 'not UTF-8', content.replace(b'e', b'\xff\xfe', 3)
  yield 'UTF-16', content.decode().encode('utf-16')
  yield 'NUL inserted', content[:20] + b'\0' + content[20:]


ODD = (None, True, -1, 0, 9_999, 2**31 - 1, 2**70, 1e308, float('nan'), float('inf'), 'x', [], {},
       [[]], 'x' * 10_000)  # fmt: skip


def json_file(content: bytes, rng: random.Random) -> Cases:
  """Yields damage to a file that holds an object."""
  yield from text_file(content, rng)
  for other in ('null', '[]', '1', '"x"', '{}', 'NaN', '{"a": 1, }'):
    yield 'other JSON', other.encode()
  yield 'nested deeply', b'[' * 100_000
  yield 'nested deeply', b'{"a":' * 100_000 + b'1' + b'}' * 100_000
  yield (
    'nested deeply',
    content.rstrip()[:-1] + b', "a": ' + (b'[' * 900 + b']' * 900 + b'}'),
  )
  yield 'huge number', b'{"a": ' + b'9' * 5000 + b'}'
  value = json.loads(content)
  for path in _paths(value)[:12]:
    yield 'field left out', _changed(value, path)
    for odd in rng.sample(ODD, 4):
      yield 'field of another kind', _changed(value, path, odd)


def _paths(value: Any, prefix: tuple = ()) -> list[tuple]:
  """Returns the paths of fields, outer ones first, the first of a list alone."""
  items = list(value.items()) if isinstance(value, dict) else []
  if isinstance(value, list) and value:
    items = [(0, value[0])]
  paths = [(*prefix, key) for key, _ in items]
  return paths + [p for k, x in items for p in _paths(x, (*prefix, k))]


def _changed(value: Any, path: tuple, *new: Any) -> bytes:
  value = copy.deepcopy(value)
  inner = functools.reduce(lambda x, key: x[key], path[:-1], value)
  if new:
    inner[path[-1]] = new[0]
  else:
    del inner[path[-1]]
  return json.dumps(value).encode()


def tokenizer_file(content: bytes, rng: random.Random) -> Cases:
  """Yields damage to a tokenizer.json, and one that asks for endless text."""
  yield from json_file(content, rng)
  padding = {
    'strategy': {'Fixed': 10**12}, 'direction': 'Right', 'pad_id': 0,
    'pad_to_multiple_of': None, 'pad_type_id': 0, 'pad_token': '<s>',
  }  # fmt: skip
  endless = json.loads(content) | {'padding': padding}
  yield 'endless padding', json.dumps(endless).encode()


def python_file(content: bytes, rng: random.Random) -> Cases:
  """Yields damage to a Python file; what is Python is executed, by design."""
  for name, changed in text_file(content, rng):
    if changed is None or not changed.startswith(b'\x80'):  # no pickles
      yield name, changed
  for line in ('x = (', 'raise KeyError(1)', 'import absent', '1 / 0',
               'def f(): f()\n\nf()', 'x = undefined'):  # fmt: skip
    yield 'error in it', line.encode() + b'\n' + content
  yield 'nested deeply', b'x = ' + b'(' * 10_000


def jsonl_file(content: bytes, rng: random.Random) -> Cases:
  yield from text_file(content, rng)
  for line in (b'1', b'[]', b'{}', b'null', b'[' * 100_000, b'{"round": "x"}'):
    yield 'odd line', line + b'\n' + content


# --- Base models -----------------------------------------------------------


def _leaves(config) -> dict:
  """Draws the weights of a model as stored, {leaf: one or one a layer}."""
  import numpy as np

  from hetlora_jax.formats import layout

  rng = np.random.default_rng(0)
  draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  outer = {k: draw(s) for k, s in layout._outer_shapes(config).items()}
  return outer | {
    k: [draw(s) for _ in range(config.num_layers)]
    for k, s in layout._layer_shapes(config).items()
  }


def _named(config, names) -> dict:
  """Gives every tensor its name in a format."""
  out = {}
  for leaf, value in _leaves(config).items():
    tensors = value if isinstance(value, list) else [value]
    out |= {names[leaf].format(i): x for i, x in enumerate(tensors)}
  return out


@functools.cache
def _tokenizer():
  from hetlora_jax.models.tokenizer import Tokenizer

  return Tokenizer.train(['some text to learn words from'], 280)


SIZES = {
  'vocab_size': 280,
  'num_hidden_layers': 2,
  'hidden_size': 32,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'intermediate_size': 64,
  'tie_word_embeddings': True,
}


def make_folder(folder: pathlib.Path, tokenizer: str = 'model') -> None:
  """Writes a Hugging Face folder of Gemma's or, with JSON, Llama's family."""
  import safetensors.numpy
  import tokenizer_test

  from hetlora_jax.formats import hf_config, hf_folder

  gemma = tokenizer == 'model'
  raw = {'model_type': 'gemma3_text' if gemma else 'llama', **SIZES}
  if gemma:
    proto = _tokenizer().serialize()[1]
    (folder / 'tokenizer.model').write_bytes(proto)
  else:
    raw['vocab_size'] = tokenizer_test._folder_with_bpe(folder).get_vocab_size()
  (folder / 'config.json').write_text(json.dumps(raw))
  config = hf_config.read_config(folder, raw)
  tensors = _named(config, hf_folder.tensor_names(config.family))
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  index = {'weight_map': dict.fromkeys(tensors, 'model.safetensors')}
  path = folder / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))


def folder_file(name: str, tokenizer: str = 'model'):
  """Returns a maker of a folder that damages a file of it."""

  def make(folder: pathlib.Path) -> pathlib.Path:
    make_folder(folder, tokenizer)
    if name == 'model.safetensors':
      (folder / 'model.safetensors.index.json').unlink()
    return folder / name

  return make


def make_gguf(family: str):
  def make(folder: pathlib.Path) -> pathlib.Path:
    import gguf
    import numpy as np
    import tokenizer_test
    from sentencepiece import sentencepiece_model_pb2

    from hetlora_jax import formats

    writer = gguf.GGUFWriter(folder / 'model.gguf', family)
    writer.add_block_count(SIZES['num_hidden_layers'])
    writer.add_embedding_length(SIZES['hidden_size'])
    writer.add_head_count(SIZES['num_attention_heads'])
    writer.add_head_count_kv(SIZES['num_key_value_heads'])
    writer.add_key_length(SIZES['head_dim'])
    writer.add_feed_forward_length(SIZES['intermediate_size'])
    writer.add_layer_norm_rms_eps(1e-6)
    model_type = 'llama'
    if family == 'gemma3':
      model_type = 'gemma3_text'
      writer.add_sliding_window(64)
      proto = sentencepiece_model_pb2.ModelProto()
      proto.ParseFromString(_tokenizer().serialize()[1])
      words = tokenizer_test.gguf_of_sentencepiece(proto)
      writer.add_token_scores(words['scores'])
      writer.add_add_space_prefix(False)
    else:
      letters = sorted(tokenizer_test.pre_tokenizers.ByteLevel.alphabet())
      more = [f'<{i}>' for i in range(280 - len(letters) - 1)]
      words = {'model': 'gpt2', 'tokens': [*letters, 'so', *more]}
      words['token_type'] = [1] * 257 + [3] * (280 - 257)
      words |= {'bos_token_id': 258, 'eos_token_id': 259}
      writer.add_tokenizer_pre('smollm')
      writer.add_token_merges(['s o'])
    writer.add_tokenizer_model(words['model'])
    writer.add_token_list(words['tokens'])
    writer.add_token_types(words['token_type'])
    writer.add_bos_token_id(words['bos_token_id'])
    writer.add_eos_token_id(words['eos_token_id'])
    raw = {'model_type': model_type, **SIZES}
    config = formats.hf_config.read_config(folder, raw)
    for name, tensor in _named(config, formats.gguf.NAMES).items():
      kind = gguf.GGMLQuantizationType.F32
      if tensor.ndim == 2:  # the embedding in half precision, matrices in blocks
        embed = name == formats.gguf.NAMES['embed']
        tensor = tensor.astype(np.float16) if embed else tensor
        kind = gguf.GGMLQuantizationType['F16' if embed else 'Q8_0']
        tensor = tensor if embed else gguf.quants.quantize(tensor, kind)
      writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / 'model.gguf'

  return make


def _seen_of(model) -> tuple:
  """Returns all that a run would see of a base model."""
  import jax
  import numpy as np

  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(model.params):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  t = model.tokenizer
  ids = t.encode('some text\n12, \N{GRINNING FACE}')
  special = (t.bos_id, t.eos_id, t.pad_id)
  return model.config, digest.hexdigest(), ids, t.decode(ids), special


def read_folder(folder: pathlib.Path) -> tuple:
  from hetlora_jax import formats

  return _seen_of(formats.load(folder, dtype='float32', cached=False))


def read_gguf(folder: pathlib.Path) -> tuple:
  return read_folder(folder / 'model.gguf')


def make_cache(folder: pathlib.Path) -> pathlib.Path:
  """Makes a folder with its model in the cache, which is damaged."""
  from hetlora_jax import formats
  from hetlora_jax.formats import cache

  make_folder(folder)
  return cache.weights_path(formats.load(folder, dtype='float32').fingerprint)


def read_cached(folder: pathlib.Path) -> tuple:
  from hetlora_jax import formats

  return _seen_of(formats.load(folder, dtype='float32'))


MODELS = {
  'GGUF, BPE': Format(make_gguf('llama'), read_gguf, binary_file),
  'GGUF, SentencePiece': Format(make_gguf('gemma3'), read_gguf, binary_file),
  'safetensors': Format(folder_file('model.safetensors'), read_folder, binary_file),
  'model.safetensors.index.json': Format(
    folder_file('model.safetensors.index.json'), read_folder, json_file
  ),
  'config.json of a model': Format(folder_file('config.json'), read_folder, json_file),
  'tokenizer.model': Format(folder_file('tokenizer.model'), read_folder, binary_file),
  'tokenizer.json': Format(
    folder_file('tokenizer.json', 'json'), read_folder, tokenizer_file
  ),
  'tokenizer_config.json': Format(
    folder_file('tokenizer_config.json', 'json'), read_folder, json_file
  ),
  'weights cache': Format(make_cache, read_cached, own_file),
}


# --- Adapters --------------------------------------------------------------


def make_adapter(name: str):
  """Returns a maker of a PEFT folder that damages a file of it."""

  def make(folder: pathlib.Path) -> pathlib.Path:
    golden = ROOT / 'tests' / 'golden' / 'peft_tiny_llama'
    shutil.copytree(golden, folder, dirs_exist_ok=True)
    return folder / name

  return make


def read_adapter(folder: pathlib.Path) -> list:
  import numpy as np

  from hetlora_jax.formats import peft
  from hetlora_jax.types import Lora

  dims = {'q': (24, 32), 'v': (24, 16), 'down': (40, 24)}
  like = {
    t: Lora(np.zeros((3, d_in, 4)), np.zeros((3, 4, d_out)))
    for t, (d_in, d_out) in dims.items()
  }
  found = peft.read(folder, like, 1.3)
  return [x.tobytes() for padded in found.values() for x in padded.adapter]


ADAPTERS = {
  name: Format(make_adapter(name), read_adapter, damage)
  for name, damage in (
    ('adapter_config.json', json_file),
    ('adapter_model.safetensors', binary_file),
  )
}


# --- Data sets -------------------------------------------------------------


@functools.cache
def _prepared() -> tempfile.TemporaryDirectory:
  """Prepares data once, to be copied; the folder goes when the process ends."""
  from hetlora_jax.data import builders

  folder = tempfile.TemporaryDirectory()
  with contextlib.redirect_stdout(io.StringIO()):
    builders.open_dataset('synthetic', folder.name)
  return folder


def make_data(pattern: str):
  """Returns a maker of prepared data of which a file is damaged."""

  def make(folder: pathlib.Path) -> pathlib.Path:
    shutil.copytree(_prepared().name, folder, dirs_exist_ok=True)
    (path,) = folder.rglob(pattern)
    return path

  return make


def read_data(folder: pathlib.Path) -> tuple:
  """Reads who there is and some of their turns."""
  from hetlora_jax.data import builders, people

  data = dataclasses.replace(
    _config().data, name='synthetic', min_examples=2, heldout_fraction=0.2
  )
  dataset = builders.open_dataset('synthetic', folder)
  group = people.load(data, _tokenizer(), dataset)
  count = len(group.client_ids)
  rows = [group.example('train', i, 0).tokens.tolist() for i in range(0, count, 7)]
  return group.client_ids, group.num_examples.tolist(), rows


MESSAGE = {'text': 'hello', 'timestamp': '2020-01-01T00:00:00', 'sender': 'a'}
CHATS = {
  'one': {'messages': [[MESSAGE], [MESSAGE | {'sender': 'b'}], [MESSAGE], [MESSAGE]]}
}


def make_chitchat(folder: pathlib.Path) -> pathlib.Path:
  path = folder / 'dataset.json'
  path.write_text(json.dumps(CHATS))
  return path


def read_chitchat(folder: pathlib.Path) -> list:
  """Prepares the data; a failure must leave nothing that seems prepared."""
  from unittest import mock

  from hetlora_jax.data import builders
  from hetlora_jax.data.builders import chitchat

  path, data = folder / 'dataset.json', folder / 'tfds'
  try:
    with (
      mock.patch.object(chitchat, '_dataset_path', lambda: path),
      contextlib.redirect_stdout(io.StringIO()),
    ):
      examples = builders.open_dataset('chitchat', data).examples
      return [(r['client'], r['time'], r['target']) for r in examples]
  except Exception as error:
    if list(data.rglob('*.array_record*')):
      raise AssertionError('a half-written directory is left') from error
    raise
  finally:
    shutil.rmtree(data, ignore_errors=True)


def make_lines(folder: pathlib.Path) -> pathlib.Path:
  path = folder / 'mine.jsonl'
  line = {'client': 'ann', 'context': ['Hi.', 'Oh?'], 'target': 'Yes.'}
  lines = [json.dumps(line | {'time': i, 'label': 'x'}) for i in range(9)]
  path.write_text('\n'.join(lines))
  return path


def make_rows(file: str):
  """Returns a maker of a file with the rows of `make_lines`."""

  def make(folder: pathlib.Path) -> pathlib.Path:
    import text_folder_test

    row = {'client': 'ann', 'context': 'Hi.', 'target': 'Yes.', 'label': 'x'}
    path = folder / file
    text_folder_test.WRITERS[path.suffix](path, [row | {'time': i} for i in range(9)])
    return path

  return make


def make_mails(folder: pathlib.Path) -> pathlib.Path:
  import mail_subject_test

  path = folder / 'mails.tgz'
  body = mail_subject_test.BODY
  return mail_subject_test.pack(
    path,
    [mail_subject_test.message(f'Part {i}', f'{i} {body}') for i in range(9)],
  )


def read_own(name: str, file: str):
  """Returns a reader of a user's file, which leaves nothing half-written."""

  def read(folder: pathlib.Path) -> list:
    from hetlora_jax.data import builders

    data = folder / 'tfds'
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        path = str(folder / file)
        examples = builders.open_dataset(name, data, path).examples
      return [(r['client'], r['time'], r['target']) for r in examples]
    except Exception as error:
      if list(data.rglob('*.array_record*')):
        raise AssertionError('a half-written directory is left') from error
      raise
    finally:
      shutil.rmtree(data, ignore_errors=True)

  return read


DATA = {
  **{
    name: Format(make_data(pattern), read_data, own_file)
    for name, pattern in (
      ('examples.array_record', '*examples.array_record*'),
      ('people.array_record', '*people.array_record*'),
      ('dataset_info.json', 'dataset_info.json'),
      ('features.json', 'features.json'),
    )
  },
  "chitchat's dataset.json": Format(make_chitchat, read_chitchat, json_file),
  'JSONL of text_folder': Format(
    make_lines, read_own('text_folder', 'mine.jsonl'), jsonl_file
  ),
  **{
    f'{kind} of text_folder': Format(
      make_rows(file), read_own('text_folder', file), damage
    )
    for kind, file, damage in (
      ('CSV', 'mine.csv', text_file),
      ('JSON', 'mine.json', text_file),
      ('Parquet', 'mine.parquet', binary_file),
    )
  },
  'tarball of mail_subject': Format(
    make_mails, read_own('mail_subject', 'mails.tgz'), binary_file
  ),
}


# --- Configurations and runs -----------------------------------------------


@functools.cache
def _config():
  from configs import tiny
  from hetlora_jax import config

  return config.resolve(tiny.get_config())


def make_config(folder: pathlib.Path) -> pathlib.Path:
  path = folder / 'mine.py'
  path.write_text((ROOT / 'configs' / 'tiny.py').read_text())
  return path


def read_config(folder: pathlib.Path) -> dict:
  """Loads a --config file as the launchers do."""
  from absl import flags as absl_flags

  from hetlora_jax import config
  from launch import errors, flags

  absl_flags.FLAGS.unparse_flags()
  try:
    errors.parse(['train', f'--config={folder / "mine.py"}'])
    return config.to_dict(config.resolve(flags.CONFIG.value))
  finally:
    absl_flags.FLAGS.unparse_flags()


def make_sweep(folder: pathlib.Path) -> pathlib.Path:
  path = folder / 'mine.py'
  path.write_text(
    'SWEEPS = {"seeds": [{"seed": 0}, {"seed": 1}]}\n\n\n'
    'def get_sweep(name):\n  return SWEEPS[name]\n'
  )
  return path


def read_sweep(folder: pathlib.Path) -> list:
  from hetlora_jax.tools import sweep

  points = sweep.load(f'{folder / "mine.py"}:seeds')
  runs = sweep.plan(_config(), points, folder, 'train')
  return [(run.name, run.error) for run in runs]


def make_run(name: str):
  def make(folder: pathlib.Path) -> pathlib.Path:
    from hetlora_jax import config, files

    row = {'round': 30, 'eval/seen/loss': 1.0, 'eval/unseen/loss': 1.0}
    (folder / 'a').mkdir()
    files.write_json(folder / 'a/config.json', config.to_dict(_config()))
    summary = {
      'last': row, 'comm/up_bytes': 1, 'comm/down_bytes': 1,
      'train/parameters': 1, 'aggregation/error': 0.0, 'time/rounds_s': 1.0,
    }  # fmt: skip
    files.write_json(folder / 'a/summary.json', summary)
    traffic = {'comm/total_up_bytes': 1, 'comm/total_down_bytes': 1}
    rows = [row | {'round': 29}, row | {'train/loss': 1} | traffic]
    path = folder / 'a/metrics.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return folder / 'a' / name

  return make


def _run(folder: pathlib.Path):
  from hetlora_jax.tools import sweep

  return sweep.Job('a', {}, _config(), folder / 'a', 'train')


def read_run(folder: pathlib.Path) -> None:

  Run(folder / 'a').check(_config())


def read_summary(folder: pathlib.Path) -> str:
  from hetlora_jax.tools import sweep, tables

  return tables.table(sweep.results([_run(folder)]))


def read_rows(folder: pathlib.Path) -> tuple:
  """Reads a run's rows as the plot of a sweep does."""
  from hetlora_jax.tools import tables

  rounds, losses, megabytes = tables._curve(folder / 'a')
  return rounds, megabytes.tolist(), losses.tolist()


RUNS = {
  '--config file': Format(make_config, read_config, python_file),
  '--sweep file': Format(make_sweep, read_sweep, python_file),
  'config.json of a run': Format(make_run('config.json'), read_run, own_file),
  'summary.json of a run': Format(make_run('summary.json'), read_summary, own_file),
  'metrics.jsonl of a run': Format(make_run('metrics.jsonl'), read_rows, own_file),
}
GROUPS = {'models': MODELS, 'adapters': ADAPTERS, 'data': DATA, 'runs': RUNS}


# --- Running cases ---------------------------------------------------------


@dataclasses.dataclass
class Outcome:
  """What came of a case: 'refused', 'same', 'another' file, or 'escaped'."""

  format: str
  mutation: str
  result: str
  message: str = ''
  seconds: float = 0.0


class TooLong(BaseException):
  """A case took too long."""


def _stop(*_):
  raise TooLong


def _attempt(read, folder: pathlib.Path, want: Any) -> tuple[str, str]:
  """Reads once; returns the result and the message of an error."""
  said = io.StringIO()
  try:
    with contextlib.redirect_stderr(said):
      got = read(folder)
    return ('same' if repr(got) == repr(want) else 'another'), said.getvalue()
  except (ValueError, OSError) as error:  # what launch/flags.py catches
    from hetlora_jax import files

    return 'refused', files.short(error, 10_000)
  except SystemExit as error:  # what launch/errors.py does
    return ('refused' if error.code == 2 else 'escaped'), said.getvalue()
  except BaseException as error:
    return 'escaped', f'{type(error).__name__}: {error}'


def _put(path: pathlib.Path, content: Content) -> None:
  if path.is_dir():
    path.rmdir()
  elif path.exists():
    path.unlink()
  if content is None:
    path.mkdir()
  else:
    path.write_bytes(content)


@contextlib.contextmanager
def _unreadable(path: pathlib.Path) -> Iterator[None]:
  """Takes the right to read a file, also from root."""
  root = os.geteuid() == 0
  path.chmod(0)
  if root:
    os.seteuid(NOBODY)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)
    path.chmod(0o644)


def _open_to_all(folder: pathlib.Path) -> None:
  for path in (folder, *folder.rglob('*')):
    path.chmod(0o777 if path.is_dir() else 0o666)


def _chosen(found: Cases, most: int) -> Cases:
  """Yields at most so many cases of each mutation, spread over those there are."""
  by_mutation = collections.defaultdict(list)
  for mutation, changed in found:
    by_mutation[mutation].append(changed)
  for mutation, all_changed in by_mutation.items():
    step = max(1, len(all_changed) // most)
    for changed in all_changed[::step][:most]:
      yield mutation, changed


def cases(
  name: str, form: Format, folder: pathlib.Path, most: int
) -> Iterator[tuple[str, tuple[str, str]]]:
  """Yields every mutation and what came of it."""
  path = form.make(folder)
  content, want = path.read_bytes(), form.read(folder)
  if repr(form.read(folder)) != repr(want):
    raise AssertionError(f'{name}: two readings differ')
  damaged = form.damage(content, random.Random(name))
  for mutation, changed in _chosen(damaged, most):
    if changed == content:
      continue
    _put(path, changed)
    yield mutation, _attempt(form.read, folder, want)
  _put(path, content)
  _open_to_all(folder)
  with _unreadable(path):
    outcome = _attempt(form.read, folder, want)
  yield 'unreadable', outcome
  path.unlink()
  path.symlink_to(path)
  yield 'symbolic link to itself', _attempt(form.read, folder, want)
  path.unlink(missing_ok=True)


def child(most: str, *groups: str) -> None:
  """Runs some groups' cases and prints them."""
  import jax

  jax.devices()
  signal.signal(signal.SIGALRM, _stop)
  for name, form in (item for g in groups for item in GROUPS[g].items()):
    with tempfile.TemporaryDirectory() as temporary:
      base = pathlib.Path(temporary)
      base.chmod(0o777)
      cache, folder = base / 'cache', base / 'files'
      cache.mkdir()
      folder.mkdir()
      os.environ |= {'HETLORA_CACHE': str(cache), CANARY: str(base / 'canary')}
      outcomes = cases(name, form, folder, int(most))
      while True:
        print(json.dumps({'begins': name}), flush=True)
        started = time.perf_counter()
        signal.alarm(6 * SECONDS)
        if (found := next(outcomes, None)) is None:
          break
        mutation, (result, message) = found
        _open_to_all(cache)
        _limit_memory()
        seconds = time.perf_counter() - started
        if (base / 'canary').exists():
          result, message = 'escaped', 'it was executed'
        outcome = Outcome(name, mutation, result, message, seconds)
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)
      signal.alarm(0)
      resource.setrlimit(
        resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
      )


def _limit_memory() -> None:
  """Allows so much more memory than is mapped now."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  most = pages * resource.getpagesize() + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))


def run(groups: Iterable[str], most: int = ALL) -> tuple[list[Outcome], str]:
  """Runs groups in a child; returns their outcomes and what it wrote besides."""
  done = subprocess.run(
    [sys.executable, '-m', 'tests.fuzz', str(most), *groups],
    cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    env=os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}',
                      'PYTHONWARNINGS': 'ignore', 'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip
  lines = [json.loads(x) for x in done.stdout.splitlines() if x[:1] == '{']
  outcomes = [Outcome(**x) for x in lines if 'result' in x]
  if done.returncode:
    last = Outcome(str(lines[-1:]), '', 'escaped', f'ended {done.returncode}')
    outcomes.append(last)
  return outcomes, done.stderr


def table(outcomes: list[Outcome]) -> str:
  """Returns Markdown: refused / same / another, by format and by mutation."""
  lines = ['| | refused | read, the same | read, another valid file |',
           '|---|---:|---:|---:|']  # fmt: skip
  for field in ('format', 'mutation'):
    counts = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
      counts[getattr(outcome, field)][outcome.result] += 1
    for name, c in counts.items():
      cells = [str(c[x]) for x in ('refused', 'same', 'another')]
      lines.append(f'| {name} | {" | ".join(cells)} |')
    total = collections.Counter(o.result for o in outcomes)
    cells = [f'**{total[x]}**' for x in ('refused', 'same', 'another')]
    lines.append(f'| **all {field}s** | {" | ".join(cells)} |')
  return '\n'.join(lines)


def main(*args: str) -> None:
  if args:
    child(*args)
    return
  outcomes, _ = run(GROUPS)
  print(table(outcomes))
  for outcome in outcomes:
    if outcome.result == 'escaped':
      print(outcome)


if __name__ == '__main__':
  main(*sys.argv[1:])
