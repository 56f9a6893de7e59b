"""Bad input: an error at once, naming field, value and remedy."""

import importlib
import os
import pathlib
import subprocess
import sys

import ml_collections
import pytest

from configs import default
from hetlora_jax import config
from hetlora_jax.fields import flat
from hetlora_jax.methods import registry
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent


def _resolve(**overrides):
  raw = default.get_config()
  raw.update_from_flattened_dict(overrides)
  return config.resolve(raw)


def test_every_field_has_a_sentence():
  fields = flat(config.to_dict(_resolve()))
  assert set(fields) == set(config.FIELDS)
  for path, f in config.FIELDS.items():
    assert len(f.declaration.help) > 10 and f.declaration.help.endswith('.'), path


@pytest.mark.parametrize(
  'name',
  sorted(p.stem for p in (ROOT / 'configs').glob('[!_]*.py') if p.stem != 'ablations'),
)
def test_every_config_resolves(name):
  module = importlib.import_module(f'configs.{name}')
  resolved = config.resolve(module.get_config())
  # What is written to config.json says all there is.
  again = ml_collections.ConfigDict(config.to_dict(resolved))
  assert config.resolve(again) == resolved


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('federated.r_min', 99, 'r_max=50'),
    ('federated.gamma', 0.0, r'in \(0, 1\]'),
    ('federated.gamma', 1.5, r'in \(0, 1\]'),
    ('federated.gamma', float('nan'), r'in \(0, 1\]'),
    ('federated.num_rounds', 0, 'at least 1'),
    ('federated.tail_penalty', -1.0, 'at least 0'),
    ('seed', -1, 'at least 0'),
    ('method', 'hetlra', "'hetlora'"),
    ('methods.weighting', 'nrom', "'norm'"),
    ('federated.gamma', 0.999999, 'empty tail'),
    ('methods.energy', 1.5, 'methods.energy'),
    ('methods.aggregation', 'product', 'no factors to keep'),
    ('methods.distribution', 'reinit', "take aggregation 'product'"),
    ('methods.distribution', 'sketch', "distribution 'prefix'"),
    ('methods.trainable', 'base', 'full fine-tuning'),
    ('federated.dropout', 1.0, r'in \[0, 1\)'),
    ('federated.min_local_steps', 99, 'local_steps=5'),
    ('ranks.data_correlation', -1.5, r'in \[-1, 1\]'),
    ('ranks.data_correlation', 1.5, r'in \[-1, 1\]'),
    ('communication.wire_dtype', 'int4', "'int8'"),
    ('lora.scale_rule', 'alpha', "'alpha_over_r'"),
    ('lora.scale', float('nan'), 'finite'),
    ('lora.targets', ('q', 'w'), 'q, k, v'),
    ('lora.targets', (), 'one or more'),
    ('client_optimizer.name', 'adafactor', "'adam'"),
    ('client_optimizer.learning_rate', float('inf'), 'finite'),
    ('data.heldout_fraction', 1.0, r'in \(0, 1\)'),
    ('data.context_turns', 9, r'in \[1, 4\]'),
    ('data.min_examples', 1, 'at least 2'),  # one to train on, one to hold out
    ('mesh.clients', 0, 'at least 1'),
    ('model.dtype', 'float16', "'bfloat16'"),
    ('model.source', 'random:gemma9', 'gemma3_270m, gemma3_1b'),
    ('model.source', 'random:', 'gemma3_270m, gemma3_1b'),
  ],
)
def test_impossible_value_is_named(field, value, message):
  with pytest.raises(config.ConfigError, match=message) as error:
    _resolve(**{field: value})
  assert field.split('.')[-1] in str(error.value) or 'methods' in field


@pytest.mark.parametrize(
  ('field', 'value'), [('data.targets_per_example', 96), ('data.row_tokens', 12)]
)
def test_limits_that_are_given_must_fit(field, value):
  _resolve(**{field: value})  # the other follows
  with pytest.raises(
    config.ConfigError, match=f'{field}={value}.*tokens_per_example=96'
  ):
    _resolve(**{field: value, 'data.tokens_per_example': 96})


def test_a_tokenizer_has_no_more_words_than_a_published_shape():
  of_shape = {'model.source': 'random:smollm2_135m'}
  _resolve(**of_shape, **{'model.random.vocab_size': 49_152})
  with pytest.raises(
    config.ConfigError, match='smollm2_135m has a vocabulary of 49152'
  ):
    _resolve(**of_shape, **{'model.random.vocab_size': 49_153})


def test_tiers_are_checked():
  with pytest.raises(config.ConfigError, match='summing to 1'):
    _resolve(**{'ranks.distribution': 'tiers', 'ranks.tier_fractions': (0.5, 0.2, 0.1)})
  with pytest.raises(config.ConfigError, match='r_max'):
    _resolve(**{'ranks.distribution': 'explicit', 'ranks.explicit': (5, 60)})


def test_unknown_missing_and_mistyped_fields_are_named():
  raw = default.get_config().unlock()
  raw.federated.rmax = 3
  with pytest.raises(config.ConfigError, match='did you mean .*r_max'):
    config.resolve(raw)
  raw = default.get_config().unlock()
  del raw.data.name
  with pytest.raises(config.ConfigError, match='config.data.name is missing'):
    config.resolve(raw)
  raw = default.get_config().to_dict()
  raw['federated']['r_max'] = 'many'
  with pytest.raises(config.ConfigError, match='give an int'):
    config.resolve(ml_collections.ConfigDict(raw))


def _train(*flags):
  return programs.run('launch.train', *flags)


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--config=configs/tiny.py'], '--workdir is missing'),
    (['--config=configs/tine.py', '--workdir={}'], 'configs/tine.py'),
    (
      ['--config=configs/tiny.py', '--config.federated.rmax=3', '--workdir={}'],
      'rmax',
    ),
    (
      ['--config=configs/tiny.py', '--config.seed=one', '--workdir={}'],
      'seed',
    ),
    (
      [
        '--config=configs/tiny.py',
        '--config.model.source=nowhere.gguf',
        '--workdir={}',
      ],
      'nowhere.gguf',
    ),
    (
      [
        '--config=configs/tiny.py',
        '--config.federated.clients_per_round=1000',
        '--workdir={}',
      ],
      'clients_per_round=1000',
    ),
    (
      [
        '--config=configs/tiny.py',
        "--config.lora.targets=('q','w')",
        '--workdir={}',
      ],
      "'w'",
    ),
    (
      ['--config=configs/tiny.py', '--config.mesh.clients=64', '--workdir={}'],
      'devices',
    ),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_bad_flags_exit_with_2_and_write_nothing(flags, message, tmp_path):
  workdir = tmp_path / 'run'
  done = _train(*[flag.replace('{}', str(workdir)) for flag in flags])
  assert done.returncode == 2
  assert message in done.stderr
  assert 'Traceback' not in done.stderr
  assert not workdir.exists()


def test_methods_are_listed_with_their_sources():
  done = _train('--list_methods')
  assert done.returncode == 0
  for name, method in registry.METHODS.items():
    assert f'\n{name} ' in done.stdout and method.citation in done.stdout


def test_print_config_explains_and_flagfile_works(tmp_path):
  flagfile = tmp_path / 'flags'
  flagfile.write_text('--config=configs/tiny.py\n--config.seed=7\n')
  done = _train(f'--flagfile={flagfile}', '--print_config')
  assert done.returncode == 0
  assert '--config.seed=7' in done.stdout
  assert '# Decay factor' in done.stdout


def _run_into(pipe, cache, words, unbuffered):
  """Runs a program whose standard output is `pipe`; its cache is empty."""
  env = {'PYTHONUNBUFFERED': unbuffered, 'HETLORA_CACHE': str(cache)}
  return subprocess.run(
    [sys.executable, '-m', *words], cwd=ROOT, env=os.environ | env,
    stdout=pipe, stderr=subprocess.PIPE, text=True, check=False,
  )  # fmt: skip


@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize(
  'words',
  [
    ('launch.train', '--config=configs/tiny.py', '--print_config'),
    ('launch.data', '--dataset=synthetic'),
    ('benchmarks.peers', '--help'),
  ],
)
def test_a_closed_pipe_ends_a_program_without_a_word(words, unbuffered, tmp_path):
  reader, writer = os.pipe()
  os.close(reader)  # as if `| head` had enough
  with open(writer, 'w') as pipe:
    done = _run_into(pipe, tmp_path, words, unbuffered)
  assert done.returncode == 128 + 13 and not done.stderr


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_a_full_disk_behind_standard_output_is_one_line(unbuffered, tmp_path):
  words = ('launch.data', '--dataset=synthetic')
  with open('/dev/full', 'w') as full:
    done = _run_into(full, tmp_path, words, unbuffered)
  assert done.returncode == 2
  assert done.stderr == 'Error: [Errno 28] No space left on device\n'


def test_a_program_without_standard_output_runs():
  words = [sys.executable, '-m', 'launch.data', '--dataset=synthetic']
  done = subprocess.run(
    ['sh', '-c', 'exec "$@" >&-', 'sh', *words],
    cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize('method', registry.METHODS)
def test_every_method_and_every_weighting_can_be_named_by_flag(method):
  from configs import chitchat_gemma3

  for weighting in (None, *registry.ROLES['weighting']):
    raw = chitchat_gemma3.get_config()
    raw.update_from_flattened_dict({'method': method, 'methods.weighting': weighting})
    if method == 'full_finetuning' and weighting == 'norm':
      with pytest.raises(config.ConfigError, match='no adapters'):
        config.resolve(raw)
      continue
    rules = config.resolve(raw).rules
    assert rules['weighting'].name == weighting or not weighting
