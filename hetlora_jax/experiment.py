"""The host's side of a run: restore, run rounds, evaluate, log, save."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from hetlora_jax import (
  base_model,
  build,
  checkpoint,
  communication,
  console,
  metrics,
  results,
  sharding,
)
from hetlora_jax.config import Config, ConfigError, flat, to_dict
from hetlora_jax.data import cohorts, people
from hetlora_jax.evaluation import perplexity
from hetlora_jax.methods.registry import rule_names
from hetlora_jax.models import decoder
from hetlora_jax.types import Cohort, PyTree, Rules, ServerState

# A run may be continued with other values of these.
_MAY_CHANGE = (
  'federated.num_rounds', 'federated.clients_at_once', 'eval.', 'checkpoint.',
  'mesh.',
)  # fmt: skip


class Interrupted(Exception):
  """Somebody asked the run to stop; its state has been saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """Everything a run needs, built and checked; nothing written yet."""

  config: Config
  people: people.People
  base: PyTree
  dims: dict[str, tuple[int, int, int]]
  evaluation: dict[str, Cohort]  # name -> evaluation set
  hyper: Any
  initial_state: ServerState
  rules: Rules
  run_round: Callable
  evaluate: dict[str, Callable]  # name -> (base, state, cohort, hyper) -> loss
  mesh: jax.sharding.Mesh
  description: dict[str, Any]


def _packing(config: Config, examples: int) -> dict[str, int]:
  """Returns the shape of a batch of so many examples."""
  d = config.data
  room = examples * d.tokens_per_example
  row_tokens = min(d.row_tokens, room)
  return {
    'rows': math.ceil(room / row_tokens),
    'row_tokens': row_tokens,
    'num_targets': examples * d.targets_per_example,
  }


def _load_people(config: Config, words) -> people.People:
  d = config.data
  try:
    crowd = people.load(
      d.name,
      words,
      min_examples=d.min_examples,
      unseen_fraction=d.unseen_fraction,
      heldout_fraction=d.heldout_fraction,
      max_context_turns=d.context_turns,
      num_people=d.num_people,
    )
  except ValueError as error:
    raise ConfigError(f'config.data: {error}') from error
  population, wanted = len(crowd.client_ids), config.federated.clients_per_round
  if wanted > population:
    raise ConfigError(
      f'config.federated.clients_per_round={wanted} exceeds the {population} '
      f'people of {d.name!r} with data.min_examples={d.min_examples} and '
      f'data.num_people={d.num_people}: lower it.'
    )
  return crowd


def _evaluation_sets(config: Config, crowd) -> dict[str, Cohort]:
  e, out = config.eval, {}
  for name, kind in (('seen', 'heldout'), ('unseen', 'unseen')):
    out[name] = cohorts.evaluation_set(
      crowd,
      kind,
      num_people=min(e.num_people, len(crowd.groups[kind].ids)),
      examples_per_person=e.examples_per_person,
      **_packing(config, e.examples_per_person),
    )
  return out


def prepare(config: Config) -> Experiment:
  """Builds and checks everything; raises ConfigError before any writing."""
  mesh = sharding.make_mesh(config.mesh.clients, config.mesh.model)
  model = base_model.load(config, mesh)
  crowd = _load_people(config, model.tokenizer)
  dtype = base_model.compute_dtype(config)
  dims = decoder.adapter_dims(model.config, config.lora.targets)
  loss = decoder.make_loss(model.config, dtype, config.model.remat)
  rules = build.make_rules(config, loss)
  rank_N = build.draw_ranks(config, crowd.num_examples)
  state = build.init_state(config, dims, model.params, rank_N, rules)
  everywhere = sharding.replicated(mesh)
  evaluate = dict.fromkeys(
    ('seen', 'unseen'), perplexity.make_evaluate(rules, own=False)
  )
  if rules.personal:
    evaluate['seen'] = perplexity.make_evaluate(rules, own=True)
  elif config.eval.own_rank:
    evaluate['seen_own'] = perplexity.make_evaluate(rules, own=True)
  return Experiment(
    config=config,
    people=crowd,
    base=model.params,
    dims=dims,
    evaluation=jax.device_put(_evaluation_sets(config, crowd), everywhere),
    hyper=jax.device_put(build.make_hyperparameters(config), everywhere),
    initial_state=jax.device_put(state, sharding.by_name(mesh, state)),
    rules=rules,
    run_round=build.make_round(rules, mesh, state),
    evaluate=evaluate,
    mesh=mesh,
    description={
      'model': config.model.source,
      'model_fingerprint': model.fingerprint,
      'dtype': dtype.name,
      'training_people': len(crowd.client_ids),
      'unseen_people': len(crowd.groups['unseen'].ids),
      'base_parameters': sum(x.size for x in jax.tree.leaves(model.params)),
      'adapter_parameters_r_max': communication.lora_parameters(
        np.array([[config.federated.r_max]]), dims
      ),
    },
  )


def make_cohort(x: Experiment, round_number: int) -> Cohort:
  """Builds and places the cohort of a round: a function of (seed, round)."""
  f, m = x.config.federated, x.config.methods
  pooled = rule_names(x.config)['cohort'] == 'pooled'
  multiple = math.lcm(x.config.mesh.clients, f.clients_at_once or 1)
  clients = 1 if pooled else f.clients_per_round
  cohort = cohorts.make_cohort(
    x.people,
    seed=x.config.seed,
    round=round_number,
    clients_per_round=f.clients_per_round,
    local_steps=f.local_steps,
    local_batch=f.local_batch,
    sampling=f.sampling,
    min_steps=f.min_local_steps or f.local_steps,
    count=m.count_examples,
    pooled=pooled,
    pad_to=math.ceil(clients / multiple) * multiple,
    **_packing(x.config, f.local_batch),
  )
  return jax.device_put(cohort, sharding.over_clients(x.mesh))


def _cohorts_ahead(x: Experiment, first: int, last: int) -> Iterator[Cohort]:
  """Builds the next round's cohort while this round runs."""
  if first >= last:
    return
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    coming = pool.submit(make_cohort, x, first)
    for round_number in range(first + 1, last + 1):
      ready = coming.result()
      if round_number < last:
        coming = pool.submit(make_cohort, x, round_number)
      yield ready


def evaluate(x: Experiment, state: ServerState) -> metrics.Row:
  """Returns loss and perplexity of seen and unseen people."""
  row = {}
  for name, function in x.evaluate.items():
    cohort = x.evaluation[name.removesuffix('_own')]
    loss = float(function(x.base, state, cohort, x.hyper))
    row[f'eval/{name}/loss'] = loss
    row[f'eval/{name}/perplexity'] = math.exp(min(loss, 700.0))
  return row


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
  """Raises if the run in `workdir` was made with another configuration."""
  path = workdir / 'config.json'
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f'--workdir={workdir} is a file: name a folder.')
  if not path.exists():
    return
  try:
    old = flat(json.loads(path.read_text()))
  except ValueError as error:
    raise ConfigError(
      f'{path} is damaged ({error}): use another --workdir.'
    ) from error
  new = flat(json.loads(json.dumps(to_dict(config))))
  for name in sorted(set(old) | set(new)):
    if old.get(name) != new.get(name) and not name.startswith(_MAY_CHANGE):
      raise ConfigError(
        f'--workdir={workdir} holds a run with config.{name}='
        f'{old.get(name)!r}, not {new.get(name)!r}: use another --workdir, or '
        'the old value to continue it.'
      )


def run(config: Config, workdir: pathlib.Path, command: str = '') -> dict:
  """Runs or continues an experiment and returns its summary.

  Args:
    config: what to run.
    workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/,
      summary.json and curves.png; an earlier run in it is continued.
    command: how to repeat it, for the summary.

  Raises:
    ConfigError: the experiment cannot run; nothing has been written.
    Interrupted: Ctrl-C or SIGTERM; the state has been saved.
  """
  check_workdir(config, workdir)
  started = time.time()
  console.say(
    f'Loading {config.model.source} and {config.data.name}; the first time '
    'takes a while.'
  )
  x = prepare(config)
  console.say(_introduction(x))
  workdir.mkdir(parents=True, exist_ok=True)
  metrics.write_json(workdir / 'config.json', to_dict(config))
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', config.checkpoint.keep
  )
  try:
    state = checkpoints.restore(x.initial_state)
    first = 0 if state is None else int(state.round)
    state = x.initial_state if state is None else state
    if first:
      console.say(f'Continuing after round {first} of {workdir}.')
    # Rows up to the restored round were written before its checkpoint.
    writer = metrics.Writer(workdir, first + 1 if first else 0)
    try:
      state = _run_rounds(x, state, first, writer, checkpoints)
    finally:
      writer.close()
  finally:
    checkpoints.close()
  summary = results.summarise(x, writer.rows, time.time() - started, command)
  metrics.write_json(workdir / 'summary.json', summary)
  title = f'{config.method}: {config.model.source} on {config.data.name}'
  metrics.plot(writer.rows, workdir / 'curves.png', title)
  return summary


def evaluate_checkpoint(config: Config, workdir: pathlib.Path) -> metrics.Row:
  """Evaluates the newest checkpoint of a run."""
  if not (workdir / 'checkpoints').is_dir():
    raise ConfigError(f'--workdir={workdir} holds no checkpoints: train first.')
  check_workdir(config, workdir)
  x = prepare(config)
  checkpoints = checkpoint.Checkpoints(
    workdir / 'checkpoints', config.checkpoint.keep
  )
  state = checkpoints.restore(x.initial_state)
  checkpoints.close()
  if state is None:
    raise ConfigError(f'{workdir}/checkpoints is empty: train first.')
  return {'round': int(state.round), **evaluate(x, state)}


def _introduction(x: Experiment) -> str:
  rank_N, d = np.asarray(x.initial_state.memory.rank), x.description
  they = f'of rank {rank_N.min()} to {rank_N.max()} (mean {rank_N.mean():.1f})'
  if not rank_N.any():
    they = f'who train all {d["base_parameters"]:,} parameters'
  return (
    f'{x.config.method} on {x.config.data.name}: {d["training_people"]} people '
    f'{they}, '
    f'{d["unseen_people"]} more never trained on; {d["model"]} in {d["dtype"]} '
    f'on {x.mesh.size} {jax.default_backend()} device(s). The first evaluation '
    'and round include compiling.'
  )


def _run_rounds(x, state, first: int, writer, checkpoints) -> ServerState:
  """Runs the rounds that remain."""
  last, every = x.config.federated.num_rounds, x.config.eval.every
  progress = console.Progress(min(first, last), last)
  with console.StopSignal() as stop, console.background() as in_background:
    if not any('eval/seen/loss' in row for row in writer.rows):
      row = {'round': first, **evaluate(x, state)}
      writer.write(row)
      progress.update(row)
    free = time.perf_counter()  # when the devices had last finished
    for done, cohort in enumerate(_cohorts_ahead(x, first, last), first + 1):
      start = time.perf_counter()
      state, out = in_background(
        lambda s, c: jax.block_until_ready(x.run_round(x.base, s, c, x.hyper)),
        state,
        cohort,
      )
      waited, free = start - free, time.perf_counter()
      out = jax.device_get(out)
      row = results.round_row(x, done, out, free - start, waited)
      results.cumulate(row, writer.rows)
      if done == last or (every and done % every == 0):
        row |= evaluate(x, state)
        free = time.perf_counter()
      writer.write(row)
      progress.update(row)
      due = done == last or done % x.config.checkpoint.every == 0
      if due or stop.received:
        checkpoints.save(state)
      if stop.received and done < last:
        progress.close()
        raise Interrupted(f'Stopped after round {done} of {last}.')
  progress.close()
  return state
