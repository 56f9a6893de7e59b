"""Damaged and hostile input: one line, exit code 2, nothing executed or written.

`fuzz.py` has the formats and the mutations; docs/bad_input.md the counts.
"""

import collections
import functools
import json
import os
import pathlib
import tempfile

import fuzz
import gguf
import ml_collections
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from hetlora_jax import config, files
from hetlora_jax.config import ConfigError, flat, to_dict
from hetlora_jax.formats import gguf as gguf_format
from hetlora_jax.formats import layout
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.tools import sweep
from launch import errors
from tests import programs

LEAST = 800  # malformed inputs refused by the long run; a tenth by the short one
MOST = 2  # of a mutation of a format, in the short run
MOST_CHARACTERS = 400
PLACES = ('/files', '/cache', '--config')  # one of them is named
# Whatever these are put in the place of, it is not a valid file of any kind ...
NEVER_VALID = (
  'empty', 'text instead', 'pickle instead',
  'directory instead', 'unreadable',
)  # fmt: skip
# ... but these say nothing that is needed, or are cut at the first torn line.
UNNEEDED = ('metrics.jsonl of a run', 'features.json')
# ... and these have sums, so damage is never taken for another valid file.
SEALED = (
  'weights cache', 'examples.array_record', 'people.array_record',
  'dataset_info.json', 'features.json',
)  # fmt: skip


def test_damaged_files_are_refused_in_one_line():
  _check_outcomes(MOST, LEAST // 10)


@pytest.mark.slow
def test_many_damaged_files_are_refused_in_one_line():
  _check_outcomes(fuzz.ALL, LEAST)


def _check_outcomes(most, least):
  outcomes, stderr = fuzz.run(fuzz.GROUPS, most)
  by_result = collections.defaultdict(list)
  for outcome in outcomes:
    by_result[outcome.result].append(outcome)
  assert not by_result['escaped'], by_result['escaped'][:3]
  assert {o.format for o in outcomes} == {f for g in fuzz.GROUPS.values() for f in g}
  assert max(o.seconds for o in outcomes) < fuzz.SECONDS
  assert 'Traceback' not in stderr and 'panicked' not in stderr, stderr
  for outcome in by_result['refused']:
    assert len(outcome.message.strip()) < MOST_CHARACTERS, outcome
    assert '\n' not in outcome.message.strip(), outcome
    assert any(x in outcome.message for x in PLACES), outcome
  for outcome in by_result['same'] + by_result['another']:
    valid = outcome.mutation not in NEVER_VALID or outcome.format in UNNEEDED
    assert valid or _is_python(outcome), outcome
  assert not [o for o in by_result['another'] if o.format in SEALED]
  assert len(by_result['refused']) >= least


def _is_python(outcome) -> bool:
  return outcome.format.endswith(' file') and outcome.mutation == 'empty'


SILENT = ''  # a refusal that names no remedy

json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
  lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
  max_leaves=8,
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  patch = pytest.MonkeyPatch()
  patch.setenv('HETLORA_CACHE', str(tmp_path_factory.mktemp('cache')))
  path = tmp_path_factory.mktemp('model')
  fuzz.make_folder(path)
  yield path
  patch.undo()


@settings(max_examples=30, deadline=10_000, derandomize=True)
@given(field=st.sampled_from([*fuzz.SIZES, 'rope_parameters', 'text_config',
                              'rope_scaling', 'layer_types', 'rope_theta',
                              'query_pre_attn_scalar', 'sliding_window']),
       value=json_values)  # fmt: skip
def test_any_value_in_a_models_config_is_read_or_refused(folder, field, value):
  raw = {'model_type': 'gemma3_text', **fuzz.SIZES, field: value}
  (folder / 'config.json').write_text(json.dumps(raw))
  assert _refusal(lambda: fuzz.read_folder(folder)) != SILENT


@settings(max_examples=100, deadline=10_000, derandomize=True)
@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
def test_any_bytes_after_the_magic_of_a_gguf_are_refused(content, count):
  with tempfile.NamedTemporaryFile() as file:
    head = b'GGUF\3\0\0\0' + count.to_bytes(8, 'little')
    file.write(head + (1).to_bytes(8, 'little') + content)
    file.flush()
    assert _refusal(lambda: gguf_format.read(pathlib.Path(file.name)))


@settings(max_examples=100, deadline=10_000, derandomize=True)
@given(st.text() | json_values.map(json.dumps) | st.binary())
def test_any_text_is_json_or_refused(content):
  try:
    value = files.parse_json(content, pathlib.Path('x.json'), 'mend it')
  except files.Damaged as error:
    assert str(error).startswith('x.json is ')
    assert str(error).endswith(': mend it.')
  else:
    assert isinstance(value, dict)


@settings(max_examples=100, deadline=10_000, derandomize=True)
@given(field=st.sampled_from(sorted(flat(to_dict(fuzz._config())))),
       value=json_values)  # fmt: skip
def test_any_value_of_a_config_is_taken_or_refused(field, value):
  assert _refusal(lambda: fuzz._config().replace(**{field: value})) != SILENT
  whole = to_dict(fuzz._config())
  *sections, name = field.split('.')
  functools.reduce(dict.__getitem__, sections, whole)[name] = value
  assert _refusal(lambda: config.resolve(ml_collections.ConfigDict(whole))) != SILENT


@pytest.mark.parametrize('value', [float('inf'), float('nan'), 10**400])
@pytest.mark.parametrize('field', ['seed', 'federated.gamma'])
def test_numbers_that_are_none_are_named(field, value):
  whole = to_dict(fuzz._config())
  *sections, name = field.split('.')
  functools.reduce(dict.__getitem__, sections, whole)[name] = value
  with pytest.raises(ConfigError, match=f'config.{field}='):
    config.resolve(ml_collections.ConfigDict(whole))


@settings(max_examples=100, deadline=10_000, derandomize=True)
@given(st.text(), json_values)
def test_any_grid_is_taken_or_refused(text, values):
  def read(grid):
    return sweep.parse_grid(grid, fuzz._config())

  assert _refusal(lambda: read(text)) != SILENT
  assert _refusal(lambda: read(f'seed={values!r} x federated.gamma={text}')) != SILENT
  for odd in ('[' * 5000, '[{[]}]', f'[{"-" * 50_000}1]'):
    with pytest.raises(ConfigError, match='must be FIELD'):
      read(f'seed={odd}')


def test_a_grid_without_end_is_refused():
  many = '[' + '0,' * 1000 + ']'
  grid = f'seed={many} x model.random.seed={many}'
  with pytest.raises(ConfigError, match='more than 100000 points'):
    sweep.parse_grid(grid, fuzz._config())


def _refusal(read) -> str | None:
  """Returns what is said of a value that is refused; None if it is read."""
  try:
    read()
  except (ConfigError, ValueError, OSError) as error:
    return str(error)  # flags.run makes it one line, for people
  return None


def test_sections_of_another_kind_are_named():
  for raw in ({'federated': 3}, {'mesh': None}, {}):
    whole = to_dict(fuzz._config()) | raw if raw else {}
    with pytest.raises(ConfigError, match=r'default\.py'):
      config.built(ml_collections.ConfigDict(whole))


# --- One at a time ---------------------------------------------------------


@pytest.fixture
def model(tmp_path, monkeypatch):
  """Returns a folder with a model, without an index of its tensors."""
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path / 'cache'))
  path = tmp_path / 'files'
  path.mkdir()
  fuzz.folder_file('model.safetensors')(path)
  return path


def _change_weights(folder, change):
  path = folder / 'model.safetensors'
  tensors = dict(safetensors.numpy.load_file(path))
  change(tensors)
  safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 1e31])
def test_weights_that_are_not_finite_are_named(model, value):
  def change(tensors):
    tensors['model.norm.weight'][3] = value

  _change_weights(model, change)
  with pytest.raises(ValueError, match=r'model\.norm.* are not finite'):
    fuzz.read_folder(model)


def test_a_tensor_that_the_index_promises_is_named(model):
  names = list(safetensors.numpy.load_file(model / 'model.safetensors'))
  index = {'weight_map': dict.fromkeys(names, 'model.safetensors')}
  path = model / 'model.safetensors.index.json'
  path.write_text(json.dumps(index))
  _change_weights(model, lambda tensors: tensors.pop('model.norm.weight'))
  with pytest.raises(ValueError, match=r'it lacks model\.norm\.weight'):
    fuzz.read_folder(model)


@pytest.mark.parametrize('shard', ['../x', '/etc/passwd', '.', 'x' * 300])
def test_an_index_names_files_of_its_folder_alone(model, shard):
  path = model / 'model.safetensors.index.json'
  path.write_text(json.dumps({'weight_map': {'a': shard}}))
  with pytest.raises(ValueError, match='names no files'):
    fuzz.read_folder(model)


def test_memory_is_taken_for_layers_that_are_there(model, monkeypatch):
  raw = json.loads((model / 'config.json').read_text())
  raw['num_hidden_layers'] = 10_000
  (model / 'config.json').write_text(json.dumps(raw))
  monkeypatch.setattr(layout.np, 'empty', lambda *_: pytest.fail('taken'))
  with pytest.raises(ValueError, match=r'lacks the tensor model\.layers\.2'):
    fuzz.read_folder(model)


def test_tensors_of_a_gguf_that_overlap_are_refused(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / 'x.gguf', 'llama')
  for name in 'abc':
    writer.add_tensor(name, np.ones(64, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  content = (tmp_path / 'x.gguf').read_bytes()
  assert set(gguf_format.read(tmp_path / 'x.gguf').tensors) == set('abc')
  offset = (512).to_bytes(8, 'little')
  assert content.count(offset) == 1
  start = content.replace(offset, bytes(8))[:-256]
  (tmp_path / 'x.gguf').write_bytes(start)
  with pytest.raises(ValueError, match='tensor c needs 256 bytes'):
    gguf_format.read(tmp_path / 'x.gguf')


def test_a_tokenizer_of_another_model_is_refused(model):
  raw = json.loads((model / 'config.json').read_text())
  proto = Tokenizer.train(['another text, with more words'], 290)
  (model / 'tokenizer.model').write_bytes(proto.serialize()[1])
  with pytest.raises(ValueError, match=f'290 words.*{raw["vocab_size"]} words'):
    fuzz.read_folder(model)


def test_a_pipe_in_the_place_of_a_file_does_not_wait(tmp_path):
  os.mkfifo(tmp_path / 'x.json')
  with pytest.raises(ValueError, match='is not a file'):
    files.read_json(tmp_path / 'x.json', 'mend it')


def test_a_file_without_end_is_not_read_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(files, 'MOST_BYTES', 1000)
  (tmp_path / 'x.json').write_bytes(bytes(1001))
  with pytest.raises(ValueError, match='more than 1000 bytes'):
    files.read_json(tmp_path / 'x.json', 'mend it')


def test_messages_are_short_and_printable(capsys):
  with pytest.raises(SystemExit):
    errors.fail('a\n\x1b[31m b' + 'x' * 100_000)
  said = capsys.readouterr().err
  assert said.startswith('Error: a \ufffd[31m bxxx')
  assert len(said) < errors.MOST_CHARACTERS + 20


# --- The launchers ---------------------------------------------------------

TRAIN = ('launch.train', '--config=configs/tiny.py')
SWEEP = ('launch.sweep', '--config=configs/tiny.py')
SOURCE = '--config.model.source={files}'


def _cut(content):
  return content[: len(content) // 2]


def _flip(content):
  return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]


def _odd(content):
  return b'x = (\n' + content


slow = pytest.mark.slow


@pytest.mark.parametrize(
  ('name', 'damage', 'command'),
  [
    ('GGUF, BPE', _cut, (*TRAIN, f'{SOURCE}/model.gguf')),
    pytest.param('examples.array_record', _cut, TRAIN, marks=slow),
    ('--config file', _odd, ('launch.train', '--config={files}/mine.py')),
    pytest.param('safetensors', _cut, (*TRAIN, SOURCE), marks=slow),
    pytest.param('tokenizer.model', _cut, (*TRAIN, SOURCE), marks=slow),
    pytest.param('tokenizer.json', _cut, (*TRAIN, SOURCE), marks=slow),
    pytest.param('weights cache', _flip, (*TRAIN, SOURCE), marks=slow),
    pytest.param(
      'config.json of a model', _cut, (*TRAIN, SOURCE), marks=slow
    ),
    pytest.param(
      'model.safetensors.index.json', _cut, (*TRAIN, SOURCE), marks=slow
    ),
    pytest.param('dataset_info.json', _flip, TRAIN, marks=slow),
    pytest.param('people.array_record', _cut, TRAIN, marks=slow),
    pytest.param(
      "chitchat's dataset.json", _cut,
      (*TRAIN, '--config.data.name=chitchat'), marks=slow,
    ),
    pytest.param(
      '--sweep file', _odd, (*SWEEP, '--sweep={files}/mine.py:seeds'),
      marks=slow,
    ),
  ],
)  # fmt: skip
def test_a_launcher_says_one_line_and_makes_nothing(
  tmp_path, monkeypatch, name, damage, command
):
  files, cache, run = (tmp_path / x for x in ('files', 'cache', 'run'))
  files.mkdir()
  monkeypatch.setenv('HETLORA_CACHE', str(cache))
  form = next(g[name] for g in fuzz.GROUPS.values() if name in g)
  own = cache / 'tfds' if form.read is fuzz.read_data else files
  own.mkdir(parents=True, exist_ok=True)
  path = form.make(own)
  path.write_bytes(damage(path.read_bytes()))
  more = {}
  if name.startswith('chitchat'):  # in the place of the real package
    (files / 'chitchat_dataset.py').touch()
    more = {'PYTHONPATH': str(files)}
  words = [x.format(files=files) for x in command]
  done = programs.run(*words, f'--workdir={run}', XLA_FLAGS='', **more)
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith('Error: '), done.stderr
  assert done.stderr.count('\n') == 1, done.stderr
  assert len(done.stderr) < MOST_CHARACTERS + 100
  assert str(tmp_path) in done.stderr
  assert not run.exists()
