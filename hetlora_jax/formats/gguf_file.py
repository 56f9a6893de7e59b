"""The layout of a GGUF file: metadata and where its tensors are.

Every count, length and offset is compared with the file's size before it is
used, which the `gguf` package's reader does not do.
"""

import pathlib
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np

VERSIONS = (2, 3)
MOST_DIMS = 4
MOST_STRINGS = 1 << 24  # of an array; Gemma has 2**18 words
_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
_SCALARS = {
  gguf.GGUFValueType.UINT8: '<u1',
  gguf.GGUFValueType.INT8: '<i1',
  gguf.GGUFValueType.UINT16: '<u2',
  gguf.GGUFValueType.INT16: '<i2',
  gguf.GGUFValueType.UINT32: '<u4',
  gguf.GGUFValueType.INT32: '<i4',
  gguf.GGUFValueType.UINT64: '<u8',
  gguf.GGUFValueType.INT64: '<i8',
  gguf.GGUFValueType.FLOAT32: '<f4',
  gguf.GGUFValueType.FLOAT64: '<f8',
  gguf.GGUFValueType.BOOL: '?',
}


class Tensor(NamedTuple):
  """A tensor as stored: its bytes, [..., bytes of a row]."""

  kind: gguf.GGMLQuantizationType
  data: np.ndarray


class File(NamedTuple):
  metadata: dict[str, Any]
  tensors: dict[str, Tensor]


class _Place(NamedTuple):
  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # in bytes, rows last
  offset: int  # from where the tensors start


class _Cursor:
  """Reads a file from its start; raises ValueError where it ends too early."""

  def __init__(self, data: np.ndarray):
    self.data, self.at = data, 0

  def take(self, count: int, what: str) -> np.ndarray:
    """Returns the next so many bytes."""
    left = len(self.data) - self.at
    if count > left:
      raise ValueError(f'{what} at byte {self.at} needs {count} of {left} left')
    self.at += count
    return self.data[self.at - count : self.at]

  def number(self, what: str, code: str = '<Q') -> int:
    taken = self.take(struct.calcsize(code), what)
    return struct.unpack(code, taken.tobytes())[0]

  def string(self, what: str) -> str:
    length = self.number(what)
    text = self.take(length, what).tobytes()
    try:
      return text.decode()
    except UnicodeDecodeError as error:
      raise ValueError(f'{what} is no UTF-8: {error}') from error


def read(path: pathlib.Path) -> File:
  """Reads a file's layout; tensors stay on disk until they are used.

  Raises:
    ValueError: the file is not what its header says, or no GGUF.
  """
  if not path.stat().st_size:
    raise ValueError('it is empty')
  cursor = _Cursor(np.memmap(path, mode='r').view(np.ndarray))
  if cursor.take(4, 'magic').tobytes() != b'GGUF':
    raise ValueError('it does not start with GGUF')
  version = cursor.number('version', '<I')
  if version not in VERSIONS:
    raise ValueError(f'version {version} is none of {VERSIONS}')
  num_tensors, num_fields = cursor.number('count'), cursor.number('count')
  metadata = _metadata(cursor, num_fields)
  places = _places(cursor, num_tensors)
  alignment = metadata.get('general.alignment', gguf.GGUF_DEFAULT_ALIGNMENT)
  if type(alignment) is not int or alignment not in (8, 16, 32, 64, 128, 256):
    raise ValueError(f'alignment {alignment}')
  start = -(-cursor.at // alignment) * alignment
  return File(metadata, _tensors(cursor.data[start:], places, alignment))


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
  metadata = {}
  for _ in range(count):  # ends at the end of the file, whatever the count
    key = cursor.string('key')
    if key in metadata:
      raise ValueError(f'metadata {key!r} is there twice')
    kind = gguf.GGUFValueType(cursor.number('type', '<I'))
    metadata[key] = _value(cursor, kind, f'metadata {key!r}')
  return metadata


def _value(cursor: _Cursor, kind: gguf.GGUFValueType, what: str) -> Any:
  if kind == _STRING:
    return cursor.string(what)
  if kind != _ARRAY:
    return _numbers(cursor, kind, 1, what)[0]
  kind = gguf.GGUFValueType(cursor.number(what, '<I'))
  count = cursor.number(what)
  if kind == _ARRAY:
    raise ValueError(f'{what} is an array of arrays')
  if kind != _STRING:
    return _numbers(cursor, kind, count, what)
  if count > MOST_STRINGS:
    raise ValueError(f'{what} has {count} strings')
  return [cursor.string(what) for _ in range(count)]


def _numbers(cursor: _Cursor, kind: gguf.GGUFValueType, count: int, what: str) -> list:
  dtype = np.dtype(_SCALARS[kind])
  taken = cursor.take(count * dtype.itemsize, what)
  return np.frombuffer(taken.tobytes(), dtype).tolist()


def _places(cursor: _Cursor, count: int) -> dict[str, _Place]:
  places = {}
  for _ in range(count):
    name = cursor.string('name of a tensor')
    if name in places:
      raise ValueError(f'tensor {name} is there twice')
    num_dims = cursor.number(name, '<I')
    if not 1 <= num_dims <= MOST_DIMS:
      raise ValueError(f'tensor {name} has {num_dims} axes')
    dims = [cursor.number(name) for _ in range(num_dims)]
    kind = gguf.GGMLQuantizationType(cursor.number(name, '<I'))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if dims[0] % block or not all(dims):
      raise ValueError(f'tensor {name} has shape {dims}, in blocks of {block}')
    shape = (*reversed(dims[1:]), dims[0] // block * size)
    places[name] = _Place(kind, shape, cursor.number(name))
  return places


def _tensors(
  data: np.ndarray, places: dict[str, _Place], alignment: int
) -> dict[str, Tensor]:
  tensors, total = {}, 0
  for name, (kind, shape, offset) in places.items():
    size = 1
    for dim in shape:
      size *= dim
    total += size
    # Tensors that overlapped could ask for more memory than the file has.
    if offset % alignment or offset + size > len(data) or total > len(data):
      raise ValueError(f'tensor {name} needs {size} bytes from {offset} of {len(data)}')
    tensors[name] = Tensor(kind, data[offset : offset + size].reshape(shape))
  return tensors
