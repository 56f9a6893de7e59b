"""Points of a sweep that run as one program: the axis K, and nothing but it.

Points that differ only in fields declared to vary (`config.VARIES`) share base model,
clients and compiled program. Here, and only here, states and hyper-parameters have a
leading axis of points; whoever trains sees one run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from hetlora_jax import build, experiment, heldout, rounds, sharding
from hetlora_jax.base_model import BaseModel
from hetlora_jax.config import VARIES, Config, to_dict
from hetlora_jax.data import labels
from hetlora_jax.data.people import Population
from hetlora_jax.experiment import Experiment, Start
from hetlora_jax.fields import flat
from hetlora_jax.types import Cohort, Hyperparameters, PyTree, Rules, ServerState


def program_of(config: Config) -> tuple:
  """Returns what two points must share to run as one program, hashable."""
  fields = flat(to_dict(config)).items()
  return tuple((name, x) for name, x in fields if name not in VARIES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
  """Runs of one experiment, together."""

  experiment: Experiment
  configs: tuple[Config, ...]  # K, those that fill up `mesh.sweep` included
  initial_rank: np.ndarray  # [K, N]
  initial_state: ServerState  # leaves [K, ...]
  hyper: Hyperparameters  # leaves [K]
  evaluation: dict[str, Cohort]  # name -> evaluation set, placed
  run_rounds: Callable  # see make_rounds
  evaluators: dict[str, Callable]  # name -> see make_evaluate
  take: Callable  # (state, k) -> the state of point k

  @property
  def config(self) -> Config:
    """What all points have in common, read from the first."""
    return self.experiment.config

  @property
  def identity(self) -> dict[str, Any]:
    """What a checkpoint belongs to: the base model, and data of one's own."""
    x, found = self.experiment, self.experiment.model.identity
    if x.population.digest:
      found = found | {'data': x.population.digest}
    if any(x.revisions.values()):  # told, not compared: others may hold the same
      found = found | {'revisions': x.revisions}
    return found

  @property
  def base(self) -> PyTree:
    """The frozen parameters of the base model."""
    return self.experiment.model.params


def _fill_up(configs: Sequence[Config]) -> tuple[Config, ...]:
  """Repeats the last point until `sweep` divides their number.

  So a point runs alone as it does among others, on the devices of a sweep.
  """
  first = configs[0]
  if any(program_of(c) != program_of(first) for c in configs):
    raise ValueError('points that differ in their program cannot run together')
  return (*configs, *[configs[-1]] * (-len(configs) % first.mesh.sweep))


def _stack(trees: Sequence[PyTree]) -> PyTree:
  """Stacks host arrays, or shapes."""

  def stack(*leaves):
    one = leaves[0]
    if isinstance(one, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct((len(leaves), *one.shape), one.dtype)
    return np.stack(leaves)

  return jax.tree.map(stack, *trees)


@experiment.in_memory(
  'take a smaller model.source, model.dtype=bfloat16, fewer points together, or '
  'more devices that share a model, mesh.model.'
)
def prepare(
  *configs: Config, model: BaseModel | None = None, population: Population | None = None
) -> Points:
  """Builds and checks one or several runs; raises ConfigError before any writing.

  Args:
    *configs: differ in `config.VARIES` alone.
    model: see `experiment.prepare`.
    population: see `experiment.prepare`.
  """
  return together(
    experiment.prepare(configs[0], model=model, population=population), configs
  )


def together(
  x: Experiment,
  configs: Sequence[Config],
  start: Callable[[Experiment, Config], Start] = experiment.start,
) -> Points:
  """Makes points of one experiment.

  Args:
    x: the experiment of the first point.
    configs: the points', which differ in `config.VARIES` alone.
    start: where a point begins; in a dry run it returns shapes.
  """
  configs = _fill_up(configs)
  starts = [start(x, config) for config in configs]
  state, hyper = (_stack([getattr(s, n) for s in starts]) for n in ('state', 'hyper'))
  mesh, at_once = x.mesh, x.config.mesh.points_at_once
  where = sharding.by_name(mesh, state, points=True)
  return Points(
    experiment=x,
    configs=configs,
    initial_rank=np.stack([s.rank_N for s in starts]),
    initial_state=sharding.place(state, where),
    hyper=sharding.place(hyper, sharding.over_points(mesh)),
    evaluation=sharding.place(x.evaluation, sharding.over_people(mesh)),
    run_rounds=make_rounds(x.rules, mesh, state, at_once, always_measured(x.config)),
    evaluators=_evaluators(x, at_once),
    take=_make_take(state, mesh),
  )


def each_point(mesh, function: Callable, in_axes: Sequence, at_once: int | None):
  """Maps a function over points: spread over `sweep`, vmapped on a device.

  Points need nothing of each other, so that axis is cut by hand (`shard_map`)
  and what follows is compiled for one device's points; the other axes are
  left to XLA.

  Args:
    mesh: the devices.
    function: of one point.
    in_axes: 0 for each argument that every point has its own of, else None.
    at_once: how many points a device vmaps, the others wait; None: all of its own.
  """

  def own_points(*args):
    owned = [x for x, axis in zip(args, in_axes, strict=True) if axis == 0]

    def one(owned):
      rest = iter(owned)
      pairs = zip(args, in_axes, strict=True)
      return function(*[next(rest) if axis == 0 else x for x, axis in pairs])

    count = jax.tree.leaves(owned)[0].shape[0]
    return jax.lax.map(one, owned, batch_size=min(at_once or count, count))

  specs = [PartitionSpec('sweep') if axis == 0 else PartitionSpec() for axis in in_axes]
  return jax.shard_map(
    own_points,
    mesh=mesh,
    in_specs=tuple(specs),
    out_specs=PartitionSpec('sweep'),
    axis_names={'sweep'},
    check_vma=False,
  )


def make_rounds(
  rules: Rules,
  mesh,
  state: ServerState,
  at_once: int | None = 1,
  measure: bool | None = True,
):
  """Jits many rounds of many points on a mesh, donating the state.

  Args:
    rules: the method's.
    mesh: the devices.
    state: of all points, leaves [K, ...]; only shapes are read.
    at_once: how many points a device vmaps; None: all of its own.
    measure: whether rounds measure the error of averaging; None: those that a call
      names.

  Returns:
    (base, state, cohorts, hyper, measure_R) -> (state, metrics), where the leaves of
    `state` and `hyper` are [K, ...], of `cohorts` [rounds, K, C, ...] and of the
    metrics [rounds, K, ...].
  """

  def one(base, state, cohort, hyper, asked):
    asked = asked if measure is None else measure
    return rounds.federated_round(rules, base, state, cohort, hyper, asked)

  one_round = each_point(mesh, one, (None, 0, 0, 0, None), at_once)

  def many_rounds(base, state, cohorts, hyper, measure_R):
    def step(state, xs):
      cohort, asked = xs
      return one_round(base, state, cohort, hyper, asked)

    return jax.lax.scan(step, state, (cohorts, measure_R))

  where, everywhere = sharding.by_name(mesh, state, True), sharding.replicated(mesh)
  over_clients, over_points = sharding.over_clients(mesh), sharding.over_points(mesh)
  return jax.jit(
    many_rounds,
    in_shardings=(None, where, over_clients, over_points, everywhere),
    out_shardings=(where, everywhere),
    donate_argnums=(1,),
  )


def always_measured(config: Config) -> bool | None:
  """Returns whether every round measures the error of averaging; None: some do."""
  asked, devices = config.eval.aggregation_error, config.mesh.devices
  return True if asked is None and devices == 1 else asked


def measured(config: Config, done: int) -> np.ndarray:
  """Tells which rounds of the call that ends after round `done` measure it: [rounds].

  Unless told otherwise, on several devices those that end with an evaluation.
  """
  always, f = always_measured(config), config.federated
  after_R = done - f.rounds_per_call + 1 + np.arange(f.rounds_per_call)
  if always is not None:
    return np.full(len(after_R), always)
  every = config.eval.every or f.num_rounds
  return (after_R % every == 0) | (after_R == f.num_rounds)


def arguments(x: Points, state: ServerState, cohorts: Cohort, done: int = 0) -> tuple:
  """Returns what `run_rounds` is called with, for the call that ends at round `done`."""
  return x.base, state, cohorts, x.hyper, measured(x.config, done)


def call(x: Points, state: ServerState, cohorts: Cohort, done: int = 0):
  """Runs the rounds of a call, the last of them being round `done`.

  Returns:
    The next state, which takes the place of the one given, and metrics
    [rounds, K, ...].
  """
  return x.run_rounds(*arguments(x, state, cohorts, done))


def _evaluators(x: Experiment, at_once: int | None) -> dict[str, Callable]:
  """Returns what evaluates each set; seen people with what is theirs, if any."""
  judge = heldout.losses(x.model.loss)
  if x.answers:
    judge = heldout.label_losses(x.model.nats, x.config.eval.examples_per_person)
  own, whole = (
    make_evaluate(judge, x.rules, x.mesh, own, at_once) for own in (True, False)
  )
  if x.rules.personal:
    return {'seen': own, 'unseen': whole}
  also = {'seen_own': own} if x.config.eval.own_rank else {}
  return {'seen': whole, 'unseen': whole} | also


def make_evaluate(
  judge: Callable, rules: Rules, mesh, own: bool, at_once: int | None = 1
):
  """Returns (base, state, cohort, hyper) -> losses and token counts, jitted.

  State and hyper-parameters are of K points, and so are the results of `judge` of every
  person (`heldout.of_people`): [K, E, ...].
  """

  def evaluate(base, state, cohort, hyper):
    people = heldout.people_at_once(len(cohort.client_id), mesh.shape['clients'])
    return heldout.of_people(judge, rules, own, people, base, state, cohort, hyper)

  every = each_point(mesh, evaluate, (None, 0, None, 0), at_once)
  return jax.jit(every, out_shardings=sharding.replicated(mesh))


class Evaluation(NamedTuple):
  """Everybody's summed loss and token count; padding people have no tokens.

  Of a task with labels also which label is right in every example, and which the model
  finds likeliest; both are labels.NOTHING where there is no example, and so is the guess
  of a model that has diverged.
  """

  loss_E: np.ndarray
  tokens_E: np.ndarray
  answer_EX: np.ndarray | None = None
  guess_EX: np.ndarray | None = None


def evaluate(x: Points, state: ServerState) -> list[dict[str, Evaluation]]:
  """Returns every point's losses of seen and unseen people, by name of the set."""
  found: list[dict[str, Evaluation]] = [{} for _ in x.configs]
  for name, function in x.evaluators.items():
    called = function(*_of_evaluation(x, name, state))
    answer = x.experiment.answers.get(name.removesuffix('_own'))
    for k, (loss, tokens) in enumerate(zip(*jax.device_get(called), strict=True)):
      one = Evaluation(loss, tokens)
      found[k][name] = one if answer is None else _guessed(loss, tokens, answer)
  return found


def _guessed(
  loss_ELX: np.ndarray, tokens_ELX: np.ndarray, answer_EX: np.ndarray
) -> Evaluation:
  """Guesses the label of least loss; the losses that count are of the right ones."""
  right_EX = np.maximum(answer_EX, 0)[:, None]  # padding has no loss at any label
  loss_E, tokens_E = (
    np.take_along_axis(x, right_EX, 1).sum((1, 2)) for x in (loss_ELX, tokens_ELX)
  )
  is_one = np.isfinite(loss_ELX).all(1) & (answer_EX != labels.NOTHING)
  guess_EX = np.where(is_one, loss_ELX.argmin(1), labels.NOTHING)
  return Evaluation(loss_E, tokens_E, answer_EX, guess_EX)


def _of_evaluation(x: Points, name: str, state: ServerState) -> tuple:
  """Returns what an evaluator is called with."""
  return x.base, state, x.evaluation[name.removesuffix('_own')], x.hyper


def compile(x: Points, state: ServerState, cohorts: Cohort) -> None:
  """Compiles what a run calls, in all processes, so that no round waits for it."""
  x.run_rounds.lower(*arguments(x, state, cohorts)).compile()
  for name, function in x.evaluators.items():
    function.lower(*_of_evaluation(x, name, state)).compile()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('compiled')


def by_round(x: Points, out: dict, done: int) -> list[list[dict]]:
  """Takes the metrics of a call apart: round -> point -> metrics in numpy.

  What was not measured is left out.
  """
  out, measured_R = jax.device_get(out), measured(x.config, done)

  def one(i: int, k: int) -> dict:
    found = jax.tree.map(lambda leaf: leaf[i, k], out)
    if not measured_R[i]:
      del found['aggregation_error']
    return found

  points = range(len(x.configs))
  return [[one(i, k) for k in points] for i in range(len(measured_R))]


def shape_of_cohorts(x: Points) -> tuple[int, int, int]:
  """Returns the first axes of a call's cohorts, (rounds, K, C); C includes padding."""
  _, clients = build.clients_at_once(x.config)
  return x.config.federated.rounds_per_call, len(x.configs), clients


def make_cohorts(x: Points, first: int) -> Cohort:
  """Builds and places the cohorts of a call: [rounds, K, C, ...].

  Each process builds only what its own devices hold.
  """
  shape = shape_of_cohorts(x)
  where = sharding.over_clients(x.experiment.mesh)
  _, own_points, own_clients = sharding.own_part(where, shape)
  # Points of one seed share their cohorts.
  build_once = functools.cache(
    lambda seed, i: experiment.make_cohort(x.experiment, seed, i, only=own_clients)
  )
  own = _stack(
    [
      _stack([build_once(c.seed, first + i) for c in x.configs[own_points]])
      for i in range(shape[0])
    ]
  )
  return sharding.place_own(own, where, shape)


def cohorts_ahead(x: Points, first: int, last: int) -> Iterator[Cohort]:
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


def _shape_of_one(state: ServerState, mesh) -> ServerState:
  one = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state
  )
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    one,
    sharding.by_name(mesh, one),
  )


def shape_of_one(x: Points) -> ServerState:
  """Returns shapes, types and places of one point's state."""
  return _shape_of_one(x.initial_state, x.experiment.mesh)


def _make_take(state: ServerState, mesh) -> Callable:
  """Jits (state of all points, k) -> the state of point k."""
  where = jax.tree.map(lambda leaf: leaf.sharding, _shape_of_one(state, mesh))
  return jax.jit(
    lambda state, k: jax.tree.map(lambda leaf: leaf[k], state), out_shardings=where
  )


def split(x: Points, state: ServerState) -> Iterator[ServerState]:
  """Yields every point's own state."""
  for k in range(len(x.configs)):
    yield x.take(state, k)


def join(x: Points, states: Sequence[ServerState]) -> ServerState:
  """Stacks the states of the first points; others get the last one's."""
  states = [*states, *[states[-1]] * (len(x.configs) - len(states))]
  where = sharding.by_name(x.experiment.mesh, x.initial_state, points=True)
  stack = jax.jit(
    lambda *s: jax.tree.map(lambda *leaves: jnp.stack(leaves), *s),
    out_shardings=where,
  )
  return stack(*states)
