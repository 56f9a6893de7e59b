"""Which factors stay with the client, who trains on from its own.

The server neither receives nor changes them. People who never took part have
the server's initial ones, so that their B, and their delta W, is zero.
"""

TABLE = {
  'none': (),
  'b': ('b',),  # FedSA-LoRA, arXiv 2410.01463
  'both': ('a', 'b'),  # every client for itself
}
