"""Multi-Session Chat as ParlAI releases it: who answers whom, when."""

import json

import pytest

from hetlora_jax.data import builders

TEXTS = ['Hi again!', 'Oh, hi.', 'How was the race?', 'I won it!']


def conversation(pair='train:ordered_9', session=2, texts=TEXTS, ids=True):
  """Returns a line of the release."""
  people = [{'id': f'Speaker {i % 2 + 1}'} if ids else {} for i in range(9)]
  return {
    'personas': [['I run.'], ['I ask.']],
    'dialog': [
      {'text': text, 'convai2_id': pair, 'agg_persona_list': []} | people[i]
      for i, text in enumerate(texts)
    ],
    'previous_dialogs': [
      {
        'personas': [['I run.'], ['I ask.']],
        'dialog': [{'text': 'Hello.'}, {'text': 'Hello!'}],
        'time_num': 3, 'time_unit': 'days', 'time_back': '3 days ago',
      }
    ],
    'metadata': {'initial_data_id': pair, 'session_id': session - 1},
  }  # fmt: skip


def write(folder, session, split, lines):
  path = folder / 'msc' / 'msc_dialogue' / f'session_{session}' / f'{split}.txt'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
  return path


def load(folder):
  name, path = 'multi_session_chat', str(folder / 'msc')
  return builders.open_dataset(name, folder / 'd', path)


def test_two_people_answer_each_other_over_sessions(tmp_path):
  write(tmp_path, 3, 'train', [conversation(session=3, texts=['Back', 'Yes'])])
  write(tmp_path, 2, 'train', [conversation()])
  write(tmp_path, 2, 'valid', [conversation('valid:ordered_9')])
  found = load(tmp_path)
  assert [p['client'].decode() for p in found.people] == [
    f'{pair}:ordered_9/Speaker {i}' for pair in ('train', 'valid') for i in (1, 2)
  ]  # fmt: skip
  rows = [r for r in found.examples if r['client'] == b'train:ordered_9/Speaker 2']  # fmt: skip
  assert [r['target'].decode() for r in rows] == ['Oh, hi.', 'I won it!', 'Yes']
  assert [t.decode() for t in rows[1]['context']] == TEXTS[:3]
  assert list(rows[1]['mine']) == [False, True, False]
  assert list(rows[2]['context']) == [b'Back']


def test_who_is_not_named_takes_turns(tmp_path):
  write(tmp_path, 5, 'test', [conversation(ids=False)])
  assert [p['count'] for p in load(tmp_path).people] == [1, 2]


def test_the_first_session_and_other_files_are_not_read(tmp_path):
  write(tmp_path, 2, 'test', [conversation()])
  write(tmp_path, 1, 'train', [conversation(texts=['x', 'y'])])
  write(tmp_path, 4, 'notes', [{}])
  assert len(load(tmp_path).examples) == 3


def test_where_to_put_it_is_said(tmp_path):
  with pytest.raises(ValueError, match=r'unpack .*msc_v0.1.*data\.path'):
    builders.open_dataset('multi_session_chat', tmp_path)
  (tmp_path / 'msc').mkdir()
  with pytest.raises(FileNotFoundError, match=r'msc has no session_2..5'):
    load(tmp_path)


@pytest.mark.parametrize(
  'bad',
  [{'dialog': None}, {'dialog': [1, 2]}, {'metadata': {}}, {'metadata': 1}],
)
def test_a_damaged_line_is_named(tmp_path, bad):
  write(tmp_path, 2, 'train', [conversation(), conversation() | bad])
  with pytest.raises(ValueError, match=r'session_2/train.txt:2 is damaged .*'):
    load(tmp_path)
