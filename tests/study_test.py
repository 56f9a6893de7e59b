"""The reproduction study: its runs, and what the page says of their results."""

import json
import math
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from benchmarks import study as runner
from benchmarks import study_report as report
from benchmarks import study_stats as stats
from benchmarks import study_tables as tables
from configs import study
from hetlora_jax.tools import bootstrap
from hetlora_jax.tools.bootstrap import Interval


def result(arm, losses, *, tokens=10, tail=0.0, up=1e6):
  """Returns a result with evaluations at rounds 0, 6, ... of given losses."""
  count = len(losses)
  people = {
    kind: [
      {'client': f'{kind}{i}', 'rank': 5, 'tokens': tokens + i,
       'loss_sum': (losses[-1] + tail * (i % 2)) * (tokens + i)}
      for i in range(20)
    ]
    for kind in ('seen', 'unseen')
  }  # fmt: skip
  one = {name: [1.0, 2.0] for name in runner._OF_ROUNDS}
  return {
    'arm': arm, 'people': people, 'rounds': one, 'train/parameters': 1e4,
    'machine': {'processor': 'x', 'cores': '2', 'jax': '0'},
    'curve': {
      'round': [6 * i for i in range(count)], 'seen': list(losses),
      'unseen': list(losses), 'target_tokens': [0] * count,
      'up_bytes': [up * i for i in range(count)], 'down_bytes': [0.0] * count,
    },
  }  # fmt: skip


def results_of(losses_of_arms):
  """Returns results of arms at three rates and seeds; the middle is best."""
  out = {}
  for arm, losses in losses_of_arms.items():
    _, rates = study.rates(arm)
    for rate, worse in zip(rates[2:5], (0.5, 0.0, 0.2), strict=True):
      for seed in study.SEEDS if not worse else study.SEEDS[:1]:
        shifted = [x + worse + 0.01 * seed for x in losses]
        out[runner.name_of(arm, rate, seed)] = result(arm, shifted)
  return out


FOUND = {
  'LoRA r = 5': [4.0, 3.8, 3.6],
  'LoRA r = 50': [4.0, 3.5, 3.7],
  stats.OURS: [4.0, 3.4, 3.2],
}


@pytest.mark.parametrize('task', study.TASKS)
def test_every_arm_is_a_run_of_its_own_name(task):
  runs = [
    run for arm in study.ARMS for run in runner.runs(task, arm, {}, pathlib.Path('x'))
  ]
  assert len(runs) == len(study.ARMS) * 3
  assert len({run.name for run in runs}) == len(runs)
  assert {run.config.data.name for run in runs} == {report.NAMES[task]}
  shares = {
    (run.config.federated.num_rounds, run.config.federated.clients_per_round,
     run.config.federated.local_steps, run.config.federated.local_batch)
    for run in runs
  }  # fmt: skip
  assert len(shares) == 1  # no arm is smaller than another


def test_other_seeds_run_at_the_rate_that_validates_best():
  done = results_of({'FedEx': [4.0, 3.0]})
  names = [r.name for r in runner.runs('chat', 'FedEx', done, pathlib.Path('x'))]
  assert names[-2:] == ['fedex-lr0.0008-seed1', 'fedex-lr0.0008-seed2']
  del done['fedex-lr0.004-seed0']
  assert runner.best_rate('FedEx', done) is None


def test_rates_go_on_while_the_best_is_at_the_edge():
  done = results_of({'FedEx': [4.0, 3.0]})
  assert runner.rates_wanted('FedEx', done) == [2e-4, 8e-4, 4e-3]
  done['fedex-lr0.004-seed0'] = result('FedEx', [4.0, 2.5])
  assert runner.rates_wanted('FedEx', done) == [2e-4, 8e-4, 4e-3, 2e-2]
  assert runner.best_rate('FedEx', done) is None
  done['fedex-lr0.02-seed0'] = result('FedEx', [4.0, 2.4])
  assert runner.rates_wanted('FedEx', done) == [2e-4, 8e-4, 4e-3, 2e-2, 1e-1]
  assert '| not yet known |' in tables.tried(done)
  done['fedex-lr0.1-seed0'] = result('FedEx', [4.0, 2.3])
  assert runner.rates_wanted('FedEx', done) == [2e-4, 8e-4, 4e-3, 2e-2, 1e-1]
  assert runner.best_rate('FedEx', done) == 1e-1
  assert '| 0.1, the end |' in tables.tried(done)


def test_rates_of_the_whole_model_have_a_table_of_their_own():
  shown = tables.tried(
    results_of({'FedEx': [4.0, 3.0], 'full fine-tuning': [4.0, 3.0]})
  )
  of_adapters, of_all = shown.split('\n\n')
  assert of_adapters.startswith('|  | 0.0002 | 0.0008 | 0.004 | the best |')
  assert of_all.startswith('|  | 3e-06 | 1e-05 | 3e-05 | the best |')
  assert 'full fine-tuning' in of_all and 'FedEx' in of_adapters


def test_texts_are_written_of_runs_that_may_be_chosen():
  done = results_of({'FedEx': [4.0, 3.0]})
  of_seed = lambda seed: [  # noqa: E731
    (name, SimpleNamespace(name=name, fields={'seed': seed}))
    for name in done
    if name.endswith(f'seed{seed}')
  ]
  chosen = [n for n, r in of_seed(0) if runner._may_be_chosen(r, done)]
  assert chosen == ['fedex-lr0.0008-seed0']
  assert all(runner._may_be_chosen(r, done) for _, r in of_seed(2))


def test_an_arm_is_done_before_the_next_begins(tmp_path, monkeypatch):
  started = []

  def start_all(commands, logs, parallel):
    del logs, parallel
    for words in commands.values():
      task, names = (w.split('=', 1)[1] for w in words[-2:])
      started.extend((task, name) for name in names.split(','))
      for name in names.split(','):
        floor = name == runner._FLOORS
        paths = [f'floor/shots{n}' for n in study.SHOTS] if floor else [name]
        for path in paths:
          file = tmp_path / task / f'{path}.json'
          file.parent.mkdir(parents=True, exist_ok=True)
          middle = 'lr0.0008' in name or 'lr1e-05' in name
          file.write_text(json.dumps(result('any', [4.0, 3.0 - middle])))
    return True

  monkeypatch.setattr(runner.processes, 'start_all', start_all)
  flags.FLAGS(['study'])
  try:
    with (
      flagsaver.as_parsed(raw=str(tmp_path)),
      pytest.raises(SystemExit) as end,
    ):
      runner.main()
  finally:
    flags.FLAGS.unparse_flags()
  assert end.value.code == 0
  assert started[:2] == [(task, runner._FLOORS) for task in study.TASKS]
  assert len(set(started[2:])) == len(started[2:]) == len(study.ARMS) * 10
  first = [(t, n) for t, n in started if n.startswith('hetlora_0.99-lr')]
  assert started[2:12] == first  # five a task
  assert first[:5] == [('chat', n) for _, n in first[:5]]


def test_people_who_choose_rates_are_not_reported():
  arm = stats.arms(results_of(FOUND))[stats.OURS]
  reported = stats.loss(arm, 'unseen'), arm.losses('unseen')[0].shape
  for r in arm.results:
    for person in r['people']['unseen']:
      if runner.for_validation(person['client']):
        person['loss_sum'] = 1e9
  assert (stats.loss(arm, 'unseen'), arm.losses('unseen')[0].shape) == reported
  assert 0 < reported[1][1] < 20


def test_a_loss_that_is_not_finite_is_never_chosen():
  done = results_of({'FedEx': [4.0, 3.0]})
  for person in done['fedex-lr0.0008-seed0']['people']['unseen']:
    person['loss_sum'] = math.nan
  done['fedex-lr0.02-seed0'] = result('FedEx', [4.0, 3.9])
  assert runner.best_rate('FedEx', done) == 0.004


def test_intervals_hold_the_mean_and_gaps_are_paired():
  found = stats.arms(results_of(FOUND))
  a, b = found['LoRA r = 5'], found[stats.OURS]
  value, low, high = bootstrap.ratio(*a.losses('seen'))
  assert low < value < high and value == pytest.approx(stats.loss(a, 'seen'))
  gap = stats.gap(a, b, 'seen')
  # Every person's loss differs by the same 0.4, so a paired gap has no spread.
  np.testing.assert_allclose(gap, 0.4, atol=1e-6)


def test_an_arm_waits_for_all_its_seeds():
  done = results_of(FOUND)
  assert set(stats.arms(done)) == set(FOUND)
  assert '\n| LoRA r = 5 |' in tables.summary({'chat': stats.arms(done)}, {})
  del done['lora_r_5-lr0.0008-seed2']
  found = stats.arms(done)
  assert set(found) == set(FOUND) - {'LoRA r = 5'}
  assert 'LoRA r = 5 |' not in tables.summary({'chat': found}, {})
  assert tables._claims_of(found)[0][-1] == 'not run yet'


def test_controls_compare_arms_of_the_same_weights():
  found = stats.arms(results_of(FOUND))
  row = '| LoRA r = 5, both by examples |'
  assert f'{row}  |  | not run yet |' in tables.controls(found)
  found['HetLoRA, size weights'] = found['LoRA r = 50']
  gap = stats.gap(found['LoRA r = 5'], found['LoRA r = 50'], 'seen')
  assert abs(gap.value) > 0.1
  assert f'{row} {gap.signed()} |' in tables.controls(found)


def test_bytes_are_interpolated_where_a_target_is_crossed():
  arm = stats.arms(results_of(FOUND))[stats.OURS]
  assert stats.bytes_to(arm, 3.41 + 0.3) == pytest.approx(0.5e6)
  assert stats.bytes_to(arm, 1.0) == math.inf


def test_a_claim_needs_intervals_beyond_zero():
  sure, unsure = (Interval(0.1, low, 0.2) for low in (0.05, -0.01))
  below = Interval(-0.1, -0.2, -0.05)
  assert stats.verdict([sure, sure]) == 'confirmed'
  assert stats.verdict([sure, unsure]) == 'undecidable here'
  assert stats.verdict([sure, below]) == 'not confirmed'


@pytest.mark.parametrize(
  'values, want',
  [
    ([0.1, 0.2, math.inf], 'confirmed'), ([-0.1, 0.0], 'not confirmed'),
    ([0.1, -0.1], 'undecidable here'), ([math.nan] * 3, 'undecidable here'),
  ],
)  # fmt: skip
def test_a_claim_about_curves_needs_all_seeds(values, want):
  assert stats.verdict_by_seed(values) == want


def test_curves_are_compared_seed_by_seed():
  found = stats.arms(results_of(FOUND))
  slow, overfits, bytes_, _ = stats.SEED_CLAIMS
  np.testing.assert_allclose(stats.by_seed(slow, found), 0.3)
  np.testing.assert_allclose(stats.by_seed(overfits, found), 0.2)
  # LoRA r = 5 ends at 3.61 in the mean: 50 crosses it, ours does earlier.
  assert all(0 < x < 1 for x in stats.by_seed(bytes_, found))


def test_curves_that_still_fall_are_told():
  found = stats.arms(results_of(FOUND))
  told = tables.bending(found)  # the middle arm rises again
  assert 'in 2 of 3 arms' in told and '25% to 50%' in told
  del found['LoRA r = 5'], found[stats.OURS]
  assert 'No curve' in tables.bending(found)


def test_the_page_tells_what_ran(tmp_path):
  raw = tmp_path / 'raw' / 'chat'
  raw.mkdir(parents=True)
  for name, content in results_of(FOUND).items():
    (raw / f'{name}.json').write_text(json.dumps(content))
  people = result('untouched', [4.0])['people']
  (raw / 'floor').mkdir()
  for shots in study.SHOTS:
    floor = {'shots': shots, 'whole': people}
    floor |= {} if shots else {'people': people}
    (raw / 'floor' / f'shots{shots}.json').write_text(json.dumps(floor))
  page = report.page(tmp_path / 'raw', tmp_path)
  report.draw(tmp_path / 'raw', tmp_path)
  assert f'| untouched | {math.exp(4):.2f} [' in page
  assert '| untouched, 3 examples in the prompt |  |' in page
  assert '54.60 with 0, 54.60 with 3 examples of other people' in page
  assert f'15 of {len(study.ARMS) * 10} runs are done; the others are missing' in page
  assert '| HetLoRA beats homogeneous LoRA of low rank | +0.400' in page
  assert '| HetLoRA beats homogeneous LoRA of low rank | confirmed |' in page
  assert 'Worse: LoRA r = 5 (+0.400), LoRA r = 50' in page
  assert page.index('## Summary') < 1000
  assert f'{math.exp(3.21):.2f} [' in page  # the mean of three seeds
  assert (tmp_path / 'chat_curves.png').stat().st_size > 10_000
  assert 'No arm has run' in page  # of the other task
