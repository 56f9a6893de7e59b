"""Reddit posts summed up by their authors: Webis-TLDR-17, TFDS's `reddit`.

Völske, Potthast, Syed, Stein (2017), "TL;DR: Mining Reddit to Learn Automatic
Summarization"; CC BY 4.0. As in HetLoRA (arXiv 2401.06432), authors of 100
posts or more are trained on; all others are the unseen people.
"""

import collections
import pathlib
import re
from collections.abc import Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from hetlora_jax import files
from hetlora_jax.data.builders import records

FILE = 'corpus-webis-tldr-17.json'
AGAIN = 'fetch the corpus again'
MOST_CHARACTERS = 4000  # of a post; its end is cut
FEWEST_POSTS = 2  # of an author, to train on one and hold one out
NOBODY = frozenset({'', '[deleted]', '[removed]', 'None'})
_PHRASE = 3  # words; a post may well hold the words of a shorter summary
_TLDR = re.compile(r'\btl\s*[;:,.\-/]?\s*dr\b.*', re.I | re.S)


def _text(post: dict, name: str) -> str:
  value = post.get(name) or ''
  value = value.decode() if isinstance(value, bytes) else value
  if not isinstance(value, str):
    raise ValueError(f'{name}={value!r}')
  return ' '.join(value.split())


def _content(post: dict, summary: str) -> str:
  """Returns a post without its summary and what introduces that."""
  content = _TLDR.sub('', _text(post, 'content'))
  if len(summary.split()) >= _PHRASE:
    content = re.sub(rf'(?<!\w){re.escape(summary)}(?!\w)', '', content)
  return ' '.join(content.split())[:MOST_CHARACTERS]


def example(post: dict, row: int) -> records.Record | None:
  """Returns the example of a post, or None if its author or text is gone."""
  author, summary = _text(post, 'author'), _text(post, 'summary')
  content = _content(post, summary) if summary else ''
  if author in NOBODY or not content or content in NOBODY:
    return None
  return records.Record(
    client=author,
    time=row,  # the corpus has no dates
    context=[content],
    mine=[True],
    target=summary,
    label=_text(post, 'subreddit'),
  )


def _tfds_folder() -> pathlib.Path:
  return pathlib.Path(tfds.core.constants.DATA_DIR).expanduser()


def find(path: str) -> pathlib.Path:
  """Returns the corpus at a user's path, or where TFDS has unpacked it."""
  place = pathlib.Path(path).expanduser() if path else _tfds_folder()
  if place.is_file():
    return place
  pattern = '**/' if path else 'downloads/**/'
  for found in sorted(place.glob(f'{pattern}{FILE}')):
    return found
  raise FileNotFoundError(
    f'{place} has no {FILE}: download and unpack the Webis-TLDR-17 corpus '
    '(Zenodo record 1043504) and give its folder as data.path.'
  )


def _posts(path: str) -> Iterator[tuple[pathlib.Path, dict]]:
  """Yields the posts of a user's file, or those that TFDS has prepared."""
  if not path:
    builder: Any = tfds.builder('reddit', data_dir=_tfds_folder())
    place, kind = pathlib.Path(builder.data_path), builder.info.file_format
    if place.exists() and kind and kind.value == 'array_record':
      yield from ((place, post) for post in builder.as_data_source('train'))
      return
  yield from files.json_lines(find(path), AGAIN)


def _examples(path: str) -> Iterator[records.Record]:
  for row, (place, post) in enumerate(_posts(path)):
    try:
      found = example(post, row)
    except ValueError as error:
      raise files.damaged(place, error, AGAIN) from error
    if found is not None:
      yield found


class RedditTldr(records.RecordBuilder):
  """Makes every post an example of its author: content, then summary."""

  labelled: ClassVar[bool] = True  # by subreddit
  cue: ClassVar[str] = 'TL;DR:'
  train_from: ClassVar[int] = 100

  @classmethod
  def files(cls, path: str) -> list[pathlib.Path]:
    return [find(path)]

  def examples(self) -> Iterator[records.Record]:
    # Read twice: most authors posted once, and only the others must fit memory.
    posts = collections.Counter(post.client for post in _examples(self.path))
    for post in _examples(self.path):
      if posts[post.client] >= FEWEST_POSTS:
        yield post
