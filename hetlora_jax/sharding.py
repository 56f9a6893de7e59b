"""The device mesh (sweep, clients, model) and where each pytree lives on it.

Points of a sweep are spread over `sweep` and never talk to each other; clients
of a round over `clients`; the base is split over `model`; a server's state is
everywhere within its point. XLA inserts all collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hetlora_jax.types import PyTree

AXES = ('sweep', 'clients', 'model')

# Which axis of a base parameter is split over `model`: words, heads or hidden
# units. Stacked layers come first in all but the embeddings. Keys and values
# have few heads, which seldom divide, and few parameters: whole everywhere.
_BASE_RULES = {
  'embed': PartitionSpec('model', None),
  'head': PartitionSpec('model', None),
  **dict.fromkeys(('q', 'gate', 'up'), PartitionSpec(None, None, 'model')),
  **dict.fromkeys(('o', 'down'), PartitionSpec(None, 'model', None)),
}  # fmt: skip


def make_mesh(
  sweep: int = 1,
  clients: int = 1,
  model: int = 1,
  devices: Sequence | None = None,
) -> Mesh:
  """Lays the devices out, a process's beside each other.

  Raises:
    ValueError: there are too few devices; several processes leave one out, or
      the devices of a process are no block of the mesh.
  """
  sizes = (sweep, clients, model)
  found = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
  needed, processes = math.prod(sizes), found[-1].process_index + 1
  asked = ' x '.join(
    f'config.mesh.{axis}={size}' for axis, size in zip(AXES, sizes, strict=True)
  )
  if needed > len(found):
    raise ValueError(
      f'{asked} needs {needed} devices, and there are {len(found)}: lower one.'
    )
  if processes > 1 and needed < len(found):
    raise ValueError(
      f'{asked} uses {needed} of {len(found)} devices: {processes} processes '
      'take part only with all of theirs; raise one.'
    )
  grid = np.asarray(found[:needed]).reshape(sizes)
  for process in range(processes):
    place = np.argwhere(
      [[[d.process_index == process for d in y] for y in x] for x in grid]
    )
    box = np.ptp(place, axis=0) + 1
    if math.prod(box) != len(place):
      raise ValueError(
        f'{asked} gives process {process} devices that are no block of the '
        'mesh: make config.mesh.model times a part of config.mesh.clients the '
        'number of devices of a process, or the other way round.'
      )
  if 1 not in sizes and jax.config.jax_use_shardy_partitioner:
    # That partitioner of jax 0.12 aborts where all three axes divide.
    raise ValueError(
      f"{asked} divides all three axes, which needs XLA's older partitioner: call "
      "jax.config.update('jax_use_shardy_partitioner', False) first, as launchers do."
    )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
  """Everywhere whole: what a call reports, and evaluation sets."""
  return NamedSharding(mesh, PartitionSpec())


def over_points(mesh: Mesh) -> NamedSharding:
  """[K, ...], K over `sweep`: hyper-parameters."""
  return NamedSharding(mesh, PartitionSpec('sweep'))


def over_clients(mesh: Mesh) -> NamedSharding:
  """[rounds, K, C, ...], K over `sweep` and C over `clients`: cohorts."""
  return NamedSharding(mesh, PartitionSpec(None, 'sweep', 'clients'))


def over_people(mesh: Mesh) -> NamedSharding:
  """[E, ...], E over `clients`: evaluation sets."""
  return NamedSharding(mesh, PartitionSpec('clients'))


def by_name(mesh: Mesh, tree: PyTree, points: bool = False) -> PyTree:
  """Returns where each leaf lives: as the base parameter whose name it has.

  So do changes of the base, and their moments. Everything else, and a
  parameter whose axis `model` does not divide, is whole everywhere.

  Args:
    mesh: the devices.
    tree: arrays or their shapes.
    points: whether every leaf has a leading axis of points.
  """
  lead = ('sweep',) if points else ()

  def place(path, leaf):
    name = str(getattr(path[-1], 'key', '')) if path else ''
    spec, shape = _BASE_RULES.get(name, ()), leaf.shape[len(lead) :]
    sizes = [mesh.shape[a] if a else 1 for a in spec]
    if len(spec) > len(shape) or any(n % k for n, k in zip(shape, sizes, strict=False)):
      spec = ()
    return NamedSharding(mesh, PartitionSpec(*lead, *spec))

  return jax.tree.map_with_path(place, tree)


def place(tree: PyTree, where: PyTree) -> PyTree:
  """Puts host arrays, the same in every process, where they live.

  Of shapes (`jax.ShapeDtypeStruct`) it returns shapes that say where they would be.
  """
  if isinstance(where, NamedSharding):
    where = jax.tree.map(lambda _: where, tree)

  def put(leaf, sharding):
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda i: leaf[i])

  return jax.tree.map(put, tree, where)


def own_part(sharding: NamedSharding, shape: Sequence[int]) -> tuple:
  """Returns the block of an array that this process's devices hold: slices."""
  parts = sharding.addressable_devices_indices_map(tuple(shape)).values()
  starts_stops = [
    [s.indices(n)[:2] for s, n in zip(part, shape, strict=True)] for part in parts
  ]
  low, high = np.min(starts_stops, axis=0)[:, 0], np.max(starts_stops, axis=0)
  return tuple(slice(int(a), int(b)) for a, b in zip(low, high[:, 1], strict=True))


def place_own(tree: PyTree, sharding: NamedSharding, shape: Sequence[int]):
  """Puts the own parts of arrays whose first axes are `shape` in place."""

  def put(leaf):
    whole = (*shape, *leaf.shape[len(shape) :])
    return jax.make_array_from_process_local_data(sharding, leaf, whole)

  return jax.tree.map(put, tree)


def chunks(clients: int, at_once: int | None, devices: int) -> tuple[int, int]:
  """Divides clients into chunks that all devices work on.

  Args:
    clients: of a round, or an evaluation.
    at_once: how many a device trains at a time; None: all of its own.
    devices: along `clients`.

  Returns:
    The clients of a chunk, and of all chunks: as many as there are, and
    padding.
  """
  each = -(-clients // devices)
  count = -(-each // (at_once or each))
  chunk = -(-each // count) * devices
  return chunk, chunk * count
