"""The data sets by name, prepared on first use by TensorFlow Datasets."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hetlora_jax import fields, files

if TYPE_CHECKING:
  from hetlora_jax.data.builders import records

# Data set -> its builder, module:class. Imported when it is asked for, and TensorFlow
# Datasets with it.
BUILDERS = {
  'chitchat': 'chitchat:Chitchat',
  'chitchat_conversations': 'chitchat:ChitchatConversations',
  'mail_subject': 'mail_subject:MailSubject',
  'multi_session_chat': 'multi_session_chat:MultiSessionChat',
  'reddit_tldr': 'reddit_tldr:RedditTldr',
  'synthetic': 'synthetic:Synthetic',
  'text_folder': 'text_folder:TextFolder',
}

ANEW = 'delete the folder, it is made anew'


class Dataset(NamedTuple):
  """Rows of the splits that `RecordBuilder` writes; strings are bytes."""

  examples: Sequence[dict]
  people: Sequence[dict]
  folder: pathlib.Path  # where they were prepared
  builder: type[records.RecordBuilder]
  digest: str = ''  # of a user's files; '' where there are none


class _Split(Sequence):
  """Rows of a split, read when needed; errors name the folder."""

  def __init__(self, rows: Sequence[dict], folder: pathlib.Path):
    self._rows, self._folder = rows, folder

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, row):
    if not 0 <= row < len(self):
      raise IndexError(f'row {row} of {len(self)}')
    with _reading(self._folder):
      found = self._rows[row]
      if found['client'] is None:  # so array_record reads what has been cut off
        raise ValueError(f'row {row} is missing')
      return found


@contextlib.contextmanager
def _reading(folder: pathlib.Path) -> Iterator[None]:
  """Names the folder in any error of reading what was prepared in it."""
  try:
    yield
  except MemoryError:
    raise
  except OSError as error:
    raise OSError(
      f'{folder} cannot be read ({files.short(error, 200)}): change its '
      f'permissions, or {ANEW}.'
    ) from error
  except Exception as error:  # TFDS has no narrower type
    raise files.damaged(folder, error, ANEW) from error


def open_dataset(
  name: str, data_dir: str | os.PathLike | None = None, path: str = ''
) -> Dataset:
  """Opens a data set, preparing it if it never was.

  A name may end in one of the builder's configs, as in 'synthetic/seed1'.
  Without `data_dir` it lives in the cache folder. Files of a user at `path` are
  prepared anew if their content has changed.

  Raises:
    ValueError: no such data set, or its folder is damaged.
    OSError: its folder cannot be read or written.
  """
  kind, _, config = name.partition('/')
  make = builder_of(kind)
  data_dir = pathlib.Path(data_dir or files.cache_folder() / 'tfds')
  digest = files.digest_all(make.files(path))[:16] if path else ''
  if path:
    data_dir = data_dir / 'files' / digest
  make_builder = functools.partial(
    make,
    data_dir=data_dir,
    config=config or None,
    path=path,
    file_format='array_record',
  )
  folder = _place(make, config, data_dir)
  if not folder.exists():
    _prepare(make_builder())
  with _reading(folder):
    open_split: Any = make_builder().as_data_source
    examples, people = (_Split(open_split(s), folder) for s in ('examples', 'people'))
  return Dataset(examples, people, folder, make, digest)


def builder_of(name: str) -> type[records.RecordBuilder]:
  """Returns the builder of a data set; raises ValueError if there is no such set."""
  if name not in BUILDERS:
    valid = ', '.join(BUILDERS)
    near = fields.meant(name, BUILDERS)
    meant = f' Did you mean {near!r}?' if near else ''
    raise fields.ConfigError(
      f'config.data.name={name!r} is unknown: one of {valid}; files of your own are '
      f"'text_folder'.{meant}"
    )
  module, _, builder = BUILDERS[name].partition(':')
  return getattr(importlib.import_module(f'{__name__}.{module}'), builder)


def _place(
  make: type[records.RecordBuilder], config: str, data_dir: pathlib.Path
) -> pathlib.Path:
  """Returns the folder that a data set has, or will have once prepared."""
  configs = [c.name for c in make.BUILDER_CONFIGS]
  config = config or (configs[0] if configs else '')
  return data_dir / make.name / config / str(make.VERSION)


def _prepare(builder: records.RecordBuilder) -> None:
  import tensorflow_datasets as tfds

  print(f'Preparing {builder.info.full_name} in {builder.data_dir}.')
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    # TFDS speaks of downloads on stdout, and there are none.
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(file_format='array_record')
  except OSError:
    # Another process may have finished first: same code, same records.
    if not builder.data_path.exists():
      raise
