"""The clients' side of a round: receive, train, prune, report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from hetlora_jax import lora, prng, ranks, robust
from hetlora_jax.methods.objective import About
from hetlora_jax.types import (
  Adapters,
  Array,
  Batch,
  ClientUpdates,
  Cohort,
  Deltas,
  Hyperparameters,
  Memory,
  PyTree,
  Rules,
  Server,
  ServerState,
  Trained,
  View,
)


class Client(NamedTuple):
  """One client of the cohort."""

  id: Array  # []
  num_examples: Array  # []; 0 if it will not report
  share: Array  # [], its weight in the mean of changes of the base
  memory: Memory  # its own
  batches: Batch  # [S, ...]


def whole_rank(state: ServerState) -> Array:
  """Returns the rank R of the global adapters, as every group's: [G]."""
  slots = [x.a.shape[-1] for x in state.adapters.values()]
  return jnp.full(state.memory.rank.shape[1:], max(slots, default=1))


def global_adapters(rules: Rules, state: ServerState, hyper: Hyperparameters) -> Server:
  """Returns the server's adapters and their LoRA scale."""
  return Server(state.adapters, rules.scale(whole_rank(state), hyper))


def recall(state: ServerState, client_id: Array) -> Memory:
  """Returns what is remembered of one client, or of several: leaves [..., G]."""
  return jax.tree.map(lambda x: x.at[client_id].get(mode='clip'), state.memory)


def _key(state: ServerState, hyper: Hyperparameters, client_id: Array) -> Array:
  """Returns the key of all that is drawn for a client in this round."""
  return prng.stream(hyper.seed, 'client', state.round, client_id)


def sent_to(
  rules: Rules, state: ServerState, hyper: Hyperparameters, client_id: Array
) -> View:
  """Distributes to one client, exactly as the next round does: what arrives there."""
  view, _ = share_of(rules, state, hyper, client_id)
  return rules.wire.down(view)


def share_of(
  rules: Rules,
  state: ServerState,
  hyper: Hyperparameters,
  client_id: Array,
  memory: Memory | None = None,
) -> tuple[View, Array]:
  """Returns what the next round distributes to one client, before the wire rounds it.

  Args:
    rules: the method's.
    state: the server's.
    hyper: hyper-parameters.
    client_id: [] int32.
    memory: what is remembered of the client; None: what the state remembers.

  Returns:
    What the client trains from, with the factors that it keeps to itself, and by
    which ratio its LoRA scale is smaller than the server's (see `lora.rescale`).
  """
  memory = recall(state, client_id) if memory is None else memory
  server = global_adapters(rules, state, hyper)
  scale = rules.scale(memory.rank, hyper)
  masks = ranks.masks(memory.rank, server.adapters)
  key = _key(state, hyper, client_id)
  view = rules.distribute(server.adapters, masks, scale, key)
  kept = {t: {f: x[f] for f in rules.personal} for t, x in memory.personal.items()}
  own = {t: x._replace(**kept[t]) for t, x in view.adapters.items()}
  ratio = server.scale / scale
  if rules.personal:
    own = lora.truncate(own, view.mask)
  return view._replace(adapters=lora.rescale(own, ratio, rules.scale_carriers)), ratio


def local_update(
  rules: Rules,
  base: PyTree,
  received: Trained,
  view: View,
  rank_G: Array,
  batches: Batch,
  round: Array,
  hyper: Hyperparameters,
  key: Array,
) -> tuple[Trained, Array, Array]:
  """Takes S optimizer steps on the client's objective, from fresh moments.

  A step without target tokens changes nothing, whatever the optimizer.

  Returns:
    What was trained, the summed token loss [], and the token count [].
  """
  optimizer = rules.client_optimizer(hyper, round)
  live = rules.trainable(round, view.mask)

  def objective(trained: Trained, batch: Batch, step_key: Array):
    def task(t: Trained):
      folded = lora.fold(base, t.change)
      return rules.loss(folded, t.adapters, view.scale, batch)

    about = About(task, received, rank_G, hyper, step_key)
    return rules.objective(trained, about)

  gradient = jax.grad(objective, has_aux=True)
  if rules.accumulate > 1:
    gradient = _accumulated(gradient)
    batches = jax.tree.map(
      lambda x: x.reshape(-1, rules.accumulate, *x.shape[1:]), batches
    )

  def step(carry, xs):
    (trained, opt_state), (batch, i) = carry, xs
    step_key = jax.random.fold_in(key, i)
    grads, (total, count) = gradient(trained, batch, step_key)
    updates, new_opt_state = optimizer.update(grads, opt_state, trained)
    updates = updates._replace(
      adapters=jax.tree.map(jnp.multiply, updates.adapters, live)
    )
    new = (optax.apply_updates(trained, updates), new_opt_state)
    carry = jax.tree.map(lambda n, o: jnp.where(count > 0, n, o), new, carry)
    return carry, (total, count)

  steps = jax.tree.leaves(batches)[0].shape[0]
  (trained, _), (total_S, count_S) = jax.lax.scan(
    step, (received, optimizer.init(received)), (batches, jnp.arange(steps))
  )
  return trained, total_S.sum(), count_S.sum()


def _accumulated(gradient: Callable) -> Callable:
  """Makes a gradient of one batch that of several on a leading axis, as if they were one.

  An objective is a mean over target tokens, plus what depends on no batch: both are the
  means of the batches', each weighed by its tokens.
  """

  def of_all(trained: Trained, batches: Batch, key: Array):
    def add(sums, batch):
      grads, (total, count) = gradient(trained, batch, key)
      weighed = jax.tree.map(lambda x: count * x, grads)
      return jax.tree.map(jnp.add, sums, (weighed, total, count)), None

    zero = jnp.zeros(())
    start = jax.tree.map(jnp.zeros_like, trained), zero, zero
    (grads, total, count), _ = jax.lax.scan(add, start, batches)
    return jax.tree.map(lambda x: x / jnp.maximum(count, 1), grads), (total, count)

  return of_all


def _prune(rules: Rules, sent: Adapters, trained: Adapters, memory, hyper):
  """Returns the new rank [G], and the slots that were not given up."""
  rank_G, tail_G = memory.rank, memory.tail_norm
  if rules.prune_against == 'received':
    sizes = rules.tail_norms(sent, rank_G, hyper.gamma)
    tail_G = ranks.gather(sizes, rank_G.shape[0])
  pruned_G = rules.prune(tail_G, trained, rank_G, hyper)
  before, after = (ranks.masks(r, trained) for r in (rank_G, pruned_G))
  return pruned_G, jax.tree.map(lambda b, a: 1 - b + a, before, after)


class Report(NamedTuple):
  """What is known of a client after its round; zeros where it is not finite."""

  updates: ClientUpdates  # what it sends
  memory: Memory  # what is remembered of it
  rank: Array  # [G], after pruning
  loss: Array  # [], summed over tokens
  tokens: Array  # []
  finite: Array  # [] bool; if not, it sends nothing


def take_part(
  rules: Rules,
  base: PyTree,
  state: ServerState,
  hyper: Hyperparameters,
  client: Client,
) -> tuple[Deltas, Report]:
  """Runs one client's round: receives, trains, prunes.

  Returns its share in the mean change of the base, {} unless that is trained, and
  its report.
  """
  memory = client.memory
  exact, ratio = share_of(rules, state, hyper, client.id, memory)
  view = rules.wire.down(exact)
  change = state.residual if rules.trains_base else {}
  received = Trained(view.adapters, jax.tree.map(jnp.zeros_like, change))
  trained, loss, tokens = local_update(
    rules, base, received, view, memory.rank, client.batches, state.round,
    hyper, _key(state, hyper, client.id),
  )  # fmt: skip

  # What a client of ill will does to its change, the wire, and the server.
  trained = rules.tamper(received, trained, client.id, hyper.seed)
  trained, lost = rules.wire.up(exact, view, trained, memory.personal, state.round)
  trained = rules.bound(received._replace(adapters=exact.adapters), trained)
  finite = robust.all_finite((trained, loss))
  trained, loss, tokens = robust.only_if(finite, (trained, loss, tokens))

  # Self-pruning: slots that are given up are zero, and not sent.
  rank_G, kept = _prune(rules, exact.adapters, trained.adapters, memory, hyper)
  mask = jax.tree.map(jnp.multiply, view.mask, kept)
  adapters = lora.truncate(trained.adapters, mask)
  tails = rules.tail_norms(adapters, rank_G, hyper.gamma)

  power_a, power_b = rules.scale_carriers
  updates = ClientUpdates(
    adapters=lora.rescale(adapters, 1 / ratio, rules.scale_carriers),
    mask=mask,
    scale=view.scale * ratio ** (power_a + power_b),
    num_examples=jnp.where(finite, client.num_examples, 0),
    norm=lora.delta_norms(adapters, view.scale),
  )
  memory = Memory(
    rank=rank_G if rules.keep_pruned_rank else memory.rank,
    tail_norm=ranks.gather(tails, rank_G.shape[0]),
    personal={
      t: {f: getattr(x, f) for f in rules.personal} | lost.get(t, {})
      for t, x in adapters.items()
    },
  )
  shared = jax.tree.map(lambda x: client.share * x, trained.change)
  return shared, Report(updates, memory, rank_G, loss, tokens, finite)


def train(
  rules: Rules,
  base: PyTree,
  state: ServerState,
  cohort: Cohort,
  hyper: Hyperparameters,
  reports_C: Array,
) -> tuple[Report, Deltas, Array]:
  """Runs the round of every client of a cohort, each for itself.

  Args:
    rules: the method's.
    base: with what has been folded into it.
    state: the server's.
    cohort: its clients.
    hyper: hyper-parameters.
    reports_C: which of them will report.

  Returns:
    Their reports, [C, ...]; the weighted mean of their changes of the base, {} unless
    that is trained; and each client's share in this mean, [C].
  """
  num_examples_C = jnp.where(reports_C, cohort.num_examples, 0)
  share_C = _shares(rules, num_examples_C)
  change, reports = each(
    functools.partial(take_part, rules, base, state, hyper),
    Client(
      id=cohort.client_id,
      num_examples=num_examples_C,
      share=share_C,
      memory=recall(state, cohort.client_id),
      batches=cohort.batches,
    ),
    rules.clients_at_once,
  )
  return reports, *_renormalized(change, share_C, reports.finite)


def _shares(rules: Rules, num_examples_C: Array) -> Array:
  """Returns each client's aggregation weight for full fine-tuning deltas."""
  alike = jnp.ones_like(num_examples_C)
  weights = rules.weigh(
    num_examples_C, {'base': alike[:, None, None]}, {'base': alike[:, None]}
  )
  return weights['base'][:, 0, 0]


def _renormalized(
  change: Deltas, share_C: Array, finite_C: Array
) -> tuple[Deltas, Array]:
  """Renormalizes a weighted mean after dropping clients that are not finite."""
  left = (share_C * finite_C).sum()
  more = jnp.where(finite_C.all() | (left == 0), 1.0, 1 / left)
  return jax.tree.map(lambda x: x * more, change), share_C * finite_C * more


def each(function: Callable, clients: PyTree, at_once: int | None) -> tuple:
  """Calls a function of one client for all, some at once, on a leading axis.

  Args:
    function: client -> (to be summed, to be stacked).
    clients: leaves [C, ...].
    at_once: how many are vmapped, a divisor of C; the others wait in a scan,
      so that no more copies of a sum ever exist. None: all.
  """
  count = jax.tree.leaves(clients)[0].shape[0]
  at_once = at_once or count
  # Interleave the chunks, so that every chunk uses every device.
  chunks = jax.tree.map(
    lambda x: x.reshape(at_once, -1, *x.shape[1:]).swapaxes(0, 1), clients
  )

  def step(total, chunk):
    part, out = jax.vmap(function)(chunk)
    return jax.tree.map(lambda t, p: t + p.sum(0), total, part), out

  one = jax.tree.map(lambda x: x[0], clients)
  shapes, _ = jax.eval_shape(function, one)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  total, out = jax.lax.scan(step, zeros, chunks)
  return total, jax.tree.map(
    lambda x: x.swapaxes(0, 1).reshape(count, *x.shape[2:]), out
  )
