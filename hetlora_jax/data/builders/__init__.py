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

from hetlora_jax import fields, files, hub
from hetlora_jax.data import partition

if TYPE_CHECKING:
  from hetlora_jax import config
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


class Reading(NamedTuple):
  """How rows of a user become examples: which column is what, None the usual one."""

  client: str | None = None
  prompt: str | None = None
  target: str | None = None
  label: str | None = None
  split: str | None = None  # of a data set of the Hub
  clients_needed: bool = True  # or else they are made by a partition

  @property
  def given(self) -> tuple[str | None, ...]:
    """What changes the examples."""
    return self[:-1]

  @property
  def columns(self) -> dict[str, str]:
    """The column of every field of an example; the last ones may be absent."""
    found = {
      'client': self.client or 'client',
      'context': self.prompt or 'context',
      'target': self.target or 'target',
      'label': self.label or 'label',
      'mine': 'mine',
      'time': 'time',
    }
    whole = not (self.prompt or self.target)  # conversations
    return found | ({'messages': 'messages'} if whole else {})


AS_USUAL = Reading()


class Limits(NamedTuple):
  """What a run takes of a data set unless it says otherwise: fields of `data`."""

  min_examples: int = 20
  tokens_per_example: int = 96
  targets_per_example: int = 32
  row_tokens: int = 256


class Dataset(NamedTuple):
  """Rows of the splits that `RecordBuilder` writes; strings are bytes."""

  examples: Sequence[dict]
  people: Sequence[dict]
  folder: pathlib.Path  # where they were prepared
  builder: type[records.RecordBuilder]
  digest: str = ''  # of a user's data; '' of the others
  revision: str | None = None  # of a repository of the Hub, the commit


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


def of(data: config.Data) -> Dataset:
  """Opens the data set that a section `data` names; see `open_dataset`."""
  given = {name: getattr(data, name) for name in Reading._fields[:-1]}
  reading = Reading(**given, clients_needed=data.partition == partition.NATURAL)
  return open_dataset(data.name, path=data.path or '', reading=reading)


def open_dataset(
  name: str,
  data_dir: str | os.PathLike | None = None,
  path: str = '',
  reading: Reading = AS_USUAL,
) -> Dataset:
  """Opens a data set, preparing it if it never was.

  A name may end in one of the builder's configs, as in 'synthetic/seed1'.
  Without `data_dir` it lives in the cache folder. Files of a user at `path`, and what
  is on the Hub, are prepared anew if their content or `reading` has changed.

  Raises:
    ValueError: no such data set, or its folder is damaged.
    OSError: its folder cannot be read or written.
  """
  kind, _, config = name.partition('/')
  if name.startswith(hub.DATASET):
    kind, config = name, ''
  make = builder_of(kind)
  data_dir = pathlib.Path(data_dir or files.cache_folder() / 'tfds')
  path, revision = make.located(name, path)
  digest = make.digest(path, reading) if path else ''
  if path:
    data_dir = data_dir / 'files' / digest
  make_builder = functools.partial(
    make,
    data_dir=data_dir,
    config=config or None,
    path=path,
    reading=reading,
    file_format='array_record',
  )
  folder = _place(make, config, data_dir)
  if not folder.exists():
    _prepare(make_builder())
  with _reading(folder):
    open_split: Any = make_builder().as_data_source
    examples, people = (_Split(open_split(s), folder) for s in ('examples', 'people'))
  return Dataset(examples, people, folder, make, digest, revision)


def builder_of(name: str) -> type[records.RecordBuilder]:
  """Returns the builder of a data set; raises ValueError if there is no such set."""
  on_hub = name.startswith(hub.DATASET)
  if name not in BUILDERS and not on_hub:
    valid = ', '.join(BUILDERS)
    near = fields.meant(name, BUILDERS)
    meant = f' Did you mean {near!r}?' if near else ''
    raise fields.ConfigError(
      f'config.data.name={name!r} is unknown: one of {valid}; files of your own are '
      f"'text_folder', and data sets of the Hugging Face Hub 'hf:ORG/NAME'.{meant}"
    )
  place = 'hub_dataset:HubDataset' if on_hub else BUILDERS[name]
  module, _, builder = place.partition(':')
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
  if builder.unread:
    print(f'Not read of it: {", ".join(sorted(builder.unread))}.')
