"""The Hugging Face Hub: names of repositories, and what its errors mean.

Cache, token, server and offline mode are those of its libraries: HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import contextlib
import errno
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from hetlora_jax import files
from hetlora_jax.fields import ConfigError

DATASET = 'hf:'  # how the name of a data set there begins
_DEAD = 3600  # seconds without a byte
_NAME = re.compile(r'((?:\w[\w.-]*/)?\w[\w.-]*)(?::([^:@]+))?(?:@([\w./-]+))?')


class Name(NamedTuple):
  """A repository, and what is meant of it."""

  repo: str
  part: str | None  # a GGUF file of a model, a configuration of a data set
  revision: str | None  # branch, tag or commit; None: the newest


def model(source: str) -> Name | None:
  """Returns what `model.source` names if it is of the form ORG/NAME[:FILE][@REVISION]."""
  found = _NAME.fullmatch(source)
  if not found or '/' not in found[1] or found[1].endswith('.gguf'):
    return None
  return Name(*found.groups())


def dataset(name: str) -> Name | None:
  """Returns what `data.name` names if it begins with hf:; raises ConfigError."""
  if not name.startswith(DATASET):
    return None
  if not (found := _NAME.fullmatch(name.removeprefix(DATASET))):
    raise ConfigError(
      f'config.data.name={name!r} is not of the form {DATASET}ORG/NAME or '
      f'{DATASET}ORG/NAME:CONFIG@REVISION.'
    )
  return Name(*found.groups())


def unpinned(name: str) -> str:
  """Returns the name of a model or of a data set without its revision."""
  on_hub = model(name) or dataset(name)
  return name.partition('@')[0] if on_hub else name


def commit(name: Name, kind: str) -> str:
  """Returns the commit that a revision stands for; use it inside `told`.

  Args:
    name: of the repository.
    kind: 'model' or 'dataset'.
  """
  from huggingface_hub import constants, resolve_revision
  from huggingface_hub.utils import disable_progress_bars

  if not sys.stderr.isatty():
    disable_progress_bars()
  found = resolve_revision(
    name.repo,
    repo_type=kind,
    revision=name.revision,
    local_files_only=constants.HF_HUB_OFFLINE,  # else it warns of what was asked for
  )
  return found.resolved


def fetch(
  repo: str, file: str, revision: str, kind: str = 'model'
) -> pathlib.Path | None:
  """Returns a file, downloaded unless it is cached; None if there is none.

  Args:
    repo: the repository.
    file: its path there.
    revision: a commit.
    kind: 'model' or 'dataset'.
  """
  import huggingface_hub
  from huggingface_hub import errors

  where: Any = {'revision': revision, 'repo_type': kind}
  known = huggingface_hub.try_to_load_from_cache(repo, file, **where)
  if known:  # a path, or what says that there is no such file
    return pathlib.Path(known) if isinstance(known, str) else None
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(repo, file, **where))
  except errors.RemoteEntryNotFoundError:
    return None


def tidy(folder: pathlib.Path) -> None:
  """Deletes what killed downloads of a snapshot's repository have left behind."""
  for path in folder.parent.parent.glob('blobs/*.incomplete'):
    with contextlib.suppress(OSError):
      if time.time() - path.stat().st_mtime > _DEAD:
        path.unlink()


def lacks(name: Name, file: str, revision: str) -> ConfigError:
  """Returns the error for a repository without a file that a model needs."""
  import huggingface_hub

  found = huggingface_hub.HfApi().list_repo_files(name.repo, revision=revision)
  remedy = 'name a repository that transformers can load, with safetensors'
  if ours := sorted(file for file in found if file.endswith('.gguf')):
    remedy = f'name one of its GGUF files, as {name.repo}:{ours[0]}'
  return ConfigError(
    f'config.model.source={name.repo!r} has no {file} at {revision}: {remedy}.'
  )


@contextlib.contextmanager
def told(field: str, value: str, name: Name, extra: str) -> Iterator[None]:
  """Turns what the Hub's libraries raise into a ConfigError of one line.

  Args:
    field: that names the repository.
    value: as the user gave it.
    name: what it was read as.
    extra: of our package, which has these libraries.
  """
  try:
    yield
  except (ConfigError, files.Damaged, MemoryError):
    raise
  except ImportError as error:  # absent, or an old release
    raise ConfigError(
      f'config.{field}={value!r} is read by packages that are not all here '
      f"({files.short(error)}): pip install 'hetlora_jax[{extra}]'."
    ) from error
  except Exception as error:
    kind = 'datasets/' if field.startswith('data') else ''
    raise ConfigError(f'config.{field}={value!r} {_why(error, name, kind)}.') from error


def _why(error: BaseException, name: Name, kind: str) -> str:
  """Says what is wrong with a repository, and the remedy."""
  import huggingface_hub
  from huggingface_hub import constants, errors

  chain = list(_chain(error))

  def is_a(*kinds: type) -> bool:
    return any(isinstance(e, kinds) for e in chain)

  page = f'{constants.ENDPOINT}/{kind}{name.repo}'
  token = 'a token (HF_TOKEN, or `hf auth login`)'
  if is_a(errors.GatedRepoError):
    return f'is gated: ask for access at {page}, and give {token} that has it'
  if is_a(errors.RevisionNotFoundError):
    return f'has no revision {name.revision!r}: take a branch, tag or commit of {page}'
  if is_a(errors.RepositoryNotFoundError):
    seen = (
      'that this token may see' if huggingface_hub.get_token() else 'that is public'
    )
    return (
      f'is no repository of {constants.ENDPOINT} {seen}{" and no path here" * (not kind)}'
      f': correct it, or give {token} for a private one'
    )
  if any(getattr(_response(e), 'status_code', 0) == 401 for e in chain):
    return f'cannot be read, since {page} refuses the token: give {token} that is valid'
  if constants.HF_HUB_OFFLINE:
    return (
      f'is not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: run '
      'once without it, where there is a network'
    )
  if any(getattr(e, 'errno', 0) == errno.ENOSPC for e in chain):
    return (
      f'cannot be kept ({os.strerror(errno.ENOSPC)}): make room, or set HF_HOME '
      f'({constants.HF_HOME}) to another folder'
    )
  for e in chain:
    if isinstance(e, errors.HTTPError):
      return (
        f'cannot be fetched from {constants.ENDPOINT} ({files.short(e, 150)}): look at '
        'the network, and run the same line again'
      )
  both = dict.fromkeys(files.short(e, 350).rstrip('.') for e in (error, chain[-1]))
  return f'cannot be read ({"; ".join(both)})'


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and all that it came from."""
  while error:
    yield error
    unless = error.__suppress_context__
    error = error.__cause__ or (None if unless else error.__context__)


def _response(error: BaseException) -> object:
  return getattr(error, 'response', None)
