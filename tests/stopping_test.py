"""Early stopping and the best checkpoint: told by rows, the same however a run goes on."""

import json
import math
import shutil

import numpy as np
import pytest
from experiment_test import small_config, timeless

import hetlora_jax as hl
from hetlora_jax import config, rows, run, stopping, training
from hetlora_jax.tools import export, report, sweep, tables
from tests import programs

SEEN = 'eval/seen/loss'
# At such a rate it soon unlearns: the best is round 5.
FAST = {
  'federated__num_rounds': 9,
  'eval__every': 1,
  'eval__patience': 2,
  'checkpoint__every': 4,
  'checkpoint__keep': 1,
  'checkpoint__keep_best': True,
  'client_optimizer__learning_rate': 0.1,
}


def rows_of(*values, metric=SEEN):
  return [{'round': 2 * i, metric: x} for i, x in enumerate(values)]


def judge(rows, **fields):
  return stopping.judge(rows, config.Eval(**fields))


@pytest.mark.parametrize(
  ('values', 'fields', 'want'),
  [
    ([3, 2, 2.5, 2.1], {'patience': 2}, (2, 2, 6)),
    ([3, 2, 2.5, 1.9, 2, 2], {'patience': 2}, (6, 1.9, 10)),
    ([3, 2, 2.5], {}, (2, 2, None)),
    ([2, 2, 2], {'patience': 2}, (0, 2, 4)),
    # Better, but not by enough: it is the best all the same.
    ([3, 2.9, 2.8, 2.75], {'patience': 2, 'min_delta': 0.5}, (6, 2.75, 4)),
    ([3, 2.9, 2.4, 2.3], {'patience': 2, 'min_delta': 0.5}, (6, 2.3, None)),
    ([math.nan, 3, math.nan, 4], {'patience': 2}, (2, 3, 6)),
    ([math.nan, math.nan], {'patience': 1}, (0, math.nan, 2)),
    ([1, 2, 3], {'patience': 1, 'better': 'higher'}, (4, 3, None)),
    ([3, 2], {'patience': 1, 'better': 'higher'}, (0, 3, 2)),
  ],
)
def test_rows_tell_the_best_and_when_patience_ends(values, fields, want):
  np.testing.assert_equal(judge(rows_of(*values), **fields), want)


def test_other_rows_are_no_evaluations():
  rows = [{'round': 1, 'train/loss': 1.0}, *rows_of(4, 5, metric='eval/seen/macro_f1')]
  assert judge(rows) is None
  assert judge(rows, metric='eval/seen/macro_f1') == (2, 5, None)


def test_each_way_into_a_run_is_told_before_anything_is_written(tmp_path):
  for fields, said in (
    ({'eval__metric': 'train/loss'}, 'name a column of an evaluation'),
    ({'eval__metric': 'eval/seen/own_error'}, 'eval.better must say'),
    ({'eval__patience': 2, 'eval__every': None}, 'give eval.every'),
    ({'eval__better': 'smaller'}, "'lower'"),
  ):
    with pytest.raises(hl.ConfigError, match=said):
      small_config(**fields)
  for metric in ('eval/sen/loss', 'eval/seen/macro_f1'):  # no such set, no such score
    with pytest.raises(hl.ConfigError, match=f'{metric}.*evaluates: eval/seen/loss, '):
      hl.train(small_config(eval__metric=metric), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  folder = tmp_path_factory.mktemp('stopped') / 'run'
  return hl.train(small_config(**FAST), folder)


def test_a_run_stops_and_says_so(stopped):
  losses = [row[SEEN] for row in stopped.history]
  best = int(np.argmin(losses))
  assert best == 5 and len(losses) == best + 3
  assert stopped.summary['best'] == {'round': best, SEEN: losses[best]}
  told = stopped.summary['stopped']
  assert told['round'] == best + 2 and 'raise it to go on' in told['why']
  assert stopped.summary['last']['round'] == best + 2
  assert stopped.finished and f'round {best + 2}' in rows.table(stopped.summary)
  # The best, and the newest.
  assert stopped.steps() == {best, best + 2}


def test_the_same_line_does_nothing_and_more_patience_goes_on(
  stopped, tmp_path, capsys, monkeypatch
):
  shutil.copytree(stopped.folder, tmp_path / 'run')
  before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'run').rglob('*')}
  with monkeypatch.context() as patch:
    patch.setattr(training.points, 'prepare', None)  # nothing is even loaded
    hl.train(small_config(**FAST), tmp_path / 'run')
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / 'run').rglob('*')} == before
  assert 'was stopped after round' in capsys.readouterr().out

  longer = FAST | {'eval__patience': 99}
  again = hl.train(small_config(**longer), tmp_path / 'run')
  whole = hl.train(small_config(**longer), tmp_path / 'whole')
  assert again.summary['stopped'] is None and len(again.history) == 10
  assert timeless(again.folder) == timeless(whole.folder)
  assert again.summary['best'] == whole.summary['best']
  assert again.summary['best']['round'] in again.steps()


@pytest.mark.parametrize('after', [2, 5, 6, 7])
def test_an_interrupted_run_stops_at_the_same_round(after, stopped, tmp_path):
  """As if killed after each round, before it was saved, and before the summary."""

  def kill(row):
    if row['round'] == after:
      raise Killed

  with pytest.raises(Killed):
    hl.train(small_config(**FAST), tmp_path / 'run', on_round=kill)
  again = hl.train(small_config(**FAST), tmp_path / 'run')
  assert timeless(again.folder) == timeless(stopped.folder)
  for name in ('best', 'stopped'):
    assert again.summary[name] == stopped.summary[name]
  assert again.steps() == stopped.steps()


def test_a_summary_lost_or_a_state_lost_ends_the_same(stopped, tmp_path):
  shutil.copytree(stopped.folder, tmp_path / 'run')
  (tmp_path / 'run/summary.json').unlink()
  again = hl.train(small_config(**FAST), tmp_path / 'run')
  assert again.summary['stopped'] == stopped.summary['stopped']
  newest = tmp_path / 'run/checkpoints' / str(max(stopped.steps()))
  shutil.rmtree(newest)  # as if its files were still being written
  assert not again.finished
  again = hl.train(small_config(**FAST), tmp_path / 'run')
  assert newest.exists() and again.finished
  assert timeless(again.folder) == timeless(stopped.folder)


class Killed(Exception):
  pass


def test_points_that_stop_are_as_they_were_and_the_others_go_on(stopped, tmp_path):
  """Two learning rates in one program, killed once, beside the same without patience."""
  made = [
    small_config(**FAST | {'client_optimizer__learning_rate': rate})
    for rate in (0.1, 0.15)
  ]
  together, patient = (
    [
      training.Point(c.replace(**{'eval.patience': p}), tmp_path / f'{p}_{i}')
      for i, c in enumerate(made)
    ]
    for p in (2, None)
  )
  rounds = []

  def kill(row):
    rounds.append(row['round'])
    if row['round'] == 9:
      raise Killed

  with pytest.raises(Killed):
    training.train_points(together, kill)
  first, second = (run.Run(p.workdir) for p in together)
  assert rounds.count(7) == 2 and rounds.count(8) == 1
  assert first.steps() == {5, 7} and 8 in second.steps()
  assert first.finished and not second.finished
  assert first.summary['stopped']['round'] == stopped.summary['stopped']['round'] == 7
  before = (first.folder / 'metrics.jsonl').read_bytes()

  # The other goes on without it, in a program of its own: other roundings.
  training.train_points(together)
  assert (first.folder / 'metrics.jsonl').read_bytes() == before
  whole = training.train_points(patient)
  want, wanted = (timeless(x.folder) for x in whole)
  assert timeless(first.folder) == want[:8] and len(want) == 10
  assert timeless(second.folder)[:9] == wanted[:9]
  found = [row[SEEN] for row in second.history]
  np.testing.assert_allclose(found, [row[SEEN] for row in wanted], 1e-3)
  assert second.summary['stopped'] is None
  assert second.summary['best']['round'] == whole[1].summary['best']['round']

  # What each keeps is its own best.
  x = second.prepare()
  for i in range(2):
    best = run.Run(together[i].workdir)
    done, state = best.state(x, 'best')
    assert done == best.summary['best']['round'] == int(state.round)
    assert training.evaluate(best, round='best')[SEEN] == pytest.approx(
      best.summary['best'][SEEN], rel=1e-5
    )

  # A sweep takes both as ended, and draws curves of two lengths.
  jobs = [
    sweep.Job(p.workdir.name, {'seed': i}, p.config, p.workdir, '')
    for i, p in enumerate(together)
  ]
  assert all(sweep.summary_of(job) for job in jobs)
  assert sweep.summary_of(jobs[0]._replace(config=patient[0].config)) is None
  assert '±' in tables.write(sweep.results(jobs), tmp_path)
  assert report.write([p.workdir for p in together], tmp_path / 'page.html') == 2
  assert 'unfinished' not in (tmp_path / 'page.html').read_text()


def test_a_callback_stops_a_run(tmp_path, capsys):
  c, seen = small_config(checkpoint__every=4), []

  def until_2(row):
    seen.append(row['round'])
    return hl.STOP if row['round'] == 2 else True  # other answers are ignored

  ended = hl.train(c, tmp_path / 'run', until_2)
  assert seen == [0, 1, 2] and ended.steps() == {2} and ended.finished
  assert ended.summary['stopped']['by'] == 'on_round'
  hl.train(c, tmp_path / 'run')
  assert 'delete summary.json to go on' in capsys.readouterr().out
  assert len(ended.history) == 3
  (tmp_path / 'run/summary.json').unlink()
  hl.train(c, tmp_path / 'run')
  assert [row['round'] for row in ended.history] == [0, 1, 2, 3, 4]
  assert ended.summary['stopped'] is None
  whole = hl.train(c, tmp_path / 'whole')
  assert timeless(whole.folder) == timeless(ended.folder)


@pytest.mark.slow
def test_a_callback_stops_a_run_at_the_end_of_a_call(tmp_path):
  c = small_config(federated__rounds_per_call=2, checkpoint__every=2)
  ended = hl.train(c, tmp_path, lambda row: hl.STOP if row['round'] == 1 else None)
  assert [row['round'] for row in ended.history] == [0, 1, 2]
  assert ended.steps() == {2}


def test_rounds_are_chosen_to_evaluate_and_export(stopped, tmp_path):
  best, last = sorted(stopped.steps())
  assert training.evaluate(stopped, round='best') == {
    'round': best,
    **{k: v for k, v in stopped.history[best].items() if k.startswith('eval/')},
  }
  about = [
    export.write(stopped, tmp_path / str(r), export.Selection('peft', round=r))['round']
    for r in ('newest', 'best', str(last))
  ]
  assert about == [last, best, last]
  one, two = (
    (tmp_path / str(r) / 'adapter_model.safetensors').read_bytes()
    for r in ('best', 'newest')
  )
  assert one != two
  for name, said in (
    ('6', rf'has saved rounds \[{best}, {last}\], not 6'),
    ('beste', 'must be newest, best'),
    ('-1', 'must be newest, best'),
  ):
    with pytest.raises(hl.ConfigError, match=said):
      training.evaluate(stopped, round=name)
    with pytest.raises(hl.ConfigError, match=said):
      export.write(stopped, tmp_path / 'no', export.Selection('peft', round=name))
  assert not (tmp_path / 'no').exists()


def test_the_best_of_a_run_that_did_not_keep_it_is_named(tmp_path):
  c = small_config(**FAST | {'checkpoint__keep_best': False})
  lost = hl.train(c, tmp_path)
  best = lost.summary['best']['round']
  with pytest.raises(hl.ConfigError, match=rf'not {best} \(the best by {SEEN}\)'):
    training.evaluate(lost, round='best')


def test_launchers_say_that_it_stopped_and_take_the_best(stopped, tmp_path):
  shutil.copytree(stopped.folder, tmp_path / 'run')
  workdir = f'--workdir={tmp_path}/run'
  again = programs.run('launch.train', workdir)
  assert again.returncode == 0, again.stderr
  assert again.stdout.count(f'{SEEN} did not get better in eval.patience=2 ') == 2
  assert 'after round 5)' in again.stdout
  found = programs.run('launch.evaluate', workdir, '--round=best')
  found = json.loads(found.stdout.splitlines()[-1])
  assert found['round'] == 5
  assert found[SEEN] == pytest.approx(stopped.summary['best'][SEEN], rel=1e-6)
  wrong = programs.run('launch.export', workdir, '--round=1x', f'--out={tmp_path}/x')
  assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1
  assert '--round=1x: it must be newest, best' in wrong.stderr
