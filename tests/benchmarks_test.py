"""Every benchmark runs at tiny sizes, and pages tell what files say."""

import importlib
import json
import pathlib
import re
import subprocess
import xml.etree.ElementTree

import jax
import pytest
from absl import flags

from benchmarks import figures, machine, pictures
from tests import programs

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'benchmarks'
# Where torch, peft and Flower are; without it only what is ours runs.
PEERS = (ROOT / '.venv-bench' / 'bin' / 'python').exists()
# Modules that others use, and children in another virtual environment.
NO_PROGRAMS = {
  'child', 'machine', 'peer_flower', 'peer_generate', 'peer_torch', 'profiling',
  'study_plots', 'study_stats', 'study_tables', 'work',
}  # fmt: skip
PROGRAMS = {path.stem for path in FOLDER.glob('[!_]*.py')} - NO_PROGRAMS
# These run in this process, the others as programs.
HERE = (
  'capacity', 'client_step', 'evaluation', 'generation', 'growth', 'levers',
  'limit', 'peers', 'resume',
)  # fmt: skip
RESULTS = sorted((FOLDER / 'results').glob('*.json'))


def module_of(name: str):
  return importlib.import_module(f'benchmarks.{name}')


@pytest.fixture
def smoke():
  module_of('child')  # defines --peers
  given, parsed = flags.FLAGS, flags.FLAGS.is_parsed()
  given.mark_as_parsed()
  # No flagsaver: it forgets flags that libraries define while they are used.
  given.smoke, given.peers = True, False
  yield
  given.smoke, given.peers, given.result = False, True, None
  if not parsed:
    given.unparse_flags()


def run(*words: str) -> subprocess.CompletedProcess:
  return programs.run(*words, XLA_FLAGS=programs.ONE_DEVICE)


def check(name: str, result: dict) -> str:
  """Checks what every result has; returns what is told of it."""
  assert result['machine'].keys() >= {'processor', 'device', 'date', 'commit'}
  assert 'nan' not in json.dumps(result).lower()
  told = module_of(name).report(result)
  assert machine.told(result['machine']) in told
  return told


def test_every_program_is_run_by_a_test():
  programs = {*HERE, 'start', 'grid', 'accelerator', 'study', 'study_report'}
  assert programs | {'chats', 'figures', 'pictures'} == PROGRAMS
  for name in PROGRAMS:
    assert '__main__' in (FOLDER / f'{name}.py').read_text(), name


@pytest.mark.parametrize('name', HERE)
def test_benchmark_runs(name, smoke):
  result = {'machine': machine.describe()} | module_of(name).measure()
  assert len(check(name, json.loads(json.dumps(result)))) > 200


def test_a_start_is_timed(smoke):
  start = module_of('start')
  once = start.child()
  assert list(once.values())[:-1] == sorted(list(once.values())[:-1])  # but the MB
  found = {'cold': once, 'warm': once, 'host': start.waiting(), 'model': 'random'}
  assert 'first round' in check('start', {'machine': machine.describe()} | found)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'more'), [('start', ()), ('grid', ('--fake_devices=2',)), ('grid', ())]
)
def test_benchmark_runs_as_a_program(name, more, tmp_path):
  out = tmp_path / 'result.json'
  words = (f'benchmarks.{name}', '--smoke', f'--result={out}')
  done = run(*words, *more)
  assert done.returncode == 0, done.stderr[-3000:]
  assert check(name, json.loads(out.read_text())) in done.stdout


@pytest.mark.slow  # study_test.py does its parts
@pytest.mark.parametrize('name', ['study', 'study_report'])
def test_study_runs(name):
  done = run(f'benchmarks.{name}', '--smoke')
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'hetlora_0.99' in done.stdout or 'results.md is what' in done.stdout


def test_readmes_pictures_are_what_is_drawn_now():
  for path, text in pictures.drawn().items():
    xml.etree.ElementTree.fromstring(text)
    assert path.read_text() == text, f'{path.name}: python -m benchmarks.pictures'


def check_parts(out: pathlib.Path, names: set[str]) -> dict:
  result = json.loads(out.read_text())
  parts = result['parts']
  assert parts.keys() == names
  for name, part in parts.items():
    assert part['done'], (name, part['problem'])
  assert check('accelerator', result)
  return {name: part['result'] for name, part in parts.items()}


def test_methods_are_compared_with_those_of_a_cpu(smoke):
  methods = importlib.import_module('benchmarks.on_accelerator.methods')
  wanted, before = machine.read(methods.CPU), jax.config.jax_default_matmul_precision
  exact, coarse = (
    methods.all_runs(precision, methods.methods())
    for precision in ('highest', 'bfloat16')
  )
  jax.config.update('jax_default_matmul_precision', before)
  assert methods.apart(exact, wanted['probes'])['hetlora'] < methods.LIMIT
  assert 1e-4 < methods.distance(coarse, exact)['hetlora'] < 0.3


@pytest.mark.slow
def test_the_accelerator_is_checked_against_a_cpu(tmp_path):
  out = tmp_path / 'gpu.json'
  words = ('benchmarks.accelerator', '--smoke', f'--result={out}')
  done = run(*words, '--parts=methods')
  assert done.returncode == 0, done.stderr[-3000:]
  found = check_parts(out, {'methods'})
  assert max(found['methods']['from_cpu'].values()) < 1e-4
  assert 1e-4 < max(found['methods']['bfloat16'].values()) < 0.3
  # A file of another device is not mixed with this one's.
  result = json.loads(out.read_text())
  result['machine']['device'] = 'NVIDIA H900'
  out.write_text(json.dumps(result))
  done = run(*words)
  assert done.returncode == 2
  assert 'is of a NVIDIA H900, and this is a cpu' in done.stderr


def test_a_part_that_fails_or_is_cut_off_says_so(smoke, tmp_path, monkeypatch):
  accelerator, out = module_of('accelerator'), tmp_path / 'gpu.json'
  here = machine.describe()
  flags.FLAGS.result = str(out)
  accelerator._run(['resume'], here, 1.0)
  monkeypatch.setenv('JAX_PLATFORMS', 'abacus')
  accelerator._run(['kernels'], here, 60.0)
  parts = json.loads(out.read_text())['parts']
  assert not any(part['done'] for part in parts.values())
  assert parts['resume']['problem'] == 'cut off after 1 s'
  assert 'abacus' in parts['kernels']['problem']


@pytest.mark.slow
def test_all_parts_of_the_accelerators_check(tmp_path):
  out = tmp_path / 'gpu.json'
  done = run('benchmarks.accelerator', '--smoke', f'--result={out}', '--minutes=20')
  assert done.returncode == 0, done.stderr[-3000:]
  names = {'methods', 'resume', 'gemma3_270m', 'peft', 'kernels', 'points'}
  found = check_parts(out, names)
  assert all(x['equal'] for x in found['resume']['runs'])


@pytest.mark.parametrize('part', ['rounds', 'points', 'kernels'])
def test_parts_of_the_accelerators_check(part, smoke):
  module, kept = (
    importlib.import_module(f'benchmarks.on_accelerator.{part}'),
    [],
  )
  if part == 'rounds':
    module.measure_plan('gemma3_270m', kept.append)
    assert [x['tokens_per_s'] > 0 for x in kept[-1]['rounds'].values()] == [
      1,
      1,
    ]
    assert sum(x['share'] for x in kept[-1]['kernels']) > 0.3
  else:
    module.measure(kept.append)
  assert '|' in module.report(json.loads(json.dumps(kept[-1])))


@pytest.mark.skipif(not PEERS, reason='no .venv-bench; `make bench` makes it')
@pytest.mark.parametrize('name', ['peers', 'generation'])
def test_peers_do_the_same_work(name, tmp_path):
  out = tmp_path / 'result.json'
  done = run(f'benchmarks.{name}', '--smoke', f'--result={out}')
  assert done.returncode == 0, done.stderr[-3000:]
  check(name, json.loads(out.read_text()))


def test_a_profile_names_operations(smoke, capsys):
  module_of('client_step').profile()
  told = capsys.readouterr().out
  assert 'layers' in told and len(told.splitlines()) > 20


@pytest.mark.parametrize('path', RESULTS, ids=lambda path: path.stem)
def test_results_say_what_was_measured_where_and_when(path):
  assert json.loads(path.read_text())['machine'].keys() >= {
    'processor', 'cores', 'date', 'jax', 'commit'
  }  # fmt: skip


def test_pages_tell_what_the_files_say():
  for page in figures.pages():
    text = page.read_text()
    assert figures.filled(text) == text, f'{page.name}: make figures'


def test_every_result_is_told_on_a_page():
  asked = {
    file for page in figures.pages() for _, file in figures.asked(page.read_text())
  }  # fmt: skip
  inputs = {'chats', 'accelerator_cpu'}  # of other benchmarks
  for path in RESULTS:
    assert path.stem in inputs or str(path.relative_to(ROOT)) in asked, path


def test_a_page_with_another_number_is_noticed():
  for page in figures.pages():
    text = page.read_text()
    for _, file in figures.asked(text):
      start = text.index(f': {file} -->') + len(file) + 6
      at = start + re.search(r'\d', text[start:]).start()
      wrong = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
      assert figures.filled(wrong) == text


def test_numbers_of_benchmarks_are_in_blocks():
  """A paragraph that tells how to run a benchmark has no number of its own."""
  for page in figures.pages():
    if page.name == 'log.md':
      continue  # dated entries, which stay as they were
    rest = figures._BLOCK.sub('', page.read_text())
    for paragraph in re.split(r'\n\s*\n', rest):
      for name in re.findall(r'python -m benchmarks\.(\w+)', paragraph):
        measured = re.findall(
          r'\d[\d.,]*\s?(?:x|s|ms|MB|GB|%|times|tokens/s|tokens a second|TFLOP|GFLOP)\b',
          paragraph,
        )
        assert name in ('study', 'study_report') or not measured, (
          page.name, name, measured
        )  # fmt: skip


def test_an_unexpected_word_is_one_line():
  done = run('benchmarks.limit', 'smoke')
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1 and "'smoke'" in done.stderr
