"""One page that compares runs: python -m launch.report.

`runs.py` reads folders, `charts.py` draws SVG, `page.py` writes the HTML (`inside.py` its
sections on ranks, energy and people, of what `parts.py` has).
"""

import pathlib
from collections.abc import Sequence

from hetlora_jax import config, files
from hetlora_jax.tools.report import page, runs


def write(folders: Sequence[pathlib.Path], out: pathlib.Path) -> int:
  """Writes a page that compares runs, whole or not at all; returns how many.

  Args:
    folders: of runs, or of sweeps, whose runs are taken.
    out: the page, one file that needs no other and no network.

  Raises:
    ConfigError, Damaged, OSError: in one line that names the file.
  """
  if out.is_dir() or out.suffix not in ('.html', '.htm'):
    raise config.ConfigError(f'--out={out} must be a file, e.g. report.html.')
  if not out.parent.is_dir():
    raise config.ConfigError(f'--out={out}: {out.parent} is no folder: make it first.')
  found = runs.read(folders)
  files.write_text(out, page.render(found))
  return len(found)
