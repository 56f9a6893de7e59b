"""Our round against what a researcher would pick instead, on the same work.

python -m benchmarks.peers --peers_python=.venv-bench/bin/python \
  [--config=configs/chitchat_gemma3.py] [--clients=5] [--repeats=5]

The peers: torch + transformers + peft, clients one after another
(peer_torch.py), and Flower's simulation engine driving it (peer_flower.py). The
same clients, ranks, examples, targets and optimizer on all sides; a unit is a
loss-bearing target token, and our rounds include building the cohort. The best
of peft's types and two paddings is found first, on one client's chats; then
rounds alternate. `dense` is a second case, in which every position is a target and
nothing is padded.
"""

import math
import statistics
import time

import jax
import numpy as np
from absl import flags

from benchmarks import child, machine, work
from hetlora_jax import base_model, config, points, sharding
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example
from hetlora_jax.models import decoder
from hetlora_jax.tools import flops
from hetlora_jax.types import Cohort

machine.define_config()
_CLIENTS = flags.DEFINE_integer('clients', 5, 'Clients a round; 0: the config.')
_DTYPES = flags.DEFINE_list(
  'dtypes', machine.dtypes(), 'Types peft is tried in: those that it can.'
)
_DENSE_LENGTH = 128


def dense_cohort(x: points.Points, vocabulary: int) -> Cohort:
  """Returns a cohort whose rows are full and bear loss at every position."""
  f, rng = x.config.federated, np.random.default_rng(0)

  def step():
    tokens = rng.integers(3, vocabulary, (f.local_batch, _DENSE_LENGTH + 1))
    return packing.pack(
      [Example(row.astype(np.int32), _DENSE_LENGTH) for row in tokens],
      packing.BatchShape(f.local_batch, _DENSE_LENGTH, f.local_batch * _DENSE_LENGTH),
    )

  stack = lambda many: jax.tree.map(lambda *x: np.stack(x), *many)  # noqa: E731
  cohort = work.first_cohort(x)
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

  def __init__(self, x: points.Points):
    self.x, self.state = x, x.initial_state

  def __call__(self, cohort: Cohort | None) -> dict:
    """Times a round, of round 0's cohort built anew if none is given."""
    x, start = self.x, time.perf_counter()
    if cohort is None:
      cohorts = points.make_cohorts(x, 0)
    else:
      cohorts = sharding.place(
        jax.tree.map(lambda leaf: leaf[None, None], cohort),
        sharding.over_clients(x.experiment.mesh),
      )
    self.state, out = points.call(x, self.state, cohorts)
    out = jax.device_get(out)
    return {
      'seconds': time.perf_counter() - start,
      'tokens': int(out['tokens'].sum()),
      'peak_mb': machine.peak_mb(),
    }


def _rate(answer: dict) -> float:
  return answer['tokens'] / answer['seconds']


def best_variant(peer: child.Peer, case: str, dtypes, paddings) -> tuple[dict, list]:
  """Returns the fastest variant of a case for one client, and all tries.

  A type that is a third as fast as the best is tried no further.
  """
  tried: list[dict] = []
  for dtype in dtypes:
    for padding in paddings:
      ask = {'case': case, 'dtype': dtype, 'padding': padding, 'clients': 1}
      tried.append({**ask, **peer(ask)})
      print(
        f'peft, {case}, {dtype}, padded to {padding}: '
        f'{_rate(tried[-1]):.1f} target tokens/s',
        flush=True,
      )
      if 3 * _rate(tried[-1]) < max(map(_rate, tried)):
        break
  best = max(tried, key=_rate)
  return {k: best[k] for k in ('case', 'dtype', 'padding')}, tried


def arithmetic(
  model: decoder.DecoderConfig, clients: list[dict], cohort: Cohort
) -> dict[str, float]:
  """Counts the frozen and head products of a round in peft, and in ours.

  peft puts every position of a batch, padded to its longest, through the body
  and the head; `needed` is what real tokens and targets take.
  """
  steps = [step for client in clients for step in client['steps']]
  padded = sum(
    len(step) * max(len(example['tokens']) for example in step)
    for step in steps
    if step
  )
  real = flops.count_work(cohort, np.ones(1, int))
  slots = real._replace(
    tokens=cohort.batches.tokens.size, targets=cohort.batches.target.size
  )

  def operations(work: flops.Work) -> float:
    by_kind = flops.count_flops(model, {}, work)
    return by_kind['frozen'] + by_kind['head']

  return {
    'peft': operations(real._replace(tokens=padded, targets=padded)),
    'ours_with_padding': operations(slots),
    'needed': operations(real),
  }


def alternate(contenders: dict) -> dict:
  """Times rounds in turn, `ours` against each of the others.

  Args:
    contenders: name -> function that runs a round.
  """
  for run in contenders.values():
    run()  # compiles, loads
  rounds = []
  for _ in range(machine.repeats()):
    rounds.append({name: run() for name, run in contenders.items()})
    tokens = {name: a['tokens'] for name, a in rounds[-1].items()}
    if len(set(tokens.values())) > 1:
      raise ValueError(f'not the same work: target tokens are {tokens}.')
    print(
      ', '.join(f'{k} {_rate(a):.1f} tokens/s' for k, a in rounds[-1].items()),
      flush=True,
    )
  each = {
    name: [_rate(r['ours']) / _rate(r[name]) for r in rounds] for name in contenders
  }
  return {
    'ratios': {name: statistics.median(x) for name, x in each.items()},
    'ratios_of_rounds': each,
    'rounds': rounds,
  }


def _prepare() -> points.Points:
  raw = machine.config()
  clients = _CLIENTS.value if not machine.smoke() else 2
  raw.federated.clients_per_round = clients or raw.federated.clients_per_round
  # As many as divide the clients, so that none is padding.
  raw.federated.clients_at_once = math.gcd(
    raw.federated.clients_at_once, raw.federated.clients_per_round
  )
  return points.prepare(config.resolve(raw))


def _time_all(x: points.Points, workload: dict, cohorts: dict) -> dict:
  """Times both cases, with the peers if they are asked for."""
  ours = Ours(x)
  if not child.PEERS.value:
    return {
      case: alternate({'ours': lambda cohort=cohort: ours(cohort)})
      for case, cohort in cohorts.items()
    }
  peft = child.Peer('peer_torch.py', workload)
  variant, tried = best_variant(peft, 'chat', _DTYPES.value, ('longest', '128'))
  work.check_same(work.first_loss(x, cohorts['chat']), tried[0]['first_loss'])
  flower = child.Peer('peer_flower.py', workload)
  chat = alternate({
    'ours': lambda: ours(None), 'peft': lambda: peft(variant),
    'flower': lambda: flower(variant),
  })  # fmt: skip
  flower.close()
  # After the chats, so that their peak memory is theirs.
  dense_variant, dense_tried = best_variant(
    peft, 'dense', [variant['dtype']], ('longest',)
  )
  dense = alternate({
    'ours': lambda: ours(cohorts['dense']), 'peft': lambda: peft(dense_variant),
  })  # fmt: skip
  peft.close()
  return {
    'chat': chat, 'dense': dense, 'tried': tried + dense_tried,
    'peers_variant': {'chat': variant, 'dense': dense_variant},
  }  # fmt: skip


def measure() -> dict:
  """Times rounds of both cases; see the module."""
  if child.PEERS.value:
    child.check()
  x = _prepare()
  model = x.experiment.model.decoder
  cohorts = {
    'chat': work.first_cohort(x), 'dense': dense_cohort(x, model.vocab_size)
  }  # fmt: skip
  with work.model_files(x) as files:
    workload = work.for_peers(x, files, cohorts)
    for case, cohort in cohorts.items():
      first = workload['cases'][case][0]
      work.check_same(work.first_loss(x, cohort), work.plain_loss(x, first))
    timed = _time_all(x, workload, cohorts)
  versions = {'jax': jax.__version__}
  for answer in timed['chat']['rounds'][0].values():
    versions |= answer.get('versions', {})
  return timed | {
    'flops_of_the_chat_round': arithmetic(
      model, workload['cases']['chat'], cohorts['chat']
    ),
    'model': x.config.model.source,
    'clients': x.config.federated.clients_per_round,
    'our_dtype': base_model.compute_dtype(x.config).name,
    'versions': versions,
  }  # fmt: skip


def _row(result: dict, case: str, name: str) -> list[str]:
  """Returns the cells of a case: rates, ratios with their range, memory."""
  found = result[case]
  cells = [name]
  for who in ('ours', 'peft', 'flower'):
    answers = [r[who] for r in found['rounds'] if who in r]
    rate = statistics.median(map(_rate, answers)) if answers else None
    cells.append(f'{rate:.1f}' if rate else '')
  for who in ('peft', 'flower'):
    each = found['ratios_of_rounds'].get(who)
    cells.append(
      f'**{statistics.median(each):.2f}x** ({min(each):.2f} to {max(each):.2f})'
      if each
      else ''
    )
  cells.append(
    ', '.join(
      f'{max(r[who]["peak_mb"] for r in found["rounds"]) / 1e3:.1f}'
      for who in found['rounds'][0]
    )
  )
  return cells


def line(result: dict) -> str:
  """Tells the main numbers in a sentence."""
  chat, dense = result['chat']['ratios'], result['dense']['ratios']
  return (
    f'On {machine.told(result["machine"])}, a round of Gemma 3 270M on chats is '
    f'**{chat["peft"]:.1f} times** as fast as torch + peft and '
    f'**{chat["flower"]:.1f} times** as fast as Flower on the same work (both in '
    f'{result["peers_variant"]["chat"]["dtype"]}, their best; ours in '
    f'{result["our_dtype"]}); {dense["peft"]:.1f} times as fast as peft if every '
    'position is a target.'
  )


def report(result: dict) -> str:
  """Tells rates, ratios and memory."""
  head = (
    f'{result["model"]}, target tokens/s | ours | peft | Flower | ours is '
    'faster than peft | than Flower | GB, in this order'
  )
  rows = [
    _row(result, 'chat', 'chats'),
    _row(result, 'dense', 'dense: every position is a target'),
  ]
  counted = ', '.join(
    f'{name.replace("_", " ")} {x / 1e9:.0f}'
    for name, x in result['flops_of_the_chat_round'].items()
  )
  variant = result.get('peers_variant', {}).get('chat', {})
  theirs = variant.get('dtype', 'not run')
  versions = ', '.join(f'{k} {v}' for k, v in result['versions'].items())
  return (
    f'{machine.table(head, rows)}\n\n{result["clients"]} clients a round; ours '
    f'in {result["our_dtype"]}, peft in {theirs} (its best); GFLOP of the chats: '
    f'{counted}. {versions}. {machine.told(result["machine"])}.'
  )


if __name__ == '__main__':
  machine.run('peers', measure, report)
