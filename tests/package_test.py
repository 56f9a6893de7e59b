"""What is installed: files, console scripts, bounds; see package_check too."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from launch import program
from tests import minimum, package_check

ROOT = pathlib.Path(__file__).parent.parent
SETUP = (ROOT / 'setup.py').read_text()
PROGRAMS = re.search(r"PROGRAMS = \((.*?)\)", SETUP)[1].replace("'", '').split(', ')  # fmt: skip


def test_the_package_has_its_files(tmp_path):
  pytest.importorskip('setuptools')
  subprocess.run(
    [sys.executable, 'setup.py', '-q', 'build', f'--build-base={tmp_path}'],
    cwd=ROOT, check=True, capture_output=True,
  )  # fmt: skip
  built = tmp_path / 'lib'
  missing = [x for x in package_check.IN_WHEEL if not (built / x).is_file()]
  assert not missing
  # Nothing else is installed at the top level.
  assert {p.name for p in built.iterdir()} == {
    'configs',
    'hetlora_jax',
    'launch',
  }


def test_a_console_script_tells_of_all_flags():
  code = """
import sys
sys.argv = ['/bin/hetlora-train', '--help']
from launch import train
train.main()
"""
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.startswith('Trains: '), done
  assert '--branch_from' in done.stdout and '--workdir' in done.stdout


@pytest.mark.parametrize('name', PROGRAMS)
def test_every_console_script_has_its_main(name):
  tree = ast.parse((ROOT / f'launch/{name}.py').read_text())
  mains = [
    node
    for node in tree.body
    if isinstance(node, ast.FunctionDef) and node.name == 'main'
  ]
  assert len(mains) == 1 and not mains[0].args.args


def test_every_launcher_is_in_setup():
  with_main = {
    path.stem
    for path in (ROOT / 'launch').glob('*.py')
    if "__name__ == '__main__'" in path.read_text()
  }
  assert with_main == set(PROGRAMS)


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  ours = f'--config={ROOT}/configs/tiny.py'
  assert program._found('--config=configs/tiny.py') == ours
  assert program._found('configs/tiny.py') == f'{ROOT}/configs/tiny.py'
  sweep = program._found('--sweep=configs/ablations.py:gamma')
  assert sweep == f'--sweep={ROOT}/configs/ablations.py:gamma'
  for word in ('--config=configs/none.py', '--out=configs/tiny.py', '--x=1'):
    assert program._found(word) == word
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/tiny.py').touch()
  assert program._found('--config=configs/tiny.py') == '--config=configs/tiny.py'


@pytest.mark.parametrize(
  'first, words',
  [
    ('/a/launch/train.py', ['python', '-m', 'launch.train']),
    ('/a/bin/hetlora-train', ['hetlora-train']),
  ],
)
def test_a_command_is_repeated_as_it_was_started(monkeypatch, first, words):
  monkeypatch.setattr(sys, 'argv', [first, '--workdir=x'])
  assert program.words() == words


def test_every_import_is_required():
  names = {
    'absl': 'absl-py', 'google': 'protobuf', 'rouge_score': 'rouge-score',
    'orbax': 'orbax-checkpoint', 'tensorflow_datasets': 'tensorflow-datasets',
  }  # fmt: skip
  required = {c.partition('==')[0] for c in minimum.constraints(SETUP)}
  imported = set()
  for folder in ('hetlora_jax', 'launch', 'configs'):
    for path in (ROOT / folder).rglob('*.py'):
      for node in ast.parse(
        path.read_text()
      ).body:  # what is optional is imported later
        if isinstance(node, ast.ImportFrom | ast.Import):
          name = getattr(node, 'module', None) or node.names[0].name
          imported.add(name.partition('.')[0])
  others = imported - set(sys.stdlib_module_names) - {
    'hetlora_jax', 'launch', 'configs'
  }  # fmt: skip
  assert {names.get(n, n) for n in others} <= required
