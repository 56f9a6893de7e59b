"""Our round against torch + peft, which trains clients one after another.

python -m benchmarks.peers --peers_python=.venv-peers/bin/python \
  [--config=configs/chitchat_gemma3.py] [--clients=10] [--repeats=5]

The same clients, ranks, examples, targets and optimizer on both sides; a unit
is a loss-bearing target token. The peer's best of two types and two paddings is
found first; then rounds alternate. Ours include building the cohort. `dense` is
a second case, in which every position is a target and nothing is padded.
Prints a table and writes benchmarks/results/peers.json.
"""

import datetime
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import tempfile
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from hetlora_jax import base_model, config, experiment, sharding
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example
from hetlora_jax.models.pretrained import sources
from hetlora_jax.types import Batch, Cohort

_CONFIG = config_flags.DEFINE_config_file(
  'config', 'configs/chitchat_gemma3.py', 'Experiment whose round is timed.'
)
_PYTHON = flags.DEFINE_string(
  'peers_python', '.venv-peers/bin/python', 'Python with torch and peft.'
)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Alternating rounds.')
_CLIENTS = flags.DEFINE_integer('clients', 0, 'Clients a round; 0: the config.')
_DTYPES = flags.DEFINE_list(
  'dtypes', ['float32', 'bfloat16'], 'Types the peer is tried in.'
)
_OUT = flags.DEFINE_string('out', 'benchmarks/results/peers.json', 'Result.')
_DENSE_LENGTH = 128


def examples_of(batch: Batch) -> list[dict]:
  """Returns the examples packed into one step, for the peer."""
  out, columns = [], batch.tokens.shape[1]
  live = batch.weight > 0
  row, column = np.divmod(batch.target_index[live], columns)
  owner = batch.segment[row, column]
  for segment in range(1, int(batch.segment.max()) + 1):
    tokens = batch.tokens[batch.segment == segment].tolist()
    targets = batch.target[live][owner == segment]
    out.append(
      {'tokens': [*tokens, int(targets[-1])], 'num_target': len(targets)}
    )
  return out


def workload(cohort: Cohort, rank_N) -> list[dict]:
  """Returns every client's rank and steps."""
  cohort, clients = jax.device_get(cohort), []
  for c, who in enumerate(cohort.client_id):
    if cohort.num_examples[c] == 0:
      continue
    batches = jax.tree.map(lambda x, c=c: x[c], cohort.batches)
    steps = [
      examples_of(jax.tree.map(lambda x, s=s: x[s], batches))
      for s in range(batches.tokens.shape[0])
    ]
    clients.append({'rank': int(rank_N[who]), 'steps': steps})
  return clients


def dense_cohort(x: experiment.Experiment, vocabulary: int) -> Cohort:
  """Returns a cohort whose rows are full and bear loss at every position."""
  f, rng = x.config.federated, np.random.default_rng(0)

  def step():
    tokens = rng.integers(3, vocabulary, (f.local_batch, _DENSE_LENGTH + 1))
    return packing.pack(
      [Example(row.astype(np.int32), _DENSE_LENGTH) for row in tokens],
      f.local_batch, _DENSE_LENGTH, f.local_batch * _DENSE_LENGTH,
    )  # fmt: skip

  stack = lambda many: jax.tree.map(lambda *x: np.stack(x), *many)  # noqa: E731
  cohort = experiment.make_cohort(x, 0)
  clients = len(cohort.client_id)
  return Cohort(
    client_id=np.asarray(cohort.client_id),
    num_examples=np.full(clients, f.local_batch, np.float32),
    batches=stack(
      [stack([step() for _ in range(f.local_steps)]) for _ in range(clients)]
    ),
  )


class Ours:
  """Runs our rounds; the state goes on from one to the next."""

  def __init__(self, x: experiment.Experiment):
    self.x, self.state = x, x.initial_state

  def __call__(self, cohort: Cohort | None) -> dict:
    """Times a round, of round 0's cohort built anew if none is given."""
    x, start = self.x, time.perf_counter()
    if cohort is None:
      cohort = experiment.make_cohort(x, 0)
    else:
      cohort = jax.device_put(cohort, sharding.over_clients(x.mesh))
    self.state, out = x.run_round(x.base, self.state, cohort, x.hyper)
    out = jax.device_get(out)
    return {
      'seconds': time.perf_counter() - start,
      'tokens': int(out['tokens'].sum()),
      'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


class Peer:
  """The child process."""

  def __init__(self, work: dict):
    self._folder = tempfile.TemporaryDirectory()
    path = pathlib.Path(self._folder.name, 'workload.json')
    path.write_text(json.dumps(work))
    script = str(pathlib.Path(__file__).with_name('peer_torch.py'))
    self._child = subprocess.Popen(
      [_PYTHON.value, script, str(path)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

  def __call__(self, **ask) -> dict:
    print(json.dumps(ask), file=self._child.stdin, flush=True)
    for line in self._child.stdout:
      if line.startswith('{"seconds"'):
        return json.loads(line)
    raise RuntimeError(f'{_PYTHON.value} ended: has it torch and peft?')

  def close(self):
    self._child.stdin.close()
    self._child.wait()
    self._folder.cleanup()


def _rate(answer: dict) -> float:
  return answer['tokens'] / answer['seconds']


def best_variant(peer: Peer, case: str, paddings) -> tuple[dict, list]:
  """Returns the peer's fastest variant of a case, and all that were tried."""
  tried = []
  for dtype in _DTYPES.value:
    for padding in paddings:
      ask = {'case': case, 'dtype': dtype, 'padding': padding}
      tried.append({**ask, **peer(**ask)})
      print(f'peft {dtype} padded to {padding}: {_rate(tried[-1]):.1f} target tokens/s', flush=True)  # fmt: skip
  best = max(tried, key=_rate)
  return {k: best[k] for k in ('case', 'dtype', 'padding')}, tried


def alternate(ours: Ours, cohort, peer: Peer, variant: dict) -> dict:
  """Times both in turn."""
  ours(cohort)  # compiles
  peer(**variant)  # loads
  rounds = [(ours(cohort), peer(**variant)) for _ in range(_REPEATS.value)]
  assert all(a['tokens'] == b['tokens'] for a, b in rounds)
  ratios = [_rate(a) / _rate(b) for a, b in rounds]
  return {
    'ratio': statistics.median(ratios),
    'ratios': ratios,
    'ours': [a for a, _ in rounds],
    'peft': [b for _, b in rounds],
    'variant': variant,
  }


def main(argv) -> None:
  del argv
  raw = _CONFIG.value
  raw.federated.clients_per_round = (
    _CLIENTS.value or raw.federated.clients_per_round
  )
  x = experiment.prepare(config.resolve(raw))
  c, model = x.config, base_model.load(x.config)
  rank_N = np.asarray(x.initial_state.memory.rank)[:, 0]
  dense = dense_cohort(x, model.config.vocab_size)
  peer = Peer({
    'gguf': str(sources.resolve(c.model.source).path.resolve()),
    'targets': c.lora.targets, 'scale': c.lora.scale,
    'learning_rate': c.client_optimizer.learning_rate,
    'threads': os.cpu_count(),
    'cases': {
      'chat': workload(experiment.make_cohort(x, 0), rank_N),
      'dense': workload(dense, rank_N),
    },
  })  # fmt: skip
  ours = Ours(x)
  variant, tried = best_variant(peer, 'chat', ('longest', '128'))
  chat = alternate(ours, None, peer, variant)
  dense_variant, dense_tried = best_variant(peer, 'dense', ('longest',))
  full = alternate(ours, dense, peer, dense_variant)
  peer.close()
  result = {
    'loss_tokens_ratio_vs_peft': chat['ratio'],
    'dense_ratio_vs_peft': full['ratio'],
    'chat': chat, 'dense': full, 'tried': tried + dense_tried,
    'clients': c.federated.clients_per_round, 'model': c.model.source,
    'our_dtype': base_model.compute_dtype(c).name,
    'clients_at_once': c.federated.clients_at_once,
    'versions': {'jax': jax.__version__, **chat['peft'][0]['versions']},
    'machine': f'{platform.machine()}, {os.cpu_count()} cores, '
    f'{_processor()}', 'date': datetime.date.today().isoformat(),
  }  # fmt: skip
  path = pathlib.Path(_OUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(result, indent=2) + '\n')
  print(f'{"":<8}{"ours tok/s":>12}{"peft tok/s":>12}{"ratio":>8}{"ours MB":>10}{"peft MB":>10}')  # fmt: skip
  for name, case in (('chat', chat), ('dense', full)):
    mine, theirs = (statistics.median(map(_rate, case[k])) for k in ('ours', 'peft'))  # fmt: skip
    memory = (max(a['peak_mb'] for a in case[k]) for k in ('ours', 'peft'))
    print(f'{name:<8}{mine:>12.1f}{theirs:>12.1f}{case["ratio"]:>8.2f}' + ''.join(f'{m:>10.0f}' for m in memory))  # fmt: skip


def _processor() -> str:
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line for line in lines if line.startswith('model name')]  # fmt: skip
  return names[0].partition(': ')[2] if names else platform.processor()


if __name__ == '__main__':
  app.run(main)
