"""The main job without its data and weights: chats of the real lengths.

python -m benchmarks.chats

counts the tokens of everybody's chats, as the main job encodes them, and writes
benchmarks/results/chats.json. Where neither data nor weights can be had, others
train on random tokens of these lengths and random weights in a published shape:
what a round costs depends on nothing else.
"""

import functools
import json

import numpy as np

from benchmarks import machine
from configs import chitchat_gemma3
from hetlora_jax import config, points
from hetlora_jax.data import people
from hetlora_jax.data.people import Example, Group, Population
from hetlora_jax.models import shapes

LENGTHS = machine.ROOT / 'benchmarks' / 'results' / 'chats.json'
_OF_EACH = 2  # examples whose lengths are kept, of every person


def measure() -> dict:
  """Returns everybody's count of examples, and lengths of some of them."""
  c = config.resolve(machine.config())
  crowd = points.prepare(c).experiment.population
  lengths = []
  for person, count in enumerate(crowd.num_examples):
    for i in people.evenly_spaced(int(count), _OF_EACH):
      example = crowd.example('train', person, int(i))
      lengths.append([len(example.tokens), example.num_target])
  return {'counts': crowd.num_examples.tolist(), 'lengths': lengths}


def report(result: dict) -> str:
  """Tells how long chats are."""
  tokens, targets = np.array(result['lengths']).T
  told = [
    f'{name} {x.mean():.0f} on average, {np.quantile(x, 0.95):.0f} at most in 95 %'
    for name, x in (('tokens', tokens), ('targets', targets))
  ]
  return (
    f'{len(result["counts"])} people with {np.mean(result["counts"]):.0f} '
    f'examples on average; of {len(tokens)} examples {"; ".join(told)} '
    f'({machine.told(result["machine"])}).'
  )


def crowd(vocabulary: int, clients: int) -> Population:
  """Returns people who talk in random tokens, as long as real ones do.

  Args:
    vocabulary: of the model.
    clients: to train on; four more are never trained on.
  """
  found = json.loads(LENGTHS.read_text())
  count_N = np.resize(found['counts'], clients + 4)
  first_N = np.cumsum(count_N) - count_N
  everyone = Group(
    ids=tuple(f'client-{i}' for i in range(len(count_N))),
    first=first_N,
    count=count_N,
  )

  @functools.lru_cache(1 << 16)
  def read(row: int) -> Example:
    rng = np.random.default_rng(row)
    tokens, targets = found['lengths'][rng.integers(len(found['lengths']))]
    drawn = rng.integers(3, vocabulary, tokens, dtype=np.int32)
    return Example(drawn, targets)

  def part(of: slice) -> Group:
    return Group(ids=everyone.ids[of], first=first_N[of], count=count_N[of])

  train = part(slice(clients))
  return Population(
    groups={
      'train': train, 'heldout': train, 'unseen': part(slice(clients, None))
    },
    read=read,
  )  # fmt: skip


def prepare(
  shape: str = '', *, clients: int, at_once: int | None, seeds: int = 1, **fields
) -> points.Points:
  """Prepares the main job on random weights and tokens.

  Args:
    shape: a key of models/shapes.py, or '' for the tiny model of a smoke.
    clients: a round, of twice as many.
    at_once: clients that train at once; None: all.
    seeds: points of a sweep.
    **fields: of the configuration, with __ for the dots.
  """
  raw = chitchat_gemma3.get_config() if shape else machine.smoke_config()
  vocabulary = 256  # what any tokenizer has
  if shape:
    raw.model.source = f'random:{shape}'
    vocabulary = shapes.SHAPES[shape].vocab_size
  raw.data.name = 'synthetic'  # trains a tokenizer, which nobody uses
  raw.federated.clients_per_round = clients
  raw.federated.clients_at_once = at_once
  raw.eval.num_people = 2
  raw.update_from_flattened_dict(
    {name.replace('__', '.'): x for name, x in fields.items()}
  )
  configs = []
  for seed in range(seeds):
    raw.seed = seed
    configs.append(config.resolve(raw))
  return points.prepare(*configs, population=crowd(vocabulary, 2 * clients))


if __name__ == '__main__':
  machine.define_config()
  machine.run('chats', measure, report)
