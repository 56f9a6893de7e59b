"""Real two-person chats: PyPI's chitchat-dataset (MIT), 1,315 people."""

import datetime
import importlib.util
import pathlib
from collections.abc import Iterator

from hetlora_jax import files
from hetlora_jax.data.builders import conversations

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


def _text(messages: list[dict]) -> str:
  """Joins a turn's messages to one line, so that a newline ends a turn."""
  return ' '.join(' '.join(message['text'].split()) for message in messages)


def _seconds(message: dict) -> int:
  return int(datetime.datetime.fromisoformat(message['timestamp']).timestamp())


def _conversation_turns(
  conversation: list[list[dict]],
) -> Iterator[conversations.Turn]:
  spoken = [(turn[0], _text(turn).strip()) for turn in conversation if turn]
  spoken = [(message, text) for message, text in spoken if text]
  for i, (message, text) in enumerate(spoken[1:], start=1):
    context = spoken[max(0, i - conversations.MAX_CONTEXT_TURNS) : i]
    yield conversations.Turn(
      client=message['sender'],
      time=_seconds(message),
      context=[text for _, text in context],
      mine=[m['sender'] == message['sender'] for m, _ in context],
      target=text,
    )


class Chitchat(conversations.ConversationBuilder):
  """Makes every turn that answers another one an example."""

  def turns(self) -> Iterator[conversations.Turn]:
    try:
      turns = [
        turn
        for conversation in read_dataset().values()
        for turn in _conversation_turns(conversation['messages'])
      ]
    except KeyError as error:
      raise files.damaged(_dataset_path(), f'no {error}', AGAIN) from error
    except (ArithmeticError, AttributeError, TypeError) as error:
      raise files.damaged(_dataset_path(), error, AGAIN) from error
    if not turns:
      raise files.damaged(_dataset_path(), 'nobody answers', AGAIN)
    yield from turns
