"""What keeps the house in order: sizes, names of rules, and what an import does."""

import ast
import pathlib
import re
import statistics
import subprocess
import sys

import pytest

from hetlora_jax.methods import registry

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
  path
  for folder in ('hetlora_jax', 'launch', 'configs')
  for path in (ROOT / folder).rglob('*.py')
)
LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / 'hetlora_jax')]
# Lines: what there is now, and a little room. Growing past one is a decision.
MOST_LINES, MOST_IMPORTED, MOST_OF_A_FUNCTION = 19_600, 10_900, 60


def _lines(path: pathlib.Path) -> int:
  return len(path.read_text().splitlines())


def _nodes(path: pathlib.Path, *kinds: type) -> list:
  found = ast.walk(ast.parse(path.read_text()))
  return [node for node in found if isinstance(node, kinds)]


def test_the_house_stays_of_its_size():
  assert sum(map(_lines, FILES)) <= MOST_LINES


def test_functions_stay_short():
  sizes = {
    f'{path.relative_to(ROOT)}:{node.name}': node.end_lineno - node.lineno + 1
    for path in FILES
    for node in _nodes(path, ast.FunctionDef)
  }
  assert statistics.median(sizes.values()) <= 10
  assert not [name for name, size in sizes.items() if size > MOST_OF_A_FUNCTION]
  (the_round,) = [n for name, n in sizes.items() if name.endswith(':federated_round')]
  assert the_round <= 60


IMPORTING = """
import os, signal, sys
import jax
before = dict(jax.config.values), dict(os.environ), sys.stdout, sys.stderr
handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
import hetlora_jax as hl
assert before == (dict(jax.config.values), dict(os.environ), sys.stdout, sys.stderr)
assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
assert set(hl.__all__) <= set(dir(hl))
assert not jax._src.xla_bridge._backends, 'devices are started'
ours = [m for name, m in sys.modules.items() if name.split('.')[0] == 'hetlora_jax']
assert not [name for name in sys.modules if name.split('.')[0] in ('launch', 'configs')]
print(sum(len(open(m.__file__).read().splitlines()) for m in ours))
"""


def test_importing_changes_nothing_global_and_loads_only_the_core():
  done = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', IMPORTING],
    cwd=ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) <= MOST_IMPORTED


def _compared(path: pathlib.Path) -> set[str]:
  """Returns methods' names in comparisons, and rules' where methods or rules are."""
  rules = {name for table in registry.ROLES.values() for name in table}
  found = set()
  for node in _nodes(path, ast.Compare):
    about_rules = re.search('method|rule|trait|role', ast.unparse(node))
    words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
    found |= words & (set(registry.METHODS) | (rules if about_rules else set()))
  return found


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_rules_are_known_by_their_facts_and_configs_by_nobody(path):
  inside = str(path.relative_to(ROOT / 'hetlora_jax'))
  for node in _nodes(path, ast.ImportFrom, ast.Import):
    module = getattr(node, 'module', None) or node.names[0].name
    assert module.split('.')[0] not in ('configs', 'launch'), f'{inside}: {module}'
  assert inside.startswith('methods/') or not _compared(path)
