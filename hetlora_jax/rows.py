"""What a run tells: a row for each round, the summary, and its table."""

import math
import os
import pathlib
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hetlora_jax import diagnostics, experiment, files, metrics, wire
from hetlora_jax.config import Config
from hetlora_jax.data.labels import NOTHING
from hetlora_jax.data.people import evenly_spaced
from hetlora_jax.experiment import Experiment
from hetlora_jax.methods import traffic
from hetlora_jax.points import Evaluation, Points
from hetlora_jax.types import Row

NOT_STATED = None  # what bytes are where a rule does not state what it sends


def mended_by(folder: pathlib.Path, round: int | str = 'ROUND') -> str:
  """Returns the remedy for rows that are damaged, without which no total is right."""
  return f'put it back as it was, or go on elsewhere, --branch_from={folder}@{round}'


def read(path: pathlib.Path) -> list[Row]:
  """Reads metrics.jsonl: an evaluation before training, then a row for every round.

  A last line torn by a crash is dropped; a file that is absent has none.

  Raises:
    Damaged: a line is no row, is there twice, or is missing.
  """
  remedy = mended_by(path.parent)
  found = files.read_rows(path, remedy)
  for number, row in enumerate(found, 1):
    place, done = pathlib.Path(f'{path}:{number}'), row.get('round')
    if type(done) is not int:
      raise files.damaged(place, f'round {done!r} is no number of a round', remedy)
    if done != found[0]['round'] + number - 1:
      before = found[number - 2]['round']
      raise files.damaged(place, f'round {done} follows round {before}', remedy)
  if found and 'train/loss' in found[0]:
    raise files.damaged(path, 'its first rows are missing', remedy)
  return found


def round_row(
  x: Experiment, config: Config, done: int, out: dict, seconds: float, waited: float
) -> Row:
  """Returns the line of metrics.jsonl for a finished round.

  Args:
    x: the experiment.
    config: that of the run, which may differ from that of `x` in what may vary.
    done: rounds done, this one included.
    out: the metrics of `federated_round`, in numpy.
    seconds: that the round took, without compiling.
    waited: seconds that devices had waited for it.
  """
  present, reports = out['present'], out['reports']
  sent, kept = out['sent_rank'], out['rank']
  counted = traffic.of_round(
    config.rules, x.model.dims, experiment.base_size(x),
    round=done - 1, r_max=config.federated.r_max,
    sent_CG=sent[present], kept_CG=kept[reports], fold_rank=out['fold_rank'],
    each=wire.TYPES[config.communication.wire_dtype],
  )  # fmt: skip
  tokens = float(out['tokens'].sum())
  return {
    'round': done,
    'train/loss': float(out['loss_sum'].sum()) / max(tokens, 1.0),
    'train/tokens': int(tokens),
    'train/parameters': _times(counted.trained, 1 / max(int(present.sum()), 1)),
    'train/reports': int(reports.sum()),
    'fault/nonfinite_clients': int(out['nonfinite'].sum()),
    'fault/lost_rounds': int(present.any() and not reports.any()),
    **diagnostics.row(out, config.federated.r_min),
    'rank/pruned': int((kept < sent)[reports].any(1).sum()),
    'comm/up_bytes': counted.up,
    'comm/down_bytes': counted.down,
    'time/round_s': seconds,
    'time/wait_s': waited,
    'time/tokens_per_s': tokens / seconds,
  }


def _times(count: int | None, factor: float) -> float | None:
  return NOT_STATED if count is None else count * factor


def evaluation_columns(x: Points) -> list[str]:
  """Returns what `evaluation_row` tells of a run."""
  scores = ('loss', 'perplexity', *(metrics.OF_LABELS if x.experiment.answers else ()))
  return [f'eval/{name}/{score}' for name in x.evaluators for score in scores]


def evaluation_row(found: Mapping[str, Evaluation]) -> Row:
  """Returns loss and perplexity per token of every evaluation set, and its scores."""
  row = {}
  for name, of_set in found.items():
    loss = float(of_set.loss_E.sum(dtype=np.float64) / of_set.tokens_E.sum())
    row[f'eval/{name}/loss'] = loss
    row[f'eval/{name}/perplexity'] = math.exp(min(loss, 700.0))
    row |= {f'eval/{name}/{k}': x for k, x in metrics.of_labels(of_set).items()}
  return row


def people(
  x: Experiment, rank_N: np.ndarray, found: Mapping[str, Evaluation]
) -> dict[str, list[dict]]:
  """Returns what people.json holds: everybody's summed loss and token count.

  `rank` is that drawn for a person; those unseen in training have none. Of a task with
  labels it also has how many examples they have, and how many guesses are right.
  """
  out = {}
  for name, of_set in found.items():
    kind = 'unseen' if name == 'unseen' else 'heldout'
    # The sets are filled up with people that have no tokens.
    out[name] = [
      {
        'client': x.population.groups[kind].ids[i],
        'rank': None if kind == 'unseen' else int(rank_N[i]),
        'loss_sum': float(of_set.loss_E[e]),
        'tokens': int(of_set.tokens_E[e]),
        **_guesses(of_set, e),
      }
      for e, i in enumerate(evaluated_people(x, kind))
    ]
  return out


def _guesses(of_set: Evaluation, person: int) -> dict[str, int]:
  """Returns how many examples a person has, and how many guesses are right."""
  if of_set.answer_EX is None or of_set.guess_EX is None:
    return {}
  asked = of_set.answer_EX[person] != NOTHING
  right = asked & (of_set.answer_EX[person] == of_set.guess_EX[person])
  return {'examples': int(asked.sum()), 'right': int(right.sum())}


def evaluated_people(x: Experiment, kind: str) -> np.ndarray:
  """Returns the places of the people that are evaluated, among their kind."""
  count = len(x.population.groups[kind].ids)
  return evenly_spaced(count, min(x.config.eval.num_people, count))


def cumulate(row: Row, rows: Sequence[Row]) -> None:
  """Adds the bytes sent since the start to a row."""
  before = next((r for r in reversed(rows) if 'train/loss' in r), {})
  for way in ('up', 'down'):
    name = f'comm/total_{way}_bytes'
    row[name] = _sum([before.get(name, 0), row[f'comm/{way}_bytes']])


def _sum(values: Sequence[float | None]) -> float | None:
  stated = [x for x in values if x is not None]
  return sum(stated) if len(stated) == len(values) else NOT_STATED


def totals(rows: Sequence[Row]) -> dict[str, Any]:
  """Returns the part of summary.json that the rows tell."""
  evaluations = [
    {k: v for k, v in r.items() if k == 'round' or k.startswith('eval/')}
    for r in rows
    if 'eval/seen/loss' in r
  ]
  rounds = [r for r in rows if 'train/loss' in r]

  def column(name: str) -> list:
    return [r[name] for r in rounds if name in r]

  # Rows of earlier releases hold it in the seconds of rounds.
  told = [r['time/compile_s'] for r in rows if 'time/compile_s' in r]
  compiling = sum(told) if told else NOT_STATED

  def mean(name: str) -> float | None:
    values = column(name)
    return _times(_sum(values), 1 / max(len(values), 1))

  return {
    'first': evaluations[0],
    'last': evaluations[-1],
    'rounds': len(rounds),
    'train/tokens': _sum(column('train/tokens')),
    'comm/up_bytes': _sum(column('comm/up_bytes')),
    'comm/down_bytes': _sum(column('comm/down_bytes')),
    'rank/pruned': _sum(column('rank/pruned')),
    'fault/nonfinite_clients': _sum(column('fault/nonfinite_clients')),
    'fault/lost_rounds': _sum(column('fault/lost_rounds')),
    'train/parameters': mean('train/parameters'),
    'aggregation/error': mean('aggregation/error'),
    'time/rounds_s': _sum(column('time/round_s')),
    'time/compile_s': compiling,
  }


def summarise(
  x: Experiment, rows: Sequence[Row], seconds: float, command: str
) -> dict[str, Any]:
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
    **experiment.describe(x),
    **totals(rows),
    'time/this_call_s': seconds,
  }


def table(summary: dict) -> str:
  """Returns perplexity, and scores, before and after, and why it ended early."""
  first, last = summary['first'], summary['last']
  lines = [f'{"held-out perplexity":<22}{"before":>10}{"after":>10}{"":>4}']
  for who in ('seen', 'unseen'):
    name = f'eval/{who}/perplexity'
    a, b = first[name], last[name]
    lines.append(
      f'{who + " people":<22}{a:>10.2f}{b:>10.2f}{100 * (b - a) / a:>8.1f} %'
    )
  for name in [k for k in last if k.endswith(metrics.OF_LABELS) or '/own/' in k]:
    _, who, column = name.split('/', 2)
    before = f'{first[name]:.3f}' if name in first else '-'
    lines.append(f'{column + " " + who:<22}{before:>10}{last[name]:>10.3f}')
  if stopped := summary.get('stopped'):
    lines.append(f'stopped after round {stopped["round"]}: {stopped["why"]}')
  return '\n'.join(lines)
