"""The border: a ConfigDict in, frozen dataclasses out, or an error at once.

No defaults live here; `configs/default.py` has every number.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from typing import Any

import ml_collections

from hetlora_jax import checks, files
from hetlora_jax.checks import ConfigError

_record = dataclasses.dataclass(frozen=True, kw_only=True)


@_record
class Federated:
  num_rounds: int
  clients_per_round: int
  sampling: str
  local_steps: int
  local_batch: int
  min_local_steps: int
  dropout: float
  r_min: int
  r_max: int
  gamma: float
  tail_penalty: float
  proximal: float
  norm_bound: float
  clients_at_once: int
  rounds_per_call: int


@_record
class Ranks:
  distribution: str
  exponent: float
  explicit: tuple[int, ...]
  tiers: tuple[int, ...]
  tier_fractions: tuple[float, ...]
  data_correlation: float


@_record
class Methods:
  distribution: str
  objective: str
  trainable: str
  personal: str
  pruning: str
  weighting: str
  aggregation: str
  redistribution: str
  cohort: str
  energy: float
  count_examples: str
  tail_rounding: str
  prune_scope: str
  prune_against: str
  keep_pruned_rank: bool
  weight_scope: str
  trim: float


@_record
class Faults:
  malicious: float
  malicious_scale: float


@_record
class LoraConfig:
  targets: tuple[str, ...]
  scale: float
  scale_rule: str
  fold_scale: bool
  init: str
  from_peft: str


@_record
class ClientOptimizer:
  name: str
  learning_rate: float
  full_learning_rate: float
  weight_decay: float


@_record
class ServerOptimizer:
  name: str
  learning_rate: float


@_record
class RandomModel:
  seed: int
  width: int
  num_layers: int
  num_heads: int
  head_dim: int
  mlp_width: int
  vocab_size: int


@_record
class Model:
  source: str
  dtype: str
  remat: bool
  random: RandomModel


@_record
class Data:
  name: str
  path: str
  partition: str
  partition_clients: int
  partition_alpha: float
  partition_seed: int
  min_examples: int
  num_people: int
  copies: int
  unseen_fraction: float
  heldout_fraction: float
  context_turns: int
  row_tokens: int
  tokens_per_example: int
  targets_per_example: int


@_record
class Eval:
  every: int
  num_people: int
  examples_per_person: int
  own_rank: bool


@_record
class Checkpoint:
  every: int
  keep: int
  keep_every: int


@_record
class Communication:
  wire_dtype: str


@_record
class Mesh:
  points_at_once: int
  sweep: int
  clients: int
  model: int


@_record
class Config:
  """A whole experiment; `to_dict` of it is `config.json`."""

  seed: int
  method: str
  federated: Federated
  ranks: Ranks
  methods: Methods
  faults: Faults
  lora: LoraConfig
  client_optimizer: ClientOptimizer
  server_optimizer: ServerOptimizer
  model: Model
  data: Data
  eval: Eval
  checkpoint: Checkpoint
  communication: Communication
  mesh: Mesh


def build(raw: ml_collections.ConfigDict) -> Config:
  """Turns a ConfigDict into a Config of the right types, values unchecked."""
  if not hasattr(raw, 'to_dict'):  # one of a file that is absent raises here
    raise ConfigError(
      f'--config gives a {type(raw).__name__}: its get_config() must return a '
      'ConfigDict; start from configs/default.py.'
    )
  return _build(Config, raw.to_dict(), '')


def resolve(raw: ml_collections.ConfigDict) -> Config:
  """Turns a ConfigDict into a checked Config, or raises ConfigError."""
  config = build(raw)
  checks.check(config)
  return config


def to_dict(config: Config) -> dict[str, Any]:
  """Returns plain nested dicts, as written to `config.json`."""
  return dataclasses.asdict(config)


def flat(tree: dict, prefix: str = '') -> dict[str, Any]:
  """Joins the keys of nested dicts with dots.

  >>> flat({'seed': 0, 'lora': {'scale': 2.0}})
  {'seed': 0, 'lora.scale': 2.0}
  """
  out = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      out.update(flat(value, f'{prefix}{name}.'))
    else:
      out[prefix + name] = value
  return out


def _build(cls, values: dict, prefix: str):
  hints = typing.get_type_hints(cls)
  if not isinstance(values, dict):
    raise ConfigError(
      f'config.{prefix.rstrip(".")}={files.short(repr(values))} is no section: '
      'start from configs/default.py, which has every field.'
    )
  for name in values:
    if name not in hints:
      close = difflib.get_close_matches(name, hints, 1, 0)
      raise ConfigError(
        f'config.{prefix}{name} does not exist; did you mean config.{prefix}{close[0]}?'
      )
  missing = sorted(set(hints) - set(values))
  if missing:
    raise ConfigError(f'config.{prefix}{missing[0]} is missing: start from '
                      'configs/default.py, which has every field.')  # fmt: skip
  return cls(**{n: _typed(hints[n], values[n], f'{prefix}{n}') for n in hints})


def _typed(hint, value, name: str):
  """Checks one value's type; an int may stand for a float."""
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, f'{name}.')
  if typing.get_origin(hint) is tuple:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(_typed(typing.get_args(hint)[0], v, name) for v in values)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  small = isinstance(value, float) or (is_number and abs(value) < 2**63)
  if hint is float and is_number and small:
    return float(value)
  is_whole = is_number and (isinstance(value, int) or value.is_integer())
  if hint is int and is_whole:
    return int(value)
  if hint in (str, bool) and isinstance(value, hint):
    return value
  raise ConfigError(
    f'config.{name}={files.short(repr(value))} is of type '
    f'{type(value).__name__}: give '
    f'{"an" if hint is int else "a"} {hint.__name__}.'
  )


def glosses() -> dict[str, str]:
  """Returns field -> the comment above it in configs/default.py."""
  from configs import default

  section, out, comment = {'c': ''}, {}, ''
  for line in inspect.getsource(default.get_config).splitlines():
    line = line.strip()
    names = re.match(r'([\w.]+) =', line)
    path = re.search(r'(?:= |^)(\w+)\.(\w+) = ', line)
    if line.startswith('# '):
      comment = f'{comment} {line[2:]}'.strip()
    elif names and path:
      full = section[path[1]] + path[2]
      if 'ConfigDict' in line:
        section[names[1]] = f'{full}.'
      else:
        out[full] = comment
      comment = ''
  return out
