"""The same round by torch + transformers + peft, one client after another.

Our weights, drawn here, are written as a Hugging Face folder, so that the peer
trains the very model; tokens, ranks, steps and optimizer are those of our round.
Its best setting is found on a few clients: kernels of attention, padding, an adapter
for each rank or one of the largest whose other slots are zero, and torch.compile.
"""

from benchmarks import chats, child, machine, work

_CLIENTS = (8, 64)
_ONE = {'one_adapter': True}
_PLAIN = (
  {'padding': 'longest', 'attention': 'eager', **_ONE},
  {'padding': 'longest', 'attention': 'sdpa', **_ONE},
  {'padding': 'longest', 'attention': 'eager'},  # as it is commonly used
)
_COMPILED = ({'padding': '136', 'attention': 'sdpa', 'compiled': True, **_ONE},)


def measure(keep) -> None:
  """Times the peer's rounds, each of its variants first on a few clients."""
  smoke = machine.smoke()
  counts = (2,) if smoke else _CLIENTS
  kind = {} if smoke else {'shape': 'gemma3_270m', 'model__dtype': 'bfloat16'}
  x = chats.prepare(clients=max(counts), at_once=1, **kind)
  cohort = work.first_cohort(x)
  with work.model_files(x) as files:
    workload = work.for_peers(x, files, {'chat': cohort})
    peer = child.Peer('peer_torch.py', workload, child.python_with('peft'))
    tried = _try_all(peer, x.config.model.dtype, counts, keep)
    peer.close()
  ours, theirs = work.first_loss(x, cohort), tried[0]['first_loss']
  keep({'tried': tried, 'first_loss': {'ours': ours, 'peft': theirs}})
  work.check_same(ours, theirs)


def _try_all(peer, dtype: str, counts: tuple[int, ...], keep) -> list[dict]:
  """Times variants on few clients, and the best of them on more.

  On few a round comes before, so that kernels of all its shapes are loaded.
  """
  tried: list[dict] = []

  def time(variant: dict, clients: int, warm: bool) -> None:
    ask = {'case': 'chat', 'dtype': dtype, 'clients': clients, **variant}
    if warm:
      peer(ask)
    tried.append(ask | min((peer(ask) for _ in range(1 + warm)), key=_seconds))
    told = tried[-1].get('failed') or f'{rate(tried[-1]):.0f} target tokens/s'
    print(f'peft, {clients} clients, {variant}: {told}', flush=True)
    keep({'tried': tried})

  few, *more = counts
  for variants in (_PLAIN, _COMPILED):
    if variants is _COMPILED and machine.smoke():
      continue  # a minute
    first = len(tried)
    for variant in variants:
      time(variant, few, warm=True)
    best = max(zip(tried[first:], variants, strict=True), key=_rate_of_first)[1]
    for clients in more:
      time(best, clients, warm=False)
  return tried


def _rate_of_first(pair) -> float:
  return rate(pair[0])


def _seconds(answer: dict) -> float:
  return answer['seconds']


def rate(answer: dict) -> float:
  """Returns target tokens a second, 0 of a variant that failed."""
  return 0.0 if 'failed' in answer else answer['tokens'] / answer['seconds']


def ratios(result: dict, ours: dict) -> dict[str, dict[str, float]]:
  """Returns how many times as fast our best round of so many clients is.

  The peer trains clients one by one, so its rate at more clients than were tried
  is that at the most.

  Args:
    result: of `measure`.
    ours: the rounds of the same model, of `rounds.measure_plan`.

  Returns:
    'plain' and, if it was tried, 'best', which is compiled -> clients a round ->
    ratio.
  """
  tried = {
    'plain': [t for t in result['tried'] if not t.get('compiled')],
    'best': [t for t in result['tried'] if t.get('compiled') and rate(t)],
  }
  out: dict = {}
  for name, answers in tried.items():
    for key, row in ours.items():
      clients = int(key.split()[0])
      counts = [t['clients'] for t in answers if t['clients'] <= clients]
      if not counts or 'round_s' not in row:
        continue
      theirs = max(rate(t) for t in answers if t['clients'] == max(counts))
      found = out.setdefault(name, {})
      faster = row['target_tokens_per_s'] / theirs
      found[str(clients)] = max(found.get(str(clients), 0), faster)
  return out


def report(result: dict) -> str:
  """Tells the peer's variants."""
  names = {'one_adapter': 'one adapter', 'compiled': 'torch.compile'}
  rows = [
    [
      ', '.join([
        f'attention {t["attention"]}', f'padded to {t["padding"]}',
        *[word for name, word in names.items() if t.get(name)],
      ]),
      str(t['clients']),
      t.get('failed') or f'{rate(t):,.0f}', f'{t.get("device_mb", 0) / 1e3:.2f}',
    ]
    for t in result['tried']
  ]  # fmt: skip
  head = 'torch + peft, a client after another | clients | target tokens/s | GB'
  return machine.table(head, rows)
