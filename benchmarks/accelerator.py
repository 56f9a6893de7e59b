"""What an accelerator makes of our rounds, part by part, the most valuable first.

python -m benchmarks.accelerator --result=benchmarks/results/gpu_h100.json \
  [--minutes=8] [--parts=methods,peft,...]

Needs no network, weights or data: weights are random, in published shapes, and
tokens random, as long as those of real chats. Every part is a process of its own
and leaves its result in --result, as far as it came; run again, the line goes on with
parts that are not done, and --parts repeats those that it names.

The machine needs hetlora_jax with the extra `cuda` or `tpu` and, for the part that
compares, torch, transformers and peft. Where there is no network, but Python 3.12
with jax, flax, optax and orbax-checkpoint, what else is needed travels as wheels:

bash benchmarks/accelerator_wheels.sh   # here: fetches them into .whl/

python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl  # there
PYTHONPATH=/tmp/site python3 -m benchmarks.accelerator --commit=$COMMIT --result=...

Then commit the file, name it in docs/gpu.md, and `make figures`.

python -m benchmarks.accelerator --reference

writes what a CPU computes in the rounds of every method, for the first part.
"""

import contextlib
import fcntl
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from benchmarks import machine
from benchmarks.on_accelerator import methods, peft, resume

_MINUTES = flags.DEFINE_float('minutes', 8, 'No part goes on longer.', 0)
_PARTS = flags.DEFINE_list('parts', [], 'Parts to run again, and no others.')
_PART = flags.DEFINE_string('part', None, 'Be the child that runs this part.')
_REFERENCE = flags.DEFINE_bool(
  'reference', False, "Write a CPU's numbers, to compare with."
)
_OUT = 'benchmarks/results/accelerator.json'
_LEAST = 10  # seconds, below which no part is begun


class Part(NamedTuple):
  """A module of on_accelerator, and the environment that it runs in."""

  module: str
  title: str
  env: dict[str, str] = {}


_ALL_MEMORY = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.93'}
# Those of the module `rounds` are named as its plans are.
PARTS = {
  'methods': Part('methods', 'Every method against the CPU'),
  'resume': Part('resume', 'Runs that are cut in two'),
  'gemma3_270m': Part('rounds', 'Gemma 3 270M, chats', _ALL_MEMORY),
  # The device is the peer's, whose own process computes on it.
  'peft': Part('peft', 'The same by torch and peft', {'JAX_PLATFORMS': 'cpu'}),
  'gemma3_1b': Part('rounds', 'Gemma 3 1B, chats', _ALL_MEMORY),
  'gemma3_4b': Part('rounds', 'Gemma 3 4B, chats', _ALL_MEMORY),
  'kernels': Part('kernels', 'Attention, and vocabulary chunks'),
  'deterministic': Part(
    'rounds',
    'Gemma 3 270M, equal to the bit when resumed',
    {'XLA_FLAGS': resume.DETERMINISTIC},
  ),
  'points': Part('points', 'Points of a sweep, and rounds a call'),
}
_TOGETHER = ('methods', 'resume')  # nothing is timed in them
_NOT_IN_SMOKE = ('gemma3_1b', 'gemma3_4b', 'deterministic')  # as gemma3_270m


def _path() -> pathlib.Path:
  if machine.RESULT.value:
    return pathlib.Path(machine.RESULT.value)
  if machine.smoke():
    raise ValueError('--smoke also needs --result=FILE: parts meet there.')
  return pathlib.Path(_OUT)


def _load() -> dict:
  return machine.read(_path()) if _path().exists() else {'parts': {}}


def _update(name: str, **found) -> None:
  """Writes what a part has found so far beside the others' results."""
  _path().parent.mkdir(parents=True, exist_ok=True)
  with _path().with_suffix('.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    result = _load()
    result['parts'][name] = result['parts'].get(name, {}) | found
    machine.write(_path(), result)


def child(name: str) -> None:
  """Runs one part in this process."""
  if name == 'describe':  # in a process of its own, which lets the device go
    return print(json.dumps(machine.describe()))
  if methods.PRECISION.value:
    return methods.child(methods.PRECISION.value)
  part = PARTS[name]
  module = importlib.import_module(f'benchmarks.on_accelerator.{part.module}')

  def keep(result: dict) -> None:
    _update(name, result=result)

  if part.module == 'rounds':
    module.measure_plan(name, keep)
  else:
    module.measure(keep)


def _command(name: str) -> list[str]:
  words = [
    f'--part={name}',
    f'--result={_path()}',
    f'--commit={machine.commit()}',
  ]
  words += [f'--smoke={machine.smoke()}']
  return [sys.executable, '-m', 'benchmarks.accelerator', *words]


def _here() -> dict[str, str]:
  """Describes this machine; raises ValueError if --result is of another device."""
  done = subprocess.run(
    _command('describe'), check=True, stdout=subprocess.PIPE, text=True
  )
  here = json.loads(done.stdout.splitlines()[-1])
  before = _load().get('machine', here)['device']
  if before != here['device']:
    raise ValueError(
      f'--result={_path()} is of a {before}, and this is a {here["device"]}: name '
      'another file.'
    )
  return here


def _run(names: Sequence[str], here: dict, seconds: float) -> None:
  """Runs parts at the same time; what goes wrong is told and kept."""
  print(f'\n== {", ".join(names)}', flush=True)
  start = time.perf_counter()
  with contextlib.ExitStack() as stack:
    running = {}
    for name in names:
      stderr = stack.enter_context(tempfile.TemporaryFile('w+'))
      _update(name, done=False, date=here['date'], commit=here['commit'])
      process = subprocess.Popen(
        _command(name), env=os.environ | PARTS[name].env, stderr=stderr,
        start_new_session=True,
      )  # fmt: skip
      running[name] = stack.enter_context(process), stderr
    for name, (process, stderr) in running.items():
      problem = _problem(process, stderr, start + seconds)
      if problem is None:
        problem = f'cut off after {seconds:.0f} s'
      took = time.perf_counter() - start
      _update(name, done=not problem, problem=problem, seconds=took)
      print(f'== {name}: {problem or "done"}, {took:.0f} s', flush=True)


def _problem(process: subprocess.Popen, stderr, until: float) -> str | None:
  """Waits for a part; returns what went wrong, None if it had to be killed."""
  try:
    process.wait(max(0, until - time.perf_counter()))
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)  # its own children too
    return None
  if not process.returncode:
    return ''
  stderr.seek(0)
  lines = stderr.read().splitlines()
  print(*lines[-40:], sep='\n', flush=True)
  named = [line for line in lines if 'Error: ' in line] or lines
  return [f'exit code {process.returncode}', *named][-1][:500]


def _write_reference() -> None:
  found = methods.probes(methods.all_runs('highest', methods.methods()))
  machine.write(methods.CPU, {'machine': machine.describe(), 'probes': found})


def report(result: dict) -> str:
  """Tells all parts that have a result."""
  parts, texts = result['parts'], []
  for name, part in PARTS.items():
    found = parts.get(name, {})
    if 'result' not in found:
      continue
    module = importlib.import_module(f'benchmarks.on_accelerator.{part.module}')
    done = '' if found['done'] else f'; {found.get("problem", "cut off")}'
    head = f'**{part.title}** ({found["date"]}, {found["commit"]}{done})'
    texts.append(f'{head}\n\n{module.report(found["result"])}')
  if ratios := ratios_to_peft(parts):
    texts.append(_told_ratios(ratios))
  return '\n\n'.join([*texts, f'{machine.told(result["machine"])}.'])


def line(result: dict) -> str:
  """Tells the main numbers in a few sentences."""
  parts = result['parts']
  rows = {
    name: parts[name]['result']['rounds']['64 clients, 64 at once']
    for name in ('gemma3_270m', 'gemma3_1b', 'gemma3_4b')
  }
  one = rows['gemma3_270m']
  faster = {name: found['64'] for name, found in ratios_to_peft(parts).items()}
  far = max(parts['methods']['result']['from_cpu'].values())
  larger = ', '.join(f'{row["share_of_peak"]:.0%}' for row in rows.values())
  return (
    f'On one {result["machine"]["device"]}, a round of 64 clients of Gemma 3 270M '
    f'on chats takes {1e3 * one["round_s"]:.0f} ms '
    f'({one["target_tokens_per_s"]:,.0f} target tokens a second), **'
    f'{faster["best"]:.0f} times** as fast as torch + peft, a client after another, '
    f'under torch.compile, and {faster["plain"]:.0f} times as fast without it; '
    f"270M, 1B and 4B reach {larger} of the chip's bfloat16 peak. Every method "
    f"there is the CPU's in float32, to {far:.0e} at most."
  )


def ratios_to_peft(parts: dict) -> dict:
  """Returns by how much our rounds are faster than the peer's, by clients."""
  ours = parts.get('gemma3_270m', {}).get('result', {}).get('rounds', {})
  theirs = parts.get('peft', {}).get('result', {})
  return peft.ratios(theirs, ours) if ours and theirs else {}


def _told_ratios(ratios: dict) -> str:
  names = {'plain': 'torch + peft', 'best': 'torch + peft, compiled'}
  clients = sorted({n for x in ratios.values() for n in x}, key=int)
  head = ' | '.join(['faster than', *[f'{n} clients a round' for n in clients]])
  rows = [
    [names[name], *[f'{found[n]:.1f}x' for n in clients]]
    for name, found in ratios.items()
  ]
  return machine.table(head, rows)


def _wanted() -> list[list[str]]:
  """Returns the names of parts to run, those together that may be."""
  done = [name for name, x in _load()['parts'].items() if x.get('done')]
  names = _PARTS.value or [name for name in PARTS if name not in done]
  if machine.smoke() and not _PARTS.value:
    names = [name for name in names if name not in _NOT_IN_SMOKE]
  together = [name for name in names if name in _TOGETHER]
  alone = [[name] for name in names if name not in _TOGETHER]
  return [together, *alone] if together else alone


def main() -> None:
  if _PART.value:
    return child(_PART.value)
  if _REFERENCE.value:
    return _write_reference()
  unknown = [name for name in _PARTS.value if name not in PARTS]
  if unknown:
    raise ValueError(f'--parts={unknown[0]} is none of {", ".join(PARTS)}.')
  end = time.perf_counter() + 60 * _MINUTES.value
  here = _here()
  machine.write(_path(), _load() | {'machine': here})
  for names in _wanted():
    left = end - time.perf_counter()
    if left < _LEAST:
      print(f'No time is left for {", ".join(names)}.', flush=True)
    else:
      _run(names, here, left)
  print('\n' + report(_load()))


if __name__ == '__main__':
  machine.start(main)
