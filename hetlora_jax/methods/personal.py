"""Which factors stay with the client, who trains on from its own.

The server neither receives nor changes them. Clients that never took part have the
server's initial ones, so that their B, and their delta W, is zero.
"""

from hetlora_jax.methods.registry import declare

_A_BASIS_THAT_STAYS = {
  'needs': {
    'mean of factors': "a client's own factor needs a basis that stays",
    'keeps factors': "a client's own factor needs a basis that stays",
  },
  'excludes': {'fresh factors': "a client's own factor needs a basis that stays"},
  'traits': ['own factors'],
}

declare('personal', 'none')
# FedSA-LoRA (Guo et al., 2024, arXiv 2410.01463).
declare('personal', 'b', own_factors=('b',), **_A_BASIS_THAT_STAYS)
# The other way round, to compare with: B is shared, and A is the client's.
declare('personal', 'a', own_factors=('a',), **_A_BASIS_THAT_STAYS)
# Every client for itself.
declare('personal', 'both', own_factors=('a', 'b'), **_A_BASIS_THAT_STAYS)
