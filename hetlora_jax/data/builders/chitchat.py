"""Real two-person chats: PyPI's chitchat-dataset (MIT), 1,315 people."""

import datetime
import importlib.util
import pathlib
from collections.abc import Iterator
from typing import ClassVar

from hetlora_jax import files
from hetlora_jax.data import builders
from hetlora_jax.data.builders import records

AGAIN = 'pip install --force-reinstall chitchat-dataset'


def _dataset_path() -> pathlib.Path:
  # Importing the package would leave the file open (it never closes it).
  spec = importlib.util.find_spec('chitchat_dataset')
  if spec is None or spec.origin is None:
    raise ValueError(
      "Data set 'chitchat' needs the package chitchat-dataset: "
      "pip install 'hetlora_jax[chat]'."
    )
  return pathlib.Path(spec.origin).with_name('dataset.json')


def read_dataset() -> dict[str, dict]:
  """Reads all conversations; see the package for their fields."""
  return files.read_json(_dataset_path(), AGAIN)


def _seconds(message: dict) -> int:
  return int(datetime.datetime.fromisoformat(message['timestamp']).timestamp())


def _turns(conversation: list[list[dict]]) -> Iterator[tuple[str, int, str]]:
  """Yields (client, time, text); a text is one line, so a newline ends a turn."""
  for messages in conversation:
    text = ' '.join(' '.join(message['text'].split()) for message in messages)
    if text := text.strip():
      yield messages[0]['sender'], _seconds(messages[0]), text


class Chitchat(records.RecordBuilder):
  """Makes every turn that answers another one an example."""

  records_of = staticmethod(records.replies)

  def examples(self) -> Iterator[records.Record]:
    conversations = read_dataset()
    try:
      found = [
        record
        for conversation in conversations.values()
        for record in self.records_of([*_turns(conversation['messages'])])
      ]
    except files.UNEXPECTED as error:
      why = f'{type(error).__name__}: {error}'
      raise files.damaged(_dataset_path(), why, AGAIN) from error
    if not found:
      raise files.damaged(_dataset_path(), 'nobody answers', AGAIN)
    yield from found


class ChitchatConversations(Chitchat):
  """Makes a conversation an example of each who answers in it, with all their turns."""

  records_of = staticmethod(records.conversations)
  has_whole: ClassVar[bool] = True
  limits: ClassVar[builders.Limits] = builders.Limits(5, 640, 288, 1280)
