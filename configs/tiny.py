"""HetLoRA on a random tiny model and synthetic people: first contact.

Command: python -m launch.train --config=configs/tiny.py --workdir=/tmp/tiny
Took: 25 s, compiling included, on 2 cores of an AMD EPYC with AVX-512.
Printed: perplexity of seen people 603.98 -> 17.27, unseen 673.63 -> 15.50.
"""

from configs import default


def get_config():
  """Returns the experiment."""
  c = default.get_config()
  f = c.federated
  f.num_rounds, f.clients_per_round = 30, 8
  f.local_steps, f.local_batch = 4, 8
  f.r_min, f.r_max = 2, 16
  f.clients_at_once = 4  # what a step of four needs fits the caches
  c.lora.targets = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')
  c.client_optimizer.learning_rate = 1e-2
  c.client_optimizer.full_learning_rate = 3e-3
  c.model.source, c.model.dtype = 'random', 'float32'
  c.data.name = 'synthetic'
  c.eval.num_people, c.eval.every = 12, 10
  return c
