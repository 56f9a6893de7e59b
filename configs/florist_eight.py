"""FLoRIST's eight clients (Ramesh & Dass, 2025, arXiv 2506.09199).

As there: eight clients who all take part, their ranks, three rounds (the paper
runs one to three), the singular value threshold on the stacks.
Not as there: the clients are eight people of chitchat, not shards of Dolly,
Alpaca or Wizard; the model is Gemma 3 270M, not TinyLlama or Llama; two steps
of two examples a round; perplexity, not MMLU, and the threshold is not tuned
on the test set.

Command: make train CONFIG=configs/florist_eight.py
"""

from configs import chitchat_gemma3


def get_config():
  """Returns the experiment, sized for two CPU cores."""
  c = chitchat_gemma3.get_config()
  c.method = 'florist'
  f = c.federated
  f.num_rounds, f.clients_per_round = 3, 8
  f.r_min, f.r_max = 4, 64
  c.ranks.distribution = 'explicit'
  c.ranks.explicit = (4, 4, 8, 8, 16, 16, 32, 64)
  c.data.num_people = 8
  return c
