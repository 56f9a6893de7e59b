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

from hetlora_jax import (
  client,
  lora,
  optimizers,
  prng,
  ranks,
  robust,
  server,
  sharding,
  wire,
)
from hetlora_jax.config import FIELDS, SCALE_RULES, Config, ConfigError
from hetlora_jax.fields import lookup
from hetlora_jax.methods import registry, tail
from hetlora_jax.methods.registry import Rule
from hetlora_jax.types import (
  Adapters,
  Array,
  Deltas,
  Hyperparameters,
  Lora,
  Loss,
  Memory,
  PyTree,
  Redistributed,
  Rules,
  ServerState,
)


def _scale(rank_G: Array, hyper: Hyperparameters, *, power: float) -> Array:
  """Returns scale / r**power, for the mean rank of a client's matrices."""
  mean_rank = jnp.maximum(rank_G.astype(jnp.float32).mean(), 1)
  return hyper.lora_scale / mean_rank**power


def _bound_rule(config: Config, role: str) -> Callable:
  """Returns a rule's function, given the fields that its keywords are named after.

  They may be any of `config.methods` and `config.lora`.
  """
  rule, traits = config.rules[role], config.traits
  function = rule.function
  wanted = {
    name
    for name, p in inspect.signature(function).parameters.items()
    if p.kind == p.KEYWORD_ONLY and p.default is p.empty
  }
  known = dataclasses.asdict(config.lora) | dataclasses.asdict(config.methods)
  known['on_wire'] = functools.partial(
    wire.rounded, factors='ab', rounding=_rounding(config)
  )
  if unknown := wanted - set(known):
    raise ConfigError(
      f'the {role} {rule.name!r} has the keyword {unknown.pop()!r}, which '
      'is no field of config.methods or config.lora: name it after one, or give it a '
      'default.'
    )
  bound = functools.partial(function, **{name: known[name] for name in wanted})
  wanted_of = _WANTED.get(role)
  if not wanted_of:
    return bound

  @functools.wraps(function)
  def checked(*args):
    out = bound(*args)
    _check_shapes(rule, *wanted_of(traits, out, *args))
    return out

  return checked


def _product_shapes(adapters: Adapters) -> Deltas:
  """Returns arrays of the shapes of the products: target -> [L, d_in, d_out]."""
  return jax.eval_shape(lambda: {t: x.a @ x.b for t, x in adapters.items()})


# role -> (traits, what a rule returned, *its arguments) -> that, and what is like it.
_WANTED = {
  'pruning': lambda traits, out, before, trained, rank, hyper: (out, rank),
  'weighting': lambda traits, out, num_examples, masks, norms: (out, masks),
  'aggregation': lambda traits, out, updates, weights, server: (
    out,
    _product_shapes(server.adapters) if 'product space' in traits else server.adapters,
  ),
  'redistribution': lambda traits, out, aggregate, error, server, hyper: (
    out.adapters if isinstance(out, Redistributed) else {},
    server.adapters,
  ),
}


def _check_shapes(rule: Rule, found: PyTree, wanted: PyTree) -> None:
  """Raises ConfigError, which names the rule, if it returned what does not fit."""
  told = [
    {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    for leaves in map(jax.tree_util.tree_leaves_with_path, (found, wanted))
  ]
  for path in sorted(set(told[0]) | set(told[1])):
    shape, want = (x.get(path, 'nothing') for x in told)
    if shape != want:
      raise ConfigError(
        f'the {rule.role} {rule.name!r} returns {shape} where {want} must be'
        f'{f" (at {path})" if path else ""}: see what a rule of its role returns, '
        'docs/howto/own_rule.md.'
      )


def _scale_carriers(config: Config) -> tuple[float, float]:
  """Returns how much of a change of the LoRA scale A and B each take up.

  Adapters whose product is averaged and factored anew must keep their product
  when they move between scales; of others `lora.fold_scale` decides.
  """
  power_a = registry.power_of_a(config.rules)
  if power_a is None:
    return (0.5, 0.5) if config.lora.fold_scale else (0.0, 0.0)
  return power_a, 1 - power_a


def clients_at_once(config: Config) -> tuple[int, int]:
  """Returns how many clients all devices train at once, and a round's in all.

  The second includes padding. A client that trains the base is a copy of it, so
  a device trains one at a time unless told otherwise.
  """
  f, traits = config.federated, config.traits
  clients = 1 if 'pools data' in traits else f.clients_per_round
  at_once = f.clients_at_once or (1 if 'trains base' in traits else None)
  return sharding.chunks(clients, at_once, config.mesh.clients)


def _rounding(config: Config) -> wire.Rounding | None:
  """Returns how values are rounded on their way, if anything is sent and is."""
  kind = wire.TYPES[config.communication.wire_dtype]
  return None if 'pools data' in config.traits else kind.round


def _wire(config: Config, trainable: Callable) -> wire.Wire:
  """Returns what the wire does to messages; nothing if no value is rounded."""
  rounding, traits = _rounding(config), config.traits
  if not rounding:
    return wire.Wire()
  own = config.rules['personal'].own_factors
  up = tuple(f for f in 'ab' if f not in own)
  known = {'a': 'fixed A' in traits, 'b': False}  # to clients, without being sent
  fresh = 'fresh factors' in traits
  return wire.make(
    rounding,
    trainable,
    down=() if fresh else tuple(f for f in up if not known[f]),
    up=up,
    fresh=fresh,
    base='trains base' in traits,
    feedback=config.communication.error_feedback,
  )


def _tamper(config: Config) -> Callable:
  """Returns what clients do to their change before they send it."""
  f = config.faults
  if not f.malicious:
    return lambda received, trained, client_id, seed: trained
  return functools.partial(
    robust.scaled_by_malicious, share=f.malicious, scale=f.malicious_scale
  )


def _norm_bound(config: Config) -> Callable:
  """Returns what the server does to a change before it looks at it."""
  norm = config.federated.norm_bound
  if norm is None:
    return lambda received, trained: trained
  return functools.partial(robust.bounded, norm=norm)


def _client_optimizer(config: Config) -> Callable:
  """Returns (hyper, round) -> the optimizer of that round's local steps."""
  o, full = config.client_optimizer, 'trains base' in config.traits
  by_round = optimizers.over_rounds(o.schedule, config.decay_rounds, o.warmup_rounds)
  steps = config.federated.num_steps('pools data' in config.traits)
  by_step = optimizers.SCHEDULES[o.local_schedule](steps)

  def client_optimizer(hyper: Hyperparameters, round: Array):
    rate = hyper.full_learning_rate if full else hyper.client_learning_rate
    if o.schedule != 'constant' or o.warmup_rounds:
      rate = rate * by_round(round)
    of_step = rate if o.local_schedule == 'constant' else lambda i: rate * by_step(i)
    chain = [optimizers.CLIENT[o.name](of_step, o.weight_decay)]
    if o.clip_norm is not None:
      chain.insert(0, optax.clip_by_global_norm(o.clip_norm))
    if o.b_rate_ratio != 1:
      chain.append(optimizers.faster_b(o.b_rate_ratio))
    return optax.chain(*chain) if len(chain) > 1 else chain[0]

  return client_optimizer


def make_rules(config: Config, loss: Loss) -> Rules:
  """Binds every static choice of the round."""
  m, traits = config.methods, config.traits
  at_once, clients = clients_at_once(config)
  trainable = _bound_rule(config, 'trainable')
  return Rules(
    loss=loss,
    scale=functools.partial(_scale, power=SCALE_RULES[config.lora.scale_rule]),
    scale_carriers=_scale_carriers(config),
    distribute=_bound_rule(config, 'distribution'),
    personal=config.rules['personal'].own_factors,
    objective=_bound_rule(config, 'objective'),
    trainable=trainable,
    trains_base='trains base' in traits,
    client_optimizer=_client_optimizer(config),
    accumulate=config.federated.accumulate,
    tamper=_tamper(config),
    wire=_wire(config, trainable),
    bound=_norm_bound(config),
    tail_norms=tail.norms,
    prune=_bound_rule(config, 'pruning'),
    prune_against=m.prune_against,
    keep_pruned_rank=m.keep_pruned_rank,
    weigh=_bound_rule(config, 'weighting'),
    product_space='product space' in traits,
    aggregate=_bound_rule(config, 'aggregation'),
    redistribute=_bound_rule(config, 'redistribution'),
    server_optimizer=optimizers.SERVER[config.server_optimizer.name],
    clients_at_once=None if at_once == clients else at_once,
  )


def make_hyperparameters(config: Config) -> Hyperparameters:
  """Returns what may vary without recompiling, as numpy scalars."""
  types = {int: np.int32, float: np.float32}
  scalars = {}
  for path, f in FIELDS.items():
    section, _, name = path.rpartition('.')
    if traced := f.declaration.traced:
      value = config.chosen(name) if section == 'methods' else lookup(config, path)
      scalars[traced] = types[f.type](value)
  # Any seed of 32 bits.
  return Hyperparameters(**scalars | {'seed': np.uint32(config.seed)})


def draw_ranks(config: Config, num_examples_N: np.ndarray) -> np.ndarray:
  """Draws every client's rank, [N]; where all get every slot it is r_max.

  In full fine-tuning there are no adapters, and it is 0.
  """
  f, traits = config.federated, config.traits
  if 'all slots' in traits:
    rank = 0 if 'trains base' in traits else f.r_max
    return np.full(len(num_examples_N), rank, np.int32)
  return ranks.draw(
    prng.host_stream(config.seed, 'ranks'),
    len(num_examples_N),
    r_min=f.r_min,
    r_max=f.r_max,
    num_examples=num_examples_N,
    **dataclasses.asdict(config.ranks),
  )


def _residual(config: Config, dims: dict, base: PyTree) -> Deltas:
  """Returns zeros for whatever the method changes of the base, by name."""
  if 'trains base' in config.traits:
    leaves = jax.tree.leaves_with_path(base)
    return {path[-1].key: jnp.zeros(x.shape) for path, x in leaves}
  if 'folds' in config.traits:
    return {t: jnp.zeros(shape) for t, shape in dims.items()}
  return {}


def _from_peft(
  config: Config, rules: Rules, adapters: Adapters, residual: Deltas, groups
) -> tuple[Adapters, Deltas]:
  """Returns adapters and residual whose sum is that of a PEFT folder.

  Slots beyond its rank keep their A beside B = 0, so that they can be trained.
  """
  from hetlora_jax.formats import peft

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
  if 'empties' in config.traits:
    emptied = {t: Lora(x.a, jnp.zeros_like(x.b)) for t, x in adapters.items()}
    return emptied, lora.deltas(adapters, scale)
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
        | {f'lost_{f}': everybody(0 * getattr(x, f)) for f in rules.wire.remembered}
        for t, x in adapters.items()
      },
    ),
  )
  hyper = make_hyperparameters(config)
  optimizer = rules.server_optimizer(hyper.server_learning_rate)
  now = client.global_adapters(rules, state, hyper)
  moved = server.parameters(rules, now, residual)
  return dataclasses.replace(state, opt_state=optimizer.init(moved))
