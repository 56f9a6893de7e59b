"""Makes docs/results.md and its figures of the study: python -m benchmarks.study_report.

Reads docs/results/raw (written by `benchmarks.study`), runs nothing. Intervals are
95 % percentile bootstraps over people and seeds together; a difference between two
arms resamples both alike.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Sequence

import matplotlib.figure
import numpy as np
from absl import flags

from benchmarks import machine
from benchmarks import study as runner
from configs import study
from hetlora_jax import prng

_RAW = flags.DEFINE_string('results', 'docs/results', 'Folder of the study.')
_PAGE = flags.DEFINE_string('page', 'docs/results.md', 'Page to write.')
_DRAWS = 2000
OURS = 'HetLoRA 0.99'
NAMES = {'chat': 'chitchat', 'mail': 'mail_subject'}
_STYLES = ('-', '--', ':', '-.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
  """An arm at its chosen rate: S seeds, E people that are reported."""

  name: str
  rate: float
  results: list[dict]  # of each seed

  def losses(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns everybody's loss [S, E] and tokens [E]; none that validate."""
    people = [_reported(r['people'][kind], kind) for r in self.results]
    loss_SE = np.array([[p['loss_sum'] for p in seed] for seed in people])
    return loss_SE, np.array([p['tokens'] for p in people[0]])

  def curve(self, name: str) -> np.ndarray:
    """Returns a column of the curves, the mean over seeds: [evaluations]."""
    return np.mean([r['curve'][name] for r in self.results], axis=0)

  def rounds(self, name: str) -> np.ndarray:
    """Returns a number of every round, the mean over seeds: [rounds]."""
    return np.mean([r['rounds'][name] for r in self.results], axis=0)


def arms(results: dict[str, dict]) -> dict[str, Arm]:
  """Returns the arms whose rate could be chosen, with the seeds that ran."""
  out = {}
  for name in study.ARMS:
    rate = runner.best_rate(name, results)
    if rate is None:
      continue
    names = [runner.name_of(name, rate, seed) for seed in study.SEEDS]
    seeds = [results[n] for n in names if n in results]
    out[name] = Arm(name=name, rate=rate, results=seeds)
  return out


def resample(sum_SE: np.ndarray, count_E: np.ndarray) -> np.ndarray:
  """Bootstraps a ratio of sums over seeds and people: [_DRAWS].

  The draws of equally many seeds and people are the same, so paired.
  """
  rng = prng.host_stream(0, 'bootstrap')
  seeds, people = sum_SE.shape
  out = np.empty(_DRAWS)
  for i in range(_DRAWS):
    s, e = rng.integers(seeds, size=seeds), rng.integers(people, size=people)
    out[i] = sum_SE[np.ix_(s, e)].mean(0).sum() / count_E[e].sum()
  return out


def draws(arm: Arm, kind: str) -> np.ndarray:
  """Resamples seeds and people: the loss a token of each draw, [_DRAWS]."""
  return resample(*arm.losses(kind))


def loss(arm: Arm, kind: str) -> float:
  loss_SE, tokens_E = arm.losses(kind)
  return float(loss_SE.mean(0).sum() / tokens_E.sum())


def interval(values: np.ndarray) -> tuple[float, float]:
  low, high = np.percentile(values, [2.5, 97.5])
  return float(low), float(high)


def _perplexity(arm: Arm, kind: str) -> str:
  return _with_interval(*arm.losses(kind), 2, math.exp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gap:
  """By how much one arm's loss lies above another's, in nats a token."""

  mean: float
  low: float
  high: float

  def __str__(self):
    return f'{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]'


def gap(arm: Arm, other: Arm, kind: str) -> Gap:
  low, high = interval(draws(arm, kind) - draws(other, kind))
  return Gap(mean=loss(arm, kind) - loss(other, kind), low=low, high=high)


def target_loss(found: dict[str, Arm]) -> float | None:
  """Returns the loss to be reached: where r = 5 ends, on people seen."""
  reference = found.get('LoRA r = 5')
  return None if reference is None else float(reference.curve('seen')[-1])


def bytes_to(arm: Arm, target: float) -> float | None:
  """Returns the bytes sent both ways until a loss is reached, interpolated."""
  seen = arm.curve('seen')
  sent = arm.curve('up_bytes') + arm.curve('down_bytes')
  for i in range(1, len(seen)):
    if seen[i] <= target:
      share = (seen[i - 1] - target) / max(seen[i - 1] - seen[i], 1e-12)
      return float(sent[i - 1] + np.clip(share, 0, 1) * (sent[i] - sent[i - 1]))
  return None


def _megabytes(count: float | None) -> str:
  return 'not reached' if count is None else f'{count / 1e6:.1f}'


def _reported(people: Sequence[dict], kind: str) -> list[dict]:
  """Leaves out those who chose rates."""
  return [
    p
    for p in people
    if kind != 'unseen' or not runner.for_validation(p['client'])
  ]


def _rouge(results: Sequence[dict], text: str) -> str:
  """Returns RougeL in percent of people never seen, with its interval."""
  value_SE = np.array(
    [
      [p[text] for p in _reported(r['texts']['unseen'], 'unseen')]
      for r in results
    ]
  )
  return _with_interval(100 * value_SE, np.ones(value_SE.shape[1]), 1)


def _with_interval(
  sum_SE: np.ndarray, count_E: np.ndarray, digits: int, map=float
) -> str:
  low, high = interval(resample(sum_SE, count_E))
  mean = sum_SE.mean(0).sum() / count_E.sum()
  low, mean, high = (f'{map(x):.{digits}f}' for x in (low, mean, high))
  return f'{mean} [{low}, {high}]'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [heads, ['---', *['---:'] * (len(heads) - 1)], *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _floor_row(task: str, floor: dict) -> list[str]:
  """Returns the row of the untouched model."""
  name = 'untouched model'
  if floor['shots']:
    name += f', {floor["shots"]} examples in the prompt'
  one = Arm(name=name, rate=0, results=[floor])
  cells = [_perplexity(one, kind) for kind in ('seen', 'unseen')]
  if task in study.WRITTEN:
    cells += [_rouge([floor], text) for text in ('generated', 'teacher_forced')]
  return [name, '', '', *cells, '', '0', '0']


def summary(task: str, found: dict[str, Arm], floors: Sequence[dict]) -> str:
  """Returns the table of a task, the best on people never seen first."""
  target, ours = target_loss(found), found.get(OURS)
  heads = ['', 'rate', 'seeds', 'perplexity, seen', 'perplexity, unseen']
  if task in study.WRITTEN:
    heads += ['RougeL, unseen', 'teacher-forced RougeL, unseen']
  heads += ['gap to ours, unseen', 'MB to the target', 'trained']
  rows = []
  for arm in sorted(found.values(), key=lambda a: loss(a, 'unseen')):
    row = [arm.name, f'{arm.rate:g}', str(len(arm.results))]
    row += [_perplexity(arm, kind) for kind in ('seen', 'unseen')]
    if task in study.WRITTEN:
      texts = ('generated', 'teacher_forced')
      row += [_rouge(arm.results, text) for text in texts]
    paired = ours and len(ours.results) == len(arm.results) and arm is not ours
    row.append(str(gap(arm, ours, 'unseen')) if paired else '')
    row.append(_megabytes(bytes_to(arm, target) if target else None))
    row.append(f'{arm.results[0]["train/parameters"]:,.0f}')
    rows.append(row)
  rows += [_floor_row(task, floor) for floor in floors]
  return _table(heads, rows)


def _verdict(gaps: Sequence[Gap], wanted: int) -> str:
  """Says whether all gaps have the sign that is claimed, beyond doubt."""
  if all(g.low * wanted > 0 and g.high * wanted > 0 for g in gaps):
    return 'confirmed'
  if any(g.low * wanted < 0 and g.high * wanted < 0 for g in gaps):
    return 'not confirmed'
  return 'undecidable here'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """What the paper says: the first arm's loss is above the second's."""

  text: str
  pairs: tuple[tuple[str, str], ...]
  wanted: int = 1


CLAIMS = (
  Claim(
    text='HetLoRA beats homogeneous LoRA of low rank',
    pairs=(('LoRA r = 5', OURS),),
  ),
  Claim(
    text='HetLoRA beats homogeneous LoRA of high rank',
    pairs=(('LoRA r = 50', OURS),),
  ),
  Claim(
    text='HetLoRA beats reconstruct-then-SVD', pairs=(('Recon+SVD', OURS),)
  ),
  Claim(
    text='full fine-tuning is the ceiling of HetLoRA',
    pairs=((OURS, 'full fine-tuning'),),
  ),
  Claim(
    text='self-pruning helps (gamma = 0.99 against none)',
    pairs=(('HetLoRA, no pruning', OURS),),
  ),
  Claim(
    text='gentle pruning is best (0.99 against 0.95 and 0.85)',
    pairs=(('HetLoRA 0.95', OURS), ('HetLoRA 0.85', OURS)),
  ),
  Claim(
    text='sparsity weights beat uniform and data-size weights',
    pairs=(
      ('HetLoRA, uniform weights', OURS), ('HetLoRA, size weights', OURS),
    ),
  ),
  Claim(
    text='a wide range of ranks (5 to 50) beats 5 to 20 and 20 to 50',
    pairs=(('HetLoRA, r = 5 to 20', OURS), ('HetLoRA, r = 20 to 50', OURS)),
  ),
)  # fmt: skip


def claims(found: dict[str, Arm]) -> str:
  """Returns the table of the claims that one gap, or two, decide."""
  rows = []
  for claim in CLAIMS:
    if not all(name in found for pair in claim.pairs for name in pair):
      rows.append([claim.text, 'has not run yet', '', ''])
      continue
    pairs = [(found[a], found[b]) for a, b in claim.pairs]
    cells, verdicts = [], []
    for kind in ('seen', 'unseen'):
      gaps = [gap(a, b, kind) for a, b in pairs]
      cells.append('; '.join(map(str, gaps)))
      verdicts.append(_verdict(gaps, claim.wanted))
    verdict = verdicts[0]
    if verdicts[0] != verdicts[1]:
      verdict = f'seen: {verdicts[0]}; unseen: {verdicts[1]}'
    rows.append([claim.text, *cells, verdict])
  heads = ['claim', 'gap in nats, seen', 'unseen', 'verdict']
  return _table(heads, rows)


def speed(found: dict[str, Arm]) -> str:
  """Returns how fast low and high ranks learn, and whether they overfit."""
  rows = []
  for name in ('LoRA r = 5', 'LoRA r = 50', OURS, 'full fine-tuning'):
    if name not in found:
      continue
    arm = found[name]
    cells = [name]
    for kind in ('seen', 'unseen'):
      values = arm.curve(kind)
      first = (values[0] - values[1]) / max(values[0] - values.min(), 1e-9)
      cells += [f'{100 * first:.0f} %', f'{values[-1] - values.min():+.3f}']
    cells.append(f'{arm.rounds("train/loss")[-3:].mean():.3f}')
    rows.append(cells)
  heads = ['', 'of its gain at the first evaluation, seen', 'end above best, seen',
           'gain, unseen', 'end above best, unseen', 'training loss at the end']  # fmt: skip
  return _table(heads, rows)


def why(found: dict[str, Arm]) -> str:
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
  heads = ['', 'aggregation error', 'effective slots at the end',
           'effective clients of 5', 'mean rank at first', 'at the end', 'prunings']  # fmt: skip
  return _table(heads, rows)


def tried(results: dict[str, dict]) -> str:
  """Returns the validation perplexity of every arm at every rate."""
  rows = []
  for arm in study.ARMS:
    _, rates = study.rates(arm)
    names = [runner.name_of(arm, rate, study.SEEDS[0]) for rate in rates]
    cells = [
      f'{math.exp(min(runner.validation_loss(results[n]), 99)):.2f}'
      if n in results
      else ''
      for n in names
    ]
    if any(cells):
      rows.append([arm, *cells])
  grid = ' '.join(f'{rate:g}' for rate in study.RATES)
  full = ' '.join(f'{rate:g}' for rate in study.FULL_RATES)
  heads = ['', 'low rate', 'middle', 'high']
  return f'{_table(heads, rows)}\n\nRates: {grid}; full fine-tuning: {full}.'


def _draw(axis, found: dict[str, Arm], x: Callable, y: Callable) -> None:
  for i, arm in enumerate(found.values()):
    style = {'color': f'C{i % 10}', 'ls': _STYLES[i // 10 % 4]}
    width = 2.6 if arm.name == OURS else 1.3
    axis.plot(x(arm), y(arm), label=arm.name, lw=width, marker='.', **style)
  axis.grid(alpha=0.3)


def plot_curves(found: dict[str, Arm], path: pathlib.Path, task: str) -> None:
  """Draws loss against rounds and bytes, of people seen and unseen."""
  figure = matplotlib.figure.Figure((14, 8), layout='constrained')
  axes = figure.subplots(2, 2, sharey='row', squeeze=False)
  sent = lambda a: (a.curve('up_bytes') + a.curve('down_bytes')) / 1e6  # noqa: E731
  for row, kind in zip(axes, ('seen', 'unseen'), strict=True):
    own = lambda a, kind=kind: a.curve(kind)  # noqa: E731
    _draw(row[0], found, lambda a: a.curve('round'), own)
    _draw(row[1], found, sent, own)
    row[0].set(ylabel=f'loss of {kind} people (nats a token)')
    row[1].set(xscale='symlog')
  axes[1][0].set(xlabel='round')
  axes[1][1].set(xlabel='megabytes sent, both ways')
  figure.suptitle(f'{NAMES[task]}: mean over seeds')
  figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize='small',
                loc='outside right upper')  # fmt: skip
  figure.savefig(path, dpi=100)


def plot_diagnostics(found: dict[str, Arm], path: pathlib.Path, task) -> None:
  """Draws ranks, averaging error, slots in use and weights against rounds."""
  figure = matplotlib.figure.Figure((14, 7), layout='constrained')
  axes = figure.subplots(2, 2).ravel()
  for axis, (name, label) in zip(
    axes,
    {
      'rank/mean': 'mean rank of all people',
      'aggregation/error': 'aggregation error',
      'energy/effective_slots': "effective slots of the server's adapters",
      'weight/effective_clients': 'effective clients a round (of 5)',
    }.items(),
    strict=True,
  ):
    y = lambda a, name=name: a.rounds(name)  # noqa: E731
    _draw(
      axis, found, lambda a: np.arange(1, 1 + len(a.rounds('rank/mean'))), y
    )
    axis.set(xlabel='round', ylabel=label)
  figure.suptitle(f'{NAMES[task]}: what happens inside')
  figure.legend(*axes[0].get_legend_handles_labels(), fontsize='small',
                loc='outside right upper')  # fmt: skip
  figure.savefig(path, dpi=100)


def _task(
  task: str, results: dict[str, dict], folder: pathlib.Path, floors
) -> str:
  found = arms(results)
  if not found:
    return f'## {NAMES[task]}\n\nNo arm has run at all of its rates yet.\n'
  plot_curves(found, folder / f'{task}_curves.png', task)
  plot_diagnostics(found, folder / f'{task}_inside.png', task)
  first = next(iter(found.values())).results[0]['curve']
  untouched = ', '.join(
    f'{kind} {math.exp(first[kind][0]):.2f}' for kind in ('seen', 'unseen')
  )
  target = target_loss(found)
  reach = f'perplexity {math.exp(target):.2f} on people seen' if target else '-'
  return f"""## {NAMES[task]}

Untouched model: perplexity {untouched}. Target: {reach} (where LoRA r = 5 ends).

{summary(task, found, floors)}

![Curves](results/{task}_curves.png)

### The claims

{claims(found)}

Low rank is slow, high rank learns fast and overfits?

{speed(found)}

### What happens inside

{why(found)}

![Inside](results/{task}_inside.png)

### Rates tried

Perplexity of the validation people after all rounds, seed 0.

{tried(results)}
"""


_HEAD = """# Results: the paper's claims on a real on-device model

*Made by `make study` (`python -m benchmarks.study`, then `benchmarks.study_report`)
of the raw results in [results/raw](results/raw); nothing here is written by hand but
the notes in `docs/results/notes.md`, which follow the tables.*

{done} of {all} runs are done{missing}.

Every arm: Gemma 3 270M in float32, {rounds} rounds of {clients} people, {steps} local
steps of {batch} examples, LoRA on query and value, ranks 5 to 50 from a power law
unless it says otherwise, Adam. Rates were chosen an arm at a time on validation people
(half of the people never trained on, by a hash); everything below is measured on the
others, and on held-out turns of people trained on. Intervals: 95 %, over people and
seeds together ({seeds} paired seeds); "gap" is a paired difference in nats a token,
above 0 where the arm is worse than {ours}. A verdict needs an interval that excludes 0.
"Target" is the loss where LoRA r = 5 ends. Centralised training sends nothing.
Machines: {machines}.
"""


def _floors(folder: pathlib.Path) -> list[dict]:
  paths = [folder / 'floor' / f'shots{n}.json' for n in study.SHOTS]
  return [json.loads(path.read_text()) for path in paths if path.exists()]


def page(raw: pathlib.Path, folder: pathlib.Path) -> str:
  """Returns the page, and draws its figures."""
  results = {task: runner.load(raw, task) for task in study.TASKS}
  per_arm = len(study.RATES) + len(study.SEEDS) - 1
  total = len(study.TASKS) * len(study.ARMS) * per_arm
  done = sum(map(len, results.values()))
  machines = {
    f'{m["cores"]} cores of {m["processor"]}, jax {m["jax"]}'
    for task in results.values()
    for m in (r['machine'] for r in task.values())
  }
  f = study.get_config().federated
  head = _HEAD.format(
    done=done, all=total, rounds=f.num_rounds, clients=f.clients_per_round,
    steps=f.local_steps, batch=f.local_batch, seeds=len(study.SEEDS), ours=OURS,
    missing='' if done >= total else '; the others are missing from the tables',
    machines='; '.join(sorted(machines)),
  )  # fmt: skip
  notes = folder / 'notes.md'
  parts = [
    head,
    *[_task(t, results[t], folder, _floors(raw / t)) for t in study.TASKS],
  ]
  parts += [notes.read_text()] if notes.exists() else []
  return '\n'.join(parts)


def main() -> None:
  folder, out = pathlib.Path(_RAW.value), pathlib.Path(_PAGE.value)
  out.write_text(page(folder / 'raw', folder))
  print(f'{out} is made of {folder}/raw.')


if __name__ == '__main__':
  machine.run(main)
