"""What an evaluation writes adds up, whoever counts it again."""

import dataclasses
import json

import numpy as np
import pytest
from experiment_test import small_config
from rouge_score import rouge_scorer

from hetlora_jax import points, training
from hetlora_jax.config import ConfigError
from hetlora_jax.data.people import Example
from hetlora_jax.run import Run
from hetlora_jax.tools import bootstrap, completions, prompts
from hetlora_jax.tools.completions import Settings
from tests import programs

# Room for every example as it is, so that packing cuts none.
WHOLE = {'data__tokens_per_example': 64, 'data__targets_per_example': 24}
EVAL = {'eval__num_people': 3, 'eval__examples_per_person': 2}
SETS = ('seen', 'unseen')


def _config(**overrides):
  return small_config(
    federated__num_rounds=2, **WHOLE, **EVAL, **overrides
  )  # fmt: skip


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('completions')
  c = _config(client_optimizer__learning_rate=0.05)
  training.train(c, folder)
  return folder


def _read(workdir):
  lines = (workdir / 'generations.jsonl').read_text().splitlines()
  found = json.loads((workdir / 'evaluation.json').read_text())
  return [json.loads(line) for line in lines], found


@pytest.fixture(scope='module')
def evaluated(workdir):
  c = _config(client_optimizer__learning_rate=0.05, eval__own_rank=True)
  completions.complete(Run(workdir), Settings(max_tokens=8), c)
  return c, *_read(workdir)


def test_a_line_an_example_and_a_value_a_person(evaluated, workdir):
  _, lines, found = evaluated
  assert len(lines) == 2 * 3 * 2
  for line in lines:
    assert line['prompt'].startswith(('A: ', 'B: ')) and line['reference']
    assert '\n' not in line['generated'] + line['reference']
    assert (line['rank'] is None) == (line['kind'] == 'unseen')
  assert found['round'] == 2 and found['settings']['own_rank']
  for name in SETS:
    assert found[name]['num_people'] == len(found[name]['people']) == 3
    assert all(p['examples'] == 2 for p in found[name]['people'])
  assert len(list((workdir / 'tensorboard').glob('*.samples'))) == 1
  classes = found['seen']['by_rank'].values()
  assert sum(c['num_people'] for c in classes) == 3
  assert 'by_rank' not in found['unseen']


def test_rouge_equals_the_package_called_by_hand(evaluated):
  _, lines, found = evaluated
  kinds = ['rouge1', 'rouge2', 'rougeL']
  scorer = rouge_scorer.RougeScorer(kinds)
  for name in SETS:
    for text in ('generated', 'teacher_forced'):
      for metric in kinds:
        values = []
        for person in found[name]['people']:
          own = [
            scorer.score(x['reference'], x[text])[metric].fmeasure
            for x in lines
            if x['kind'] == name and x['client'] == person['client']
          ]
          assert person[text][metric] == pytest.approx(np.mean(own))
          values.append(np.mean(own))
        got = found[name][text][metric]
        assert got['value'] == pytest.approx(np.mean(values))
        want = bootstrap.mean(values)
        assert (got['low'], got['high']) == pytest.approx(want[1:])
        assert got['quantiles']['0.5'] == pytest.approx(np.median(values))
  assert any(found[name]['teacher_forced']['rougeL']['value'] for name in SETS)


def test_losses_are_those_of_the_evaluation_in_training(evaluated, workdir):
  c, _, found = evaluated
  x = Run(workdir).prepare(c)
  _, state = Run(workdir).state(x)
  (want,) = points.evaluate(x, points.join(x, [state]))
  for name, set_name in (('seen', 'seen_own'), ('unseen', 'unseen')):
    people = found[name]['people']
    assert [p['tokens'] for p in people] == want[set_name].tokens_E.tolist()
    np.testing.assert_allclose(
      [p['loss_sum'] for p in people], want[set_name].loss_E, rtol=1e-4
    )
    loss = want[set_name].loss_E.sum() / want[set_name].tokens_E.sum()
    assert found[name]['loss']['value'] == pytest.approx(loss, rel=1e-4)
    got = found[name]['perplexity']
    assert got['value'] == pytest.approx(np.exp(loss), rel=1e-3)
    assert got['low'] <= got['value'] <= got['high']
  assert not np.allclose(want['seen'].loss_E, want['seen_own'].loss_E)


def test_the_untouched_model_with_examples_of_others(tmp_path):
  c, folder = _config(), tmp_path / 'floor'
  for shots in (0, 2):
    completions.complete(Run(folder), Settings(untouched=True, shots=shots), c)
    lines, found = _read(folder)
    if not shots:
      plain = lines
  x = points.prepare(c)
  (want,) = points.evaluate(x, x.initial_state)
  np.testing.assert_allclose(
    sum(line['loss_sum'] for line in plain if line['kind'] == 'unseen'),
    want['unseen'].loss_E.sum(),
    rtol=1e-4,
  )
  for line, bare in zip(lines, plain, strict=True):
    assert line['prompt'].endswith('\n\n' + bare['prompt'])
    assert line['prompt'].count('\n\n') == 2
    assert line['reference'] == bare['reference']
  assert found['settings']['shots'] == 2 and found['round'] == 0


def test_shots_are_of_other_people_and_cut_first():
  x = points.prepare(_config(data__copies=2)).experiment
  name = x.population.client_ids[0]
  rng = np.random.default_rng(0)
  others = sum(other != name for other in x.population.client_ids)
  assert others == len(x.population.client_ids) - 2
  shots = prompts._draw_shots(x, name, others, rng)
  assert len(shots) == others and all(s.num_target for s in shots)
  with pytest.raises(ConfigError, match=f'--shots={others + 1}'):
    prompts._draw_shots(x, name, others + 1, rng)
  example = Example(np.array([2, 5, 6, 7, 8]), 2)
  shot = Example(np.array([2, 9, 10]), 1)
  got = prompts._with_shots(example, [shot], [4])
  assert got.tokens.tolist() == [2, 9, 10, 4, 5, 6, 7, 8]
  assert prompts._cut(got, 6).tokens.tolist() == [2, 4, 5, 6, 7, 8]
  assert prompts._cut(got, 1).tokens.tolist() == [2, 7, 8]
  # A tokenizer without bos.
  got = prompts._with_shots(
    example._replace(num_bos=0), [shot._replace(num_bos=0)], [4]
  )
  assert got.tokens.tolist() == [2, 9, 10, 4, 2, 5, 6, 7, 8]
  assert prompts._cut(got, 6).tokens.tolist() == [4, 2, 5, 6, 7, 8]
  assert prompts._cut(got, 1).tokens.tolist() == [6, 7, 8]


def test_a_beam_search_and_what_cannot_be(workdir):
  c = _config(client_optimizer__learning_rate=0.05)
  found = completions.complete(Run(workdir), Settings('beam', 2, max_tokens=4), c)
  assert found['settings']['search'] == 'beam'
  before = _read(workdir)
  for settings, message in (
    (Settings('sampling'), '--generate=sampling'),
    (Settings(beams=0), '--beams=0'),
    (Settings(shots=-1), '--shots=-1'),
  ):
    with pytest.raises(ConfigError, match=message):
      completions.complete(Run(workdir), settings, c)
  with pytest.raises(ConfigError, match='--untouched'):
    completions.complete(Run(workdir / 'nowhere'), Settings(), c)
  own = dataclasses.replace(c.eval, own_rank=True)
  with pytest.raises(ConfigError, match='no ranks'):
    completions.complete(
      Run(workdir), Settings(untouched=True), dataclasses.replace(c, eval=own)
    )
  assert _read(workdir) == before


def test_the_program(workdir):
  done = programs.run(
    'launch.evaluate',
    f'--workdir={workdir}', '--generate=greedy', '--max_tokens=3',
    '--examples_per_person=1', '--own_rank',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert '6/6 examples completed' in done.stdout
  assert 'teacher forced rougeL' in done.stdout
  lines, found = _read(workdir)
  assert len(lines) == 6 and found['settings']['max_tokens'] == 3
  assert found['settings']['own_rank']
  done = programs.run('launch.evaluate', f'--workdir={workdir}', '--shots=2')
  assert done.returncode == 2 and done.stderr.count('\n') == 1
  assert 'add --generate=greedy' in done.stderr
