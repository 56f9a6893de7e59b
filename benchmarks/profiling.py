"""Which operations of a compiled program take the time."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator

import jax

from benchmarks import machine

_LOOP = re.compile(r'(while|call|conditional)\b')


def _spans(data) -> Iterator[tuple[str, float]]:
  """Yields (HLO operation or kernel, nanoseconds) of what ran on devices.

  On a GPU these are the kernels of its streams; on a CPU all that is named as
  an operation of the program, whichever thread ran it.
  """
  for plane in data.planes:
    on_gpu = plane.name.startswith('/device:GPU')
    for line in plane.lines:
      if on_gpu and not line.name.startswith('Stream'):
        continue
      for event in line.events:
        operation = dict(event.stats).get('hlo_op', '') if on_gpu else event.name
        kernel = event.name if on_gpu else ''
        yield f'{operation}|{kernel}', event.duration_ns


def top(program, run: Callable[[], object], count: int) -> list[dict]:
  """Returns the operations that take the most time in one call.

  Args:
    program: compiled; its text says what operations compute.
    run: calls it.
    count: of operations.

  Returns:
    For each its name, milliseconds summed over all threads or streams, share of
    the whole, shape, and where it comes from. Products that run at the same time
    each count their whole time.
  """
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(run())
    path = next(pathlib.Path(folder).rglob('*.xplane.pb'))
    data = jax.profiler.ProfileData.from_file(str(path))
    spent: collections.Counter = collections.Counter()
    for name, nanoseconds in _spans(data):
      spent[name] += nanoseconds
  known = operations(program.as_text())
  by_kernel = {re.sub(r'[.-]', '_', name): name for name in known}
  rows = []
  for key, nanoseconds in spent.most_common():
    operation, _, kernel = key.partition('|')
    # In a command buffer all operations are called as it is; but most kernels
    # have their operation's name.
    operation = by_kernel.get(kernel, operation)
    if not kernel and (operation not in known or _LOOP.match(operation)):
      continue  # of the host; or what holds others, which count already
    shape, source = known.get(operation, ('', ''))
    rows.append({
      'operation': operation, 'kernel': kernel, 'ms': nanoseconds / 1e6,
      'shape': shape, 'source': source,
    })  # fmt: skip
  whole = sum(row['ms'] for row in rows)
  return [row | {'share': row['ms'] / whole} for row in rows[:count]]


def operations(text: str) -> dict[str, tuple[str, str]]:
  """Returns operation -> its shape and source, read from a program's text."""
  found = re.findall(
    r'^ *(?:ROOT )?%?([\w.-]+) = (\(?[\w\[\],{}]+)[^\n]*?op_name="([^"]*)"',
    text, re.MULTILINE,
  )  # fmt: skip
  return {
    name: (shape.partition('{')[0], _short(source)) for name, shape, source in found
  }


def _short(source: str) -> str:
  """Leaves out the loops and calls that everything is in."""
  inside = r'(while|body|closed_call|checkpoint|eval_jaxpr|v?map\(\)|jit\(\w*\))/'
  return re.sub(inside, '', source)[-70:]


def table(rows: list[dict]) -> str:
  """Returns the rows as a Markdown table."""
  code = lambda text: f'`{text}`' if text else ''  # noqa: E731
  cells = [
    [code(_short(row['source']) or row['operation']), code(row['kernel'][:40]),
     code(row['shape']), f'{row["ms"]:.2f}', f'{row["share"]:.1%}']
    for row in rows
  ]  # fmt: skip
  return machine.table('where | kernel | shape | ms | share', cells)


def told(rows: list[dict]) -> str:
  """Returns the rows for a terminal."""
  return '\n'.join(
    f'{row["ms"]:>9.2f} ms {row["share"]:>6.1%}  {row["shape"]:<28} '
    f'{row["source"] or row["operation"]} {row["kernel"][:50]}'
    for row in rows
  )
