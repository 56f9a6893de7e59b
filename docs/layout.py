"""Draws docs/layout.png from the shardings themselves: python -m docs.layout."""

import pathlib

import jax
import matplotlib.figure
import matplotlib.patches
import numpy as np

from hetlora_jax import sharding

SIZES = {'sweep': 2, 'clients': 4, 'model': 2}
PATH = pathlib.Path(__file__).with_suffix('.png')


def panels(mesh):
  """Yields what an array is, its shape and where it lives."""
  named = lambda name, shape, points=False: jax.tree.leaves(  # noqa: E731
    sharding.by_name(mesh, {name: np.empty(shape)}, points)
  )[0]
  yield 'base: embedding, q, o, MLP\n[.., D]', (8, 8), named('embed', (8, 8))
  yield 'base: k, v, norms\n[L, ..]', (3, 8, 8), named('k', (3, 8, 8))
  yield (
    "server's adapters, moments,\nranks of people  [K, ..]",
    (4, 3, 8, 5), named('a', (4, 3, 8, 5), True),
  )  # fmt: skip
  yield (
    'change of the base\n[K, .., D] (full, FLoRA, ..)',
    (4, 8, 8), named('embed', (4, 8, 8), True),
  )  # fmt: skip
  yield (
    'cohorts; adapters and moments\nin training  [rounds, K, C, ..]',
    (2, 4, 8), sharding.over_clients(mesh),
  )  # fmt: skip
  yield 'hyper-parameters  [K]', (4,), sharding.over_points(mesh)
  yield 'evaluation sets  [E, ..]', (8,), sharding.over_people(mesh)
  yield 'metrics of a call\n[rounds, K, ..]', (2, 4), sharding.replicated(mesh)


def draw(axis, title, shape, where) -> None:
  """Colours the devices of the mesh by the part of an array they hold."""
  held = {d: str(i) for d, i in where.devices_indices_map(shape).items()}
  devices = where.mesh.devices
  parts = list(dict.fromkeys(held[d] for d in devices.ravel()))
  rows = devices.reshape(-1, SIZES['model'])
  for y, row in enumerate(rows):
    for x, device in enumerate(row):
      part = parts.index(held[device])
      gap = 0.5 * (y // SIZES['clients'])
      color = matplotlib.colormaps['tab20'](part % 20)
      axis.add_patch(
        matplotlib.patches.Rectangle((x, y + gap), 0.94, 0.94, color=color)
      )
      axis.text(x + 0.47, y + gap + 0.5, part, ha='center', va='center')
  axis.set(
    xlim=(-0.1, SIZES['model'] + 0.1), ylim=(len(rows) + 0.6, -0.1),
    xticks=[], yticks=[], aspect='equal',
  )  # fmt: skip
  axis.set_title(title, fontsize=8)
  for side in axis.spines.values():
    side.set_visible(False)


def main() -> None:
  jax.config.update('jax_num_cpu_devices', 16)
  mesh = sharding.make_mesh(**SIZES)
  found = list(panels(mesh))
  figure = matplotlib.figure.Figure((14, 5.2), layout='constrained')
  figure.suptitle(
    'Which part of each array a device holds: 2 sweep (blocks) x 4 clients '
    '(rows) x 2 model (columns) = 16 devices'
  )
  for axis, panel in zip(figure.subplots(1, len(found)), found, strict=True):
    draw(axis, *panel)
  figure.savefig(PATH, dpi=100)


if __name__ == '__main__':
  main()
