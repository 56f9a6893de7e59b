"""Who is trained on what, and how a turn becomes tokens."""

import dataclasses
import time

import numpy as np
import pytest

from configs import tiny
from hetlora_jax import config
from hetlora_jax.data import builders, people, rendering
from hetlora_jax.data.builders.chitchat import Chitchat
from tests import entropy


class Characters:
  """Encodes a text as its code points, so that tests can read it back."""

  bos_id = 2

  def encode(self, text):
    return [ord(letter) for letter in text]


def text_of(tokens):
  return ''.join(map(chr, tokens))


DATA = dataclasses.replace(
  config.built(tiny.get_config()).data,
  name='synthetic', min_examples=25, unseen_fraction=0.3, heldout_fraction=0.25,
)  # fmt: skip


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('tfds')


@pytest.fixture
def load(data_dir):
  def load(**overrides):
    data = dataclasses.replace(DATA, **overrides)
    dataset = builders.open_dataset('synthetic', data_dir)
    return people.load(data, Characters(), dataset)

  return load


def rows(group, i):
  return set(range(group.first[i], group.first[i] + group.count[i]))


def test_heldout_turns_are_a_persons_latest(load, data_dir):
  groups = load().groups
  examples = builders.open_dataset('synthetic', data_dir).examples
  train, heldout = groups['train'], groups['heldout']
  assert train.ids == heldout.ids
  for i, name in enumerate(train.ids):
    early = [examples[int(row)] for row in rows(train, i)]
    late = [examples[int(row)] for row in rows(heldout, i)]
    assert {r['client'].decode() for r in early + late} == {name}
    assert max(r['time'] for r in early) < min(r['time'] for r in late)
    assert len(late) == max(1, (len(early) + len(late)) // 4)


def test_train_heldout_and_unseen_rows_never_overlap(load):
  groups = load().groups
  taken = [rows(group, i) for group in groups.values() for i in range(len(group.ids))]
  assert sum(map(len, taken)) == len(set().union(*taken))
  assert not set(groups['train'].ids) & set(groups['unseen'].ids)


def test_the_unseen_are_about_the_fraction_asked_for(load):
  groups = load(min_examples=2).groups
  assert 0.15 < len(groups['unseen'].ids) / 64 < 0.45
  assert load(unseen_fraction=0).groups['unseen'].ids == ()


def test_who_is_unseen_depends_on_the_name_alone(load):
  everyone = set(load(min_examples=2).groups['unseen'].ids)
  some = load(min_examples=50)
  unseen = set(some.groups['unseen'].ids)
  assert unseen
  assert unseen < everyone
  assert not everyone & set(some.client_ids)


def test_the_unseen_are_these_people(load):
  # A literal, since another hash would silently move people into training.
  unseen = load(min_examples=150).groups['unseen'].ids
  assert unseen == ('person-005', 'person-014', 'person-038', 'person-054')


def test_a_person_can_stand_for_several_clients(load):
  one, three = load(num_people=7), load(num_people=7, copies=3)
  assert three.client_ids == one.client_ids * 3
  np.testing.assert_array_equal(three.num_examples, np.tile(one.num_examples, 3))
  for client in (0, 6):
    for i in (0, 3):
      again = three.example('train', client + 14, i)
      np.testing.assert_array_equal(
        again.tokens, one.example('train', client, i).tokens
      )
  assert three.groups['heldout'].ids == one.groups['heldout'].ids


def test_so_many_people_are_kept_in_their_order(load):
  whole, some = load(), load(num_people=7)
  ids = some.client_ids
  assert len(ids) == 7
  assert list(ids) == sorted(ids, key=whole.client_ids.index)
  for kind in ('train', 'heldout'):
    everyone, kept = whole.groups[kind], some.groups[kind]
    assert kept.ids == ids
    at = [everyone.ids.index(i) for i in ids]
    np.testing.assert_array_equal(kept.first, everyone.first[at])
    np.testing.assert_array_equal(kept.count, everyone.count[at])


def test_keeping_people_leaves_the_unseen_alone(load):
  whole, some = load().groups['unseen'], load(num_people=7).groups['unseen']
  assert whole.ids == some.ids
  np.testing.assert_array_equal(whole.first, some.first)
  np.testing.assert_array_equal(whole.count, some.count)


def test_who_is_kept_depends_on_the_name_alone(load):
  kept = load(num_people=12).client_ids
  assert set(load(num_people=5).client_ids) < set(kept)
  busy = [i for i in kept if i in load(min_examples=80).client_ids]
  assert 0 < len(busy) < 12
  again = load(min_examples=80, num_people=len(busy))
  assert list(again.client_ids) == busy
  everyone = load().client_ids
  assert load(num_people=len(everyone)).client_ids == everyone


def test_who_is_kept_has_nothing_to_do_with_who_is_unseen(load):
  kept = load(num_people=10).client_ids
  by_unseen = sorted(load().client_ids, key=people._hash)
  assert set(kept) not in (set(by_unseen[:10]), set(by_unseen[-10:]))


def test_the_kept_are_these_people(load):
  # A literal, since another hash would silently move people out of training.
  kept = load(num_people=4).client_ids
  assert kept == ('person-011', 'person-025', 'person-041', 'person-043')


def test_keeping_more_people_than_there_are_is_named(load):
  count = len(load().client_ids)
  message = f'num_people={count + 1} exceeds the {count} .* lower it'
  with pytest.raises(ValueError, match=message):
    load(num_people=count + 1)


def test_min_examples_counts_train_and_heldout(load):
  groups = load(min_examples=60).groups
  total = groups['train'].count + groups['heldout'].count
  assert total.min() >= 60
  assert groups['unseen'].count.min() >= 60


def test_one_turn_is_held_out_even_of_a_fraction_of_zero(load):
  assert set(load(heldout_fraction=0).groups['heldout'].count) == {1}


def test_a_transcript_ends_with_the_target_after_a_prompt():
  example = people.encode(
    Characters(), rendering.Rendered('A: hi\nB: oh\nA:', ' yes\n')
  )
  assert example.tokens.dtype == np.int32
  assert example.tokens[0] == 2
  assert text_of(example.tokens[1:]) == 'A: hi\nB: oh\nA: yes\n'
  assert text_of(example.tokens[-example.num_target :]) == ' yes\n'


def test_without_a_bos_texts_begin_with_themselves():
  tokenizer = Characters()
  tokenizer.bos_id, tokenizer.eos_id = None, 3
  example = people.encode(tokenizer, rendering.Rendered('A: hi\nA:', ' yes\n'))
  assert text_of(example.tokens) == 'A: hi\nA: yes\n'
  assert (example.num_target, example.num_bos) == (5, 0)
  # But something must come before the first target.
  alone = people.encode(tokenizer, rendering.Rendered('', 'yes'))
  assert alone.tokens.tolist() == [3, *map(ord, 'yes')]
  assert (alone.num_target, alone.num_bos) == (3, 1)


def test_an_example_is_the_persons_turn(load, data_dir):
  population = load()
  client, i = 3, 5
  name = population.client_ids[client]
  everyone = builders.open_dataset('synthetic', data_dir)
  record = [r for r in everyone.examples if r['client'].decode() == name][i]
  example = population.example('train', client, i)
  context, target = record['context'][0].decode(), record['target'].decode()
  assert text_of(example.tokens[1:]) == f'B: {context}\nA: {target}\n'


def test_context_is_the_latest_turns():
  record = dict(
    context=[b'one', b'two', b'three'], mine=np.array([True, False, True]), target=b'x'
  )

  def render(turns):
    return rendering.as_data_set(people._chat(Chitchat, record, turns))

  assert render(2) == rendering.Rendered('B: two\nA: three\nA:', ' x\n')
  assert render(4).prompt.startswith('A: one\nB: two\nA:')


def test_an_example_that_is_not_there_is_named(load):
  population = load()
  count = population.num_examples[1]
  with pytest.raises(IndexError, match=f'train example {count} of person-'):
    population.example('train', 1, count)


def test_people_are_read_without_their_turns(load, monkeypatch):
  def refuse(self, text):
    raise AssertionError('tokenised before it was needed')

  monkeypatch.setattr(Characters, 'encode', refuse)
  assert len(load().client_ids) > 20


def test_a_million_people_split_quickly():
  counts = np.arange(10**6) % 50 + 2
  everyone = people.Group(
    ids=tuple(map(str, range(10**6))),
    first=np.cumsum(counts) - counts,
    count=counts,
  )
  start = time.perf_counter()
  unseen = people._is_unseen(everyone.ids, 0.2)
  groups = people._split(everyone, unseen, 0.2)
  assert time.perf_counter() - start < 15  # seconds; 3 when measured
  assert abs(len(groups['unseen'].ids) / 10**6 - 0.2) < 0.002


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('unseen_fraction', 1.0),
    ('unseen_fraction', -0.1),
    ('heldout_fraction', 1.5),
    ('heldout_fraction', float('nan')),
    ('num_people', -1),
    ('context_turns', 0),
    ('context_turns', 5),
  ],
)
def test_impossible_values_are_named(field, value):
  raw = tiny.get_config()
  raw.data[field] = value
  with pytest.raises(config.ConfigError, match=rf'config\.data\.{field}={value} '):
    config.resolve(raw)


def test_too_many_examples_asked_for_is_named(load):
  with pytest.raises(ValueError, match=r'min_examples=201 .* lower'):
    load(min_examples=201)


def test_setting_everyone_aside_is_named(load):
  with pytest.raises(ValueError, match=r'unseen_fraction=0.999999 .* lower'):
    load(unseen_fraction=0.999999)


def test_corpus_covers_people_evenly(data_dir):
  dataset = builders.open_dataset('synthetic', data_dir)
  texts = list(people.corpus(dataset, num_texts=40))
  assert len(texts) == 40
  assert all(text.startswith('B: ') and '\nA: ' in text for text in texts)
  assert len(set(texts)) == 40


def test_unigram_entropy_of_known_distributions():
  assert entropy.unigram(np.array([7, 7, 7])) == 0
  np.testing.assert_allclose(entropy.unigram(np.array([0, 1, 0, 2])), 1.5 * np.log(2))
