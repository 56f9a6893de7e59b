"""Makes docs/results.md and its figures of the study: python -m benchmarks.study_report.

Reads docs/results/raw (written by `benchmarks.study`), runs nothing. The numbers are
`benchmarks.study_stats`', the tables `benchmarks.study_tables`' and the figures
`benchmarks.study_plots`'. With --smoke nothing is written: the page must be the one
that is there.
"""

import json
import math
import pathlib
from collections.abc import Sequence

from absl import flags

from benchmarks import machine, study_plots, study_stats, study_tables
from benchmarks import study as runner
from benchmarks.study_plots import NAMES
from benchmarks.study_tables import Found
from configs import study

_RAW = flags.DEFINE_string('results', 'docs/results', 'Folder of the study.')
_PAGE = flags.DEFINE_string('page', 'docs/results.md', 'Page to write.')


def _task(
  task: str, results: dict[str, dict], found: Found, floors: Sequence[dict]
) -> str:
  if not found:
    return f'## {NAMES[task]}\n\nNo arm has run with all of its rates and seeds yet.\n'
  first = next(iter(found.values())).results[0]['curve']
  untouched = ', '.join(
    f'{kind} {math.exp(first[kind][0]):.2f}' for kind in ('seen', 'unseen')
  )
  target = study_stats.target_loss(found)
  reach = f'perplexity {math.exp(target):.2f}' if target == target else '-'
  return f"""## {NAMES[task]}

Untouched model: perplexity {untouched} (validation people included). Target: {reach}
on people seen. {study_tables.of_whole_targets(floors)}

{study_tables.details(task, found)}

![Curves](results/{task}_curves.png)

### The claims on {NAMES[task]}

{study_tables.evidence(found)}

Controls, not the paper's: against HetLoRA with the same weights, so that weights do not
decide, and the arm that wins against the next best composition, each with its own weights:

{study_tables.controls(found)}

How fast they learn, and whether they lose it again (loss in nats a token, all people):

{study_tables.speed(task, found)}

{study_tables.bending(found)}

### What happens inside on {NAMES[task]}

{study_tables.why(found)}

![Inside](results/{task}_inside.png)

### Rates tried on {NAMES[task]}

Perplexity of the validation people after all rounds, seed 0.

{study_tables.tried(results)}
"""


_HEAD = """# Results: the paper's claims on a real on-device model

*Made by `make study` (`python -m benchmarks.study`, then `benchmarks.study_report`)
of the raw results in [results/raw](results/raw); nothing here is written by hand but
the section "Why", which is `docs/results/notes.md`.*

{done} of {all} runs are done{missing}.

## Summary

Perplexity a target token and RougeL (%) of people never trained on, with 95 % intervals;
megabytes sent both ways until the loss where LoRA r = 5 ends (people trained on);
parameters that a client trains, on average over rounds and seeds.

{summary}

{ranking}

{claims}

"Better", "worse" and "confirmed" need a 95 % interval that excludes 0, or, for whole
curves, all seeds; intervals are not corrected for being so many.
{notes}
## How it was measured

Every arm: Gemma 3 270M in float32, {rounds},
{clients} people a round, {steps} local steps of {batch} examples, LoRA on query and
value, ranks 5 to 50 from a power law unless it says otherwise, Adam. {people} people
trained on are evaluated on what they wrote last, which was held out, and as many never
trained on. A hash splits the latter: rates were chosen an arm at a time on the loss of
one half (validation people; seed 0; from a ladder, on and on while the best is at the
edge of those tried), and all else is measured on the other half and on people trained
on, but for curves, which show all. Intervals resample people and seeds together ({seeds}
seeds, the same people and cohorts for every arm); a "gap" is a paired difference in
nats a token, above 0 where the arm is worse. Intervals of perplexities
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
      {f'{m["cores"]} cores of {m["processor"]}, jax {m["jax"]}' for m in machines}
    )
  )


def _rounds(found_of: dict[str, Found]) -> str:
  """Says for how many rounds and target tokens an arm is trained."""
  parts = []
  for task, found in found_of.items():
    rounds = study_tables.config(task).federated.num_rounds
    parts.append(f'{rounds} rounds on {NAMES[task]}')
    if found:
      tokens = next(iter(found.values())).curve('target_tokens')[-1]
      parts[-1] += f' ({tokens:,.0f} target tokens)'
  return ' and '.join(parts)


def draw(raw: pathlib.Path, folder: pathlib.Path) -> None:
  """Draws the figures of the page."""
  for task in study.TASKS:
    found = study_stats.arms(runner.load(raw, task))
    if found:
      study_plots.curves(found, folder / f'{task}_curves.png', task)
      study_plots.inside(found, folder / f'{task}_inside.png', task)


def page(raw: pathlib.Path, folder: pathlib.Path) -> str:
  """Returns the page."""
  results = {task: runner.load(raw, task) for task in study.TASKS}
  found_of = {task: study_stats.arms(results[task]) for task in study.TASKS}
  floors_of = {task: _floors(raw / task) for task in study.TASKS}
  total = sum(
    len(runner.rates_wanted(arm, results[task])) + len(study.SEEDS) - 1
    for task in study.TASKS
    for arm in study.ARMS
  )
  done = sum(map(len, results.values()))
  c = study_tables.config()
  f, notes = c.federated, folder / 'notes.md'
  head = _HEAD.format(
    done=done, all=total, rounds=_rounds(found_of), clients=f.clients_per_round,
    steps=f.local_steps, batch=f.local_batch, seeds=len(study.SEEDS),
    people=c.eval.num_people,
    missing='' if done >= total else '; the others are missing from the tables',
    summary=study_tables.summary(found_of, floors_of),
    ranking='\n\n'.join(filter(None, (study_tables.ranking(t, found_of[t]) for t in found_of))),
    claims=study_tables.claims(found_of),
    notes=f'\n{notes.read_text()}' if notes.exists() else '',
    machines=_machines([r for found in results.values() for r in found.values()]),
  )  # fmt: skip
  return '\n'.join(
    [head, *(_task(t, results[t], found_of[t], floors_of[t]) for t in found_of)]
  )


def main() -> None:
  folder, out = pathlib.Path(_RAW.value), pathlib.Path(_PAGE.value)
  if not (folder / 'raw').is_dir():
    raise ValueError(f'--results={folder} has no folder raw: run the study first.')
  text = page(folder / 'raw', folder)
  if machine.smoke():
    if text != out.read_text():
      raise ValueError(f'{out} is not what {folder}/raw gives: make study.')
    return print(f'{out} is what {folder}/raw gives.')
  draw(folder / 'raw', folder)
  out.write_text(text)
  print(f'{out} is made of {folder}/raw.')


if __name__ == '__main__':
  machine.start(main)
