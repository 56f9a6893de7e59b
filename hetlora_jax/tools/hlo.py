"""What a compiled program says of itself: its collectives, and their bytes."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip
_BITS = {'pred': 8, 'bf16': 16, 'f16': 16, 'c64': 64, 'c128': 128}
# `%name = shape kind(operands), attributes`; a shape may be a tuple of shapes.
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>\(.*?\)(?= [a-z])|\S+) '
  r'(?P<kind>[\w-]+)\((?P<rest>.*)$'
)
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]')
# `(operands, results, ...)`, of a shape without layouts.
_ITEM = r'(?:\([^()]*\)|\w+\[[\d,]*\])'
_STARTED = re.compile(rf'\({_ITEM}, ({_ITEM})')
_CHAIN = re.compile(r'channel_id=(\d+),.*\bchain_id="(\d+)"')
# The groups of a mesh name its axes after the devices' order.
_GROUPS = re.compile(r'replica_groups=(.*?)(?:, (?!device_ids)[a-z_]+=|$)')
_CALLED = re.compile(
  r'(?:body|condition|calls|to_apply|true_computation|false_computation)='
  r'%?([\w.-]+)|branch_computations=\{([^}]*)\}'
)


class Collective(NamedTuple):
  """One collective instruction."""

  kind: str  # one of those above
  shape: tuple[tuple[int, ...], ...]  # results on a device
  bytes: int  # of these, once
  times: int  # how often a call of the program executes it
  groups: str  # who takes part, as XLA writes it
  name: str  # where in the source it comes from, if XLA knows


def _arrays(shape: str) -> Iterator[tuple[tuple[int, ...], int]]:
  """Yields the dimensions and bytes of the arrays in a shape."""
  for kind, dims in _ARRAY.findall(shape):
    bits = _BITS.get(kind) or int((re.search(r'\d+', kind) or ['8'])[0])
    sizes = tuple(int(n) for n in dims.split(',') if n)
    yield sizes, math.prod(sizes) * bits // 8


def _computations(text: str) -> tuple[dict[str, list[re.Match]], str]:
  """Splits a module into computations; returns them and the entry's name."""
  found: dict[str, list[re.Match]] = {}
  entry = current = ''
  for line in text.splitlines():
    head = re.match(r'^(ENTRY )?%?([\w.-]+) .*\{\s*$', line)
    if head and not line.startswith(('HloModule', ' ')):
      current = head[2]
      found[current] = []
      entry = current if head[1] else entry
    elif match := _INSTRUCTION.match(line):
      found[current].append(match)
  return found, entry


def _trips(loop: str, found: dict[str, list[re.Match]]) -> int:
  """Returns how often a loop runs: as XLA says, or the limit it compares with.

  The loops of a scan count up from 0. Where neither is to be seen it is 1, as
  for a limit below: such a loop counts down.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
  if known:
    return int(known[1])
  condition = re.search(r'condition=%?([\w.-]+)', loop)
  limits = [
    int(match['rest'].partition(')')[0])
    for match in found.get(condition[1] if condition else '', ())
    if match['kind'] == 'constant' and match['shape'].startswith('s32[]')
  ]
  return max(limits[0], 1) if len(limits) == 1 else 1


def _executions(found: dict[str, list[re.Match]], entry: str) -> dict[str, int]:
  """Counts how often each computation runs in a call of the program."""
  times: dict[str, int] = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for match in found.get(name, ()):
      rest = match['rest']
      if match['kind'].endswith(('-update', '-done')):
        continue  # may name what its start has called
      trips = _trips(rest, found) if match['kind'] == 'while' else 1
      for one, several in _CALLED.findall(rest):
        for called in re.findall(r'[\w.-]+', one or several):
          visit(called, count * trips)

  visit(entry, 1)
  return times


def collectives(text: str) -> list[Collective]:
  """Lists the collectives of an optimised, partitioned program.

  Of an asynchronous pair the start counts, with its results only. A TPU may do
  one in steps between the turns of a later loop; they have one chain and are
  one. Channels do not tell: all of a `shard_map` have the same. Of a
  conditional every branch counts.

  Args:
    text: `compiled.as_text()`.
  """
  found, entry = _computations(text)
  times = _executions(found, entry)
  out: dict[str | tuple[str, ...], Collective] = {}
  for computation, matches in found.items():
    for match in matches:
      kind = match['kind'].removesuffix('-start')
      if kind in _KINDS and times[computation]:
        one = _collective(kind, match, times[computation])
        chain = _CHAIN.search(match['rest'])
        key = chain.groups() if chain else match['name']
        out[key] = min(one, out.get(key, one), key=lambda x: x.times)
  return list(out.values())


def _collective(kind: str, match: re.Match, times: int) -> Collective:
  """Reads one: of a start the results, which for an all-reduce are all of it."""
  shape = match['shape']
  if match['kind'].endswith('-start'):
    plain = re.sub(r'\{.*?\}|/\*.*?\*/', '', shape)
    started = _STARTED.match(plain)
    if started and (kind != 'all-reduce' or plain.startswith('((')):
      shape = started[1]
  arrays = list(_arrays(shape))
  groups = _GROUPS.search(match['rest'])
  name = re.search(r'op_name="([^"]*)"', match['rest'])
  return Collective(
    kind,
    tuple(dims for dims, _ in arrays),
    sum(size for _, size in arrays),
    times,
    groups[1] if groups else '',
    name[1] if name else match['name'],
  )


def moved(found: list[Collective]) -> dict[str, int]:
  """Adds up the bytes of each kind that a device gets in a call."""
  total: dict[str, int] = collections.Counter()
  for x in found:
    total[x.kind] += x.bytes * x.times
  return dict(total)
