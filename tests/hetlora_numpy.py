"""HetLoRA in slow, plain NumPy, from the formulas of arXiv 2401.06432.

Ragged ranks, loops over clients and matrices, float64, no masks: nothing is
shared with the library but the shapes.
"""

import math


def frobenius(x):
  return math.sqrt((x * x).sum())


def tail_size(a, b, start):
  return frobenius(a[:, start:]) * frobenius(b[start:])


def train(base, sent, batches, *, scale, rate, penalty, kept):
  """Runs SGD on one client; adapters are {(target, layer): (a, b)}."""
  adapters = {k: (a.copy(), b.copy()) for k, (a, b) in sent.items()}
  for step in range(batches['weight'].shape[0]):
    weight = batches['weight'][step]
    if weight.sum() == 0:
      continue
    for (t, layer), (a, b) in adapters.items():
      x, y = batches[t]['x'][step], batches[t]['y'][step]
      error = x @ (base[t][layer] + scale * a @ b) - y
      grad_w = x.T @ (error * weight[:, None]) / weight.sum()
      grad_a, grad_b = scale * grad_w @ b.T, scale * a.T @ grad_w
      norm_a, norm_b = frobenius(a[:, kept:]), frobenius(b[kept:])
      if norm_a > 0:
        grad_a[:, kept:] += penalty * norm_b * a[:, kept:] / norm_a
      if norm_b > 0:
        grad_b[kept:] += penalty * norm_a * b[kept:] / norm_b
      adapters[t, layer] = (a - rate * grad_a, b - rate * grad_b)
  return adapters


def federated_round(
  server, rank, base, cohort, *, slots, gamma, r_min, scale, **opt
):
  """Returns the new server adapters, all ranks and the clients' weights.

  `scale` is a function of the rank that a client starts the round with.
  """
  rank, sent_back = list(rank), []
  for c, who in enumerate(cohort.client_id):
    if cohort.num_examples[c] == 0:
      continue
    r = int(rank[who])
    kept, scale_k = math.floor(round(gamma * r, 6)), scale(r)
    sent = {k: (a[:, :r], b[:r]) for k, (a, b) in server.items()}
    batches = {
      k: {n: v[c] for n, v in x.items()} if isinstance(x, dict) else x[c]
      for k, x in cohort.batches.items()
    }
    got = train(base, sent, batches, kept=kept, scale=scale_k, **opt)
    before = sum(tail_size(a, b, kept) for a, b in sent.values())
    after = sum(tail_size(a, b, kept) for a, b in got.values())
    if after < before and r > r_min:
      r = max(kept, r_min)
      rank[who] = r
    got = {k: (a[:, :r], b[:r]) for k, (a, b) in got.items()}
    norm = math.sqrt(
      sum(frobenius(scale_k * a @ b) ** 2 for a, b in got.values())
    )
    sent_back.append((r, got, norm))
  total = sum(norm for _, _, norm in sent_back)
  weights = [norm / total for _, _, norm in sent_back]
  owned = max(r for r, _, _ in sent_back)
  new = {}
  for k, (a, b) in server.items():
    # Slots that nobody trained keep the server's value.
    new_a, new_b = a.copy(), b.copy()
    new_a[:, :owned], new_b[:owned] = 0, 0
    for weight, (r, got, _) in zip(weights, sent_back, strict=True):
      new_a[:, :r] += weight * got[k][0]
      new_b[:r] += weight * got[k][1]
    new[k] = (new_a, new_b)
  return new, rank, weights
