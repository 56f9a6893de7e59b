"""Prepares a data set and says what it is like: python -m launch.data.

  python -m launch.data --dataset=mail_subject            # prepares it
  python -m launch.data --dataset=mail_subject --stats --out=DIR
  python -m launch.data --dataset=text_folder --path=my_data --stats
  python -m launch.data --dataset=text_folder --path=my_data --show=3 --format=plain
  python -m launch.data --dataset=hf:ORG/NAME --client=user --prompt=post --target=reply

With --stats, a table of clients, examples a client, tokens and labels; with
--out, also DIR/DATASET.png, histograms of these. With --show, so many examples as
the model sees them, [[what bears the loss]] marked. docs/data.md has the sets.
"""

import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # it computes nothing

from absl import flags

from hetlora_jax import base_model, config
from hetlora_jax.data import builders, partition, statistics
from hetlora_jax.models.tokenizer import Tokenizer
from launch import errors, program

DATASET = flags.DEFINE_string(
  'dataset', None, f'One of {", ".join(builders.BUILDERS)}; or hf:ORG/NAME.'
)
PATH = flags.DEFINE_string(
  'path', '', 'File or folder of your data, or of one that you downloaded.'
)
CLIENT = flags.DEFINE_string('client', None, 'Column that says who wrote the target.')
PROMPT = flags.DEFINE_string('prompt', None, 'Column of what the target answers.')
TARGET = flags.DEFINE_string('target', None, 'Column of what the client wrote.')
LABEL = flags.DEFINE_string('label', None, 'Column of what it is about.')
SPLIT = flags.DEFINE_string('split', None, "Split of a data set of the Hub: 'train'.")
STATS = flags.DEFINE_bool('stats', False, 'Print what the data is like.')
OUT = flags.DEFINE_string('out', None, 'Folder for histograms (--stats).')
TOKENIZER = flags.DEFINE_string(
  'tokenizer',
  'gemma3_270m',
  'Whose tokens are counted and shown: gemma3_270m, smollm2_135m, a .gguf file, a '
  "Hugging Face folder, or 'random', which is trained on the data.",
)
FORMAT = flags.DEFINE_string(
  'format', None, 'How examples are written, as config.data.format.'
)
SHOW = flags.DEFINE_integer(
  'show', 0, 'Print so many examples, of clients spread evenly over all.', 0
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


FLAGS_OF = {  # fields that errors name
  'data.path': '--path',
  'data.name': '--dataset',
  'data.format': '--format',
  'data.partition': '--partition',
  'model.source': '--tokenizer',
  **{f'data.{name}': f'--{name}' for name in builders.Reading._fields},
}


def _config() -> config.Config:
  """Returns the sections of a run that the flags are about, checked."""
  data = config.Data(
    name=DATASET.value,
    path=PATH.value or None,
    client=CLIENT.value,
    prompt=PROMPT.value,
    target=TARGET.value,
    label=LABEL.value,
    split=SPLIT.value,
    format=FORMAT.value,
    partition=PARTITION.value,
    partition_clients=CLIENTS.value,
    partition_alpha=ALPHA.value,
    partition_seed=SEED.value,
  )
  return config.resolve(
    config.Config(data=data, model=config.Model(source=TOKENIZER.value))
  )


def _statistics(c: config.Config, tokenizer: Tokenizer) -> str:
  """Returns the table, having drawn the histograms."""
  found = statistics.collect(c.data, tokenizer)
  table = statistics.table(found)
  if not OUT.value:
    return table
  folder = pathlib.Path(OUT.value).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{found.name.replace("/", "_")}.png'
  statistics.plot(found, path)
  return f'{table}\nHistograms are in {path}.'


def _shown(c: config.Config, tokenizer: Tokenizer) -> str:
  """Returns examples; on a terminal, what bears the loss is green and bold."""
  marks = ('\033[1;32m', '\033[0m') if sys.stdout.isatty() else ('[[', ']]')
  return '\n'.join(statistics.shown(c.data, tokenizer, SHOW.value, marks))


def _prepared() -> str:
  """Prepares the data and says where they are."""
  dataset = builders.of(_config().data)
  return (
    f'{DATASET.value} is in {dataset.folder}: {len(dataset.examples):,} '
    f'examples of {len(dataset.people):,} clients.'
  )


def run() -> None:
  """Prepares, and with --stats counts or with --show shows, one data set."""
  if not DATASET.value:
    errors.fail(f'--dataset is missing: name one of {", ".join(builders.BUILDERS)}')
  if OUT.value and not STATS.value:
    errors.fail('--out is for histograms: give --stats too')
  try:
    if not (STATS.value or SHOW.value):
      print(_prepared())
      return
    c = _config()
    tokenizer = base_model.tokenizer_of(c)
    if STATS.value:
      print(_statistics(c, tokenizer))
    if SHOW.value:
      print(_shown(c, tokenizer))
  except ValueError as error:
    told = str(error)
    for field, flag in FLAGS_OF.items():
      told = told.replace(f'config.{field}', flag).replace(field, flag)
    raise ValueError(told) from error


def main() -> None:
  """Starts the program, hetlora-data too."""
  program.start(run, __name__)


if __name__ == '__main__':
  main()
