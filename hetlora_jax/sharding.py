"""The device mesh (clients, model) and where each pytree lives on it.

Clients of a round are spread over `clients`; the base is split over `model`;
the server's state is everywhere. XLA inserts all collectives.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hetlora_jax.types import PyTree

# Which axis of a base parameter is split over `model`. Stacked layers come
# first in all but the embeddings.
_BASE_RULES = {
  'embed': PartitionSpec('model', None),
  'head': PartitionSpec('model', None),
  **dict.fromkeys(('q', 'k', 'v', 'gate', 'up'), PartitionSpec(None, None, 'model')),
  **dict.fromkeys(('o', 'down'), PartitionSpec(None, 'model', None)),
}  # fmt: skip


def make_mesh(clients: int, model: int) -> Mesh:
  """Lays the devices out; raises if there are too few of them."""
  available = jax.device_count()
  if clients * model > available:
    raise ValueError(
      f'config.mesh.clients={clients} x config.mesh.model={model} needs '
      f'{clients * model} devices, and there are {available}: lower one.'
    )
  devices = np.asarray(jax.devices()[: clients * model])
  return Mesh(
    devices.reshape(clients, model),
    ('clients', 'model'),
    axis_types=(AxisType.Auto,) * 2,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Everywhere whole: the server's state and the hyper-parameters."""
  return NamedSharding(mesh, PartitionSpec())


def over_clients(mesh: Mesh) -> NamedSharding:
  """The leading axis over `clients`: cohorts."""
  return NamedSharding(mesh, PartitionSpec('clients'))


def by_name(mesh: Mesh, tree: PyTree) -> PyTree:
  """Returns where each leaf lives: as the base parameter whose name it has.

  So do changes of the base, and their moments. Everything else, and a
  parameter whose axis `model` does not divide, is whole everywhere.
  """

  def place(path, leaf):
    name = str(getattr(path[-1], 'key', ''))
    spec = _BASE_RULES.get(name, PartitionSpec())
    sizes = [mesh.shape[a] if a else 1 for a in spec]
    if len(spec) > leaf.ndim or any(
      n % k for n, k in zip(leaf.shape, sizes, strict=False)
    ):
      spec = PartitionSpec()
    return NamedSharding(mesh, spec)

  return jax.tree.map_with_path(place, tree)
