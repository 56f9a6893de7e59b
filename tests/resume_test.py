"""Continuing: damaged checkpoints, other layouts, other configurations, locks."""

import dataclasses
import fcntl
import gc
import json
import os
import pathlib
import shutil
import subprocess

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest
from devices_test import assert_agree, many_rounds
from experiment_test import (
  SMALL,
  fill_memory,
  newest_state,
  refuse_memory,
  small_config,
  timeless,
)
from tensorboard.backend.event_processing import event_accumulator

from hetlora_jax import checkpoint, config, files, points, training
from hetlora_jax.fields import flat
from tests import programs

# tensorstore's futures outlive the event loop of a read that failed.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture(autouse=True, scope='module')
def collected():
  """Ends such futures before the tests of another file begin."""
  yield
  gc.collect()


@pytest.fixture(scope='module')
def done(tmp_path_factory):
  """A run that has kept its checkpoints 2, 3 and 4."""
  workdir = tmp_path_factory.mktemp('done')
  training.train(small_config(checkpoint__keep=3), workdir)
  return workdir


@pytest.fixture(scope='module')
def built():
  return points.prepare(small_config())


def _copy(done, tmp_path) -> pathlib.Path:
  workdir = tmp_path / 'run'
  shutil.copytree(done, workdir)
  return workdir


def _restore(workdir, x, base=None):
  reader = checkpoint.Checkpoints([workdir / 'checkpoints'], base or x.identity)
  try:
    return reader.restore_newest(points.shape_of_one(x))
  finally:
    reader.close()


def _flip(path: pathlib.Path, place: float) -> None:
  content = bytearray(path.read_bytes())
  content[int(place * (len(content) - 1))] ^= 0x10
  path.write_bytes(content)


DAMAGE = {
  'a bit at the start': lambda path: _flip(path, 0),
  'a bit in the middle': lambda path: _flip(path, 0.5),
  'a bit at the end': lambda path: _flip(path, 1),
  'cut off': lambda path: os.truncate(path, path.stat().st_size // 2),
  'emptied': lambda path: os.truncate(path, 0),
  'zeros': lambda path: path.write_bytes(bytes(path.stat().st_size)),
  'gone': lambda path: path.unlink(),
  'longer': lambda path: path.write_bytes(path.read_bytes() * 2),
}


def test_no_damage_to_any_file_is_taken_for_the_state(done, built, tmp_path):
  """Every file of a checkpoint, damaged in eight ways: 2 is used, or 4 is whole."""
  whole = {n: jax.device_get(_state_at(done, built, n)) for n in (3, 4)}
  files = sorted(p for p in (done / 'checkpoints/4').rglob('*') if p.is_file())
  noticed = 0
  for file in files:
    for name, damage in DAMAGE.items():
      workdir = _copy(done, tmp_path)
      damage(workdir / file.relative_to(done))
      found = _restore(workdir, built)
      assert found and found[0] in whole, (file, name)
      jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(found[1][0]),
        whole[found[0]],
      )
      noticed += found[0] == 3
      shutil.rmtree(workdir)
  assert len(files) >= 8 and noticed >= 4 * len(DAMAGE)


def _state_at(workdir, x, step):
  reader = checkpoint.Checkpoints([workdir / 'checkpoints'], x.identity)
  (state,) = reader.restore(step, points.shape_of_one(x))
  reader.close()
  return state


def _damage_arrays(workdir, step):
  """Flips a bit in every file that holds arrays."""
  for file in (workdir / 'checkpoints' / str(step) / 'state').rglob('d/*'):
    _flip(file, 0.5)


def test_a_damaged_newest_checkpoint_is_named_and_made_again(done, tmp_path, capsys):
  workdir = _copy(done, tmp_path)
  _damage_arrays(workdir, 4)
  training.train(small_config(checkpoint__keep=3), workdir)
  out = capsys.readouterr().out
  assert f'Warning: {workdir}/checkpoints/4 is damaged' in out
  assert 'Continuing after round 3.' in out
  assert (workdir / 'checkpoints/4.damaged').is_dir()
  jax.tree.map(
    np.testing.assert_array_equal,
    newest_state(small_config(), workdir),
    newest_state(small_config(), done),
  )
  assert timeless(workdir) == timeless(done)


@pytest.mark.parametrize('fill', [fill_memory, refuse_memory])
def test_full_memory_is_no_damage(fill, done, tmp_path, monkeypatch):
  workdir = _copy(done, tmp_path)
  monkeypatch.setattr(ocp.CheckpointManager, 'restore', lambda *_, **__: fill())
  with pytest.raises(config.ConfigError, match='4 cannot be read, out of mem'):
    training.train(small_config(), workdir)
  assert checkpoint.steps(workdir / 'checkpoints') == {2, 3, 4}


def test_with_no_undamaged_checkpoint_nothing_is_run(done, tmp_path):
  workdir = _copy(done, tmp_path)
  for step in (2, 3, 4):
    _damage_arrays(workdir, step)
  rows = (workdir / 'metrics.jsonl').read_text()
  with pytest.raises(config.ConfigError, match='no checkpoint is undamaged'):
    training.train(small_config(), workdir)
  assert checkpoint.steps(workdir / 'checkpoints') == {2, 3, 4}
  assert (workdir / 'metrics.jsonl').read_text() == rows


def test_a_wrong_number_is_noticed_even_if_the_file_is_well_formed(
  done, built, tmp_path, monkeypatch
):
  like = points.shape_of_one(built)
  state = _state_at(done, built, 4)
  rank = state.memory.rank
  changed = jax.device_put(rank.at[3, 0].add(1), rank.sharding)
  before = checkpoint.sums(state)
  monkeypatch.setattr(checkpoint, 'sums', lambda _: before)
  other = checkpoint.Checkpoints(
    [tmp_path / 'c'], built.identity, small_config().checkpoint
  )
  memory = dataclasses.replace(state.memory, rank=changed)
  other.save(4, [dataclasses.replace(state, memory=memory)])
  other.close()
  monkeypatch.undo()
  reader = checkpoint.Checkpoints([tmp_path / 'c'], built.identity)
  with pytest.raises(checkpoint.Damaged, match='checksum of .*memory.*rank'):
    reader.restore(4, like)
  reader.close()


@pytest.mark.parametrize(
  'leaf',
  [
    np.zeros((3, 4), np.float32),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.float32(2.5),
    np.full((2, 2), 1.5, jax.numpy.bfloat16),
  ],
  ids=lambda x: f'{x.dtype}{x.shape}',
)
def test_every_flipped_bit_changes_the_sum(leaf):
  want = int(checkpoint._sum_of_bits(jax.numpy.asarray(leaf)))
  content = np.asarray(leaf).tobytes()
  for bit in range(8 * len(content)):
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    other = np.frombuffer(bytes(flipped), leaf.dtype).reshape(leaf.shape)
    assert int(checkpoint._sum_of_bits(jax.numpy.asarray(other))) != want


def test_another_base_model_is_refused(done, built):
  base = built.identity | {'sha256': 'random-1'}
  with pytest.raises(
    config.ConfigError, match="its sha256 is 'random-0', this one's 'random-1'"
  ):
    _restore(done, built, base)
  deeper = built.identity['shape'] | {'num_layers': 2}
  with pytest.raises(config.ConfigError, match=r'shape\.num_layers is 1'):
    _restore(done, built, built.identity | {'shape': deeper})


def test_every_field_that_differs_is_named_with_both_values(done):
  other = small_config(
    seed=3, lora__scale=4.0, federated__gamma=0.5, ranks__exponent=3.0,
    client_optimizer__name='sgd',
  )  # fmt: skip
  with pytest.raises(config.ConfigError) as error:
    training.train(other, done)
  said, old, new = (
    str(error.value),
    *(flat(config.to_dict(c)) for c in (small_config(), other)),
  )
  differ = [name for name in old if old[name] != new[name]]
  assert len(differ) == 5
  for name in differ:
    assert f'config.{name}={old[name]!r}, not {new[name]!r}' in said


def test_a_field_that_a_run_did_not_have_yet_counts_as_its_default(done, tmp_path):
  workdir = _copy(done, tmp_path)
  path = workdir / 'config.json'
  old = json.loads(path.read_text())
  del old['model']['remat'], old['lora']['scale']
  path.write_text(json.dumps(old))
  training.train(small_config(), workdir)
  path.write_text(json.dumps(old))
  with pytest.raises(config.ConfigError, match=r'lora.scale=2.0, not 3.0'):
    training.train(small_config(lora__scale=3.0), workdir)


LAYOUTS = [
  pytest.param(((1, 1, 1), (1, 8, 1)), id='one to eight'),
  pytest.param(((1, 8, 1), (1, 2, 4)), id='eight to 2 x 4', marks=pytest.mark.slow),
  pytest.param(((1, 2, 4), (1, 1, 1)), id='2 x 4 to one'),
]


@pytest.mark.parametrize('layouts', LAYOUTS)
def test_a_run_goes_on_on_another_layout(layouts, tmp_path):
  first, then = layouts
  # The state of full fine-tuning is split over `model`.
  method = 'full_finetuning' if first[2] * then[2] > 1 else 'flora'
  begun = many_rounds(method, first)
  training.train(begun, tmp_path / 'a')
  moved = _restore(tmp_path / 'a', points.prepare(many_rounds(method, then)))
  assert moved
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.device_get(moved[1][0]),
    newest_state(begun, tmp_path / 'a'),
  )
  longer = many_rounds(method, then, federated__num_rounds=6)
  training.train(longer, tmp_path / 'a')
  training.train(many_rounds(method, federated__num_rounds=6), tmp_path / 'b')
  assert_agree(*(newest_state(longer, tmp_path / n) for n in 'ab'))


def test_what_rounding_took_is_remembered_when_a_run_goes_on(tmp_path):
  """A run on a wire that rounds, broken off and continued, ends to the bit."""
  whole = small_config(
    communication__wire_dtype='int8', communication__error_feedback=True
  )
  training.train(_with(whole, {'federated__num_rounds': 2}), tmp_path / 'a')
  for place in 'ab':
    training.train(whole, tmp_path / place)
  one, other = (newest_state(whole, tmp_path / place) for place in 'ab')
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert all(x.any() for x in jax.tree.leaves(one.memory.personal))


def _with(c, fields):
  raw = ml_collections.ConfigDict(config.to_dict(c))
  raw.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})
  return config.resolve(raw)


SGD = {'client_optimizer__name': 'sgd', 'client_optimizer__learning_rate': 0.05}


@pytest.mark.slow
def test_points_go_on_alone_and_runs_together(tmp_path):
  """Two points on a sweep axis of 2, then each alone; and the other way round."""
  whole = [small_config(seed=s, **SGD) for s in (0, 1)]
  half = [_with(c, {'federated__num_rounds': 2}) for c in whole]
  apart, joined, alone = (
    [tmp_path / f'{way}_{s}' for s in (0, 1)] for way in ('apart', 'joined', 'alone')
  )
  spread = [_with(c, {'mesh__sweep': 2}) for c in half]
  training.train_points(list(map(training.Point, spread, apart)))
  for run, point in zip(whole, apart, strict=True):
    training.train(run, point)
  for run, point in zip(half, joined, strict=True):
    training.train(run, point)
  training.train_points(list(map(training.Point, whole, joined)))
  for i, run in enumerate(whole):
    training.train(run, alone[i])
    want = newest_state(run, alone[i])
    # XLA compiles other programs for two points or devices: other roundings.
    assert_agree(newest_state(run, joined[i]), want)
    assert_agree(newest_state(run, apart[i]), want)


def test_tensorboard_shows_what_metrics_jsonl_holds(done, tmp_path):
  workdir = _copy(done, tmp_path)
  for step in (3, 4):  # as if killed in round 3, events and lines in the air
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  for events in (workdir / 'tensorboard').iterdir():
    os.truncate(events, events.stat().st_size // 2)
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"round": 5, "train/lo')
  training.train(small_config(), workdir)
  assert timeless(workdir) == timeless(done)
  board = event_accumulator.EventAccumulator(str(workdir / 'tensorboard'))
  board.Reload()
  rows = files.read_rows(workdir / 'metrics.jsonl')
  for name in ('train/loss', 'eval/seen/loss'):
    events = [(e.step, e.value) for e in board.Scalars(name)]
    want = [(r['round'], np.float32(r[name])) for r in rows if name in r]
    assert events == want


def _damaged_rows(line: str) -> dict[str, str]:
  """Returns what may become of metrics.jsonl, whose lines are rounds 0 to 4."""
  lines = line.splitlines(keepends=True)
  number = '"round": 2,'
  assert len(lines) == 5 and number in lines[2]
  return {
    'deleted': '',
    'the first line gone': ''.join(lines[1:]),
    'a line in the middle gone': ''.join(lines[:2] + lines[3:]),
    'the last line gone': ''.join(lines[:4]),
    'the last line torn': ''.join(lines)[:-40],
    'a line broken in two': line.replace(number, number + '\n'),
    'a line twice': ''.join([*lines[:3], *lines[2:]]),
    'all lines twice': 2 * line,
    'a round that is no number': line.replace(number, '"round": NaN,'),
    'a round that is a text': line.replace(number, '"round": "2",'),
    'a list': '[1]\n' + line,
    'no row': '{}\n' + line,
  }


def _contents(workdir: pathlib.Path) -> dict[pathlib.Path, bytes]:
  return {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}


def test_damaged_rows_are_refused_and_nothing_is_touched(done, tmp_path, capsys):
  workdir = _copy(done, tmp_path)
  path = workdir / 'metrics.jsonl'
  for name, content in _damaged_rows((done / 'metrics.jsonl').read_text()).items():
    path.write_text(content)
    if not content:
      path.unlink()
    before = _contents(workdir)
    # With rounds to go, as well as without.
    for c in (small_config(), small_config(federated__num_rounds=6)):
      with pytest.raises(files.Damaged) as error:
        training.train(c, workdir)
    said = str(error.value)
    assert str(path) in said and f'--branch_from={workdir}@' in said, name
    assert '\n' not in said and 'Loading' not in capsys.readouterr().out
    assert _contents(workdir) == before, name
  # What the error advises goes on.
  branch = training.parse_branch(f'{workdir}@4')
  longer = small_config(federated__num_rounds=5)
  new = training.train(longer, tmp_path / 'new', branch=branch).summary
  assert (new['first']['round'], new['last']['round'], new['rounds']) == (4, 5, 1)


def test_rounds_that_no_checkpoint_holds_are_run_again_with_a_word(
  done, tmp_path, capsys
):
  workdir = _copy(done, tmp_path)
  shutil.rmtree(workdir / 'checkpoints' / '4')
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"round": 5, "train/lo')
  training.train(small_config(), workdir)
  assert 'Rounds 4 to 4 were not saved: they are run again.' in capsys.readouterr().out
  assert timeless(workdir) == timeless(done)


def test_a_branch_that_was_stopped_at_its_start_goes_on_by_the_same_line(
  done, tmp_path
):
  branch = training.parse_branch(f'{done}@2')
  c, whole, begun = small_config(), tmp_path / 'whole', tmp_path / 'begun'
  training.train(c, whole, branch=branch)
  want = timeless(whole)
  # Its state is saved before its first row is written.
  shutil.copytree(done / 'checkpoints' / '2', begun / 'checkpoints' / '2')
  with pytest.raises(files.Damaged, match='no row of round 2'):
    training.train(c, begun)
  training.train(c, begun, branch=branch)
  assert timeless(begun) == want
  # Or its first row is, and the machine dies before its state is on the disk.
  shutil.rmtree(begun / 'checkpoints')
  (begun / 'metrics.jsonl').write_text(json.dumps(want[0]) + '\n')
  with pytest.raises(files.Damaged, match='no row of round 0'):
    training.train(c, begun)
  training.train(c, begun, branch=branch)
  assert timeless(begun) == want


def test_a_second_run_in_a_folder_is_told_who_is_in_it(done, tmp_path):
  workdir = _copy(done, tmp_path)
  with (workdir / '.lock').open('r+') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(
      config.ConfigError, match=rf'in use by process {os.getpid()} on '
    ):
      training.train(small_config(), workdir)
  training.train(small_config(), workdir)  # let go of by its end


def test_a_branch_starts_from_an_old_state_on_purpose(done, tmp_path):
  branch = training.parse_branch(f'{done}@2')
  c = small_config(lora__scale=3.0)
  summary = training.train(c, tmp_path / 'new', branch=branch).summary
  assert summary['first']['round'] == 2 and summary['last']['round'] == 4
  rounds = [r['round'] for r in files.read_rows(tmp_path / 'new/metrics.jsonl')]
  assert rounds == [2, 3, 4]
  # The same configuration from there is the same run.
  training.train(small_config(), tmp_path / 'same', branch=branch)
  jax.tree.map(
    np.testing.assert_array_equal,
    newest_state(small_config(), tmp_path / 'same'),
    newest_state(small_config(), done),
  )
  for text, why in (
    (f'{done}', 'must be DIR@ROUND'),
    (f'{done}@9', r'has saved rounds \[2, 3, 4\]'),
    (f'{tmp_path}@1', 'has saved nothing'),
  ):
    with pytest.raises(config.ConfigError, match=why):
      training.parse_branch(text)
  with pytest.raises(config.ConfigError, match='does not fit.*adapters'):
    training.train(small_config(federated__r_max=9), tmp_path / 'wide', branch=branch)
  assert not (tmp_path / 'wide').exists()


def test_every_nth_checkpoint_is_kept(tmp_path):
  training.train(small_config(checkpoint__keep=1, checkpoint__keep_every=2), tmp_path)
  assert checkpoint.steps(tmp_path / 'checkpoints') == {2, 4}


def test_a_full_disk_is_said_and_what_was_saved_stays(tmp_path):
  disk = tmp_path / 'disk'
  disk.mkdir()
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=300k', 'tmpfs', str(disk)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('a small disk needs the right to mount one')
  try:
    given = [f'--config.{k}={v}' for k, v in SMALL.items()]
    found = programs.run(
      'launch.train', '--config=configs/tiny.py', f'--workdir={disk}/run', *given,
      '--config.checkpoint.keep=99', '--config.federated.num_rounds=40',
    )  # fmt: skip
    last = found.stderr.splitlines()[-1]
    assert found.returncode == 2
    assert 'No space left on device' in last and str(disk) in last
    saved = checkpoint.steps(disk / 'run/checkpoints')
    c = small_config(federated__num_rounds=40)
    assert saved and int(newest_state(c, disk / 'run').round) == max(saved)
  finally:
    subprocess.run(['umount', str(disk)], check=True)
