r"""FlexLoRA's population (Bai et al., 2024, arXiv 2402.11505), 5 % a round.

As there: a large population, 5 % of it a round, batches of 4, four types of
device, and shares of the types as the authors' code draws them (alibaba/
FederatedScope, branch FlexLoRA, `main.py`): 'uniform', 'heavy_tail_light' (80 %
of rank 8), 'heavy_tail_strong' (80 % of rank 200), 'normal' (the density of a
normal over the types in order of rank; the code applies it to type numbers,
which are not in that order, and never changes a client's rank as published).
Not as there: 685 people, all that chitchat has with 5 examples or more and who
are not unseen, so 34 a round, rather than 1,613 tasks and 81; a person has one
rank, so the type with 30 in attention and 200 in the MLP has their mean, 115;
query and value are adapted, not all seven matrices; two steps rather than an
epoch; ten rounds rather than 50 with early stopping; the LoRA scale does not
fall with the rank; Gemma 3 270M rather than a 1.3B LLaMA; perplexity, not
Rouge-L.

Command: make train CONFIG=configs/flexlora_population.py:normal \
  WORKDIR=runs/flexlora_normal
"""

from configs import chitchat_gemma3

TIERS = (8, 30, 115, 200)
FRACTIONS = {
  'uniform': (0.25, 0.25, 0.25, 0.25),
  'heavy_tail_light': (0.8, 0.05, 0.05, 0.1),
  'heavy_tail_strong': (0.05, 0.05, 0.1, 0.8),
  'normal': (0.06, 0.44, 0.44, 0.06),
}


def get_config(distribution='uniform'):
  """Returns the experiment with one of four distributions of ranks."""
  if distribution not in FRACTIONS:
    raise ValueError(f'{distribution=} is not one of {tuple(FRACTIONS)}.')
  c = chitchat_gemma3.get_config()
  c.method = 'flexlora'
  f = c.federated
  f.num_rounds, f.clients_per_round = 10, 34
  f.local_batch = 4
  f.r_min, f.r_max = 8, 200
  c.ranks.distribution = 'tiers'
  c.ranks.tiers = TIERS
  c.ranks.tier_fractions = FRACTIONS[distribution]
  c.data.min_examples = 5
  return c
