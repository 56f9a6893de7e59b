"""How a configuration is declared: sections of fields that say all about themselves.

@section
class Federated:
  gamma: float = field(0.99, 'Decay factor ...', above=0, at_most=1, traced='gamma')

Defaults, types, checks, `--print_config`, the documentation and what a sweep may vary
without recompiling follow from the declaration.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from hetlora_jax import files


class ConfigError(ValueError):
  """A configuration that cannot run; the message names field, value and remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declaration:
  """What a field says besides its type and default."""

  help: str  # what it means, a whole sentence or more
  at_least: float | None = None
  above: float | None = None
  at_most: float | None = None
  below: float | None = None
  choices: Collection[str] | None = None
  finite: bool = True  # and below 2**31
  varies: bool = False  # points of one compiled program may differ in it
  changeable: bool = False  # a run may be continued with another value
  traced: str = ''  # its name in `types.Hyperparameters`; it varies then

  def range(self) -> str:
    """Renders the bounds: 'at least 1', 'in (0, 1]'; '' without any."""
    low = self.above if self.at_least is None else self.at_least
    high = self.below if self.at_most is None else self.at_most
    if high is not None:
      left, right = '(['[self.above is None], ')]'[self.below is None]
      return f'in {left}{-math.inf if low is None else low}, {high}{right}'
    if low is None:
      return ''
    return f'{"at least" if self.above is None else "above"} {low}'

  def holds(self, value: float) -> bool:
    """Tells whether a number is finite, below 2**31, and within the bounds."""
    return (
      (abs(value) < 2**31 or not self.finite)
      and (self.at_least is None or value >= self.at_least)
      and (self.above is None or value > self.above)
      and (self.at_most is None or value <= self.at_most)
      and (self.below is None or value < self.below)
    )


def field(default: Any, help: str, **facts: Any) -> Any:
  """Declares a field; `facts` are those of `Declaration`."""
  declaration = Declaration(help=help, **facts)
  return dataclasses.field(default=default, metadata={'declaration': declaration})


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls):
  """Makes a class a section: frozen, with keywords only."""
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class Field(NamedTuple):
  """A field of a whole configuration."""

  type: Any  # int, float, str, bool or a tuple of one of them
  optional: bool  # whether it may be None
  default: Any
  declaration: Declaration


@functools.cache
def declared(cls, prefix: str = '') -> dict[str, Field]:
  """Returns the fields of a section and of those in it, by path, in order."""
  out = {}
  hints = typing.get_type_hints(cls)
  for f in dataclasses.fields(cls):
    hint, path = hints[f.name], prefix + f.name
    if dataclasses.is_dataclass(hint):
      out |= declared(hint, f'{path}.')
    else:
      optional = isinstance(hint, types.UnionType)
      kind = typing.get_args(hint)[0] if optional else hint
      out[path] = Field(kind, optional, f.default, f.metadata['declaration'])
  return out


def config_dict_of(cls) -> ConfigDict:
  """Returns a ConfigDict of the defaults, whose None may be given a value by flag."""
  values = {}
  for path, f in declared(cls).items():
    # A reference to any object can also be given None by a flag.
    kind = str if f.type is str else object
    reference = config_dict.FieldReference(f.default, field_type=kind)
    values[path] = reference if f.optional else f.default
  return ConfigDict(nested(values)).lock()


def build(cls, values: Mapping, prefix: str = ''):
  """Makes a section of nested dicts, which have all of its fields.

  Raises:
    ConfigError: a field is unknown (with the nearest), missing, or of another type.
  """
  hints = typing.get_type_hints(cls)
  if not isinstance(values, Mapping):
    raise ConfigError(
      f'config.{prefix.rstrip(".")}={files.short(repr(values))} is no section: '
      'start from configs/default.py, which has every field.'
    )
  for name in values:
    if name not in hints:
      known = declared(cls, prefix)
      raise ConfigError(
        f'config.{prefix}{name} does not exist{remedy(prefix + name, known)}'
      )
  missing = sorted(set(hints) - set(values))
  if missing:
    raise ConfigError(
      f'config.{prefix}{missing[0]} is missing: start from configs/default.py, which '
      'has every field.'
    )
  own = declared(cls)
  return cls(**{
    name: build(hint, values[name], f'{prefix}{name}.')
    if dataclasses.is_dataclass(hint)
    else _typed(own[name], values[name], f'{prefix}{name}')
    for name, hint in hints.items()
  })  # fmt: skip


_ALIKE = 0.65  # from which on one word is likely to mean another
# Fields that are gone -> what to do instead.
GONE = {'methods.tail_rounding': 'gamma r is always rounded down; leave it out'}


def remedy(path: str, known: Collection[str]) -> str:
  """Ends the sentence that a field does not exist, with what to do."""
  if path in GONE:
    return f': {GONE[path]}.'
  near = meant(path, known)
  return f'; did you mean config.{near}?' if near else '.'


def meant(path: str, known: Collection[str]) -> str | None:
  """Returns what somebody is likely to have meant, by the whole path or its last name."""

  def likeness(other: str) -> float:
    pairs = (path, other), (path.rpartition('.')[2], other.rpartition('.')[2])
    return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

  near = max(known, key=likeness)
  return near if likeness(near) > _ALIKE else None


def _typed(f: Field, value: Any, path: str) -> Any:
  """Returns a value as its type; an int may stand for a float."""
  if f.optional and value in (None, 'None'):
    return None
  if typing.get_origin(f.type) is tuple:
    one = f._replace(type=typing.get_args(f.type)[0])
    values = value if isinstance(value, (tuple, list)) else (value,)
    if one.type is str:  # 'q,v' of a flag
      values = [
        w for v in values for w in (v.split(',') if isinstance(v, str) else [v])
      ]
    return tuple(_typed(one, v, path) for v in values)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  small = isinstance(value, float) or (is_number and abs(value) < 2**63)
  if f.type is float and is_number and small:
    return float(value)
  if f.type is int and is_number and (isinstance(value, int) or value.is_integer()):
    return int(value)
  if f.type in (str, bool) and isinstance(value, f.type):
    return value
  raise ConfigError(
    f'config.{path}={files.short(repr(value))} is of type {type(value).__name__}: '
    f'give {"an" if f.type is int else "a"} {f.type.__name__}'
    f'{" or None" if f.optional else ""}.'
  )


def check(config: Any) -> None:
  """Raises ConfigError at the first value outside its choices or bounds."""
  for path, f in declared(type(config)).items():
    value, says = lookup(config, path), f.declaration
    if value is None:
      continue
    if says.choices is not None and value not in says.choices:
      valid = ', '.join(map(repr, says.choices))
      none = ', or None for the default' if f.optional else ''
      raise ConfigError(f'config.{path}={value!r} is unknown: one of {valid}{none}.')
    for x in value if isinstance(value, tuple) else (value,):
      if isinstance(x, (int, float)) and not says.holds(x):
        none = '; None means the default' if f.optional else ''
        bounds = f'{says.range()}, ' if says.range() else ''
        raise ConfigError(
          f'config.{path}={value!r} must be {bounds}finite and below 2**31{none}.'
        )


def lookup(config: Any, path: str) -> Any:
  """Returns the value at a path, such as 'federated.gamma'."""
  return functools.reduce(getattr, path.split('.'), config)


def flat(tree: Mapping, prefix: str = '') -> dict[str, Any]:
  """Joins the keys of nested dicts with dots.

  >>> flat({'seed': 0, 'lora': {'scale': 2.0}})
  {'seed': 0, 'lora.scale': 2.0}
  """
  out = {}
  for name, value in tree.items():
    if isinstance(value, Mapping):
      out |= flat(value, f'{prefix}{name}.')
    else:
      out[prefix + name] = value
  return out


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
  """Undoes `flat`.

  >>> nested({'seed': 0, 'lora.scale': 2.0})
  {'seed': 0, 'lora': {'scale': 2.0}}
  """
  out: dict[str, Any] = {}
  for path, value in values.items():
    *sections, name = path.split('.')
    inner = out
    for s in sections:
      inner = inner.setdefault(s, {})
    inner[name] = value
  return out
