"""Eight fake devices, no silent broadcasting: set before jax starts."""

import importlib.metadata
import os
import pathlib
import tempfile

# Programs here are small and many: compiling them takes most of the time, so
# LLVM spends little on each, and processes share them.
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 '
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)
# XLA's old way to compile fusions takes a third of the time; a release that no
# longer knows the flag would stop at it.
if importlib.metadata.version('jax').startswith('0.10.'):
  os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false'
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['OPENBLAS_NUM_THREADS'] = '1'
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(
  pathlib.Path(tempfile.gettempdir()) / 'hetlora_jax_test_programs'
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'

import jax

jax.config.update('jax_numpy_rank_promotion', 'raise')
