"""Command-line programs: python -m launch.train, .evaluate, .sweep."""

import hetlora_jax  # noqa: F401  (before jax: it sets what OpenBLAS reads)
