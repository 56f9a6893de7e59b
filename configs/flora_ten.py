"""FLoRA's ten clients (Wang et al., 2024, arXiv 2409.05976).

As there: ten clients who all take part, their ranks, three rounds, stacking.
Not as there: the clients are ten people of chitchat, not shards of Dolly,
Alpaca, Wizard or ShareGPT; the model is Gemma 3 270M, not TinyLlama or Llama;
two steps of two examples a round; perplexity, not MMLU or MT-Bench.

Command: make train CONFIG=configs/flora_ten.py
"""

from configs import chitchat_gemma3


def get_config():
  """Returns the experiment, sized for two CPU cores."""
  c = chitchat_gemma3.get_config()
  c.method = 'flora'
  f = c.federated
  f.num_rounds, f.clients_per_round = 3, 10
  f.r_min, f.r_max = 4, 64
  c.ranks.distribution = 'explicit'
  c.ranks.explicit = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
  c.data.num_people = 10
  return c
