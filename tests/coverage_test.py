"""Nothing of one's data is left out without a word."""

import dataclasses

import numpy as np
import pytest
from experiment_test import small_config

from hetlora_jax import config, experiment, files, training
from hetlora_jax.data import coverage, limits, packing
from hetlora_jax.data.builders import Limits
from hetlora_jax.data.people import Example, Group, LeftOut, Population

LETTERS = 171  # of a long target


@pytest.fixture(scope='module')
def write(tmp_path_factory):
  """Returns a writer of JSON Lines of clients with so many examples each."""
  folder = tmp_path_factory.mktemp('own')

  def write(name, counts, target='to me'):
    path = folder / f'{name}.jsonl'
    lines = [
      {'client': f'c{i:02}', 'context': f'say {n}', 'target': f'{n} {target}'}
      for i, count in enumerate(counts)
      for n in range(count)
    ]
    files.write_json_lines(path, lines)
    return str(path)

  return write


def own(path, **fields):
  return small_config(
    data__name='text_folder', data__path=path, model__random__vocab_size=290, **fields
  )


def test_nobody_of_ones_own_data_is_left_out_unless_asked_for(write):
  path = write('thirty', [4 + i for i in range(30)])
  found = experiment.prepare(own(path)).coverage
  assert found.left_out == LeftOut(30, 555, 0, 0, 0)
  assert found.trained + found.unseen == 30
  found = experiment.prepare(own(path, data__min_examples=20)).coverage
  # Clients of 4 to 19 examples.
  assert found.left_out == LeftOut(30, 555, 16, sum(range(4, 20)), 0)
  assert found.trained + found.unseen == 14
  told = coverage.told(found)
  assert '16 left out for having fewer than 20 examples (184 of 555)' in told
  (warning,) = coverage.warnings(found)
  assert (
    warning.startswith('33.2% of the examples') and 'data.min_examples=20' in warning
  )


def test_limits_of_ones_own_data_are_what_it_needs(write):
  path = write('long', [12] * 10, target='x' * LETTERS)
  x = experiment.prepare(own(path))
  longest = max(len(x.population.read(row).tokens) for row in range(120))
  assert x.config.data.tokens_per_example >= longest
  assert x.config.data.row_tokens >= longest
  assert x.coverage.cut[1::2] == (0, 0)
  assert not list(coverage.warnings(x.coverage))


def test_targets_that_are_cut_are_told_and_the_field_named(write, tmp_path, capsys):
  path = write('cut', [12] * 10, target='x' * LETTERS)
  run = training.train(
    own(path, data__targets_per_example=12, data__tokens_per_example=32), tmp_path
  )
  said = capsys.readouterr().out
  share = run.summary['data/targets_cut']
  assert 0.1 < share < 1
  assert f'{share:.2%} of those of targets' in said
  assert f'Warning: {share:.1%} of the tokens of targets' in said
  assert 'config.data.targets_per_example=12' in said
  assert run.summary['data/clients'] == 10 and run.summary['data/examples'] == 120
  assert run.summary['data/targets_per_example'] == 12


def population(lengths, cut=0):
  """Makes a client for each (context, target) length, of examples all alike."""
  one = np.ones(len(lengths), np.int64)
  group = Group(
    ids=tuple(map(str, range(len(lengths)))),
    first=3 * np.arange(len(one)),
    count=3 * one,
  )

  def read(row):
    context, target = lengths[row // 3]
    return Example(np.zeros(context + target, np.int32), target, cut)

  return Population(
    groups=dict.fromkeys(('train', 'heldout', 'unseen'), group), read=read
  )


def measure(population, **data):
  c = config.Config(
    federated=config.Federated(local_batch=2),
    data=limits.filled(config.Data(**data)),
  )
  return coverage.measure(c, population).cut


def test_what_is_cut_is_what_batches_lack():
  lengths = [(30, 10), (5, 2), (3, 40)]
  data = dict(tokens_per_example=20, targets_per_example=12, row_tokens=24)
  found = measure(population(lengths), **data)
  shape = packing.batch_shape(limits.filled(config.Data(**data)), 2)
  in_batches = [
    packing.pack([population(lengths).read(3 * i)] * 2, shape) for i in range(3)
  ]
  assert found.targets == 2 * (10 + 2 + 40)
  assert found.contexts == 2 * (30 + 5 + 3)
  kept = sum(int((b.weight > 0).sum()) for b in in_batches)
  assert found.targets - found.targets_cut == kept
  # All but an example's last target are inputs.
  inputs = sum(int((b.segment > 0).sum()) for b in in_batches) + 6
  assert found.contexts - found.contexts_cut == inputs - kept


def test_a_client_of_a_population_of_ones_own_may_have_nothing():
  empty = population([(5, 2), (3, 1)])
  empty.groups['train'].count[1] = 0
  assert measure(empty).targets == 2 * 2


def test_what_a_summary_lost_before_packing_counts_too():
  whole, cut = (measure(population([(5, 2)], cut)) for cut in (0, 7))
  assert whole.contexts_cut == 0
  assert cut.contexts_cut == 2 * 7 and cut.contexts == whole.contexts + 2 * 7


@pytest.mark.parametrize(
  ('given', 'want'),
  [
    ({}, Limits(20, 96, 32, 256)),
    ({'tokens_per_example': 400}, Limits(20, 400, 32, 400)),
    ({'tokens_per_example': 16}, Limits(20, 16, 15, 256)),
    # Targets of more room leave contexts theirs.
    ({'targets_per_example': 132}, Limits(20, 196, 132, 256)),
    ({'row_tokens': 512, 'min_examples': 3}, Limits(3, 96, 32, 512)),
  ],
)
def test_a_limit_that_is_given_stays_and_others_fit(given, want):
  data = limits.filled(config.Data(**given))
  assert Limits(*(getattr(data, name) for name in Limits._fields)) == want


def test_clients_without_steps_for_their_epochs_are_told():
  c = config.Config(
    federated=config.Federated(local_batch=2, local_steps=2, local_epochs=1.5),
    data=limits.filled(config.Data()),
  )
  few = population([(5, 2)] * 4)  # 3 examples: 1.5 passes are 4, two steps
  assert coverage.measure(c, few).hurried == 0
  hurry = dataclasses.replace(c.federated, local_epochs=2)
  found = coverage.measure(dataclasses.replace(c, federated=hurry), few)
  assert found.hurried == 4
  assert 'raise config.federated.local_steps=2' in next(coverage.warnings(found))
