"""Eight fake devices, no silent broadcasting: set before jax starts."""

import os

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
