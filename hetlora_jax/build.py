"""From a checked Config to pure functions and arrays."""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetlora_jax import client, lora, prng, ranks, robust, rounds, server, sharding
from hetlora_jax.checks import SCALE_RULES
from hetlora_jax.config import Config, ConfigError
from hetlora_jax.formats import peft
from hetlora_jax.methods import aggregation, personal, redistribution, registry, tail
from hetlora_jax.methods.registry import ROLES, rule_names
from hetlora_jax.types import (
  Adapters,
  Array,
  Deltas,
  Hyperparameters,
  Lora,
  Loss,
  Memory,
  PyTree,
  Rules,
  Server,
  ServerState,
)

_CLIENT_OPTIMIZERS = {
  'adam': lambda lr, decay: optax.adam(lr),
  'adamw': lambda lr, decay: optax.adamw(lr, weight_decay=decay),
  'sgd': lambda lr, decay: optax.sgd(lr),
}
_SERVER_OPTIMIZERS = {
  'sgd': optax.sgd,
  'momentum': functools.partial(optax.sgd, momentum=0.9),
  'adam': functools.partial(optax.adam, b2=0.99, eps=1e-3),
  'yogi': functools.partial(optax.yogi, b2=0.99),
}


def _scale(rank_G: Array, hyper: Hyperparameters, *, power: float) -> Array:
  """Returns scale / r**power, for the mean rank of a client's matrices."""
  mean_rank = jnp.maximum(rank_G.astype(jnp.float32).mean(), 1)
  return hyper.lora_scale / mean_rank**power


def _bind(rule, **choices):
  """Gives a rule those of the static choices that it names as keywords."""
  wanted = inspect.signature(rule).parameters
  return functools.partial(
    rule, **{name: x for name, x in choices.items() if name in wanted}
  )


def _scale_carriers(config: Config) -> tuple[float, float]:
  """Returns how much of a change of the LoRA scale A and B each take up.

  Adapters whose product is averaged and factored anew must keep their product
  when they move between scales; of others `lora.fold_scale` decides.
  """
  names = rule_names(config)
  power_a = redistribution.SPLITS.get(names['redistribution'])
  if names['redistribution'] == 'fold_residual':
    power_a = 0.5 if names['aggregation'] in aggregation.PRODUCT_SPACE else None
  if power_a is None:
    return (0.5, 0.5) if config.lora.fold_scale else (0.0, 0.0)
  return power_a, 1 - power_a


def clients_at_once(config: Config) -> tuple[int, int]:
  """Returns how many clients all devices train at once, and a round's in all.

  The second includes padding. A client that trains the base is a copy of it, so
  a device trains one at a time unless told otherwise.
  """
  f, names = config.federated, rule_names(config)
  clients = 1 if names['cohort'] == 'pooled' else f.clients_per_round
  at_once = f.clients_at_once or int(names['trainable'] == 'base')
  return sharding.chunks(clients, at_once, config.mesh.clients)


def _tamper(config: Config) -> Callable:
  """Returns what clients do to their change before they send it."""
  f = config.faults
  if not f.malicious:
    return lambda received, trained, client_id, seed: trained
  return functools.partial(
    robust.scaled_by_malicious, share=f.malicious, scale=f.malicious_scale
  )


def _bound(config: Config) -> Callable:
  """Returns what the server does to a change before it looks at it."""
  norm = config.federated.norm_bound
  if not norm:
    return lambda received, trained: trained
  return functools.partial(robust.bounded, norm=norm)


def make_rules(config: Config, loss: Loss) -> Rules:
  """Binds every static choice of the round."""
  names, m = rule_names(config), config.methods
  rule = {
    role: _bind(
      ROLES[role][name],
      rounding=m.tail_rounding,
      scope=m.weight_scope,
      init=config.lora.init,
      trim=m.trim,
      power_a=redistribution.SPLITS.get(name),
    )
    for role, name in names.items()
    if callable(ROLES[role][name])
  }
  o, trains_base = config.client_optimizer, names['trainable'] == 'base'
  at_once, clients = clients_at_once(config)

  def client_optimizer(hyper: Hyperparameters):
    rate = hyper.full_learning_rate if trains_base else hyper.client_learning_rate
    return _CLIENT_OPTIMIZERS[o.name](rate, o.weight_decay)

  return Rules(
    loss=loss,
    scale=functools.partial(_scale, power=SCALE_RULES[config.lora.scale_rule]),
    scale_carriers=_scale_carriers(config),
    distribute=rule['distribution'],
    personal=personal.TABLE[names['personal']],
    objective=rule['objective'],
    trainable=rule['trainable'],
    trains_base=trains_base,
    client_optimizer=client_optimizer,
    tamper=_tamper(config),
    bound=_bound(config),
    tail_norms=functools.partial(tail.norms, rounding=m.tail_rounding),
    prune=rule['pruning'],
    prune_against=m.prune_against,
    keep_pruned_rank=m.keep_pruned_rank,
    weigh=rule['weighting'],
    product_space=names['aggregation'] in aggregation.PRODUCT_SPACE,
    aggregate=rule['aggregation'],
    redistribute=rule['redistribution'],
    server_optimizer=_SERVER_OPTIMIZERS[config.server_optimizer.name],
    clients_at_once=0 if at_once == clients else at_once,
  )


def make_hyperparameters(config: Config) -> Hyperparameters:
  """Returns what may vary without recompiling, as numpy scalars."""
  f, o = config.federated, config.client_optimizer
  return Hyperparameters(
    seed=np.uint32(config.seed),
    client_learning_rate=np.float32(o.learning_rate),
    full_learning_rate=np.float32(o.full_learning_rate),
    server_learning_rate=np.float32(config.server_optimizer.learning_rate),
    dropout=np.float32(f.dropout),
    tail_penalty=np.float32(f.tail_penalty),
    gamma=np.float32(f.gamma),
    r_min=np.int32(f.r_min),
    proximal=np.float32(f.proximal),
    energy=np.float32(config.methods.energy or registry.METHODS[config.method].energy),
    lora_scale=np.float32(config.lora.scale),
  )


def draw_ranks(config: Config, num_examples_N: np.ndarray) -> np.ndarray:
  """Draws every person's rank, [N]; where all get every slot it is r_max.

  In full fine-tuning there are no adapters, and it is 0.
  """
  r, f, names = config.ranks, config.federated, rule_names(config)
  if names['distribution'] == 'full':
    rank = 0 if names['trainable'] == 'base' else f.r_max
    return np.full(len(num_examples_N), rank, np.int32)
  return ranks.draw(
    prng.host_stream(config.seed, 'ranks'),
    len(num_examples_N),
    distribution=r.distribution,
    r_min=f.r_min,
    r_max=f.r_max,
    exponent=r.exponent,
    explicit=r.explicit,
    tiers=r.tiers,
    tier_fractions=r.tier_fractions,
    num_examples=num_examples_N,
    data_correlation=r.data_correlation,
  )


def _residual(config: Config, dims: dict, base: PyTree) -> Deltas:
  """Returns zeros for whatever the method changes of the base, by name."""
  names = rule_names(config)
  if names['trainable'] == 'base':
    leaves = jax.tree.leaves_with_path(base)
    return {path[-1].key: jnp.zeros(x.shape) for path, x in leaves}
  if names['redistribution'] in redistribution.FOLDING:
    return {t: jnp.zeros(shape) for t, shape in dims.items()}
  return {}


def _from_peft(
  config: Config, rules: Rules, adapters: Adapters, residual: Deltas, groups
) -> tuple[Adapters, Deltas]:
  """Returns adapters and residual whose sum is that of a PEFT folder.

  Slots beyond its rank keep their A beside B = 0, so that they can be trained.
  """
  folder, hyper = config.lora.from_peft, make_hyperparameters(config)
  with jax.ensure_compile_time_eval():  # a dry run only asks for shapes
    whole = jnp.full(groups, config.federated.r_max)
    scale = rules.scale(whole, hyper)
    try:
      found = peft.read(pathlib.Path(folder), adapters, float(scale))
    except (OSError, ValueError) as error:
      raise ConfigError(f'config.lora.from_peft={folder!r}: {error}') from error
  adapters = {
    t: Lora(jnp.where(live[:, None], x.a, adapters[t].a), jnp.asarray(x.b))
    for t, (x, live) in found.items()
  }
  if rule_names(config)['redistribution'] in redistribution.EMPTYING:
    start = redistribution.fold_all(adapters, {}, Server(adapters, scale), hyper)
    return start.adapters, start.fold
  return adapters, residual


def init_state(
  config: Config, dims: dict, base: PyTree, rank_N: np.ndarray, rules: Rules
) -> ServerState:
  """Returns the state before round 0.

  Args:
    config: the experiment.
    dims: target -> (num_layers, d_in, d_out).
    base: frozen parameters; only names and shapes are read.
    rank_N: everybody's rank.
    rules: of `make_rules`.
  """
  key = prng.stream(config.seed, 'adapters')
  dims = {} if rules.trains_base else dims
  adapters = lora.init(key, dims, config.federated.r_max, config.lora.init)
  groups = ranks.num_groups(adapters, config.methods.prune_scope)
  rank_NG = np.repeat(rank_N[:, None], groups, axis=1)
  residual = _residual(config, dims, base)
  if config.lora.from_peft:
    adapters, residual = _from_peft(config, rules, adapters, residual, groups)
  everybody = lambda x: jnp.repeat(x[None], len(rank_N), axis=0)  # noqa: E731
  state = ServerState(
    round=jnp.int32(0),
    adapters=adapters,
    residual=residual,
    opt_state=(),
    memory=Memory(
      rank=jnp.asarray(rank_NG),
      tail_norm=jnp.zeros(rank_NG.shape),
      personal={
        t: {f: everybody(getattr(x, f)) for f in rules.personal}
        for t, x in adapters.items()
      },
    ),
  )
  hyper = make_hyperparameters(config)
  optimizer = rules.server_optimizer(hyper.server_learning_rate)
  now = client.global_adapters(rules, state, hyper)
  moved = server.parameters(rules, now, residual)
  return dataclasses.replace(state, opt_state=optimizer.init(moved))


def make_rounds(rules: Rules, mesh, state: ServerState, points_at_once=1):
  """Jits many rounds of many points on a mesh, donating the state.

  Args:
    rules: the method's.
    mesh: the devices.
    state: of all points, leaves [K, ...]; only shapes are read.
    points_at_once: how many points a device vmaps; 0 is all of its own.

  Returns:
    (base, state, cohorts, hyper) -> (state, metrics), where the leaves of
    `state` and `hyper` are [K, ...], of `cohorts` [rounds, K, C, ...] and of
    the metrics [rounds, K, ...].
  """
  everywhere = sharding.replicated(mesh)
  state_sharding = sharding.by_name(mesh, state, points=True)
  one_round = sharding.each_point(
    mesh,
    functools.partial(rounds.federated_round, rules),
    (None, 0, 0, 0),
    points_at_once,
  )

  def many_rounds(base, state, cohorts, hyper):
    def step(state, cohort):
      return one_round(base, state, cohort, hyper)

    return jax.lax.scan(step, state, cohorts)

  return jax.jit(
    many_rounds,
    in_shardings=(
      None, state_sharding, sharding.over_clients(mesh),
      sharding.over_points(mesh),
    ),
    out_shardings=(state_sharding, everywhere),
    donate_argnums=(1,),
  )  # fmt: skip
