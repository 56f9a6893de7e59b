"""Your own data: JSON Lines, JSON, CSV or Parquet, an example a row.

  {"client": "ann", "context": ["How are you?"], "target": "Fine."}
  {"client": "ann", "messages": [{"role": "user", "content": "How are you?"}, ...]}

`client` is a text or a whole number. `context` is a text or a list of texts, oldest
first, by others unless `mine` says which are the client's. `time`, a whole number or a
date of ISO 8601, orders a client's examples (else their lines do) and `label` says what
they are about. In place of context, mine and target, `messages` are a conversation, of
which the client is the assistant: each of its turns bears the loss once. Columns may have
other names (`builders.Reading`); those that nothing reads are told of, but in JSON without
such names, where they are an error.
"""

import datetime
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from hetlora_jax import files
from hetlora_jax.config import MAX_CONTEXT_TURNS, ConfigError
from hetlora_jax.data.builders import Reading, records

FIELDS = {'client': str, 'context': list, 'target': str}
OPTIONAL = {'mine': list, 'time': int, 'label': str}
_OF_LISTS = {'context': str, 'mine': bool}
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
REMEDY = (
  'correct the line; it needs client (text), context (text or list of texts) '
  'and target (text), or instead of these two messages (list of role and content)'
)
ROLES = ('system', 'user', 'assistant')
NAME_THEM = (
  'say which column is what by config.data.client, config.data.prompt and '
  'config.data.target (clients can be made too: config.data.partition)'
)
KINDS = ('.jsonl', '.csv', '.parquet', '.json')


def _is(value: Any, kind: type, inner: type | None) -> bool:
  if kind is int:
    return type(value) is int and abs(value) < 2**63
  if not isinstance(value, kind):
    return False
  return inner is None or all(isinstance(x, inner) for x in value)


def _texts(value: Any) -> list[str]:
  values = value if isinstance(value, list) else [value]
  return [x for x in values if isinstance(x, str)]


def _is_unicode(text: str) -> bool:
  """Tells whether UTF-8 can hold a text; JSON's escapes may be half a pair."""
  return not any('\ud800' <= letter <= '\udfff' for letter in text)


def lacking(found: Collection[str], reading: Reading) -> str:
  """Says which column is missing, or nothing."""
  needed = ['client'] * (reading.clients_needed or bool(reading.client))
  if 'messages' not in reading.columns or 'messages' not in found:
    needed += ['context', 'target']
  needed += ['label'] * bool(reading.label)
  for name in needed:
    column = reading.columns[name]
    if column not in found:
      others = ', '.join(x for x in found if x not in reading.columns.values())
      return f'no {column}' + (f', but {others}' if others else '')
  return ''


def _problem(record: dict, columns: Mapping[str, str]) -> str:
  """Says what is wrong with a line, or nothing."""
  for name, value in record.items():
    kind = (FIELDS | OPTIONAL).get(name)
    if kind is None:
      return f'{name!r} is no field'
    if value is None:
      return f'{columns[name]} is empty'
    if not _is(value, kind, _OF_LISTS.get(name)):
      wants = ', a whole number or a date as 2024-01-31T10:00' if name == 'time' else ''
      return f'{columns[name]}={value!r}{wants}'
  texts = [x for value in record.values() for x in _texts(value)]
  if not all(_is_unicode(text) for text in texts):
    return 'half a surrogate pair is not text'
  for name in ('client', 'target'):
    if name in record and not record[name].strip():
      return f'{columns[name]} is empty'
  if not record['context']:
    return f'{columns["context"]} is empty'
  if len(record.get('mine', record['context'])) != len(record['context']):
    return 'mine is not as long as context'
  return ''


def _conversation(line: dict) -> dict:
  """Turns `messages` into context, mine and target; raises ValueError if it cannot.

  What follows the client's last turn is no context of anything.
  """
  for name in ('context', 'mine', 'target'):
    if name in line:
      raise ValueError(f'{name} beside messages')
  messages = line.pop('messages')
  if not isinstance(messages, list):
    raise ValueError(f'messages={messages!r}')
  for message in messages:
    content = message.get('content') if isinstance(message, dict) else None
    if not isinstance(content, str) or set(message) != {'role', 'content'}:
      raise ValueError(f'message {message!r} is not of a role and a content, a text')
    if message['role'] not in ROLES or not content.strip():
      raise ValueError(f'message {message!r} is empty or of none of {", ".join(ROLES)}')
  roles = [message['role'] for message in messages]
  if 'system' in roles[1:]:
    raise ValueError('the system speaks first or not at all')
  texts, mine = [m['content'] for m in messages], [r == 'assistant' for r in roles]
  last = max((i for i, own in enumerate(mine) if own), default=0)
  if all(mine[:last]):
    raise ValueError('messages have no assistant who answers')
  return line | {
    'context': texts[:last],
    'mine': mine[:last],
    'target': texts[last],
    'system': roles[0] == 'system',
  }


def _moment(time: Any) -> dict[str, int]:
  """Returns a date of ISO 8601 as microseconds since 1970; of no zone, as UTC."""
  if isinstance(time, datetime.date):
    time = str(time)
  if not isinstance(time, str):
    return {}
  try:
    date = datetime.datetime.fromisoformat(time)
  except ValueError:
    return {}
  date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
  return {'time': (date - _EPOCH) // datetime.timedelta(microseconds=1)}


def record(
  row: dict,
  place: pathlib.Path,
  number: int,
  reading: Reading,
  *,
  strict: bool = False,
  remedy: str = REMEDY,
) -> records.Record:
  """Makes a record of a row; raises Damaged, which names the place.

  Args:
    row: column -> value.
    place: of the row, for errors.
    number: of the row among all, which orders a client's examples without a time.
    reading: which column is what.
    strict: whether other columns are an error.
    remedy: what to do about an error.
  """
  if problem := lacking(row, reading):
    raise files.damaged(
      place, problem, f'{remedy}, or {NAME_THEM}' if strict else NAME_THEM
    )
  columns = reading.columns
  line = {name: row[column] for name, column in columns.items() if column in row}
  if strict:
    line |= {x: value for x, value in row.items() if x not in columns.values()}
  whole, system = 'messages' in line, False
  if whole:
    try:
      line = _conversation(line)
    except ValueError as error:
      raise files.damaged(place, error, remedy) from error
    system = line.pop('system')
  if isinstance(line.get('context'), str):
    line['context'] = [line['context']]
  for name in ('client', 'label'):  # ids may be numbers
    if type(line.get(name)) is int:
      line[name] = str(line[name])
  line |= _moment(line.get('time'))
  if problem := _problem(line, columns):
    raise files.damaged(place, problem, remedy)
  line.setdefault('client', '')  # made by a partition
  most = None if whole else -MAX_CONTEXT_TURNS
  context = line['context'][most:]
  return records.Record(
    client=line['client'],
    time=line.get('time', number),
    context=context,
    mine=line.get('mine', [False] * len(context))[most:],
    target=line['target'],
    label=line.get('label', line['client']),
    bears_from=0 if whole else -1,
    system=system,
  )


def data_files(path: str) -> list[pathlib.Path]:
  """Returns a file, or the files of one kind in a folder, by name.

  JSON beside another kind tells about it, and is left out.
  """
  place = pathlib.Path(path).expanduser()
  if not place.is_dir():
    kinds, found = [''], {'': [place]}
  else:
    found = {kind: sorted(place.glob(f'*{kind}')) for kind in KINDS}
    kinds = [kind for kind in KINDS if found[kind]]
    kinds = [kind for kind in kinds if kind != '.json'] or kinds
  if len(kinds) > 1:
    raise ConfigError(
      f'config.data.path={path} has files of several kinds, {" and ".join(kinds)}: give '
      'the path of a file, or of a folder with one kind.'
    )
  if not kinds or not all(file.is_file() for file in found[kinds[0]]):
    raise FileNotFoundError(
      f'data.path={path} is no {" or ".join(KINDS)} file nor a folder with one: give '
      'the path of your data.'
    )
  return found[kinds[0]]


def _csv_rows(file: pathlib.Path, remedy: str) -> Iterator[tuple[pathlib.Path, dict]]:
  """Yields rows whose time is a number if it is written as one."""
  for place, row in files.csv_rows(file, remedy):
    time = row.get('time') or ''
    yield place, row | ({'time': int(time)} if time.isdecimal() else {})


class TextFolder(records.RecordBuilder):
  """Makes every row of a user's files an example."""

  VERSION = tfds.core.Version('1.1.0')
  labelled: ClassVar[bool] = True
  has_whole: ClassVar[bool] = True
  limits: ClassVar[None] = None

  @classmethod
  def files(cls, path: str) -> list[pathlib.Path]:
    return data_files(path)

  def examples(self) -> Iterator[records.Record]:
    if not self.path:
      raise ValueError(
        "data set 'text_folder' is yours: give the path of its files as data.path."
      )
    number, mapped = 0, any(self.reading.given)
    for file in data_files(self.path):
      strict = file.suffix not in ('.csv', '.parquet') and not mapped
      for place, row in self._rows(file):
        number += 1
        self.unread |= row.keys() - self.reading.columns.values()
        yield record(row, place, number, self.reading, strict=strict)
    if not number:
      raise files.damaged(pathlib.Path(self.path), 'it has no lines', REMEDY)

  def _rows(self, file: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict]]:
    readers = {'.csv': _csv_rows, '.json': files.json_rows}
    if file.suffix == '.parquet':
      return self._parquet_rows(file)
    return readers.get(file.suffix, files.json_lines)(file, REMEDY)

  def _parquet_rows(self, file: pathlib.Path) -> Iterator[tuple[pathlib.Path, dict]]:
    """Yields the rows of a Parquet file, of which only what is needed is read."""
    try:
      from pyarrow import parquet
    except ImportError as error:
      raise ConfigError(
        f"{file} is read by pyarrow: pip install 'hetlora_jax[datasets]'."
      ) from error
    number, again = 0, 'write it again'
    try:
      with files.parsing(file, again), parquet.ParquetFile(file) as table:
        found = table.schema_arrow.names
        if problem := lacking(found, self.reading):
          raise files.damaged(file, problem, NAME_THEM)
        read = [name for name in found if name in self.reading.columns.values()]
        self.unread |= {*found} - {*read}
        for batch in table.iter_batches(1024, columns=read):
          for row in batch.to_pylist():
            number += 1
            yield pathlib.Path(f'{file}, row {number}'), row
    except OSError as error:  # which the library raises of contents too
      raise files.damaged(file, error, again) from error
