"""Files: read as if damaged, written whole or not at all, cached in one folder.

Nothing here, nor what uses it, executes what it reads.
"""

import codecs
import contextlib
import csv
import hashlib
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

MOST_BYTES = 1 << 28  # of a file that is read whole; Gemma's largest has 33 MB
MOST_LINE = 1 << 24  # bytes of a line of JSON; Reddit's longest has 0.2 MB
MOST_NESTED = 64  # levels of lists and objects

# What code that expects another structure raises; KeyError is a LookupError.
UNEXPECTED = (
  ArithmeticError,
  AttributeError,
  LookupError,
  RecursionError,
  TypeError,
  ValueError,
)


# --- Errors ----------------------------------------------------------------

_NOT_UTF_8 = {
  codecs.BOM_UTF16_LE: 'UTF-16',
  codecs.BOM_UTF16_BE: 'UTF-16',
  b'\x1f\x8b': 'compressed by gzip',
  b'PK\x03\x04': 'a zip archive',
  b'BZh': 'compressed by bzip2',
  b'\xfd7zXZ': 'compressed by xz',
  b'\x28\xb5\x2f\xfd': 'compressed by zstd',
}


class Damaged(ValueError):
  """A file is not what it should be; the message has its path and a remedy."""


def short(content: object, most: int = 120) -> str:
  """Renders anything in one printable line of at most so many characters."""
  text = ' '.join(str(content).split())
  text = ''.join(c if c.isprintable() else '\ufffd' for c in text)
  return text if len(text) <= most else f'{text[: most - 3]}...'


def damaged(path: os.PathLike, why: object, remedy: str) -> Damaged:
  """Returns the error that says what is wrong with a file and what to do."""
  return Damaged(f'{path} is damaged ({short(why)}): {remedy}.')


def unsupported(path: os.PathLike | str, what: str, remedy: str) -> Damaged:
  """Returns the error for a valid file of a kind that this program cannot use."""
  return Damaged(f'{path} {what}, which is not supported: {remedy}.')


def check_supported(
  path: os.PathLike, name: str, value: object, choices: Collection[str]
) -> None:
  """Raises Damaged unless a field of a file has one of these values."""
  if value not in tuple(choices):
    what = f'has {name} {short(value)!r}'
    raise unsupported(path, what, f'use one of {", ".join(choices)}')


def unreadable(path: os.PathLike, error: Exception, remedy: str) -> OSError:
  """Returns the error for a file that the system does not let us read."""
  why = short(getattr(error, 'strerror', None) or error)
  return OSError(f'{path} cannot be read ({why}): change its permissions, or {remedy}.')


@contextlib.contextmanager
def parsing(path: os.PathLike, remedy: str) -> Iterator[None]:
  """Turns whatever a parser raises on a file's content into one Damaged."""
  try:
    yield
  except (Damaged, OSError, MemoryError):
    raise
  except KeyError as error:
    raise damaged(path, f'it lacks {error}', remedy) from error
  except Exception as error:  # tokenizers raises no narrower type
    raise damaged(path, error, remedy) from error


def out_of_memory(error: Exception) -> bool:
  """Tells whether memory was short, NumPy's, XLA's or a device's: no damage."""
  return isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)


# --- Reading ---------------------------------------------------------------


def read_bytes(path: pathlib.Path, remedy: str) -> bytes:
  """Reads a regular file of at most MOST_BYTES; raises OSError or ValueError."""
  if path.exists() and not path.is_file():
    raise Damaged(f'{path} is not a file: {remedy}.')
  try:
    with path.open('rb') as file:
      content = file.read(MOST_BYTES + 1)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{path} is missing: {remedy}.') from error
  except OSError as error:
    raise unreadable(path, error, remedy) from error
  if len(content) > MOST_BYTES:
    raise damaged(path, f'it has more than {MOST_BYTES} bytes', remedy)
  return content


def parse_json(content: bytes | str, path: pathlib.Path, remedy: str) -> dict:
  """Parses the JSON object that a file holds; `path` names it in errors."""
  return _object(_json(content, path, remedy), path, remedy)


def _json(content: bytes | str, path: pathlib.Path, remedy: str) -> Any:
  try:
    return json.loads(content.decode() if isinstance(content, bytes) else content)
  except (RecursionError, ValueError) as error:  # its JSON, depth or UTF-8
    raise Damaged(f'{path} is not valid JSON ({short(error)}): {remedy}.') from error


def _object(value: Any, path: pathlib.Path, remedy: str) -> dict:
  if not isinstance(value, dict) or _nested(value) > MOST_NESTED:
    kind = type(value).__name__
    raise damaged(path, f'{kind}, want an object, not nested deeply', remedy)
  return value


def read_json(path: pathlib.Path, remedy: str) -> dict:
  """Reads a file that holds one JSON object."""
  return parse_json(read_bytes(path, remedy), path, remedy)


def json_lines(path: pathlib.Path, remedy: str) -> Iterator[tuple[pathlib.Path, dict]]:
  """Yields ('FILE:LINE', object) of a file of JSON objects, one a line.

  Blank lines are skipped. Raises OSError or ValueError, which name the line.
  """
  for place, line in _lines(path, remedy):
    if line.strip():
      yield place, parse_json(line, place, remedy)


def json_rows(path: pathlib.Path, remedy: str) -> Iterator[tuple[pathlib.Path, dict]]:
  """Yields ('FILE, row NUMBER', object) of a JSON list of objects; or as `json_lines`."""
  lines = (line for _, line in _lines(path, remedy))
  if not next((line for line in lines if line.strip()), b'').lstrip().startswith(b'['):
    yield from json_lines(path, remedy)
    return
  content = _unmarked(read_bytes(path, f'{remedy}, or save it as JSON Lines'), path)
  for number, value in enumerate(_json(content, path, remedy), 1):
    place = pathlib.Path(f'{path}, row {number}')
    yield place, _object(value, place, remedy)


def csv_rows(path: pathlib.Path, remedy: str) -> Iterator[tuple[pathlib.Path, dict]]:
  """Yields ('FILE:LINE', {column: text}) of a CSV file; its first line names columns.

  An empty cell is None, and blank lines are skipped. Raises OSError or ValueError,
  which name the line.
  """
  csv.field_size_limit(MOST_LINE)
  lines, line = _lines(path, remedy), 1
  rows = csv.reader((line.decode() for _, line in lines), strict=True)
  header: list[str] = []
  try:
    for row in rows:
      place, line = pathlib.Path(f'{path}:{line}'), rows.line_num + 1
      if header and row and len(row) != len(header):
        why = f'{len(row)} cells, where line 1 names {len(header)} columns'
        raise damaged(place, why, 'put texts that have commas or line ends in quotes')
      if header and row:
        yield place, {name: x or None for name, x in zip(header, row, strict=True)}
      header = header or row
      if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise damaged(place, f'two columns {twice[0]!r}', 'rename one of them')
  except (csv.Error, UnicodeDecodeError) as error:
    why = f'not CSV in UTF-8: {error}'
    raise damaged(pathlib.Path(f'{path}:{line}'), why, remedy) from error


def _lines(path: pathlib.Path, remedy: str) -> Iterator[tuple[pathlib.Path, bytes]]:
  """Yields ('FILE:LINE', line) of a text file."""
  if not path.is_file():
    raise FileNotFoundError(f'{path} is not a file: {remedy}.')
  try:
    with path.open('rb') as file:
      for number in itertools.count(1):
        place = pathlib.Path(f'{path}:{number}')
        if not (line := file.readline(MOST_LINE + 1)):
          return
        if len(line) > MOST_LINE:
          raise damaged(place, f'more than {MOST_LINE} bytes', remedy)
        yield place, _unmarked(line, path) if number == 1 else line
  except OSError as error:
    raise unreadable(path, error, remedy) from error


def _unmarked(line: bytes, path: pathlib.Path) -> bytes:
  """Drops the mark that some editors begin UTF-8 with; raises on other encodings."""
  for start, what in _NOT_UTF_8.items():
    if line.startswith(start):
      raise Damaged(f'{path} is {what}: save it as UTF-8 text.')
  return line.removeprefix(codecs.BOM_UTF8)


def _nested(value: Any) -> int:
  """Returns how deep lists and objects are nested, or more than MOST_NESTED."""
  level, depth = [value], 0
  while level and depth <= MOST_NESTED:
    inner = []
    for x in level:
      if isinstance(x, (dict, list)):
        inner += x.values() if isinstance(x, dict) else x
    level, depth = [x for x in inner if isinstance(x, (dict, list))], depth + 1
  return depth


def read_rows(
  path: pathlib.Path, remedy: str = 'delete it, or run again'
) -> list[dict[str, Any]]:
  """Reads JSON objects, one a line, that we wrote; a last line torn by a crash is dropped.

  A file that is absent has none.
  """
  if not path.exists():
    return []
  *lines, last = path.read_bytes().split(b'\n')
  if last.endswith(b'}'):
    lines.append(last)
  return [
    parse_json(line, pathlib.Path(f'{path}:{number}'), remedy)
    for number, line in enumerate(lines, 1)
    if line
  ]


# --- Writing ---------------------------------------------------------------


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
  """Lets `write` fill a file of this name elsewhere, then moves it to `path`.

  The file has a temporary folder beside `path` to itself, so that programs that
  download into a folder can write it, and other processes may write it too.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='.writing_') as folder:
    temporary = pathlib.Path(folder) / path.name
    write(temporary)
    os.replace(temporary, path)


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a whole file in UTF-8, or none."""
  write_whole(path, lambda temporary: temporary.write_text(text, encoding='utf-8'))


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a whole file that holds one JSON value, or none."""
  write_text(path, json.dumps(content, indent=2) + '\n')


def write_json_lines(path: pathlib.Path, objects: Iterable[dict]) -> None:
  """Writes a whole file of JSON objects, one a line, or none."""
  lines = (json.dumps(x, ensure_ascii=False) + '\n' for x in objects)
  write_text(path, ''.join(lines))


# --- The cache folder ------------------------------------------------------


def cache_folder() -> pathlib.Path:
  """Returns $HETLORA_CACHE, or ~/.cache/hetlora_jax; makes it if it is absent."""
  place = os.environ.get('HETLORA_CACHE') or '~/.cache/hetlora_jax'
  folder = pathlib.Path(place).expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise OSError(
      f'the cache folder {folder} cannot be made ({error}): set HETLORA_CACHE to a '
      'folder that can be written, for models, data and compiled programs.'
    ) from error
  return folder


def digest(path: pathlib.Path) -> str:
  """Returns a file's SHA-256, hashing it again only if it has changed.

  A record in the cache folder keeps the size and the modification time that
  each digest was taken at.
  """
  try:
    path, stat = path.resolve(), path.stat()
    return _recorded_digest(path, stat)
  except FileNotFoundError:
    raise
  except (OSError, RuntimeError) as error:  # the latter of links in a circle
    raise unreadable(path, error, 'copy it again') from error


def digest_all(paths: Iterable[pathlib.Path]) -> str:
  """Returns the SHA-256 of the names and contents of files, in their order."""
  lines = [f'{path.name} {digest(path)}\n' for path in paths]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def _recorded_digest(path: pathlib.Path, stat: os.stat_result) -> str:
  stamp = {'path': str(path), 'size': stat.st_size, 'mtime_ns': stat.st_mtime_ns}
  name = hashlib.sha256(str(path).encode()).hexdigest()[:32]
  record = cache_folder() / 'digests' / f'{name}.json'
  with contextlib.suppress(OSError, ValueError):  # absent or damaged
    known = read_json(record, '')
    sha256 = str(known.pop('sha256', ''))
    if known == stamp and re.fullmatch('[0-9a-f]{64}', sha256):
      return sha256
  with path.open('rb') as file:
    sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
  with contextlib.suppress(OSError):  # without a record it is hashed again
    write_json(record, stamp | {'sha256': sha256})
  return sha256


def check_digest(path: pathlib.Path, sha256: str) -> None:
  """Raises Damaged unless the file has this SHA-256."""
  found = digest(path)
  if found != sha256:
    raise Damaged(
      f'{path} is corrupted (SHA-256 {found[:12]}..., want {short(sha256[:12])}...): '
      'delete it and load again.'
    )
