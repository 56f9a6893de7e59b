"""A whole conversation is one example: each turn of the client bears the loss once."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetlora_jax import base_model, config
from hetlora_jax.data import builders, coverage, limits, packing, people, rendering
from hetlora_jax.data.builders import chitchat, records
from hetlora_jax.data.packing import BatchShape
from hetlora_jax.data.people import Example
from hetlora_jax.data.rendering import CLIENT, SYSTEM, USER, Chat
from hetlora_jax.models import decoder, readout
from hetlora_jax.models.tokenizer import Tokenizer
from tests.packing_test import predictions
from tests.rendering_test import MODELS

TURNS = [
  (SYSTEM, 'Be kind.'),
  (USER, 'Who are you?'),
  (CLIENT, 'Ann.'),
  (USER, 'And what do you do?'),
  (CLIENT, 'I sing, and you?'),
  (USER, 'Nothing.'),
  (CLIENT, 'Oh no!'),
]


@pytest.fixture(scope='module')
def tokenizer():
  trained = Tokenizer.train([' '.join(text for _, text in TURNS) + ' AB:'], 290)
  return dataclasses.replace(trained, chat_template=MODELS['gemma3']['template'])


@pytest.fixture(scope='module')
def loss(tokenizer):
  shape = base_model.random_shape(
    config.RandomModel(width=24, num_layers=3, num_heads=2, head_dim=12, mlp_width=40),
    tokenizer.vocab_size,
  )
  base = decoder.init_params(shape, jax.random.key(3), jnp.float32)
  apply = readout.make_loss(shape, jnp.float32, False)
  return lambda batch: apply(base, {}, jnp.float32(1), batch)


@pytest.mark.parametrize('name', ['chat', 'plain', 'template'])
def test_a_row_has_the_loss_of_its_turns_with_all_that_was_said_before(
  name, tokenizer, loss
):
  def encode(chat):
    return people.encode(tokenizer, rendering.make(name, tokenizer).render(chat))

  whole = encode(Chat(TURNS, bears_from=0))
  single = [encode(Chat(TURNS[: i + 1])) for i in (2, 4, 6)]
  # Texts are cut into tokens at the same places, so the last is the row's.
  assert single[-1].tokens.tolist() == whole.tokens.tolist()
  assert whole.all_targets == sum(x.num_target for x in single)
  said = ''.join(tokenizer.decode(whole.tokens[[*whole.earlier]]).split('\n')).strip()
  assert said.replace('  ', ' ').startswith('Ann.')
  row, turns = (
    packing.pack(some, BatchShape(len(some), len(whole.tokens), 120))
    for some in ([whole], single)
  )
  (nats, count), (want, tokens) = loss(row), loss(turns)
  assert count == tokens == whole.all_targets
  np.testing.assert_allclose(nats, want, rtol=1e-5)


def _conversations(seed, count, num_bos=1):
  """Makes conversations in which no token but bos repeats."""
  rng = np.random.default_rng(seed)
  out, after = [], 2
  for _ in range(count):
    length, last = int(rng.integers(2, 30)), int(rng.integers(1, 4))
    last = min(last, length - 1)
    places = np.flatnonzero(rng.random(length - last) < 0.4)
    tokens = np.arange(after, after + length, dtype=np.int32)
    tokens[0], after = 1, after + length
    earlier = tuple(int(i) for i in places if i > 0)
    out.append(Example(tokens, last, num_bos=num_bos, earlier=earlier))
  return out


def _expected(examples):
  return sorted(
    (tuple(x.tokens[:i].tolist()), int(x.tokens[i]))
    for x in examples
    for i in (*x.earlier, *range(len(x.tokens) - x.num_target, len(x.tokens)))
  )


@pytest.mark.parametrize('seed', range(10))
def test_all_of_a_conversation_is_predicted_where_there_is_room(seed):
  examples = _conversations(seed, 7)
  batch = packing.pack(examples, BatchShape(rows=7, row_tokens=31, num_targets=150))
  assert predictions(batch) == _expected(examples)


@pytest.mark.parametrize('seed', range(30))
def test_without_room_first_turns_go_first_and_nothing_is_lost_uncounted(seed):
  examples = _conversations(seed, 7, num_bos=seed % 2)
  rng = np.random.default_rng(seed)
  shape = BatchShape(
    rows=int(rng.integers(1, 5)), row_tokens=29, num_targets=int(rng.integers(7, 60))
  )
  batch = packing.pack(examples, shape)
  kept = packing.kept(examples, shape)
  assert batch.weight.sum() == sum(len(x.targets) for x in kept) <= shape.num_targets
  for example, text in zip(examples, kept, strict=True):
    cut = len(example.tokens) - len(text.tokens)
    bears = np.zeros(len(example.tokens), bool)
    bears[[*example.earlier]] = True
    bears[len(bears) - example.num_target :] = True
    wanted, left = set(example.tokens[bears]), set(text.tokens[text.targets])
    there = wanted & set(text.tokens)
    assert left <= there
    assert cut == text.contexts_cut + len(wanted) - len(there)
    assert text.tokens[0] == 1 or seed % 2 == 0
    # The last turn is there, from its start; of those before, the latest.
    start = example.tokens[len(bears) - example.num_target]
    assert start in left
    before = sorted(x for x in there if text.tokens[0] < x < start)
    chosen = sorted(x for x in left if x < start)
    assert chosen == before[len(before) - len(chosen) :]


def test_coverage_counts_turns_that_have_no_room():
  text = Example(np.arange(41, dtype=np.int32), 5, earlier=(10, 11, 30, 31))
  group = people.Group(ids=('a',), first=np.array([0]), count=np.array([1]))
  groups = dict.fromkeys(('train', 'heldout', 'unseen'), group)
  population = people.Population(groups=groups, read=lambda _: text)
  c = config.Config(
    federated=config.Federated(local_batch=1),
    data=limits.filled(config.Data(tokens_per_example=20, targets_per_example=8)),
  )
  # Tokens 1 to 20 are cut, and with them two targets.
  assert coverage.measure(c, population).cut == (32, 18, 9, 2)


def message(role, content):
  return {'role': role, 'content': content}


MESSAGES = [message(*turn) for turn in TURNS]


def _open(tmp_path, *lines):
  path = tmp_path / 'mine.jsonl'
  path.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
  return builders.open_dataset('text_folder', tmp_path / 'd', str(path))


def test_messages_are_a_conversation_beside_other_lines(tmp_path, tokenizer):
  dataset = _open(
    tmp_path,
    {'client': 'ann', 'messages': [*MESSAGES, message('user', 'Bye.')]},
    {'client': 'bob', 'context': ['Hi', 'Oh'], 'target': 'Yes.', 'mine': [True, False]},
  )
  data = limits.filled(config.Data(name='text_folder'), dataset, tokenizer)
  read = people.reader(dataset, tokenizer, data)
  whole, single = read(0), read(1)
  want = rendering.make(None, tokenizer).render(Chat(TURNS, bears_from=0))
  assert whole.tokens.tolist() == people.encode(tokenizer, want).tokens.tolist()
  assert whole.all_targets > whole.num_target == len(tokenizer.encode(' Oh no!\n'))
  assert tokenizer.decode(whole.tokens).startswith('Be kind.\nB: Who are you?\nA: Ann.')
  assert (single.earlier, tokenizer.decode(single.tokens)) == ([], 'A: Hi\nB: Oh\nA: Yes.\n')  # fmt: skip
  assert data.targets_per_example >= whole.all_targets
  assert ' '.join(people.corpus(dataset)).count('I sing') == 1


@pytest.mark.parametrize(
  ('line', 'why'),
  [
    ({'messages': 'Hi'}, "messages='Hi'"),
    ({'messages': []}, 'no assistant who answers'),
    ({'messages': MESSAGES[:2]}, 'no assistant who answers'),
    ({'messages': [message('assistant', 'I begin.')] * 2}, 'no assistant who answers'),
    ({'messages': MESSAGES, 'target': 'x'}, 'target beside messages'),
    ({'messages': [*MESSAGES, message('system', 'x')]}, 'the system speaks first'),
    ({'messages': [message('user', 'a'), message('tool', 'b')]}, "'tool'.* none of"),
    ({'messages': [message('user', ' '), message('assistant', 'b')]}, 'is empty'),
    ({'messages': [{'role': 'user'}]}, 'a role and a content'),
    ({'messages': [MESSAGES[1] | {'name': 'x'}]}, 'a role and a content'),
    ({'messages': ['Hi']}, 'a role and a content'),
    ({'messages': MESSAGES, 'x': 1}, "'x' is no field"),
  ],
)
def test_a_malformed_conversation_is_named(tmp_path, line, why):
  good = {'client': 'ann', 'messages': MESSAGES}
  with pytest.raises(ValueError, match=rf'mine.jsonl:2 is damaged .*{why}'):
    _open(tmp_path, good, {'client': 'ann'} | line)


def _targets(record):
  turns = [*zip([*record.mine, True], [*record.context, record.target], strict=True)]
  roles = [(CLIENT if own else USER, text) for own, text in turns]
  return [(record.client, roles[i][1]) for i in Chat(roles, record.bears_from).bearing]


@pytest.mark.parametrize('count', [2, 15, 16, 17, 33, 50])
def test_pieces_have_the_targets_of_their_turns_each_once(count):
  rng = np.random.default_rng(count)
  chat = [(f'{rng.integers(3)}', i, f't{i}') for i in range(count)]
  chat[:2] = [('0', 0, 't0'), ('1', 1, 't1')]
  pieces = [*records.conversations(chat)]
  want = sorted((r.client, r.target) for r in records.replies(chat))
  assert sorted(x for piece in pieces for x in _targets(piece)) == want
  assert max(len(piece.context) for piece in pieces) < 20
  for piece in pieces:
    assert piece.context[-1] == f't{int(piece.target[1:]) - 1}'


def test_conversations_have_the_targets_of_their_turns():
  chat = [
    ('b', 0, 'Hi'),
    ('a', 1, 'Oh'),
    ('b', 2, 'So'),
    ('a', 3, 'Yes'),
    ('b', 4, 'No'),
  ]
  a, b = sorted(records.conversations(chat), key=lambda record: record.client)
  assert (a.client, a.context, a.mine, a.target, a.time) == (
    'a', ['Hi', 'Oh', 'So'], [False, True, False], 'Yes', 3,
  )  # fmt: skip
  assert (b.target, b.bears_from, len(b.context)) == ('No', 0, 4)
  assert [*records.conversations(chat[:1])] == []
  assert [r.client for r in records.conversations(chat[:2])] == ['a']


def test_a_piece_of_a_conversation_after_context_of_it(tokenizer):
  turns = [(USER, 'Hi'), (CLIENT, 'Oh'), (CLIENT, 'So'), (USER, 'And'), (CLIENT, 'No')]
  for name in ('chat', 'template'):
    found = rendering.make(name, tokenizer).render(Chat(turns, bears_from=2))
    assert len(found.earlier) == {'chat': 1, 'template': 0}[name]  # merged with 'Oh'
    found = rendering.make(name, tokenizer).render(Chat(turns, bears_from=3))
    assert found.earlier == ()
    found = rendering.make(name, tokenizer).render(Chat(turns, bears_from=1))
    assert ''.join(said for _, said in found.earlier).count('So') == 1


def test_conversations_of_chitchat_have_the_targets_of_its_turns():
  if importlib.util.find_spec('chitchat_dataset') is None:
    pytest.skip('chitchat-dataset is not installed')
  chats = [[*chitchat._turns(c['messages'])] for c in chitchat.read_dataset().values()]
  pieces = [piece for chat in chats for piece in records.conversations(chat)]
  wanted = [record for chat in chats for record in records.replies(chat)]
  assert (len(wanted), len(pieces)) == (131_557, 20_723)
  missing = len(wanted) - sum(len(_targets(piece)) for piece in pieces)
  assert missing == 0
