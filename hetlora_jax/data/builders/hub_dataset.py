"""Data sets of the Hugging Face Hub: hf:ORG/NAME[:CONFIG][@REVISION]."""

import hashlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

from hetlora_jax import hub
from hetlora_jax.config import ConfigError
from hetlora_jax.data.builders import Reading, records, text_folder

OTHERS = (
  'a client is a text or a number, a prompt a text or a list of them, a target a text: '
  'take other columns (config.data.prompt and others) or rows (config.data.split)'
)


def _named(name: str) -> hub.Name:
  found = hub.dataset(name)
  assert found, name
  return found


class HubDataset(records.RecordBuilder):
  """Makes every row of a split an example; `path` is the name with its commit."""

  labelled: ClassVar[bool] = True
  has_whole: ClassVar[bool] = True
  limits: ClassVar[None] = None

  @classmethod
  def located(cls, name: str, path: str) -> tuple[str, str]:
    del path
    found = _named(name)
    with hub.told('data.name', name, found, 'datasets'):
      commit = hub.commit(found, 'dataset')
    return f'{hub.unpinned(name)}@{commit}', commit

  @classmethod
  def digest(cls, path: str, reading: Reading) -> str:
    return hashlib.sha256(repr((path, *reading.given)).encode()).hexdigest()[:16]

  def examples(self) -> Iterator[records.Record]:
    with hub.told('data.name', self.path, _named(self.path), 'datasets'):
      table = self._table()
    found, columns = table.column_names, self.reading.columns.values()
    if problem := text_folder.lacking(found, self.reading):
      raise ConfigError(
        f'config.data.name={self.path!r} has {problem}: {text_folder.NAME_THEM}.'
      )
    read = [name for name in found if name in columns]
    self.unread |= {*found} - {*read}
    names = {x: getattr(table.features[x], 'int2str', None) for x in read}
    for number, row in enumerate(table.select_columns(read), 1):
      place = pathlib.Path(f'{self.path}, row {number}')
      for column, name in names.items():
        if name and row[column] is not None and row[column] >= 0:
          row[column] = name(row[column])  # of a class
      yield text_folder.record(row, place, number, self.reading, remedy=OTHERS)

  def _table(self) -> Any:
    """Returns the split as `datasets` has it, downloaded if it never was."""
    import datasets

    if not sys.stderr.isatty():
      datasets.disable_progress_bars()
    name, split = _named(self.path), self.reading.split or 'train'
    hub.fetch(name.repo, 'README.md', name.revision, 'dataset')  # or says why not
    found = datasets.load_dataset_builder(
      f'hf://datasets/{name.repo}', name.part, revision=name.revision
    )
    if found.hash != name.revision:  # the library's fallback is any that it has
      raise ConfigError(
        f'config.data.name={self.path!r} cannot be fetched, and the cache of '
        f'`datasets` has another revision, {found.hash}: name that, or run where '
        'there is a network.'
      )
    found.download_and_prepare()
    try:
      return found.as_dataset(split)
    except ValueError as error:
      known = ', '.join(found.info.splits or ())
      raise ConfigError(
        f'config.data.split={split!r} is no split of {self.path}: take one of {known}, '
        "or a part of one as 'train[:1000]'."
      ) from error
