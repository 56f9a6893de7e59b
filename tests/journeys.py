"""What the author of a paper does with own data, from a clean clone to PEFT.

Command: python -m tests.journeys [--keep DIR], 4 minutes on 2 cores. It clones
this checkout's last commit, installs it into an environment of its own and there goes
from own JSON Lines of 30 clients to statistics, three methods of two seeds, the table
of paired differences in LaTeX, the report, and an adapter that the real peft loads, in
the environment of the peers (`make .venv-bench/done`).

The texts are real: what the modules of Python's library say their functions do.
"""

import argparse
import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
MODULES = (  # clients, of 4 to 40 documented functions each
  'argparse', 'ast', 'asyncio', 'base64', 'bisect', 'calendar', 'codecs', 'collections',
  'configparser', 'contextlib', 'copy', 'csv', 'datetime', 'decimal', 'difflib',
  'enum', 'functools', 'heapq', 'logging', 'inspect', 'itertools', 'json', 'math',
  'operator', 'os', 'random', 'shutil', 'statistics', 'subprocess', 'textwrap',
)  # fmt: skip
METHODS = ('hetlora', 'fedit', 'flexlora')
SEEDS = (0, 1)
LEAST = 0.5  # nats a token that the adapter gains in peft

# What peft makes of the folders: the loss a token of texts, without and with the adapter.
IN_PEFT = """
import json, sys
import peft, torch, transformers
base, adapter, texts = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(base)
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

def loss(model):
  found = []
  for text in json.load(open(texts)):
    ids = tokenizer(text, return_tensors='pt').input_ids
    with torch.no_grad():
      found.append(model(input_ids=ids, labels=ids).loss.item())
  return sum(found) / len(found)

before = loss(model.eval())
adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
print(json.dumps({'before': before, 'after': loss(adapted)}))
"""


def lines_of(module: str) -> list[dict]:
  """Returns a client's examples: a function's name, and what it says it does."""
  found = []
  for name, thing in sorted(vars(importlib.import_module(module)).items()):
    told = callable(thing) and inspect.getdoc(thing)
    if told and not name.startswith('_'):
      target = told.splitlines()[0]
      found.append({'client': module, 'context': f'{module}.{name}', 'target': target})
  return found[:40]


def write_data(path: pathlib.Path) -> list[dict]:
  """Writes the JSON Lines of all clients and returns them."""
  lines = [line for module in MODULES for line in lines_of(module)]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return lines


def run(*words: object, cwd: pathlib.Path) -> str:
  """Runs a command, shows it and its time, and returns what it printed."""
  words, start = [str(word) for word in words], time.time()
  print(f'$ {" ".join(words)}'[:200], flush=True)
  done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f'{done.stdout}{done.stderr}\nended with {done.returncode}')
  print(f'  {time.time() - start:.0f} s', flush=True)
  return done.stdout


def install(folder: pathlib.Path) -> pathlib.Path:
  """Clones and installs the last commit; returns the folder of its programs."""
  clone = folder / 'clone'
  run('git', 'clone', '--quiet', ROOT, clone, cwd=folder)
  run('make', 'install', cwd=clone)
  return clone / '.venv/bin'


def journey(folder: pathlib.Path, programs: pathlib.Path) -> dict[str, float]:
  """Goes from texts to a table, a report and an adapter; checks each but the last.

  Returns what the texts lose a token in peft, in nats, before and after the adapter.
  """
  lines = write_data(folder / 'mine.jsonl')
  print(f'{len(lines)} examples of {len(MODULES)} clients.')
  own = ('--config.data.name=text_folder', '--config.data.path=mine.jsonl')

  # Statistics name every client.
  told = run(programs / 'hetlora-data', '--dataset=text_folder', '--path=mine.jsonl',
             '--stats', cwd=folder)  # fmt: skip
  assert str(len(MODULES)) in told and f'{len(lines):,}' in told, told

  # Three methods of two seeds, and the paired differences between them.
  methods = ','.join(f'"{m}"' for m in METHODS)
  told = run(
    programs / 'hetlora-sweep', '--config=configs/tiny.py', *own,
    '--config.federated.num_rounds=10', '--workdir=grid',
    f'--grid=method=[{methods}] x seed=[{",".join(map(str, SEEDS))}]', cwd=folder,
  )  # fmt: skip
  for method in METHODS:
    assert method in told, told
  latex = (folder / 'grid/sweep.tex').read_text()
  assert latex.count(r'\begin{tabular}') == latex.count(r'\end{tabular}') == 1
  gaps = re.findall(r'\$[-+]\d\.\d{3} \[.*?\]\$', latex)
  assert len(gaps) == 2 * (len(METHODS) - 1), latex  # seen and unseen, but of the first

  # The report is one page, beside the grid.
  told = run(programs / 'hetlora-report', 'grid', cwd=folder)
  assert f'compares {len(METHODS) * len(SEEDS)} runs' in told, told
  page = (folder / 'grid/report.html').read_text()
  assert all(method in page for method in METHODS)

  # The adapter of one run and its base, loaded by peft, which finds the texts likelier.
  run_of = sorted((folder / 'grid').glob('method=hetlora*'))[0]
  for kind in ('base', 'peft'):
    run(programs / 'hetlora-export', f'--workdir={run_of}', f'--format={kind}',
        f'--out={kind}', cwd=folder)  # fmt: skip
  texts = [f'B: {line["context"]}\nA: {line["target"]}\n' for line in lines[::40]]
  (folder / 'texts.json').write_text(json.dumps(texts))
  peft = ROOT / '.venv-bench/bin/python'
  told = run(peft, '-c', IN_PEFT, 'base', 'peft', 'texts.json', cwd=folder)
  found = json.loads(told.splitlines()[-1])
  print(
    f'In peft: {found["before"]:.3f} nats a token before, {found["after"]:.3f} after.'
  )
  return found


def main() -> None:
  """Makes the whole journey."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--keep', type=pathlib.Path, help='Folder to make and to keep.')
  keep, start = parser.parse_args().keep, time.time()
  run('make', '.venv-bench/done', cwd=ROOT)
  with tempfile.TemporaryDirectory() as name:
    folder = keep or pathlib.Path(name)
    folder.mkdir(parents=True, exist_ok=keep is None)
    found = journey(folder, install(folder))
  if not found['after'] < found['before'] - LEAST:
    raise SystemExit('The adapter makes the texts no likelier.')
  print(f'From a clone to peft in {(time.time() - start) / 60:.1f} minutes.')


if __name__ == '__main__':
  sys.exit(main())
