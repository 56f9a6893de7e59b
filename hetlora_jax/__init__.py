"""HetLoRA and its family: federated LoRA with a rank for every client, in JAX.

Start reading at `hetlora_jax.rounds`.
"""

import os

# jaxlib's SVD runs in OpenBLAS, whose threads spin while XLA's own threads need
# the cores: on two of them, two programs at once became 30 times slower.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
