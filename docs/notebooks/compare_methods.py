# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Compare three methods on your own data
#
# From a file of JSON Lines to a table: what the data are like, three methods with two
# seeds each, their curves, and who gains. It trains a tiny random model in a minute
# or two; for a real one change the one line that says so.

# %%
import contextlib
import json
import pathlib
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import hetlora_jax as hl
from configs import tiny
from hetlora_jax import experiment, training
from hetlora_jax.data import statistics

folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## The data
#
# A line an example: whose it is, what was said before, and what the client answered.
# [Your own data](../data.md#your-own-data) tells of more. Give the path of your file
# here; without one, answers of 24 made-up shops to their customers are taken, each
# with goods, prices and a manner of its own.

# %%
DATA = None  # pathlib.Path('my_data.jsonl')

GOODS = ('lamps', 'boots', 'tents', 'cups', 'bikes', 'rugs', 'pens', 'coats')
MANNERS = ('Hi! {} Bye!', 'Dear customer, {}', '{} Thanks, the team', '{}')


def example(shop, rng):
  good = GOODS[(shop + rng.integers(2)) % len(GOODS)]
  question, answer = [
    (f'Do you sell {good}?', f'yes, {good} are in stock.'),
    (f'What do {good} cost?', f'{good} are {5 * (shop % 7) + 10} euros.'),
    (f'When will my {good} come?', f'your {good} come in {shop % 5 + 2} days.'),
  ][rng.integers(3)]
  return {
    'client': f'shop {shop}',
    'context': [question],
    'target': MANNERS[shop % len(MANNERS)].format(answer),
  }


if DATA is None:
  rng = np.random.default_rng(0)
  lines = [
    example(shop, rng) for shop in range(24) for _ in range(rng.integers(10, 50))
  ]
  DATA = folder / 'shops.jsonl'
  DATA.write_text('\n'.join(map(json.dumps, lines)))
print(*DATA.read_text().splitlines()[::40][:3], sep='\n')

# %% [markdown]
# ## The experiment
#
# `hl.default_config()` has every field, [listed here](../flags.md); `tiny` is it with a
# small random model. The best evaluation on held-out turns is kept, and a run ends once
# three evaluations in a row were no better.

# %%
c = tiny.get_config()  # for a real model: c.model.source = 'smollm2_135m'
c.data.name, c.data.path = 'text_folder', str(DATA)
c.update_from_flattened_dict({
  'federated.num_rounds': 12,
  'federated.clients_per_round': 6,
  'federated.clients_at_once': None,
  'federated.r_max': 8,
  'lora.targets': ('q', 'v', 'down'),
  'model.random.width': 32,
  'model.random.num_layers': 1,
  'client_optimizer.learning_rate': 0.03,
  'eval.every': 2,
  'eval.patience': 3,
  'checkpoint.every': 4,
  'checkpoint.keep_best': True,
})  # fmt: skip
x = experiment.prepare(hl.resolve(c))
print(statistics.table(statistics.collect(x.config.data, x.model.tokenizer)))

# %% [markdown]
# ## Training
#
# Seeds of one method share a program (`train_points`). Each run has a folder: the cell
# once more continues what was interrupted. What training says goes into a file.

# %%
METHODS, SEEDS = ('hetlora', 'flexlora', 'fedit'), (0, 1)
runs = {}
with (folder / 'log.txt').open('w') as log, contextlib.redirect_stdout(log):
  for method in METHODS:
    points = [
      training.Point(
        hl.resolve(c).replace(method=method, seed=seed), folder / f'{method}_{seed}'
      )
      for seed in SEEDS
    ]
    for seed, run in zip(SEEDS, training.train_points(points), strict=True):
      runs[method, seed] = run
print(*(folder / 'log.txt').read_text().splitlines()[-3:], sep='\n')

# %% [markdown]
# ## The table
#
# Of each run, the row of its best round. Loss is in nats per token that the client wrote: *seen* is of
# held-out turns of clients that were trained on, *unseen* of clients that never were. The
# best round was chosen by the seen ones, so the unseen ones are the fair comparison.

# %%
rows = []
for (method, seed), run in runs.items():
  best = next(r for r in run.history if r['round'] == run.summary['best']['round'])
  rows.append({
    'method': method,
    'seed': seed,
    'best round': best['round'],
    'seen': best['eval/seen/loss'],
    'unseen': best['eval/unseen/loss'],
    'unseen, untrained': run.history[0]['eval/unseen/loss'],
    'MB up': best['comm/total_up_bytes'] / 1e6,
  })  # fmt: skip
table = pd.DataFrame(rows)
table.round(3)

# %%
table.groupby('method', sort=False)[['seen', 'unseen', 'MB up']].agg(
  ['mean', 'std']
).round(3)

# %% [markdown]
# Two seeds say little: a difference smaller than their spread is none. And FedIT gives
# every client the largest rank, so it trains and sends twice as much: it shows what the
# other two could reach, not what weak devices can do.
#
# ## Curves
#
# A history is a list of rows, so `pandas.DataFrame(run.history)` is a table of all that a
# round measures.

# %%
history = pd.concat(
  pd.DataFrame(run.history).assign(method=method, seed=seed)
  for (method, seed), run in runs.items()
)
figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout='constrained')
shown = {
  'eval/unseen/loss': 'Loss of unseen clients',
  'train/loss': 'Training loss of the cohort',
  'rank/mean': 'Mean rank of all clients',
}
for axis, (column, title) in zip(axes, shown.items(), strict=True):
  for color, method in enumerate(METHODS):
    for seed, line in history[history.method == method].groupby('seed'):
      line = line.dropna(subset=column)
      axis.plot(
        line['round'], line[column], color=f'C{color}', ls=('-', '--')[seed],
        label=method if seed == 0 else None,
      )  # fmt: skip
  axis.set(title=title, xlabel='round')
  axis.grid(alpha=0.3)
axes[0].legend(title='dashed: seed 1')
plt.show()

# %% [markdown]
# ## Who gains
#
# `run.people` has everybody's summed loss and tokens at the last evaluation.

# %%
people = pd.concat(
  pd.DataFrame(run.people['seen']).assign(method=method, seed=seed)
  for (method, seed), run in runs.items()
)
people['loss'] = people['loss_sum'] / people['tokens']
people.pivot_table(index='client', columns='method', values='loss').round(2).head(8)

# %% [markdown]
# Next: more methods and seeds as [a sweep](../howto/sweep.md), a page that
# [compares runs](../report.md), or [what a round does](first_round.md).
