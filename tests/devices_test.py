"""The same rounds on one device and on eight, on every mesh."""

import functools
import re

import jax
import numpy as np
import pytest
from experiment_test import small_config
from hlo import collectives

from hetlora_jax import config, points, rows, sharding

METHODS = ('hetlora', 'flexlora', 'flora', 'full_finetuning')
MESHES = ((1, 2, 1), (1, 8, 1), (1, 4, 2), (1, 2, 4))


def many_rounds(method, mesh=(1, 1, 1), **overrides):
  """Returns a small run of three rounds a call on a mesh.

  The method may have a pruning of its own, as in 'flexlora+norm_tail'.
  """
  sweep, clients, model = mesh
  method, _, pruning = method.partition('+')
  fields = {
    'methods__pruning': pruning or None,
    'federated__num_rounds': 3, 'federated__rounds_per_call': 3,
    'federated__clients_per_round': 6, 'eval__every': 3, 'checkpoint__every': 3,
    # SGD: Adam turns rounding into signs.
    'client_optimizer__name': 'sgd', 'client_optimizer__learning_rate': 0.05,
    'client_optimizer__full_learning_rate': 0.05, 'mesh__sweep': sweep,
    'mesh__clients': clients, 'mesh__model': model,
  }  # fmt: skip
  return small_config(method=method, **(fields | overrides))


def after_a_call(*configs):
  """Returns the state, metrics and losses after one call, in numpy."""
  x = points.prepare(*configs)
  cohorts = points.make_cohorts(x, 0)
  state, out = points.call(x, x.initial_state, cohorts)
  found = points.evaluate(x, state)
  losses = [rows.evaluation_row(of_point) for of_point in found]
  return jax.device_get((state, out)), losses


@functools.cache
def _alone(method):
  return after_a_call(many_rounds(method))


def assert_agree(got, want):
  """Adapters to 1e-5, ranks exactly."""
  np.testing.assert_array_equal(got.memory.rank, want.memory.rank)
  for field in ('adapters', 'residual', 'memory'):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5),
      getattr(got, field),
      getattr(want, field),
    )


# By default every method on the mesh with both axes, and the first without `model`.
BY_DEFAULT = (('hetlora', (1, 8, 1)), *((method, (1, 2, 4)) for method in METHODS))
ON_MESHES = [
  pytest.param(
    method,
    mesh,
    id=f'{method}-{"x".join(map(str, mesh))}',
    marks=[] if (method, mesh) in BY_DEFAULT else [pytest.mark.slow],
  )
  for method in METHODS
  for mesh in MESHES
]


@pytest.mark.parametrize(('method', 'mesh'), ON_MESHES)
def test_every_mesh_agrees_with_one_device(method, mesh):
  (state, out), losses = after_a_call(many_rounds(method, mesh))
  (want, _), want_losses = _alone(method)
  assert_agree(state, want)
  assert losses[0] == pytest.approx(want_losses[0], rel=1e-5)
  assert out['reports'].sum() == 3 * 6  # padding clients do not report
  if method == 'hetlora':
    start = points.prepare(many_rounds(method)).initial_rank
    assert (state.memory.rank[..., 0] < start).any()


def test_points_on_their_own_devices_agree_with_each_alone(older_partitioner):
  configs = [
    many_rounds('hetlora', (2, 2, 2), seed=s, federated__tail_penalty=p)
    for s, p in ((0, 5.0), (0, 0.0), (1, 5.0))
  ]
  (state, _), losses = after_a_call(*configs)
  (want, _), want_losses = _alone('hetlora')
  first = jax.tree.map(lambda x: x[:1], state)
  assert_agree(first, want)
  assert losses[0] == pytest.approx(want_losses[0], rel=1e-5)
  third = jax.tree.map(lambda x: x[2:3], state)
  # Alone on the devices of the sweep, where it is repeated on the idle ones.
  (want, _), _ = after_a_call(many_rounds('hetlora', (2, 2, 2), seed=1))
  assert_agree(third, jax.tree.map(lambda x: x[:1], want))
  assert not np.array_equal(state.memory.rank[0], state.memory.rank[1])


def _gathers(mesh, method, **overrides):
  """Returns the experiment, its compiled rounds' text and their gathers."""
  x = points.prepare(many_rounds(method, mesh, **overrides))
  cohorts = points.make_cohorts(x, 0)
  program = x.run_rounds.lower(*points.arguments(x, x.initial_state, cohorts))
  text = program.compile().as_text()
  found = collectives(text)
  assert any(c.kind == 'all-reduce' for c in found)  # it does say something
  return x, text, [c for c in found if c.kind in ('all-gather', 'all-to-all')]


@pytest.mark.parametrize('method', METHODS)
def test_nothing_of_a_clients_training_is_gathered(method):
  x, _, gathers = _gathers((1, 8, 1), method)
  # What every device is told of each client: a few numbers a round.
  reported = 6 * 8 * 3
  for c in gathers:
    assert all(np.prod(shape) <= reported for shape in c.shape), c
  assert reported < x.experiment.model.dims['q'][1] * x.config.federated.r_max * 8


def _dims(shape):
  """Returns a shape without axes of length 1, in any order."""
  return tuple(sorted(n for n in shape if n > 1))


def _svds(text):
  """Returns the names of SVDs, and of gathers for them as jax 0.12 gives them.

  Those end with the call, `jit`, in the loop in which the SVD runs.
  """
  names = set(re.findall(r'op_name="([^"]*/svd)"', text))
  return names | {
    f'{name.rpartition("/while/body/")[0]}/while/body/jit' for name in names
  }


@pytest.mark.parametrize('method', METHODS)
def test_no_matrix_of_the_base_is_gathered(method):
  x, text, gathers = _gathers((1, 2, 4), method)
  split = [leaf for leaf in jax.tree.leaves(x.base) if not leaf.is_fully_replicated]
  assert len(split) == 7  # embed, head, q, o, gate, up, down
  whole = {_dims(leaf.shape) for leaf in split}
  of_a_layer = {_dims(leaf.shape[1:]) for leaf in split if leaf.ndim == 3}
  svds = _svds(text)  # each takes a whole product at a time
  assert bool(svds) == (method == 'flexlora')
  for c in gathers:
    if c.name not in svds:
      assert not {_dims(shape) for shape in c.shape} & (whole | of_a_layer), c


def test_heads_are_not_shared_by_devices():
  with pytest.raises(config.ConfigError, match='mesh.model=8 .* 4 heads'):
    points.prepare(many_rounds('hetlora', (1, 1, 8)))


def test_too_few_devices_are_named():
  with pytest.raises(ValueError, match='mesh.clients=16.* 16 devices.* 8'):
    sharding.make_mesh(clients=16)


@pytest.mark.parametrize(
  'clients, at_once, devices, want',
  [
    (10, 5, 1, (5, 10)), (10, 0, 1, (10, 10)), (10, 5, 4, (12, 12)),
    (10, 4, 1, (4, 12)), (10, 6, 1, (5, 10)), (64, 1, 8, (8, 64)),
    (1, 0, 8, (8, 8)),
  ],
)  # fmt: skip
def test_chunks_are_even_over_devices(clients, at_once, devices, want):
  assert sharding.chunks(clients, at_once, devices) == want
