"""Puts what benchmarks have measured into README.md and docs/.

python -m benchmarks.figures [--check]

A page asks for a result by

  <!-- figures of benchmarks.peers: benchmarks/results/peers.json -->
  <!-- end of figures -->

and gets between these lines what `report` of that module says of that file. So no
such number is written by hand; with --check nothing is written, and a page that is
not as its files say is an error.
"""

import importlib
import pathlib
import re
from collections.abc import Iterator

from absl import flags

from benchmarks import machine

_CHECK = flags.DEFINE_bool('check', False, 'Only tell whether pages are true.')
_BLOCK = re.compile(
  r'(<!-- figures of (?P<module>[\w.]+)(?P<function>:\w+)?: (?P<file>\S+) -->\n)'
  r'.*?(?=<!-- end of figures -->)',
  re.DOTALL,
)


def pages() -> list[pathlib.Path]:
  """Returns the pages that may have figures."""
  return [machine.ROOT / 'README.md', *sorted((machine.ROOT / 'docs').rglob('*.md'))]  # fmt: skip


def _block(found: re.Match) -> str:
  """Returns a block with what its result says."""
  module = importlib.import_module(found['module'])
  report = getattr(module, (found['function'] or ':report')[1:])
  result = machine.read(machine.ROOT / found['file'])
  return f'{found[1]}\n{report(result)} (`{found["file"]}`)\n\n'


def filled(text: str) -> str:
  """Returns a page's text with all blocks filled."""
  return _BLOCK.sub(_block, text)


def asked(text: str) -> Iterator[tuple[str, str]]:
  """Yields the modules and files that a page asks for."""
  for found in _BLOCK.finditer(text):
    yield found['module'], found['file']


def main() -> None:
  for page in pages():
    text = page.read_text()
    new, name = filled(text), page.relative_to(machine.ROOT)
    if new == text:
      continue
    if _CHECK.value:
      raise ValueError(f'{name} is not as its files say: make figures.')
    page.write_text(new)
    print(f'{name} is written anew.')


if __name__ == '__main__':
  machine.start(main)
