"""Clients made by a rule: nothing lost, nothing random but by its own seed."""

import dataclasses
import inspect

import numpy as np
import pytest

from configs import tiny
from hetlora_jax import config
from hetlora_jax.data import builders, cohorts, packing, partition, people

LABELS = np.repeat([f'p{i}' for i in range(7)], [40, 60, 30, 110, 50, 70, 40])
CLIENTS = 20
RULES = tuple(partition.PARTITIONERS)


def draw(name, *, clients=CLIENTS, alpha=1.0, seed=0, labels=LABELS):
  by = partition.Partition(name=name, clients=clients, alpha=alpha, seed=seed)
  return partition.draw(by, labels)


def sizes(rows):
  return np.array([len(r) for r in rows])


def labels_of(rows):
  """Counts the labels that clients have, [clients]."""
  return np.array([len(set(LABELS[r])) for r in rows])


@pytest.mark.parametrize('name', RULES)
def test_every_example_is_one_clients(name):
  rows = draw(name)
  assert len(rows) == CLIENTS
  np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(400))


@pytest.mark.parametrize('name', RULES)
def test_clients_are_a_function_of_the_partitions_seed(name):
  one, again, other = draw(name), draw(name), draw(name, seed=1)
  for a, b in zip(one, again, strict=True):
    np.testing.assert_array_equal(a, b)
  assert any(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize('name', RULES)
def test_a_clients_examples_are_in_no_order(name):
  long = max(draw(name), key=len)
  assert sorted(long) != list(long)


def test_iid_clients_are_equal_and_mixed():
  rows = draw('iid')
  assert set(sizes(rows)) == {20}
  assert labels_of(rows).min() >= 4


def test_a_small_alpha_gives_a_label_to_few():
  few, many = draw('dirichlet', alpha=0.05), draw('dirichlet', alpha=50.0)
  assert labels_of(few).mean() < 3 < 6 < labels_of(many).mean()
  assert sizes(few).std() > 3 * sizes(many).std()


def test_dirichlet_keeps_a_mixture_near_the_whole_for_large_alpha():
  rows = draw('dirichlet', alpha=1e6, clients=10)
  np.testing.assert_allclose(sizes(rows), 40, atol=7)


@pytest.mark.parametrize('alpha', [0.5, 1.0, 1.5])
def test_sizes_are_of_a_power_law(alpha):
  k = np.arange(1, CLIENTS + 1.0)
  want = k**-alpha / (k**-alpha).sum() * 400
  np.testing.assert_allclose(sizes(draw('by_size', alpha=alpha)), want, atol=1)


@pytest.mark.parametrize('shards', [1, 2, 3])
def test_pathological_clients_have_few_labels(shards):
  rows = draw('pathological', alpha=float(shards))
  np.testing.assert_allclose(sizes(rows), 20, atol=shards)
  # A shard that spans the end of a label has two.
  assert labels_of(rows).mean() <= shards + 0.5
  assert labels_of(rows).max() <= 2 * shards


def test_impossible_clients_are_named():
  with pytest.raises(ValueError, match=r"'even' is unknown; .*'natural', 'iid'"):
    draw('even')
  for clients in (0, 401):
    with pytest.raises(ValueError, match=rf'={clients} must be in \[1, 400\]'):
      draw('iid', clients=clients)


class Letters:
  bos_id = 2

  def encode(self, text):
    return [ord(letter) for letter in text]


@pytest.fixture(scope='module')
def load(tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('tfds')

  def load(name='dirichlet', **overrides):
    data = dataclasses.replace(
      config.built(tiny.get_config()).data, name='synthetic', min_examples=20,
      unseen_fraction=0.3, heldout_fraction=0.25, partition=name,
      partition_clients=50, partition_alpha=1.0, partition_seed=3,
    )  # fmt: skip
    dataset = builders.open_dataset('synthetic', data_dir)
    return people.load(dataclasses.replace(data, **overrides), Letters(), dataset)

  return load


def test_made_clients_are_people_like_others(load):
  population = load(num_people=20, copies=2)
  groups = population.groups
  assert groups['train'].ids == groups['heldout'].ids * 2
  assert not set(groups['train'].ids) & set(groups['unseen'].ids)
  assert all(i.startswith('dirichlet-0000') for i in population.client_ids)
  assert (groups['train'].count[:20] + groups['heldout'].count).min() >= 20
  seen = set()
  for group in (load(min_examples=2).groups[k] for k in ('train', 'heldout', 'unseen')):  # fmt: skip
    for first, count in zip(group.first, group.count, strict=True):
      rows = set(range(first, first + count))
      assert not rows & seen
      seen |= rows


def test_a_made_client_reads_examples_of_several_people(load, tmp_path):
  population = load('iid', unseen_fraction=0, min_examples=2)
  records = builders.open_dataset('synthetic', tmp_path).examples
  by = partition.Partition(name='iid', clients=50, seed=3)
  rows = partition.draw(by, np.zeros(len(records)))
  for client in (0, 49):
    for i in (0, 5):
      record = records[int(rows[client][i])]
      example = population.example('train', client, i)
      text = ''.join(map(chr, example.tokens[-example.num_target :]))
      assert text == f' {record["target"].decode()}\n'


def test_ids_do_not_depend_on_the_runs_seed(load):
  assert 'seed' not in inspect.signature(people.load).parameters
  assert load().client_ids == load().client_ids
  np.testing.assert_array_equal(load().num_examples, load().num_examples)


def test_cohorts_are_drawn_from_made_clients(load):
  population = load('pathological')
  cohort = cohorts.make_cohort(
    population, cohorts.Draw(
      federated=dataclasses.replace(
        config.built(tiny.get_config()).federated, clients_per_round=3,
        local_steps=2, min_local_steps=2, local_batch=2, sampling='by_size',
      ),
      shape=packing.BatchShape(rows=2, row_tokens=160, num_targets=160),
      count='dataset', pooled=False, pad_to=4,
    ),
    seed=0, round=0,
  )  # fmt: skip
  np.testing.assert_array_equal(
    cohort.num_examples[:3],
    population.groups['train'].count[cohort.client_id[:3]],
  )
