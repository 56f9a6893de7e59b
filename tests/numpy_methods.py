"""Every method in slow, plain NumPy, from the formulas of its paper.

Ragged ranks, loops over clients and matrices, float64; nothing is shared with
the library but the shapes. A is [d_in, r], B [r, d_out], delta W = s A B.
Adapters are {(target, layer): (a, b)}.
"""

import copy
import dataclasses
import math

import numpy as np

EPS = np.finfo(np.float32).eps


@dataclasses.dataclass
class Setup:
  """What a run is made of; randomness comes from the test."""

  slots: int
  scale: object  # rank -> s
  rate: float
  penalty: float
  gamma: float
  r_min: int
  mu: float
  energy: float
  fresh: object  # (round, who) -> {(t, layer): A [d_in, R]}
  chosen: object  # (round, who) -> {(t, layer): slots}
  prefix: object  # (round, who, step) -> rank
  wire: object = None  # (values, axis of a vector) -> rounded; None: all arrives
  feedback: bool = False  # whether clients remember what rounding took


@dataclasses.dataclass
class State:
  """The server's side; `base` changes in full fine-tuning only."""

  adapters: dict
  residual: dict
  rank: list
  base: dict
  start: dict  # the base before the first round
  personal: dict = dataclasses.field(default_factory=dict)
  lost: dict = dataclasses.field(default_factory=dict)  # (who, key, 0 or 1) -> [.., R]
  round: int = 0


def frobenius(x):
  return math.sqrt((x * x).sum())


def clients(cohort):
  """Yields (person, examples, batches) of those that are not padding."""
  for c, who in enumerate(cohort.client_id):
    if cohort.num_examples[c] > 0:
      yield (
        int(who),
        float(cohort.num_examples[c]),
        {
          k: {n: v[c] for n, v in x.items()} if isinstance(x, dict) else x[c]
          for k, x in cohort.batches.items()
        },
      )


def steps(batches):
  for step in range(batches['weight'].shape[0]):
    if batches['weight'][step].sum() > 0:
      yield step


def gradient(weight, batches, key, step):
  """Returns d loss / d W of one matrix, W being all that is applied."""
  x, y = batches[key[0]]['x'][step], batches[key[0]]['y'][step]
  mask = batches['weight'][step]
  return x.T @ ((x @ weight - y) * mask[:, None]) / mask.sum()


def train(
  state, setup, who, batches, sent, scale, *, shared='ab', fixed='', fresh=False,
  places=None, **options,
):  # fmt: skip
  """Runs a client between the wire's two ways; returns what the server has of it.

  The server sends its factors, and adds the change that comes back to its own.

  Args:
    shared: factors that are sent at all.
    fixed: those that everybody knows without.
    fresh: whether the client drew its own, so that it sends them, not their change.
    places: {key: the slots of R that its columns are}; None: the first.
  """
  q = setup.wire or (lambda x, axis: x)

  def arrives(x, f, axis):
    down = f in shared and f not in fixed and not fresh
    return q(x, axis) if down else x

  start = {k: (arrives(a, 'a', 0), arrives(b, 'b', 1)) for k, (a, b) in sent.items()}
  trained = local_steps(state, setup, batches, start, scale, **options)
  out = {}
  for k, now in trained.items():
    out[k] = list(now)
    for i, f in enumerate('ab'):
      if f not in shared or not options.get(f'train_{f}', True):
        out[k][i] = now[i] if f not in shared else sent[k][i]
        continue
      change = now[i] if fresh else now[i] - start[k][i]
      told = np.zeros_like(change)
      lost = state.lost.setdefault((who, k, i), {})  # slot -> what was lost of it
      for column in options.get('slots', {k: range(change.shape[1 - i])})[k]:
        slot = column if places is None else places[k][column]
        at = (slice(None), column) if i == 0 else column
        wanted = change[at] + (lost.get(slot, 0) if setup.feedback else 0)
        told[at] = q(wanted, 0)
        lost[slot] = wanted - told[at]
      out[k][i] = told if fresh else sent[k][i] + told
    out[k] = tuple(out[k])
  return out


def local_steps(
  state, setup, batches, sent, scale, *,
  train_a=True, train_b=True, slots=None, kept=None, mu=0.0, prefix=None,
):  # fmt: skip
  """Runs SGD on one client.

  Args:
    slots: {key: the slots that train}; None is all.
    kept: where HetLoRA's tail begins.
    mu: of FedProx.
    prefix: step -> how many first slots this step uses.
  """
  now = {k: (a.copy(), b.copy()) for k, (a, b) in sent.items()}
  for step in steps(batches):
    new = {}
    for k, (a, b) in now.items():
      q = a.shape[1] if prefix is None else prefix(step)
      frozen = state.base[k[0]][k[1]] + state.residual[k]
      grad_w = gradient(frozen + scale * a[:, :q] @ b[:q], batches, k, step)
      grad_a, grad_b = np.zeros_like(a), np.zeros_like(b)
      grad_a[:, :q] = scale * grad_w @ b[:q].T
      grad_b[:q] = scale * a[:, :q].T @ grad_w
      if kept is not None:
        norm_a, norm_b = frobenius(a[:, kept:]), frobenius(b[kept:])
        if norm_a > 0:
          grad_a[:, kept:] += setup.penalty * norm_b * a[:, kept:] / norm_a
        if norm_b > 0:
          grad_b[kept:] += setup.penalty * norm_a * b[kept:] / norm_b
      grad_a += mu * (a - sent[k][0])
      grad_b += mu * (b - sent[k][1])
      live = np.ones(a.shape[1])
      if slots is not None:
        live[:] = 0
        live[slots[k]] = 1
      new[k] = (
        a - setup.rate * train_a * grad_a * live,
        b - setup.rate * train_b * grad_b * live[:, None],
      )
    now = new
  return now


def first(adapters, r):
  """Truncates to rank r."""
  return {k: (a[:, :r], b[:r]) for k, (a, b) in adapters.items()}


def place(x, axis, count):
  """Pads a factor with zero slots up to `count`."""
  pad = [(0, 0), (0, 0)]
  pad[axis] = (0, count - x.shape[axis])
  return np.pad(x, pad)


def mean_of_slots(state, setup, got, weight_of, owners_only):
  """Averages factors slot by slot; a slot without owners stays.

  Args:
    got: [(examples or other weight, rank, adapters)].
    owners_only: whether a slot's weights are shared among its owners.
  """
  total, new = sum(weight_of(g) for g in got), {}
  for k, (a, b) in state.adapters.items():
    new_a, new_b = a.copy(), b.copy()
    for j in range(setup.slots):
      owners = [g for g in got if g[1] > j]
      if not owners:
        continue
      share = sum(weight_of(g) for g in owners) if owners_only else total
      new_a[:, j] = sum(weight_of(g) * g[2][k][0][:, j] for g in owners) / share
      new_b[j] = sum(weight_of(g) * g[2][k][1][j] for g in owners) / share
    new[k] = (new_a, new_b)
  return new


def examples(g):
  return g[0]


# Homogeneous LoRA: everybody trains all R slots.


def homogeneous(state, cohort, setup, **options):
  """Trains everybody at rank R; returns [(examples, R, adapters)]."""
  scale = setup.scale(setup.slots)
  return [
    (n, setup.slots, train(state, setup, who, b, state.adapters, scale, **options))
    for who, n, b in clients(cohort)
  ]


def fedit(state, cohort, setup, **options):
  """FedIT (Zhang et al., 2023, arXiv 2305.05644)."""
  got = homogeneous(state, cohort, setup, **options)
  state.adapters = mean_of_slots(state, setup, got, examples, False)


def fedprox(state, cohort, setup):
  """FedProx (Li et al., 2018, arXiv 1812.06127)."""
  fedit(state, cohort, setup, mu=setup.mu)


def ffa_lora(state, cohort, setup):
  """FFA-LoRA (Sun et al., 2024, arXiv 2403.12313): A is never trained."""
  fedit(state, cohort, setup, train_a=False, fixed='a')


def rolora(state, cohort, setup):
  """RoLoRA (Chen et al., 2024, arXiv 2409.02346): B, A, B, ..."""
  even = state.round % 2 == 0
  fedit(state, cohort, setup, train_a=not even, train_b=even)


def fedex(state, cohort, setup):
  """FedEx-LoRA (Singhal et al., 2024, arXiv 2410.09432)."""
  got = homogeneous(state, cohort, setup)
  scale, total = setup.scale(setup.slots), sum(n for n, _, _ in got)
  state.adapters = mean_of_slots(state, setup, got, examples, False)
  for k, (a, b) in state.adapters.items():
    exact = sum(n / total * scale * x[k][0] @ x[k][1] for n, _, x in got)
    state.residual[k] = state.residual[k] + exact - scale * a @ b


def fedsa_lora(state, cohort, setup):
  """FedSA-LoRA (Guo et al., 2024, arXiv 2410.01463): B stays at home."""
  got, scale = [], setup.scale(setup.slots)
  for who, n, batches in clients(cohort):
    own = state.personal.get(who, {})
    sent = {
      k: (a, own[k][1] if own else np.zeros_like(b))
      for k, (a, b) in state.adapters.items()
    }
    state.personal[who] = train(state, setup, who, batches, sent, scale, shared='a')
    got.append((n, state.personal[who]))
  total = sum(n for n, _ in got)
  state.adapters = {
    k: (sum(n / total * x[k][0] for n, x in got), b)
    for k, (_, b) in state.adapters.items()
  }


def local_only(state, cohort, setup):
  """Every client for itself, at its own rank."""
  for who, _, batches in clients(cohort):
    r = state.rank[who]
    sent = state.personal.get(who) or first(state.adapters, r)
    state.personal[who] = train(
      state, setup, who, batches, sent, setup.scale(r), shared=''
    )


def full_finetuning(state, cohort, setup):
  """FedAvg (McMahan et al., 2017, arXiv 1602.05629) on the base itself."""
  q, total = setup.wire or (lambda x, axis: x), sum(n for _, n, _ in clients(cohort))
  change = {t: np.zeros_like(w) for t, w in state.base.items()}
  for _, n, batches in clients(cohort):
    told = {t: q(w - state.start[t], -1) for t, w in state.base.items()}
    begin = {t: state.start[t] + w for t, w in told.items()}
    own = {t: w.copy() for t, w in begin.items()}
    for step in steps(batches):
      for t, w in own.items():
        for layer in range(len(w)):
          w[layer] -= setup.rate * gradient(w[layer], batches, (t, layer), step)
    for t, w in own.items():
      change[t] += n / total * q(w - begin[t], -1)
  state.base = {t: w + change[t] for t, w in state.base.items()}


# Truncation to each client's rank.


def truncated(state, cohort, setup, prefix=None):
  """Trains everybody at their own rank; returns [(examples, r, adapters)]."""
  got = []
  for who, n, batches in clients(cohort):
    r = state.rank[who]
    of_step = None
    if prefix is not None:
      of_step = lambda step, who=who: prefix(state.round, who, step)  # noqa: E731
    sent = first(state.adapters, r)
    trained = train(state, setup, who, batches, sent, setup.scale(r), prefix=of_step)
    got.append((n, r, trained))
  return got


def zero_pad(state, cohort, setup):
  """Zero-padding FedAvg."""
  got = truncated(state, cohort, setup)
  state.adapters = mean_of_slots(state, setup, got, examples, False)


def rbla(state, cohort, setup):
  """RBLA (arXiv 2408.08699): the mean over a slot's owners."""
  got = truncated(state, cohort, setup)
  state.adapters = mean_of_slots(state, setup, got, examples, True)


def prelort(state, cohort, setup):
  """PreLort (arXiv 2606.15963): one prefix a step, owners' mean."""
  got = truncated(state, cohort, setup, prefix=setup.prefix)
  state.adapters = mean_of_slots(state, setup, got, examples, True)


def hetlora(state, cohort, setup):
  """HetLoRA (Cho et al., 2024, arXiv 2401.06432)."""
  got = []
  for who, _, batches in clients(cohort):
    r = state.rank[who]
    kept, scale = math.floor(round(setup.gamma * r, 6)), setup.scale(r)
    sent = first(state.adapters, r)
    trained = train(state, setup, who, batches, sent, scale, kept=kept)

    def tail(adapters, kept=kept):
      return sum(
        frobenius(a[:, kept:]) * frobenius(b[kept:]) for a, b in adapters.values()
      )

    if tail(trained) < tail(sent) and r > setup.r_min:
      r = state.rank[who] = max(kept, setup.r_min)
    trained = first(trained, r)
    square = sum(frobenius(scale * a @ b) ** 2 for a, b in trained.values())
    got.append((math.sqrt(square), r, trained))
  state.adapters = mean_of_slots(state, setup, got, examples, False)


# Random slots.


def fed_plora(state, cohort, setup):
  """Fed-PLoRA (arXiv 2602.16936): all slots forward, chosen ones trained."""
  got = []
  for who, n, batches in clients(cohort):
    slots, scale = setup.chosen(state.round, who), setup.scale(state.rank[who])
    trained = train(state, setup, who, batches, state.adapters, scale, slots=slots)
    got.append((n, slots, trained))
  for k, (a, b) in list(state.adapters.items()):
    new_a, new_b = a.copy(), b.copy()
    for j in range(setup.slots):
      owners = [g for g in got if j in g[1][k]]
      total = sum(n for n, _, _ in owners)
      if owners:
        new_a[:, j] = sum(n / total * x[k][0][:, j] for n, _, x in owners)
        new_b[j] = sum(n / total * x[k][1][j] for n, _, x in owners)
    state.adapters[k] = (new_a, new_b)


def fslora(state, cohort, setup):
  """FSLoRA (arXiv 2501.19389): B S A with S = R / r on chosen slots."""
  got = []
  for who, n, batches in clients(cohort):
    slots, r = setup.chosen(state.round, who), state.rank[who]
    sent = {k: (a[:, slots[k]], b[slots[k]]) for k, (a, b) in state.adapters.items()}
    scale = setup.scale(r) * setup.slots / r
    trained = train(state, setup, who, batches, sent, scale, places=slots)
    got.append((n, slots, sent, trained))
  total = sum(n for n, *_ in got)
  for k, (a, b) in list(state.adapters.items()):
    new_a, new_b = a.copy(), b.copy()
    for n, slots, sent, trained in got:
      new_a[:, slots[k]] += n / total * (trained[k][0] - sent[k][0])
      new_b[slots[k]] += n / total * (trained[k][1] - sent[k][1])
    state.adapters[k] = (new_a, new_b)


# Products.


def svd(delta):
  u, sigma, v = np.linalg.svd(delta, full_matrices=False)
  for j in range(len(sigma)):
    if u[np.abs(u[:, j]).argmax(), j] < 0:
      u[:, j], v[j] = -u[:, j], -v[j]
  return u, sigma, v


def refactor(delta, scale, before, slots, power=0.5):
  """Returns A = u sigma**power, B = sigma**(1 - power) v of `delta / scale`.

  A slot without a singular value keeps the A of before, beside B = 0.
  """
  u, sigma, v = svd(delta / scale)
  a, b = before[0].copy(), np.zeros_like(before[1])
  for j in range(min(slots, len(sigma))):
    if sigma[j] > sigma[0] * max(delta.shape) * EPS:
      a[:, j] = u[:, j] * sigma[j] ** power
      b[j] = sigma[j] ** (1 - power) * v[j]
  return a, b


def energy_rank(sigma, share):
  held = np.cumsum(sigma**2)
  return int((held < share * held[-1]).sum()) + 1


def products(state, cohort, setup, owners_only):
  """Returns sum_k w_k s_k A_k B_k; slots that nobody owns are the server's."""
  server_scale, got = setup.scale(setup.slots), []
  for who, n, batches in clients(cohort):
    r = state.rank[who]
    scale = setup.scale(r)
    move = math.sqrt(server_scale / scale)
    sent = {k: (move * a, move * b) for k, (a, b) in first(state.adapters, r).items()}
    got.append((n, r, scale, train(state, setup, who, batches, sent, scale)))
  total, highest = sum(n for n, *_ in got), max(r for _, r, *_ in got)
  out = {}
  for k, (a, b) in state.adapters.items():
    out[k] = server_scale * a[:, highest:] @ b[highest:]
    for j in range(highest):
      share = sum(n for n, r, *_ in got if r > j) if owners_only else total
      for n, r, scale, x in got:
        if r > j:
          out[k] += n / share * scale * np.outer(x[k][0][:, j], x[k][1][j])
  return out


def flexlora(state, cohort, setup, owners_only=False):
  """FlexLoRA (Bai et al., 2024, arXiv 2402.11505)."""
  scale = setup.scale(setup.slots)
  deltas = products(state, cohort, setup, owners_only)
  for k, delta in deltas.items():
    state.adapters[k] = refactor(delta, scale, state.adapters[k], setup.slots)


def raflora(state, cohort, setup):
  """raFLoRA (arXiv 2602.13486): every slot's weights among its owners."""
  flexlora(state, cohort, setup, owners_only=True)


def fedmomentum(state, cohort, setup):
  """FedMomentum (arXiv 2603.08014): the rest of the energy into the base."""
  scale = setup.scale(setup.slots)
  for k, delta in products(state, cohort, setup, False).items():
    state.adapters[k] = refactor(delta, scale, state.adapters[k], setup.slots)
    u, sigma, v = svd(delta)
    rest = slice(setup.slots, energy_rank(sigma, setup.energy))
    state.residual[k] = state.residual[k] + as_sent(
      setup, u[:, rest] * sigma[rest], v[rest]
    )


def as_sent(setup, a, b):
  """Returns the product of factors that the server made and sends."""
  q = setup.wire or (lambda x, axis: x)
  return q(a, 0) @ q(b, 1) if a.size else a @ b


def stacked(state, cohort, setup):
  """Trains everybody from fresh adapters; returns sum_k p_k s_k A_k B_k."""
  total = sum(n for _, n, _ in clients(cohort))
  out = {k: np.zeros_like(x) for k, x in state.residual.items()}
  for who, n, batches in clients(cohort):
    r, fresh = state.rank[who], setup.fresh(state.round, who)
    sent = {
      k: (fresh[k][:, :r], np.zeros((r, b.shape[1])))
      for k, (_, b) in state.adapters.items()
    }
    trained = train(state, setup, who, batches, sent, setup.scale(r), fresh=True)
    for k, (a, b) in trained.items():
      out[k] += n / total * setup.scale(r) * a @ b
  return out


def flora(state, cohort, setup):
  """FLoRA (Wang et al., 2024, arXiv 2409.05976): stack, fold all."""
  for k, delta in stacked(state, cohort, setup).items():
    state.residual[k] = state.residual[k] + delta


def florist(state, cohort, setup):
  """FLoRIST (arXiv 2506.09199): fold the directions with enough energy."""
  for k, delta in stacked(state, cohort, setup).items():
    u, sigma, v = svd(delta)
    p = energy_rank(sigma, setup.energy)
    state.residual[k] = state.residual[k] + as_sent(setup, u[:, :p] * sigma[:p], v[:p])


METHODS = {
  f.__name__: f
  for f in (
    fedit, fedprox, ffa_lora, rolora, fedex, fedsa_lora, local_only,
    full_finetuning, zero_pad, rbla, prelort, hetlora, fed_plora, fslora,
    flexlora, raflora, fedmomentum, flora, florist,
  )
} | {'centralized': fedit}  # fmt: skip


def run(method, adapters, rank, base, cohorts, setup):
  """Runs all cohorts in turn and returns the last state."""
  state = State(
    adapters=copy.deepcopy(adapters),
    residual={k: np.zeros((a.shape[0], b.shape[1])) for k, (a, b) in adapters.items()},
    rank=list(rank),
    base={t: np.asarray(w, np.float64) for t, w in base.items()},
    start={t: np.asarray(w, np.float64) for t, w in base.items()},
  )  # fmt: skip
  for cohort in cohorts:
    METHODS[method](state, cohort, setup)
    state.round += 1
  return state
