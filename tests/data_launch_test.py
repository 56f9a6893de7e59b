"""python -m launch.data: tables, histograms and errors of one line."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from absl import flags

from hetlora_jax import config, formats
from hetlora_jax.data import statistics
from launch import data, program
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent
LINES = [
  {'client': f'p{i % 5}', 'context': 'x' * (i + 1), 'target': 'abc',
   'label': 'odd' if i % 2 else 'even'}
  for i in range(20)
]  # fmt: skip


RESET = ('dataset', 'path', 'stats', 'out', 'partition', 'partition_clients', 'show', 'format', 'tokenizer')  # fmt: skip


class Letters:
  bos_id = 2

  def encode(self, text):
    return [ord(letter) for letter in text]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(formats, 'load_tokenizer', lambda _: Letters())


@pytest.fixture
def mine(tmp_path):
  path = tmp_path / 'mine.jsonl'
  path.write_text(''.join(f'{json.dumps(line)}\n' for line in LINES))
  return path


@pytest.fixture
def launch(capsys):
  def launch(*words):
    flags.FLAGS.unparse_flags()
    try:
      program.checked(data.run)(flags.FLAGS(['data', *words]))
    finally:
      flags.FLAGS.unparse_flags()
      for name in RESET:
        flags.FLAGS[name].value = flags.FLAGS[name].default
    return capsys.readouterr().out

  return launch


def test_it_prepares_and_says_where(launch, mine, tmp_path):
  out = launch('--dataset=text_folder', f'--path={mine}')
  assert f'text_folder is in {tmp_path}/cache/tfds/files/' in out
  assert out.endswith(': 20 examples of 5 clients.\n')


def _collect(mine, **fields):
  return statistics.collect(
    config.Data(name='text_folder', path=str(mine), **fields), Letters()
  )


def test_statistics_are_those_of_the_data(mine):
  found = _collect(mine)
  assert found.examples_N.tolist() == [4] * 5
  assert sorted(found.context_E) == [i + 8 for i in range(20)]  # <bos>B: x\nA:
  assert set(found.target_E) == {5}
  assert found.label_counts == {'even': 10, 'odd': 10}


def test_clients_of_a_rule_are_counted(launch, mine):
  found = _collect(mine, partition='by_size', partition_clients=3)
  assert found.examples_N.tolist() == [11, 5, 4]
  out = launch('--dataset=text_folder', f'--path={mine}', '--stats', '--partition=iid', '--partition_clients=4')  # fmt: skip
  assert '20 examples of 4 clients' in out


def test_it_says_what_a_run_would_train_on(mine):
  assert _collect(mine).of_a_run == [
    'A run with min_examples=2, tokens_per_example=32, targets_per_example=8, '
    'row_tokens=256:',
    'Of 5 clients in the data: 5 trained on, 0 never trained on.',
    'Cut off: 0.00% of the tokens of contexts and 0.00% of those of targets.',
  ]
  assert (
    'cannot be: min_examples=9 leaves nobody'
    in _collect(mine, min_examples=9).of_a_run[0]
  )


def test_it_prints_a_table_and_draws(launch, mine, tmp_path):
  out = launch('--dataset=text_folder', f'--path={mine}', '--stats', f'--out={tmp_path}/deep/out')  # fmt: skip
  lines = {line[:20].strip(): line[20:].split() for line in out.splitlines()}
  assert lines['examples a client'] == ['4'] * 8
  assert lines['context tokens'] == '17.5 8 8.95 12.75 17.5 22.25 26.05 27'.split()  # fmt: skip
  assert 'clients of at least  2: 5, 5: 0' in out
  assert 'labels (2)           even 10, odd 10' in out
  content = (tmp_path / 'deep/out/text_folder.png').read_bytes()
  assert content.startswith(b'\x89PNG') and len(content) > 10_000


def test_clients_of_at_least_so_many_are_counted(mine):
  found = _collect(mine)
  some = dataclasses.replace(found, examples_N=np.array([2, 5, 20]))
  want = '2: 3, 5: 2, 10: 1, 20: 1, 50: 0, 100: 0'
  assert f'clients of at least  {want}' in statistics.table(some)


@pytest.mark.parametrize('count', [1, 2, 1000])
def test_any_counts_can_be_drawn(tmp_path, count):
  same = np.ones(count, np.int64)
  found = statistics.Statistics(
    name='x', examples_N=same, context_E=same, target_E=same,
    label_counts={f'label {"long " * 9}{i}': 1 for i in range(count)}, of_a_run=[],
  )  # fmt: skip
  statistics.plot(found, tmp_path / 'x.png')
  assert (tmp_path / 'x.png').exists()
  assert statistics.table(found).startswith(f'x: {count:,} examples')


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    ([], '--dataset is missing: name one of chitchat, '),
    (['--dataset=redit'], "dataset='redit' is unknown: one of"),
    (['--dataset=synthetic', '--out=x'], '--out is for histograms'),
    (['--dataset=synthetic', 'x'], "unexpected argument 'x'"),
    (['--dataset=synthetic', '--path=x'], 'set --dataset=text_folder'),
    (
      ['--dataset=synthetic', '--stats', '--partition=x'],
      "partition='x' is unknown",
    ),
  ],
)
def test_errors_are_of_one_line(launch, capsys, words, message):
  with pytest.raises(SystemExit) as exit:
    launch(*words)
  assert exit.value.code == 2
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1


def test_help_explains():
  done = programs.run('launch.data', '--help')
  assert 'says what it is like' in done.stdout and '--partition' in done.stdout


def test_it_shows_examples_and_marks_what_bears_the_loss(launch):
  words = ('--dataset=synthetic', '--tokenizer=random', '--show=2')
  first, second = (launch(*words, f'--format={x}') for x in ('plain', 'chat'))
  head, context, target, *_ = first.splitlines()[1:]  # 'Preparing' comes first
  count = re.fullmatch(
    r'person-000, example 1 of \d+: (\d+) tokens, (\d+) bear the loss', head
  )
  assert 2 < int(count[2]) < int(count[1])
  assert re.fullmatch(r'<s>(\w+ ){7}\w+', context)
  assert re.fullmatch(r'\[\[(\w+ ){7}\w+</s>\]\]', target)
  assert second.count('\nA:[[ ') == second.count('\n]]\n') == 2
  assert f'B: {context[3:]}\nA:[[ {target[2:-6]}\n]]' in second


def test_a_format_that_cannot_be_is_named(launch, capsys):
  words = ('--dataset=synthetic', '--tokenizer=random', '--show=2')
  for format, message in (
    ('template', "--format='template' is impossible: --tokenizer=random has no chat"),
    ('poem', "--format='poem' is unknown"),
  ):
    with pytest.raises(SystemExit):
      launch(*words, f'--format={format}')
    assert message in capsys.readouterr().err
