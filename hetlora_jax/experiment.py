"""An experiment, built and checked: models, people, cohorts, evaluation.

One or several points of a sweep, which differ in what one program may vary
(`VARIES`), are one experiment; its states have a leading axis of points, K.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hetlora_jax import base_model, build, files, heldout, sharding
from hetlora_jax.config import Config, ConfigError, flat, to_dict
from hetlora_jax.data import cohorts, packing, people
from hetlora_jax.methods import traffic
from hetlora_jax.methods.registry import rule_names
from hetlora_jax.types import Cohort, Hyperparameters, PyTree, Rules, ServerState

# Fields that are data to the compiled program, and so may differ between the
# points of one experiment: `types.Hyperparameters`, and who gets which rank.
VARIES = (
  'seed', 'client_optimizer.learning_rate',
  'client_optimizer.full_learning_rate', 'server_optimizer.learning_rate',
  'federated.dropout', 'federated.tail_penalty', 'federated.gamma',
  'federated.r_min', 'federated.proximal', 'methods.energy', 'lora.scale',
  'ranks.distribution', 'ranks.exponent', 'ranks.explicit', 'ranks.tiers',
  'ranks.tier_fractions', 'ranks.data_correlation',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything a run needs, built and checked; nothing written yet."""

  points: tuple[Config, ...]  # K, those that fill up `sweep` included
  people: people.Population
  base: PyTree
  dims: dict[str, tuple[int, int, int]]
  evaluation: dict[str, Cohort]  # name -> evaluation set
  hyper: Hyperparameters  # leaves [K]
  initial_state: ServerState  # leaves [K, ...]
  initial_rank: np.ndarray  # [K, N]
  rules: Rules
  run_rounds: Callable  # see build.make_rounds
  evaluate: dict[str, Callable]  # name -> see heldout.make_evaluate
  take_point: Callable  # (state, k) -> the state of point k
  mesh: jax.sharding.Mesh
  base_identity: dict[str, Any]  # what a checkpoint belongs to, for JSON
  description: dict[str, Any]

  @property
  def config(self) -> Config:
    """What all points have in common, read from the first."""
    return self.points[0]


def program_of(config: Config) -> tuple:
  """Returns what two points must share to be one experiment, hashable."""
  fields = flat(to_dict(config)).items()
  return tuple((name, x) for name, x in fields if name not in VARIES)


def _load_people(config: Config, tokenizer: people.Tokenizer) -> people.Population:
  d = config.data
  try:
    population = people.load(d, tokenizer)
  except ValueError as error:
    raise ConfigError(f'config.data: {error}') from error
  _check_population(
    config, population,
    f'of {d.name!r} with data.min_examples={d.min_examples} and '
    f'data.num_people={d.num_people}: lower it, or raise data.copies',
  )  # fmt: skip
  return population


def _check_population(config: Config, crowd: people.Population, which: str) -> None:
  population, wanted = len(crowd.client_ids), config.federated.clients_per_round
  if wanted > population:
    raise ConfigError(
      f'config.federated.clients_per_round={wanted} exceeds the {population} '
      f'people {which}.'
    )


def _evaluation_sets(
  config: Config, population: people.Population
) -> dict[str, Cohort]:
  e, out = config.eval, {}
  for name, kind in (('seen', 'heldout'), ('unseen', 'unseen')):
    num_people = min(e.num_people, len(population.groups[kind].ids))
    out[name] = cohorts.evaluation_set(
      population,
      kind,
      num_people=num_people,
      examples_per_person=e.examples_per_person,
      shape=packing.batch_shape(config.data, e.examples_per_person),
      multiple_of=heldout.people_at_once(num_people, config.mesh.clients),
    )
  return out


@contextlib.contextmanager
def in_memory(remedy: str) -> Iterator[None]:
  """Says what to do when memory is full, as a ConfigError."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    if not files.out_of_memory(error):
      raise
    text = (str(error) or 'MemoryError').splitlines()[0].rstrip('.')
    raise ConfigError(f'out of memory ({text}): {remedy}') from error


def _evaluators(config: Config, rules: Rules, mesh) -> dict[str, Callable]:
  """Returns what evaluates each set; seen people with what is theirs, if any."""
  make = functools.partial(
    heldout.make_evaluate, rules, mesh,
    points_at_once=config.mesh.points_at_once,
  )  # fmt: skip
  evaluate = dict.fromkeys(('seen', 'unseen'), make(own=False))
  if rules.personal:
    evaluate['seen'] = make(own=True)
  elif config.eval.own_rank:
    evaluate['seen_own'] = make(own=True)
  return evaluate


def _stack(trees: Sequence[PyTree]) -> PyTree:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _fill_up(points: Sequence[Config]) -> tuple[Config, ...]:
  """Repeats the last point until `sweep` divides their number.

  So a point runs alone as it does among others, on the devices of a sweep.
  """
  c = points[0]
  if any(program_of(p) != program_of(c) for p in points):
    raise ValueError('points that differ in their program cannot run together')
  return (*points, *[points[-1]] * (-len(points) % c.mesh.sweep))


@in_memory(
  'take a smaller model.source, model.dtype=bfloat16, fewer points together, or '
  'more devices that share a model, mesh.model.'
)
def prepare(
  *points: Config,
  model: base_model.BaseModel | None = None,
  crowd: people.Population | None = None,
) -> Experiment:
  """Builds and checks everything; raises ConfigError before any writing.

  Args:
    *points: differ in `VARIES` alone.
    model: your own (`base_model.own`), instead of what `config.model` and
      `config.lora.targets` name.
    crowd: your own people and their examples, instead of what `config.data`
      names.
  """
  points = _fill_up(points)
  config = points[0]
  mesh = sharding.make_mesh(*[getattr(config.mesh, a) for a in sharding.AXES])
  if model:
    model = base_model.place(model, mesh)
  else:
    model = base_model.of_config(config, mesh)
  if crowd:
    _check_population(config, crowd, 'that were given')
  else:
    crowd = _load_people(config, model.tokenizer)
  dims = model.dims
  rules = build.make_rules(config, model.loss)
  at_once = config.mesh.points_at_once
  rank_KN = np.stack([build.draw_ranks(p, crowd.num_examples) for p in points])
  state = _stack(
    [
      build.init_state(p, dims, model.params, rank_N, rules)
      for p, rank_N in zip(points, rank_KN, strict=True)
    ]
  )
  hyper = _stack([build.make_hyperparameters(p) for p in points])
  return Experiment(
    points=points,
    people=crowd,
    base=model.params,
    dims=dims,
    evaluation=sharding.place(
      _evaluation_sets(config, crowd), sharding.over_people(mesh)
    ),
    hyper=sharding.place(hyper, sharding.over_points(mesh)),
    initial_state=sharding.place(state, sharding.by_name(mesh, state, points=True)),
    initial_rank=rank_KN,
    rules=rules,
    run_rounds=build.make_rounds(rules, mesh, state, at_once),
    evaluate=_evaluators(config, rules, mesh),
    take_point=_make_take(state, mesh),
    mesh=mesh,
    base_identity=model.identity,
    description={
      'model': config.model.source,
      'model_fingerprint': model.identity['sha256'],
      'dtype': model.identity['dtype'],
      'training_people': len(crowd.client_ids),
      'unseen_people': len(crowd.groups['unseen'].ids),
      'base_parameters': sum(x.size for x in jax.tree.leaves(model.params)),
      'adapter_parameters_r_max': traffic.lora_parameters(
        np.array([[config.federated.r_max]]), dims
      ),
    },
  )


def _cohort(x: Experiment, seed: int, round_number: int, only: slice) -> Cohort:
  """Builds some clients of the cohort of a round, in numpy."""
  c = x.config
  draw = cohorts.Draw(
    federated=c.federated,
    shape=packing.batch_shape(c.data, c.federated.local_batch),
    count=c.methods.count_examples,
    pooled=rule_names(c)['cohort'] == 'pooled',
    pad_to=build.clients_at_once(c)[1],
  )
  return cohorts.make_cohort(x.people, draw, seed=seed, round=round_number, only=only)


def make_cohorts(x: Experiment, first: int) -> Cohort:
  """Builds and places the cohorts of a call: [rounds, K, C, ...].

  A cohort is a function of (seed, round); each process builds only what its
  own devices hold.
  """
  rounds, points = x.config.federated.rounds_per_call, len(x.points)
  shape = (rounds, points, build.clients_at_once(x.config)[1])
  where = sharding.over_clients(x.mesh)
  _, own_points, own_clients = sharding.own_part(where, shape)
  # Points of one seed share their cohorts.
  build_once = functools.cache(lambda seed, i: _cohort(x, seed, i, only=own_clients))
  own = _stack(
    [
      _stack([build_once(p.seed, first + i) for p in x.points[own_points]])
      for i in range(rounds)
    ]
  )
  return sharding.place_own(own, where, shape)


def cohorts_ahead(x: Experiment, first: int, last: int) -> Iterator[Cohort]:
  """Builds the next call's cohorts while this call runs."""
  starts = range(first, last, x.config.federated.rounds_per_call)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    coming = [pool.submit(make_cohorts, x, start) for start in starts[:1]]
    for start in starts[1:]:
      ready = coming.pop().result()
      coming.append(pool.submit(make_cohorts, x, start))
      yield ready
    for last_one in coming:
      yield last_one.result()


class Evaluation(NamedTuple):
  """Everybody's summed loss and token count; padding people have no tokens."""

  loss_KE: np.ndarray
  tokens_KE: np.ndarray


def evaluate(x: Experiment, state: ServerState) -> dict[str, Evaluation]:
  """Returns the losses of seen and unseen people, by name of the set."""
  return {
    name: Evaluation(
      *jax.device_get(
        function(x.base, state, x.evaluation[name.removesuffix('_own')], x.hyper)
      )
    )
    for name, function in x.evaluate.items()
  }


def _shape_of_one(state: ServerState, mesh) -> ServerState:
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state
  )
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    one,
    sharding.by_name(mesh, one),
  )


def shape_of_one(x: Experiment) -> ServerState:
  """Returns shapes, types and places of one point's state."""
  return _shape_of_one(x.initial_state, x.mesh)


def _make_take(state: ServerState, mesh) -> Callable:
  """Jits (state of all points, k) -> the state of point k."""
  where = jax.tree.map(lambda leaf: leaf.sharding, _shape_of_one(state, mesh))
  return jax.jit(
    lambda state, k: jax.tree.map(lambda leaf: leaf[k], state),
    out_shardings=where,
  )


def split(x: Experiment, state: ServerState) -> Iterator[ServerState]:
  """Yields every point's own state."""
  for k in range(len(x.points)):
    yield x.take_point(state, k)


def join(x: Experiment, states: Sequence[ServerState]) -> ServerState:
  """Stacks the states of the first points; others get the last one's."""
  states = [*states, *[states[-1]] * (len(x.points) - len(states))]
  where = sharding.by_name(x.mesh, x.initial_state, points=True)
  stack = jax.jit(
    lambda *s: jax.tree.map(lambda *leaves: jnp.stack(leaves), *s),
    out_shardings=where,
  )
  return stack(*states)
