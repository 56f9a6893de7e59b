"""A model of one's own: its task, what is adapted, what its checkpoints are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from log_probs import make_log_probs

from hetlora_jax import base_model, files, lora
from hetlora_jax.config import ConfigError, Data, RandomModel
from hetlora_jax.data import people
from hetlora_jax.models import decoder, readout
from hetlora_jax.types import Batch

WORDS = 19
SHAPE = base_model.random_shape(
  RandomModel(
    seed=0, width=8, num_layers=2, num_heads=2, head_dim=4, mlp_width=12,
    vocab_size=WORDS,
  ),
  WORDS,
)  # fmt: skip
TARGETS = ('q', 'down')


class Words:
  bos_id = 0

  def encode(self, text: str) -> list[int]:
    return [len(word) % WORDS for word in text.split()]


def _params(seed: int = 0):
  return decoder.init_params(SHAPE, jax.random.key(seed), jnp.float32)


def _apply(base, adapters, scale, batch):
  """The decoder as a function that returns logits, off by a constant."""
  log_probs = make_log_probs(SHAPE, jnp.float32)
  return 3 + log_probs(
    base, adapters, scale, batch.tokens, batch.segment, batch.position
  )


def _batch() -> Batch:
  rng = np.random.default_rng(0)
  return Batch(
    tokens=rng.integers(WORDS, size=(2, 5), dtype=np.int32),
    segment=np.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]], np.int32),
    position=np.array([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]], np.int32),
    target_index=np.array([1, 3, 5, 0], np.int32),
    target=rng.integers(WORDS, size=4, dtype=np.int32),
    weight=np.array([1, 1, 1, 0], np.float32),
  )


def test_the_task_of_logits_is_that_of_the_decoder():
  model = base_model.own(_params(), _apply, TARGETS, Words())
  assert model.dims == decoder.adapter_dims(SHAPE, TARGETS)
  adapters = lora.init(jax.random.key(1), model.dims, 3, 'gaussian')
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  usual = readout.make_loss(SHAPE, jnp.float32, remat=False)
  given = (model.params, adapters, jnp.float32(1.5), _batch())
  got, want = model.loss(*given), usual(*given)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert got[1] == 3


def test_checkpoints_belong_to_the_parameters():
  one, same, other = (
    base_model.own(_params(seed), _apply, TARGETS, Words()).identity
    for seed in (0, 0, 1)
  )
  assert one == same
  assert one['sha256'] != other['sha256'] and one['shape'] == other['shape']


@pytest.mark.parametrize('target', ['nothing', 'embed'])
def test_a_target_that_is_no_matrix_is_named(target):
  with pytest.raises(ConfigError, match=f"target='{target}'.*these are: .*gate"):
    base_model.own(_params(), _apply, ('q', target), Words())


def test_a_name_that_is_there_twice_is_refused():
  params = {'enc': {'q': np.ones((1, 2, 3))}, 'dec': {'q': np.ones((1, 2, 3))}}
  with pytest.raises(ConfigError, match="two parameters 'q'"):
    base_model.own(params, _apply, ('q',), Words())


def test_a_tokenizer_that_was_trained_is_kept_beside_its_data(tmp_path, monkeypatch):
  texts = tmp_path / 'mine.jsonl'
  lines = [
    {'client': 'a', 'context': f'{n} and', 'target': f'{n * n}'} for n in range(99)
  ]
  files.write_json_lines(texts, lines)
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path / 'cache'))
  data = Data(name='text_folder', path=str(texts))
  trained = base_model._tokenizer(data, 280)
  (kept,) = (tmp_path / 'cache').rglob('tokenizer_280.model')
  monkeypatch.setattr(people, 'corpus', None)  # would be called to train again
  again = base_model._tokenizer(data, 280)
  assert again.serialize() == trained.serialize()
  kept.write_bytes(b'damaged')
  with pytest.raises(files.Damaged, match='tokenizer_280.model.*delete it'):
    base_model._tokenizer(data, 280)


def test_a_tokenizer_is_trained_where_it_cannot_be_kept(monkeypatch):
  def full(*_):
    raise OSError('read-only')

  monkeypatch.setattr(files, 'write_whole', full)
  assert base_model._tokenizer(Data(name='synthetic'), 290).vocab_size == 290
