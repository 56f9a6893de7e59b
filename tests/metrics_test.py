"""TensorBoard shows the lists of rows as histograms, and samples as texts."""

import json

import pytest
from tensorboard.backend.event_processing import event_accumulator

from hetlora_jax import files, tracking

ROW = {
  'round': 1,
  'train/loss': 2.0,
  'rank/histogram': [0, 0, 3, 1],
  'energy/slots': [0.75, 0.25, 0.0],
  'weight/clients': [0.1, 0.2, 0.7],
}


def _sample(number):
  return {'client': number, 'kind': 'seen', 'prompt': 'Hi\n# there',
          'reference': '<b>', 'generated': 'half \ud800'}  # fmt: skip


def _board(workdir):
  board = event_accumulator.EventAccumulator(
    str(workdir / 'tensorboard'),
    size_guidance={'tensors': 0, 'histograms': 0},
  )
  board.Reload()
  return board


def _write(workdir, *rows):
  writer = tracking.Writer(workdir, [])
  for row in rows:
    writer.write(row)
  writer.close()


def test_ranks_energy_and_weights_are_histograms(tmp_path):
  _write(tmp_path, ROW)
  board = _board(tmp_path)
  (ranks,) = board.Histograms('rank/histogram')
  value = ranks.histogram_value
  assert (ranks.step, value.num, value.sum) == (1, 4, 2 * 3 + 3)
  assert (value.min, value.max) == (2, 3)
  assert list(zip(value.bucket_limit, value.bucket, strict=True)) == [
    (0.5, 0), (1.5, 0), (2.5, 3), (3.5, 1)
  ]  # fmt: skip
  energy = board.Histograms('energy/slots')[0].histogram_value
  assert (energy.min, energy.max, energy.num) == (1, 2, 1)
  weights = board.Histograms('weight/clients')[0].histogram_value
  assert (weights.min, weights.max, weights.num) == (0.1, 0.7, 3)
  assert sum(weights.bucket) == 3
  assert board.Scalars('train/loss')[0].value == 2.0


def test_lists_without_a_histogram_do_not_end_a_run(tmp_path):
  row = ROW | {'energy/slots': [0.0], 'weight/clients': [], 'other': [1, 2]}
  _write(tmp_path, row, row | {'weight/clients': [float('nan')]})
  assert _board(tmp_path).Tags()['histograms'] == ['rank/histogram']


def test_samples_are_texts_when_a_run_goes_on_and_when_it_has_ended(tmp_path):
  lines = [json.dumps(_sample(i)) for i in range(tracking.MOST_SAMPLES + 3)]
  _write(tmp_path, ROW)
  (tmp_path / 'generations.jsonl').write_text('\n'.join([*lines, '{"torn']))
  tracking.show_samples(tmp_path, 1)
  for _ in range(2):
    board = _board(tmp_path)
    assert len(board.Tags()['tensors']) == tracking.MOST_SAMPLES
    (event,) = board.Tensors('sample_0/seen_0/text_summary')
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 1 and all(x.startswith('    ') for x in text.split('\n'))
    assert 'generated: half ?' in text
    tracking.Writer(tmp_path, [ROW]).close()  # events are made anew
  assert board.Scalars('train/loss')[0].step == 1


def test_damaged_samples_are_named(tmp_path):
  (tmp_path / 'generations.jsonl').write_bytes(b'\xff\n')
  with pytest.raises(files.Damaged, match='generations.jsonl is damaged'):
    tracking.show_samples(tmp_path, 1)
