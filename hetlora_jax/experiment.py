"""An experiment, built and checked: model, clients, cohorts, evaluation sets.

This is one run. Several that share a compiled program are made of it in points.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from hetlora_jax import base_model, build, files, heldout, sharding
from hetlora_jax.base_model import BaseModel
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.data import (
  builders,
  cohorts,
  coverage,
  labels,
  limits,
  packing,
  people,
)
from hetlora_jax.methods import traffic
from hetlora_jax.types import Cohort, Hyperparameters, Rules, ServerState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything that a run needs; nothing is written yet."""

  config: Config
  model: BaseModel
  population: people.Population
  evaluation: dict[str, Cohort]  # name -> evaluation set, in numpy
  rules: Rules
  mesh: jax.sharding.Mesh
  # Of a task with labels, name -> which label is right (data/labels.py); else {}.
  answers: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  @property
  def revisions(self) -> dict[str, str | None]:
    """The commits of what is from the Hugging Face Hub."""
    return {'model': self.model.revision, 'data': self.population.revision}

  @functools.cached_property
  def coverage(self) -> coverage.Coverage:
    """What is trained on of the data."""
    return coverage.measure(self.config, self.population)


class Start(NamedTuple):
  """Where a run begins."""

  rank_N: np.ndarray  # every client's
  state: ServerState
  hyper: Hyperparameters


def _load_people(
  config: Config, tokenizer: people.Tokenizer
) -> tuple[Config, people.Population]:
  """Returns the clients, and the configuration with the limits that they have."""
  try:
    dataset = builders.of(config.data)
    d = limits.filled(config.data, dataset, tokenizer)
    population = people.load(d, tokenizer, dataset)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(f'config.data: {error}') from error
  _check_population(
    config,
    population,
    f'of {d.name!r} with data.min_examples={d.min_examples} and '
    f'data.num_people={d.num_people}: lower it, or raise data.copies',
  )
  return dataclasses.replace(config, data=d), population


def _check_population(
  config: Config, population: people.Population, which: str
) -> None:
  count, wanted = len(population.client_ids), config.federated.clients_per_round
  if wanted > count:
    raise ConfigError(
      f'config.federated.clients_per_round={wanted} exceeds the {count} '
      f'clients {which}.'
    )


def _evaluation_sets(
  config: Config, population: people.Population, tokenizer: people.Tokenizer
) -> tuple[dict[str, Cohort], dict[str, np.ndarray]]:
  """Returns the sets by name and, of a task with labels, the right ones."""
  e, people_of = config.eval, {}
  kinds: dict[str, people.Kind] = {'seen': 'heldout', 'unseen': 'unseen'}
  for name, kind in kinds.items():
    num_people = min(e.num_people, len(population.groups[kind].ids))
    multiple_of = heldout.people_at_once(num_people, config.mesh.clients)
    people_of[name] = kind, num_people, multiple_of
  if e.labels:
    return labels.evaluation_sets(population, config, tokenizer, people_of)
  sets = {
    name: cohorts.evaluation_set(
      population,
      kind,
      num_people=num_people,
      examples_per_person=e.examples_per_person,
      shape=packing.batch_shape(config.data, e.examples_per_person),
      multiple_of=multiple_of,
    )
    for name, (kind, num_people, multiple_of) in people_of.items()
  }
  return sets, {}


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


def prepare(
  config: Config,
  *,
  model: BaseModel | None = None,
  population: people.Population | None = None,
  devices: Sequence | None = None,
) -> Experiment:
  """Builds and checks everything; raises ConfigError before any writing.

  Given a model whose parameters are shapes, and any population, it loads and computes
  nothing: so does a dry run.

  Args:
    config: checked.
    model: your own (`base_model.own`), instead of what `config.model` and
      `config.lora.targets` name.
    population: your own clients and their examples, instead of what `config.data` names.
    devices: what the mesh is made of; None: all that jax finds.
  """
  m = config.mesh
  mesh = sharding.make_mesh(m.sweep, m.clients, m.model, devices)
  if model:
    model = base_model.place(model, mesh)
  else:
    model = base_model.of_config(config, mesh)
  if population:
    _check_population(config, population, 'that were given')
    config = dataclasses.replace(config, data=limits.filled(config.data))
  else:
    config, population = _load_people(config, model.tokenizer)
  tokens = cast(int, config.data.row_tokens)
  base_model.check_positions(model, f'config.data.row_tokens={tokens}', tokens)
  evaluation, answers = _evaluation_sets(config, population, model.tokenizer)
  return Experiment(
    config=config,
    model=model,
    population=population,
    evaluation=evaluation,
    rules=build.make_rules(config, model.loss),
    mesh=mesh,
    answers=answers,
  )


def start(x: Experiment, config: Config) -> Start:
  """Returns where a run of this experiment begins.

  Args:
    x: the experiment.
    config: that of `x`, but for fields that may vary (`config.VARIES`).
  """
  rank_N = build.draw_ranks(config, x.population.num_examples)
  state = build.init_state(config, x.model.dims, x.model.params, rank_N, x.rules)
  return Start(rank_N, state, build.make_hyperparameters(config))


def describe(x: Experiment) -> dict[str, Any]:
  """Returns what summary.json says of an experiment."""
  identity, r_max = x.model.identity, np.array([[x.config.federated.r_max]])
  return {
    'model': x.config.model.source,
    **{f'{of}_revision': commit for of, commit in x.revisions.items() if commit},
    'model_fingerprint': identity['sha256'],
    'dtype': identity['dtype'],
    'training_people': len(x.population.client_ids),
    'unseen_people': len(x.population.groups['unseen'].ids),
    **coverage.summary(x.coverage),
    'base_parameters': base_size(x)[0],
    'adapter_parameters_r_max': traffic.lora_parameters(r_max, x.model.dims),
  }


def base_size(x: Experiment) -> tuple[int, int]:
  """Counts the parameters of the base model, and the rows that they make."""
  leaves = jax.tree.leaves(x.model.params)
  return sum(x.size for x in leaves), sum(x.size // x.shape[-1] for x in leaves)


def make_cohort(x: Experiment, seed: int, round: int, only: slice) -> Cohort:
  """Builds some clients of the cohort of a round, in numpy.

  A cohort is a function of (seed, round).
  """
  c = x.config
  draw = cohorts.Draw(
    federated=c.federated,
    shape=packing.batch_shape(c.data, c.federated.local_batch),
    count=c.methods.count_examples,
    pooled='pools data' in c.traits,
    pad_to=build.clients_at_once(c)[1],
  )
  return cohorts.make_cohort(x.population, draw, seed=seed, round=round, only=only)
