"""The paper's comparisons and sweeps, by name, for launch.sweep.

Command: python -m launch.sweep --config=configs/tiny.py \
  --sweep=configs/ablations.py:methods --workdir=/tmp/methods

A sweep is a list of points, a point the fields it changes. Any of them can be
set on one run too: --config.method=flexlora --config.methods.weighting=uniform.
"""

import itertools

from hetlora_jax.methods import registry


def grid(**fields):
  """Returns every combination of values; `__` stands for the dot."""
  names = [name.replace('__', '.') for name in fields]
  combinations = itertools.product(*fields.values())
  return [dict(zip(names, values, strict=True)) for values in combinations]


def _ranks(*values):
  return [{'federated.r_max': r, 'federated.r_min': min(r, 5)} for r in values]


_WITHOUT = {
  'norm weights': {'methods.weighting': 'size'},
  'penalty': {'methods.objective': 'task'},
  'pruning': {'methods.pruning': 'none'},
}

SWEEPS = {
  # Every row of the registry.
  'methods': grid(method=registry.METHODS),
  # The table of arXiv 2401.06432, section 5.
  'paper': [
    {'method': 'full_finetuning'},
    *[{'method': 'fedit', **r} for r in _ranks(5, 50)],
    {'method': 'flexlora'},
    {'method': 'hetlora'},
  ],
  # Homogeneous LoRA by its rank.
  'homogeneous_rank': [
    {'method': 'fedit', **r} for r in _ranks(1, 5, 10, 20, 50, 100, 150, 200)
  ],
  'gamma': grid(federated__gamma=(0.85, 0.95, 0.99, 1.0)),
  'lambda': grid(federated__tail_penalty=(0.0, 5e-4, 5e-3, 5e-2, 0.5, 1.0)),
  'rank_range': [
    {'federated.r_min': low, 'federated.r_max': high}
    for low, high in ((1, 5), (5, 20), (5, 50), (20, 50), (5, 100), (5, 200))
  ],
  # A tenth of the people sends 100 times its change (docs/reliability.md).
  'attack': [
    {'faults.malicious': 0.1, **fields}
    for fields in (
      {'faults.malicious': 0.0},
      {'methods.weighting': 'norm'},
      {'methods.weighting': 'size'},
      {'methods.weighting': 'norm', 'federated.norm_bound': 1.0},
      {'methods.weighting': 'size', 'federated.norm_bound': 1.0},
      {'methods.aggregation': 'median'},
      {'methods.aggregation': 'trimmed_mean', 'methods.trim': 0.2},
    )
  ],
  # Weights in both spaces: the cells of METHODS' fact 2.
  'aggregation': [
    *grid(
      method=('zero_pad',),
      methods__weighting=('size', 'norm', 'owner_size', 'owner_uniform'),
    ),
    *grid(
      method=('flexlora',),
      methods__weighting=('size', 'norm', 'owner_size', 'owner_uniform'),
    ),
  ],
  'pruning': grid(methods__pruning=('none', 'norm_tail')),
  # HetLoRA's three switches, one off at a time, two, and all.
  'switches': [
    {k: v for name in off for k, v in _WITHOUT[name].items()}
    for count in range(4)
    for off in itertools.combinations(_WITHOUT, count)
  ],
  # What the paper leaves open, one choice at a time.
  'open_choices': [
    {},
    {'methods.prune_scope': 'matrix'},
    {'methods.weight_scope': 'layer'},
    {'methods.weight_scope': 'matrix'},
    {'methods.prune_against': 'last_trained'},
    {'methods.keep_pruned_rank': False},
    {'lora.scale_rule': 'alpha_over_r'},
    {'lora.scale_rule': 'alpha_over_sqrt_r'},
    {'lora.init': 'kaiming_uniform'},
  ],
  'rank_distribution': [
    *grid(ranks__distribution=('uniform', 'normal')),
    *grid(ranks__distribution=('power_law',), ranks__exponent=(0.5, 1.0, 2.0)),
    *grid(ranks__data_correlation=(-0.8, 0.8)),
  ],
  'clients_per_round': grid(federated__clients_per_round=(2, 5, 10, 20)),
  'local_steps': grid(federated__local_steps=(1, 2, 5, 10)),
  'server_optimizer': grid(server_optimizer__name=('sgd', 'momentum', 'adam', 'yogi')),
  'dropout': grid(federated__dropout=(0.0, 0.2, 0.5)),
}


def get_sweep(name):
  """Returns the points of a sweep."""
  if name not in SWEEPS:
    raise ValueError(f'{name!r} is no sweep here: one of {", ".join(SWEEPS)}.')
  return SWEEPS[name]
