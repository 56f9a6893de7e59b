"""What tests ask of a compiled program's collectives, beyond their bytes."""

import re
from typing import NamedTuple

from hetlora_jax.tools import hlo

# The groups of a mesh name its axes after the devices' order.
_GROUPS = re.compile(r'replica_groups=(.*?)(?:, (?!device_ids)[a-z_]+=|$)')


class Collective(NamedTuple):
  """One collective instruction."""

  kind: str  # of hlo.KINDS
  shape: tuple[tuple[int, ...], ...]  # of the results on a device
  bytes: int  # of these, once
  times: int  # how often a call of the program executes it
  groups: str  # the devices that take part, as XLA writes them
  name: str  # where in the source it comes from, if XLA knows


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a program, `compiled.as_text()`."""
  found = []
  for one, times in hlo.collectives(text).items():
    arrays = hlo.ARRAY.findall(hlo.results(one))
    groups = _GROUPS.search(one.rest)
    name = re.search(r'op_name="([^"]*)"', one.rest)
    found.append(
      Collective(
        one.kind.removesuffix('-start'),
        tuple(tuple(int(n) for n in dims.split(',') if n) for _, dims in arrays),
        hlo.size(one),
        times,
        groups[1] if groups else '',
        name[1] if name else one.name,
      )
    )
  return found
