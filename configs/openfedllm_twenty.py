"""OpenFedLLM's twenty clients (Ye et al., 2024, arXiv 2402.06954).

As there: twenty clients, two a round, ten steps each, rank 32 for everybody
and a LoRA scale of 2 (alpha 64), FedAvg of the factors: the settings of its
`training_scripts/run_sft.sh`.
Not as there: ten rounds rather than 200 and batches of two rather than 16; the
clients are twenty people of chitchat, not shards of an instruction set; the
model is Gemma 3 270M, not Llama 2 7B in 8 bits; the learning rate is ours.

Command: make train CONFIG=configs/openfedllm_twenty.py
"""

from configs import chitchat_gemma3


def get_config():
  """Returns the experiment, sized for two CPU cores."""
  c = chitchat_gemma3.get_config()
  c.method = 'fedit'
  f = c.federated
  f.num_rounds, f.clients_per_round = 10, 2
  f.local_steps = 10
  f.r_min, f.r_max = 32, 32
  c.data.num_people = 20
  return c
