"""Your own data: JSON Lines files with a client, a context and a target.

  {"client": "ann", "context": ["How are you?"], "target": "Fine."}
  {"client": "ann", "messages": [{"role": "user", "content": "How are you?"}, ...]}

`client` is a text or a whole number. `context` is a text or a list of texts, oldest
first, by others unless `mine` says which are the client's. `time`, a whole number or a
date of ISO 8601, orders a client's examples (else their lines do) and `label` says what
they are about. In place of context, mine and target, `messages` are a conversation, of
which the client is the assistant: each of its turns bears the loss once.
"""

import datetime
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from hetlora_jax import files
from hetlora_jax.config import MAX_CONTEXT_TURNS
from hetlora_jax.data.builders import records

FIELDS = {'client': str, 'context': list, 'target': str}
OPTIONAL = {'mine': list, 'time': int, 'label': str}
_OF_LISTS = {'context': str, 'mine': bool}
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
REMEDY = (
  'correct the line; it needs client (text), context (text or list of texts) '
  'and target (text), or instead of these two messages (list of role and content)'
)
ROLES = ('system', 'user', 'assistant')


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


def _problem(record: dict) -> str:
  """Says what is wrong with a line, or nothing."""
  for name in FIELDS:
    if name not in record:
      return f'no {name}'
  for name, value in record.items():
    kind = (FIELDS | OPTIONAL).get(name)
    if kind is None:
      return f'{name!r} is no field'
    if not _is(value, kind, _OF_LISTS.get(name)):
      wants = ', a whole number or a date as 2024-01-31T10:00' if name == 'time' else ''
      return f'{name}={value!r}{wants}'
  texts = [x for value in record.values() for x in _texts(value)]
  if not all(_is_unicode(text) for text in texts):
    return 'half a surrogate pair is not text'
  for name in ('client', 'target'):
    if not record[name].strip():
      return f'{name} is empty'
  if not record['context']:
    return 'context is empty'
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
  if not isinstance(time, str):
    return {}
  try:
    date = datetime.datetime.fromisoformat(time)
  except ValueError:
    return {}
  date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
  return {'time': (date - _EPOCH) // datetime.timedelta(microseconds=1)}


def _record(line: dict, place: pathlib.Path, number: int) -> records.Record:
  whole, system = 'messages' in line, False
  if whole:
    try:
      line = _conversation(line)
    except ValueError as error:
      raise files.damaged(place, error, REMEDY) from error
    system = line.pop('system')
  if isinstance(line.get('context'), str):
    line['context'] = [line['context']]
  for name in ('client', 'label'):  # ids may be numbers
    if type(line.get(name)) is int:
      line[name] = str(line[name])
  line |= _moment(line.get('time'))
  if problem := _problem(line):
    raise files.damaged(place, problem, REMEDY)
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


def jsonl_files(path: str) -> list[pathlib.Path]:
  """Returns a file, or the *.jsonl files in a folder, by name."""
  place = pathlib.Path(path).expanduser()
  files = sorted(place.glob('*.jsonl')) if place.is_dir() else [place]
  if not files or not all(file.is_file() for file in files):
    raise FileNotFoundError(
      f'data.path={path} is no .jsonl file nor a folder with one: give the '
      'path of your data.'
    )
  return files


class TextFolder(records.RecordBuilder):
  """Makes every line of a user's files an example."""

  VERSION = tfds.core.Version('1.1.0')
  labelled: ClassVar[bool] = True
  has_whole: ClassVar[bool] = True
  limits: ClassVar[None] = None

  @classmethod
  def files(cls, path: str) -> list[pathlib.Path]:
    return jsonl_files(path)

  def examples(self) -> Iterator[records.Record]:
    if not self.path:
      raise ValueError(
        "data set 'text_folder' is yours: give the path of its .jsonl files as "
        'data.path.'
      )
    lines = 0
    for file in jsonl_files(self.path):
      for place, record in files.json_lines(file, REMEDY):
        lines += 1
        yield _record(record, place, lines)
    if not lines:
      raise files.damaged(pathlib.Path(self.path), 'it has no lines', REMEDY)
