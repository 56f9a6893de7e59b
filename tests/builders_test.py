"""Data sets: order, counts, what is prepared and what is said about it."""

import importlib.util
import itertools

import numpy as np
import pytest

from hetlora_jax.data import builders
from hetlora_jax.data.builders import chitchat, records
from tests import entropy


@pytest.fixture(scope='session')
def synthetic(tmp_path_factory):
  return builders.open_dataset('synthetic', tmp_path_factory.mktemp('tfds'))


@pytest.fixture(scope='session')
def real_chats():
  """Lists the turns of the real package, without preparing them."""
  if importlib.util.find_spec('chitchat_dataset') is None:
    pytest.skip('chitchat-dataset is not installed')
  # A builder reads and writes nothing before it is prepared.
  return list(chitchat.Chitchat(data_dir='/nowhere').examples())


def conditional_entropy(sentences: list[list[bytes]]) -> float:
  """Returns the nats a word that are left when the word before is known."""
  pairs = [pair for words in sentences for pair in itertools.pairwise([b'', *words])]
  joint = entropy.unigram(np.array([b' '.join(pair) for pair in pairs]))
  return joint - entropy.unigram(np.array([pair[0] for pair in pairs]))


def test_records_are_ordered_by_person_then_time(synthetic):
  order = [(r['client'], r['time']) for r in synthetic.examples]
  assert order == sorted(order)


def test_examples_may_be_given_in_any_order(synthetic, tmp_path, monkeypatch):
  examples = builders.builder_of('synthetic').examples
  monkeypatch.setattr(
    builders.builder_of('synthetic'),
    'examples',
    lambda self: reversed(list(examples(self))),
  )
  mixed = builders.open_dataset('synthetic', tmp_path)
  for ours, theirs in zip(mixed.examples, synthetic.examples, strict=True):
    assert ours['client'] == theirs['client']
    assert ours['target'] == theirs['target']


def test_people_tile_the_examples(synthetic):
  people = list(synthetic.people)
  end = 0
  for person in people:
    assert person['first'] == end
    end += person['count']
    rows = range(person['first'], end, 7)
    owners = {synthetic.examples[int(row)]['client'] for row in rows}
    assert owners == {person['client']}
  assert end == len(synthetic.examples)
  assert len({person['client'] for person in people}) == 64


def test_synthetic_people_have_20_to_200_examples(synthetic):
  counts = np.array([person['count'] for person in synthetic.people])
  assert counts.min() >= 20
  assert counts.max() <= 200
  assert counts.max() > 4 * counts.min()


def test_synthetic_is_a_function_of_its_config(tmp_path):
  again = builders.open_dataset('synthetic/seed0', tmp_path / 'again')
  same = builders.open_dataset('synthetic', tmp_path / 'same')
  other = builders.open_dataset('synthetic/seed1', tmp_path / 'same')
  assert again.examples[41]['target'] == same.examples[41]['target']
  assert other.examples[41]['target'] != same.examples[41]['target']


def test_a_synthetic_grammar_is_easy_and_its_own(synthetic):
  by_grammar = [[], [], [], []]
  for record in itertools.islice(synthetic.examples, None, None, 2):
    number = int(record['client'].decode().removeprefix('person-')) % 4
    by_grammar[number].append(record['target'].split())
  unigram = entropy.unigram(np.concatenate(sum(by_grammar, [])))
  own = [conditional_entropy(sentences) for sentences in by_grammar]
  mixed = conditional_entropy(sum(by_grammar, []))
  assert max(own) < unigram / 3  # word order alone would leave a half
  assert max(own) < mixed - 0.3  # knowing the person helps


def test_half_prepared_data_is_prepared_again(tmp_path, monkeypatch):
  write = records.RecordBuilder._generate_examples

  def stop_midway(self, found):
    yield from itertools.islice(write(self, found), 5)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(records.RecordBuilder, '_generate_examples', stop_midway)
    with pytest.raises(KeyboardInterrupt):
      builders.open_dataset('synthetic', tmp_path)
  assert len(builders.open_dataset('synthetic', tmp_path).people) == 64


def test_losing_a_race_to_prepare_is_no_error(tmp_path, monkeypatch):
  examples = builders.builder_of('synthetic').examples

  def overtaken(self):
    monkeypatch.setattr(builders.builder_of('synthetic'), 'examples', examples)
    builders.open_dataset('synthetic', tmp_path)
    return examples(self)

  monkeypatch.setattr(builders.builder_of('synthetic'), 'examples', overtaken)
  assert len(builders.open_dataset('synthetic', tmp_path).people) == 64


def test_preparing_prints_one_line_and_reading_none(tmp_path, capfd):
  builders.open_dataset('synthetic', tmp_path)
  out, err = capfd.readouterr()
  assert out.startswith('Preparing synthetic/seed0/1.0.0 in ')
  assert out.count('\n') == 1
  assert err == ''
  builders.open_dataset('synthetic', tmp_path)
  assert capfd.readouterr() == ('', '')


def test_an_unknown_data_set_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"'redit' is unknown.*chitchat"):
    builders.open_dataset('redit', tmp_path)


def test_an_unknown_config_is_named(tmp_path):
  with pytest.raises(ValueError, match='seed99'):
    builders.open_dataset('synthetic/seed99', tmp_path)


def test_chitchat_says_what_to_install(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(ValueError, match=r"pip install 'hetlora_jax\[chat\]'"):
    builders.open_dataset('chitchat', tmp_path)


def test_chitchat_is_the_package_we_measured(real_chats):
  # 138,737 turns, less 7,168 that open a conversation and 12 blank ones;
  # 202 of 1,315 people only ever open one.
  assert len(real_chats) == 131_557
  assert len({turn.client for turn in real_chats}) == 1_113
  _, counts = np.unique([t.client for t in real_chats], return_counts=True)
  assert [int((counts >= n).sum()) for n in (20, 50, 100)] == [508, 299, 182]


def test_chitchat_turns_are_one_line_with_up_to_four_before(real_chats):
  for turn in real_chats:
    assert 1 <= len(turn.context) == len(turn.mine) <= 4
    assert all(text and '\n' not in text for text in [*turn.context, turn.target])


def test_chitchat_raw_counts():
  if importlib.util.find_spec('chitchat_dataset') is None:
    pytest.skip('chitchat-dataset is not installed')
  dataset = chitchat.read_dataset()
  turns = [turn for chat in dataset.values() for turn in chat['messages']]
  messages = list(itertools.chain(*turns))
  assert len(dataset) == 7_168
  assert len(turns) == 138_737
  assert len(messages) == 258_145
  assert len({message['sender'] for message in messages}) == 1_315
  _, counts = np.unique([turn[0]['sender'] for turn in turns], return_counts=True)
  assert [int((counts >= n).sum()) for n in (20, 50, 100)] == [531, 308, 189]
