"""A least-squares task with two adapted matrices, for tests of the round.

All sizes differ, d_in != d_out and s != 1, so that a swapped axis or a missing
scale shows.
"""

import functools
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import default
from hetlora_jax import build, config, rounds
from hetlora_jax.types import Cohort

DIMS = {'q': (2, 7, 5), 'v': (2, 7, 3)}
POPULATION, CLIENTS, STEPS, ROWS, SLOTS = 11, 4, 3, 6, 9
SCALE = 1.7


def loss(base, adapters, scale, batch):
  """Half the squared error of every matrix, summed over rows by weight."""
  total = jnp.float32(0)
  for t, (layers, _, _) in DIMS.items():
    for layer in range(layers):
      out = batch[t]['x'] @ base[t][layer]
      if t in adapters:
        a, b = adapters[t].a[layer], adapters[t].b[layer]
        out += scale * (batch[t]['x'] @ a) @ b
      error = ((out - batch[t]['y']) ** 2).sum(1) / 2
      total += (error * batch['weight']).sum()
  return total, batch['weight'].sum()


def stack(trees):
  """Stacks pytrees on a new first axis, in numpy."""
  return jax.tree.map(lambda *x: np.stack(x), *trees)


def make_base(rng):
  """Draws the frozen matrices."""
  return {t: rng.normal(size=shape).astype(np.float32) for t, shape in DIMS.items()}


def make_cohort(rng, num_examples=(3, 18, 7, 11), clients=None) -> Cohort:
  """Draws a cohort; clients who have no examples are padding."""
  count = np.asarray(num_examples, np.float32)
  who = rng.choice(POPULATION, len(count), replace=False)
  who = who if clients is None else np.asarray(clients)
  who = np.where(count > 0, who, POPULATION).astype(np.int32)
  shape = (len(count), STEPS, ROWS)
  weight = np.zeros(shape, np.float32)
  for c, n in enumerate(num_examples):
    weight[c].reshape(-1)[: int(n)] = 1
  batches = {'weight': weight}
  for t, (_, d_in, d_out) in DIMS.items():
    batches[t] = {
      'x': rng.normal(size=(*shape, d_in)).astype(np.float32),
      'y': rng.normal(size=(*shape, d_out)).astype(np.float32),
    }
  return Cohort(client_id=who, num_examples=count, batches=batches)


def make_config(**overrides) -> config.Config:
  """Returns a configuration of SGD clients, with dotted overrides."""
  raw = default.get_config()
  raw.update_from_flattened_dict(
    {
      'client_optimizer.name': 'sgd',
      'client_optimizer.learning_rate': 0.02,
      'client_optimizer.full_learning_rate': 0.02,
      'federated.r_min': 2,
      'federated.r_max': SLOTS,
      'federated.gamma': 0.7,
      'federated.tail_penalty': 8.0,
      'lora.scale': SCALE,
    }
  )
  raw.update_from_flattened_dict(
    {k.replace('__', '.'): v for k, v in overrides.items()}
  )
  return config.resolve(ml_collections.ConfigDict(raw))


def make_run(rank_N=None, **overrides):
  """Returns a namespace: config, rules, state, hyper and the jitted round.

  `step` is `round` with the run's own hyper-parameters.
  """
  c = make_config(**overrides)
  rules = build.make_rules(c, loss)
  homogeneous = c.rules['distribution'].name == 'full'
  if rank_N is None or homogeneous:
    rank_N = build.draw_ranks(c, np.arange(1, POPULATION + 1))
  hyper = build.make_hyperparameters(c)
  shapes = {t: np.zeros(shape, np.float32) for t, shape in DIMS.items()}
  ranks_N = np.asarray(rank_N, np.int32)
  state = build.init_state(c, DIMS, shapes, ranks_N, rules)
  one_round = jax.jit(functools.partial(rounds.federated_round, rules))
  whole = jnp.full((1,), c.federated.r_max)
  return types.SimpleNamespace(
    config=c,
    rules=rules,
    state=state,
    hyper=hyper,
    round=one_round,
    step=lambda base, state, cohort: one_round(base, state, cohort, hyper),
    server_scale=rules.scale(whole, hyper),
  )
