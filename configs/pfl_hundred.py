"""pfl-research's 100 a round (Granqvist et al., 2024, arXiv 2404.06430).

As there: 100 people a round of a population of real users, rank 8 for
everybody, batches of 4: its `benchmarks/llm/configs/aya.yaml`.
Not as there: five rounds rather than 1,000; two steps rather than an epoch;
the server takes the average instead of Adam with warm-up and decay; our
learning rate; neither clipping nor noise (no differential privacy); 420 people
of chitchat rather than Aya, Open Assistant or Alpaca; Gemma 3 270M rather than
TinyLlama.

Command: make train CONFIG=configs/pfl_hundred.py
"""

from configs import chitchat_gemma3


def get_config():
  """Returns the experiment, sized for two CPU cores."""
  c = chitchat_gemma3.get_config()
  c.method = 'fedit'
  f = c.federated
  f.num_rounds, f.clients_per_round = 5, 100
  f.local_batch = 4
  f.r_min, f.r_max = 8, 8
  return c
