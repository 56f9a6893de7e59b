"""The data sets by name, prepared on first use by TensorFlow Datasets."""

import contextlib
import functools
import io
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from hetlora_jax.data.builders import chitchat, conversations, synthetic

BUILDERS: dict[str, type[conversations.ConversationBuilder]] = {
  'chitchat': chitchat.Chitchat,
  'synthetic': synthetic.Synthetic,
}


class Dataset(NamedTuple):
  """Records by row, as `conversations` describes them; strings are bytes."""

  examples: Sequence[dict]
  people: Sequence[dict]


def _default_data_dir() -> pathlib.Path:
  cache = os.environ.get('HETLORA_CACHE', '~/.cache/hetlora_jax')
  return pathlib.Path(cache).expanduser() / 'tfds'


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


def open_dataset(
  name: str, data_dir: str | os.PathLike | None = None
) -> Dataset:
  """Opens a data set, preparing it if it never was.

  A name may end in one of the builder's configs, as in 'synthetic/seed1'.
  Without `data_dir` it lives in $HETLORA_CACHE or ~/.cache/hetlora_jax. TFDS
  moves a directory into place when it is whole, so one that is there is ready.
  """
  kind, _, config = name.partition('/')
  if kind not in BUILDERS:
    raise ValueError(f'dataset={name!r} is unknown; one of {list(BUILDERS)}.')
  make_builder = functools.partial(
    BUILDERS[kind],
    data_dir=data_dir or _default_data_dir(),
    config=config or None,
    file_format='array_record',
  )
  if not make_builder().data_path.exists():
    _prepare(make_builder())
  open_split: Any = make_builder().as_data_source
  return Dataset(open_split('examples'), open_split('people'))
