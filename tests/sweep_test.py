"""Many points: folders, skipping, failures, the table."""

import csv
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys

import numpy as np
import pytest
from experiment_test import SMALL, small_config, timeless

from configs import ablations
from hetlora_jax import (
  build,
  config,
  console,
  fields,
  files,
  points,
  training,
)
from hetlora_jax.run import Run
from hetlora_jax.tools import bootstrap, sweep, tables
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent

POINTS = [
  {'method': 'full_finetuning'},
  {'method': 'flora', 'federated.r_max': 3},
  {'method': 'flexlora', 'methods.redistribution': 'keep'},  # does not fit
]


def _run_all(runs):
  """Runs every program in this process and returns the results."""
  for program in sweep.programs(runs):
    sweep.run_program(program)
  return sweep.results(runs)


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('sweep')
  c = small_config(federated__num_rounds=2)
  runs = sweep.plan(c, POINTS, workdir, 'train --config=x')
  return workdir, runs, _run_all(runs)


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
  tables.write(results, workdir)
  told = json.loads((workdir / 'sweep.json').read_text())
  paired = [result.pop('paired', {}) for result in told]
  assert told == results
  assert [x.get('baseline') for x in paired] == [None, 'method=full_finetuning', None]
  assert (workdir / 'sweep.png').stat().st_size > 10_000


def test_a_point_that_cannot_run_is_named_and_the_others_go_on(swept):
  _, runs, results = swept
  assert 'config.methods.redistribution' in results[2]['error']
  assert all('error' not in r for r in results[:2])
  assert [len(program) for program in sweep.programs(runs)] == [1, 1]
  lines = tables.table(results).splitlines()
  assert len(lines) == 5 and 'failed' in lines[-1]
  assert len({len(line) for line in lines}) == 1


def test_finished_points_are_not_run_again(swept, monkeypatch):
  _, runs, results = swept
  said = []
  monkeypatch.setattr(console, 'say', said.append)
  assert _run_all(runs) == results
  assert not said


GRID = 'federated.tail_penalty=[0.0,5.0] x seed=[0,1]'


def _grid(workdir, rounds=4):
  c = small_config(federated__num_rounds=rounds)
  return sweep.plan(c, sweep.parse_grid(GRID, c), workdir, 'train')


@pytest.fixture(scope='module')
def together(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('grid')
  return _grid(workdir), _run_all(_grid(workdir))


def test_points_of_one_program_get_the_numbers_of_their_own_runs(together, tmp_path):
  runs, results = together
  assert [r['points_together'] for r in results] == [4] * 4
  for run, result in list(zip(runs, results, strict=True))[1:3]:
    alone = training.train(run.config, tmp_path / run.name)
    for place in (tmp_path / run.name, run.workdir):
      assert (place / 'checkpoints' / '4').is_dir()
      assert (place / 'curves.png').exists()
    assert result['last'] == pytest.approx(alone.summary['last'], rel=1e-5)
    rows, want = timeless(run.workdir), timeless(tmp_path / run.name)
    for row, other in zip(rows, want, strict=True):
      assert row.get('rank/histogram') == other.get('rank/histogram')
      assert row.get('train/loss', 0) == pytest.approx(
        other.get('train/loss', 0), rel=1e-5
      )
  losses = {r['last']['eval/seen/loss'] for r in results}
  assert len(losses) == 4
  assert len({r['model_fingerprint'] for r in results}) == 1


def test_a_grid_is_one_compilation(tmp_path, monkeypatch):
  prepared, prepare = [], points.prepare

  def remember(*configs, **rest):
    prepared.append(prepare(*configs, **rest))
    return prepared[-1]

  monkeypatch.setattr(points, 'prepare', remember)
  _run_all(_grid(tmp_path))
  assert [len(x.configs) for x in prepared] == [4]
  assert prepared[0].run_rounds._cache_size() == 1


def test_an_interrupted_grid_ends_with_the_same_numbers(together, tmp_path):
  _, want = together
  runs = _grid(tmp_path)
  short = _grid(tmp_path, rounds=2)
  sweep.run_program(short)
  # As if the machine had died while the points were being saved.
  shutil.rmtree(tmp_path / runs[0].name / 'checkpoints' / '2')
  got = _run_all(runs)
  for result, other in zip(got, want, strict=True):
    assert result['last'] == other['last']
    assert result['comm/up_bytes'] == other['comm/up_bytes']


def test_a_new_point_starts_beside_those_that_go_on(together, tmp_path):
  runs, want = together
  shutil.copytree(runs[0].workdir.parent, tmp_path, dirs_exist_ok=True)
  runs = _grid(tmp_path)
  for run in runs:
    (run.workdir / 'summary.json').unlink()
    shutil.rmtree(run.workdir / 'checkpoints' / '4')
  shutil.rmtree(runs[3].workdir)
  assert [len(batch) for batch in sweep._in_step(runs)] == [3, 1]
  for result, other in zip(_run_all(runs), want, strict=True):
    assert result['last'] == pytest.approx(other['last'], rel=1e-5)


def test_seeds_become_one_row_with_their_spread(together):
  _, results = together
  losses = [r['last']['eval/seen/loss'] for r in results]
  lines = tables.table(results).splitlines()
  assert len(lines) == 4
  for line, (a, b) in zip(lines[2:], (losses[:2], losses[2:]), strict=True):
    assert f'| {(a + b) / 2:.3f} ± {abs(a - b) / 2**0.5:.3f} ' in line
  failed = [results[0], {**results[1], 'error': 'x'}]
  assert f'{losses[0]:.3f} (1 failed)' in tables.table(failed)


def test_arms_are_compared_in_all_that_a_sweep_writes(together, tmp_path):
  runs, results = together
  shutil.copytree(runs[0].workdir.parent, tmp_path, dirs_exist_ok=True)
  said = tables.write(results, tmp_path)
  # By hand, from everybody's losses.
  people = [Run(tmp_path / r['name']).people['seen'] for r in results]
  loss_PE = np.array([[p['loss_sum'] for p in one] for one in people])
  tokens_E = np.array([p['tokens'] for p in people[0]])
  gap_SE = loss_PE[2:] - loss_PE[:2]  # tail_penalty=5.0 less 0.0, seed by seed
  want = bootstrap.ratio(gap_SE, tokens_E)
  assert f'| tail_penalty=5.0 | {want.signed()}' in said
  assert 'Loss less that of tail_penalty=0.0' in said and '2 seeds' in said
  told = json.loads((tmp_path / 'sweep.json').read_text())
  assert [r.get('paired', {}).get('baseline') for r in told] == [None] * 2 + [
    'tail_penalty=0.0'
  ] * 2
  seen = told[2]['paired']['seen']
  assert (seen['value'], seen['low'], seen['high']) == want and seen['seeds'] == 2
  rows = list(csv.DictReader((tmp_path / 'sweep.csv').read_text().splitlines()))
  assert [row['federated.tail_penalty'] for row in rows] == ['0.0', '5.0']
  losses = [r['last']['eval/seen/loss'] for r in results]
  assert float(rows[1]['loss_seen']) == statistics.mean(losses[2:])
  assert float(rows[1]['difference_seen_low']) == want.low
  assert rows[0]['difference_seen'] == '' and rows[0]['seeds'] == '2'
  for row, arm in zip(rows, (results[:2], results[2:]), strict=True):
    for name, field in tables._MEANS.items():
      assert float(row[name]) == pytest.approx(np.mean([r[field] for r in arm]))
  # Against the other arm, and against none that there is.
  tables.write(results, tmp_path, 'tail_penalty=5.0')
  told = json.loads((tmp_path / 'sweep.json').read_text())
  assert told[0]['paired']['seen']['value'] == pytest.approx(-want.value)
  with pytest.raises(config.ConfigError, match='--baseline=x is no arm'):
    tables.write(results, tmp_path, 'x')


def _balanced(latex):
  text = re.sub(r'\\[{}$]', '', latex)
  depth = np.cumsum([{'{': 1, '}': -1}.get(c, 0) for c in text])
  return depth.min() >= 0 and depth[-1] == 0 and text.count('$') % 2 == 0


def test_the_table_for_a_paper_is_latex(together):
  runs, results = together
  odd = 'a_b,50%&c{~^\\#$'
  renamed = [
    dict(r, fields={'method': odd if i < 2 else 'plain', 'seed': i % 2})
    for i, r in enumerate(results)
  ]
  failed = {'name': 'x', 'fields': {'method': 'gone'}, 'error': 'no'}
  arms, base = tables.compared([*renamed, failed], runs[0].workdir.parent, None)
  latex = tables.to_latex(arms, base)
  body = [line for line in latex.splitlines() if line.endswith(r'\\')]
  assert [len(re.split(r'(?<!\\)&', line)) for line in body[1:]] == [8] * 4
  assert _balanced('\n'.join(body)) and 'failed' in body[-1]
  want = r'a\_b, 50\%\&c\{\textasciitilde{}\textasciicircum{}\textbackslash{}\#\$'
  assert body[2].startswith(f'method={want} & ')
  # Bold is what lies below all others beyond its interval, here nothing or one a kind.
  for kind, column in (('seen', 1), ('unseen', 3)):
    cells = [line.split(' & ')[column] for line in body[2:4]]
    gap = arms[1].gaps[kind].interval
    assert ['mathbf' in cell for cell in cells] == [gap.low > 0, gap.high < 0]
  sure = arms[1]._replace(
    people=[
      (
        seed,
        {k: [p._replace(loss_sum=p.loss_sum - 1) for p in x] for k, x in of.items()},
      )
      for seed, of in arms[0].people
    ]
  )
  assert tables.to_latex([arms[0], sure], base).count('mathbf') == 2


def test_figures_are_for_screens_and_papers_and_the_same_again(together, tmp_path):
  runs, results = together
  shutil.copytree(runs[0].workdir.parent, tmp_path, dirs_exist_ok=True)
  written = []
  for _ in range(2):
    tables.write(results, tmp_path)
    written.append([(tmp_path / f'sweep.{x}').read_bytes() for x in ('pdf', 'svg')])
  assert written[0] == written[1]
  pdf, svg = written[0]
  assert pdf.startswith(b'%PDF') and b'CreationDate' not in pdf
  assert b'/CIDFontType2' in pdf and b'/Type3' not in pdf  # TrueType, embedded
  assert b'<svg' in svg and b'dc:date' not in svg


def test_programs_hold_as_many_points_as_asked(tmp_path):
  runs = _grid(tmp_path)
  sizes = lambda n: [len(p) for p in sweep.programs(runs, n)]  # noqa: E731
  assert (sizes(None), sizes(3), sizes(1)) == ([4], [3, 1], [1] * 4)


@pytest.mark.parametrize('field', config.VARIES)
def test_every_varying_field_is_data_to_the_program(field):
  c = small_config()
  value = fields.lookup(c, field)
  other = {
    'seed': 7, 'federated.r_min': 1, 'methods.energy': 0.5,
    'federated.dropout': 0.25, 'federated.gamma': 0.9,
    'ranks.distribution': 'uniform', 'ranks.explicit': (2, 3),
    'ranks.tiers': (1, 2, 3), 'ranks.tier_fractions': (0.2, 0.3, 0.5),
    'ranks.data_correlation': 0.5,
  }.get(field, 2 * value if isinstance(value, float) else None)  # fmt: skip
  assert other is not None and other != value
  changed = c.replace(**{field: other})
  assert points.program_of(changed) == points.program_of(c)
  if field.startswith('ranks.'):
    return  # seen in everybody's rank, which is part of the state
  before, after = (build.make_hyperparameters(p) for p in (c, changed))
  assert vars(before) != vars(after)


def test_other_fields_are_the_programs_own():
  c = small_config()
  for field, value in (
    ('method', 'fedit'),
    ('federated.r_max', 7),
    ('federated.local_batch', 3),
    ('server_optimizer.name', 'adam'),
  ):
    changed = c.replace(**{field: value})
    assert points.program_of(changed) != points.program_of(c)


@pytest.mark.parametrize(
  'grid, message',
  [
    ('federated.gama=[1]', 'federated.gama does not exist'),
    ('seed=0', "'seed=0' must be FIELD="),
    ('seed=[0] x', "'seed=.0. x' must be FIELD="),
    ('seed=[]', 'must be FIELD='),
  ],
)
def test_a_bad_grid_is_named(grid, message):
  with pytest.raises(config.ConfigError, match=message):
    sweep.parse_grid(grid, small_config())


TWO_METHODS = 'federated.tail_penalty=[0.0,5.0] x method=["hetlora","fedit"]'


def _sweep(workdir, *more):
  given = [f'--config.{k}={v}' for k, v in SMALL.items()]
  return [
    'launch.sweep', '--config=configs/tiny.py', *given,
    f'--workdir={workdir}', f'--grid={TWO_METHODS}',
    *more,
  ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_table(tmp_path):
  def timeless_table(lines):  # all columns but those of seconds
    return [line.split('|')[1:-3] for line in lines if line.startswith('|')]

  def launch(kill):
    env = os.environ | {'PYTHONWARNINGS': 'ignore'}
    with subprocess.Popen(
      [sys.executable, '-m', *_sweep(tmp_path / 'killed')],
      cwd=ROOT,
      env=env,
      stdout=subprocess.PIPE,
      text=True,
    ) as process:
      lines = []
      for line in process.stdout:
        lines.append(line)
        if kill and line.startswith('round 2/4'):
          process.kill()
    return process.returncode, timeless_table(lines)

  code, rows = launch(kill=True)
  assert code == -signal.SIGKILL and not rows
  code, rows = launch(kill=False)
  assert code == 0 and len(rows) == 6
  c = small_config()
  whole = sweep.plan(c, sweep.parse_grid(TWO_METHODS, c), tmp_path / 'whole', 'train')
  assert rows == timeless_table(tables.table(_run_all(whole)).splitlines())


def test_commands_are_printed_one_a_program(tmp_path):
  out = programs.run(*_sweep(tmp_path / 'nowhere', '--print'))
  lines = [shlex.split(line) for line in out.stdout.splitlines()]
  assert [line[-1] for line in lines] == ['--group=0', '--group=1']
  assert all('--print' not in line and '-m' in line for line in lines)
  assert not (tmp_path / 'nowhere').exists()


def test_bytes_add_up_over_the_rounds(swept):
  workdir, _, results = swept
  rows = files.read_rows(workdir / results[1]['name'] / 'metrics.jsonl')
  assert rows[-1]['comm/total_up_bytes'] == results[1]['comm/up_bytes']
  assert results[1]['comm/up_bytes'] == sum(r.get('comm/up_bytes', 0) for r in rows)


@pytest.mark.parametrize('name', ablations.SWEEPS)
def test_every_point_of_the_papers_sweeps_resolves(name):
  c = small_config(federated__local_steps=20)
  found = sweep.load(f'configs/ablations.py:{name}')
  names = {sweep.name_of(point) for point in found}
  assert len(names) == len(found) >= 2
  for point in found:
    c.replace(**point)


@pytest.mark.parametrize('spec', ['configs/ablations.py', 'x.py:a', 'configs/ablations.py:gama'])  # fmt: skip
def test_an_unknown_sweep_is_named(spec):
  with pytest.raises(config.ConfigError, match='--sweep'):
    sweep.load(spec)


def test_a_mistaken_line_spoils_no_table_and_another_grid_joins_it(tmp_path):
  def run(grid, **fields):
    c = small_config(federated__num_rounds=1, eval__every=None, **fields)
    jobs = sweep.plan(c, sweep.parse_grid(grid, c), tmp_path, 'train')
    for program in sweep.programs(jobs):
      sweep.run_program(program)
    return tables.write(sweep.results(jobs), tmp_path)

  run('method=["hetlora","fedit"]')
  before = (tmp_path / 'sweep.json').read_bytes()
  with pytest.raises(config.ConfigError, match='gamma=0.6, not 0.5') as error:
    run('method=["hetlora","fedit"]', federated__gamma=0.5)
  assert str(error.value).count('another configuration') == 1
  assert (tmp_path / 'sweep.json').read_bytes() == before
  joined = run('method=["fedit","zero_pad"]')
  found = json.loads((tmp_path / 'sweep.json').read_text())
  names = [r['name'] for r in found]
  assert names == ['method=hetlora', 'method=fedit', 'method=zero_pad']
  assert all(name in joined for name in names)
  first = Run(tmp_path / 'method=hetlora').summary
  assert found[0]['last'] == first['last'] and 'error' not in found[0]
  # What is no longer there is not told.
  shutil.rmtree(tmp_path / 'method=hetlora')
  assert 'method=hetlora' not in run('method=["fedit"]')


def test_seconds_are_of_all_calls_of_a_run(swept):
  _, _, results = swept
  good = [
    dict(r, **{'time/rounds_s': 40.0, 'time/this_call_s': 3.0, 'time/compile_s': 2.5})
    for r in results[:1]
  ]
  cells = tables.table(good).splitlines()[-1].split('|')
  assert [cell.strip() for cell in cells[-3:-1]] == ['40', '2.5']
