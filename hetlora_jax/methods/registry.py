"""One row a published method: the names of its rules, and its source.

A row names only what differs from averaging the factors of truncated
adapters, zero-padded, by the clients' examples.
"""

from typing import NamedTuple

from hetlora_jax.methods import (
  aggregation,
  distribution,
  objective,
  personal,
  pruning,
  redistribution,
  trainable,
  weighting,
)

ROLES = {
  'distribution': distribution.TABLE,
  'objective': objective.TABLE,
  'trainable': trainable.TABLE,
  'personal': personal.TABLE,
  'pruning': pruning.TABLE,
  'weighting': weighting.TABLE,
  'aggregation': aggregation.TABLE,
  'redistribution': redistribution.TABLE,
  # Clients train apart; or their data is pooled and one client trains on it.
  'cohort': dict.fromkeys(('separate', 'pooled'), ()),
}


class Method(NamedTuple):
  """Rules by role; each is a key of the table of its role's module."""

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
  energy: float = 0.99  # default of methods.energy


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


def rule_names(config) -> dict[str, str]:
  """Returns role -> rule of a Config: the method's row, overridden by flags.

  >>> from types import SimpleNamespace
  >>> methods = SimpleNamespace(**dict.fromkeys(ROLES, '') | {'pruning': 'none'})
  >>> rules = rule_names(SimpleNamespace(method='hetlora', methods=methods))
  >>> rules['objective'], rules['pruning'], rules['weighting']
  ('tail_penalty', 'none', 'norm')
  """
  row = METHODS[config.method]._asdict()
  return {r: getattr(config.methods, r) or row[r] for r in ROLES}


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
