"""From the server's new aggregate to its adapters, and what is folded away.

Redistribute = (aggregate, error, server, hyper) -> Redistributed. `aggregate`
is Adapters or Deltas, `error()` computes what averaging the factors loses of the mean
product, and `server` holds the adapters before this round. The only place with an SVD.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hetlora_jax import lora
from hetlora_jax.methods.registry import declare, rule
from hetlora_jax.types import (
  Adapters,
  Array,
  Deltas,
  Hyperparameters,
  Lora,
  Redistributed,
  Server,
)

Error = Callable[[], Deltas]  # computed only where a rule asks for it


def _nothing(rank_CM, fold_rank_M):
  del rank_CM, fold_rank_M
  return 0


@rule(
  'redistribution',
  traits=['keeps factors'],
  needs={'factor space': 'a mean of products has no factors to keep'},
  traffic=_nothing,
)
def keep(
  aggregate: Adapters, error: Error, server: Server, hyper: Hyperparameters
) -> Redistributed:
  """Takes the averaged factors as they are."""
  del error, server, hyper
  return Redistributed(aggregate, {}, {})


def _products(aggregate: Adapters | Deltas, scale: Array) -> Deltas:
  return {
    t: scale * (x.a @ x.b) if isinstance(x, Lora) else x for t, x in aggregate.items()
  }


@jax.custom_batching.sequential_vmap
def _svd_of_one(matrix: Array) -> tuple[Array, Array, Array]:
  """Decomposes [d_in, d_out], one matrix after the other, vmapped or not.

  On CPUs, jaxlib 0.10.2 hands the matrices of a batch to the threads that run
  the program, and two such calls wait for each other.
  """
  u, sigma, v = jnp.linalg.svd(matrix, full_matrices=False)
  return u, sigma, v


def _svd(delta: Array) -> tuple[Array, Array, Array]:
  """Decomposes [L, d_in, d_out]; the largest entry of each u is positive."""
  u, sigma, v = jax.lax.map(_svd_of_one, delta)
  place = jnp.abs(u).argmax(-2, keepdims=True)
  sign = jnp.sign(jnp.take_along_axis(u, place, -2))
  return u * sign, sigma, v * sign.mT


def _refactor(delta: Array, server: Lora, scale: Array, power_a: float) -> Lora:
  """Returns the best A, B of R slots with `scale A B` near delta.

  A takes sigma**power_a and B the rest. A slot without a singular value keeps
  the server's A beside B = 0, so that it can be trained again.
  """
  u, sigma, v = _svd(delta / scale)
  slots, found = server.a.shape[-1], sigma.shape[-1]
  noise = sigma[:, :1] * max(delta.shape[-2:]) * jnp.finfo(sigma.dtype).eps
  kept = min(slots, found)
  live = (sigma > noise)[:, :kept]
  sigma = jnp.where(live, sigma[:, :kept], 0)
  a = u[..., :kept] * jnp.where(live, sigma**power_a, 0)[:, None]
  b = v[:, :kept] * jnp.where(live, sigma ** (1 - power_a), 0)[..., None]
  a = jnp.where(live[:, None], a, server.a[..., :kept])
  rest = slots - kept
  return Lora(
    jnp.concatenate([a, server.a[..., kept:]], -1),
    jnp.pad(b, ((0, 0), (0, rest), (0, 0))),
  )


def svd(
  aggregate: Adapters | Deltas,
  error: Error,
  server: Server,
  hyper: Hyperparameters,
  *,
  power_a: float,
) -> Redistributed:
  """Factors the aggregate anew (FlexLoRA, 2402.11505; HLoRA, 2503.00813)."""
  del error, hyper
  deltas = _products(aggregate, server.scale)
  adapters = {
    t: _refactor(delta, server.adapters[t], server.scale, power_a)
    for t, delta in deltas.items()
  }
  return Redistributed(adapters, {}, {})


for _name, _power in (('svd_balanced', 0.5), ('svd_a', 1.0), ('svd_b', 0.0)):
  declare(
    'redistribution',
    _name,
    functools.partial(svd, power_a=_power),
    power_a=lambda product, power=_power: power,
    traffic=_nothing,
  )


def _emptied(adapters: Adapters) -> Adapters:
  return {t: Lora(x.a, jnp.zeros_like(x.b)) for t, x in adapters.items()}


@rule(
  'redistribution',
  traits=['folds', 'empties'],
  traffic=lambda rank_CM, fold_rank_M: rank_CM.sum(0),  # all factors, stacked
)
def fold_all(
  aggregate: Adapters | Deltas,
  error: Error,
  server: Server,
  hyper: Hyperparameters,
) -> Redistributed:
  """Folds the whole aggregate into the base (FLoRA, arXiv 2409.05976)."""
  del error, hyper
  deltas = _products(aggregate, server.scale)
  return Redistributed(_emptied(server.adapters), deltas, {})


def _best(delta: Array, share: Array) -> tuple[Lora, Array]:
  """Returns the best factors that keep a share of energy, and their rank."""
  u, sigma, v = _svd(delta)
  rank = lora.energy_rank(sigma**2, share)
  mask = lora.prefix_mask(rank, sigma.shape[-1])
  return Lora(u * (sigma * mask)[:, None], v), rank


@rule(
  'redistribution',
  traits=['folds', 'empties'],
  traffic=lambda rank_CM, fold_rank_M: fold_rank_M,
)
def energy(
  aggregate: Adapters | Deltas,
  error: Error,
  server: Server,
  hyper: Hyperparameters,
  *,
  on_wire: Callable[[Lora], Lora],
) -> Redistributed:
  """Folds the fewest directions with enough energy (FLoRIST, 2506.09199)."""
  del error
  best = {
    t: _best(delta, hyper.energy)
    for t, delta in _products(aggregate, server.scale).items()
  }
  sent = {t: on_wire(x) for t, (x, _) in best.items()}
  fold = {t: x.a @ x.b for t, x in sent.items()}
  rank = {t: rank for t, (_, rank) in best.items()}
  return Redistributed(_emptied(server.adapters), fold, rank)


def _residual_rank(rank_CM, fold_rank_M):
  """Returns that of the error of averaging K products, unless it is data."""
  if fold_rank_M is not None:
    return fold_rank_M
  return rank_CM.sum(0) - rank_CM.max(0, initial=0)


@rule(
  'redistribution',
  traits=['folds'],
  power_a=lambda product: 0.5 if product else None,
  traffic=_residual_rank,
)
def fold_residual(
  aggregate: Adapters | Deltas,
  error: Error,
  server: Server,
  hyper: Hyperparameters,
  *,
  on_wire: Callable[[Lora], Lora],
) -> Redistributed:
  """Folds what the adapters cannot hold into the base.

  Of averaged factors: the error of averaging (FedEx-LoRA, arXiv 2410.09432).
  Of a product: the directions past R, up to a share `hyper.energy` of all
  (FedMomentum, arXiv 2603.08014).
  """
  out, fold, rank = {}, {}, {}
  for t, x in aggregate.items():
    if isinstance(x, Lora):
      out[t], fold[t] = x, error()[t]
      continue
    out[t] = _refactor(x, server.adapters[t], server.scale, 0.5)
    whole, whole_rank = _best(x, hyper.energy)
    slots = out[t].a.shape[-1]
    rest = on_wire(Lora(whole.a[..., slots:], whole.b[:, slots:]))
    fold[t] = rest.a @ rest.b
    rank[t] = jnp.maximum(whole_rank - slots, 0)
  return Redistributed(out, fold, rank)
