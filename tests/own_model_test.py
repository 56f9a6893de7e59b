"""A model of one's own is trained and evaluated; what it lacks is told at once."""

import jax
import pytest
from base_model_test import TARGETS, Words, _apply, _params
from experiment_test import small_config

import hetlora_jax as hl
from hetlora_jax import training
from hetlora_jax.tools import completions, export


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  model = hl.own_model(_params(), _apply, TARGETS, Words())
  c = small_config(federated__num_rounds=2, model__source='mine')
  return hl.train(c, tmp_path_factory.mktemp('own'), model=model)


def test_its_newest_checkpoint_is_evaluated(run):
  again = hl.Run(run.folder, model=run.model)
  found = training.evaluate(again)
  last = run.summary['last']
  assert found['round'] == last['round'] == 2
  for who in ('seen', 'unseen'):
    name = f'eval/{who}/loss'
    assert found[name] == pytest.approx(last[name], rel=1e-6)
  assert found['eval/seen/loss'] != run.history[0]['eval/seen/loss']


def test_its_adapters_are_at_hand(run):
  x = run.prepare()
  done, state = run.state(x)
  assert done == 2 and set(state.adapters) == set(TARGETS)
  assert all(adapter.b.any() for adapter in state.adapters.values())


def test_other_parameters_are_another_model(run):
  params = jax.tree.map(lambda leaf: leaf + 1, run.model.params)
  other = hl.own_model(params, _apply, TARGETS, Words())
  with pytest.raises(hl.ConfigError, match='another|other'):
    training.evaluate(hl.Run(run.folder, model=other))


def test_what_it_lacks_is_told_and_nothing_is_written(run, tmp_path):
  before = sorted(run.folder.iterdir())
  with pytest.raises(hl.ConfigError, match='cannot generate.*training.evaluate'):
    completions.complete(run, completions.Settings())
  for format in export.FORMATS:
    with pytest.raises(hl.ConfigError, match='no layout that PEFT.*Run.newest'):
      export.write(run, tmp_path / 'out', export.Selection(format))
  assert sorted(run.folder.iterdir()) == before and not any(tmp_path.iterdir())
