"""Reads files that may be damaged or hostile: what is wrong is said in one line.

Nothing here, nor what uses it, executes what it reads.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterator
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


def short(content: object, most: int = 120) -> str:
  """Renders anything in one printable line of at most so many characters."""
  text = ' '.join(str(content).split())
  text = ''.join(c if c.isprintable() else '\ufffd' for c in text)
  return text if len(text) <= most else f'{text[: most - 3]}...'


class Damaged(ValueError):
  """A file is not what it should be; the message has its path and a remedy."""


def out_of_memory(error: Exception) -> bool:
  """Tells whether memory was short, NumPy's, XLA's or a device's: no damage."""
  return isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)


def damaged(path: os.PathLike, why: object, remedy: str) -> Damaged:
  """Returns the error that says what is wrong with a file and what to do."""
  return Damaged(f'{path} is damaged ({short(why)}): {remedy}.')


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
    raise OSError(
      f'{path} cannot be read ({error.strerror}): change its permissions, or {remedy}.'
    ) from error
  if len(content) > MOST_BYTES:
    raise damaged(path, f'it has more than {MOST_BYTES} bytes', remedy)
  return content


def parse_json(content: bytes | str, path: pathlib.Path, remedy: str) -> dict:
  """Parses the JSON object that a file holds; `path` names it in errors."""
  try:
    if isinstance(content, bytes):
      content = content.decode()
    value = json.loads(content)
  except (RecursionError, ValueError) as error:  # its JSON, depth or UTF-8
    raise Damaged(f'{path} is not valid JSON ({short(error)}): {remedy}.') from error
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
        if line.strip():
          yield place, parse_json(line, place, remedy)
  except OSError as error:
    raise OSError(
      f'{path} cannot be read ({error.strerror}): change its permissions, or {remedy}.'
    ) from error


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


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Reads JSON objects, one a line, that we wrote; a torn line ends them.

  A file that is absent has none.
  """
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes a whole file or none."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(json.dumps(content, indent=2) + '\n')
  os.replace(temporary, path)
