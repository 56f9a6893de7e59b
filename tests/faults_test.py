"""Faults that users met: each small input again, and what is right.

Every message names the field, the value and the remedy, in one line, with code 2.
"""

import codecs
import dataclasses
import gzip
import json
import os

import numpy as np
import pytest
from experiment_test import SMALL, small_config

from hetlora_jax import config, files, training
from hetlora_jax.run import Run
from tests import programs

TINY = ('launch.train', '--config=configs/tiny.py')
LINE = {'client': 'a', 'context': 'b', 'target': 'c'}


def refused(*words, **env) -> str:
  """Runs a program that must end in one line; returns the line."""
  done = programs.run(*words, **env)
  assert done.returncode == 2, done
  assert done.stderr.startswith('Error: ') and done.stderr.count('\n') == 1
  return done.stderr


@pytest.mark.parametrize(
  ('flag', 'said'),
  [
    ('--config.rounds=2', 'did you mean config.federated.num_rounds?'),
    ('--config.federated.rmax=2', 'did you mean config.federated.r_max?'),
    ('--config.nope=1', 'config.nope does not exist. ('),
    ('--method=flexlora', 'did you mean --config.method?'),
    ('--config.seed=x', "base 10: 'x' ("),  # the quote is closed
    ('--config.client_optimizer.learning_rate=0,001', "to float: '0,001' ("),
    ('--config.data.name=mine', "config.data.name='mine' is unknown: one of chitchat"),
    ('--config.data.name=text_foldr', "Did you mean 'text_folder'?"),
    ('--config.data.path=mine.jsonl', 'set config.data.name=text_folder'),
    ('--config.model.source=', "config.model.source='' is impossible: name a model"),
    ('--config.lora.targets=q,q', 'one of them is there twice'),
    ('--config.data.copies=100000000', 'copies=100000000 must be in [1, 1000000]'),
    ('--config.model.random.width=10000000', 'width=10000000 must be in [1, 65536]'),
    ('--config.federated.r_max=1000000000', 'r_max=1000000000 must be in [1, 16384]'),
    (
      '--config.model.random.vocab_size=30000',
      'config.model.random.vocab_size=30000 is impossible',
    ),
  ],
)
def test_a_bad_flag_is_named_with_its_remedy(flag, said, tmp_path):
  assert said in refused(*TINY, flag, f'--workdir={tmp_path}/run')
  assert not (tmp_path / 'run').exists()


def test_a_list_of_words_needs_no_quotes():
  done = programs.run(*TINY, '--config.lora.targets=q,v', '--print_config')
  assert "--config.lora.targets=('q', 'v')" in done.stdout


@pytest.mark.parametrize(
  ('env', 'said'),
  [
    ({'JAX_PLATFORMS': 'cuda'}, 'JAX_PLATFORMS=cuda names no device'),
    ({'JAX_ENABLE_X64': '1'}, 'JAX_ENABLE_X64 changes the numbers'),
    ({'JAX_NUMPY_DTYPE_PROMOTION': 'strict'}, 'JAX_NUMPY_DTYPE_PROMOTION must be'),
    ({'HETLORA_CACHE': '/dev/null/x'}, 'set HETLORA_CACHE to a folder'),
  ],
)
def test_a_variable_that_cannot_be_is_named(env, said, tmp_path):
  assert said in refused(*TINY, f'--workdir={tmp_path}/run', **env)
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('grid', ['seed=[0,0,1]', 'federated.gamma=[1e-1,0.1]'])
def test_a_point_is_in_a_grid_once(grid, tmp_path):
  words = ('launch.sweep', '--config=configs/tiny.py', f'--grid={grid}')
  assert 'is there twice' in refused(*words, f'--workdir={tmp_path}/x', '--print')


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_loaded():
  done = programs.run(*TINY, '--workdir=/proc/x/run')
  assert done.returncode == 2 and not done.stdout
  assert '--workdir=/proc/x/run cannot be written' in done.stderr


def test_a_tilde_is_the_home_folder(tmp_path):
  done = programs.run(
    *TINY, '--workdir=~/run', '--config.federated.num_rounds=1',
    *[f'--config.{k}={v}' for k, v in SMALL.items() if k != 'federated.num_rounds'],
    HOME=str(tmp_path),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'run' / 'summary.json').exists()
  assert not (programs.ROOT / '~').exists()
  # Continued by its folder alone, with other fields than its own as flags.
  where = f'--workdir={tmp_path}/run'
  done = programs.run('launch.train', where, '--config.federated.num_rounds=2')
  assert done.returncode == 0, done.stderr
  assert [row['round'] for row in Run(tmp_path / 'run').history] == [0, 1, 2]
  said = refused('launch.train', where, '--config.seed=3')
  assert 'config.seed=0, not 3' in said
  # Its page has a place.
  assert programs.run('launch.report', tmp_path / 'run').returncode == 0
  assert (tmp_path / 'run' / 'report.html').exists()


def test_a_run_with_rules_of_ones_own_is_opened_by_its_folder(tmp_path):
  module = tmp_path / 'my_own_rules.py'
  module.write_text(
    'import hetlora_jax as hl\n'
    "hl.rule('weighting', name='first')(lambda n, masks, norms: masks)\n"
    "hl.METHODS['mine'] = hl.Method('me, 2026', weighting='first')\n"
  )
  given = [f'--config.{k}={v}' for k, v in SMALL.items() if k != 'eval.every']
  own = ('--import=my_own_rules', f'--workdir={tmp_path}/run')
  done = programs.run(
    *TINY, *own, *given, '--config.method=mine', '--config.eval.every=None',
    PYTHONPATH=str(tmp_path),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  done = programs.run('launch.evaluate', *own, PYTHONPATH=str(tmp_path))
  assert done.returncode == 0 and '"round": 4' in done.stdout, done.stderr
  # What cannot be opened is one line, not ml_collections' traceback.
  (tmp_path / 'run' / 'config.json').write_text('{"federated": 3}')
  said = refused('launch.evaluate', f'--workdir={tmp_path}/run')
  assert 'config.json is of another release, or damaged' in said
  assert 'Traceback' not in said


def test_fields_without_a_configuration_say_that_it_is_missing(tmp_path):
  words = ('launch.train', f'--workdir={tmp_path}/run')
  assert '--config is missing' in refused(*words, '--config.seed=3')
  assert '--config is missing' in refused(*words)


def prepare(tmp_path, content: bytes) -> str:
  """Prepares own data; returns what is said, an error or how much there is."""
  path = tmp_path / 'mine.jsonl'
  path.write_bytes(content)
  done = programs.run(
    'launch.data', '--dataset=text_folder', f'--path={path}',
    HETLORA_CACHE=str(tmp_path / 'cache'),
  )  # fmt: skip
  assert done.returncode == (2 if done.stderr else 0)
  return done.stderr or done.stdout


@pytest.mark.parametrize(
  'change',
  [
    {},
    {'client': 7, 'label': 3},
    {'time': '2024-01-01T10:00:00'},
    {'time': '2024-01-01T10:00:00+02:00'},
  ],
)
def test_own_lines_are_read(change, tmp_path):
  line = json.dumps(LINE | change).encode() + b'\n'
  assert '2 examples of 1 clients' in prepare(tmp_path, codecs.BOM_UTF8 + 2 * line)


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (json.dumps(LINE | {'time': 1.5}).encode(), 'a whole number or a date'),
    (json.dumps(LINE | {'time': 'noon'}).encode(), 'a whole number or a date'),
    (json.dumps(LINE).encode('utf-16'), 'is UTF-16: save it as UTF-8'),
    (gzip.compress(json.dumps(LINE).encode(), mtime=0), 'is compressed by gzip'),
  ],
  ids=['half', 'word', 'UTF-16', 'gzip'],
)
def test_own_lines_that_cannot_be_read_say_why(content, said, tmp_path):
  assert said in prepare(tmp_path, content)


def test_dates_order_a_clients_examples(tmp_path):
  from hetlora_jax.data import builders

  days = ['2024-03-01', '2024-01-01T23:00-02:00', '2024-01-01T12:00']
  lines = [LINE | {'time': day, 'target': day} for day in days]
  files.write_json_lines(tmp_path / 'x.jsonl', lines)
  found = builders.open_dataset('text_folder', tmp_path, str(tmp_path / 'x.jsonl'))
  order = [found.examples[i]['target'].decode() for i in range(3)]
  assert order == [days[2], days[1], days[0]]


def test_python_says_too_where_nothing_can_be_written():
  with pytest.raises(OSError, match='cannot be written'):
    training.train(config.Config(), os.path.join('/proc', 'x'))


def test_a_run_goes_on_with_its_own_data_alone(tmp_path, monkeypatch):
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path / 'cache'))
  monkeypatch.chdir(tmp_path)

  def write(path, word):
    lines = [
      {'client': f'c{i}', 'context': f'say {n}', 'target': f'{word} {n}'}
      for i in range(9)
      for n in range(6)
    ]
    files.write_json_lines(path, lines)

  def own(path, rounds):
    return small_config(
      data__name='text_folder', data__path=path, model__random__vocab_size=280,
      federated__num_rounds=rounds, eval__every=None,
    )  # fmt: skip

  write(tmp_path / 'mine.jsonl', 'one')
  run = training.train(own('mine.jsonl', 1), 'run')
  assert Run('run').config.data.path == str(tmp_path / 'mine.jsonl')  # absolute
  # The same content elsewhere is the same data; other content is not.
  (tmp_path / 'moved').mkdir()
  (tmp_path / 'mine.jsonl').rename(tmp_path / 'moved' / 'mine.jsonl')
  training.train(own('moved/mine.jsonl', 2), 'run')
  write(tmp_path / 'moved/mine.jsonl', 'two')
  with pytest.raises(config.ConfigError, match='belongs to other data.*data.path'):
    training.train(own('moved/mine.jsonl', 3), 'run')
  with pytest.raises(config.ConfigError, match='belongs to other data'):
    training.evaluate(Run('run'))
  assert [row['round'] for row in run.history] == [0, 1, 2]


def test_perplexity_is_drawn_on_a_log_axis_with_plain_numbers():
  from hetlora_jax import curves

  def ticks(first, last):
    rows = [
      {'round': i, **{f'eval/{who}/perplexity': x for who in ('seen', 'unseen')}}
      for i, x in enumerate((first, last))
    ]
    figure = curves.plot(rows, '')
    figure.canvas.draw()
    axis = figure.axes[0]
    assert axis.get_yscale() == 'log'
    low, high = axis.get_ylim()
    labels = [label.get_text() for label in axis.get_yticklabels(which='both')]
    return [float(text) for text in labels if text and low <= float(text) <= high]

  assert ticks(700, 2) == [2, 5, 10, 20, 50, 100, 200, 500]
  assert len(ticks(35.7, 31.9)) >= 3


def test_weights_in_float16_are_compared_without_a_warning():
  from hetlora_jax.formats import layout

  assert layout.is_finite(np.full(3, 6e4, np.float16))
  assert not layout.is_finite(np.array([1, np.inf], np.float16))


@pytest.mark.parametrize(
  ('role', 'known', 'function', 'said'),
  [
    (
      'weighting',
      'size',
      lambda num_examples, masks, norms: {t: num_examples for t in masks},
      r"the weighting 'mine' returns \(4,\) where \(4, 1, 1\) must be \(at \['base'\]\)",
    ),
    (
      'pruning',
      'none',
      lambda before, trained, rank, hyper: rank.sum(),
      r"the pruning 'mine' returns \(\) where \(1,\) must be:",
    ),
    (
      'redistribution',
      'keep',
      lambda aggregate, error, server, hyper: aggregate,  # no Redistributed
      r"the redistribution 'mine' returns nothing where .* must be \(at \['q'\]",
    ),
    (
      'aggregation',
      'factors',
      lambda updates, weights, server: dict(list(server.adapters.items())[1:]),
      r"the aggregation 'mine' returns nothing where \(2, 7, 9\) must be \(at \['q'\]",
    ),
  ],
)
def test_a_rule_of_ones_own_of_another_shape_is_named(
  role, known, function, said, monkeypatch
):
  import quadratic

  from hetlora_jax.methods import registry

  monkeypatch.setitem(
    registry.ROLES[role],
    'mine',
    dataclasses.replace(registry.ROLES[role][known], name='mine', function=function),
  )
  rng = np.random.default_rng(0)
  with pytest.raises(config.ConfigError, match=said):
    made = quadratic.make_run(**{f'methods__{role}': 'mine'})
    made.step(quadratic.make_base(rng), made.state, quadratic.make_cohort(rng))
