"""`import hetlora_jax as hl`: train, runs, rules of one's own, runs of earlier releases."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
from experiment_test import SMALL, small_config

import hetlora_jax as hl
from hetlora_jax import config
from hetlora_jax.methods import registry
from hetlora_jax.tools import report, tables

ROOT = pathlib.Path(__file__).parent.parent
SHORT = {'federated.num_rounds': 2, 'eval.every': 2}
FILE = f"""
from configs import tiny

def get_config(name='hetlora'):
  c = tiny.get_config()
  c.update_from_flattened_dict({SMALL | SHORT!r})
  c.method = name
  return c
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp('front')
  (folder / 'mine.py').write_text(FILE)
  seen = []
  run = hl.train(str(folder / 'mine.py'), folder / 'run', on_round=seen.append)
  return folder, run, seen


def test_training_returns_a_run_whose_history_is_a_list_of_rows(trained):
  folder, run, seen = trained
  assert run.history == seen and [row['round'] for row in seen] == [0, 1, 2]
  again = hl.Run(folder / 'run')
  assert again.history == run.history
  assert again.summary['last'] == {
    k: v for k, v in seen[-1].items() if k == 'round' or k.startswith('eval/')
  }
  assert again.finished and again.steps() == {1, 2}
  assert set(again.people) == {'round', 'seen', 'unseen'}
  assert again.samples == [] and again.evaluation is None
  assert again.config.method == 'hetlora' and again.fields['federated.r_max'] == 6


def test_a_notebook_shows_the_history_as_curves(trained):
  _, run, _ = trained
  assert run.history._repr_png_().startswith(b'\x89PNG')
  assert len(run.plot().axes) == 5  # four curves and the bar of colours


def test_a_configuration_comes_in_any_form(trained, tmp_path):
  folder, run, seen = trained
  named = hl.train(f'{folder / "mine.py"}:fedit', tmp_path / 'fedit')
  assert named.config.method == 'fedit'
  raw = small_config(**{k.replace('.', '__'): v for k, v in SHORT.items()})
  same = hl.train(raw, tmp_path / 'same')
  losses = [row.get('train/loss') for row in same.history]
  assert losses == [row.get('train/loss') for row in seen]
  with pytest.raises(hl.ConfigError, match='nowhere.py is no file'):
    hl.train('nowhere.py', tmp_path / 'none')
  (tmp_path / 'empty.py').write_text('')
  with pytest.raises(hl.ConfigError, match='no get_config'):
    hl.train(tmp_path / 'empty.py', tmp_path / 'none')


def _first(updates, weights, server):
  return jax.tree.map(lambda x: x[0], updates.adapters)


def _as_it_is(aggregate, error, server, hyper):
  return registry.ROLES['redistribution']['keep'].function(
    aggregate, error, server, hyper
  )


def _mine(role, function, **facts):
  hl.declare(role, 'mine', function, **facts)
  return small_config(**{k.replace('.', '__'): v for k, v in SHORT.items()}).replace(
    **{f'methods.{role}': 'mine'}
  )


def test_a_rule_of_ones_own_that_sends_nothing_of_its_own_is_billed(tmp_path):
  try:
    run = hl.train(_mine('aggregation', _first), tmp_path / 'mine')
  finally:
    del hl.ROLES['aggregation']['mine']
  usual = hl.train(small_config(federated__num_rounds=2), tmp_path / 'usual')
  got, want = (x.history[1]['comm/up_bytes'] for x in (run, usual))
  assert got == want > 0
  # Without the rule the run can be looked at, but not continued.
  assert hl.Run(tmp_path / 'mine').history == run.history
  with pytest.raises(hl.ConfigError, match="methods.aggregation='mine' is unknown"):
    hl.Run(tmp_path / 'mine').config  # noqa: B018


def test_a_rule_that_does_not_state_its_traffic_is_said_not_to(tmp_path):
  facts = {'traits': ['keeps factors'], 'needs': {'factor space': 'it keeps factors'}}
  try:
    run = hl.train(_mine('redistribution', _as_it_is, **facts), tmp_path / 'mine')
  finally:
    del hl.ROLES['redistribution']['mine']
  for row in run.history[1:]:
    assert row['comm/down_bytes'] is None and row['comm/total_down_bytes'] is None
    assert row['comm/up_bytes'] > 0
  assert run.summary['comm/down_bytes'] is None
  assert run.summary['comm/up_bytes'] > 0
  found = [{'name': 'mine', 'fields': {}, **run.summary}]
  assert '| not stated |' in tables.write(found, tmp_path)
  assert report.write([tmp_path / 'mine'], tmp_path / 'page.html') == 1
  assert 'not stated' in (tmp_path / 'page.html').read_text()


def test_a_launcher_imports_rules_of_ones_own(tmp_path):
  (tmp_path / 'my_rules.py').write_text(
    'import hetlora_jax as hl\n'
    "hl.rule('weighting', name='first')(lambda n, masks, norms: masks)\n"
    "hl.METHODS['mine'] = hl.Method('me, 2026', weighting='first')\n"
  )
  command = [sys.executable, '-W', 'ignore', '-m', 'launch.train', '--list_methods']
  done = subprocess.run(
    [*command, '--import=my_rules'], cwd=tmp_path, capture_output=True, text=True,
    env={'PYTHONPATH': str(ROOT), 'PATH': ''}, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'weighting first' in done.stdout
  done = subprocess.run(
    [*command, '--import=no_rules'], cwd=tmp_path, capture_output=True, text=True,
    env={'PYTHONPATH': str(ROOT), 'PATH': ''}, check=False,
  )  # fmt: skip
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert 'no_rules' in done.stderr


# What config.json of release 0.1 had where None means the default now.
OLD = {
  **{f'methods.{role}': '' for role in registry.ROLES},
  'methods.energy': 0.0,
  'methods.tail_rounding': 'floor',
  'federated.norm_bound': 0.0,
  'federated.min_local_steps': 0,
  'lora.from_peft': '',
  'data.path': '',
  'data.num_people': 0,
  'checkpoint.keep_every': 0,
}


def test_runs_of_an_earlier_release_go_on_or_say_why_not(trained, tmp_path):
  folder, run, _ = trained
  shutil.copytree(folder / 'run', tmp_path / 'old')
  path = tmp_path / 'old' / 'config.json'
  values = json.loads(path.read_text())
  for name, value in OLD.items():
    section, _, field = name.partition('.')
    values[section][field] = value
  del values['eval']['aggregation_error']  # not there yet
  path.write_text(json.dumps(values))
  assert hl.Run(tmp_path / 'old').config == run.config
  longer = run.config.replace(**{'federated.num_rounds': 3})
  assert [r['round'] for r in hl.train(longer, tmp_path / 'old').history] == [
    0,
    1,
    2,
    3,
  ]

  values['methods']['tail_rounding'] = 'nearest'
  path.write_text(json.dumps(values))
  with pytest.raises(hl.ConfigError, match='another release.*always rounded down'):
    hl.train(run.config, tmp_path / 'old')


def test_names_that_are_gone_say_what_to_do():
  raw = config.to_dict(config.Config())
  raw['methods']['tail_rounding'] = 'nearest'
  with pytest.raises(hl.ConfigError, match='always rounded down; leave it out'):
    hl.resolve(raw)
  for value in (0, ''):
    with pytest.raises(hl.ConfigError, match='None'):
      config.Config().replace(**{'federated.clients_at_once': value})
