"""What a round would need on a pod, compiled from shapes alone.

The experiment is prepared as any other, of a base model whose parameters are shapes
and a population that has no texts: no weights, no data, no accelerator. Devices are
fake CPU ones or, where libtpu is installed (`pip install 'jax[tpu]'`), those of a TPU
topology, whose own compiler then answers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from hetlora_jax import base_model, build, experiment, points, prng, sharding
from hetlora_jax.base_model import BaseModel
from hetlora_jax.config import Config, ConfigError, Data
from hetlora_jax.data import limits, people
from hetlora_jax.experiment import Experiment, Start
from hetlora_jax.models import decoder, kernels, readout, shapes
from hetlora_jax.points import Points
from hetlora_jax.tools import chips, flops, hlo, tables
from hetlora_jax.types import Cohort, PyTree

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
  room: str  # that examples have, and whether it is known without the data
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


# --- An experiment of shapes -------------------------------------------------


def model_shape(config: Config) -> decoder.DecoderConfig:
  """Returns the shape of the base model; raises ConfigError."""
  model = config.model
  if base_model.is_random(model.source):
    return base_model.shape_of_random(model, model.random.vocab_size)
  if model.source not in shapes.SHAPES:
    raise ConfigError(
      f'config.model.source={model.source!r} has no entry in models/shapes.py, '
      f'which --dry_run reads: one of {", ".join(shapes.SHAPES)}, random.'
    )
  return shapes.SHAPES[model.source]


def _model(config: Config) -> BaseModel:
  """Returns the base model on an accelerator, its parameters being shapes."""
  shape = model_shape(config)
  base_model.check_split(config, shape)
  dtype = jnp.dtype('bfloat16' if config.model.dtype == 'auto' else config.model.dtype)
  chunk = kernels.VOCAB_CHUNK_SIZE_ON_ACCELERATORS
  return BaseModel(
    params=jax.eval_shape(
      lambda: decoder.init_params(shape, prng.stream(0, 'base'), dtype)
    ),
    dims=decoder.adapter_dims(shape, config.lora.targets),
    loss=readout.make_loss(shape, dtype, config.model.remat, chunk),
    nats=readout.make_nats(shape, dtype, chunk),
    tokenizer=cast(people.Tokenizer, None),  # there is no text to encode
    identity={'dtype': dtype.name},
    decoder=shape,
  )


def _population(config: Config) -> people.Population:
  """Returns clients with the same short example each."""
  wanted = config.data.num_people or _POPULATION
  count = config.data.copies * max(wanted, config.federated.clients_per_round)
  all_clients = people.Group(
    ids=('',) * count, first=np.zeros(count, np.int64), count=np.ones(count, np.int64)
  )
  example = people.Example(np.zeros(2, np.int32), num_target=1)
  return people.Population(
    groups=dict.fromkeys(('train', 'heldout', 'unseen'), all_clients),
    read=lambda row: example,
  )


def _start(x: Experiment, config: Config) -> Start:
  """Returns where a run begins: everybody's rank, and shapes of all else."""
  start = jax.eval_shape(lambda: experiment.start(x, config))
  return start._replace(rank_N=build.draw_ranks(config, x.population.num_examples))


def _prepare(configs: Sequence[Config], devices: Sequence) -> Points:
  """Prepares points as `points.prepare` does, of shapes."""
  # Nothing is evaluated, and the examples that stand for the real ones have no labels.
  configs = [c.replace(**{'eval.labels': ()}) for c in configs]
  config = configs[0]
  x = experiment.prepare(
    config, model=_model(config), population=_population(config), devices=devices
  )
  evaluation = jax.eval_shape(lambda: x.evaluation)
  return points.together(dataclasses.replace(x, evaluation=evaluation), configs, _start)


def _cohorts(x: Points) -> Cohort:
  """Returns the shapes of a call's cohorts, after the cohort of one client."""
  lead = points.shape_of_cohorts(x)
  one = experiment.make_cohort(x.experiment, seed=0, round=0, only=slice(1))
  whole = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((*lead, *leaf.shape[1:]), leaf.dtype), one
  )
  return sharding.place(whole, sharding.over_clients(x.experiment.mesh))


# --- The compiler, and what it says --------------------------------------------


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


def _bytes_on_a_device(tree: PyTree) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _arguments(x: Points, cohorts: Cohort) -> dict[str, int]:
  """Counts the bytes on a device of what a call is given, by kind."""
  state = x.initial_state
  kinds = {
    'base': x.base,
    'adapters': (state.adapters, state.residual),
    'server optimizer': state.opt_state,
    'people': state.memory,
    'cohorts and scalars': (cohorts, x.hyper, state.round),
  }
  return {name: _bytes_on_a_device(tree) for name, tree in kinds.items()}


def _flops(x: Points, cohorts: Cohort) -> float:
  """Counts the operations of a round as if no position were padding."""
  rounds, model = x.config.federated.rounds_per_call, x.experiment.model
  *_, row_tokens = cohorts.batches.tokens.shape
  tokens = cohorts.batches.tokens.size // rounds
  work = flops.Work(
    tokens=tokens,
    tokens_times_rank=int(tokens * float(x.initial_rank[0].mean())),
    pairs=tokens * (row_tokens + 1) // 2,
    targets=cohorts.batches.target.size // rounds,
  )
  trains_base = x.experiment.rules.trains_base
  dims = {} if trains_base else model.dims
  assert model.decoder, '`_model` gives one'
  return float(sum(flops.count_flops(model.decoder, dims, work, trains_base).values()))


def compile_for(configs: Sequence[Config], chip: str) -> Report:
  """Compiles the rounds of some points for a pod and reads the program.

  Args:
    configs: one, or several that run together in one program.
    chip: a key of `chips.CHIPS`; a TPU's own compiler is used if it is installed.

  Raises:
    ConfigError: the model's shape is unknown, or the mesh is; or the compiler
      gave up.
  """
  # Lower the program of a call, of shapes, and compile it.
  config, start = configs[0], time.perf_counter()
  rounds = config.federated.rounds_per_call
  devices, compiler = chips.devices(chip, config.mesh.devices)
  x = _prepare(configs, devices)
  cohorts = _cohorts(x)
  inputs = points.arguments(x, x.initial_state, cohorts, done=rounds)
  program, text = _compiled(x.run_rounds.lower(*inputs), compiler)

  # Read what it needs.
  memory = program.memory_analysis()
  assert memory, 'every compiler we use has one'
  at_once, clients = build.clients_at_once(config)
  return Report(
    model=config.model.source,
    parameters=experiment.base_size(x.experiment)[0],
    dtype=x.identity['dtype'],
    mesh=dict(x.experiment.mesh.shape),
    compiler=compiler,
    clients=clients,
    clients_at_once=at_once // config.mesh.clients,
    points=len(x.configs),
    population=len(x.experiment.population.client_ids),
    room=_room(config.data, x.config.data),
    arguments=_arguments(x, cohorts),
    temporary=memory.temp_size_in_bytes,
    output=memory.output_size_in_bytes,
    argument=memory.argument_size_in_bytes,
    flops=_flops(x, cohorts),
    moved={kind: n // rounds for kind, n in hlo.moved(text).items()},
    seconds=time.perf_counter() - start,
  )


def _room(given: Data, assumed: Data) -> str:
  """Says how many tokens an example may have, which a dry run may have to assume."""
  told = f'{assumed.tokens_per_example} tokens, {assumed.targets_per_example} of them targets'
  if limits.are_known(given):
    return told
  return (
    f'{told}, ASSUMED: your data decide; see hetlora-data --stats, and give '
    'config.data.tokens_per_example and targets_per_example'
  )


# --- For people ----------------------------------------------------------------


def render(report: Report, chip: str) -> str:
  """Returns the report for people."""
  devices = math.prod(report.mesh.values())
  axes = ' x '.join(f'{n} {axis}' for axis, n in report.mesh.items())
  by = f'the compiler of {report.compiler}'
  if report.compiler == 'cpu':
    by = "the CPU compiler for fake devices (temporaries are the CPU's)"
  held = report.arguments | {'temporaries': report.temporary, 'in all': report.peak}
  seconds = report.flops / devices / chips.CHIPS[chip].flops
  moved = [f'{kind} {tables.size(n, "B")}' for kind, n in report.moved.items()]
  memory = chips.CHIPS[chip].memory
  return '\n'.join(
    [
      f'{report.model}: {report.parameters:,} parameters in {report.dtype}; '
      f'{report.points} point(s) of {report.clients} clients a round, '
      f'{report.clients_at_once} at once on a device; '
      f'a population of {report.population:,}',
      f'room of an example: {report.room}',
      f'mesh: {axes} = {devices} devices; compiled in {report.seconds:.0f} s by {by}',
      'bytes on a device:',
      *[f'  {name:<20}{tables.size(n, "B"):>10}' for name, n in held.items()],
      f'floating-point operations a round: {report.flops:.3g}, so at least '
      f'{seconds:.3g} s at the peak of {devices} {chip}',
      f'moved by collectives on a device a round: {", ".join(moved) or "nothing"}',
      f'{chip}: {"fits" if report.peak <= memory else "DOES NOT FIT"}, '
      f'{100 * report.peak / memory:.0f} % of {memory / 1e9:.0f} GB',
    ]
  )
