"""Tasks with labels: every label's probability, the guesses, and what is told of them."""

import dataclasses

import jax
import numpy as np
import pytest
from base_model_test import TARGETS, Words, _apply, _params
from experiment_test import small_config
from log_probs import make_log_probs
from text_folder_test import write

import hetlora_jax as hl
from hetlora_jax import base_model, client, metrics, points, rows, training
from hetlora_jax.data import labels, packing
from hetlora_jax.data.people import Example, evenly_spaced
from hetlora_jax.metrics import OF_LABELS
from hetlora_jax.points import Evaluation
from hetlora_jax.run import Run
from hetlora_jax.tools import dryrun, report, tables

LABELS = ('no', 'rather not', 'yes of course')
WORDS = 'the of a cat in to is was he for it with as his on be at by i this'.split()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Clients of 3 to 12 texts, of which some exceed all room, with labels at random."""
  rng = np.random.default_rng(0)
  lines = [
    {
      'client': f'c{i}',
      'context': ' '.join(rng.choice(WORDS, int(rng.integers(2, 30)))),
      'target': LABELS[int(rng.integers(3))],
    }
    for i in range(11)
    for _ in range(3 + i % 10)
  ]
  return write(tmp_path_factory.mktemp('labels') / 'data.jsonl', lines)


@pytest.fixture(scope='module')
def config_of(data):
  def config_of(**overrides):
    fields = {
      'data__name': 'text_folder', 'data__path': str(data), 'eval__labels': LABELS,
      'data__tokens_per_example': 50, 'data__targets_per_example': 24,
      'data__row_tokens': 90, 'data__heldout_fraction': 0.5, 'eval__num_people': 3, 'lora__targets': ('q',),
      'model__random__vocab_size': 300, 'federated__num_rounds': 2,
    }  # fmt: skip
    return small_config(**(fields | overrides))

  return config_of


def _trained(x):
  """Returns the state with adapters that are not zero, the same in every point."""

  def filled(leaf):
    values = np.sin(np.arange(leaf[0].size)).reshape(leaf.shape[1:])
    return leaf + 0.3 * values[None].astype(np.float32)

  adapters = {t: a._replace(b=filled(a.b)) for t, a in x.initial_state.adapters.items()}
  return dataclasses.replace(x.initial_state, adapters=adapters)


@pytest.fixture(scope='module')
def prepared(config_of):
  x = points.prepare(config_of(eval__own_rank=True))
  return x, _trained(x)


def _texts(cohort, e, label):
  """Returns the (prompt, target) of each example of a person with a label."""
  batch, out = jax.tree.map(lambda leaf: leaf[e, label], cohort.batches), []
  for segment in range(1, batch.segment.max() + 1):
    inputs = batch.tokens[batch.segment == segment].tolist()
    mine = batch.segment.reshape(-1)[batch.target_index] == segment
    target = batch.target[mine & (batch.weight > 0)].tolist()
    out.append((inputs[: len(inputs) - len(target) + 1], target))
  return out


def test_all_labels_follow_one_prompt_and_none_is_cut(prepared):
  x, _ = prepared
  encode, cut = x.experiment.model.tokenizer.encode, 0
  wanted = [encode(f' {label}\n') for label in LABELS]
  assert len({len(tokens) for tokens in wanted}) == 3
  usual = packing.batch_shape(x.config.data, x.config.eval.examples_per_person)
  for name, kind in (('seen', 'heldout'), ('unseen', 'unseen')):
    cohort, answer_EX = x.experiment.evaluation[name], x.experiment.answers[name]
    assert cohort.batches.tokens.shape[1] == len(LABELS)
    people = rows.evaluated_people(x.experiment, kind)
    for e, person in enumerate(map(int, people)):
      of_labels = [_texts(cohort, e, k) for k in range(3)]
      count = int(x.experiment.population.groups[kind].count[person])
      places = evenly_spaced(count, x.config.eval.examples_per_person)
      for i, *versions in zip(range(len(places)), *of_labels, strict=True):
        prompts, targets = zip(*versions, strict=True)
        own = x.experiment.population.example(kind, person, int(places[i]))
        whole = own.tokens[: -own.num_target].tolist()
        kept = len(prompts[0]) - 1  # but for bos, of the end
        assert prompts == (whole[:1] + whole[len(whole) - kept :],) * 3
        assert list(targets) == wanted
        assert wanted[answer_EX[e, i]] == own.tokens[-own.num_target :].tolist()
        cut += kept < len(whole) - 1
      assert (answer_EX[e, len(places) :] == labels.NOTHING).all()
      room = cohort.batches.segment[e].reshape(3, -1) > 0
      assert room.sum(1).max() <= usual.rows * usual.row_tokens
  assert cut  # the longest texts lose their start


def _slowly(log_probs, base, adapters, scale, tokens, count):
  """Returns -log p of the last tokens, from all logits of this text alone."""
  ids = np.pad(tokens, (0, 128 - len(tokens)))[None]  # what follows is not attended to
  log_p = log_probs(
    base, adapters, scale, ids, np.ones_like(ids), np.arange(ids.size)[None]
  )
  log_p = np.asarray(log_p, np.float64)[0]
  return -sum(log_p[i - 1, tokens[i]] for i in range(len(tokens) - count, len(tokens)))


def test_every_label_has_the_probability_of_its_tokens(prepared):
  x, state = prepared
  (found,), one = points.evaluate(x, state), x.take(state, 0)
  hyper = jax.tree.map(lambda leaf: leaf[0], x.hyper)
  log_probs = jax.jit(make_log_probs(x.experiment.model.decoder, np.float32))
  rules, right, asked = x.experiment.rules, 0, 0
  for name in ('seen', 'unseen', 'seen_own'):
    cohort = x.experiment.evaluation[name.removesuffix('_own')]
    answer_EX = x.experiment.answers[name.removesuffix('_own')]
    for e in range(0, len(answer_EX), 2):
      adapters, scale = client.global_adapters(rules, one, hyper)
      if name == 'seen_own':
        view = client.sent_to(rules, one, hyper, cohort.client_id[e])
        adapters, scale = view.adapters, view.scale
      nats = [
        [
          _slowly(log_probs, x.base, adapters, scale, prompt + target, len(target))
          for prompt, target in _texts(cohort, e, k)
        ]
        for k in range(3)
      ]
      guess = np.argmin(nats, 0)
      answer = answer_EX[e][: len(guess)]
      assert found[name].guess_EX[e][: len(guess)].tolist() == guess.tolist()
      loss = np.array(nats)[answer, np.arange(len(answer))].sum()
      np.testing.assert_allclose(found[name].loss_E[e], loss, rtol=1e-5)
      right, asked = right + (guess == answer).sum(), asked + len(guess)
  assert 0 < right < asked


def test_the_loss_is_that_of_an_evaluation_without_labels(config_of):
  # Room for whole texts: where they are cut, the longest label has a say.
  roomy = {'data__tokens_per_example': 200, 'data__row_tokens': 400}
  own = base_model.own(_params(), _apply, TARGETS, Words())
  for model in (None, own):
    known, plain = (
      points.prepare(config_of(eval__labels=x, **roomy), model=model)
      for x in (LABELS, ())
    )
    assert not plain.experiment.answers
    state = _trained(known)
    (with_labels,), (without,) = (points.evaluate(x, state) for x in (known, plain))
    assert with_labels.keys() == without.keys() == {'seen', 'unseen'}
    for name, of_set in without.items():
      got = with_labels[name]
      np.testing.assert_allclose(got.loss_E, of_set.loss_E, rtol=1e-5)
      np.testing.assert_array_equal(got.tokens_E, of_set.tokens_E)


@pytest.mark.parametrize(
  'mesh', [(2, 2, 1), pytest.param((1, 2, 2), marks=pytest.mark.slow)]
)
def test_points_and_meshes_guess_as_a_run_alone_does(config_of, mesh):
  sizes = dict(zip(('mesh.sweep', 'mesh.clients', 'mesh.model'), mesh, strict=True))
  scales = [config_of(lora__scale=scale) for scale in (0.5, 2.0)]
  x = points.prepare(*[c.replace(**sizes) for c in scales])
  state, losses, own = _trained(x), [], {'scale': lambda at: at.server.scale}
  together = points.evaluate(x, state)
  for k, (c, got) in enumerate(zip(scales, together, strict=True)):
    row = metrics.own_columns(own, x, state, 0, got, k)
    assert row == {'eval/own/scale': c.lora.scale}
    alone = points.prepare(c)
    (want,) = points.evaluate(alone, _trained(alone))
    for name, of_set in want.items():
      people = min(len(of_set.loss_E), len(got[name].loss_E))  # others fill up
      guesses = of_set.guess_EX[:people], got[name].guess_EX[:people]
      np.testing.assert_array_equal(*guesses)
      nats = of_set.loss_E[:people], got[name].loss_E[:people]
      np.testing.assert_allclose(*nats, rtol=1e-5)
    losses.append(want['seen'].loss_E[0])
  assert losses[0] != losses[1]


def _scores(answer, guess):
  nats, tokens = np.zeros(len(answer)), np.ones(len(answer))
  return metrics.of_labels(Evaluation(nats, tokens, np.array(answer), np.array(guess)))


def test_scores_are_those_of_the_formulas():
  # 0: 2 right of 3, guessed 3 times; 1: never right, guessed once; 2: 1 of 2; 3: absent.
  got = _scores([[0, 0, 0], [2, 2, -1]], [[0, 0, 1], [2, 0, 0]])
  assert got['accuracy'] == 3 / 5
  f1 = (2 * 2 / (3 + 3), 0.0, 2 * 1 / (2 + 1))
  assert got['macro_f1'] == pytest.approx(sum(f1) / 3)
  # A label that is never guessed counts; what is no guess is wrong, and no label.
  assert _scores([[0, 2]], [[0, 0]])['macro_f1'] == pytest.approx((2 / 3 + 0) / 2)
  assert _scores([[1, 1]], [[-1, -1]]) == {'accuracy': 0.0, 'macro_f1': 0.0}
  assert _scores([[1, 1, 1]], [[1, -1, 1]])['macro_f1'] == pytest.approx(4 / 5)
  assert _scores([[1, 1]], [[1, 1]]) == {'accuracy': 1.0, 'macro_f1': 1.0}
  assert metrics.of_labels(Evaluation(np.zeros(2), np.ones(2))) == {}


def test_a_model_that_has_diverged_guesses_nothing(prepared):
  x, state = prepared
  broken = jax.tree.map(lambda leaf: leaf * np.nan, state.adapters)
  (found,) = points.evaluate(x, dataclasses.replace(state, adapters=broken))
  assert (found['seen'].guess_EX == labels.NOTHING).all()
  row = rows.evaluation_row(found)
  assert row['eval/seen/accuracy'] == 0 and np.isnan(row['eval/seen/loss'])


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    (('no',), r"config.eval.labels=\('no',\) is impossible: give two"),
    (('no', 'yes', 'no'), r'config.eval.labels=.* impossible: .* each once'),
    (('no', ' '), r'config.eval.labels=.* impossible: .* none of them empty'),
    (
      ('no', 'yes of course', 'maybe'),
      r"config.eval.labels=.*maybe.* do not have the target 'rather not' of 'c\d+'",
    ),
    (('No', 'rather not', 'yes of course'), "do not have the target 'no' of"),
  ],
)
def test_labels_that_cannot_be_are_named(config_of, given, told, tmp_path):
  with pytest.raises(hl.ConfigError, match=told):
    training.train(config_of(eval__labels=given), tmp_path)
  assert not list(tmp_path.iterdir())


def test_labels_that_have_no_room_or_look_alike_are_named(config_of):
  narrow = config_of(data__targets_per_example=6)
  with pytest.raises(hl.ConfigError, match=r'of \d+ tokens.*targets_per_example'):
    points.prepare(narrow)
  # To a tokenizer of words' lengths 'no' and 'so' are one.
  own = base_model.own(_params(), _apply, TARGETS, Words())
  with pytest.raises(hl.ConfigError, match='the same to the tokenizer as the target'):
    points.prepare(config_of(eval__labels=(*LABELS, 'so')), model=own)


@pytest.mark.parametrize('bos', [0, 1])
def test_prompts_are_cut_alike_and_keep_their_bos(bos):
  prompt = np.arange(100, 120)
  versions = [
    Example(np.concatenate([prompt, np.arange(n)]), n, num_bos=bos) for n in (1, 3)
  ]
  shape = packing.BatchShape(rows=1, row_tokens=12, num_targets=8)
  (cut,) = labels._cut_alike([versions], shape)
  kept = [*prompt[:bos], *prompt[-(10 - bos) :]]  # 12 positions have 13 tokens
  for x, n in zip(cut, (1, 3), strict=True):
    np.testing.assert_array_equal(x.tokens, [*kept, *range(n)])


def test_people_of_ones_own_must_read_other_targets(config_of, prepared):
  theirs = prepared[0].experiment.population
  points.prepare(config_of(), population=theirs)
  narrow = dataclasses.replace(theirs, read=lambda row: theirs.read(row))
  with pytest.raises(hl.ConfigError, match=r'population.read\(row, target\)'):
    points.prepare(config_of(), population=narrow)


def test_a_dry_run_needs_no_examples_with_labels(config_of):
  assert dryrun._prepare([config_of()], jax.devices()).experiment.answers == {}


def _worst(at: metrics.Snapshot) -> float:
  """The least share of right guesses of a person."""
  seen = at.found['seen']
  asked = seen.answer_EX != labels.NOTHING
  right = (seen.answer_EX == seen.guess_EX) & asked
  return (right.sum(1) / np.maximum(asked.sum(1), 1))[asked.any(1)].min()


@pytest.fixture(scope='module')
def run(config_of, tmp_path_factory):
  own = {
    'worst': _worst,
    'norm': lambda at: sum((x.b**2).sum() for x in at.server.adapters.values()),
    'round': lambda at: at.round,
  }
  folder = tmp_path_factory.mktemp('run')
  c = config_of(
    eval__own_rank=True, eval__metric='eval/own/round', eval__better='higher'
  )
  return hl.train(c, folder, metrics=own)


def test_every_file_of_a_run_tells_the_scores(run, config_of):
  first, last = run.summary['first'], run.summary['last']
  for row in (first, last):
    for name in ('seen', 'unseen', 'seen_own'):
      assert all(0 <= row[f'eval/{name}/{score}'] <= 1 for score in OF_LABELS)
  evaluated = [r for r in run.history if 'eval/seen/accuracy' in r]
  assert [r['round'] for r in evaluated] == [0, 2]
  for name in ('seen', 'unseen', 'seen_own'):
    told = run.people[name]
    share = sum(p['right'] for p in told) / sum(p['examples'] for p in told)
    assert last[f'eval/{name}/accuracy'] == pytest.approx(share)
  lines = rows.table(run.summary).splitlines()
  (line,) = [x for x in lines if x.startswith('macro_f1 unseen')]
  ends = [f'{row["eval/unseen/macro_f1"]:.3f}' for row in (first, last)]
  assert line.split()[2:] == ends
  again = training.evaluate(Run(run.folder))
  assert again == {k: last[k] for k in again} and len(again) == 13
  assert [x.get_title() for x in run.plot().axes[:5]].count('Held-out accuracy') == 1


def test_metrics_of_ones_own_are_columns(run):
  for row in (run.summary['first'], run.summary['last']):
    assert row['eval/own/round'] == row['round']
  assert run.history[0]['eval/own/norm'] == 0 < run.history[-1]['eval/own/norm']
  told = run.people['seen']
  assert run.summary['last']['eval/own/worst'] == pytest.approx(
    min(p['right'] / p['examples'] for p in told)
  )
  assert 'own/norm' in ''.join(f'own/{x}' for x in rows.table(run.summary).split())


def test_metrics_that_cannot_be_are_named(config_of, tmp_path):
  with pytest.raises(hl.ConfigError, match="metrics={'a': 3}: give a name"):
    hl.train(config_of(), tmp_path, metrics={'a': 3})
  assert not list(tmp_path.iterdir())
  with pytest.raises(hl.ConfigError, match="metrics={'a': ...} returned None"):
    hl.train(config_of(), tmp_path, metrics={'a': lambda at: None})


def test_tables_and_the_page_tell_accuracies(run, tmp_path):
  last = run.summary['last']
  found = [{'name': 'a', 'fields': {}} | run.summary]
  head, _, cells = tables.table(found).splitlines()
  assert 'accuracy seen | accuracy unseen' in head
  assert f'| {last["eval/unseen/accuracy"]:.3f} ' in cells
  report.write([run.folder], tmp_path / 'page.html')
  page = (tmp_path / 'page.html').read_text()
  for title, name in (('accuracy', 'accuracy'), ('macro F1', 'macro_f1')):
    rounds = run.summary['first'], last
    ends = [f'{row[f"eval/unseen/{name}"]:.3f}' for row in rounds]
    assert f'<small>{title} {" → ".join(ends)}</small>' in page
  assert 'Held-out accuracy, unseen people against rounds' in page
