"""Many points: folders, skipping, failures, the table."""

import json

import pytest
from experiment_test import small_config

from configs import ablations
from hetlora_jax import config, console, metrics, sweep

POINTS = [
  {'method': 'full_finetuning'},
  {'method': 'flora', 'federated.r_max': 3},
  {'method': 'flexlora', 'methods.redistribution': 'keep'},  # does not fit
]


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('sweep')
  c = small_config(federated__num_rounds=2)
  return workdir, c, sweep.run(c, POINTS, workdir, 'train --config=x')


def test_every_point_has_a_folder_and_a_command(swept):
  workdir, _, results = swept
  assert [r['name'] for r in results] == [
    'method=full_finetuning',
    'method=flora,r_max=3',
    'method=flexlora,redistribution=keep',
  ]
  for result in results[:2]:
    assert (workdir / result['name'] / 'summary.json').exists()
  assert results[1]['command'] == (
    'train --config=x --config.method=flora --config.federated.r_max=3 '
    f"'--workdir={workdir}/method=flora,r_max=3'"
  ).replace("'", '')
  assert json.loads((workdir / 'sweep.json').read_text()) == results
  assert (workdir / 'sweep.png').stat().st_size > 10_000


def test_a_point_that_cannot_run_is_named_and_the_others_go_on(swept):
  _, _, results = swept
  assert 'config.methods.redistribution' in results[2]['error']
  assert all('error' not in r for r in results[:2])
  lines = sweep.table(results).splitlines()
  assert len(lines) == 5 and 'failed' in lines[-1]
  assert len({len(line) for line in lines}) == 1


def test_finished_points_are_not_run_again(swept, monkeypatch):
  workdir, c, results = swept
  said = []
  monkeypatch.setattr(console, 'say', said.append)
  again = sweep.run(c, POINTS, workdir, 'train --config=x')
  assert again == results
  assert not any('Loading' in line for line in said)


def test_bytes_add_up_over_the_rounds(swept):
  workdir, _, results = swept
  rows = metrics.read_rows(workdir / results[1]['name'] / 'metrics.jsonl')
  assert rows[-1]['comm/total_up_bytes'] == results[1]['comm/up_bytes']
  assert results[1]['comm/up_bytes'] == sum(
    r.get('comm/up_bytes', 0) for r in rows
  )


@pytest.mark.parametrize('name', ablations.SWEEPS)
def test_every_point_of_the_papers_sweeps_resolves(name):
  c = small_config(federated__local_steps=20)
  points = sweep.load(f'configs/ablations.py:{name}')
  names = {sweep.name_of(point) for point in points}
  assert len(names) == len(points) >= 2
  for point in points:
    sweep.with_point(c, point)


@pytest.mark.parametrize('spec', ['configs/ablations.py', 'x.py:a', 'configs/ablations.py:gama'])  # fmt: skip
def test_an_unknown_sweep_is_named(spec):
  with pytest.raises(config.ConfigError, match='--sweep'):
    sweep.load(spec)
