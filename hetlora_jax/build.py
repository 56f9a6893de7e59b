"""From a checked Config to pure functions and arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hetlora_jax import client, lora, prng, ranks, rounds, sharding
from hetlora_jax.config import ROLES, SCALE_RULES, Config, rule_names
from hetlora_jax.methods import tail
from hetlora_jax.types import (
  Array,
  Hyperparameters,
  Loss,
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


def make_scale(config: Config):
  """Returns the rule of the LoRA scale: (rank [G], hyper) -> []."""
  return functools.partial(_scale, power=SCALE_RULES[config.lora.scale_rule])


def make_rules(config: Config, loss: Loss) -> rounds.Rules:
  """Binds every static choice of the round."""
  names, m = rule_names(config), config.methods
  rule = {role: ROLES[role][names[role]] for role in ROLES}
  decay = config.client_optimizer.weight_decay
  make_client_optimizer = _CLIENT_OPTIMIZERS[config.client_optimizer.name]
  return rounds.Rules(
    scale=make_scale(config),
    distribute=rule['distribution'],
    local_update=functools.partial(
      client.local_update,
      loss,
      rule['objective'](m.tail_rounding),
      lambda learning_rate: make_client_optimizer(learning_rate, decay),
    ),
    tail_norms=functools.partial(tail.norms, rounding=m.tail_rounding),
    prune=rule['pruning'](m.tail_rounding),
    prune_against=m.prune_against,
    keep_pruned_rank=m.keep_pruned_rank,
    weigh=rule['weighting'](m.weight_scope),
    aggregate=rule['aggregation'],
    redistribute=rule['redistribution'],
    server_optimizer=_SERVER_OPTIMIZERS[config.server_optimizer.name],
    clients_at_once=config.federated.clients_at_once,
  )


def make_hyperparameters(config: Config) -> Hyperparameters:
  """Returns what may vary without recompiling, as numpy scalars."""
  return Hyperparameters(
    seed=np.uint32(config.seed),
    client_learning_rate=np.float32(config.client_optimizer.learning_rate),
    server_learning_rate=np.float32(config.server_optimizer.learning_rate),
    tail_penalty=np.float32(config.federated.tail_penalty),
    gamma=np.float32(config.federated.gamma),
    r_min=np.int32(config.federated.r_min),
    lora_scale=np.float32(config.lora.scale),
  )


def draw_ranks(config: Config, population: int) -> np.ndarray:
  """Draws every person's rank, [N]."""
  r = config.ranks
  return ranks.draw(
    prng.host_stream(config.seed, 'ranks'),
    population,
    distribution=r.distribution,
    r_min=config.federated.r_min,
    r_max=config.federated.r_max,
    exponent=r.exponent,
    explicit=r.explicit,
    tiers=r.tiers,
    tier_fractions=r.tier_fractions,
  )


def init_state(
  config: Config, dims: dict, rank_N: np.ndarray, rules: rounds.Rules
) -> ServerState:
  """Returns the state before round 0."""
  key = prng.stream(config.seed, 'adapters')
  adapters = lora.init(key, dims, config.federated.r_max, config.lora.init)
  groups = ranks.num_groups(adapters, config.methods.prune_scope)
  rank_NG = np.repeat(rank_N[:, None], groups, axis=1)
  optimizer = rules.server_optimizer(config.server_optimizer.learning_rate)
  return ServerState(
    round=jnp.int32(0),
    adapters=adapters,
    opt_state=optimizer.init(adapters),
    rank=jnp.asarray(rank_NG),
    tail_norm=jnp.zeros(rank_NG.shape),
  )


def make_round(rules: rounds.Rules, mesh):
  """Jits the round on a mesh, donating the state."""
  everywhere = sharding.replicated(mesh)
  return jax.jit(
    functools.partial(rounds.federated_round, rules),
    in_shardings=(None, everywhere, sharding.over_clients(mesh), everywhere),
    out_shardings=everywhere,
    donate_argnums=(1,),
  )
