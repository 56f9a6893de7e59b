"""Your own JSONL: what a line may hold, and what is said of one that may not."""

import json

import pytest

from hetlora_jax.data import builders

LINES = [
  {'client': 'bob', 'context': 'Who is there?', 'target': 'Me.', 'time': 9},
  {'client': 'ann', 'context': ['Hi', 'Oh', 'So'], 'target': 'Yes.',
   'mine': [False, True, False], 'label': 'chat'},
  {'client': 'bob', 'context': ['a', 'b', 'c', 'd', 'e'], 'target': 'No.',
   'time': 3},
]  # fmt: skip


def write(path, lines=LINES):
  path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
  return path


@pytest.fixture
def load(tmp_path):
  return lambda path: builders.open_dataset('text_folder', tmp_path / 'd', str(path))  # fmt: skip


def test_lines_become_examples(tmp_path, load):
  found = load(write(tmp_path / 'a.jsonl'))
  rows = list(found.examples)
  assert [r['client'] for r in rows] == [b'ann', b'bob', b'bob']
  assert [r['target'] for r in rows] == [b'Yes.', b'No.', b'Me.']  # by time
  assert list(rows[0]['mine']) == [False, True, False]
  assert list(rows[1]['context']) == [b'b', b'c', b'd', b'e']  # the latest
  assert [p['labels'].tolist() for p in found.people] == [[b'chat'], [b'bob'] * 2]  # fmt: skip


def test_a_folder_is_its_jsonl_files(tmp_path, load):
  folder = tmp_path / 'mine'
  folder.mkdir()
  write(folder / 'a.jsonl', LINES[:1])
  write(folder / 'b.jsonl', LINES[1:])
  (folder / 'readme.txt').write_text('none')
  assert len(load(folder).examples) == 3


def test_changed_files_are_prepared_anew(tmp_path, load, capsys):
  path = write(tmp_path / 'a.jsonl')
  first = load(path)
  assert capsys.readouterr().out.count('Preparing') == 1
  assert load(path).folder == first.folder
  assert capsys.readouterr().out == ''
  second = load(write(path, LINES[:2]))
  assert second.folder != first.folder
  assert len(second.examples) == 2
  assert load(write(path)).folder == first.folder  # what was, still is
  assert capsys.readouterr().out.count('Preparing') == 1


@pytest.mark.parametrize(
  ('line', 'why'),
  [
    ('{"client": "a"', 'not valid JSON'),
    ('[1]', 'list, want an object'),
    ('{"client": "a", "context": "b"}', 'no target'),
    ('{"client": 1.5, "context": "b", "target": "c"}', 'client=1.5'),
    ('{"client": " ", "context": "b", "target": "c"}', 'client is empty'),
    ('{"client": "a", "context": [], "target": "c"}', 'context is empty'),
    ('{"client": "a", "context": [1], "target": "c"}', r'context=\[1\]'),
    ('{"client": "a", "context": "b", "target": "c", "x": 1}', "'x' is no"),
    ('{"client": "a", "context": "b", "target": "c", "time": true}', 'time=T'),
    ('{"client": "a", "context": "b", "target": "c", "time": 1e400}', 'time=i'),
    ('{"client": "a", "context": "b", "target": "c", "mine": []}', 'mine is'),
    ('\ud800'.encode('utf-8', 'surrogatepass'), 'not valid JSON'),
  ],
)
def test_a_malformed_line_is_named(tmp_path, load, line, why):
  path = write(tmp_path / 'a.jsonl')
  line = line.encode() if isinstance(line, str) else line
  path.write_bytes(path.read_bytes() + b'\n' + line + b'\n')
  with pytest.raises(ValueError, match=f'a.jsonl:5 .*{why}') as error:
    load(path)
  assert '\n' not in str(error.value)
  assert not list((tmp_path / 'd').rglob('*.array_record*'))


def test_half_a_character_is_refused(tmp_path, load):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"client": "a", "context": "\\ud800", "target": "b"}\n')
  with pytest.raises(ValueError, match='a.jsonl:1 .*not text'):
    load(path)


def test_a_path_that_leads_nowhere_is_named(tmp_path, load):
  with pytest.raises(ValueError, match='give the path'):
    load('')
  for path in (tmp_path, tmp_path / 'absent.jsonl'):
    with pytest.raises(FileNotFoundError, match='is no .jsonl file'):
      load(path)
  empty = tmp_path / 'empty.jsonl'
  empty.write_text('\n')
  with pytest.raises(ValueError, match='it has no lines'):
    load(empty)


def test_a_path_is_refused_where_nothing_is_read(tmp_path):
  with pytest.raises(ValueError, match='is not read by .*text_folder'):
    builders.open_dataset('synthetic', tmp_path, 'somewhere')
