"""Whole runs on a very small model: files, resuming, signals."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import tiny
from hetlora_jax import (
  base_model,
  checkpoint,
  config,
  files,
  heldout,
  points,
  rows,
  training,
)
from hetlora_jax.data import builders, people
from hetlora_jax.models import shapes
from hetlora_jax.run import Run
from hetlora_jax.tools import completions, dryrun
from tests import entropy

ROOT = pathlib.Path(__file__).parent.parent
SMALL = {
  'federated.num_rounds': 4,
  'federated.clients_per_round': 3,
  'federated.local_steps': 2,
  'federated.local_batch': 2,
  'federated.r_max': 6,
  'federated.gamma': 0.6,
  'federated.tail_penalty': 5.0,
  'lora.targets': ('q', 'down'),
  'model.random.width': 16,
  'model.random.num_layers': 1,
  'model.random.head_dim': 8,
  'model.random.mlp_width': 24,
  'eval.num_people': 2,
  'eval.every': 2,
  'checkpoint.every': 1,
}


def small_config(**overrides):
  """Returns `tiny` made smaller still, with dotted overrides."""
  raw = tiny.get_config()
  raw.update_from_flattened_dict(SMALL)
  raw.update_from_flattened_dict(
    {k.replace('__', '.'): v for k, v in overrides.items()}
  )
  return config.resolve(raw)


def newest_state(c, workdir):
  """Returns the newest checkpoint as numpy."""
  x = points.prepare(c)
  checkpoints = checkpoint.Checkpoints([workdir / 'checkpoints'], x.identity)
  found = checkpoints.restore_newest(points.shape_of_one(x))
  checkpoints.close()
  assert found
  return jax.device_get(found[1][0])


def _cohort(c):
  """Returns the cohort of round 0."""
  cohorts = points.make_cohorts(points.prepare(c), 0)
  return jax.tree.map(lambda x: np.asarray(x[0, 0]), cohorts)


def timeless(workdir):
  """Returns the lines of metrics.jsonl without what a clock says."""
  return [
    {k: v for k, v in row.items() if not k.startswith('time/')}
    for row in files.read_rows(workdir / 'metrics.jsonl')
  ]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('unbroken')
  training.train(small_config(), workdir)
  return workdir


def test_a_run_leaves_what_it_promises(unbroken):
  rows = files.read_rows(unbroken / 'metrics.jsonl')
  assert [row['round'] for row in rows] == [0, 1, 2, 3, 4]
  for row in rows[1:]:
    for name in (
      'train/loss train/tokens rank/mean rank/min rank/max rank/pruned '
      'comm/up_bytes comm/down_bytes time/round_s time/tokens_per_s time/wait_s'
    ).split():
      assert np.isfinite(row[name])
  for i in (0, 2, 4):
    for who in ('seen', 'unseen'):
      loss = rows[i][f'eval/{who}/loss']
      assert rows[i][f'eval/{who}/perplexity'] == pytest.approx(np.exp(loss))
  summary = json.loads((unbroken / 'summary.json').read_text())
  assert summary['first']['round'] == 0 and summary['last']['round'] == 4
  assert summary['train/tokens'] == sum(r['train/tokens'] for r in rows[1:])
  resolved = json.loads((unbroken / 'config.json').read_text())
  assert resolved['federated']['r_max'] == 6
  assert (unbroken / 'curves.png').stat().st_size > 10_000


def test_compiling_is_told_apart_from_rounds_and_comes_before_them(tmp_path, capsys):
  compiled, seen = [], []

  def note(event, seconds, fun_name='', **_):
    if event.endswith('backend_compile_duration'):
      compiled.extend({'many_rounds', 'own_points'} & {fun_name[4:-1]})

  jax.monitoring.register_event_duration_secs_listener(note)
  fields = {'federated__local_batch': 5}  # of no other test, so not yet compiled
  begun = small_config(federated__num_rounds=2, **fields)
  training.train(begun, tmp_path, lambda _: seen.append(list(compiled)))
  assert set(seen[0]) == {'many_rounds', 'own_points'}
  assert seen == [compiled] * 3
  assert capsys.readouterr().out.count('Compiled in ') == 1
  # A run that goes on compiles again, and its seconds add up.
  summary = training.train(small_config(**fields), tmp_path).summary
  found = files.read_rows(tmp_path / 'metrics.jsonl')
  told = {r['round']: r['time/compile_s'] for r in found if 'time/compile_s' in r}
  assert list(told) == [0, 3] and min(told.values()) > 0
  assert summary['time/compile_s'] == pytest.approx(sum(told.values()))
  spent = sum(r['time/round_s'] for r in found[1:])
  assert summary['time/rounds_s'] == pytest.approx(spent)
  # Nothing is left to run, nor to compile; rows of earlier releases do not tell.
  training.train(small_config(**fields), tmp_path)
  assert capsys.readouterr().out.count('Compiled in ') == 1
  old = [{k: v for k, v in r.items() if k != 'time/compile_s'} for r in found]
  assert rows.totals(old)['time/compile_s'] is None


def test_a_gpu_says_what_a_resumed_run_needs_to_be_exact(monkeypatch):
  assert training._exactness() == ''
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert 'XLA_FLAGS=--xla_gpu_deterministic_ops=true' in training._exactness()
  monkeypatch.setenv('XLA_FLAGS', '--a=1 --xla_gpu_deterministic_ops=true')
  assert training._exactness() == ''


def test_random_weights_in_a_published_shape(monkeypatch):
  c = small_config()
  pocket = dataclasses.replace(
    base_model.random_shape(c.model.random, 611), num_layers=3
  )
  monkeypatch.setitem(shapes.SHAPES, 'pocket', pocket)
  c = small_config(model__source='random:pocket')
  x = points.prepare(c)
  assert x.base['embed'].shape == (611, 16)
  assert x.base['layers']['q'].shape[0] == 3
  assert x.base['embed'].std() > 0
  told = dryrun.compile_for([c], 'h100')
  leaves = jax.tree.leaves(x.base)
  assert told.parameters == sum(leaf.size for leaf in leaves)
  _, out = points.call(x, x.initial_state, points.make_cohorts(x, 0))
  assert np.isfinite(out['loss_sum']).all() and (out['tokens'] > 0).all()


def test_own_people_take_the_place_of_a_data_set():
  c = small_config()
  theirs = points.prepare(c).experiment.population
  first = dataclasses.replace(theirs, read=lambda row: theirs.read(0))
  cohort = points.make_cohorts(points.prepare(c, population=first), 0)
  assert len(np.unique(cohort.batches.target[cohort.batches.weight > 0])) <= (
    theirs.read(0).num_target
  )
  nobody = people.Group(ids=('a',), first=np.array([0]), count=np.array([1]))
  few = dataclasses.replace(theirs, groups=theirs.groups | {'train': nobody})
  with pytest.raises(config.ConfigError, match='exceeds the 1 clients that'):
    points.prepare(c, population=few)


def test_continuing_equals_an_unbroken_run_to_the_bit(unbroken, tmp_path):
  training.train(small_config(federated__num_rounds=2), tmp_path)
  training.train(small_config(), tmp_path)
  jax.tree.map(
    np.testing.assert_array_equal,
    newest_state(small_config(), tmp_path),
    newest_state(small_config(), unbroken),
  )
  assert timeless(tmp_path) == timeless(unbroken)


@pytest.mark.parametrize(
  'method',
  [
    pytest.param('full_finetuning', marks=pytest.mark.slow),
    'fedsa_lora',
    'fedmomentum',
  ],
)
def test_every_kind_of_state_continues_to_the_bit(method, tmp_path):
  c = small_config(method=method, server_optimizer__name='momentum')
  short = small_config(
    method=method, server_optimizer__name='momentum', federated__num_rounds=2
  )
  training.train(c, tmp_path / 'whole')
  training.train(short, tmp_path / 'broken')
  training.train(c, tmp_path / 'broken')
  one, other = (newest_state(c, tmp_path / name) for name in ('whole', 'broken'))
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert timeless(tmp_path / 'whole') == timeless(tmp_path / 'broken')
  if method == 'fedsa_lora':  # who never took part has a B of zero
    rows = files.read_rows(tmp_path / 'whole' / 'metrics.jsonl')
    losses = [r['eval/unseen/loss'] for r in rows if 'eval/unseen/loss' in r]
    assert losses == pytest.approx([losses[0]] * len(losses))


def test_pooled_data_trains_one_client_on_everybodys():
  cohort = _cohort(small_config(method='centralized'))
  assert cohort.client_id.shape == (1,)
  apart = _cohort(small_config())
  assert cohort.num_examples[0] == apart.num_examples.sum()
  # Three clients' two steps become six of one.
  assert cohort.batches.weight.shape[:2] == (1, 6)
  assert bool((cohort.batches.weight.sum(-1) > 0).all())


def _launch(workdir, *flags):
  given = [f'--config.{k}={v}' for k, v in SMALL.items()]
  return subprocess.Popen(
    [
      sys.executable, '-m', 'launch.train', '--config=configs/tiny.py',
      f'--workdir={workdir}', *given, *flags,
    ],
    cwd=ROOT, stdout=subprocess.PIPE, text=True,
    env=os.environ | {'PYTHONWARNINGS': 'ignore'},
  )  # fmt: skip


def _signal_after(process, text, number):
  with process:
    for line in process.stdout:
      if line.startswith(text):
        process.send_signal(number)
        break
    rest = process.stdout.read()
  return process.returncode, rest


def test_killed_and_continued_equals_unbroken(unbroken, tmp_path):
  code, _ = _signal_after(_launch(tmp_path), 'round 2', signal.SIGKILL)
  assert code == -signal.SIGKILL
  again = _launch(tmp_path)
  assert 'seen people' in again.communicate()[0]
  assert again.returncode == 0
  jax.tree.map(
    np.testing.assert_array_equal,
    newest_state(small_config(), tmp_path),
    newest_state(small_config(), unbroken),
  )
  assert timeless(tmp_path) == timeless(unbroken)


def fill_memory(*_):
  # What XLA raises, truly: no machine has a petabyte.
  return jax.block_until_ready(jax.numpy.zeros((1 << 48,)))


def test_what_does_not_fit_in_memory_names_the_dials(unbroken, tmp_path, monkeypatch):
  monkeypatch.setattr(points, 'evaluate', fill_memory)
  monkeypatch.setattr(completions, '_answer', fill_memory)
  full = 'RESOURCE_EXHAUSTED.*: lower '
  with pytest.raises(config.ConfigError, match=f'{full}eval.examples_per_person'):
    training.evaluate(Run(unbroken), small_config())
  with pytest.raises(config.ConfigError, match=f'{full}--max_tokens'):
    completions.complete(Run(unbroken), completions.Settings(), small_config())
  with pytest.raises(config.ConfigError) as caught:
    training.train(small_config(federated__clients_at_once=2), tmp_path)
  assert re.search(
    r'RESOURCE_EXHAUSTED.*: 2 clients .* lower that, federated\.clients_at_once',
    str(caught.value),
  )


def refuse_memory(*_):
  # What NumPy raises, truly: a few bytes short of all that can be addressed.
  return np.empty(1 << 62, np.uint8)


@pytest.mark.parametrize(
  ('module', 'name', 'fill'),
  [
    (base_model, 'load', fill_memory),
    (base_model, 'load', refuse_memory),
    (builders, '_reading', refuse_memory),
  ],
)
def test_a_model_that_does_not_fit_in_memory_names_the_dials(
  module, name, fill, tmp_path, monkeypatch
):
  monkeypatch.setattr(module, name, fill)
  with pytest.raises(config.ConfigError, match='out of memory .*model.source'):
    training.train(small_config(), tmp_path)
  assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
  many = ('--config.federated.num_rounds=500', '--config.checkpoint.every=500')
  code, rest = _signal_after(_launch(tmp_path, *many), 'round 2', signal.SIGINT)
  assert code == 75
  assert f'--workdir={tmp_path}' in rest and 'to go on' in rest
  assert int(newest_state(small_config(), tmp_path).round) >= 2


def test_a_second_ctrl_c_stops_within_the_round(tmp_path):
  # Rounds of many seconds, so that none can end between the signals.
  long = (
    '--config.federated.local_steps=400',
    '--config.federated.clients_per_round=40',
  )
  with _launch(tmp_path, *long) as process:
    for line in process.stdout:
      if line.startswith(('perplexity', 'Stopping')):
        process.send_signal(signal.SIGINT)
      if line.startswith('Stopping'):
        break
    rest = process.stdout.read()
  assert process.returncode == 130
  assert line.startswith('Stopping') and 'round' not in rest
  rows = files.read_rows(tmp_path / 'metrics.jsonl')
  assert [row['round'] for row in rows] == [0]


@pytest.mark.slow
def test_a_run_on_a_mesh_equals_a_run_on_one_device(tmp_path):
  # A step that lowers the loss: one that raises it amplifies rounding too.
  sgd = {
    'client_optimizer__name': 'sgd', 'client_optimizer__learning_rate': 0.05
  }  # fmt: skip
  spread = small_config(mesh__clients=4, mesh__model=2, **sgd)
  training.train(small_config(**sgd), tmp_path / 'one')
  training.train(spread, tmp_path / 'eight')
  one = newest_state(small_config(**sgd), tmp_path / 'one')
  eight = newest_state(spread, tmp_path / 'eight')
  np.testing.assert_array_equal(one.memory.rank, eight.memory.rank)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-5),
    one.adapters,
    eight.adapters,
  )


def test_a_damaged_config_is_named(unbroken, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(unbroken, workdir)
  (workdir / 'config.json').write_text('{"seed": 0, "fed')
  with pytest.raises(files.Damaged, match='config.json is not valid JSON.*another'):
    training.train(small_config(), workdir)


def test_another_configuration_is_refused(unbroken):
  with pytest.raises(config.ConfigError, match='seed=0, not 3'):
    training.train(small_config(seed=3), unbroken)
  with pytest.raises(config.ConfigError, match='is a file'):
    training.train(small_config(), unbroken / 'config.json')


def test_evaluation_of_a_checkpoint_equals_the_runs_last(unbroken):
  got = training.evaluate(Run(unbroken), small_config())
  last = files.read_rows(unbroken / 'metrics.jsonl')[-1]
  assert got == {k: last[k] for k in got}
  with pytest.raises(config.ConfigError, match='train first'):
    training.evaluate(Run(unbroken / 'nowhere'), small_config())


def test_two_seeds_differ_in_everything_random():
  a, b = (points.prepare(small_config(seed=s)) for s in (0, 1))
  first, second = _cohort(a.config), _cohort(b.config)
  assert not np.array_equal(first.client_id, second.client_id)
  assert not np.array_equal(a.initial_state.memory.rank, b.initial_state.memory.rank)
  assert not np.array_equal(
    a.initial_state.adapters['q'].a, b.initial_state.adapters['q'].a
  )
  for name in ('seen', 'unseen'):
    jax.tree.map(np.testing.assert_array_equal, a.evaluation[name], b.evaluation[name])


def test_own_rank_is_evaluated_on_request():
  x = points.prepare(small_config(eval__own_rank=True))
  row = rows.evaluation_row(points.evaluate(x, x.initial_state)[0])
  # B is zero at the start, so every truncation is the base itself.
  assert row['eval/seen_own/loss'] == pytest.approx(row['eval/seen/loss'])


def test_people_evaluated_at_once_keep_their_order(monkeypatch):
  def evaluated(at_once):
    monkeypatch.setattr(heldout, 'PEOPLE_AT_ONCE', at_once)
    x = points.prepare(small_config(eval__own_rank=True, eval__num_people=7))
    return points.evaluate(x, x.initial_state)[0]

  one, several = evaluated(1), evaluated(5)
  assert one.keys() == several.keys()
  for name, (loss_E, tokens_E, *_) in one.items():
    people = len(loss_E)  # the others fill up
    assert len(np.unique(loss_E)) > 2  # else any order would do
    np.testing.assert_array_equal(several[name].tokens_E[:people], tokens_E)
    np.testing.assert_allclose(several[name].loss_E[:people], loss_E, rtol=1e-5)


def test_people_json_tells_everybodys_part_of_the_last_evaluation(unbroken):
  told = json.loads((unbroken / 'people.json').read_text())
  last = json.loads((unbroken / 'summary.json').read_text())['last']
  x = points.prepare(small_config())
  assert told['round'] == last['round']
  for name, kind in (('seen', 'heldout'), ('unseen', 'unseen')):
    cohort = x.evaluation[name]
    tokens_E = np.asarray(cohort.batches.weight).sum((1, 2))
    assert [p['tokens'] for p in told[name]] == tokens_E.tolist()
    loss = sum(p['loss_sum'] for p in told[name]) / tokens_E.sum()
    assert loss == pytest.approx(last[f'eval/{name}/loss'], rel=1e-6)
    ids = x.experiment.population.groups[kind].ids
    assert [p['client'] in ids for p in told[name]] == [True] * len(tokens_E)
  ranks = [x.initial_rank[0][int(i)] for i in x.evaluation['seen'].client_id]
  assert [p['rank'] for p in told['seen']] == ranks
  assert {p['rank'] for p in told['unseen']} == {None}


@pytest.mark.slow  # by default the tutorial learns
def test_tiny_beats_the_unigram_entropy_of_its_data(tmp_path):
  c = config.resolve(tiny.get_config())
  x = points.prepare(c)
  summary = training.train(c, tmp_path).summary
  for name, cohort in x.evaluation.items():
    batches = cohort.batches
    targets = np.asarray(batches.target)[np.asarray(batches.weight) > 0]
    assert len(targets) > 300
    assert summary['last'][f'eval/{name}/loss'] < entropy.unigram(targets) - 0.2
  assert summary['rank/pruned'] > 0
