"""The reproduction study: the paper's methods, and later ones, on two tasks.

Command: make study   (docs/results.md; hours, in pieces that can be resumed)

`configs/study.py:chat` and `:mail` are the tasks. An arm is the fields that it
changes, a run an arm at one learning rate and seed. All arms of a task see the
same people, rounds and examples; none is smaller than another.
"""

from configs import default

TASKS = ('chat', 'mail')
WRITTEN = ('mail',)  # where texts are generated, for ROUGE
SEEDS = (0, 1, 2)
SHOTS = (0, 3)  # examples in the prompt of the untouched model
# Ladders of learning rates: the middle three are tried, and the next one where the
# best of them is the lowest or the highest.
RATES = (1.25e-5, 5e-5, 2e-4, 8e-4, 4e-3, 2e-2, 1e-1)  # of adapters
FULL_RATES = (3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)  # of the whole model


def _hetlora(gamma, **fields):
  return {'method': 'hetlora', 'federated.gamma': gamma, **fields}


ARMS = {
  'HetLoRA 0.99': _hetlora(0.99),
  'LoRA r = 5': {'method': 'fedit', 'federated.r_max': 5},
  'LoRA r = 50': {'method': 'fedit'},
  'centralized LoRA': {'method': 'centralized'},
  'Recon+SVD': {'method': 'flexlora'},
  'HetLoRA 0.85': _hetlora(0.85),
  'HetLoRA 0.95': _hetlora(0.95),
  'HetLoRA, no pruning': _hetlora(1.0),
  'HetLoRA, uniform weights': _hetlora(0.99, **{'methods.weighting': 'uniform'}),
  'HetLoRA, size weights': _hetlora(0.99, **{'methods.weighting': 'size'}),
  'HetLoRA, r = 5 to 20': _hetlora(0.99, **{'federated.r_max': 20}),
  'HetLoRA, r = 20 to 50': _hetlora(0.99, **{'federated.r_min': 20}),
  'raFLoRA': {'method': 'raflora'},
  'RBLA': {'method': 'rbla'},
  'FLoRA': {'method': 'flora'},
  'FedEx': {'method': 'fedex'},
  'PreLort': {'method': 'prelort'},
  # Not the paper's: what of HetLoRA's gain is the weights', and what may win.
  'LoRA r = 5, uniform weights': {
    'method': 'fedit', 'federated.r_max': 5, 'methods.weighting': 'uniform',
  },
  'HetLoRA, owners alike': _hetlora(0.99, **{'methods.weighting': 'owner_uniform'}),
  # Last, since it takes longest; five copies of the model at once are 30 GB.
  'full fine-tuning': {'method': 'full_finetuning', 'federated.clients_at_once': 1},
}  # fmt: skip


def rates(arm):
  """Returns the field that an arm's learning rate is, and its ladder."""
  full = ARMS[arm]['method'] == 'full_finetuning'
  name = 'full_learning_rate' if full else 'learning_rate'
  return f'client_optimizer.{name}', FULL_RATES if full else RATES


def get_config(task='chat'):
  """Returns what all arms of a task share."""
  if task not in TASKS:
    raise ValueError(f'{task!r} is no task: one of {", ".join(TASKS)}.')
  c = default.get_config()
  f, d, e = c.federated, c.data, c.eval
  f.clients_per_round, f.local_steps, f.local_batch = 5, 2, 2
  f.clients_at_once = 5
  f.tail_penalty = 1.0
  c.model.dtype = 'float32'  # the same on every machine
  d.context_turns = 2
  if task == 'chat':
    f.num_rounds, e.every = 18, 6
    d.tokens_per_example, d.targets_per_example, d.row_tokens = 48, 16, 96
    e.num_people, e.examples_per_person = 48, 1
  else:  # subjects are short, so more of them; few people, so fewer rounds
    f.num_rounds, e.every = 12, 4
    d.name, d.min_examples, d.unseen_fraction = 'mail_subject', 2, 0.5
    d.tokens_per_example, d.targets_per_example, d.row_tokens = 64, 12, 128
    e.num_people, e.examples_per_person = 48, 2
  c.checkpoint.every, c.checkpoint.keep = e.every, 1
  return c
