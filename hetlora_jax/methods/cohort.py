"""Who trains: every client of the cohort for itself, or one on the data of all."""

from hetlora_jax.methods.registry import declare

declare('cohort', 'separate')
declare('cohort', 'pooled', traits=['pools data'])
