"""A server's warm start: what was trained centrally is where the federated rounds begin."""

import pytest
from experiment_test import small_config

import hetlora_jax as hl
from hetlora_jax import training
from hetlora_jax.tools import export

UNSEEN = 'eval/unseen/loss'


@pytest.fixture(scope='module')
def central(tmp_path_factory):
  c = small_config(method='centralized', federated__num_rounds=2, data__num_people=20)
  return hl.train(c, tmp_path_factory.mktemp('central') / 'run')


def test_adapters_of_other_people_are_where_a_run_begins(central, tmp_path):
  export.write(central, tmp_path / 'warm', export.Selection('peft'))
  fields = {'federated__num_rounds': 1, 'eval__every': 1}
  warm = hl.train(
    small_config(lora__from_peft=str(tmp_path / 'warm'), **fields), tmp_path / 'run'
  )
  first, last = central.history[0][UNSEEN], central.history[-1][UNSEEN]
  assert abs(first - last) > 0.01
  # Evaluated are the same people, whoever was trained on.
  assert warm.history[0][UNSEEN] == pytest.approx(last, rel=1e-5)
  assert warm.history[1][UNSEEN] != warm.history[0][UNSEEN]
  assert warm.summary['training_people'] > central.summary['training_people']


def test_a_run_of_the_same_people_goes_on_from_its_state(central, tmp_path):
  branch = training.parse_branch(f'{central.folder}@2')
  c = small_config(federated__num_rounds=3, eval__every=1, data__num_people=20)
  went_on = hl.train(c, tmp_path / 'run', branch=branch)
  assert [row['round'] for row in went_on.history] == [2, 3]
  assert went_on.history[0][UNSEEN] == central.history[-1][UNSEEN]
  # A population of another size has other states: adapters alone can be taken.
  with pytest.raises(hl.ConfigError, match='population'):
    hl.train(small_config(), tmp_path / 'other', branch=branch)
