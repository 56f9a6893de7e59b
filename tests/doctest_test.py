"""Examples in docstrings are true."""

import doctest
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(
  '.'.join(path.relative_to(ROOT).with_suffix('').parts)
  for path in (ROOT / 'hetlora_jax').rglob('*.py')
  if '>>> ' in path.read_text()
)


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
  found = doctest.testmod(importlib.import_module(name))
  assert found.attempted and not found.failed
