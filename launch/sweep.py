"""Runs many points: python -m launch.sweep --sweep=configs/ablations.py:methods.

Each point gets a folder of its own in --workdir; finished ones are not run
again. Ends in a table, sweep.json and sweep.png.
"""

import pathlib
import shlex

from absl import flags as absl_flags

from hetlora_jax import config as config_lib
from hetlora_jax import sweep
from launch import flags

SWEEP = absl_flags.DEFINE_string(
  'sweep', None, 'Points to run, FILE:NAME, e.g. configs/ablations.py:gamma.'
)


def run(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Runs all points and prints the table that compares them."""
  if not SWEEP.value:
    raise config_lib.ConfigError(
      '--sweep is missing: try --sweep=configs/ablations.py:methods'
    )
  own = ('--sweep', '--workdir')
  kept = [a for a in flags.arguments() if not a.startswith(own)]
  program = shlex.join(['python', '-m', 'launch.train', *kept])
  results = sweep.run(config, sweep.load(SWEEP.value), workdir, program)
  failed = [r['name'] for r in results if 'error' in r]
  print(f'\n{sweep.table(results)}\n\nResults are in {workdir}/')
  if failed:
    raise config_lib.ConfigError(f'these points failed: {", ".join(failed)}')


if __name__ == '__main__':
  flags.run(run)
