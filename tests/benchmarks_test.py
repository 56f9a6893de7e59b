"""Every benchmark runs at tiny sizes, and pages tell what files say."""

import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import figures, machine

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'benchmarks'
# Where torch, peft and Flower are; without it only what is ours runs.
PEERS_PYTHON = ROOT / '.venv-bench' / 'bin' / 'python'
PEERS = [] if PEERS_PYTHON.exists() else ['--nopeers']
# Arguments of a smoke, where they are not just --smoke --out.
WORDS = {
  'peers': PEERS,
  'generation': PEERS,
  'accelerator': ['--minutes=9'],
}
# Modules that others use, and children in another virtual environment.
NO_PROGRAMS = {
  'child', 'machine', 'peer_flower', 'peer_generate', 'peer_torch', 'profiling',
  'study_plots', 'study_stats', 'study_tables', 'work',
}  # fmt: skip
PROGRAMS = sorted({path.stem for path in FOLDER.glob('[!_]*.py')} - NO_PROGRAMS)
WITHOUT_RESULT = ('figures', 'study', 'study_report')
RESULTS = sorted((FOLDER / 'results').glob('*.json'))


def run(*words: str) -> subprocess.CompletedProcess:
  # On one device, as they are run; the tests' eight are theirs.
  flags = re.sub(r'--\S*device_count=8', '', os.environ['XLA_FLAGS'])
  return subprocess.run(
    [sys.executable, '-m', *words], cwd=ROOT, env=os.environ | {'XLA_FLAGS': flags},
    capture_output=True, text=True, check=False,
  )  # fmt: skip


def test_every_module_is_a_program_or_none():
  for name in PROGRAMS:
    assert '__main__' in (FOLDER / f'{name}.py').read_text(), name


@pytest.mark.parametrize(
  'name', [p for p in PROGRAMS if p not in ('chats', 'figures')]
)
def test_benchmark_runs(name, tmp_path):
  out = tmp_path / 'result.json'
  words = [f'benchmarks.{name}', '--smoke', *WORDS.get(name, [])]
  if name not in WITHOUT_RESULT:
    words.append(f'--out={out}')
  done = run(*words)
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.strip()
  if name in WITHOUT_RESULT:
    return
  result = json.loads(out.read_text())
  assert result['machine'].keys() >= {'processor', 'device', 'date', 'commit'}
  assert 'nan' not in out.read_text().lower()
  told = importlib.import_module(f'benchmarks.{name}').report(result)
  assert machine.told(result['machine']) in told
  assert told in done.stdout
  if name == 'accelerator':
    check_parts(result['parts'])


def check_parts(parts):
  """All parts are done, but for the peer where there is no torch."""
  assert len(parts) > 5
  for name, part in parts.items():
    peer_is_missing = name == 'peft' and not PEERS_PYTHON.exists()
    assert part['done'] or (
      peer_is_missing and '--peers_python' in part['problem']
    ), (name, part.get('problem'))
  assert max(parts['methods']['result']['from_cpu'].values()) < 1e-4
  assert all(x['equal'] for x in parts['resume']['result']['runs'])


def test_a_profile_names_operations(capsys):
  done = run('benchmarks.client_step', '--smoke', '--profile')
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'layers' in done.stdout and 'dot_general' in done.stdout


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
      spot = text.index(f': {file} -->')
      digit = re.search(r'\d', text[spot + len(file) + 6 :])
      at = spot + len(file) + 6 + digit.start()
      wrong = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
      assert figures.filled(wrong) == text


def test_numbers_of_benchmarks_are_in_blocks():
  """A line of README or docs that names a benchmark that keeps its result gives
  no number of its own beside it."""
  for page in figures.pages():
    rest = figures._BLOCK.sub('', page.read_text())
    for paragraph in re.split(r'\n\s*\n', rest):
      for name in re.findall(r'python -m benchmarks\.(\w+)', paragraph):
        if name in WITHOUT_RESULT:
          continue
        measured = re.findall(
          r'\d[\d.,]*\s?(?:x|s|ms|MB|GB|%|times|tokens|TFLOP|GFLOP)\b',
          paragraph,
        )
        assert not measured, (page.name, name, measured)


def test_an_unexpected_word_is_one_line():
  done = run('benchmarks.limit', 'smoke')
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1 and "'smoke'" in done.stderr
