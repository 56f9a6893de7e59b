"""Command-line programs: python -m launch.train, .evaluate, .sweep, ..."""

import os

# jaxlib's SVD runs in OpenBLAS, whose threads spin while XLA's own threads need
# the cores: on two of them, two programs at once became 30 times slower. OpenBLAS
# reads this when it is loaded, so before anything imports jax or numpy.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
