"""The tables of docs/results.md, in Markdown."""

import math
from collections.abc import Sequence

import numpy as np

from benchmarks import study as runner
from benchmarks import study_stats
from benchmarks.study_plots import NAMES
from benchmarks.study_stats import HIGH, LOW, OURS, Arm
from configs import study
from hetlora_jax import config as config_lib
from hetlora_jax.tools import bootstrap

Found = dict[str, Arm]


def config(task: str = study.TASKS[0]) -> config_lib.Config:
  """Returns what all arms of a task share."""
  return config_lib.built(study.get_config(task))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---', *['---:'] * (len(heads) - 1)], *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _with_interval(
  sum_SE: np.ndarray, count_E: np.ndarray, digits: int, map=float
) -> str:
  mean, low, high = (f'{map(x):.{digits}f}' for x in bootstrap.ratio(sum_SE, count_E))
  return f'{mean} [{low}, {high}]'


def _perplexity(arm: Arm, kind: str) -> str:
  return _with_interval(*arm.losses(kind), 2, math.exp)


def _rouge(arm: Arm, text: str) -> str:
  """Returns RougeL in percent of people never seen, with its interval."""
  people = [study_stats.reported(r['texts']['unseen'], 'unseen') for r in arm.results]
  value_SE = np.array([[p[text] for p in seed] for seed in people])
  return _with_interval(100 * value_SE, np.ones(value_SE.shape[1]), 1)


def _megabytes(arm: Arm, found: Found) -> str:
  target = study_stats.target_loss(found)
  if math.isnan(target):
    return ''
  count = study_stats.bytes_to(arm, target)
  return f'{count / 1e6:.1f}' if math.isfinite(count) else 'not reached'


def _cells(task: str, arm: Arm, sent: str) -> list[str]:
  """Returns what the summary says of an arm on a task."""
  measured = 'people' in arm.results[0]  # not of prompts with examples
  perplexity = _perplexity(arm, 'unseen') if measured else ''
  written = [_rouge(arm, 'generated')] if task in study.WRITTEN else []
  trained = np.mean([r['train/parameters'] for r in arm.results])
  return [perplexity, *written, sent, f'{trained:,.0f}']


def _place(name: str, found_of: dict[str, Found]) -> tuple[int, float]:
  """Sorts by the mean loss of people never seen; last if a task is missing."""
  arms = [found[name] for found in found_of.values() if name in found]
  losses = [study_stats.loss(arm, 'unseen') for arm in arms]
  return -len(arms), float(np.mean(losses))


def summary(found_of: dict[str, Found], floors_of: dict[str, list]) -> str:
  """Returns the table of all methods and tasks, the best first."""
  heads, columns = [''], {}
  for task in study.TASKS:
    names = ['perplexity', *['RougeL'] * (task in study.WRITTEN)]
    names += ['MB to target', 'trained']
    columns[task] = len(names)
    heads += [f'{NAMES[task]}: {name}' for name in names]
  rows = []
  names = [a for a in study.ARMS if any(a in f for f in found_of.values())]
  for name in sorted(names, key=lambda name: _place(name, found_of)):
    row = [name]
    for task, found in found_of.items():
      if name in found:
        row += _cells(task, found[name], _megabytes(found[name], found))
      else:
        row += [''] * columns[task]
    rows.append(row)
  for i, shots in enumerate(study.SHOTS):
    row = ['untouched' + (f', {shots} examples in the prompt' if shots else '')]
    for task, floors in floors_of.items():
      known = i < len(floors)
      row += _cells(task, _floor(floors[i]), '') if known else [''] * columns[task]
    rows.append(row)
  return _table(heads, rows)


def _floor(result: dict) -> Arm:
  untouched = result | {'train/parameters': 0}
  return Arm(name='untouched model', rate=0, results=[untouched])


def ranking(task: str, found: Found) -> str:
  """Says which arms the intervals tell apart from ours."""
  if OURS not in found:
    return ''
  worse, better, alike = [], [], []
  for name, arm in found.items():
    if name == OURS:
      continue
    gap = study_stats.gap(arm, found[OURS], 'unseen')
    group = worse if gap.low > 0 else better if gap.high < 0 else alike
    group.append((gap.value, f'{name} ({gap.value:+.3f})'))
  worse, better, alike = (
    ', '.join(text for _, text in sorted(group)) or 'none'
    for group in (worse, better, alike)
  )
  return (
    f'**{NAMES[task]}, against {OURS}** ({len(study.SEEDS)} seeds, people never '
    f'seen, nats a token). Better: {better}. Not significantly different: {alike}. Worse: '
    f'{worse}.'
  )


def _claims_of(
  found: Found, claims: Sequence[study_stats.Claim] = study_stats.CLAIMS
) -> list[list[str]]:
  """Returns the numbers and the verdict of every claim on one task."""
  rows = []
  for claim in claims:
    if not all(name in found for pair in claim.pairs for name in pair):
      rows.append(['', '', 'not run yet'])
      continue
    pairs = [(found[a], found[b]) for a, b in claim.pairs]
    cells, verdicts = [], []
    for kind in ('seen', 'unseen'):
      gaps = [study_stats.gap(a, b, kind) for a, b in pairs]
      cells.append('; '.join(gap.signed() for gap in gaps))
      verdicts.append(study_stats.verdict(gaps))
    verdict = verdicts[0]
    if verdicts[0] != verdicts[1]:
      verdict = f'seen: {verdicts[0]}; unseen: {verdicts[1]}'
    rows.append([*cells, verdict])
  return rows


def _seed_claims_of(found: Found) -> list[list[str]]:
  rows = []
  for claim in study_stats.SEED_CLAIMS:
    if not {claim.more, claim.less} <= found.keys():
      rows.append(['', 'not run yet'])
      continue
    values = study_stats.by_seed(claim, found)
    shown = ', '.join(f'{x:+.3g}' for x in values)
    rows.append([shown, study_stats.verdict_by_seed(values)])
  return rows


def claims(found_of: dict[str, Found]) -> str:
  """Returns a table of the verdicts, both tasks beside each other."""
  texts = [c.text for c in (*study_stats.CLAIMS, *study_stats.SEED_CLAIMS)]
  verdicts = [
    [row[-1] for row in (*_claims_of(found), *_seed_claims_of(found))]
    for found in found_of.values()
  ]
  rows = [list(row) for row in zip(texts, *verdicts, strict=True)]
  return _table(['the paper says', *(NAMES[t] for t in found_of)], rows)


def evidence(found: Found) -> str:
  """Returns the tables of the numbers behind the verdicts of a task."""
  pairs = [
    [claim.text, *row]
    for claim, row in zip(study_stats.CLAIMS, _claims_of(found), strict=True)
  ]
  seeds = [
    [claim.text, *row]
    for claim, row in zip(study_stats.SEED_CLAIMS, _seed_claims_of(found), strict=True)
  ]
  first = _table(['claim', 'gap, seen', 'gap, unseen', 'verdict'], pairs)
  return f'{first}\n\n{_table(["claim", "every seed", "verdict"], seeds)}'


def controls(found: Found) -> str:
  """Returns gaps to HetLoRA that no claim has: see `study_stats.CONTROLS`."""
  claims = study_stats.CONTROLS
  rows = [
    [claim.text, *row]
    for claim, row in zip(claims, _claims_of(found, claims), strict=True)
  ]
  heads = ['gap to HetLoRA of', 'seen', 'unseen', 'HetLoRA is better']
  return _table(heads, rows)


def details(task: str, found: Found) -> str:
  """Returns the table of a task, the best on people never seen first."""
  heads = ['', 'rate', 'perplexity, seen', 'perplexity, unseen']
  written = task in study.WRITTEN
  heads += ['teacher-forced RougeL'] if written else []
  ours = found.get(OURS)
  rows = []
  for arm in sorted(found.values(), key=lambda a: study_stats.loss(a, 'unseen')):
    row = [arm.name, f'{arm.rate:g}']
    row += [_perplexity(arm, kind) for kind in ('seen', 'unseen')]
    row += [_rouge(arm, 'teacher_forced')] if written else []
    other = ours and arm is not ours
    gap = study_stats.gap(arm, ours, 'unseen').signed() if other else ''
    rows.append([*row, gap])
  return _table([*heads, 'gap to ours, unseen'], rows)


def speed(task: str, found: Found) -> str:
  """Returns how fast low and high ranks learn, and whether they overfit."""
  rows = []
  for name in (LOW, HIGH, OURS, 'centralized LoRA', 'full fine-tuning'):
    if name not in found:
      continue
    arm = found[name]
    cells = [name]
    for kind in ('seen', 'unseen'):
      values = arm.curve(kind)
      cells += [f'{values[1] - values[0]:+.3f}', f'{values[-1] - values[0]:+.3f}',
                f'{values[-1] - values.min():+.3f}']  # fmt: skip
    cells.append(f'{arm.rounds("train/loss")[-3:].mean():.3f}')
    rows.append(cells)
  first = config(task).eval.every
  heads = [
    f'{what}, {kind}'
    for kind in ('seen', 'unseen')
    for what in (f'change until round {first}', 'at the end', 'end above best')
  ]
  return _table(['', *heads, 'training loss at the end'], rows)


def bending(found: Found) -> str:
  """Says whether the curves had come to an end when training did."""
  last = {}  # share of all that an arm gained which came with its last evaluation
  for name, arm in found.items():
    values = arm.curve('seen')
    if values[-1] == values.min() and values[-1] < values[0]:
      last[name] = (values[-2] - values[-1]) / (values[0] - values[-1])
  if not last:
    return 'No curve of people seen was still falling at the end.'
  return (
    f'**The curves had not come to an end**: in {len(last)} of {len(found)} arms the '
    'loss of people seen was lowest at the last evaluation, which alone brought '
    f'{min(last.values()):.0%} to {max(last.values()):.0%} of all that they gained. So '
    'who learns slowly and who overfits is judged here of the first rounds only; '
    'longer training may order the arms otherwise.'
  )


def why(found: Found) -> str:
  """Returns the diagnostics that explain the ranking."""
  rows = []
  for arm in found.values():
    rows.append([
      arm.name, f'{arm.rounds("aggregation/error").mean():.3f}',
      f'{arm.rounds("energy/effective_slots")[-1]:.1f}',
      f'{arm.rounds("weight/effective_clients").mean():.2f}',
      f'{arm.rounds("rank/mean")[0]:.1f}', f'{arm.rounds("rank/mean")[-1]:.1f}',
      f'{arm.rounds("rank/pruned").sum():.1f}',
    ])  # fmt: skip
  clients = config().federated.clients_per_round
  heads = ['', 'aggregation error', 'effective slots at the end',
           f'effective clients of {clients}', 'mean rank at first', 'at the end',
           'prunings']  # fmt: skip
  return _table(heads, rows)


def tried(results: dict[str, dict]) -> str:
  """Returns the validation perplexity of every arm at the rates it tried."""
  parts = []
  for ladder in (study.RATES, study.FULL_RATES):
    arms = [arm for arm in study.ARMS if study.rates(arm)[1] == ladder]
    loss = {
      (arm, rate): runner.validation_loss(results[name])
      for arm in arms
      for rate in ladder
      if (name := runner.name_of(arm, rate, study.SEEDS[0])) in results
    }
    rates = [rate for rate in ladder if any((a, rate) in loss for a in arms)]
    rows = [
      [arm, *(_in_perplexity(loss.get((arm, rate))) for rate in rates),
       _edge(arm, ladder, results)]
      for arm in arms
      if any((arm, rate) in loss for rate in rates)
    ]  # fmt: skip
    if rows:
      heads = ['', *(f'{rate:g}' for rate in rates), 'the best']
      parts.append(_table(heads, rows))
  return '\n\n'.join(parts)


def _in_perplexity(loss: float | None) -> str:
  return '' if loss is None else f'{math.exp(min(loss, 99)):.2f}'


def _edge(arm: str, ladder: Sequence[float], results: dict[str, dict]) -> str:
  best = runner.best_rate(arm, results)
  if best is None:
    return 'not yet known'
  return f'{best:g}{", the end" if best in (ladder[0], ladder[-1]) else ""}'


def of_whole_targets(floors: Sequence[dict]) -> str:
  """Tells the untouched model's perplexity without and with examples."""
  parts = []
  for floor in floors:
    people = study_stats.reported(floor['whole']['unseen'], 'unseen')
    loss = sum(p['loss_sum'] for p in people) / sum(p['tokens'] for p in people)
    parts.append(f'{math.exp(loss):.2f} with {floor["shots"]}')
  if not parts:
    return ''
  return (
    'On whole targets (elsewhere long ones are cut), the untouched model’s '
    f'perplexity is {", ".join(parts)} examples of other people in its prompt.'
  )
