"""What a configuration must fulfil: choices, bounds, and what fits together.

The functions take a `config.Config`; `config.resolve` calls `check`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from hetlora_jax import lora, ranks
from hetlora_jax.data import partition
from hetlora_jax.methods import aggregation, pruning, registry, tail, weighting
from hetlora_jax.models import decoder, shapes


class ConfigError(ValueError):
  """A configuration that cannot run; the message names field and remedy."""


SCALE_RULES = {'constant': 0.0, 'alpha_over_r': 1.0, 'alpha_over_sqrt_r': 0.5}
WIRE_DTYPES = {'float32': 4, 'bfloat16': 2, 'float16': 2, 'int8': 1}
DTYPES = ('auto', 'float32', 'bfloat16')
CLIENT_OPTIMIZERS = ('adam', 'adamw', 'sgd')
SERVER_OPTIMIZERS = ('sgd', 'momentum', 'adam', 'yogi')
_CHOICES = {
  'method': registry.METHODS,
  'federated.sampling': ('uniform', 'by_size'),
  'ranks.distribution': ranks.DISTRIBUTIONS,
  **{f'methods.{role}': table for role, table in registry.ROLES.items()},
  'methods.tail_rounding': tail.ROUNDINGS,
  'methods.prune_scope': ('client', 'matrix'),
  'methods.prune_against': pruning.REFERENCES,
  'methods.weight_scope': weighting.SCOPES,
  'methods.count_examples': ('dataset', 'round'),
  'lora.scale_rule': SCALE_RULES,
  'lora.init': lora.INITS,
  'client_optimizer.name': CLIENT_OPTIMIZERS,
  'server_optimizer.name': SERVER_OPTIMIZERS,
  'model.dtype': DTYPES,
  'communication.wire_dtype': WIRE_DTYPES,
  'data.partition': (partition.NATURAL, *partition.PARTITIONERS),
}
_AT_LEAST = {
  0: (
    'seed model.random.seed lora.scale federated.min_local_steps federated.dropout '
    'federated.tail_penalty federated.proximal federated.clients_at_once mesh.points_at_once '
    'ranks.exponent methods.energy client_optimizer.learning_rate '
    'client_optimizer.full_learning_rate client_optimizer.weight_decay '
    'server_optimizer.learning_rate data.num_people data.partition_seed eval.every '
    'checkpoint.keep_every federated.norm_bound faults.malicious methods.trim'
  ),
  1: (
    'federated.num_rounds federated.clients_per_round federated.local_steps '
    'federated.local_batch federated.r_min federated.r_max data.min_examples '
    'data.context_turns data.row_tokens data.tokens_per_example '
    'data.targets_per_example eval.num_people eval.examples_per_person '
    'data.copies data.partition_clients checkpoint.every checkpoint.keep mesh.sweep mesh.clients mesh.model '
    'federated.rounds_per_call model.random.width model.random.num_layers '
    'model.random.num_heads model.random.head_dim model.random.mlp_width '
    'model.random.vocab_size'
  ),
}


def _lookup(config, path: str) -> Any:
  return functools.reduce(getattr, path.split('.'), config)


def check(config) -> None:
  """Raises at the first value that cannot work."""
  for path, choices in _CHOICES.items():
    value = _lookup(config, path)
    is_the_methods = value == '' and path.removeprefix('methods.') in registry.ROLES
    if value not in choices and not is_the_methods:
      valid = ', '.join(repr(x) for x in choices)
      raise ConfigError(f'config.{path}={value!r} is unknown: one of {valid}.')
  for bound, paths in _AT_LEAST.items():
    for path in paths.split():
      value = _lookup(config, path)
      if not bound <= value < 2**31:
        raise ConfigError(
          f'config.{path}={value} must be at least {bound}, finite and below 2**31.'
        )
  for path, value, ok, remedy in _conditions(config):
    if not ok:
      raise ConfigError(f'config.{path}={value} is impossible: {remedy}.')
  names = registry.rule_names(config)
  for role, ok, why in _combinations(config):
    if not ok:
      raise ConfigError(
        f'config.methods.{role}={names[role]!r} does not fit the other rules '
        f'({", ".join(f"{r} {x!r}" for r, x in names.items() if r != role)}): '
        f'{why}.'
      )
  _check_tail(config)


# (field, value, whether it holds, what would)
_Condition = tuple[str, Any, bool, str]


def _conditions(c) -> Iterator[_Condition]:
  yield from _of_rounds(c)
  yield from _of_ranks(c)
  yield from _of_adapters(c)
  yield from _of_model(c)
  yield from _of_data(c)


def _of_rounds(c) -> Iterator[_Condition]:
  f = c.federated
  yield (
    'federated.r_min', f.r_min, f.r_min <= f.r_max,
    f'it exceeds federated.r_max={f.r_max}; lower it or raise r_max',
  )  # fmt: skip
  for name, rounds in (
    ('federated.num_rounds', f.num_rounds),
    ('eval.every', c.eval.every),
    ('checkpoint.every', c.checkpoint.every),
  ):
    yield (
      name, rounds, rounds % f.rounds_per_call == 0,
      f'it is no multiple of federated.rounds_per_call={f.rounds_per_call}',
    )  # fmt: skip
  yield 'federated.gamma', f.gamma, 0 < f.gamma <= 1, 'it must be in (0, 1]'
  yield 'federated.dropout', f.dropout, f.dropout < 1, 'it must be in [0, 1)'
  yield (
    'federated.min_local_steps', f.min_local_steps,
    f.min_local_steps <= f.local_steps,
    f'it exceeds federated.local_steps={f.local_steps}',
  )  # fmt: skip
  yield (
    'methods.energy', c.methods.energy, c.methods.energy <= 1,
    'it must be in (0, 1], or 0 for the method\'s',
  )  # fmt: skip
  yield (
    'methods.trim', c.methods.trim, c.methods.trim < 0.5,
    'it must be in [0, 0.5), or nothing is left',
  )  # fmt: skip
  yield (
    'faults.malicious', c.faults.malicious, c.faults.malicious <= 1,
    'it is a share of the people, in [0, 1]',
  )  # fmt: skip


def _of_ranks(c) -> Iterator[_Condition]:
  f, r = c.federated, c.ranks
  yield (
    'ranks.data_correlation', r.data_correlation, abs(r.data_correlation) <= 1,
    'it must be in [-1, 1]',
  )  # fmt: skip
  for name in ('explicit', 'tiers'):
    values = getattr(r, name)
    ok = values and all(1 <= x <= f.r_max for x in values)
    yield (
      f'ranks.{name}', values, r.distribution != name or bool(values and ok),
      f'every rank must be in 1..federated.r_max={f.r_max}',
    )  # fmt: skip
  fractions = r.tier_fractions
  fits = len(fractions) == len(r.tiers) and min(fractions, default=-1) >= 0
  yield (
    'ranks.tier_fractions', fractions,
    r.distribution != 'tiers' or (fits and abs(sum(fractions) - 1) < 1e-6),
    'give one for each of ranks.tiers, summing to 1',
  )  # fmt: skip


def _of_adapters(c) -> Iterator[_Condition]:
  yield (
    'lora.targets', c.lora.targets,
    bool(c.lora.targets) and set(c.lora.targets) <= set(decoder.TARGETS),
    f'name one or more of {", ".join(decoder.TARGETS)}',
  )  # fmt: skip
  start, trainable = c.lora.from_peft, registry.rule_names(c)['trainable']
  yield (
    'lora.from_peft', repr(start), not start or trainable != 'base',
    'full fine-tuning has no adapters; merge it and give that as model.source',
  )  # fmt: skip
  yield (
    'lora.scale', c.lora.scale, not start or c.lora.scale > 0,
    'at scale 0 no adapter can be that of lora.from_peft',
  )  # fmt: skip


def _of_model(c) -> Iterator[_Condition]:
  kind, colon, shape = c.model.source.partition(':')
  drawn = kind == 'random' and bool(colon)
  yield (
    'model.source', repr(c.model.source), not drawn or shape in shapes.SHAPES,
    f'published shapes are {", ".join(shapes.SHAPES)}; or give just "random"',
  )  # fmt: skip
  if drawn:
    words, most = c.model.random.vocab_size, shapes.SHAPES[shape].vocab_size
    yield (
      'model.random.vocab_size', words, words <= most,
      f'{shape} has {most} words, and the tokenizer cannot have more',
    )  # fmt: skip


def _of_data(c) -> Iterator[_Condition]:
  for name in ('unseen_fraction', 'heldout_fraction'):
    value = getattr(c.data, name)
    yield f'data.{name}', value, 0 < value < 1, 'it must be in (0, 1)'
  alpha, rule = c.data.partition_alpha, c.data.partition
  yield (
    'data.partition_alpha', alpha,
    0 < alpha < 2**31 and (rule != 'pathological' or alpha.is_integer()),
    "it must be positive, and of 'pathological' a whole number of shards",
  )  # fmt: skip
  yield (
    'data.context_turns', c.data.context_turns, c.data.context_turns <= 4,
    'the data sets keep 4 turns',
  )  # fmt: skip
  yield (
    'data.targets_per_example', c.data.targets_per_example,
    c.data.targets_per_example < c.data.tokens_per_example,
    f'it must be below data.tokens_per_example={c.data.tokens_per_example}',
  )  # fmt: skip
  yield (
    'data.row_tokens', c.data.row_tokens,
    c.data.row_tokens >= c.data.tokens_per_example,
    f'a row must hold data.tokens_per_example={c.data.tokens_per_example}',
  )  # fmt: skip


def _combinations(c) -> Iterator[tuple[str, bool, str]]:
  """Yields (role, whether its rule fits the others, why not)."""
  n = registry.rule_names(c)
  product = n['aggregation'] in aggregation.PRODUCT_SPACE
  prefix = n['distribution'] in ('prefix', 'full')
  yield (
    'redistribution',
    not (product and n['redistribution'] == 'keep'),
    ('a mean of products has no factors to keep; take svd_balanced or fold_all'),
  )
  yield (
    'aggregation',
    product or n['distribution'] != 'reinit',
    ("clients that draw their own A have no factors in common; take 'product'"),
  )
  yield (
    'pruning',
    n['pruning'] == 'none' or n['distribution'] == 'prefix',
    (
      "a rank can only be given up where it decides what is sent: distribution 'prefix'"
    ),
  )
  yield (
    'objective',
    n['objective'] != 'tail_penalty' or prefix,
    ("only a prefix has a tail: distribution 'prefix' or 'full'"),
  )
  yield (
    'objective',
    n['objective'] != 'nested_prefixes' or prefix,
    ("only prefixes nest: distribution 'prefix' or 'full'"),
  )
  in_factors = n['aggregation'] == 'factors' and n['redistribution'] == 'keep'
  own = n['personal'] != 'none'
  yield (
    'personal',
    not own or (in_factors and n['distribution'] != 'reinit'),
    (
      "a client's own factor needs a basis that stays: aggregation 'factors' and "
      "redistribution 'keep'"
    ),
  )
  yield from _of_full_finetuning(n)


def _of_full_finetuning(n) -> Iterator[tuple[str, bool, str]]:
  adapters = n['trainable'] != 'base'
  yield (
    'aggregation',
    adapters or n['aggregation'] not in aggregation.UNWEIGHTED,
    ("changes of the base are summed as they come in; take 'factors'"),
  )
  yield (
    'weighting',
    adapters or n['weighting'] != 'norm',
    ("full fine-tuning has no adapters to take norms of; take 'size'"),
  )
  yield (
    'objective',
    adapters or n['objective'] in ('task', 'proximal'),
    ("full fine-tuning has no ranks; take 'task' or 'proximal'"),
  )
  yield (
    'distribution',
    adapters or n['distribution'] == 'full',
    ("full fine-tuning sends all of the model; take 'full'"),
  )
  own = n['personal'] != 'none'
  yield 'personal', adapters or not own, 'full fine-tuning has no factors'


def _check_tail(config) -> None:
  names = registry.rule_names(config)
  if 'tail_penalty' in names['objective'] or names['pruning'] == 'norm_tail':
    f = config.federated
    try:
      tail.check(range(f.r_min, f.r_max + 1), f.gamma, config.methods.tail_rounding)
    except ValueError as error:
      raise ConfigError(f'config.{error}') from error
