"""Our round against what a researcher would pick instead, on the same work.

python -m benchmarks.peers --peers_python=.venv-bench/bin/python \
  [--config=configs/chitchat_gemma3.py] [--clients=5] [--repeats=5]

The peers: torch + transformers + peft, clients one after another
(peer_torch.py), and Flower's simulation engine driving it (peer_flower.py). The
same clients, ranks, examples, targets and optimizer on all sides; a unit is a
loss-bearing target token, and our rounds include building the cohort. The best
of peft's types and two paddings is found first, on one client's chats; then
rounds alternate. `dense` is a second case, in which every position is a target and
nothing is padded. Prints a table and writes benchmarks/results/peers.json.
"""

import math
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import child, machine
from hetlora_jax import base_model, config, experiment, flops, sharding
from hetlora_jax.data import packing
from hetlora_jax.data.people import Example
from hetlora_jax.models import decoder
from hetlora_jax.models.pretrained import sources
from hetlora_jax.types import Batch, Cohort

_CONFIG = machine.define_config()
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Alternating rounds.')
_CLIENTS = flags.DEFINE_integer('clients', 5, 'Clients a round; 0: the config.')
_DTYPES = flags.DEFINE_list(
  'dtypes', machine.dtypes(), 'Types peft is tried in: those that it can.'
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


def chat_cohort(x: experiment.Experiment) -> Cohort:
  """Returns the cohort of round 0, in numpy."""
  cohorts = experiment.make_cohorts(x, 0)
  return jax.tree.map(lambda leaf: np.asarray(leaf[0, 0]), cohorts)


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
  cohort = chat_cohort(x)
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
      cohorts = experiment.make_cohorts(x, 0)
    else:
      cohorts = sharding.place(
        jax.tree.map(lambda leaf: leaf[None, None], cohort),
        sharding.over_clients(x.mesh),
      )
    self.state, out = x.run_rounds(x.base, self.state, cohorts, x.hyper)
    out = jax.device_get(out)
    return {
      'seconds': time.perf_counter() - start,
      'tokens': int(out['tokens'].sum()),
      'peak_mb': machine.peak_mb(),
    }


def _rate(answer: dict) -> float:
  return answer['tokens'] / answer['seconds']


def best_variant(
  peer: child.Peer, case: str, dtypes, paddings
) -> tuple[dict, list]:
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


def check_same_work(
  x: experiment.Experiment, cohort: Cohort, first_loss: float
):
  """Raises if the peer's first step had another loss than ours has.

  Adapters start at nothing, so it is the base's loss on the same targets.
  """
  batch = jax.tree.map(lambda leaf: leaf[0, 0], cohort.batches)
  total, tokens = jax.jit(x.rules.loss)(
    x.base, x.initial_state.adapters, jnp.float32(1), batch
  )
  ours = float(total / tokens)
  if abs(ours - first_loss) > 0.01 * ours:
    raise ValueError(
      f'not the same work: first loss {first_loss}, ours {ours}.'
    )


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
  held = flops.held(cohort, np.ones(1, int))
  slots = held._replace(
    tokens=cohort.batches.tokens.size, targets=cohort.batches.target.size
  )

  def operations(work: flops.Work) -> float:
    by_kind = flops.needed(model, {}, work)
    return by_kind['frozen'] + by_kind['head']

  return {
    'peft': operations(held._replace(tokens=padded, targets=padded)),
    'ours_with_padding': operations(slots),
    'needed': operations(held),
  }


def alternate(contenders: dict) -> dict:
  """Times rounds in turn, `ours` against each of the others.

  Args:
    contenders: name -> function that runs a round.
  """
  for run in contenders.values():
    run()  # compiles, loads
  rounds = []
  for _ in range(_REPEATS.value):
    rounds.append({name: run() for name, run in contenders.items()})
    tokens = {name: a['tokens'] for name, a in rounds[-1].items()}
    if len(set(tokens.values())) > 1:
      raise ValueError(f'not the same work: target tokens are {tokens}.')
    print(
      ', '.join(f'{k} {_rate(a):.1f} tokens/s' for k, a in rounds[-1].items()),
      flush=True,
    )
  ratios = {
    name: statistics.median(_rate(r['ours']) / _rate(r[name]) for r in rounds)
    for name in contenders
  }
  return {'ratios': ratios, 'rounds': rounds}


def _table(name: str, case: dict) -> None:
  print(f'\n{name:<8}{"tokens/s":>10}{"ours is":>9}{"peak MB":>9}')
  for who, ratio in case['ratios'].items():
    answers = [r[who] for r in case['rounds']]
    rate = statistics.median(map(_rate, answers))
    memory = max(a['peak_mb'] for a in answers)
    print(f'{who:<8}{rate:>10.1f}{ratio:>8.2f}x{memory:>9.0f}')


def main() -> None:
  child.check()
  raw = _CONFIG.value
  raw.federated.clients_per_round = (
    _CLIENTS.value or raw.federated.clients_per_round
  )
  # As many as divide the clients, so that none is padding.
  raw.federated.clients_at_once = math.gcd(
    raw.federated.clients_at_once, raw.federated.clients_per_round
  )
  x = experiment.prepare(config.resolve(raw))
  c, model = x.config, base_model.load(x.config, x.mesh)
  rank_N, chats = x.initial_rank[0], chat_cohort(x)
  dense = dense_cohort(x, model.config.vocab_size)
  work = {
    'gguf': str(sources.resolve(c.model.source).path.resolve()),
    'targets': c.lora.targets, 'scale': c.lora.scale,
    'learning_rate': c.client_optimizer.learning_rate,
    'threads': os.cpu_count(),
    'cases': {
      'chat': workload(chats, rank_N), 'dense': workload(dense, rank_N),
    },
  }  # fmt: skip
  peft = child.Peer('peer_torch.py', work)
  variant, tried = best_variant(peft, 'chat', _DTYPES.value, ('longest', '128'))
  check_same_work(x, chats, tried[0]['first_loss'])
  flower, ours = child.Peer('peer_flower.py', work), Ours(x)
  chat = alternate({
    'ours': lambda: ours(None), 'peft': lambda: peft(variant),
    'flower': lambda: flower(variant),
  })  # fmt: skip
  flower.close()
  # After the chats, so that their peak memory is theirs.
  dense_variant, dense_tried = best_variant(
    peft, 'dense', [variant['dtype']], ('longest',)
  )
  full = alternate({
    'ours': lambda: ours(dense), 'peft': lambda: peft(dense_variant),
  })  # fmt: skip
  peft.close()
  versions = {'jax': jax.__version__}
  for answer in chat['rounds'][0].values():
    versions |= answer.get('versions', {})
  counted = arithmetic(model.config, work['cases']['chat'], chats)
  result = {
    'loss_tokens_ratio_vs_peft': chat['ratios']['peft'],
    'loss_tokens_ratio_vs_flower': chat['ratios']['flower'],
    'dense_ratio_vs_peft': full['ratios']['peft'],
    'flops_of_the_chat_round': counted,
    'model': c.model.source, 'clients': c.federated.clients_per_round,
    'our_dtype': base_model.compute_dtype(c).name,
    'peers_variant': {'chat': variant, 'dense': dense_variant},
    'versions': versions, 'machine': machine.describe(),
    'chat': chat, 'dense': full, 'tried': tried + dense_tried,
  }  # fmt: skip
  machine.write(_OUT.value, result)
  _table('chat', chat)
  _table('dense', full)
  print('\nGFLOP of the chats: ' + ', '.join(f'{k} {v / 1e9:.0f}' for k, v in counted.items()))  # fmt: skip


if __name__ == '__main__':
  machine.run(main)
