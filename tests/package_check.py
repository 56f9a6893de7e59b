"""Builds wheel and sdist, and runs the wheel's programs in an empty folder.

Command: python -m tests.package_check. It installs the wheel beside what this
interpreter has, and downloads only what building needs.
"""

import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).parent.parent
IN_WHEEL = (
  'configs/tiny.py',
  'configs/default.py',
  'hetlora_jax/py.typed',
  'hetlora_jax/rounds.py',
  'hetlora_jax/tools/report/templates/page.html.j2',
  'launch/train.py',
  'launch/cluster/slurm_array.sbatch',
)
IN_SDIST = (
  *IN_WHEEL,
  'LICENSE',
  'README.md',
  'Makefile',
  'tests/rounds_test.py',
)
TINY = '--config=configs/tiny.py'
SHORT = ('--config.federated.num_rounds=2', '--config.eval.every=None')


def programs(report: str) -> list[tuple[str, ...]]:
  """Returns what is run, in order."""
  return [
    ('hetlora-train', TINY, *SHORT, '--workdir=run'),
    ('hetlora-train', TINY, *SHORT, '--workdir=run'),  # all is done
    ('hetlora-evaluate', TINY, *SHORT, '--workdir=run'),
    ('hetlora-sweep', TINY, *SHORT, '--workdir=grid', '--grid=seed=[0,1]'),
    ('hetlora-sweep', TINY, '--sweep=configs/ablations.py:gamma', '--print',
     '--workdir=x'),
    ('hetlora-export', '--workdir=run', '--out=adapter'),
    ('hetlora-data', '--dataset=synthetic'),
    ('hetlora-report', 'run', 'grid', f'--out={report}'),
  ]  # fmt: skip


def build(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Builds an sdist, a wheel from it, and checks what is in them."""
  subprocess.run(
    [sys.executable, '-m', 'build', f'--outdir={folder}', str(ROOT)],
    check=True, stdout=subprocess.DEVNULL,
  )  # fmt: skip
  wheel, sdist = next(folder.glob('*.whl')), next(folder.glob('*.tar.gz'))
  with zipfile.ZipFile(wheel) as file:
    held = set(file.namelist())
  with tarfile.open(sdist) as file:
    sources = {name.partition('/')[2] for name in file.getnames()}
  for names, held_in in ((IN_WHEEL, held), (IN_SDIST, sources)):
    missing = [name for name in names if name not in held_in]
    if missing:
      raise SystemExit(f'missing: {", ".join(missing)}')
  return wheel, sdist


def run(wheel: pathlib.Path, folder: pathlib.Path) -> None:
  """Installs a wheel into a folder and runs its programs in another."""
  installed, empty = folder / 'installed', folder / 'empty'
  empty.mkdir()
  subprocess.run(
    [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps',
     f'--target={installed}', str(wheel)],
    check=True,
  )  # fmt: skip
  env = os.environ | {
    'PYTHONPATH': str(installed),
    'HETLORA_CACHE': str(folder / 'cache'),
  }
  where = 'import hetlora_jax, configs; print(hetlora_jax.__file__)'
  found = subprocess.check_output(
    [sys.executable, '-c', where], cwd=empty, env=env, text=True
  )
  if not found.startswith(str(installed)):
    raise SystemExit(f'not the wheel is imported but {found}')
  for name, *words in programs('report.html'):
    print(f'$ {name} {" ".join(words)}', flush=True)
    subprocess.run([installed / 'bin' / name, *words], cwd=empty, env=env, check=True)


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as name:
    here = pathlib.Path(name)
    run(build(here)[0], here)
  print('The package is whole, and works in an empty folder.')
