"""Chats of two people who meet again: Multi-Session Chat, sessions 2 to 5.

Xu, Szlam, Weston (2022), arXiv 2107.07567, in the form that ParlAI releases:
session_N/{train,valid,test}.txt, a conversation a line.
"""

import pathlib
import re
from collections.abc import Iterator

from hetlora_jax import files
from hetlora_jax.data.builders import records

SESSIONS = range(2, 6)
SPLITS = ('train', 'valid', 'test')
AGAIN = "unpack ParlAI's release of it again"
_MOST_TURNS = 1000  # of a session; real ones have about 12


def _speaker(turn: dict, i: int) -> str:
  """Returns who speaks; where no id says so, people take turns."""
  return turn.get('id') or f'Speaker {i % 2 + 1}'


def session_records(record: dict, session: int) -> Iterator[records.Record]:
  """Yields the answers of a session; a client is a person of a conversation."""
  pair = record['metadata']['initial_data_id']
  spoken = [
    (_speaker(turn, i), ' '.join(turn['text'].split()))
    for i, turn in enumerate(record['dialog'][:_MOST_TURNS])
  ]
  spoken = [(who, text) for who, text in spoken if text]
  return records.replies(
    [
      (f'{pair}/{who}', session * _MOST_TURNS + i, text)
      for i, (who, text) in enumerate(spoken)
    ]
  )


def _session(file: pathlib.Path) -> int:
  return int(file.parent.name.removeprefix('session_'))


class MultiSessionChat(records.RecordBuilder):
  """Makes every turn that answers another one an example."""

  @classmethod
  def files(cls, path: str) -> list[pathlib.Path]:
    if not path:
      raise ValueError(
        "data set 'multi_session_chat' must be downloaded: unpack ParlAI's "
        'release of it (msc_v0.1.tar.gz) and give its folder as data.path.'
      )
    place = pathlib.Path(path).expanduser()
    found = [
      file
      for split in SPLITS
      for file in place.glob(f'**/session_*/{split}.txt')
      if re.fullmatch('session_[2-5]', file.parent.name)
    ]
    if not found:
      raise FileNotFoundError(
        f'{place} has no session_2..5/{{{",".join(SPLITS)}}}.txt: {AGAIN}.'
      )
    return sorted(found)

  def examples(self) -> Iterator[records.Record]:
    for file in self.files(self.path):
      for place, record in files.json_lines(file, AGAIN):
        try:
          yield from session_records(record, _session(file))
        except files.UNEXPECTED as error:
          why = f'{type(error).__name__}: {error}'
          raise files.damaged(place, why, AGAIN) from error
