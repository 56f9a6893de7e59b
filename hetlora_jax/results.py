"""What a run tells: a row a round, the summary, and its table.

The functions take an `experiment.Experiment`.
"""

import math
import os
import platform
import resource
import time

import jax
import numpy as np

from hetlora_jax import diagnostics, metrics
from hetlora_jax.checks import WIRE_DTYPES
from hetlora_jax.data.people import evenly_spaced
from hetlora_jax.methods import traffic
from hetlora_jax.methods.registry import rule_names


def round_row(
  x, config, done: int, out: dict, seconds: float, waited: float
) -> metrics.Row:
  """Returns a point's line of metrics.jsonl for a finished round."""
  present, reports = out['present'], out['reports']
  sent, kept = out['sent_rank'], out['rank']
  sent_parameters = traffic.of_round(
    rule_names(x.config), x.dims, x.description['base_parameters'],
    round=done - 1, r_max=x.config.federated.r_max,
    sent_CG=sent[present], kept_CG=kept[reports], fold_rank=out['fold_rank'],
  )  # fmt: skip
  wire = WIRE_DTYPES[x.config.communication.wire_dtype]
  tokens = float(out['tokens'].sum())
  return {
    'round': done,
    'train/loss': float(out['loss_sum'].sum()) / max(tokens, 1.0),
    'train/tokens': int(tokens),
    'train/parameters': sent_parameters.trained / max(int(present.sum()), 1),
    'train/reports': int(reports.sum()),
    'fault/nonfinite_clients': int(out['nonfinite'].sum()),
    'fault/lost_rounds': int(present.any() and not reports.any()),
    **diagnostics.row(out, config.federated.r_min),
    'rank/pruned': int((kept < sent)[reports].any(1).sum()),
    'comm/up_bytes': wire * sent_parameters.up,
    'comm/down_bytes': wire * sent_parameters.down,
    'time/round_s': seconds,
    'time/wait_s': waited,
    'time/tokens_per_s': tokens / seconds,
  }


def evaluation_row(found: dict, k: int) -> metrics.Row:
  """Returns a point's loss and perplexity a token, of every evaluation set."""
  row = {}
  for name, (loss_KE, tokens_KE) in found.items():
    loss = float(loss_KE[k].sum(dtype=np.float64) / tokens_KE[k].sum())
    row[f'eval/{name}/loss'] = loss
    row[f'eval/{name}/perplexity'] = math.exp(min(loss, 700.0))
  return row


def people(x, found: dict, k: int) -> dict[str, list[dict]]:
  """Returns what people.json holds: everybody's summed loss and token count.

  `rank` is that drawn for a person; those unseen in training have none.
  """
  out = {}
  for name, (loss_KE, tokens_KE) in found.items():
    kind = 'unseen' if name == 'unseen' else 'heldout'
    who_E = evaluated_people(x, kind)
    out[name] = [
      {
        'client': x.people.groups[kind].ids[i],
        'rank': None if kind == 'unseen' else int(x.initial_rank[k, i]),
        'loss_sum': float(loss),
        'tokens': int(tokens),
      }
      for i, loss, tokens in zip(
        who_E, loss_KE[k], tokens_KE[k], strict=False
      )  # fmt: skip
    ]
  return out


def evaluated_people(x, kind: str) -> np.ndarray:
  """Returns the places of the people that are evaluated, among their kind."""
  count = len(x.people.groups[kind].ids)
  return evenly_spaced(count, min(x.config.eval.num_people, count))


def cumulate(row: metrics.Row, rows: list[metrics.Row]) -> None:
  """Adds the bytes sent since the start to a row."""
  for way in ('up', 'down'):
    before = next(
      (r[f'comm/total_{way}_bytes'] for r in reversed(rows) if 'train/loss' in r),
      0,
    )
    row[f'comm/total_{way}_bytes'] = before + row[f'comm/{way}_bytes']


def totals(rows: list[metrics.Row]) -> dict:
  """Returns the part of summary.json that rows with an evaluation tell."""
  evaluations = [r for r in rows if 'eval/seen/loss' in r]
  rounds = [r for r in rows if 'train/loss' in r]
  only_evaluations = [
    {k: v for k, v in r.items() if k == 'round' or k.startswith('eval/')}
    for r in evaluations
  ]
  total = lambda name: sum(r[name] for r in rounds)  # noqa: E731
  return {
    'first': only_evaluations[0],
    'last': only_evaluations[-1],
    'rounds': len(rounds),
    'train/tokens': total('train/tokens'),
    'comm/up_bytes': total('comm/up_bytes'),
    'comm/down_bytes': total('comm/down_bytes'),
    'rank/pruned': total('rank/pruned'),
    'fault/nonfinite_clients': total('fault/nonfinite_clients'),
    'fault/lost_rounds': total('fault/lost_rounds'),
    'train/parameters': total('train/parameters') / max(len(rounds), 1),
    'aggregation/error': total('aggregation/error') / max(len(rounds), 1),
    'time/rounds_s': total('time/round_s'),
  }


def summarise(x, rows: list[metrics.Row], seconds, command):
  """Returns what summary.json holds."""
  return {
    'command': command,
    'finished': time.strftime('%Y-%m-%d %H:%M:%S'),
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, '
    f'{jax.device_count()} {jax.default_backend()} device(s)',
    # Of this process on its host, in 10^6 bytes; Linux counts in kibibytes.
    'memory/host_peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    * 1.024e-3,
    'versions': {'python': platform.python_version(), 'jax': jax.__version__},
    **x.description,
    **totals(rows),
    'time/this_call_s': seconds,
  }


def table(summary: dict) -> str:
  """Returns perplexity before and after, as lines for people."""
  first, last = summary['first'], summary['last']
  lines = [f'{"held-out perplexity":<22}{"before":>10}{"after":>10}{"":>4}']
  for who in ('seen', 'unseen'):
    name = f'eval/{who}/perplexity'
    a, b = first[name], last[name]
    lines.append(
      f'{who + " people":<22}{a:>10.2f}{b:>10.2f}{100 * (b - a) / a:>8.1f} %'
    )
  return '\n'.join(lines)
