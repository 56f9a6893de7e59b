"""Adapters go out and come in as PEFT understands them, exactly and whole."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import subprocess

import families
import gguf
import huggingface_hub
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
import pytest
import safetensors.numpy
from log_probs import make_log_probs

from configs import tiny
from hetlora_jax import (
  build,
  checkpoint,
  config,
  files,
  formats,
  lora,
  points,
)
from hetlora_jax.config import ConfigError
from hetlora_jax.formats import gguf_adapter, hf_folder, peft
from hetlora_jax.models import decoder
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.run import Run
from hetlora_jax.tools import card, export
from hetlora_jax.types import Lora
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
BENCH = ROOT / '.venv-bench'  # with torch, transformers and peft
TARGETS = {'llama': ('q', 'v', 'down'), 'gemma3': ('q', 'o', 'gate')}
IDS = np.arange(3, 20)
SLOTS = 8


# --- A run that ended ------------------------------------------------------


def _config(**overrides):
  raw = tiny.get_config()
  raw.update_from_flattened_dict(
    {
      'model.source': str(GOLDEN / 'tiny_llama'),
      'lora.targets': ('q', 'v', 'down'),
      'lora.scale': 1.7,
      'federated.r_max': SLOTS,
    }
    | {k.replace('__', '.'): v for k, v in overrides.items()}
  )
  return config.resolve(raw)


def _random(rng, x, slots):
  """Draws adapters of other ranks in every layer, from 1 to `slots`."""
  rank = rng.integers(1, slots + 1, x.a.shape[0])
  rank[0] = slots
  mask = np.arange(x.a.shape[-1]) < rank[:, None]
  a, b = (rng.normal(size=f.shape).astype(np.float32) for f in x)
  return Lora(a / 4 * mask[:, None], b / 4 * mask[..., None])


def _trained(x, seed=0):
  """Returns a state with something everywhere, as if after training."""
  rng = np.random.default_rng(seed)
  state = jax.device_get(x.take(x.initial_state, 0))
  adapters = {t: _random(rng, f, SLOTS - 1) for t, f in sorted(state.adapters.items())}
  residual = {
    name: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32)
    for name, leaf in state.residual.items()
  }
  for t in set(residual) & set(adapters):  # of rank 5
    residual[t] = _low_rank(rng, residual[t].shape)
  personal = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    state.memory.personal,
  )
  return dataclasses.replace(
    state,
    round=np.int32(3),
    adapters=adapters,
    residual=residual,
    memory=dataclasses.replace(state.memory, personal=personal),
  )


def _low_rank(rng, shape):
  layers, d_in, d_out = shape
  u, v = rng.normal(size=(layers, d_in, 5)), rng.normal(size=(layers, 5, d_out))
  return (0.1 * u @ v).astype(np.float32)


def _save(workdir, x, state):
  """Writes a run's folder that ended in a state."""
  where = jax.tree.map(lambda leaf: leaf.sharding, x.take(x.initial_state, 0))
  folder = checkpoint.Checkpoints(
    [workdir / 'checkpoints'], x.identity, x.config.checkpoint
  )
  folder.save(3, [jax.device_put(state, where)])
  folder.close()
  files.write_json(workdir / 'config.json', config.to_dict(x.config))


def _run(workdir, **overrides):
  """Returns an experiment and the state that it ended in."""
  x = points.prepare(_config(**overrides))
  state = _trained(x)
  _save(workdir, x, state)
  return x, state


def _export(x, tmp_path, format='peft', **choice):
  out = tmp_path / f'out_{format}_{len(list(tmp_path.iterdir()))}'
  about = export.write(Run(tmp_path / 'run'), out, export.Selection(format, **choice))
  return out, about


@functools.cache
def _log_probs(shape):
  return jax.jit(make_log_probs(shape, jnp.float32))


def _args(ids):
  tokens = jnp.asarray(ids)[None]
  position = jnp.arange(tokens.shape[1])[None]
  return tokens, jnp.ones_like(tokens), position


def _ours(x, state, adapters=None, scale=None):
  """Returns log p of what the run computes, [T, V]."""
  shape = decoder.DecoderConfig(**x.identity['shape'])
  base = lora.fold(x.base, state.residual)
  adapters = state.adapters if adapters is None else adapters
  scale = x.config.lora.scale if scale is None else scale
  return _log_probs(shape)(base, adapters, jnp.float32(scale), *_args(IDS))[0]


def _of_folder(folder, ids=IDS):
  model = formats.load(folder, dtype=np.float32, cached=False)
  args = _args(ids)
  return _log_probs(model.config)(model.params, {}, jnp.float32(1), *args)[0]


def _read(folder, x, slots=SLOTS, scale=None):
  """Reads a PEFT folder: adapters in so many slots, at the run's scale."""
  like = {
    t: Lora(np.zeros((n, d_in, slots)), np.zeros((n, slots, d_out)))
    for t, (n, d_in, d_out) in x.experiment.model.dims.items()
  }
  found = peft.read(folder, like, scale or float(np.float32(x.config.lora.scale)))
  return {t: padded.adapter for t, padded in found.items()}


# --- Against PEFT ----------------------------------------------------------


def _picked(got, golden, i):
  return np.take_along_axis(np.asarray(got), golden[f'where_{i}'], 1)


@pytest.mark.parametrize('family', TARGETS)
def test_an_adapter_of_peft_means_the_same_here(family):
  model = formats.load(GOLDEN / f'tiny_{family}', dtype=np.float32, cached=False)
  dims = decoder.adapter_dims(model.config, TARGETS[family])
  like = {
    t: Lora(np.zeros((n, d_in, 6)), np.zeros((n, 6, d_out)))
    for t, (n, d_in, d_out) in dims.items()
  }
  found = peft.read(GOLDEN / f'peft_tiny_{family}', like, 1.3)
  adapters = {t: x.adapter for t, x in found.items()}
  golden = np.load(GOLDEN / f'reference_peft_tiny_{family}.npz')
  plain = np.load(GOLDEN / f'reference_tiny_{family}.npz')
  for i in range(2):
    args = (jnp.float32(1.3), *_args(golden[f'ids_{i}']))
    got = _log_probs(model.config)(model.params, adapters, *args)[0]
    want = golden[f'log_prob_{i}']
    assert np.abs(_picked(got, golden, i) - want).max() < 2e-4
    base = _log_probs(model.config)(model.params, {}, *args)[0]
    assert np.abs(_picked(base, golden, i) - want).max() > 0.1
    assert np.abs(_picked(base, plain, i) - plain[f'log_prob_{i}']).max() < 2e-4


def test_what_is_exported_is_what_peft_saved(tmp_path):
  source = GOLDEN / 'peft_tiny_gemma3'
  c = _config(
    model__source=str(GOLDEN / 'tiny_gemma3'), lora__targets=TARGETS['gemma3'],
    lora__scale=2.0, lora__from_peft=str(source),
  )  # fmt: skip
  x = points.prepare(c)
  _save(tmp_path / 'run', x, x.take(x.initial_state, 0))
  out, _ = _export(x, tmp_path)
  got, want = (safetensors.numpy.load_file(f / peft.WEIGHTS) for f in (out, source))
  assert got.keys() == want.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name])
  mine, theirs = (json.loads((f / peft.CONFIG).read_text()) for f in (out, source))
  assert set(mine['target_modules']) == set(theirs['target_modules'])
  for field in ('peft_type', 'task_type', 'bias', 'use_rslora', 'r'):
    assert mine[field] == theirs[field]
  for layer in range(7):
    name = f'model.layers.{layer}.mlp.gate_proj'
    assert mine['rank_pattern'][name] == 2
    assert mine['alpha_pattern'][name] == 4


# --- Out and in ------------------------------------------------------------


def test_a_round_trip_is_exact(tmp_path):
  x, state = _run(tmp_path / 'run')
  out, about = _export(x, tmp_path)
  assert (about['rank_min'], about['rank_max']) < (7, 8)
  started = points.prepare(
    dataclasses.replace(
      x.config, lora=dataclasses.replace(x.config.lora, from_peft=str(out))
    )
  )
  start = started.take(started.initial_state, 0).adapters
  drawn = x.take(x.initial_state, 0).adapters
  for t, adapter in state.adapters.items():
    live = adapter.b.any(-1)
    assert not live.all()
    np.testing.assert_array_equal(start[t].b, adapter.b)
    # Slots that are free keep their A, so that they can be trained.
    free = np.where(live[:, None], adapter.a, drawn[t].a)
    np.testing.assert_array_equal(start[t].a, free)


@pytest.mark.parametrize('rule', ['alpha_over_r', 'alpha_over_sqrt_r'])
def test_scales_are_folded_where_they_differ(tmp_path, rule):
  x, state = _run(tmp_path / 'run', lora__scale_rule=rule)
  out, about = _export(x, tmp_path)
  scale = 1.7 / SLOTS ** {'alpha_over_r': 1, 'alpha_over_sqrt_r': 0.5}[rule]
  assert about['scale'] == pytest.approx(scale)
  other = _read(out, x, scale=0.3)
  for t, want in lora.deltas(state.adapters, scale).items():
    np.testing.assert_allclose(lora.deltas(other, 0.3)[t], want, atol=1e-6)


def test_methods_that_empty_adapters_start_from_a_residual(tmp_path):
  x, state = _run(tmp_path / 'run')
  out, _ = _export(x, tmp_path)
  dims = {t: np.zeros(d, np.float32) for t, d in x.experiment.model.dims.items()}
  c = _config(method='flora', lora__from_peft=str(out))
  rules = build.make_rules(c, x.experiment.rules.loss)
  start = build.init_state(c, x.experiment.model.dims, dims, np.array([2, 3]), rules)
  for t, want in lora.deltas(state.adapters, 1.7).items():
    np.testing.assert_allclose(start.residual[t], want, atol=1e-6)
    assert not start.adapters[t].b.any()


# --- For llama.cpp ---------------------------------------------------------


ARCHITECTURES = {
  'llama': gguf.MODEL_ARCH.LLAMA,
  'gemma3': gguf.MODEL_ARCH.GEMMA3,
  'mistral': gguf.MODEL_ARCH.LLAMA,  # llama.cpp knows it as llama
  'phi3': gguf.MODEL_ARCH.PHI3,  # has q, k and v in one matrix, and gate and up
}


@pytest.mark.parametrize('family', ARCHITECTURES)
@pytest.mark.parametrize('dtype, error', [('float32', 1e-6), ('bfloat16', 2e-2)])
def test_an_adapter_for_llama_cpp_has_its_names_and_rows(
  tmp_path, family, dtype, error
):
  arch, base = ARCHITECTURES[family], GOLDEN / f'tiny_{family}'
  if not base.exists():
    base = families.write_folder(tmp_path / 'base', family)
  shape = formats.hf_folder.open_checkpoint(base).config
  dims = decoder.adapter_dims(shape, tuple(hf_folder.MATRICES))
  rng = np.random.default_rng(0)
  layers = {
    t: [
      Lora(rng.normal(size=(d_in, r)), rng.normal(size=(r, d_out)))
      for r in rng.integers(1, 6, n)
    ]
    for t, (n, d_in, d_out) in dims.items()
  }
  layers = jax.tree.map(np.float32, layers)
  gguf_adapter.write(tmp_path / 'a.gguf', layers, 1.7, shape, dtype)
  file = gguf.GGUFReader(tmp_path / 'a.gguf')
  assert file.fields['general.type'].contents() == 'adapter'
  assert file.fields['adapter.type'].contents() == 'lora'
  assert file.fields['general.architecture'].contents() == gguf.MODEL_ARCH_NAMES[arch]
  alpha = file.fields['adapter.lora.alpha'].contents()
  found = {x.name: gguf.quants.dequantize(x.data, x.tensor_type) for x in file.tensors}
  names = gguf.get_tensor_name_map(arch, shape.num_layers)
  heads = {'q': shape.num_heads, 'k': shape.num_kv_heads}
  fused = hf_folder.FUSED.get(family, {})
  want: dict[str, list] = {}  # name -> the rows of the matrices that are in it
  for t in hf_folder.MATRICES:
    for i, x in enumerate(layers[t]):
      stem = f'{names.get_name(peft.module(t, i, fused))}.weight'
      product = 1.7 * (x.a @ x.b).T
      if (
        arch == gguf.MODEL_ARCH.LLAMA and t in heads
      ):  # LlamaModel.permute of llama.cpp
        halves = product.reshape(heads[t], 2, -1, product.shape[1])
        product = halves.swapaxes(1, 2).reshape(product.shape)
      want.setdefault(stem, []).append(product)
  assert len(found) == 2 * len(want)
  for stem, products in want.items():
    down, up = found[f'{stem}.lora_a'], found[f'{stem}.lora_b']
    whole = np.concatenate(products)
    got = alpha / len(down) * up @ down
    assert np.abs(got - whole).max() <= error * np.abs(whole).max()


def test_a_run_is_exported_for_llama_cpp(tmp_path):
  x, state = _run(tmp_path / 'run')
  out, about = _export(x, tmp_path, 'gguf')
  assert [p.name for p in out.iterdir()] == ['adapter.gguf']
  assert (about['format'], about['rank_max']) == ('gguf', 7)
  file = gguf.GGUFReader(out / 'adapter.gguf')
  found = {tensor.name: tensor.data for tensor in file.tensors}
  got = (
    1.7 * found['blk.1.ffn_down.weight.lora_b'] @ found['blk.1.ffn_down.weight.lora_a']
  )
  a, b = (f[1] for f in state.adapters['down'])
  ratio = 7 / len(
    found['blk.1.ffn_down.weight.lora_a']
  )  # of alpha, of the largest rank
  np.testing.assert_allclose(got.T * ratio, 1.7 * a @ b, rtol=1e-4, atol=1e-5)
  large = {t: Lora(1e6 * f.a, f.b) for t, f in state.adapters.items()}
  large = dataclasses.replace(state, adapters=large)
  _save(tmp_path / 'large', x, large)
  choice = export.Selection('gguf', dtype='float16')
  with pytest.raises(ConfigError, match='float16 cannot hold: take bfloat16'):
    export.write(Run(tmp_path / 'large'), tmp_path / 'none', choice)
  assert not (tmp_path / 'none').exists()


def test_an_adapter_of_scale_zero_adds_nothing(tmp_path):
  layers = {'q': [Lora(np.ones((24, 2), np.float32), np.ones((2, 32), np.float32))]}
  shape = formats.hf_folder.open_checkpoint(GOLDEN / 'tiny_llama').config
  gguf_adapter.write(tmp_path / 'a.gguf', layers, 0.0, shape, 'float32')
  file = gguf.GGUFReader(tmp_path / 'a.gguf')
  assert file.fields['adapter.lora.alpha'].contents() != 0  # which would count as 1
  assert not next(x for x in file.tensors if x.name.endswith('lora_b')).data.any()


# --- The model card --------------------------------------------------------


def _card(folder):
  """Returns the card of a folder as huggingface_hub reads it, and its code."""
  card = huggingface_hub.ModelCard.load(folder / 'README.md')
  (code,) = re.findall(r'```python\n(.*?)```', card.text, re.DOTALL)
  compile(code, 'README.md', 'exec')
  return card, code


def test_a_card_tells_what_was_trained_and_measured(tmp_path):
  x, _ = _run(tmp_path / 'run', method='fedex')
  rows = [
    {'round': n, 'eval/seen/perplexity': 90.25 - n, 'eval/unseen/perplexity': 80.5 - n}
    for n in range(5)
  ]
  for row in rows[1::2]:  # of rounds that were not evaluated
    del row['eval/seen/perplexity'], row['eval/unseen/perplexity']
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (tmp_path / 'run' / 'metrics.jsonl').write_text(text)
  out, about = _export(x, tmp_path)
  card, code = _card(out)
  assert card.data.library_name == 'peft' and card.data.base_model is None
  assert card.data.license is None and 'lora' in card.data.tags
  assert str(GOLDEN / 'tiny_llama') in code
  for said in (
    '`fedex` (FedEx-LoRA', '| rounds | 3, of 8', f'to {about["rank_max"]} |',
    'kept from training | 90.25 | 88.25 |', 'never trained on | 80.50 | 78.50 |',
    'after round 2 ', 'folded into the base', '| sent in | float32 |',
  ):  # fmt: skip
    assert said in card.text
  assert '86.25' not in card.text  # of a round after the checkpoint
  assert 'the global adapter, whole' not in card.text


def test_a_card_names_the_base_on_the_hub_and_whose_part_it_is(tmp_path):
  c = _config(data__name='synthetic').replace(**{'model.source': 'gemma3_270m'})
  about = {'round': 3, 'rank_min': 4, 'rank_max': 4}
  path = tmp_path / 'README.md'
  base = export.HUB['gemma3_270m']
  of_whom = 'the global one truncated to rank 4'
  card.write(path, c, card.Base(base, 'abc123'), 'ab' * 32, about, [], of_whom)
  found, code = _card(tmp_path)
  assert found.data.base_model == base
  assert f"from_pretrained({base!r}, revision='abc123')" in code
  assert 'rank 4.' in found.text and 'It has not been evaluated.' in found.text


# --- Of whom ---------------------------------------------------------------


def test_a_rank_gets_its_prefix_at_its_scale(tmp_path):
  x, state = _run(
    tmp_path / 'run', lora__scale_rule='alpha_over_r', lora__fold_scale=True
  )
  out, about = _export(x, tmp_path, rank=3)
  assert about['rank_max'] == 3
  assert about['scale'] == pytest.approx(1.7 / 3)
  got = lora.deltas(_read(out, x, scale=1.0), 1.0)
  masks = {t: lora.prefix_mask(jnp.full(3, 3), SLOTS) for t in state.adapters}
  want = lora.deltas(lora.truncate(state.adapters, masks), 1.7 / SLOTS)
  for t in want:
    np.testing.assert_allclose(got[t], want[t], atol=1e-6)


@pytest.mark.parametrize('method', ['hetlora', 'fedsa_lora'])
def test_a_person_gets_what_a_round_would_send(tmp_path, method):
  x, state = _run(tmp_path / 'run', method=method)
  who = 4
  if method == 'fedsa_lora':
    with pytest.raises(ConfigError, match='leaves b with the people'):
      _export(x, tmp_path)
  out, _ = _export(x, tmp_path, client=x.experiment.population.client_ids[who])
  got = lora.deltas(_read(out, x), 1.7)
  mask = np.arange(SLOTS) < int(state.memory.rank[who, 0])
  for t, adapter in state.adapters.items():
    b = adapter.b
    if method == 'fedsa_lora':
      b = state.memory.personal[t]['b'][who]
    want = 1.7 * (adapter.a * mask) @ (b * mask[:, None])
    np.testing.assert_allclose(got[t], want, atol=1e-5)


# --- What was folded into the base -----------------------------------------


@pytest.mark.parametrize('method', ['fedex', 'flora'])
def test_residuals_become_adapters_of_higher_rank(tmp_path, method):
  x, state = _run(tmp_path / 'run', method=method)
  out, about = _export(x, tmp_path)
  assert 5 < about['rank_max'] <= 5 + SLOTS - 1
  assert about['truncation_error'] < 1e-5
  got = lora.deltas(_read(out, x, 24, scale=1.0), 1.0)
  for t, adapter in state.adapters.items():
    want = state.residual[t] + 1.7 * adapter.a @ adapter.b
    np.testing.assert_allclose(got[t], want, atol=1e-5)


@pytest.mark.parametrize(
  'source, method',
  [('tiny_llama', 'fedex'), ('tiny_gemma3', 'hetlora'),
   ('tiny_gemma3', 'full_finetuning'), ('random', 'hetlora')],
)  # fmt: skip
def test_a_merged_model_computes_what_the_run_does(tmp_path, source, method):
  place = source if source == 'random' else str(GOLDEN / source)
  x, state = _run(tmp_path / 'run', method=method, model__source=place)
  out, about = _export(x, tmp_path, 'merged')
  want = _ours(x, state)
  np.testing.assert_allclose(_of_folder(out), want, atol=2e-4)
  assert np.abs(want - _ours(x, dataclasses.replace(
    state, adapters={}, residual={}
  ))).max() > 0.1  # fmt: skip
  again = formats.load(out, dtype=np.float32, cached=False)
  assert about['parameters'] == sum(p.size for p in jax.tree.leaves(x.base))
  shape = decoder.DecoderConfig(**x.identity['shape'])
  assert again.config == shape
  text = 'hello  there,\nmy friend!'
  model = x.experiment.model
  assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
  fast = Tokenizer.from_folder(
    _only(out, 'tokenizer.json', 'tokenizer_config.json', 'config.json')
  )
  assert fast.encode(text) == model.tokenizer.encode(text)
  assert (fast.bos_id, fast.eos_id) == (
    model.tokenizer.bos_id,
    model.tokenizer.eos_id,
  )


def _only(folder, *names):
  """Copies some files of a folder into another."""
  other = folder.with_name(f'{folder.name}_some')
  other.mkdir()
  for name in names:
    shutil.copy(folder / name, other / name)
  return other


def test_a_base_is_exported_as_the_run_has_it(tmp_path):
  x, state = _run(tmp_path / 'run', model__source=str(GOLDEN / 'tiny_gemma3'))
  out, _ = _export(x, tmp_path, 'base')
  again = formats.load(out, dtype=np.float32, cached=False)
  jax.tree.map(np.testing.assert_array_equal, again.params, jax.device_get(x.base))
  half, _ = _export(x, tmp_path, 'merged', dtype='bfloat16')
  tensors = safetensors.numpy.load_file(half / 'model.safetensors')
  assert {t.dtype.name for t in tensors.values()} == {'bfloat16'}
  assert np.abs(_of_folder(half) - _ours(x, state)).max() < 0.3


# --- Refusals --------------------------------------------------------------


def test_all_or_nothing_is_written(tmp_path, monkeypatch):
  x, _ = _run(tmp_path / 'run')
  (tmp_path / 'out').mkdir()
  attempt = functools.partial(export.write, Run(tmp_path / 'run'), tmp_path / 'out')

  def fails(folder, *args):
    (folder / 'some').write_text('')
    raise OSError('disk full')

  with monkeypatch.context() as patch:
    patch.setattr(hf_folder, 'write', fails)
    with pytest.raises(OSError, match='disk full'):
      attempt(export.Selection('merged'))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'run']
  assert not list((tmp_path / 'out').iterdir())
  attempt(export.Selection('peft'))
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'run']
  with pytest.raises(ConfigError, match='--out=.* exists'):
    attempt(export.Selection('peft'))


def test_what_cannot_be_exported_is_refused(tmp_path):
  x, _ = _run(tmp_path / 'run', method='full_finetuning')
  for choice, message in (
    (export.Selection('peft'), '--format=merged'),
    (export.Selection('merged', rank=2), 'has no adapters'),
    (export.Selection('merged', rank=99), r'in 1\.\.federated.r_max=8'),
    (export.Selection('merged', rank=2, client='x'), 'one of them'),
  ):
    with pytest.raises(ConfigError, match=message):
      export.write(Run(tmp_path / 'run'), tmp_path / 'out', choice)
  with pytest.raises(ConfigError, match='no checkpoints'):
    export.write(Run(tmp_path), tmp_path / 'out', export.Selection('merged'))
  with pytest.raises(ConfigError, match='none of the .* people'):
    export._number(x.experiment, 'nobody')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['run']


def test_the_command_takes_the_configuration_of_the_run(tmp_path):
  x, _ = _run(tmp_path / 'run')
  path = tmp_path / 'run' / 'config.json'
  fields = json.loads(path.read_text())
  del fields['lora']['from_peft']  # as a run from before has it
  path.write_text(json.dumps(fields))
  place = [f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "out"}']
  done = programs.run('launch.export', *place, '--rank=2')
  assert done.returncode == 0, done.stderr
  about = json.loads(done.stdout.splitlines()[-1])
  assert about['rank_max'] == 2 and about['round'] == 3
  done = programs.run('launch.export', *place)
  assert done.returncode == 2
  assert re.fullmatch(r'Error: --out=\S+ exists: [^\n]+\n', done.stderr)


def _spoilt(tmp_path, change=None, weights=None):
  """Copies the golden adapter with another config or other weights."""
  folder = tmp_path / 'adapter'
  shutil.copytree(GOLDEN / 'peft_tiny_llama', folder)
  path = folder / peft.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | (change or {})))
  if weights:
    path = folder / peft.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(weights(tensors), path)
  return folder


HEAD = 'base_model.model.lm_head.lora_A.weight'
NAME = 'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'


@pytest.mark.parametrize(
  'change, weights, fields, message',
  [
    ({'use_dora': True}, None, {}, 'use_dora=True, which is not supported'),
    ({'peft_type': 'LOHA'}, None, {}, "peft_type='LOHA'"),
    ({'bias': 'all'}, None, {}, "bias='all'"),
    ({'init_lora_weights': 'pissa'}, None, {}, "init_lora_weights='pissa'"),
    ({'r': 7}, None, {}, 'its rank of .* is 7, that of the weights 3'),
    ({'lora_alpha': None}, None, {}, 'lora_alpha of .* is None'),
    ({'lora_alpha': float('nan')}, None, {}, 'lora_alpha of .* is nan'),
    ({'alpha_pattern': {'.*_proj': 3}}, None, {}, 'name each module'),
    ({'rank_pattern': [1]}, None, {}, 'rank_pattern is'),
    ({}, lambda t: t | {NAME: t[NAME] * np.nan}, {}, 'not finite'),
    ({}, lambda t: t | {NAME: t[NAME][:, 1:]}, {}, 'have shapes'),
    ({}, lambda t: t | {NAME: t[NAME][:0]}, {}, 'empty'),
    ({}, lambda t: t | {NAME.replace('q_proj', 'g_proj'): t[NAME]}, {},
     'has the tensor .*g_proj.* unlike config.lora.targets'),
    ({}, lambda t: t | {HEAD: t[NAME]}, {},
     f'has the tensor {HEAD}, which is not supported'),
    ({}, lambda t: t | {'base_model.model.model.embed_tokens.weight': t[NAME]}, {},
     'has the tensor base_model.*embed_tokens.weight, which is not supported'),
    ({}, None, {'lora__targets': ('q', 'v')}, 'has the tensor .*down_proj'),
    ({}, None, {'lora__targets': ('q', 'v', 'up', 'down')}, 'lacks the tensor'),
    ({}, None, {'federated__r_max': 2}, r'rank 3, above .*r_max=2'),
    ({}, None, {'method': 'full_finetuning'}, 'full fine-tuning'),
    ({}, None, {'lora__scale': 0.0}, 'at scale 0'),
  ],
)  # fmt: skip
def test_what_cannot_be_imported_is_refused(tmp_path, change, weights, fields, message):
  folder = _spoilt(tmp_path, change, weights)
  with pytest.raises(ConfigError, match=message) as error:
    c = _config(lora__from_peft=str(folder), **fields)
    shape = formats.hf_folder.open_checkpoint(GOLDEN / 'tiny_llama').config
    dims = decoder.adapter_dims(shape, c.lora.targets)
    build.init_state(c, dims, {}, np.array([2]), build.make_rules(c, None))
  assert 'lora.' in str(error.value) and '\n' not in str(error.value)


def test_pickled_and_missing_adapters_are_refused(tmp_path):
  folder = _spoilt(tmp_path)
  (folder / peft.WEIGHTS).rename(folder / 'adapter_model.bin')
  with pytest.raises(ValueError, match='safe_serialization=True'):
    peft.read(folder, {}, 1.0)
  with pytest.raises(FileNotFoundError, match='adapter_config.json'):
    peft.read(tmp_path / 'absent', {}, 1.0)


# --- The other side, where it is installed ---------------------------------


def _theirs(tmp_path, model, adapter, ids):
  """Returns what peft_parity.py writes of a folder."""
  out = tmp_path / 'theirs.npz'
  subprocess.run(
    [BENCH / 'bin' / 'python', ROOT / 'tests' / 'peft_parity.py',
     str(model), str(adapter), str(ids), str(out)],
    check=True, capture_output=True,
  )  # fmt: skip
  return np.load(out)


def _difference(golden, log_probs):
  """Returns the largest difference of log p, over texts."""
  return max(
    np.abs(
      _picked(log_probs(golden[f'ids_{i}']), golden, i) - golden[f'log_prob_{i}']
    ).max()
    for i in range(sum('ids_' in k for k in golden.files))
  )


SOURCES = ('tiny_llama', 'tiny_gemma3', 'random', 'gemma3_270m')


@pytest.mark.slow  # loads torch
@pytest.mark.parametrize('source', SOURCES)
@pytest.mark.parametrize('method', ['hetlora', 'fedex'])
def test_folders_agree_with_peft_and_transformers(tmp_path, source, method):
  if not (BENCH / 'done').exists():
    pytest.skip('needs `make .venv-bench/done`')
  place = str(GOLDEN / source) if 'tiny' in source else source
  x, state = _run(
    tmp_path / 'run', method=method, model__source=place,
    lora__targets=('q', 'k', 'v', 'o', 'gate', 'up', 'down'),
  )  # fmt: skip
  shape = decoder.DecoderConfig(**x.identity['shape'])
  base = lora.fold(x.base, state.residual)

  def ours(ids):
    args = (state.adapters, jnp.float32(x.config.lora.scale), *_args(ids))
    return _log_probs(shape)(base, *args)[0]

  name = 'tiny_llama' if source == 'random' else source
  ids = GOLDEN / f'reference_{name}.npz'
  plain, adapter, merged = (
    _export(x, tmp_path, f)[0] for f in ('base', 'peft', 'merged')
  )
  for model, extra in ((plain, adapter), (merged, '')):
    found = _difference(_theirs(tmp_path, model, extra, ids), ours)
    print(f'{source} {method} {model.name} {extra}: {found:.2e}')
    assert found <= 2e-3


@pytest.mark.slow  # starts llama.cpp
@pytest.mark.parametrize('method', ['hetlora', 'fedex'])
@pytest.mark.parametrize('family, most', [('llama', 1e-4), ('gemma3', 2e-2)])
def test_llama_cpp_computes_what_the_run_does(
  tmp_path, monkeypatch, family, most, method
):
  """Gemma's difference is that of the base alone: a table of GELU in float16."""
  if not (BENCH / 'done').exists():
    pytest.skip('needs `make .venv-bench/done`')
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path / 'cache'))
  folder, base = GOLDEN / f'tiny_{family}', tmp_path / 'base.gguf'
  llama_cpp.write_base(base, formats.load(folder, dtype=np.float32, cached=False))
  x, state = _run(
    tmp_path / 'run', method=method, model__source=str(base),
    lora__targets=('q', 'k', 'v', 'o', 'gate', 'up', 'down'),
  )  # fmt: skip
  out, _ = _export(x, tmp_path, 'gguf')
  plain = _ours(x, dataclasses.replace(state, adapters={}, residual={}))
  for adapter, want in (('', plain), (out / 'adapter.gguf', _ours(x, state))):
    subprocess.run(
      [BENCH / 'bin' / 'python', ROOT / 'tests' / 'llama_cpp.py', str(base),
       str(adapter), str(tmp_path / 'theirs.npy'), *map(str, IDS)],
      check=True, capture_output=True,
    )  # fmt: skip
    found = np.abs(np.load(tmp_path / 'theirs.npy') - want).max()
    print(f'{family} {method} {adapter and adapter.name}: {found:.2e}')
    assert found < most
  assert np.abs(want - plain).max() > 1


@pytest.mark.slow  # loads torch
def test_the_code_of_a_card_runs(tmp_path):
  if not (BENCH / 'done').exists():
    pytest.skip('needs `make .venv-bench/done`')
  x, _ = _run(tmp_path / 'run')
  out, _ = _export(x, tmp_path)
  base, _ = _export(x, tmp_path, 'base')
  _, code = _card(out)
  code = code.replace(str(GOLDEN / 'tiny_llama'), str(base))
  done = subprocess.run(
    [BENCH / 'bin' / 'python', '-c', code], cwd=out, check=True, capture_output=True,
    text=True,
  )  # fmt: skip
  assert 'Hello' in done.stdout
