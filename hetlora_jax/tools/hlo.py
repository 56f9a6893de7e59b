"""The bytes that the collectives of a compiled program bring to a device.

Read from the text of the optimized, partitioned program, `compiled.as_text()`:
XLA has no other interface to it.
"""

from __future__ import annotations

import collections
import math
import re
from typing import NamedTuple

KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
  'collective-permute',
)  # fmt: skip
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) [^\n]*\{\s*?\n(.*?)^\}', re.M | re.S)
# `%name = shape kind(operands), attributes`; a shape may be a tuple of shapes.
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)(?= [a-z])|\S+) ([\w-]+)\((.*)$', re.M
)
# An array's bits an entry (none for pred, which has 8) and dimensions.
ARRAY = re.compile(r'\b[a-z]+(\d*)\w*\[([\d,]*)\]')
# `(operands, results, ...)`, of a shape without layouts.
_ITEM = r'(?:\([^()]*\)|\w+\[[\d,]*\])'
_STARTED = re.compile(rf'\({_ITEM}, ({_ITEM})')
_CHAIN = re.compile(r'channel_id=(\d+),.*\bchain_id="(\d+)"')
_CALLED = re.compile(
  r'(?:body|condition|calls|to_apply|true_computation|false_computation)='
  r'%?([\w.-]+)|branch_computations=\{([^}]*)\}'
)


class Instruction(NamedTuple):
  """One line of a program, cut into its parts."""

  name: str
  shape: str
  kind: str
  rest: str  # operands and attributes


def moved(text: str) -> dict[str, int]:
  """Returns the bytes that a device receives in a call, by kind of collective."""
  total: dict[str, int] = collections.Counter()
  for one, times in collectives(text).items():
    total[one.kind.removesuffix('-start')] += times * size(one)
  return dict(total)


def collectives(text: str) -> dict[Instruction, int]:
  """Returns the collectives of a program, and how often a call executes each.

  Of an asynchronous pair the start stands for both. A TPU may split a collective
  into steps between the turns of a later loop; these share a chain and count as
  the one that runs least. (A channel does not tell: all collectives of a
  `shard_map` share one.) Of a conditional every branch counts.
  """
  found = {}
  for one, times in _executions(text).items():
    if one.kind.removesuffix('-start') in KINDS:
      chain = _CHAIN.search(one.rest)
      key = chain.groups() if chain else one.name
      found[key] = min(found.get(key, (one, times)), (one, times), key=lambda x: x[1])
  return dict(found.values())


def size(one: Instruction) -> int:
  """Returns the bytes of a collective's results on a device."""
  return sum(
    math.prod(int(n) for n in dims.split(',') if n) * int(bits or 8) // 8
    for bits, dims in ARRAY.findall(results(one))
  )


def results(one: Instruction) -> str:
  """Returns the shape of a collective's results: of a start, not its operands."""
  plain = re.sub(r'\{.*?\}|/\*.*?\*/', '', one.shape)
  started = one.kind.endswith('-start') and _STARTED.match(plain)
  # The start of a plain all-reduce has no operands in its shape.
  if started and (one.kind != 'all-reduce-start' or plain.startswith('((')):
    return started[1]
  return one.shape


def _executions(text: str) -> dict[Instruction, int]:
  """Counts how often a call of the program executes each instruction."""
  computations, entry = {}, ''
  for is_entry, name, body in _COMPUTATION.findall(text):
    computations[name] = [Instruction(*x) for x in _INSTRUCTION.findall(body)]
    entry = name if is_entry else entry
  times: dict[Instruction, int] = collections.Counter()

  def visit(computation: str, count: int) -> None:
    for one in computations.get(computation, ()):
      times[one] += count
      if one.kind.endswith(('-update', '-done')):
        continue  # these may name again what their start calls
      trips = _trips(one.rest, computations) if one.kind == 'while' else 1
      for single, several in _CALLED.findall(one.rest):
        for called in re.findall(r'[\w.-]+', single or several):
          visit(called, count * trips)

  visit(entry, 1)
  return times


def _trips(loop: str, computations: dict[str, list[Instruction]]) -> int:
  """Returns how often a loop runs: as XLA says, or the limit it compares with.

  The loops of a scan count up from 0. Where neither is to be seen it is 1, as
  for a limit below 1: such a loop counts down.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
    return int(known[1])
  condition = re.search(r'condition=%?([\w.-]+)', loop)
  limits = [
    int(one.rest.partition(')')[0])
    for one in computations.get(condition[1] if condition else '', ())
    if one.kind == 'constant' and one.shape.startswith('s32[]')
  ]
  return max(limits[0], 1) if len(limits) == 1 else 1
