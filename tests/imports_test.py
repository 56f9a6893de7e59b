"""Imports go downward only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# A module may import from groups before its own, and from its own.
ORDER = [
  ['types'],
  ['prng', 'lora', 'wire', 'files', 'optimizers'],
  ['fields', 'ranks', 'models', 'methods'],
  ['client', 'server', 'diagnostics', 'robust'],
  ['rounds', 'sharding', 'heldout'],
  ['formats', 'hub', 'data.partition', 'console', 'arithmetic'],
  ['config'],
  ['data', 'checkpoint'],
  ['build', 'base_model'],
  ['experiment'],
  ['points', 'rows', 'stopping', 'metrics'],
  ['curves', 'tracking'],
  ['run'],
  ['record'],
  ['training'],
  ['tools'],
]  # fmt: skip
FILES = sorted((ROOT / 'hetlora_jax').rglob('*.py'))


def _level(module: str) -> int:
  """Returns the level of the longest row that the module starts with."""
  found = [
    (len(name), level)
    for level, names in enumerate(ORDER)
    for name in names
    if module == name or module.startswith(name + '.')
  ]
  assert found, f'{module} is in no group of ORDER: add it.'
  return max(found)[1]


def _imported(path):
  """Yields our modules that a file imports."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      if node.module == 'hetlora_jax':
        yield from (alias.name for alias in node.names)
      elif node.module.startswith('hetlora_jax.'):
        inner = node.module.removeprefix('hetlora_jax.')
        yield from (
          f'{inner}.{alias.name}'
          if (ROOT / 'hetlora_jax' / inner.replace('.', '/')).is_dir()
          else inner
          for alias in node.names
        )


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(ROOT / 'hetlora_jax'))
)
def test_imports_go_down(path):
  inside = path.relative_to(ROOT / 'hetlora_jax').with_suffix('')
  module = '.'.join(inside.parts).removesuffix('.__init__')
  if module == '__init__':
    return
  for imported in _imported(path):
    assert _level(imported) <= _level(module), f'{module} imports {imported}'


def test_flax_is_used_in_the_decoder_alone():
  users = [p.name for p in FILES if 'from flax' in p.read_text()]
  assert users == ['decoder.py']
