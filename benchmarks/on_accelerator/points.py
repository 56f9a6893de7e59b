"""Points of a sweep at once, and rounds in a call: what either saves."""

import concurrent.futures

from benchmarks import machine
from benchmarks.on_accelerator.rounds import Round

_SHAPE, _CLIENTS = 'gemma3_270m', 8
# Points of a sweep, how many of them a device trains at once, rounds a call.
_PLAN = ((1, 1, 1), (1, 1, 10), (4, 4, 1))
_SMOKE_PLAN = ((2, 2, 2),)


def _round(points: int, at_once: int, rounds: int) -> Round:
  clients = 2 if machine.smoke() else _CLIENTS
  return Round(
    '' if machine.smoke() else _SHAPE, clients, clients, seeds=points,
    mesh__points_at_once=at_once, federated__rounds_per_call=rounds,
    federated__num_rounds=10 * rounds, checkpoint__every=rounds,
  )  # fmt: skip


def measure(keep) -> None:
  """Times rounds of eight clients, for each plan."""
  plan = _SMOKE_PLAN if machine.smoke() else _PLAN
  made = [_round(*sizes) for sizes in plan]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(lambda one: one.compile(), made))
  rows: list[dict] = []
  for (points, at_once, rounds), one in zip(plan, made, strict=True):
    sizes = {'points': points, 'at_once': at_once, 'rounds_a_call': rounds}
    rows.append(sizes | one.time())
    print(rows[-1], flush=True)
    keep({'clients': one.x.config.federated.clients_per_round, 'rows': rows})


def report(result: dict) -> str:
  """Tells the milliseconds of a round of one point."""
  head = (
    'points | at once | rounds a call | ms a round of a point | of that, on the device'
  )
  rows = [
    [str(row['points']), str(row['at_once']), str(row['rounds_a_call']),
     f'{1e3 * row["round_s"]:.1f}', f'{1e3 * row["device_s"]:.1f}']
    for row in result['rows']
  ]  # fmt: skip
  return f'{machine.table(head, rows)}\n\n{result["clients"]} clients a round.'
