"""Your own files: what a row may hold, and what is said of one that may not."""

import csv
import datetime
import json
import sys

import pytest

from hetlora_jax import config
from hetlora_jax.data import builders, people

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
    with pytest.raises(FileNotFoundError, match='is no .jsonl or .*file'):
      load(path)
  empty = tmp_path / 'empty.jsonl'
  empty.write_text('\n')
  with pytest.raises(ValueError, match='it has no lines'):
    load(empty)


def test_a_path_is_refused_where_nothing_is_read(tmp_path):
  with pytest.raises(ValueError, match='is not read by .*text_folder'):
    builders.open_dataset('synthetic', tmp_path, 'somewhere')


# --- CSV, Parquet, JSON, and columns of any name ------------------------------

READING = builders.Reading('who', 'said', 'answer', 'about')
ROWS = [
  {
    'who': 'bob',
    'said': 'Who, "you"?\nOr I?',
    'answer': 'Me.',
    'about': 'b',
    'time': 9,
  },
  {'who': 'ann', 'said': 'Hi', 'answer': 'Yes, you.', 'about': 'a', 'time': 8},
  {'who': 'bob', 'said': 'Ünï', 'answer': 'No.', 'about': 'c', 'time': 3},
]


def write_csv(path, rows):
  with path.open('w', newline='', encoding='utf-8-sig') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def write_parquet(path, rows):
  import pyarrow
  from pyarrow import parquet

  parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
  '.csv': write_csv,
  '.parquet': write_parquet,
  '.json': lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
  '.jsonl': write,
}


@pytest.fixture
def read(tmp_path):
  """Prepares a file, and returns what its examples are."""

  def read(path, reading=READING):
    found = builders.open_dataset('text_folder', tmp_path / 'd', str(path), reading)
    return found, [
      (row['client'].decode(), [x.decode() for x in row['context']],
       row['target'].decode(), row['time'])
      for row in found.examples
    ]  # fmt: skip

  return read


@pytest.mark.parametrize('kind', WRITERS)
def test_every_kind_of_file_has_the_same_examples(tmp_path, read, kind):
  path = tmp_path / f'a{kind}'
  WRITERS[kind](path, ROWS)
  found, rows = read(path)
  assert rows == [
    ('ann', ['Hi'], 'Yes, you.', 8),
    ('bob', ['Ünï'], 'No.', 3),
    ('bob', ['Who, "you"?\nOr I?'], 'Me.', 9),
  ]
  assert [p['labels'].tolist() for p in found.people] == [[b'a'], [b'c', b'b']]
  as_usual = {'who': 'client', 'said': 'context', 'answer': 'target', 'about': 'label'}
  renamed = [{as_usual.get(k, k): x for k, x in row.items()} for row in ROWS]
  WRITERS[kind](path, renamed)
  assert read(path, builders.AS_USUAL)[1] == rows


def test_json_that_is_lines_is_read_as_such(tmp_path, read):
  write(tmp_path / 'a.json', ROWS)
  write(tmp_path / 'a.jsonl', ROWS)
  assert read(tmp_path / 'a.json')[1] == read(tmp_path / 'a.jsonl')[1]


def test_parquet_has_types_of_its_own(tmp_path, read):
  noon = datetime.datetime(2024, 1, 31, 12, tzinfo=datetime.UTC)
  row = {'who': 7, 'said': ['Hi', 'Oh'], 'answer': 'Yes', 'about': 3,
         'mine': [True, False], 'time': noon}  # fmt: skip
  write_parquet(tmp_path / 'a.parquet', [row])
  found, rows = read(tmp_path / 'a.parquet')
  assert rows == [('7', ['Hi', 'Oh'], 'Yes', int(noon.timestamp() * 1e6))]
  assert found.examples[0]['mine'].tolist() == [True, False]
  assert found.people[0]['labels'].tolist() == [b'3']


@pytest.mark.parametrize('kind', ['.parquet', '.json'])
def test_conversations_are_read_of_other_files_too(tmp_path, read, kind):
  said = [('user', 'Hi'), ('assistant', 'Oh'), ('user', 'So?'), ('assistant', 'Yes')]
  messages = [{'role': role, 'content': text} for role, text in said]
  WRITERS[kind](tmp_path / f'a{kind}', [{'who': 'ann', 'messages': messages}])
  found, rows = read(tmp_path / f'a{kind}', builders.Reading(client='who'))
  assert rows == [('ann', ['Hi', 'Oh', 'So?'], 'Yes', 1)]
  assert found.examples[0]['bears_from'] == 0


def test_a_reading_is_part_of_what_was_prepared(tmp_path, read, capsys):
  path = write(tmp_path / 'a.jsonl', ROWS)
  first, _ = read(path)
  second, rows = read(path, READING._replace(target='said'))
  assert first.digest != second.digest
  assert rows[0][2] == 'Hi'
  said = capsys.readouterr().out
  assert 'Not read of it: answer.' in said  # the columns that no field names
  assert read(path)[0].digest == first.digest
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
  ('content', 'why'),
  [
    ('who,said,answer,about\na,b,c,d\ne,f,g\n', r'a.csv:3 .*3 cells, where line 1 names 4'),
    ('who,said,answer,about\na,"b\nb",c,d\ne,,g,h\n', r'a.csv:4 .*\(said is empty\)'),
    ('who,said,answer,about\na,b,c,\n', r'a.csv:2 .*\(about is empty\)'),
    ('who,said,answer,about\n ,b,c,d\n', r'a.csv:2 .*\(who is empty\)'),
    ('who;said;answer;about\na;b;c;d\n', r'a.csv:2 .*no who, but who;said;answer;about'),
    ('who,said,who,about\n', r"a.csv:1 .*two columns 'who'"),
    ('who,said,answer,about\na,"b" x,c,d\n', 'a.csv:2 .*not CSV in UTF-8'),
    ('who,said,answer,about\na,b,"c,d\n', 'a.csv:2 .*not CSV .*unexpected end'),
    (b'who,said,answer,about\na,b,c,d\na,b,\xff,d\n', 'a.csv:3 .*not CSV in UTF-8'),
    ('who,said\n'.encode('utf-16'), 'a.csv is UTF-16: save it as UTF-8'),
    ('who,said,answer,about\n', 'a.csv is damaged .it has no lines'),
    ('who,said,answer,about,time\na,b,c,d,soon\n', "a.csv:2 .*time='soon', a whole"),
  ],
)  # fmt: skip
def test_a_malformed_row_of_csv_is_named(tmp_path, read, content, why):
  content = content if isinstance(content, bytes) else content.encode()
  (tmp_path / 'a.csv').write_bytes(content)
  _check_refused(tmp_path, read, 'a.csv', why)


@pytest.mark.parametrize(
  ('content', 'why'),
  [
    ('[{"who": "a"', 'a.json is not valid JSON'),
    (
      '[{"who": "a", "said": "b", "answer": "c", "about": "d"}, 7]',
      'row 2 .*int, want',
    ),
    ('[{"who": "a", "said": "b", "answer": 7, "about": "d"}]', r'row 1 .*\(answer=7\)'),
    ('[{"who": "a", "said": "b", "answer": "c"}]', 'row 1 .*no about'),
    ('\n [ ]', 'it has no lines'),
    ('{"rows": [1]}', 'a.json:1 .*no who, but rows'),
  ],
)
def test_a_malformed_row_of_json_is_named(tmp_path, read, content, why):
  (tmp_path / 'a.json').write_text(content)
  _check_refused(tmp_path, read, 'a.json', why)


def test_a_malformed_row_of_parquet_is_named(tmp_path, read, monkeypatch):
  path = tmp_path / 'a.parquet'
  write_parquet(path, [*ROWS, ROWS[0] | {'said': None}])
  _check_refused(tmp_path, read, path.name, r'a.parquet, row 4 .*\(said is empty\)')
  write_parquet(path, [{'id': 1, 'who': 'a', 'said': 'b'}])
  _check_refused(tmp_path, read, path.name, 'a.parquet .*no answer, but id')
  path.write_bytes(path.read_bytes()[:-9])
  _check_refused(tmp_path, read, path.name, 'a.parquet is damaged .*: write it again')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  _check_refused(tmp_path, read, path.name, r"pip install 'hetlora_jax\[datasets\]'")


def _check_refused(tmp_path, read, name, why):
  with pytest.raises(ValueError, match=why) as error:
    read(tmp_path / name)
  assert '\n' not in str(error.value)
  assert not list((tmp_path / 'd').rglob('*.array_record*'))


def test_a_folder_has_files_of_one_kind(tmp_path, read):
  folder = tmp_path / 'mine'
  folder.mkdir()
  write_csv(folder / 'a.csv', ROWS[:1])
  write_csv(folder / 'b.csv', ROWS[1:])
  (folder / 'about.json').write_text('{}')
  assert len(read(folder)[1]) == 3
  write(folder / 'c.jsonl')
  with pytest.raises(ValueError, match='several kinds, .jsonl and .csv: give the path'):
    read(folder)


def test_clients_made_by_a_rule_need_no_column(tmp_path, monkeypatch):
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path))
  rows = [{x: row[x] for x in ('said', 'answer')} for row in ROWS]
  path = write(tmp_path / 'a.jsonl', rows)
  data = config.Data(
    name='text_folder', path=str(path), prompt='said', target='answer',
    partition='iid', partition_clients=2,
  )  # fmt: skip
  made, order = people.all_clients(builders.of(data), people.partition_of(data))
  assert made.count.tolist() == [2, 1]
  assert sorted(order) == [0, 1, 2]
  by_label = config.Config(data=data).replace(**{'data.partition': 'dirichlet'}).data
  with pytest.raises(ValueError, match="'dirichlet' goes by labels: .*data.label"):
    people.all_clients(builders.of(by_label), people.partition_of(by_label))
  natural = config.Config(data=data).replace(**{'data.partition': 'natural'}).data
  with pytest.raises(ValueError, match='the data have no clients: .*data.client'):
    people.all_clients(builders.of(natural), people.partition_of(natural))
  write(path, rows[:2])  # not prepared yet
  with pytest.raises(ValueError, match=r'no client\): say which column is what'):
    builders.of(natural)
