"""What a round would need on a pod, compiled from shapes alone.

No weights, no data, no accelerator: devices are fake CPU ones or, where libtpu
is installed (`pip install 'jax[tpu]'`), those of a TPU topology, whose own compiler
then answers.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from hetlora_jax import base_model, build, points, prng, sharding
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.data import packing
from hetlora_jax.models import decoder, kernels, readout, shapes
from hetlora_jax.tools import flops, hlo
from hetlora_jax.types import Batch, Cohort, PyTree


class Chip(NamedTuple):
  """An accelerator, as its maker describes it."""

  memory: float  # bytes
  flops: float  # a second, dense bfloat16
  topology: str = ''  # family of TPU topologies


CHIPS = {
  'v5e': Chip(16e9, 197e12, 'v5e'),
  'v5p': Chip(95e9, 459e12, 'v5p'),
  'v6e': Chip(32e9, 918e12, 'v6e'),
  'a100': Chip(80e9, 312e12),
  'h100': Chip(80e9, 989e12),
  'h200': Chip(141e9, 989e12),
}
# Where `data.num_people` says nothing, the real number would need the data.
_POPULATION = 1000


class Report(NamedTuple):
  """Bytes are a device's; `arguments` add up to the program's own count."""

  model: str
  parameters: int
  dtype: str
  mesh: dict[str, int]
  compiler: str  # 'TPU v5 lite' or 'cpu'
  clients: int  # a round, with padding
  clients_at_once: int  # on a device
  points: int
  population: int
  arguments: dict[str, int]  # base, adapters, optimizer, people, cohorts, hyper
  temporary: int
  output: int
  argument: int  # as the compiler counts them
  flops: float  # a round, of all points
  moved: dict[str, int]  # collective -> bytes a round
  seconds: float  # to compile

  @property
  def peak(self) -> int:
    """Arguments (the state is updated in place) and temporaries."""
    return self.argument + self.temporary


def model_shape(config: Config) -> decoder.DecoderConfig:
  """Returns the shape of the base model; raises ConfigError."""
  c = config.model
  if base_model.is_random(c.source):
    return base_model.shape_of_random(c, c.random.vocab_size)
  if c.source not in shapes.SHAPES:
    raise ConfigError(
      f'config.model.source={c.source!r} has no entry in models/shapes.py, '
      f'which --dry_run reads: one of {", ".join(shapes.SHAPES)}, random.'
    )
  return shapes.SHAPES[c.source]


def _grid(family: str, count: int) -> str:
  """Returns the roundest topology of so many chips, e.g. 'v5e:8x16'."""
  sides = [1, 1, 1] if family == 'v5p' else [1, 1]
  for prime in sorted(_factors(count), reverse=True):
    sides[sides.index(min(sides))] *= prime
  return f'{family}:{"x".join(map(str, sorted(sides)))}'


def _factors(n: int) -> list[int]:
  for p in range(2, math.isqrt(n) + 1):
    if n % p == 0:
      return [p, *_factors(n // p)]
  return [n] if n > 1 else []


def compiler_of(chip: str) -> str:
  """Returns whose compiler answers for a chip: a TPU family's, or 'cpu'."""
  has_libtpu = importlib.util.find_spec('libtpu') is not None
  return (has_libtpu and CHIPS[chip].topology) or 'cpu'


def _devices(chip: str, count: int) -> tuple[Sequence, str]:
  """Returns the devices to compile for, and what they are."""
  if compiler_of(chip) == 'cpu':
    return jax.devices(), 'cpu'
  name = _grid(CHIPS[chip].topology, count)
  try:
    found = topologies.get_topology_desc(name, 'tpu').devices
  except Exception as error:  # jaxlib raises whatever libtpu says
    raise ConfigError(
      f'config.mesh needs {count} devices, and there is no topology {name}: '
      f'{str(error).splitlines()[0]}'
    ) from error
  return found, f'{found[0].device_kind} {name}'


def _placed(tree: PyTree, where: PyTree) -> PyTree:
  if isinstance(where, jax.sharding.NamedSharding):
    where = jax.tree.map(lambda _: where, tree)
  return jax.tree.map(
    lambda x, w: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=w), tree, where
  )


def _held(tree: PyTree) -> int:
  """Adds up the bytes of a tree on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _cohorts(config: Config, points: int) -> Cohort:
  """Returns the shapes of a call's cohorts: [rounds, K, C, ...]."""
  f = config.federated
  batch = packing.batch_shape(config.data, f.local_batch)
  clients = build.clients_at_once(config)[1]
  pooled = 'pools data' in config.traits
  lead = (f.rounds_per_call, points, clients)
  steps = f.local_steps * (f.clients_per_round if pooled else 1)
  room = (*lead, steps, batch.rows, batch.row_tokens)
  targets = (*lead, steps, batch.num_targets)
  shape = jax.ShapeDtypeStruct
  tokens, index = shape(room, jnp.int32), shape(targets, jnp.int32)
  return Cohort(
    client_id=shape(lead, jnp.int32),
    num_examples=shape(lead, jnp.float32),
    batches=Batch(tokens, tokens, tokens, index, index, shape(targets, jnp.float32)),
  )


def _work(cohorts: Cohort, rank: float, rounds: int) -> flops.Work:
  """Counts a round's positions as if none were padding."""
  *_, tokens = cohorts.batches.tokens.shape
  positions = math.prod(cohorts.batches.tokens.shape) // rounds
  return flops.Work(
    tokens=positions,
    tokens_times_rank=int(positions * rank),
    pairs=positions * (tokens + 1) // 2,
    targets=math.prod(cohorts.batches.target.shape) // rounds,
  )


def _compiled(lowered, compiler: str):
  """Compiles; returns the program and its text."""
  try:
    program = lowered.compile()
    return program, program.as_text()
  except jax.errors.JaxRuntimeError as error:
    # Too large for the chip, or a libtpu that this jaxlib cannot read.
    raise ConfigError(
      f'the compiler of {compiler} gave up: {str(error).splitlines()[0]} '
      "(pip install 'jax[tpu]' brings the libtpu that belongs to this jax)"
    ) from error


def _inputs(config: Config, count: int, rules, mesh, dims, base, rank_N):
  """Returns base, state, cohorts and hyperparameters as shapes on a mesh."""

  def of_points(make):
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype),
      jax.eval_shape(make),
    )

  state = of_points(lambda: build.init_state(config, dims, base, rank_N, rules))
  hyper = of_points(lambda: build.make_hyperparameters(config))
  return (
    _placed(base, sharding.by_name(mesh, base)),
    _placed(state, sharding.by_name(mesh, state, points=True)),
    _placed(_cohorts(config, count), sharding.over_clients(mesh)),
    _placed(hyper, sharding.over_points(mesh)),
  )


def compile_for(configs: Sequence[Config], chip: str) -> Report:
  """Compiles the rounds of some points for a pod and reads the program.

  Args:
    configs: one, or several that run together in one program.
    chip: a key of CHIPS; a TPU's own compiler is used if it is installed.

  Raises:
    ConfigError: the model's shape is unknown, or the mesh is; or the compiler
      gave up.
  """
  config, count = configs[0], len(configs)
  rounds = config.federated.rounds_per_call
  shape, start = model_shape(config), time.perf_counter()
  base_model.check_split(config, shape)
  dtype = jnp.dtype('bfloat16' if config.model.dtype == 'auto' else config.model.dtype)
  sizes = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
  devices, compiler = _devices(chip, math.prod(sizes.values()))
  mesh = sharding.make_mesh(**sizes, devices=devices)
  base = jax.eval_shape(
    lambda: decoder.init_params(shape, prng.stream(0, 'base'), dtype)
  )
  dims = decoder.adapter_dims(shape, config.lora.targets)
  loss = readout.make_loss(
    shape, dtype, config.model.remat, kernels.VOCAB_CHUNK_SIZE_ON_ACCELERATORS
  )
  rules = build.make_rules(config, loss)
  population = config.data.copies * max(
    config.data.num_people or _POPULATION, config.federated.clients_per_round
  )
  rank_N = build.draw_ranks(config, np.ones(population))
  base, state, cohorts, hyper = _inputs(config, count, rules, mesh, dims, base, rank_N)
  asked = points.measured(config, rounds)
  jitted = points.make_rounds(
    rules, mesh, state, config.mesh.points_at_once, points.always_measured(config)
  )
  program, text = _compiled(jitted.lower(base, state, cohorts, hyper, asked), compiler)
  memory = program.memory_analysis()
  assert memory, 'every compiler we use has one'
  work = flops.count_flops(
    shape, {} if rules.trains_base else dims,
    _work(cohorts, float(rank_N.mean()), rounds), rules.trains_base,
  )  # fmt: skip
  moved = hlo.moved(text)
  at_once, clients = build.clients_at_once(config)
  return Report(
    model=config.model.source,
    parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(base)),
    dtype=dtype.name,
    mesh=sizes,
    compiler=compiler,
    clients=clients,
    clients_at_once=at_once // config.mesh.clients,
    points=count,
    population=population,
    arguments={
      'base': _held(base),
      'adapters': _held((state.adapters, state.residual)),
      'server optimizer': _held(state.opt_state),
      'people': _held(state.memory),
      'cohorts and scalars': _held((cohorts, hyper, state.round)),
    },
    temporary=memory.temp_size_in_bytes,
    output=memory.output_size_in_bytes,
    argument=memory.argument_size_in_bytes,
    flops=float(sum(work.values())),
    moved={kind: n // rounds for kind, n in moved.items()},
    seconds=time.perf_counter() - start,
  )


def _size(count: float) -> str:
  """Renders bytes, e.g. 1.94 GB."""
  for unit, power in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if count >= power:
      return f'{count / power:.3g} {unit}'
  return f'{count:.0f} bytes'


def render(r: Report, chip: str) -> str:
  """Returns the report for people."""
  devices, c = math.prod(r.mesh.values()), CHIPS[chip]
  axes = ' x '.join(f'{n} {axis}' for axis, n in r.mesh.items())
  seconds = r.flops / devices / c.flops
  lines = [
    f'{r.model}: {r.parameters:,} parameters in {r.dtype}; {r.points} point(s) '
    f'of {r.clients} clients a round, {r.clients_at_once} at once on a device; '
    f'a population of {r.population:,}',
    f'mesh: {axes} = {devices} devices; compiled in {r.seconds:.0f} s by '
    + ('the CPU compiler for fake devices (temporaries are the CPU\'s)'
       if r.compiler == 'cpu' else f'the compiler of {r.compiler}'),
    'bytes on a device:',
    *[f'  {name:<20}{_size(n):>10}' for name, n in r.arguments.items()],
    f'  {"temporaries":<20}{_size(r.temporary):>10}',
    f'  {"in all":<20}{_size(r.peak):>10}',
    f'floating-point operations a round: {r.flops:.3g}, so at least '
    f'{seconds:.3g} s at the peak of {devices} {chip}',
    'moved by collectives on a device a round: '
    + (', '.join(f'{k} {_size(n)}' for k, n in r.moved.items()) or 'nothing'),
    *[
      f'{name}: {"fits" if r.peak <= x.memory else "DOES NOT FIT"}, '
      f'{100 * r.peak / x.memory:.0f} % of {x.memory / 1e9:.0f} GB'
      for name, x in CHIPS.items() if name == chip
    ],
  ]  # fmt: skip
  return '\n'.join(lines)
