"""Makes docs/results.md and its figures of the study: python -m benchmarks.study_report.

Reads docs/results/raw (written by `benchmarks.study`), runs nothing. The numbers are
`benchmarks.study_stats`' and the figures `benchmarks.study_plots`'.
"""

import json
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from benchmarks import machine, study_plots, study_stats
from benchmarks import study as runner
from benchmarks.study_plots import NAMES
from benchmarks.study_stats import HIGH, LOW, OURS, Arm
from configs import study
from hetlora_jax import config

_RAW = flags.DEFINE_string('results', 'docs/results', 'Folder of the study.')
_PAGE = flags.DEFINE_string('page', 'docs/results.md', 'Page to write.')

Found = dict[str, Arm]


def _config(task: str = study.TASKS[0]) -> config.Config:
  """Returns what all arms of a task share."""
  return config.build(study.get_config(task))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---', *['---:'] * (len(heads) - 1)], *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _with_interval(
  sum_SE: np.ndarray, count_E: np.ndarray, digits: int, map=float
) -> str:
  low, high = study_stats.interval(study_stats.resample(sum_SE, count_E))
  mean = sum_SE.mean(0).sum() / count_E.sum()
  low, mean, high = (f'{map(x):.{digits}f}' for x in (low, mean, high))
  return f'{mean} [{low}, {high}]'


def _perplexity(arm: Arm, kind: str) -> str:
  return _with_interval(*arm.losses(kind), 2, math.exp)


def _rouge(arm: Arm, text: str) -> str:
  """Returns RougeL in percent of people never seen, with its interval."""
  people = [
    study_stats.reported(r['texts']['unseen'], 'unseen') for r in arm.results
  ]
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
  return [perplexity, *written, sent]


def _place(name: str, found_of: dict[str, Found]) -> tuple[int, float]:
  """Sorts by the mean loss of people never seen; last if a task is missing."""
  arms = [found[name] for found in found_of.values() if name in found]
  losses = [study_stats.loss(arm, 'unseen') for arm in arms]
  return -len(arms), float(np.mean(losses))


def summary(found_of: dict[str, Found], floors_of: dict[str, list]) -> str:
  """Returns the table of all methods and tasks, the best first."""
  heads, columns = [''], {}
  for task in study.TASKS:
    names = ['perplexity', 'RougeL'][: 1 + (task in study.WRITTEN)]
    columns[task] = len(names) + 1
    heads += [f'{NAMES[task]}: {name}' for name in [*names, 'MB to target']]
  rows = []
  names = [a for a in study.ARMS if any(a in f for f in found_of.values())]
  for name in sorted(names, key=lambda name: _place(name, found_of)):
    row, trained = [name], ''
    for task, found in found_of.items():
      if name in found:
        row += _cells(task, found[name], _megabytes(found[name], found))
        trained = f'{found[name].results[0]["train/parameters"]:,.0f}'
      else:
        row += [''] * columns[task]
    rows.append([*row, trained])
  for i, shots in enumerate(study.SHOTS):
    row = ['untouched' + (f', {shots} examples in the prompt' if shots else '')]
    for task, floors in floors_of.items():
      known = i < len(floors)
      row += (
        _cells(task, _floor(floors[i]), '') if known else [''] * columns[task]
      )
    rows.append([*row, '0'])
  return _table([*heads, 'trained'], rows)


def _floor(result: dict) -> Arm:
  return Arm(name='untouched model', rate=0, results=[result])


def ranking(task: str, found: Found) -> str:
  """Says which arms the intervals tell apart from ours."""
  if OURS not in found:
    return ''
  ours = found[OURS]
  seeds = len(ours.results)
  worse, better, alike = [], [], []
  for name, arm in found.items():
    if name == OURS or len(arm.results) != seeds:
      continue
    gap = study_stats.gap(arm, ours, 'unseen')
    group = worse if gap.low > 0 else better if gap.high < 0 else alike
    group.append((gap.mean, f'{name} ({gap.mean:+.3f})'))
  worse, better, alike = (
    ', '.join(text for _, text in sorted(group)) or 'none'
    for group in (worse, better, alike)
  )
  return (
    f'**{NAMES[task]}, against {OURS}** ({seeds} seed{"s" * (seeds > 1)}, people '
    f'never seen, nats a token). Better beyond doubt: {better}. Not told apart: '
    f'{alike}. Worse beyond doubt: {worse}.'
  )


def _claims_of(found: Found) -> list[list[str]]:
  """Returns the numbers and the verdict of every claim on one task."""
  rows = []
  for claim in study_stats.CLAIMS:
    if not all(study_stats.paired(found, *pair) for pair in claim.pairs):
      rows.append(['', '', 'not run yet'])
      continue
    pairs = [(found[a], found[b]) for a, b in claim.pairs]
    cells, verdicts = [], []
    for kind in ('seen', 'unseen'):
      gaps = [study_stats.gap(a, b, kind) for a, b in pairs]
      cells.append('; '.join(map(str, gaps)))
      verdicts.append(study_stats.verdict(gaps))
    verdict = verdicts[0]
    if verdicts[0] != verdicts[1]:
      verdict = f'seen: {verdicts[0]}; unseen: {verdicts[1]}'
    rows.append([*cells, verdict])
  return rows


def _seed_claims_of(found: Found) -> list[list[str]]:
  rows = []
  for claim in study_stats.SEED_CLAIMS:
    if not study_stats.paired(found, claim.more, claim.less):
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


def _evidence(found: Found) -> str:
  """Returns the tables of the numbers behind the verdicts of a task."""
  pairs = [
    [claim.text, *row]
    for claim, row in zip(study_stats.CLAIMS, _claims_of(found), strict=True)
  ]
  seeds = [
    [claim.text, *row]
    for claim, row in zip(
      study_stats.SEED_CLAIMS, _seed_claims_of(found), strict=True
    )
  ]
  first = _table(['claim', 'gap, seen', 'gap, unseen', 'verdict'], pairs)
  return f'{first}\n\n{_table(["claim", "every seed", "verdict"], seeds)}'


def _details(task: str, found: Found) -> str:
  """Returns the table of a task, the best on people never seen first."""
  heads = ['', 'rate', 'seeds', 'perplexity, seen', 'perplexity, unseen']
  written = task in study.WRITTEN
  heads += ['teacher-forced RougeL'] if written else []
  ours = found.get(OURS)
  rows = []
  for arm in sorted(
    found.values(), key=lambda a: study_stats.loss(a, 'unseen')
  ):
    row = [arm.name, f'{arm.rate:g}', str(len(arm.results))]
    row += [_perplexity(arm, kind) for kind in ('seen', 'unseen')]
    row += [_rouge(arm, 'teacher_forced')] if written else []
    paired = ours and len(ours.results) == len(arm.results) and arm is not ours
    gap = str(study_stats.gap(arm, ours, 'unseen')) if paired else ''
    rows.append([*row, gap])
  return _table([*heads, 'gap to ours, unseen'], rows)


def _speed(task: str, found: Found) -> str:
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
  first = _config(task).eval.every
  heads = [
    f'{what}, {kind}'
    for kind in ('seen', 'unseen')
    for what in (f'change until round {first}', 'at the end', 'end above best')
  ]
  return _table(['', *heads, 'training loss at the end'], rows)


def _why(found: Found) -> str:
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
  clients = _config().federated.clients_per_round
  heads = ['', 'aggregation error', 'effective slots at the end',
           f'effective clients of {clients}', 'mean rank at first', 'at the end',
           'prunings']  # fmt: skip
  return _table(heads, rows)


def _tried(results: dict[str, dict]) -> str:
  """Returns the validation perplexity of every arm at every rate of its ladder."""
  rows = []
  for arm in study.ARMS:
    _, ladder = study.rates(arm)
    names = [runner.name_of(arm, rate, study.SEEDS[0]) for rate in ladder]
    losses = [
      runner.validation_loss(results[n]) if n in results else None
      for n in names
    ]
    if any(losses):
      shown = [f'{math.exp(min(x, 99)):.2f}' if x else '' for x in losses]
      rows.append([arm, *shown, _edge(arm, ladder, results)])
  heads = ['', *(f'{rate:g}' for rate in study.RATES), 'the best']
  full = ' '.join(f'{rate:g}' for rate in study.FULL_RATES)
  return f'{_table(heads, rows)}\n\nOf full fine-tuning: {full}.'


def _edge(arm: str, ladder: Sequence[float], results: dict[str, dict]) -> str:
  best = runner.best_rate(arm, results)
  if best is None:
    return 'not yet known'
  return f'{best:g}{", the end" if best in (ladder[0], ladder[-1]) else ""}'


def _of_whole_targets(floors: Sequence[dict]) -> str:
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


def _task(
  task: str, results: dict[str, dict], found: Found, floors: Sequence[dict]
) -> str:
  if not found:
    return f'## {NAMES[task]}\n\nNo arm has run at all of its rates yet.\n'
  first = next(iter(found.values())).results[0]['curve']
  untouched = ', '.join(
    f'{kind} {math.exp(first[kind][0]):.2f}' for kind in ('seen', 'unseen')
  )
  target = study_stats.target_loss(found)
  reach = f'perplexity {math.exp(target):.2f}' if target == target else '-'
  return f"""## {NAMES[task]}

Untouched model: perplexity {untouched} (validation people included). Target: {reach}
on people seen. {_of_whole_targets(floors)}

{_details(task, found)}

![Curves](results/{task}_curves.png)

### The claims on {NAMES[task]}

{_evidence(found)}

How fast they learn, and whether they lose it again (loss in nats a token):

{_speed(task, found)}

### What happens inside on {NAMES[task]}

{_why(found)}

![Inside](results/{task}_inside.png)

### Rates tried on {NAMES[task]}

Perplexity of the validation people after all rounds, seed 0.

{_tried(results)}
"""


_HEAD = """# Results: the paper's claims on a real on-device model

*Made by `make study` (`python -m benchmarks.study`, then `benchmarks.study_report`)
of the raw results in [results/raw](results/raw); nothing here is written by hand but
the section "Why", which is `docs/results/notes.md`.*

{done} of {all} runs are done{missing}.

## Summary

Perplexity a target token and RougeL (%) of people never trained on, with 95 % intervals;
megabytes sent both ways until the loss where LoRA r = 5 ends (people trained on);
parameters that a client trains, on average.

{summary}

{ranking}

{claims}

"Confirmed" needs an interval that excludes 0, or, for whole curves, all seeds.
{notes}
## How it was measured

Every arm: Gemma 3 270M in float32, {rounds},
{clients} people a round, {steps} local steps of {batch} examples, LoRA on query and
value, ranks 5 to 50 from a power law unless it says otherwise, Adam. {people} people
trained on are evaluated on what they wrote last, which was held out, and as many never
trained on. A hash splits the latter: rates
were chosen an arm at a time on the loss of one half (validation people; seed 0; from a
ladder, on and on while the best is at the edge of those tried), and all else is measured
on the other half and on people trained on. Intervals resample people and seeds together
({seeds} seeds, the same people and cohorts for every arm); a "gap" is a paired
difference in nats a token, above 0 where the arm is worse. Intervals of perplexities
are wide because people differ; gaps are much narrower, because all arms meet the same
people. Centralised training sends nothing. This is a small study: it tells which way
and how surely on this model and this much training, not what large runs would end with.
Machines: {machines}.
"""


def _floors(folder: pathlib.Path) -> list[dict]:
  paths = [folder / 'floor' / f'shots{n}.json' for n in study.SHOTS]
  return [json.loads(path.read_text()) for path in paths if path.exists()]


def _machines(results: list[dict]) -> str:
  machines = [r['machine'] for r in results]
  return '; '.join(
    sorted(
      {
        f'{m["cores"]} cores of {m["processor"]}, jax {m["jax"]}'
        for m in machines
      }
    )
  )


def _rounds(found_of: dict[str, Found]) -> str:
  """Says for how many rounds and target tokens an arm is trained."""
  parts = []
  for task, found in found_of.items():
    rounds = _config(task).federated.num_rounds
    parts.append(f'{rounds} rounds on {NAMES[task]}')
    if found:
      tokens = next(iter(found.values())).curve('target_tokens')[-1]
      parts[-1] += f' ({tokens:,.0f} target tokens)'
  return ' and '.join(parts)


def page(raw: pathlib.Path, folder: pathlib.Path) -> str:
  """Returns the page, and draws its figures."""
  results = {task: runner.load(raw, task) for task in study.TASKS}
  found_of = {task: study_stats.arms(results[task]) for task in study.TASKS}
  floors_of = {task: _floors(raw / task) for task in study.TASKS}
  for task, found in found_of.items():
    if found:
      study_plots.curves(found, folder / f'{task}_curves.png', task)
      study_plots.inside(found, folder / f'{task}_inside.png', task)
  total = sum(
    len(runner.rates_wanted(arm, results[task])) + len(study.SEEDS) - 1
    for task in study.TASKS
    for arm in study.ARMS
  )
  done = sum(map(len, results.values()))
  c = _config()
  f, notes = c.federated, folder / 'notes.md'
  head = _HEAD.format(
    done=done, all=total, rounds=_rounds(found_of), clients=f.clients_per_round,
    steps=f.local_steps, batch=f.local_batch, seeds=len(study.SEEDS),
    people=c.eval.num_people,
    missing='' if done >= total else '; the others are missing from the tables',
    summary=summary(found_of, floors_of),
    ranking='\n\n'.join(filter(None, (ranking(t, found_of[t]) for t in found_of))),
    claims=claims(found_of),
    notes=f'\n{notes.read_text()}' if notes.exists() else '',
    machines=_machines([r for found in results.values() for r in found.values()]),
  )  # fmt: skip
  return '\n'.join(
    [head, *(_task(t, results[t], found_of[t], floors_of[t]) for t in found_of)]
  )


def main() -> None:
  folder, out = pathlib.Path(_RAW.value), pathlib.Path(_PAGE.value)
  out.write_text(page(folder / 'raw', folder))
  print(f'{out} is made of {folder}/raw.')


if __name__ == '__main__':
  machine.run(main)
