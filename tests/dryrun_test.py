"""Dry runs: bytes that match the compiler's, errors, the command line."""

import math
import pathlib
import re

import jax
import pytest
from devices_test import many_rounds

from hetlora_jax import base_model, config, points
from hetlora_jax.data import people
from hetlora_jax.tools import chips, dryrun
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize('method', ['hetlora', 'full_finetuning'])
def test_bytes_match_the_compilers_and_the_real_runs(method):
  c = many_rounds(method, (1, 4, 2), data__num_people=9, data__copies=3)
  report = dryrun.compile_for([c], 'a100')
  # A scalar that the method does not use is no argument of the program.
  unused = sum(report.arguments.values()) - report.argument
  assert 0 <= unused <= 4 * 13
  x = points.prepare(c)
  cohorts = points.make_cohorts(x, 0)
  memory = (
    x.run_rounds.lower(*points.arguments(x, x.initial_state, cohorts))
    .compile()
    .memory_analysis()
  )
  # The real tokenizer may have found fewer words than it was allowed.
  words = c.model.random.vocab_size - x.base['embed'].shape[0]
  per_word = 2 * c.model.random.width // 2 * 4
  trained = 2 if method == 'full_finetuning' else 1  # their changes are state
  assert report.argument - memory.argument_size_in_bytes == trained * words * per_word
  assert report.population == len(x.experiment.population.client_ids) == 27
  assert report.clients == cohorts.client_id.shape[-1] == 8
  assert report.flops > 0 and report.moved['all-reduce'] > 0


@pytest.mark.slow
def test_points_together_are_counted(older_partitioner):
  points = [many_rounds('hetlora', (2, 2, 2), seed=s) for s in (0, 1)]
  one = dryrun.compile_for([many_rounds('hetlora', (1, 2, 2))], 'a100')
  two = dryrun.compile_for(points, 'a100')
  assert (one.points, two.points) == (1, 2)
  for name in ('base', 'adapters', 'people'):
    assert one.arguments[name] == two.arguments[name]  # of a device


@pytest.mark.parametrize(
  'family, count, want',
  [
    ('v5e', 256, 'v5e:16x16'), ('v5e', 8, 'v5e:2x4'), ('v6e', 1, 'v6e:1x1'),
    ('v5p', 64, 'v5p:4x4x4'), ('v5p', 256, 'v5p:4x8x8'),
    ('v5e', 12, 'v5e:3x4'),
  ],
)  # fmt: skip
def test_topologies_are_as_round_as_can_be(family, count, want):
  assert chips._grid(family, count) == want


def test_a_model_of_unknown_shape_is_named():
  c = many_rounds('hetlora', model__source='llama9_1t')
  with pytest.raises(config.ConfigError, match='llama9_1t.*gemma3_4b'):
    dryrun.compile_for([c], 'v5e')


def test_what_fits_is_said():
  report = dryrun.compile_for([many_rounds('hetlora')], 'a100')
  small = report._replace(argument=int(10e9), temporary=int(5e9))
  large = report._replace(argument=int(10e9), temporary=int(7e9))
  assert 'v5e: fits, 94 % of 16 GB' in dryrun.render(small, 'v5e')
  assert 'v5e: DOES NOT FIT, 106 % of 16 GB' in dryrun.render(large, 'v5e')


def test_room_that_only_the_data_know_is_said_to_be_assumed():
  told = dryrun.compile_for([many_rounds('hetlora')], 'a100').room
  assert told == '32 tokens, 12 of them targets'
  own = many_rounds('hetlora', data__name='text_folder', data__path='mine.jsonl')
  told = dryrun.compile_for([own], 'a100').room
  assert told.startswith('96 tokens, 32 of them targets, ASSUMED: your data decide')


def test_a_compiler_that_gives_up_is_quoted():
  class Lowered:
    def compile(self):
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: hbm\nmore')

  with pytest.raises(config.ConfigError, match='v9 gave up: RESOURCE.*hbm .pip'):
    dryrun._compiled(Lowered(), 'v9')


def test_a_pod_is_compiled_for_without_having_it():
  done = programs.run(
    'launch.train', '--dry_run', '--chip=h100', '--config=configs/chitchat_gemma3.py',
    '--config.mesh.clients=16', '--config.mesh.model=4',
    '--config.federated.clients_at_once=1', '--config.federated.local_steps=1',
    XLA_FLAGS=programs.ONE_DEVICE,
  )  # fmt: skip
  assert not done.returncode, done.stderr
  assert '16 clients x 4 model = 64 devices' in done.stdout
  base = float(re.search(r'base +([\d.]+) MB', done.stdout)[1])
  whole = 268_098_176 * 2 / 1e6  # bfloat16
  kept_whole = 18 * 2 * 640 * 256 * 2 / 1e6  # keys and values
  assert math.isclose(base, (whole - kept_whole) / 4 + kept_whole, rel_tol=0.01)
  assert 'h100: fits' in done.stdout


def test_nothing_is_loaded_or_computed(monkeypatch):
  def refuse(*_, **__):
    raise AssertionError('a dry run knows shapes alone')

  monkeypatch.setattr(base_model, 'load', refuse)
  monkeypatch.setattr(people, 'load', refuse)
  monkeypatch.setattr(jax, 'make_array_from_callback', refuse)
  c = many_rounds('hetlora', data__num_people=7, federated__sampling='by_size')
  x = dryrun._prepare([c, c.replace(seed=1)], jax.devices())
  leaves = jax.tree.leaves((x.base, x.initial_state, x.hyper, x.evaluation))
  assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  assert x.initial_rank.shape == (2, 7) and x.initial_rank.min() >= 1
  assert points.shape_of_one(x).memory.rank.shape[0] == 7
