"""Eight fake devices, no silent broadcasting, compiled programs shared.

Environment variables are set before jax starts.
"""

import atexit
import dataclasses
import gc
import importlib.metadata
import os
import shutil
import tempfile

import pytest

# Programs here are small and many: compiling them takes most of the time, so
# LLVM spends little on each, and all processes of one run of the tests share them.
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
# The folder is new in each run, so that the time of a run does not depend on earlier
# ones; to keep programs, set the variable. Workers inherit the one of their run.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='hetlora_programs')
  atexit.register(
    shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True
  )
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'

import jax

from hetlora_jax import points

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Tracing makes many small objects, and looking for garbage among them every 700, as
# Python does, takes an eighth of its time.
gc.set_threshold(50_000, 20, 100)

# The order in which the longest test files start, so that none is left for the end.
LONGEST = (
  'methods_test', 'benchmarks_test', 'chaos_test', 'processes_test', 'devices_test',
  'experiment_test', 'resume_test', 'rounds_test', 'decoder_test', 'sweep_test',
)  # fmt: skip


def pytest_collection_modifyitems(items):
  """Starts the longest files first."""
  place = {name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


# Fields that no traced program reads.
UNREAD = (
  'federated.num_rounds', 'eval.every', 'eval.metric', 'eval.better', 'eval.patience',
  'eval.min_delta', 'checkpoint.',
)  # fmt: skip


@pytest.fixture(autouse=True, scope='session')
def traced_once():
  """Lets runs of one configuration share their traced programs within a process.

  Tests run a few configurations many times, and tracing takes most of the time of a
  second run. Only the programs are shared; everything else is built anew.
  """
  programs, prepare = {}, points.prepare

  def prepare_with_shared_programs(*configs, model=None, population=None):
    x = prepare(*configs, model=model, population=population)
    if model or population:
      return x
    fields = points.program_of(x.config)
    read = [f for f in fields if not f[0].startswith(UNREAD)]
    falls = x.config.client_optimizer.schedule != 'constant'  # a program knows when to
    key = len(x.configs), falls and x.config.decay_rounds, *read
    shared = programs.setdefault(
      key,
      {name: getattr(x, name) for name in ('run_rounds', 'evaluators', 'take')},
    )
    return dataclasses.replace(x, **shared)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(points, 'prepare', prepare_with_shared_programs)
    yield


@pytest.fixture
def older_partitioner():
  """As launchers do where all three axes of the mesh are divided."""
  before = jax.config.jax_use_shardy_partitioner
  jax.config.update('jax_use_shardy_partitioner', False)
  yield
  jax.config.update('jax_use_shardy_partitioner', before)
