"""How a rule is declared, and which rules a published method consists of.

A rule is a pure function of one of nine roles, declared beside its code:

  @rule('aggregation', space='product')
  def product(updates, weights, server): ...

The declaration states what others must know of it: traits that it has, needs and
excludes, and what it makes clients send and receive. Flags, checks, byte counts and
tests read these; nothing outside this package compares a rule's name.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

# What a rule can be known for -> what that means.
TRAITS = {
  'prefixes': 'a client of rank r holds the first r slots',
  'truncates': 'the rank of a client decides which slots it receives',
  'all slots': 'every client has all r_max slots',
  'fresh factors': 'clients draw their own A',
  'fixed A': 'A stays as it was drawn, and is never sent',
  'tail': 'it looks at the tail of an adapter, the slots from gamma r on',
  'own ranks': 'it trains clients of different ranks differently',
  'trains base': 'clients train the base model; there are no adapters',
  'own factors': 'clients keep factors to themselves',
  'norms': 'it weighs by the norms of adapters',
  'factor space': 'the aggregate is factors A and B',
  'product space': 'the aggregate is products A B',
  'mean of factors': 'every slot of the aggregate is a weighted mean of that slot',
  'weighted': 'it uses the weights of the clients',
  'keeps factors': 'the aggregate stays in the basis of the clients',
  'folds': 'something is added to the base model',
  'empties': 'nothing stays in the adapters',
  'pools data': 'one client trains on the data of all',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """A rule and what it declares.

  The meaning of `traffic` depends on the role. It counts what a round sends, on the
  host, where `rank_CM` are ranks of C clients and M matrices (or [C, 1]):
    distribution: (rank_CM, r_max) -> the ranks that clients receive.
    trainable: (round) -> the factors that are trained and sent, 'ab', 'a' or 'b'.
    redistribution: (rank_CM of those who reported, fold_rank_M) -> rank of what each
      client receives of the change of the base, [M]; 0 if there is none. `fold_rank_M`
      is `Redistributed.fold_rank`, None if that is empty.
  Other roles send nothing of their own. Where one of the three does not state it,
  the bytes of a run are not stated either.
  """

  role: str
  name: str
  function: Callable | None = None
  traits: frozenset[str] = frozenset()
  needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
  excludes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  traffic: Callable | None = None
  power_a: Callable[[bool], float | None] | None = None
  own_factors: tuple[str, ...] = ()


_ROLES = (
  'distribution', 'objective', 'trainable', 'personal', 'pruning', 'weighting',
  'aggregation', 'redistribution', 'cohort',
)  # fmt: skip
ROLES: dict[str, dict[str, Rule]] = {role: {} for role in _ROLES}


def declare(
  role: str,
  name: str,
  function: Callable | None = None,
  *,
  traits: Collection[str] = (),
  space: str | None = None,
  weighted: bool = True,
  **facts: Any,
) -> Rule:
  """Registers a rule: `--config.methods.<role>=<name>` then takes it.

  Args:
    role: one of ROLES.
    name: no other rule of the role has it.
    function: of the signature that the role's module describes.
    traits: of TRAITS.
    space: 'factors' or 'product', of an aggregation (its default is 'factors').
    weighted: whether an aggregation uses the clients' weights.
    **facts: the other fields of `Rule`: `needs` and `excludes` (trait -> why),
      `traffic`, and, of a redistribution that factors the aggregate anew, `power_a`:
      whether that is a product -> the power of the singular values that A takes
      (B takes the rest), None if it stays as it is.

  Raises:
    ValueError: there is no such role, trait or space, or the name is taken.
  """
  if role not in ROLES:
    raise ValueError(f'{role=} is unknown: one of {", ".join(ROLES)}.')
  if name in ROLES[role] and not _same(ROLES[role][name].function, function):
    raise ValueError(f'{role} {name!r} is declared already: take another name.')
  traits = set(traits)
  if role == 'aggregation':
    spaces = {'factors': 'factor space', 'product': 'product space'}
    if (space or 'factors') not in spaces:
      raise ValueError(f'{space=} is unknown: one of {", ".join(spaces)}.')
    traits |= {spaces[space or 'factors'], *(('weighted',) if weighted else ())}
  named = traits | {*facts.get('needs', ())} | {*facts.get('excludes', ())}
  if unknown := named - set(TRAITS):
    raise ValueError(f'{unknown} are no traits: those are {", ".join(TRAITS)}.')
  ROLES[role][name] = Rule(
    role=role, name=name, function=function, traits=frozenset(traits), **facts
  )
  return ROLES[role][name]


def _same(function: Callable | None, other: Callable | None) -> bool:
  """Tells whether two are one function, defined anew as a notebook does."""

  def where(f):
    return getattr(f, '__module__', None), getattr(f, '__qualname__', None)

  return where(function) == where(other)


def rule(role: str, *, name: str | None = None, **facts: Any):
  """Decorates a function, which stays as it is, so that it is a rule; see `declare`."""

  def declared(function: Callable) -> Callable:
    declare(role, name or function.__name__, function, **facts)
    return function

  return declared


class Method(NamedTuple):
  """A published method: its source, and its rule of every role.

  A row names only what differs from averaging the factors of truncated adapters,
  zero-padded, by the clients' examples.
  """

  citation: str
  distribution: str = 'prefix'
  objective: str = 'task'
  trainable: str = 'both'
  personal: str = 'none'
  pruning: str = 'none'
  weighting: str = 'size'
  aggregation: str = 'factors'
  redistribution: str = 'keep'
  cohort: str = 'separate'
  energy: float = 0.99  # what methods.energy is unless it is given


METHODS = {
  'hetlora': Method(
    'Cho, Liu, Xu, Fahrezi, Joshi, 2024, arXiv 2401.06432',
    objective='tail_penalty',
    pruning='norm_tail',
    weighting='norm',
  ),
  'zero_pad': Method('zero-padding FedAvg, a baseline of arXiv 2401.06432'),
  'fedit': Method(
    'FedIT: Zhang et al., 2023, arXiv 2305.05644; homogeneous LoRA of rank r_max',
    distribution='full',
  ),
  'full_finetuning': Method(
    'FedAvg: McMahan et al., 2017, arXiv 1602.05629, on all of the model',
    distribution='full',
    trainable='base',
  ),
  'centralized': Method(
    "LoRA: Hu et al., 2021, arXiv 2106.09685, on the cohort's pooled data",
    distribution='full',
    cohort='pooled',
  ),
  'local_only': Method(
    'LoRA: Hu et al., 2021, arXiv 2106.09685, every client for itself',
    personal='both',
  ),
  'flexlora': Method(
    'FlexLoRA: Bai et al., 2024, arXiv 2402.11505 (Recon+SVD)',
    aggregation='product',
    redistribution='svd_balanced',
  ),
  'raflora': Method(
    'raFLoRA: 2026, arXiv 2602.13486',
    weighting='owner_size',
    aggregation='product',
    redistribution='svd_balanced',
  ),
  'rbla': Method(
    'RBLA: Chen et al., 2024, arXiv 2408.08699',
    weighting='owner_size',
  ),
  'flora': Method(
    'FLoRA: Wang et al., 2024, arXiv 2409.05976 (stacking)',
    distribution='reinit',
    aggregation='product',
    redistribution='fold_all',
  ),
  'florist': Method(
    'FLoRIST: 2025, arXiv 2506.09199',
    distribution='reinit',
    aggregation='product',
    redistribution='energy',
  ),
  'fedex': Method(
    'FedEx-LoRA: Singhal, Ponkshe, Vepakomma, 2024, arXiv 2410.09432',
    distribution='full',
    redistribution='fold_residual',
  ),
  'fedmomentum': Method(
    'FedMomentum: 2026, arXiv 2603.08014',
    aggregation='product',
    redistribution='fold_residual',
    energy=0.9999,
  ),
  'ffa_lora': Method(
    'FFA-LoRA: Sun et al., 2024, arXiv 2403.12313',
    distribution='full',
    trainable='b_only',
  ),
  'rolora': Method(
    'RoLoRA: Chen et al., 2024, arXiv 2409.02346',
    distribution='full',
    trainable='alternating',
  ),
  'fedsa_lora': Method(
    'FedSA-LoRA: Guo et al., 2024, arXiv 2410.01463',
    distribution='full',
    personal='b',
  ),
  'fed_plora': Method(
    'Fed-PLoRA: 2026, arXiv 2602.16936 (Select-N-Fold)',
    distribution='random_mask',
    trainable='mask',
    weighting='owner_size',
  ),
  'fslora': Method(
    'FSLoRA: Fang et al., 2025, arXiv 2501.19389 (sketching)',
    distribution='sketch',
    aggregation='changes',
  ),
  'prelort': Method(
    'PreLort: 2026, arXiv 2606.15963',
    objective='nested_prefixes',
    weighting='owner_size',
  ),
  'fedprox': Method(
    'FedProx: Li et al., 2018, arXiv 1812.06127, on LoRA',
    distribution='full',
    objective='proximal',
  ),
}


def rules_of(method: str) -> dict[str, Rule]:
  """Returns the rule of every role of a method."""
  return {role: table[getattr(METHODS[method], role)] for role, table in ROLES.items()}


def traits_of(rules: Mapping[str, Rule]) -> frozenset[str]:
  """Returns the traits of all rules of a method together."""
  return frozenset().union(*(r.traits for r in rules.values()))


def power_of_a(rules: Mapping[str, Rule]) -> float | None:
  """Returns the power of singular values that A takes; None if factors stay theirs."""
  split = rules['redistribution'].power_a
  return split('product space' in traits_of(rules)) if split else None


def conflicts(rules: Mapping[str, Rule]) -> Iterator[tuple[Rule, str]]:
  """Yields every rule that does not fit the others, and why.

  Args:
    rules: role -> rule, of all roles.
  """
  has = traits_of(rules)
  for r in rules.values():
    for trait, why in r.needs.items():
      if trait not in has:
        yield r, f'{why}; take {_alternatives(trait, True)}{_instead(r, has)}'
    for trait, why in r.excludes.items():
      if trait in has:
        other = next(x for x in rules.values() if trait in x.traits)
        remedy = _alternatives(trait, False, other.role)
        yield r, f'not with {other.role} {other.name!r}: {why}; take {remedy}'


def _instead(r: Rule, has: frozenset[str]) -> str:
  """Names rules of the same role that would fit, if there are any."""
  fit = [x.name for x in ROLES[r.role].values() if set(x.needs) <= has | x.traits]
  return f', or {r.role} {" or ".join(map(repr, fit))}' if fit else ''


def _alternatives(trait: str, present: bool, role: str | None = None) -> str:
  """Names rules that have a trait or, of one role, those that do not."""
  found: dict[str, list[str]] = {}
  for table in [ROLES[role]] if role else ROLES.values():
    for r in table.values():
      if (trait in r.traits) == present:
        found.setdefault(r.role, []).append(repr(r.name))
  return ' or '.join(f'{role} {" or ".join(names)}' for role, names in found.items())


def table() -> str:
  """Returns every method, the rules that it changes, and its source."""
  rows = [('method', 'rules', 'source')]
  for name, method in METHODS.items():
    usual = Method._field_defaults
    rules = [
      f'{role} {rule}'
      for role, rule in method._asdict().items()
      if role != 'citation' and rule != usual[role]
    ]
    rows.append((name, ', '.join(rules) or 'the default rules', method.citation))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip()
    for row in rows
  ]
  rest = ', '.join(f'{r} {x}' for r, x in Method._field_defaults.items())
  return '\n'.join([*lines, f'\nDefault rules: {rest}.'])
