"""Writes one page that compares runs: python -m launch.report.

`runs.py` reads folders, `sections.py` has what each section shows, and `charts.py`
places it on a drawing area; all HTML, SVG and CSS is in `templates/`.
"""

import pathlib
from collections.abc import Sequence

import jinja2

from hetlora_jax import files
from hetlora_jax.config import ConfigError
from hetlora_jax.tools import figures, tables
from hetlora_jax.tools.paired import KINDS
from hetlora_jax.tools.report import charts, runs, sections

_KEPT = '\n\t\u200d'  # the last one joins the parts of an emoji
# Every {{ value }} of a template is escaped, except what a macro has written.
TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / 'templates'),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
)
TEMPLATES.globals.update(charts=charts, sections=sections, tables=tables, KINDS=KINDS)


def clean(page: str) -> str:
  """Replaces characters that cannot be shown or that turn the direction of writing."""
  return ''.join(c if c.isprintable() or c in _KEPT else '\ufffd' for c in page)


def write(
  folders: Sequence[pathlib.Path], out: pathlib.Path, baseline: str | None = None
) -> int:
  """Writes a page that compares runs, and returns how many runs it compares.

  Args:
    folders: of runs, or of sweeps, whose runs are all taken.
    out: the page, a file that needs no other file and no network. It is written whole
      or, after an error, not at all. Its curves are beside it for papers: of
      x.html in x_curves.png, .pdf and .svg.
    baseline: the group that all are compared with; None: the first.

  Raises:
    ConfigError, Damaged, OSError: with one line that names the file.
  """
  if out.is_dir() or out.suffix not in ('.html', '.htm'):
    raise ConfigError(f'--out={out} must be a file, e.g. report.html.')
  if not out.parent.is_dir():
    raise ConfigError(f'--out={out}: {out.parent} is no folder: make it first.')
  entries = runs.read(folders)
  template = TEMPLATES.get_template('page.html.j2')
  groups = runs.grouped(entries)
  page = template.render(entries=entries, groups=groups, baseline=baseline)
  figures.save(sections.compare(groups), out.with_name(f'{out.stem}_curves'))
  files.write_text(out, clean(page))
  return len(entries)
