"""The same round by torch + transformers + peft, one client after another.

Our weights, drawn here, are written as a Hugging Face folder, so that the peer
trains the very model; tokens, ranks, steps and optimizer are those of our round.
Its best setting is found on a few clients: kernels of attention, padding, and one
adapter of the largest rank whose other slots are zero (which trains as a smaller
one does), compiled once by torch.compile.
"""

import pathlib
import sys
import tempfile

import jax
import numpy as np

from benchmarks import chats, child, machine, work
from hetlora_jax import base_model
from hetlora_jax.models.pretrained import hugging_face

_CLIENTS = (8, 64)
_WARM = 2  # clients, before a variant is timed
_VARIANTS = (
  {'padding': 'longest', 'attention': 'sdpa'},
  {'padding': 'longest', 'attention': 'eager'},
  {'padding': '136', 'attention': 'sdpa'},
  {'padding': '136', 'attention': 'sdpa', 'compiled': True},
)


def measure(keep) -> None:
  """Times the peer's rounds, each of its variants first on a few clients."""
  smoke = machine.SMOKE.value
  counts = (2,) if smoke else _CLIENTS
  kind = {} if smoke else {'shape': 'gemma3_270m', 'model__dtype': 'bfloat16'}
  x = chats.prepare(clients=max(counts), at_once=1, **kind)
  model = base_model.load(x.config, x.mesh)
  cohort = work.first_cohort(x)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    params = jax.tree.map(np.asarray, model.params)
    hugging_face.write(folder, model.config, params, model.tokenizer)
    workload = work.for_peers(x, folder, {'chat': cohort})
    peer = child.Peer('peer_torch.py', workload, python=sys.executable)
    result = _rounds(peer, counts, keep)
    peer.close()
  ours, theirs = work.first_loss(x, cohort), result['tried'][0]['first_loss']
  keep(result | {'first_loss': {'ours': ours, 'peft': theirs}})
  work.check_same(ours, theirs)


def _rounds(peer: child.Peer, counts: tuple[int, ...], keep) -> dict:
  dtype = 'float32' if machine.SMOKE.value else 'bfloat16'
  tried, few = [], counts[0]
  for variant in _VARIANTS[:2] if machine.SMOKE.value else _VARIANTS:
    ask = {'case': 'chat', 'dtype': dtype, **variant}
    peer(ask | {'clients': min(_WARM, few)})
    answer = peer(ask | {'clients': few})
    tried.append(ask | answer)
    told = answer.get('failed') or f'{rate(answer):.0f} target tokens/s'
    print(f'peft, {variant}: {told}', flush=True)
    keep({'tried': tried})
  best = max(tried, key=rate)
  fastest_plain = max((t for t in tried if not t.get('compiled')), key=rate)
  rounds = {}
  for name, variant in (('plain', fastest_plain), ('best', best)):
    ask = {k: variant[k] for k in ('case', 'dtype', 'padding', 'attention')}
    ask |= {'compiled': variant.get('compiled', False)}
    rounds[name] = {str(n): peer(ask | {'clients': n}) for n in counts}
  result = {'tried': tried, 'rounds': rounds}
  keep(result)
  return result


def rate(answer: dict) -> float:
  """Returns target tokens a second, 0 of a variant that failed."""
  return 0.0 if 'failed' in answer else answer['tokens'] / answer['seconds']


def ratios(result: dict, ours: dict) -> dict[str, dict[str, float]]:
  """Returns how many times as fast our best round of so many clients is.

  The peer's rate at 512 clients is that at 64: it trains them one by one.

  Args:
    result: of `measure`.
    ours: the rounds of the same model, of `rounds.measure_shape`.
  """
  out: dict = {}
  for name, answers in result['rounds'].items():
    for key, row in ours.items():
      clients = key.split()[0]
      theirs = answers.get(clients) or answers[max(answers, key=int)]
      if int(clients) >= min(map(int, answers)) and 'round_s' in row:
        faster = row['target_tokens_per_s'] / rate(theirs)
        best = out.setdefault(name, {}).get(clients, 0)
        out[name][clients] = max(best, faster)
  return out


def report(result: dict) -> str:
  """Tells the peer's variants."""
  rows = [
    [
      f'padded to {t["padding"]}, attention {t["attention"]}'
      + (', compiled' if t.get('compiled') else ''),
      t.get('failed') or f'{rate(t):,.0f}', f'{t.get("device_mb", 0) / 1e3:.2f}',
    ]
    for t in result['tried']
  ]  # fmt: skip
  head = 'torch + peft, a client after another | target tokens/s | GB'
  return machine.table(head, rows)
