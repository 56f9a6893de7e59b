"""Prints setup.py's lower bounds as constraints: python -m tests.minimum."""

import pathlib
import re

SETUP = pathlib.Path(__file__).parent.parent / 'setup.py'


def constraints(setup: str) -> list[str]:
  """Returns NAME==VERSION for every NAME>=VERSION of install_requires."""
  required = setup.partition('install_requires')[2].partition('],')[0]
  return [
    f'{name}=={version}'
    for name, version in re.findall(r"'([\w.-]+)>=([\d.]+)'", required)
  ]


if __name__ == '__main__':
  print('\n'.join(constraints(SETUP.read_text())))
