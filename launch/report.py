"""Compares runs: python -m launch.report DIR [DIR ...] [--out=FILE.html].

A DIR is a run's --workdir or that of a sweep. The page is one file that needs no
network and no script; its curves are beside it, FILE_curves.png, .pdf and .svg.
"""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # no device is needed

from absl import flags as absl_flags

from hetlora_jax.tools import report
from launch import errors, program

OUT = absl_flags.DEFINE_string(
  'out', None, 'Page to write; of one DIR, DIR/report.html unless it is given.'
)
BASELINE = absl_flags.DEFINE_string(
  'baseline',
  None,
  'Runs that all are compared with, as the page names them, e.g. method=fedit; by '
  'default the first.',
)


def run(*words: str) -> None:
  """Writes the page and prints where it is."""
  folders = [pathlib.Path(word).expanduser() for word in words]
  if OUT.value:
    out = pathlib.Path(OUT.value).expanduser()
  elif len(folders) == 1:
    out = folders[0] / 'report.html'
  else:
    errors.fail('--out is missing: of several folders, name the page to write')
  count = report.write(folders, out, BASELINE.value)
  print(f'{out} compares {count} run{"s" * (count != 1)}.')


def main() -> None:
  """Starts the program, hetlora-report too."""
  program.start(run, __name__, takes_words=True)


if __name__ == '__main__':
  main()
