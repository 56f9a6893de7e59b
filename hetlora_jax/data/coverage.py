"""What a run trains on of the data that it was given, and what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from hetlora_jax.config import Config, Federated
from hetlora_jax.data import cohorts, packing
from hetlora_jax.data.builders import Limits
from hetlora_jax.data.people import LeftOut, Population, evenly_spaced

MOST_CLIENTS = 128  # of whom a batch is counted, spread evenly over all
WORTH_A_WARNING = 0.01  # of the tokens, or of the examples


class Cut(NamedTuple):
  """Tokens of some batches, and those that have no room in them."""

  contexts: int
  contexts_cut: int
  targets: int
  targets_cut: int

  @property
  def share_of_contexts(self) -> float:
    return self.contexts_cut / max(1, self.contexts)

  @property
  def share_of_targets(self) -> float:
    return self.targets_cut / max(1, self.targets)


class Coverage(NamedTuple):
  """What became of all clients, and of the tokens of those trained on."""

  trained: int  # clients, copies included
  copies: int
  unseen: int
  left_out: LeftOut | None
  cut: Cut
  limits: Limits
  hurried: int  # clients that have no steps for all of their epochs
  local_steps: int


def measure(config: Config, population: Population) -> Coverage:
  """Counts clients, and the tokens of a batch of some of those trained on.

  Args:
    config: the experiment's; limits in `data` are numbers.
    population: its clients.
  """
  data, batch = config.data, config.federated.local_batch
  shape = packing.batch_shape(data, batch)
  clients = evenly_spaced(len(population.client_ids), MOST_CLIENTS)
  counts = [_cut(population, int(client), batch, shape) for client in clients]
  return Coverage(
    trained=len(population.client_ids),
    copies=data.copies,
    unseen=len(population.groups['unseen'].ids),
    left_out=population.left_out,
    cut=Cut(*np.sum(counts, 0).tolist()),
    limits=Limits(*(getattr(data, name) for name in Limits._fields)),
    hurried=_hurried(config.federated, population.num_examples),
    local_steps=config.federated.local_steps,
  )


def _hurried(f: Federated, examples_N: np.ndarray) -> int:
  if f.local_epochs is None:
    return 0
  wanted = [cohorts.examples_of_epochs(int(n), f.local_epochs) for n in examples_N]
  return int((np.array(wanted) > f.local_steps * f.step_examples).sum())


def _cut(
  population: Population, client: int, batch: int, shape: packing.BatchShape
) -> Cut:
  """Counts the tokens of a client's batch, of examples spread evenly over its own."""
  rows = evenly_spaced(int(population.num_examples[client]), batch)
  examples = [population.example('train', client, int(row)) for row in rows]
  if not examples:  # of a population of one's own
    return Cut(0, 0, 0, 0)
  kept = packing.kept(examples, shape)
  targets = sum(x.all_targets for x in examples)
  contexts = sum(len(x.tokens) - x.all_targets + x.cut for x in examples)
  contexts_cut = sum(x.contexts_cut for x in kept) + sum(x.cut for x in examples)
  targets_kept = sum(len(x.targets) for x in kept)
  return Cut(contexts, contexts_cut, targets, targets - targets_kept)


def told(found: Coverage) -> str:
  """Says in a line or two who is trained on, and what is cut off of their texts."""
  cut, lines = found.cut, []
  if (out := found.left_out) is not None:
    why = []
    if out.too_few:
      why.append(
        f'{out.too_few:,} left out for having fewer than {found.limits.min_examples} '
        f'examples ({out.examples_of_too_few:,} of {out.examples:,})'
      )
    if out.not_kept:
      why.append(f'{out.not_kept:,} beyond data.num_people')
    trained = f'{found.trained // found.copies:,} trained on'
    if found.copies > 1:
      trained += f', as {found.copies:,} each'
    parts = [trained, f'{found.unseen:,} never trained on', *why]
    lines.append(f'Of {out.clients:,} clients in the data: {", ".join(parts)}.')
  lines.append(
    f'Cut off: {cut.share_of_contexts:.2%} of the tokens of contexts and '
    f'{cut.share_of_targets:.2%} of those of targets.'
  )
  return '\n'.join(lines)


def warnings(found: Coverage) -> Iterator[str]:
  """Names the field to change wherever more than a hundredth is lost."""
  cut, limits, out = found.cut, found.limits, found.left_out
  if cut.share_of_targets > WORTH_A_WARNING:
    yield (
      f'{cut.share_of_targets:.1%} of the tokens of targets are cut off and bear no '
      f'loss: raise config.data.targets_per_example={limits.targets_per_example}, and '
      f'tokens_per_example={limits.tokens_per_example} with it.'
    )
  if cut.share_of_contexts > WORTH_A_WARNING:
    yield (
      f'{cut.share_of_contexts:.1%} of the tokens of contexts are cut off: raise '
      f'config.data.tokens_per_example={limits.tokens_per_example}, and '
      f'row_tokens={limits.row_tokens} if it is smaller.'
    )
  if out and out.examples_of_too_few > WORTH_A_WARNING * out.examples:
    yield (
      f'{out.examples_of_too_few / out.examples:.1%} of the examples belong to clients '
      'that are left out for having too few: lower '
      f'config.data.min_examples={limits.min_examples}.'
    )
  if found.hurried:
    yield (
      f'{found.hurried:,} of {found.trained:,} clients have no time for all of their '
      f'epochs: raise config.federated.local_steps={found.local_steps}.'
    )


def summary(found: Coverage) -> dict[str, Any]:
  """Returns the part of summary.json that it tells."""
  told: dict[str, Any] = {}
  if out := found.left_out:
    told |= {'clients': out.clients, 'examples': out.examples}
    told |= {'clients_of_too_few_examples': out.too_few}
    told |= {'clients_beyond_num_people': out.not_kept}
  told |= {'contexts_cut': found.cut.share_of_contexts}
  told |= {'targets_cut': found.cut.share_of_targets}
  return {f'data/{k}': v for k, v in (told | found.limits._asdict()).items()}
