"""Files are written whole or not at all, and one folder caches them."""

import json
import pathlib

import pytest

from hetlora_jax import files
from hetlora_jax.data import builders


@pytest.mark.parametrize(
  ('value', 'want'),
  [
    (None, '.cache/hetlora_jax'),
    ('', '.cache/hetlora_jax'),  # empty counts as unset
    ('~/x', 'x'),
  ],
)
def test_models_and_data_share_one_cache_folder(tmp_path, monkeypatch, value, want):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.delenv('HETLORA_CACHE', raising=False)
  if value is not None:
    monkeypatch.setenv('HETLORA_CACHE', value)
  folder = tmp_path / 'home' / want
  assert files.cache_folder() == folder and folder.is_dir()
  monkeypatch.setattr(builders, '_prepare', lambda builder: None)
  with pytest.raises(ValueError) as error:  # it opens what was not prepared
    builders.open_dataset('synthetic')
  assert str(folder / 'tfds' / 'synthetic') in str(error.value)
  assert [p.name for p in tmp_path.iterdir()] == ['home']


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'new' / 'x.json'
  files.write_json(path, {'a': 1})

  def fails(temporary: pathlib.Path):
    temporary.write_text('half')
    raise OSError('disk full')

  with pytest.raises(OSError, match='disk full'):
    files.write_whole(path, fails)
  assert json.loads(path.read_text()) == {'a': 1}
  assert [p.name for p in path.parent.iterdir()] == ['x.json']


def test_lines_are_read_as_they_were_written(tmp_path):
  path = tmp_path / 'x.jsonl'
  rows = [{'a': 'naïve\n'}, {}, {'b': [1, None]}]
  files.write_json_lines(path, rows)
  found = list(files.json_lines(path, 'mend it'))
  assert [row for _, row in found] == rows
  assert [str(place) for place, _ in found] == [f'{path}:{i}' for i in (1, 2, 3)]


def test_parsing_names_the_file_and_lets_errors_of_the_system_through(tmp_path):
  path = tmp_path / 'x'
  for error, message in (
    (KeyError('a'), f"{path} is damaged (it lacks 'a'): mend it."),
    (Exception('odd'), f'{path} is damaged (odd): mend it.'),
    (files.Damaged('other'), 'other'),
  ):
    with pytest.raises(files.Damaged) as caught, files.parsing(path, 'mend it'):
      raise error
    assert str(caught.value) == message
  for kind in (OSError, MemoryError):
    with pytest.raises(kind), files.parsing(path, 'mend it'):
      raise kind


def test_a_digest_is_taken_again_when_the_file_or_its_record_changed(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path / 'cache'))
  path = tmp_path / 'x'
  path.write_text('one')
  first = files.digest(path)
  (record,) = (tmp_path / 'cache' / 'digests').iterdir()
  known = json.loads(record.read_text())
  record.write_text(json.dumps(known | {'sha256': 'f' * 64}))
  assert files.digest(path) == 'f' * 64  # the record is believed
  for odd in ({'sha256': 'x' * 999}, {'sha256': None}, {'size': 99}):
    record.write_text(json.dumps(known | odd))
    assert files.digest(path) == first
  path.write_text('other')
  assert files.digest(path) != first
