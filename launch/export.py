"""Takes adapters out: python -m launch.export --workdir=DIR --out=OUT.

The configuration is that of the run in --workdir, unless --config is given.
Prints what was written as one JSON object; docs/export.md tells how to load it.
"""

import json
import pathlib

from absl import flags as absl_flags

from hetlora_jax import config as config_lib
from hetlora_jax.run import Run
from hetlora_jax.tools import export
from launch import errors, flags

OUT = absl_flags.DEFINE_string(
  'out', None, 'Folder to make; it must not exist, or be empty.'
)
FORMAT = absl_flags.DEFINE_enum(
  'format',
  'peft',
  list(export.FORMATS),
  "'peft': an adapter for Hugging Face PEFT; 'gguf': one for llama.cpp; 'merged': the "
  "model with it, for transformers; 'base': the model without.",
)
DTYPE = absl_flags.DEFINE_enum(
  'dtype',
  'float32',
  list(export.DTYPES),
  "Type of a whole model or a 'gguf' adapter; float16 is for 'gguf' alone.",
)
ROUND = absl_flags.DEFINE_string(
  'round', 'newest', "Which state: 'newest', 'best' (eval.metric), or of this round."
)
RANK = absl_flags.DEFINE_integer(
  'rank', None, 'Truncate the global adapters to this rank.'
)
CLIENT = absl_flags.DEFINE_string(
  'client', None, 'Export what a round would send to the person of this id.'
)


def write(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Writes --out and prints what it is."""
  if not OUT.value:
    errors.fail('--out is missing: name a folder to make')
  run = Run(workdir)
  run.check(config)
  selection = export.Selection(
    FORMAT.value, DTYPE.value, RANK.value, CLIENT.value, ROUND.value
  )
  about = export.write(run, pathlib.Path(OUT.value).expanduser(), selection)
  print(json.dumps(about))


def main() -> None:
  """Starts the program, hetlora-export too."""
  flags.run(write)


if __name__ == '__main__':
  main()
