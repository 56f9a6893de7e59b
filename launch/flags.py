"""What the programs share: --config, --workdir, and errors in one line.

Precedence: configs/default.py, then the --config file, then --config.X=... on
the command line (or in a --flagfile).
"""

import importlib
import os
import pathlib
import shlex
import sys
from collections.abc import Callable

import jax
from absl import flags
from ml_collections import config_flags

from hetlora_jax import config as config_lib
from hetlora_jax import console, files, training
from hetlora_jax.methods import registry
from hetlora_jax.tools import chips, dryrun
from launch import errors, signals
from launch import program as program_lib

CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'Experiment to run, e.g. configs/tiny.py; change any field with '
  '--config.section.field=value. --print_config explains every field.',
)
WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; an earlier run in it is continued.'
)
IMPORT = flags.DEFINE_list(
  'import',
  [],
  'Modules of yours to import first, which register rules (docs/methods.md).',
)
PRINT_CONFIG = flags.DEFINE_bool(
  'print_config', False, 'Print every field, its value and meaning, and exit.'
)
LIST_METHODS = flags.DEFINE_bool(
  'list_methods', False, 'Print every method, its rules and source, and exit.'
)
DRY_RUN = flags.DEFINE_bool(
  'dry_run',
  False,
  'Compile for the devices of config.mesh without having them, nor weights nor '
  'data; print what a device would hold, and exit.',
)
CHIP = flags.DEFINE_enum(
  'chip', 'v5e', list(chips.CHIPS), 'Accelerator that --dry_run asks about.'
)
DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'Join the other processes of this job: Slurm, Open MPI, Kubernetes and TPU '
  'pods are detected; elsewhere name them with the flags below.',
)
COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT of the first process (--distributed).'
)
NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Processes of the job (--distributed).'
)
PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Number of this process, from 0 (--distributed).'
)


def command() -> str:
  """Returns the line that repeats this call."""
  return shlex.join([*program_lib.words(), *sys.argv[1:]])


def workdir() -> pathlib.Path:
  """Returns --workdir; no shell expands the ~ of --workdir=~/runs."""
  return pathlib.Path(WORKDIR.value).expanduser()


def _keep_programs() -> None:
  """Keeps compiled programs from one run to the next."""
  if not jax.config.jax_compilation_cache_dir:
    programs = files.cache_folder() / 'programs'
    jax.config.update('jax_compilation_cache_dir', str(programs))


def _join_processes() -> None:
  """Makes this process one of several; must come before any use of devices."""
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  except (ValueError, RuntimeError) as error:
    errors.fail(
      f'--distributed: {error} Where no Slurm, Open MPI, Kubernetes or TPU pod '
      'is detected, give --coordinator_address, --num_processes, --process_id.'
    )


def _choose_devices(raw, needed: bool) -> None:
  """Decides on devices before checking the config starts jax."""
  mesh = config_lib.built(raw).mesh
  if min(mesh.sweep, mesh.clients, mesh.model) > 1:
    # Shardy of jax 0.12 aborts where all three axes divide (docs/log.md).
    jax.config.update('jax_use_shardy_partitioner', False)
  if DRY_RUN.value or not needed:
    jax.config.update('jax_platforms', 'cpu')
  if DRY_RUN.value:
    jax.config.update('jax_num_cpu_devices', max(1, mesh.devices))
  elif DISTRIBUTED.value and needed:
    _join_processes()


def _check_environment() -> None:
  """Ends the program where a variable would silently change what is computed."""
  if jax.config.jax_enable_x64:
    errors.fail('JAX_ENABLE_X64 changes the numbers of every run: unset it')
  if jax.config.jax_numpy_dtype_promotion != 'standard':
    errors.fail('JAX_NUMPY_DTYPE_PROMOTION must be standard, its default: unset it')


def _check_devices() -> None:
  """Ends the program if JAX_PLATFORMS names devices that are not here."""
  try:
    jax.devices()
  except (AssertionError, RuntimeError) as error:  # jax asserts that there is one
    why = f' ({files.short(error, 200)})' if str(error) else ''
    errors.fail(
      f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS")} names no device that JAX finds '
      f'here{why}: unset it, or install hetlora_jax[cuda] or hetlora_jax[tpu]'
    )


def _chosen():
  """Returns --config, which is that of the run in --workdir unless it is given."""
  if CONFIG.value is None:
    errors.fail(
      '--config is missing: try --config=configs/tiny.py, or the --workdir of a run'
    )
  return CONFIG.value


def dry_run(*points: config_lib.Config) -> None:
  """Prints what a program of some points would need."""
  report = dryrun.compile_for(points, CHIP.value)
  print(dryrun.render(report, CHIP.value))


Program = Callable[[config_lib.Config, pathlib.Path], None]


def run(
  program: Program,
  dry_run: Callable[[config_lib.Config], None] = dry_run,
  needs_devices: Callable[[], bool] = lambda: True,
) -> None:
  """Runs a program on the resolved config and the workdir.

  Args:
    program: what to do.
    dry_run: what to do instead with --dry_run.
    needs_devices: asked once flags are parsed; a program that only starts
      others leaves the devices to them.
  """

  def main() -> None:
    # The configuration: the user's rules must be there when it is checked.
    sys.path.insert(0, os.getcwd())  # not there under the name hetlora-train
    for module in IMPORT.value:
      importlib.import_module(module)
    if LIST_METHODS.value:
      print(registry.table())
      return
    _check_environment()
    raw = _chosen()
    _choose_devices(raw, needs_devices())
    config = config_lib.resolve(raw)

    # What is asked of it.
    if PRINT_CONFIG.value:
      print(config_lib.explain(config))
      return
    _check_devices()
    if DRY_RUN.value:
      dry_run(config)
    elif not WORKDIR.value:
      errors.fail('--workdir is missing: name a folder for the results')
    else:
      _keep_programs()
      _run_until_stopped(program, config, workdir())

  if '--helpfull' in sys.argv:
    module = sys.modules[program.__module__]
    fields = config_lib.explain(config_lib.Config())
    module.__doc__ = f'{module.__doc__}\nFields and defaults:\n{fields}\n'
  program_lib.start(main, program.__module__, __name__)


def _run_until_stopped(
  program: Program, config: config_lib.Config, workdir: pathlib.Path
) -> None:
  """Runs a program; if somebody stops it, says so and how to go on."""
  console.guard = signals.stop_after_the_round
  try:
    program(config, workdir)
  except training.Interrupted as error:
    print(f'{error} The state is saved; to go on:\n  {command()}')
    sys.exit(console.SAVED)
  except KeyboardInterrupt:
    print('\nStopped before the first round; there was nothing to save.')
    sys.exit(signals.INTERRUPTED)
