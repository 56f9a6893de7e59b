"""What a data set is like: clients, examples, lengths, labels."""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Iterator

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from hetlora_jax import config
from hetlora_jax.data import builders, coverage, limits, people
from hetlora_jax.models.tokenizer import Tokenizer

AT_LEAST = (2, 5, 10, 20, 50, 100)  # examples that clients are counted by
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
MOST_READ = 4096  # examples whose tokens are counted
_LABELS_SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
  """Counts of a data set; tokens are of MOST_READ examples at most."""

  name: str
  examples_N: np.ndarray  # examples of each client
  context_E: np.ndarray  # tokens of a context, bos and cue included
  target_E: np.ndarray
  label_counts: dict[str, int]  # largest first; empty where there are none
  of_a_run: list[str]  # lines that say what a run would train on

  @property
  def title(self) -> str:
    return (
      f'{self.name}: {self.examples_N.sum():,} examples of '
      f'{len(self.examples_N):,} clients'
    )


def collect(data: config.Data, tokenizer: people.Tokenizer) -> Statistics:
  """Counts a data set, preparing it first if it never was."""
  dataset = builders.of(data)
  clients, _ = people.all_clients(dataset, people.partition_of(data))
  read = people.reader(dataset, tokenizer, data)
  rows = people.evenly_spaced(len(dataset.examples), MOST_READ)
  examples = [read(int(row)) for row in rows]
  labels = collections.Counter()
  if dataset.builder.labelled:
    for person in dataset.people:
      labels.update(label.decode() for label in person['labels'])
  return Statistics(
    name=data.name,
    examples_N=clients.count,
    context_E=np.array([len(x.tokens) - x.all_targets for x in examples]),
    target_E=np.array([x.all_targets for x in examples]),
    label_counts=dict(labels.most_common()),
    of_a_run=_of_a_run(data, dataset, tokenizer),
  )


def _of_a_run(
  data: config.Data, dataset: builders.Dataset, tokenizer: people.Tokenizer
) -> list[str]:
  """Says what a run with these fields of `data` would train on, or why none can."""
  data = limits.filled(data, dataset, tokenizer)
  given = ', '.join(f'{name}={getattr(data, name)}' for name in limits.Limits._fields)
  try:
    population = people.load(data, tokenizer, dataset)
    found = coverage.measure(config.Config(data=data), population)
  except ValueError as error:
    return [f'A run with {given} cannot be: {error}']
  told = coverage.told(found).splitlines()
  return [f'A run with {given}:', *told, *coverage.warnings(found)]


def table(found: Statistics) -> str:
  """Returns lines of text: quantiles, clients by examples, largest labels."""
  heads = ['mean', 'min', *(f'{p} %' for p in PERCENTILES[1:-1]), 'max']
  lines = [
    f'{found.title}; tokens of {len(found.target_E):,}',
    ' ' * 20 + ''.join(f'{head:>8}' for head in heads),
  ]
  for title, values in (
    ('examples a client', found.examples_N),
    ('context tokens', found.context_E),
    ('target tokens', found.target_E),
  ):
    cells = [values.mean(), *np.percentile(values, PERCENTILES)]
    lines.append(f'{title:20}' + ''.join(f'{cell:8.5g}' for cell in cells))
  counts = [f'{n}: {(found.examples_N >= n).sum():,}' for n in AT_LEAST]
  lines.append('clients of at least  ' + ', '.join(counts))
  if found.label_counts:
    shown = list(found.label_counts.items())[:_LABELS_SHOWN]
    head = f'labels ({len(found.label_counts):,})'.ljust(21)
    lines.append(head + ', '.join(f'{label} {count:,}' for label, count in shown))
  lines += found.of_a_run
  return '\n'.join(lines)


def shown(
  data: config.Data,
  tokenizer: Tokenizer,
  count: int,
  marks: tuple[str, str] = ('[[', ']]'),
) -> Iterator[str]:
  """Yields examples, spread evenly over all, as a model reads them.

  Args:
    data: whose, and how they are written.
    tokenizer: of the model.
    count: how many.
    marks: what stands around tokens that bear the loss.
  """
  dataset = builders.of(data)
  clients, order_E = people.all_clients(dataset, people.partition_of(data))
  data = limits.filled(data, dataset, tokenizer)
  read = people.reader(dataset, tokenizer, data, order_E)
  for row in people.evenly_spaced(len(dataset.examples), count):
    example = read(int(row))
    at = int(np.searchsorted(clients.first, row, 'right')) - 1
    text, bearing = (
      '',
      np.arange(len(example.tokens)) >= len(example.tokens) - example.num_target,
    )
    bearing[[*example.earlier]] = True
    for bears, tokens in itertools.groupby(range(len(bearing)), bearing.__getitem__):
      run = tokenizer.spell(example.tokens[[*tokens]].tolist())
      text += run.join(marks) if bears else run
    cut = f', {example.cut} more of its context cut off' if example.cut else ''
    yield (
      f'{clients.ids[at]}, example {row - clients.first[at] + 1} of '
      f'{clients.count[at]}: {len(bearing)} tokens, {bearing.sum()} bear the loss{cut}\n'
      f'{text.rstrip()}\n'
    )


def plot(found: Statistics, path: pathlib.Path) -> None:
  """Draws histograms of examples a client, lengths and labels."""
  panels = 3 + bool(found.label_counts)
  figure = matplotlib.figure.Figure((4.4 * panels, 3.9), layout='constrained')
  figure.suptitle(found.title)
  sizes, context, target, *labels = figure.subplots(1, panels)
  _draw_sizes(sizes, found.examples_N)
  _draw_lengths(context, found.context_E, 'Context')
  _draw_lengths(target, found.target_E, 'Target')
  for axis in labels:
    _draw_labels(axis, found.label_counts)
  figure.savefig(path, dpi=110)


def _draw_sizes(axis, examples_N: np.ndarray) -> None:
  """Draws how many clients have how many examples; both are very uneven."""
  edges = np.unique(np.geomspace(1, max(examples_N) + 1, 24).astype(int))
  _draw_histogram(axis, examples_N, edges - 0.5)
  axis.set(title='Examples a client', xlabel='examples', ylabel='clients')
  axis.set(xscale='log', yscale='symlog')
  wide = max(examples_N) > 500
  ticks = matplotlib.ticker.LogLocator(subs=(1,) if wide else (1, 2, 5))
  for side in (axis.xaxis, axis.yaxis):
    side.set_major_formatter('{x:,g}')
  axis.xaxis.set_major_locator(ticks)
  axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  axis.set(xlim=(0.7, None), ylim=(0, None))


def _draw_lengths(axis, tokens_E: np.ndarray, title: str) -> None:
  """Draws how long texts are; the longest hundredth falls into the last bar."""
  top = int(np.percentile(tokens_E, 99)) + 1
  edges = np.arange(0, top + 1, max(1, round(top / 40))) - 0.5
  _draw_histogram(axis, tokens_E, edges)
  axis.set(title=title, xlabel='tokens', ylabel='examples')


def _draw_histogram(axis, values: np.ndarray, edges: np.ndarray) -> None:
  """Draws bars, and marks the median and the 95th percentile."""
  axis.hist(np.minimum(values, int(edges[-1])), bins=edges, color='C0', alpha=0.85)
  for share, style, name in ((50, '--', 'median'), (95, ':', '95 % have at most')):
    at = float(np.percentile(values, share))
    axis.axvline(at, color='C3', ls=style, label=f'{name} {at:,.4g}')
  axis.legend(edgecolor='none', fontsize='small')
  axis.grid(axis='y', alpha=0.3)


def _draw_labels(axis, counts: dict[str, int]) -> None:
  """Draws the largest labels and all others together."""
  shown = list(counts.items())[:_LABELS_SHOWN]
  rest = sum(counts.values()) - sum(count for _, count in shown)
  if rest:
    shown.append((f'{len(counts) - len(shown)} others', rest))
  names = [name if len(name) < 22 else f'{name[:20]}…' for name, _ in shown]
  bars = axis.barh(range(len(shown)), [count for _, count in shown], color='C2')
  axis.bar_label(bars, padding=2, fontsize='small')
  axis.set_yticks(range(len(shown)), names, fontsize='small')
  axis.invert_yaxis()
  axis.margins(x=0.12)
  axis.set(title='Labels', xlabel='examples')
