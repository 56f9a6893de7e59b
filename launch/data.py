"""Prepares a data set and says what it is like: python -m launch.data.

  python -m launch.data --dataset=mail_subject            # prepares it
  python -m launch.data --dataset=mail_subject --stats --out=DIR
  python -m launch.data --dataset=text_folder --path=my_data --stats

With --stats, a table of clients, examples a client, tokens and labels; with
--out, also DIR/DATASET.png, histograms of these. docs/data.md has the sets.
"""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # it computes nothing

from absl import flags

from hetlora_jax import config, formats
from hetlora_jax.data import builders, partition, statistics
from launch import errors, program

DATASET = flags.DEFINE_string(
  'dataset', None, f'One of {", ".join(builders.BUILDERS)}.'
)
PATH = flags.DEFINE_string(
  'path', '', 'File or folder of your data, or of one that you downloaded.'
)
STATS = flags.DEFINE_bool('stats', False, 'Print what the data is like.')
OUT = flags.DEFINE_string('out', None, 'Folder for histograms (--stats).')
TOKENIZER = flags.DEFINE_string(
  'tokenizer',
  'gemma3_270m',
  'Whose tokens are counted: gemma3_270m, smollm2_135m, a .gguf file or a '
  'Hugging Face folder (--stats).',
)
PARTITION = flags.DEFINE_string(
  'partition',
  partition.NATURAL,
  f'Who the clients are: {partition.NATURAL}, or made by a rule: '
  f'{", ".join(partition.PARTITIONERS)} (--stats).',
)
CLIENTS = flags.DEFINE_integer('partition_clients', 100, 'Clients of a rule.')
ALPHA = flags.DEFINE_float('partition_alpha', 1.0, 'Number of a rule.')
SEED = flags.DEFINE_integer('partition_seed', 0, 'Seed of a rule.')


def _statistics() -> str:
  """Returns the table, having drawn the histograms."""
  data = config.Data(
    name=DATASET.value,
    path=PATH.value,
    partition=PARTITION.value,
    partition_clients=CLIENTS.value,
    partition_alpha=ALPHA.value,
    partition_seed=SEED.value,
  )
  found = statistics.collect(data, formats.load_tokenizer(TOKENIZER.value))
  table = statistics.table(found)
  if not OUT.value:
    return table
  folder = pathlib.Path(OUT.value).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{found.name.replace("/", "_")}.png'
  statistics.plot(found, path)
  return f'{table}\nHistograms are in {path}.'


def _prepared() -> str:
  """Prepares the data and says where they are."""
  dataset = builders.open_dataset(DATASET.value, path=PATH.value)
  return (
    f'{DATASET.value} is in {dataset.folder}: {len(dataset.examples):,} '
    f'examples of {len(dataset.people):,} clients.'
  )


def run() -> None:
  """Prepares, and with --stats counts, one data set."""
  if not DATASET.value:
    errors.fail(f'--dataset is missing: name one of {", ".join(builders.BUILDERS)}')
  if OUT.value and not STATS.value:
    errors.fail('--out is for histograms: give --stats too')
  try:
    print(_statistics() if STATS.value else _prepared())
  except ValueError as error:
    told = str(error)
    for field, flag in (('data.path', '--path'), ('data.name', '--dataset')):
      told = told.replace(f'config.{field}', flag).replace(field, flag)
    raise ValueError(told) from error


def main() -> None:
  """Starts the program, hetlora-data too."""
  program.start(run, __name__)


if __name__ == '__main__':
  main()
