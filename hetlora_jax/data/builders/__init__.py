"""The data sets by name, prepared on first use by TensorFlow Datasets."""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from hetlora_jax import files
from hetlora_jax.data.builders import (
  chitchat,
  conversations,
  mail_subject,
  multi_session_chat,
  reddit_tldr,
  synthetic,
  text_folder,
)

BUILDERS: dict[str, type[conversations.ConversationBuilder]] = {
  'chitchat': chitchat.Chitchat,
  'mail_subject': mail_subject.MailSubject,
  'multi_session_chat': multi_session_chat.MultiSessionChat,
  'reddit_tldr': reddit_tldr.RedditTldr,
  'synthetic': synthetic.Synthetic,
  'text_folder': text_folder.TextFolder,
}


SEAL = 'sha256.json'  # beside the data: the SHA-256 of every file
ANEW = 'delete the folder, it is made anew'


class Dataset(NamedTuple):
  """Records by row, as `conversations` describes them; strings are bytes."""

  examples: Sequence[dict]
  people: Sequence[dict]
  folder: pathlib.Path = pathlib.Path()  # where they were prepared
  builder: type[conversations.ConversationBuilder] = chitchat.Chitchat


class _Records(Sequence):
  """Records of a split; raises ValueError where one cannot be read."""

  def __init__(self, records: Sequence[dict], folder: pathlib.Path):
    self._records, self._folder = records, folder

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, row):
    if not 0 <= row < len(self):
      raise IndexError(f'row {row} of {len(self)}')
    try:
      return self._records[row]
    except MemoryError:
      raise
    except Exception as error:  # TFDS has no narrower type
      why = f'row {row}: {error}'
      raise files.damaged(self._folder, why, ANEW) from error


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
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


def _place(kind: str, config: str, data_dir: pathlib.Path) -> pathlib.Path:
  """Returns the folder that a data set has, or will have once prepared."""
  configs = [c.name for c in BUILDERS[kind].BUILDER_CONFIGS]
  config = config or (configs[0] if configs else '')
  return data_dir / kind / config / str(BUILDERS[kind].VERSION)


def _digests(folder: pathlib.Path) -> dict[str, str]:
  digests = {}
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.name != SEAL:
      with path.open('rb') as file:
        digests[path.name] = hashlib.file_digest(file, 'sha256').hexdigest()
  return digests


def _check_seal(folder: pathlib.Path) -> None:
  """Raises ValueError if a file is not what it was; seals an unsealed folder.

  TFDS moves a folder into place when it is whole, so one that is there is.
  """
  path = folder / SEAL
  if not path.exists():
    with contextlib.suppress(OSError):  # a folder that may only be read
      files.write_json(path, _digests(folder))
    return
  sealed, found = files.read_json(path, ANEW), _digests(folder)
  altered = [name for name in sealed if sealed[name] != found.get(name)]
  if altered or not sealed:
    raise files.damaged(folder, f'{altered[0] if altered else SEAL}', ANEW)


def _open_prepared(builder: tfds.core.DatasetBuilder) -> Dataset:
  folder = pathlib.Path(builder.data_path)
  open_split: Any = builder.as_data_source
  examples, people = open_split('examples'), open_split('people')
  return Dataset(
    _Records(examples, folder), _Records(people, folder), folder, type(builder)
  )


def open_dataset(
  name: str, data_dir: str | os.PathLike | None = None, path: str = ''
) -> Dataset:
  """Opens a data set, preparing it if it never was.

  A name may end in one of the builder's configs, as in 'synthetic/seed1'.
  Without `data_dir` it lives in $HETLORA_CACHE or ~/.cache/hetlora_jax. Files
  of a user at `path` are prepared anew if their content has changed.

  Raises:
    ValueError: no such data set, or its folder is damaged.
    OSError: its folder cannot be read or written.
  """
  kind, _, config = name.partition('/')
  if kind not in BUILDERS:
    raise ValueError(f'dataset={name!r} is unknown; one of {list(BUILDERS)}.')
  data_dir = pathlib.Path(data_dir or files.cache_folder() / 'tfds')
  if path:
    data_dir = data_dir / 'files' / files.digest_all(BUILDERS[kind].files(path))[:16]
  make_builder = functools.partial(
    BUILDERS[kind],
    data_dir=data_dir,
    config=config or None,
    path=path,
    file_format='array_record',
  )
  folder = _place(kind, config, data_dir)
  if not folder.exists():
    _prepare(make_builder())
  try:
    _check_seal(folder)
    return _open_prepared(make_builder())
  except OSError as error:
    raise OSError(
      f'{folder} cannot be read ({files.short(error, 200)}): change its '
      f'permissions, or {ANEW}.'
    ) from error
  except (files.Damaged, MemoryError):
    raise
  except Exception as error:  # TFDS has no narrower type
    raise files.damaged(folder, error, ANEW) from error
