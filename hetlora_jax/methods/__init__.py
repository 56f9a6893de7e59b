"""The rules of the literature: each a pure function with its declaration."""

from hetlora_jax.methods import (  # noqa: F401  (each declares its rules)
  aggregation,
  cohort,
  distribution,
  objective,
  personal,
  pruning,
  redistribution,
  trainable,
  weighting,
)
