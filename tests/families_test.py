"""Every family of models: as transformers computes it, cached, exported, trained."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import shutil

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizer_test
from log_probs import make_log_probs

from configs import tiny
from hetlora_jax import base_model, config, files, formats, points
from hetlora_jax.formats import hf_config, hf_folder, layout, peft
from hetlora_jax.models import decoder, kernels
from hetlora_jax.models.decoder import KVCache
from hetlora_jax.types import Lora

IDS = np.arange(3, 3 + families.TOKENS)
every_model = pytest.mark.parametrize('name', families.MODELS)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Returns the folder of a model, written once."""

  @functools.cache
  def written(name: str) -> pathlib.Path:
    return families.write_folder(tmp_path_factory.mktemp('model'), name)

  return written


@functools.cache
def _log_probs(config):
  return jax.jit(make_log_probs(config, jnp.float32))


def _of_whole(model, ids):
  args = families.args_of(ids)
  return np.asarray(_log_probs(model.config)(model.params, {}, *args)[0])


@every_model
def test_log_probabilities_are_those_of_transformers(folder, name):
  model = formats.load(folder(name), dtype=np.float32, cached=False)
  want = families.reference_of(name)
  got = families.difference(_of_whole(model, families.ids_of(name)), want)
  assert got < 1e-4  # as asked: 2e-3
  told = json.loads(families.DIFFERENCES.read_text())[name]
  assert got < 10 * told


@every_model
def test_reading_on_with_a_cache_equals_the_whole_pass(folder, name):
  model = formats.load(folder(name), dtype=np.float32, cached=False)
  c, ids, first = model.config, families.ids_of(name), 23
  count, more = len(ids), len(ids) - first
  position = jnp.arange(count)[None]
  scale, tokens, segment, at = families.args_of(ids[:first])
  prefill = jax.jit(decoder.make_prefill(c, jnp.float32))
  _, (k, v) = prefill(model.params, {}, scale, tokens, segment, at)
  mask = (position[0][None, :] <= position[0, first:, None])[None]

  def cache(layer):
    k_v = (jnp.pad(x[layer], ((0, 0), (0, more), (0, 0), (0, 0))) for x in (k, v))
    return KVCache(*k_v, jnp.int32(first), position, mask)

  layers = decoder.unstack((model.params['layers'], {}), c.num_layers)
  h, _ = jax.jit(decoder.make_decode_step(c, jnp.float32))(
    model.params, layers, scale, jnp.asarray(ids[first:])[None], position[:, first:],
    [cache(i) for i in range(c.num_layers)],
  )  # fmt: skip
  logit = kernels.soft_cap(h[0] @ decoder.head(c, model.params).T, c.logit_softcap)
  want = _of_whole(model, ids)[first:]
  np.testing.assert_allclose(jax.nn.log_softmax(logit), want, atol=1e-4)


@every_model
def test_what_is_written_is_read_back(folder, name, tmp_path):
  model = formats.load(folder(name), dtype=np.float32, cached=False)
  hf_folder.write(tmp_path, model.config, model.params, model.tokenizer, folder(name))
  again = formats.load(tmp_path, dtype=np.float32, cached=False)
  assert again.config == model.config
  # Gemma's norms lose and regain a 1.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6), again.params, model.params
  )
  ids = (again.tokenizer.bos_id, again.tokenizer.eos_id, again.tokenizer.pad_id)
  t = model.tokenizer
  assert ids == (t.bos_id, t.eos_id, t.pad_id)
  kept = formats.load(folder(name), dtype='bfloat16')
  assert formats.load(folder(name), dtype='bfloat16').config == kept.config
  assert kept.config == model.config


# llama.cpp's files do not say these: which layers have a window, or do not rotate.
IN_GGUF = [x for x in families.MODELS if x not in (
  'gemma2', 'gemma3', 'llama dynamic', 'mistral', 'qwen2 yarn', 'smollm3 yarn'
)]  # fmt: skip
# So without, and with what is the head's width in the 2B.
PLAIN = {
  'gemma2': {'query_pre_attn_scalar': 8},
  'qwen2 yarn': {'use_sliding_window': False},
}


@pytest.mark.parametrize('name', [*IN_GGUF, *PLAIN, 'tiny_llama'])
def test_a_gguf_is_the_same_model(folder, name, tmp_path):
  path = families.GOLDEN / name
  if name in PLAIN:
    path = tmp_path / 'folder'
    path.mkdir()
    families.write_folder(path, name, **PLAIN[name])
  elif name == 'tiny_llama':
    path = shutil.copytree(path, tmp_path / 'folder')
    tokenizer_test._folder_with_bpe(path)
  else:
    path = folder(name)
  want = formats.load(path, dtype=np.float32, cached=False)
  file = families.write_gguf(tmp_path / 'model.gguf', path)
  got = formats.load(file, dtype=np.float32, cached=False)
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  frequencies = (decoder.rope_frequencies(x.config) for x in (got, want))
  np.testing.assert_allclose(*frequencies, rtol=1e-5)
  np.testing.assert_array_equal(*(decoder.global_layers(x.config) for x in (got, want)))
  rounded = ('norm_eps', 'rope_base', 'rope_base_local', 'rope_scaling')
  for field in dataclasses.fields(want.config):
    a, b = (getattr(x.config, field.name) for x in (got, want))
    assert field.name in rounded or a == pytest.approx(b), field.name
  factors = (
    dict(x.config.rope_scaling).get('attention_factor', 1) for x in (got, want)
  )
  assert next(factors) == pytest.approx(next(factors))


@pytest.mark.slow  # loads torch
@every_model
def test_transformers_reads_what_is_written(folder, name, tmp_path):
  if not (families.BENCH / 'done').exists():
    pytest.skip('needs `make .venv-bench/done`')
  model = formats.load(folder(name), dtype=np.float32, cached=False)
  hf_folder.write(tmp_path, model.config, model.params, model.tokenizer)
  ids = families.ids_of(name)
  assert (
    families.difference(_of_whole(model, ids), families.theirs(tmp_path, ids)) < 1e-4
  )


# --- One round of HetLoRA -------------------------------------------------------


def _config(source, **overrides):
  raw = tiny.get_config()
  raw.update_from_flattened_dict(
    {
      'model.source': str(source),
      'federated.clients_per_round': 2, 'federated.clients_at_once': 2,
      'federated.local_steps': 2, 'federated.local_batch': 4,
      'federated.r_max': 4, 'federated.r_min': 3, 'lora.targets': ('q', 'v'),
      'client_optimizer.learning_rate': 0.1,
      'data.tokens_per_example': 40, 'data.row_tokens': 40,
      'data.targets_per_example': 12,
    }
    | {k.replace('__', '.'): v for k, v in overrides.items()}
  )  # fmt: skip
  return config.resolve(raw)


# By default one, whose loss is capped; all with `make test-all`.
TRAINED = ('gemma2',)


@pytest.mark.parametrize(
  'name',
  [
    name if name in TRAINED else pytest.param(name, marks=pytest.mark.slow)
    for name in families.MODELS
  ],
)
def test_a_round_of_hetlora_trains(folder, name):
  x = points.prepare(_config(folder(name)))
  cohorts, state, losses = points.make_cohorts(x, 0), x.initial_state, []
  for _ in range(2):  # the same people, so that their losses compare
    state, metrics = points.call(x, state, cohorts)
    losses.append(float(metrics['loss_sum'].sum() / metrics['tokens'].sum()))
  assert losses[1] < losses[0] - 0.05
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.adapters))
  assert all(np.any(x.b) for x in state.adapters.values())


def test_rows_beyond_what_a_scaling_is_for_are_refused(folder):
  c = _config(folder('phi3 longrope'), data__row_tokens=49)
  with pytest.raises(config.ConfigError, match='row_tokens=49 exceeds the 48 tokens'):
    points.prepare(c)


# --- Adapters on matrices that are fused in transformers -----------------------


def _layers(config, targets, slots, seed=0):
  """Returns target -> a layer's factors, no two of one rank."""
  rng, layers = np.random.default_rng(seed), {}
  for t in targets:
    n, d_in, d_out = decoder.adapter_dims(config, targets)[t]
    ranks = rng.permutation(np.arange(1, slots + 1))[:n]
    layers[t] = [
      Lora(*(np.float32(rng.normal(size=s)) / 4 for s in ((d_in, r), (r, d_out))))
      for r in ranks
    ]
  return layers


def _like(config, targets, slots):
  return {
    t: Lora(np.zeros((n, d_in, slots)), np.zeros((n, slots, d_out)))
    for t, (n, d_in, d_out) in decoder.adapter_dims(config, targets).items()
  }


def _with_adapters(model, adapters, scale, ids):
  args = (jnp.float32(scale), *families.args_of(ids)[1:])
  adapters = {t: x.adapter for t, x in adapters.items()}
  return np.asarray(_log_probs(model.config)(model.params, adapters, *args)[0])


def test_a_fused_adapter_is_exact_both_ways(folder, tmp_path):
  model = formats.load(folder('phi3'), dtype=np.float32, cached=False)
  layers = _layers(model.config, decoder.TARGETS, 5)
  peft.write(tmp_path, layers, 1.3, 'base', model.config)
  about = json.loads((tmp_path / peft.CONFIG).read_text())
  assert about['target_modules'] == ['qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj']
  # Read back in no more slots than were needed.
  found = peft.read(tmp_path, _like(model.config, decoder.TARGETS, 5), 1.3)
  for t, factors in layers.items():
    for i, x in enumerate(factors):
      r = x.a.shape[1]
      np.testing.assert_array_equal(found[t].adapter.a[i, :, :r], x.a)
      np.testing.assert_array_equal(found[t].adapter.b[i, :r], x.b)
      assert found[t].live[i].sum() == r
  with pytest.raises(files.Damaged, match='adapts q, k, v as one matrix.*: add k.'):
    peft.read(tmp_path, _like(model.config, ('q', 'v', 'o'), 9), 1.3)
  with pytest.raises(files.Damaged, match='rank .* above config.federated.r_max=1'):
    peft.read(tmp_path, _like(model.config, decoder.TARGETS, 1), 1.3)


def _adapter_of_peft(folder, config, r=3):
  """Writes what PEFT would have trained: a rank shared by q, k and v."""
  rng, tensors = np.random.default_rng(0), {}
  for i in range(config.num_layers):
    name = f'{peft.PREFIX}model.layers.{i}.self_attn.qkv_proj'
    for side, shape in (('A', (r, 24)), ('B', (3 * 24, r))):
      tensors[f'{name}.lora_{side}.weight'] = np.float32(rng.normal(size=shape)) / 4
  about = peft._config({'qkv_proj': r}, 2.0, '')
  files.write_json(folder / peft.CONFIG, about)
  safetensors.numpy.save_file(tensors, folder / peft.WEIGHTS)
  return folder


def test_a_fused_adapter_of_peft_is_shared_by_its_parts(folder, tmp_path):
  model = formats.load(folder('phi3'), dtype=np.float32, cached=False)
  path = _adapter_of_peft(tmp_path, model.config)
  found = peft.read(path, _like(model.config, ('q', 'k', 'v'), 4), 2.0)
  stored = safetensors.numpy.load_file(path / peft.WEIGHTS)
  name = f'{peft.PREFIX}model.layers.1.self_attn.qkv_proj.lora_'
  want = (stored[f'{name}B.weight'] @ stored[f'{name}A.weight']).T
  got = [found[t].adapter.a[1] @ found[t].adapter.b[1] for t in ('q', 'k', 'v')]
  np.testing.assert_allclose(np.concatenate(got, 1), want, atol=1e-5)


@pytest.mark.slow  # loads torch
@pytest.mark.parametrize('kind', ['ours', 'partial', 'theirs'])
def test_peft_computes_a_fused_adapter_likewise(folder, kind, tmp_path):
  if not (families.BENCH / 'done').exists():
    pytest.skip('needs `make .venv-bench/done`')
  model, ids = formats.load(folder('phi3'), dtype=np.float32, cached=False), IDS
  targets = ('q', 'k', 'v') if kind == 'theirs' else decoder.TARGETS
  if kind == 'theirs':
    path = _adapter_of_peft(tmp_path, model.config)
  else:
    written = ('q', 'up', 'down') if kind == 'partial' else targets
    layers = _layers(model.config, written, 5)
    peft.write(tmp_path, layers, 1.3, 'base', model.config)
    path = tmp_path
    targets = ('q', 'k', 'v', 'gate', 'up', 'down') if kind == 'partial' else targets
  found = peft.read(path, _like(model.config, targets, 6), 1.3)
  got = _with_adapters(model, found, 1.3, ids)
  want = families.theirs(folder('phi3'), ids, path)
  assert families.difference(got, want) < 1e-4
  assert np.abs(got - _of_whole(model, ids)).max() > 0.1


FIELDS = [
  (name, field)
  for name, fields in families.MODELS.items()
  for field in fields
  if field in ('attn_logit_softcapping', 'final_logit_softcapping', 'no_rope_layers',
               'max_window_layers', 'query_pre_attn_scalar', 'rope_scaling',
               'rope_theta', 'sliding_window')
  and (name, field) != ('llama dynamic', 'rope_scaling')  # which changes longer texts
]  # fmt: skip


@pytest.mark.slow  # compiles a program each
@pytest.mark.parametrize(('name', 'field'), FIELDS)
def test_every_field_changes_what_is_computed(folder, name, field, tmp_path):
  model = formats.load(folder(name), dtype=np.float32, cached=False)
  raw = {k: x for k, x in families.config_of(name).items() if k != field}
  other = hf_config.read_config(tmp_path, raw)
  got = _of_whole(dataclasses.replace(model, config=other), families.ids_of(name))
  want = families.reference_of(name)
  picked = np.take_along_axis(got, want['where'].astype(int), 1)
  assert np.abs(picked - want['log_prob']).max() > 2e-3


# --- What is not supported ---------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    (
      'llama',
      {'model_type': 'mixtral'},
      "model_type 'mixtral'.*use one of gemma2, gemm",
    ),
    ('qwen3', {'model_type': 'qwen3_moe'}, "model_type 'qwen3_moe', which is not supp"),
    ('qwen2', {'quantization_config': {'bits': 4}}, "sets quantization_config={'bits'"),
    ('qwen2', {'num_experts': 8}, 'sets num_experts=8'),
    ('gemma2', {'use_bidirectional_attention': True}, 'sets use_bidirectional_attent'),
    ('mistral', {'layer_types': ['full_attention'] * 2}, 'sets layer_types='),
    ('qwen3', {'layer_types': ['chunked_attention'] * 2}, "layer type 'chunked_attent"),
    ('qwen3', {'final_logit_softcapping': 30.0}, 'sets final_logit_softcapping=30'),
    ('qwen2', {'mlp_bias': True}, 'sets mlp_bias=True'),
    (
      'qwen2',
      {'rope_scaling': {'type': 'mrope'}},
      "RoPE scaling 'mrope'.*dynamic, lin",
    ),
    ('qwen2', {'rope_scaling': families._YARN | {'truncate': False}}, 'truncate=False'),
    ('llama', {'partial_rotary_factor': 0.5}, 'sets partial_rotary_factor=0.5'),
    ('mistral', {'rope_scaling': families._LONGROPE}, 'long_factor .* for 4 waves'),
    ('phi3', {'partial_rotary_factor': 0.6}, '3 of 6 coordinates rotate'),
    ('smollm3', {'no_rope_layers': [1, 0, 1]}, 'rotated_layers has 3 of 4 layers'),
  ],
)
def test_what_is_not_supported_is_named(tmp_path, name, change, message):
  name = name if name in families.MODELS else f'{name} linear'
  raw = families.config_of(name) | change
  files.write_json(tmp_path / 'config.json', raw)
  with pytest.raises(files.Damaged, match=message):
    formats.load(tmp_path, dtype=np.float32, cached=False)


def test_the_table_of_families_tells_of_all(folder):
  if not importlib.util.find_spec('mkdocs'):
    pytest.skip('mkdocs is not installed; `make docs` installs it')
  from docs import hooks

  assert set(hooks.FAMILIES) == set(layout.FAMILIES) == set(hf_config.CLASSES)
  assert set(json.loads(families.DIFFERENCES.read_text())) == set(families.MODELS)


@pytest.mark.parametrize('family', ['gemma2', 'gemma3'])
def test_gemmas_without_windows_say_zero(family):
  # transformers makes their masks of it in any case, and refuses null.
  shape = dataclasses.replace(
    base_model.random_shape(config.RandomModel(), 300), family=family
  )
  assert hf_config.fields_of(shape)['sliding_window'] == 0
