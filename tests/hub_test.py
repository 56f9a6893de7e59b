"""Models and data sets of the Hugging Face Hub, by its libraries and a Hub of our own."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from hetlora_jax import hub as hub_module
from tests import hub_server, programs

MODEL = {
  path.name: path.read_bytes()
  for path in (programs.ROOT / 'tests/golden/tiny_llama').iterdir()
}
WEIGHTS = 'model.safetensors'
COLUMNS = {'client': 'who', 'prompt': 'said', 'target': 'answer'}
# What `datasets` writes of the classes of a column, here of two configurations.
CARD = b"""---
configs:
- {config_name: en, data_files: [{split: train, path: en.jsonl}]}
- {config_name: de, data_files: [{split: train, path: de.jsonl}, {split: test, path: t.jsonl}]}
dataset_info:
- config_name: en
  features:
  - {name: who, dtype: int64}
  - {name: said, dtype: string}
  - {name: answer, dtype: string}
  - name: kind
    dtype: {class_label: {names: {'0': joke, '1': fact, '2': lie}}}
- config_name: de
  features:
  - {name: a, dtype: int64}
  - {name: b, dtype: int64}
---
"""


def chats(count=96):
  """Returns the rows of a configuration as JSON Lines."""
  rows = ({'who': i % 12, 'said': f'ask {i}', 'answer': f'say {i * 7}', 'kind': i % 3}
          for i in range(count))  # fmt: skip
  return ''.join(f'{json.dumps(row)}\n' for row in rows).encode()


def data(name, **more):
  """Returns a section `data`, as `_main` takes it."""
  return json.dumps(COLUMNS | {'name': name} | more)


def scaled(by):
  """Returns the files of the same model with other weights."""
  weights = safetensors.numpy.load(MODEL[WEIGHTS])
  weights = {name: (x * by).astype(x.dtype) for name, x in weights.items()}
  return MODEL | {WEIGHTS: safetensors.numpy.save(weights, {'format': 'pt'})}


@pytest.fixture
def hub():
  with hub_server.running() as hub:
    yield hub


@pytest.fixture
def run(hub, tmp_path):
  """Runs a program with caches of its own and this Hub."""
  here = {'HF_HOME': str(tmp_path / 'hf'), 'HETLORA_CACHE': str(tmp_path / 'ours'),
          'HF_ENDPOINT': hub.url}  # fmt: skip

  def run(*words, **env):
    hub.asked.clear()
    return programs.run(*words, **here | env)

  return run


@pytest.fixture
def load(run):
  """Loads models and data in a program, and returns what came of each."""

  def load(*sources, quiet=True, **env):
    done = run('tests.hub_test', *sources, **env)
    assert done.returncode == 0, done.stderr
    assert not (quiet and done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line[0] in '["']

  return load


def _main(words):
  from hetlora_jax import config, formats
  from hetlora_jax.data import builders

  for word in words:
    try:
      if not word.startswith('{'):
        model = formats.load(word, dtype=np.float32)
        print(json.dumps([model.revision, model.fingerprint]))
        continue
      section = config.Data(**json.loads(word))
      found = builders.of(config.resolve(config.Config(data=section)).data)
      labels = [x.decode() for person in found.people for x in person['labels']]
      targets = [row['target'].decode() for row in found.examples]
      print(json.dumps([found.revision, found.digest, labels, targets]))
    except (OSError, ValueError) as error:
      print(json.dumps(str(error)))


def add(hub, name, *commits, **options):
  """Adds a repository, and returns its commits."""
  repository = hub.repositories[name] = hub_server.Repository(**options)
  return [repository.commit(files, f'v{i}') for i, files in enumerate(commits)]


def partial_files(tmp_path):
  return [*tmp_path.rglob('*.incomplete'), *tmp_path.rglob('.writing_*')]


@pytest.mark.parametrize(
  ('name', 'model', 'dataset'),
  [
    ('org/name', ('org/name', None, None), None),
    ('org/name@v1', ('org/name', None, 'v1'), None),
    ('org/n-m.x:a/b.gguf@refs/pr/1', ('org/n-m.x', 'a/b.gguf', 'refs/pr/1'), None),
    ('hf:org/name:en@v1', None, ('org/name', 'en', 'v1')),
    ('hf:name', None, ('name', None, None)),
    *[(x, None, None) for x in (
      'name', '/org/name', './name', 'org/name/x', 'org/name.gguf', 'org/name@', 'org/',
      'random:gemma3_1b',
    )],
  ],
)  # fmt: skip
def test_names_are_read(name, model, dataset):
  assert (hub_module.model(name), hub_module.dataset(name)) == (model, dataset)
  for bad in ('hf:', 'hf:/name', 'hf:a/b/c', 'hf:a/b@', 'hf:a/b:c:d'):
    with pytest.raises(ValueError, match=f"'{bad}' is not of the form hf:ORG/NAME or"):
      hub_module.dataset(bad)
  pinned = hub_module.unpinned(name)
  assert pinned == (name.partition('@')[0] if model or dataset else name)


# --- Models ----------------------------------------------------------------


def test_a_model_is_fetched_once_and_then_read_without_a_network(hub, load, tmp_path):
  more = {'pytorch_model.bin': b'', 'original/model.safetensors': b'', 'a.onnx': b''}
  old, new = add(hub, 'models/org/tiny', scaled(1.5) | more, MODEL | more)
  before, after = load('org/tiny@v0', 'org/tiny')
  assert [before[0], after[0]] == [old, new]
  assert before[1] != after[1]
  assert sorted(hub.downloads()) == sorted([*MODEL, WEIGHTS])  # what differs
  assert load('org/tiny') == [after]
  assert hub.downloads() == []
  hub.shutdown()
  offline = {'HF_HUB_OFFLINE': '1'}
  assert load('org/tiny', 'org/tiny@v0', f'org/tiny@{old}', **offline) == [
    after, before, before
  ]  # fmt: skip
  assert 'is not in the cache' in load('org/tiny@v7', **offline)[0]
  assert not partial_files(tmp_path)


def test_of_a_model_in_parts_those_of_the_index_are_fetched(hub, load):
  weights = safetensors.numpy.load(MODEL[WEIGHTS])
  names = sorted(weights)
  parts = {'a-1.safetensors': names[:5], 'a-2.safetensors': names[5:]}
  files = {x: MODEL[x] for x in MODEL if x != WEIGHTS}
  files |= {
    file: safetensors.numpy.save({x: weights[x] for x in names})
    for file, names in parts.items()
  }
  index = {name: file for file, names in parts.items() for name in names}
  files['model.safetensors.index.json'] = json.dumps({'weight_map': index}).encode()
  add(hub, 'models/org/parts', files | {'consolidated.safetensors': MODEL[WEIGHTS]})
  add(hub, 'models/org/torn', files | {'a-2.safetensors': b''}, {
    file: files[file] for file in files if file != 'a-2.safetensors'
  })  # fmt: skip
  (commit, _), torn = load('org/parts', 'org/torn')
  assert commit in hub.repositories['models/org/parts'].commits
  assert 'consolidated.safetensors' not in hub.downloads()
  assert "source='org/torn' has no a-2.safetensors at" in torn


def test_a_download_that_breaks_off_goes_on(hub, load, tmp_path):
  chunk = 10 << 20  # what the library writes at once
  about = {'format': 'pt', 'filling': 'x' * (chunk + 5_000)}
  weights = safetensors.numpy.save(safetensors.numpy.load(MODEL[WEIGHTS]), about)
  add(hub, 'models/org/large', MODEL | {WEIGHTS: weights})
  hub.cut = {WEIGHTS: chunk + 1_000}
  (found,) = load('org/large', quiet=False)
  asked = [x for x in hub.asked if x.startswith('GET') and WEIGHTS in x]
  assert [x.endswith(f' bytes={chunk}-') for x in asked] == [False, True]
  (kept,) = (tmp_path / 'hf').rglob(WEIGHTS)
  assert kept.read_bytes() == weights
  assert not partial_files(tmp_path)
  assert found[0] == kept.parent.name


def test_what_cannot_be_loaded_is_told_in_one_line(hub, load):
  add(hub, 'models/org/tiny', MODEL)
  add(hub, 'models/org/gated', MODEL, gated=True)
  add(hub, 'models/org/pickle', {'config.json': b'{}', 'pytorch_model.bin': b''})
  add(hub, 'models/org/quantised', {'m.Q4.gguf': b'GGUF'})
  said = {
    'org/absent': 'no repository of http.* that is public and no path here: .*HF_TOKEN',
    'org/tiny@v7': "has no revision 'v7': take a branch, tag or commit of http",
    'org/gated': 'is gated: ask for access at http.*/org/gated, and give a token',
    'org/pickle': r'has no model.safetensors at .*: name a repository that transformers',
    'org/quantised': 'has no config.json .*: name one .* as org/quantised:m.Q4.gguf',
    'org/quantised:m.gguf': 'has no m.gguf .*: name one of its GGUF files, as org/quantised:m.Q4.gguf',
    'org/na--me': "Cannot have -- or .. in repo_id: 'org/na--me'",
    'org/tiny/x': 'is none of .* or ORG/NAME of the Hugging Face Hub: give the path',
  }
  _check(said, load(*said))
  told = load('org/quantised:m.Q4.gguf')[0]
  assert 'm.Q4.gguf is truncated or not a GGUF file' in told
  known, refused = [load('org/gated', 'org/absent', HF_TOKEN=token) for token in
                    (hub_server.TOKEN, 'hf_wrong')]  # fmt: skip
  assert known[0][0] in hub.repositories['models/org/gated'].commits
  assert 'no repository' in known[1]
  assert 'that this token may see' in known[1]
  assert all('refuses the token: give a token (HF_TOKEN' in x for x in refused)


def _check(said, told):
  for (source, pattern), message in zip(said.items(), told, strict=True):
    assert isinstance(message, str), (source, message[:2])
    assert '\n' not in message
    assert re.search(pattern, message), message


@pytest.mark.slow  # a download that is killed
def test_a_killed_download_leaves_nothing_for_long(hub, load, tmp_path):
  add(hub, 'models/org/tiny', MODEL)
  hub.stuck = {WEIGHTS}
  here = {'HF_HOME': str(tmp_path / 'hf'), 'HF_ENDPOINT': hub.url}
  command = [sys.executable, '-m', 'tests.hub_test', 'org/tiny']
  with subprocess.Popen(command, cwd=programs.ROOT, env=os.environ | here) as program:
    while f'STUCK {WEIGHTS}' not in hub.asked:
      assert program.poll() is None
      time.sleep(0.05)
    program.kill()
  (left,) = partial_files(tmp_path)
  os.utime(left, (0, time.time() - 7200))
  hub.stuck = set()
  ((_, fingerprint),) = load('org/tiny')
  assert hub.downloads() == [WEIGHTS]  # what was whole is kept
  assert not partial_files(tmp_path)
  (kept,) = (tmp_path / 'hf').rglob(WEIGHTS)
  assert load(str(kept.parent)) == [[None, fingerprint]]


# --- Data sets -------------------------------------------------------------


def test_data_are_fetched_once_and_then_read_without_a_network(hub, load, tmp_path):
  old, new = add(
    hub, 'datasets/org/chats', {'README.md': CARD, 'en.jsonl': chats(), 'de.jsonl': b''},
    {'README.md': CARD, 'en.jsonl': chats(60), 'de.jsonl': b'', 't.jsonl': b''},
  )  # fmt: skip
  name = 'hf:org/chats:en'
  before, after = load(data(f'{name}@v0', label='kind'), data(name, label='kind'))
  assert [before[0], after[0]] == [old, new]
  assert before[1] != after[1]
  assert [len(x[3]) for x in (before, after)] == [96, 60]
  assert before[3][:2] == ['say 0', 'say 84']  # by client, then as they came
  assert before[2][:2] == ['joke', 'joke']
  assert {*before[2]} == {'joke', 'fact', 'lie'}
  assert not {'de.jsonl', 't.jsonl'} & {*hub.downloads()}
  assert load(data(f'{name}@{new}', label='kind')) == [after]
  hub.shutdown()
  offline = {'HF_HUB_OFFLINE': '1'}
  again, part, other = load(
    data(name, label='kind'), data(name, split='train[:10]'), data(f'{name}@v0'),
    quiet=False, **offline,
  )  # fmt: skip
  assert again == after
  assert len(part[3]) == 10
  assert f'has another revision, {new}: name that' in other
  assert 'is not in the cache' in load(data('hf:org/other'), **offline)[0]
  assert not partial_files(tmp_path)


def test_what_data_cannot_be_read_is_told_in_one_line(hub, load, tmp_path):
  bad = chats(3) + b'{"who": 4, "said": null, "answer": "c"}\n'
  add(hub, 'datasets/org/chats', {'README.md': CARD, 'en.jsonl': chats(),
      'de.jsonl': b'{"a": 1, "b": 2}\n', 't.jsonl': b'{"a": 1, "b": 2}\n'})  # fmt: skip
  add(hub, 'datasets/org/bad', {'train.jsonl': bad})
  add(hub, 'datasets/org/torn', {'train.jsonl': b'{"who"'})
  add(hub, 'datasets/org/empty', {'README.md': b''})
  add(hub, 'datasets/org/gated', {'train.jsonl': chats()}, gated=True)
  said = {
    data('hf:org/absent'): r'no repository of \S+ that is public: .*HF_TOKEN',
    data('hf:org/chats:en@v7'): "has no revision 'v7'",
    data('hf:org/gated'): 'is gated: ask for access at .*/datasets/org/gated,',
    data('hf:org/empty'): "cannot be read .*doesn't contain any data files",
    data('hf:org/torn'): "cannot be read .*No ':' found",
    data('hf:org/chats'): r"Config name is missing.*\['en', 'de'\]",
    data('hf:org/chats:fr'): "'fr' not found",
    data('hf:org/chats:en', split='dev'): "data.split='dev' is no split .* train,",
    data('hf:org/chats:de'): 'has no who, but a, b: say .* config.data.client',
    data('hf:org/chats:en', target='kind', client=None): 'no client, but who, answer: ',
    data('hf:org/chats:en', target='who'): r'row 1 is damaged \(who=0\): a client is',
    data('hf:org/bad'): r'@\w+, row 4 is damaged \(said is empty\): .*take other col',
    data('hf:'): 'is not of the form hf:ORG/NAME',
    data('hf:org/chats', path='here'): 'has no files here',
    data('synthetic'): "data.name='synthetic' has columns of its own",
  }
  _check(said, load(*said, quiet=False))
  assert 'refuses the token' in load(data('hf:org/chats:en'), HF_TOKEN='hf_wrong')[0]
  assert not [*tmp_path.rglob('*.array_record*')]
  assert not partial_files(tmp_path)


def test_clients_are_made_of_data_that_have_none(hub, run):
  add(hub, 'datasets/org/chats', {'train.jsonl': chats()})
  words = ('launch.data', '--dataset=hf:org/chats', '--prompt=said', '--target=answer')
  done = run(*words)
  assert done.returncode == 2
  assert (
    'no client, but who, kind: say which column is what by --client,' in done.stderr
  )
  made = ('--stats', '--partition_clients=6', '--tokenizer=tests/golden/tiny_llama')
  done = run(*words, *made, '--partition=iid')
  assert '96 examples of 6 clients' in done.stdout
  assert 'Not read of it: kind, who.' in done.stdout
  done = run(*words, *made, '--partition=dirichlet')
  assert "--partition='dirichlet' goes by labels" in done.stderr
  done = run(*words, '--stats')  # prepared without them
  assert "--partition='natural': the data have no clients" in done.stderr


# --- A run -----------------------------------------------------------------


@pytest.mark.slow  # six programs, of parts that are tested above
def test_a_run_of_the_hub_goes_on_without_it_and_on_its_revisions_alone(
  hub, run, tmp_path
):
  (old,) = add(hub, 'models/org/tiny', MODEL)
  (rows,) = add(hub, 'datasets/org/chats', {'train.jsonl': chats()})
  fields = {
    'federated.clients_per_round': 2, 'federated.local_steps': 1, 'eval.every': None,
    'checkpoint.every': 1, 'lora.targets': 'q', 'data.name': 'hf:org/chats',
    **{f'data.{name}': column for name, column in COLUMNS.items()},
  }  # fmt: skip

  def train(rounds, source='org/tiny', **env):
    own = {'federated.num_rounds': rounds, 'model.source': source}
    words = [f'--config.{path}={value}' for path, value in (fields | own).items()]
    folder = f'--workdir={tmp_path}/run'
    return run(
      'launch.train',
      '--config=configs/tiny.py',
      folder,
      *words,
      XLA_FLAGS=programs.ONE_DEVICE,
      **env,
    )

  done = train(1)
  assert f'org/tiny at {old} in float32' in done.stdout, done.stderr
  summary = json.loads((tmp_path / 'run/summary.json').read_text())
  assert (summary['model_revision'], summary['data_revision']) == (old, rows)
  done = train(2, HF_HUB_OFFLINE='1')
  assert 'Continuing after round 1' in done.stdout, done.stderr
  hub.repositories['models/org/tiny'].commit(scaled(2))
  done = train(3)
  assert done.returncode == 2
  assert f'Give that model (config.model), which was its revision @{old}' in done.stderr
  done = train(3, f'org/tiny@{old}')
  assert 'Continuing after round 2' in done.stdout, done.stderr
  out = tmp_path / 'adapter'
  run('launch.export', f'--workdir={tmp_path}/run', f'--out={out}')
  about = json.loads((out / 'adapter_config.json').read_text())
  assert (about['base_model_name_or_path'], about['revision']) == ('org/tiny', old)


if __name__ == '__main__':
  _main(sys.argv[1:])
