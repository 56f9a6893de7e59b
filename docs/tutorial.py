"""The library in one script: python docs/tutorial.py [FOLDER]."""

# # Tutorial
#
# Everything that the launchers do is a function. This page is the script
# `docs/tutorial.py`; a test runs it, so what it says is so. It needs no download
# and takes less than a minute: `python docs/tutorial.py`.

import json
import pathlib
import sys
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import hetlora_jax as hl
from configs import tiny
from hetlora_jax import lora, points, training

folder = pathlib.Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp())

# ## A run
#
# A configuration is a `ConfigDict` until `hl.resolve` checks it and makes it
# a frozen dataclass. `hl.train` does what `launch.train` does: called again
# with the same folder it continues the run, or ends at once if all is done.

c = tiny.get_config()
c.federated.num_rounds, c.eval.every = 2, None
c.model.random.num_layers, c.lora.targets = 1, ('q', 'v')
run = hl.train(c, folder / 'first')
print('seen people:', run.summary['last']['eval/seen/perplexity'])

# ## Your own data
#
# One line of JSON an example: whose it is, what came before, and what the client
# wrote. [Data sets](data.md) tells more, [every field](flags.md#data) the limits.

FRUIT = ('apple', 'pear', 'plum', 'fig', 'lime')
lines = [
  {
    'client': f'client{i}',
    'context': [f'{n} of these?'],
    'target': f'{n} {FRUIT[i % 5]}{"s" * (n > 1)}.',
  }
  for i in range(20)
  for n in [(5 * k + i) % 12 + 1 for k in range(12)]
]
data = folder / 'fruit.jsonl'
data.write_text('\n'.join(map(json.dumps, lines)))

c.data.name, c.data.path = 'text_folder', str(data)
c.data.min_examples = 6
c.data.tokens_per_example, c.data.targets_per_example = 48, 16

# ## Your own model
#
# Any pure function of (parameters, adapters, scale, batch) that returns logits.
# This one guesses a byte from the seven before it (Bengio et al., 2003). Rows of
# a batch hold several examples; `batch.position` counts within each, so that
# nothing is read across their borders.

WIDTH, HIDDEN, BACK, BYTES = 16, 32, 7, 257


def apply(base, adapters, scale, batch):
  """Returns logits [rows, tokens, bytes]."""

  def dense(name, x):
    a, b = adapters[name].a[0], adapters[name].b[0]  # of layer 0, the only one
    return x @ base[name][0] + scale * (x @ a) @ b

  before = [
    jnp.where(batch.position >= k, jnp.roll(batch.tokens, k, axis=1), 0)
    for k in range(BACK)
  ]
  h = base['embed'][jnp.stack(before, axis=-1)]
  h = jnp.tanh(dense('mix', h.reshape(*h.shape[:2], BACK * WIDTH)))
  return dense('out', h)


class Bytes:
  """A tokenizer: a text's bytes."""

  bos_id = 256

  def encode(self, text):
    return list(text.encode())


def draw(seed, *shape):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=shape) / shape[-2] ** 0.5).astype(np.float32)


params = {
  'embed': 4 * draw(0, BYTES, WIDTH),
  'mix': draw(1, 1, BACK * WIDTH, HIDDEN),
  'out': draw(2, 1, HIDDEN, BYTES),
}

# Adapters are made for the matrices that you name; everything else is frozen.
# Ranks, cohorts, checkpoints, metrics and all methods are as for any model.

model = hl.own_model(params, apply, ('mix', 'out'), Bytes())
c.model.source = 'bytes'  # a name, for the summary
c.federated.num_rounds = 20
c.client_optimizer.learning_rate = 0.05
run = hl.train(c, folder / 'hetlora', model=model)
print('own model:', run.summary['last']['eval/seen/perplexity'])

# ## Your own rule
#
# A rule is a function with the arguments of its role, registered by a decorator; a
# flag, or a row of METHODS, then chooses it. Here the server only counts votes: every coordinate moves
# one step in the direction that most weight wants (Bernstein et al., 2018, arXiv
# 1802.04434). Slots that a client does not own have no vote.


@hl.rule('aggregation')
def vote(updates, weights, server):
  """Moves each coordinate a step in the direction of the weighted majority."""
  share = lora.slot_masks(jax.tree.map(jnp.multiply, weights, updates.mask))
  return jax.tree.map(
    lambda new, old, w: old + 0.05 * jnp.sign((w * jnp.sign(new - old[None])).sum(0)),
    updates.adapters,
    server.adapters,
    share,
  )


hl.METHODS['vote'] = hl.Method(
  'majority vote: Bernstein et al., 2018, arXiv 1802.04434', aggregation='vote'
)
c.method = 'vote'

# Points that differ in what the compiled program takes as data (seeds, learning
# rates, lambda, gamma, ranks: `hetlora_jax.config.VARIES`) run together in one program.

chosen = []
for c.seed in (0, 1):
  chosen.append(training.Point(hl.resolve(c), folder / f'vote_{c.seed}'))
for run in training.train_points(chosen, model=model):
  print('vote:', run.summary['last']['eval/seen/perplexity'])

# ## The round itself
#
# Below all this is one pure function. `prepare` builds what it needs; state,
# cohorts and metrics have a leading axis of points, here of two, and cohorts and
# metrics one of rounds before it. Nothing is written.

x = points.prepare(*[p.config for p in chosen], model=model)
cohort = points.make_cohorts(x, 0)
state, metrics = points.call(x, x.initial_state, cohort)
print('ranks of the first point:', metrics['rank'][0, 0, :, 0])
