"""What the programs share: --config, --workdir, and errors in one line.

Precedence: configs/default.py, then the --config file, then --config.X=... on
the command line (or in a --flagfile).
"""

import importlib
import pathlib
import shlex
import sys
from collections.abc import Callable

import jax
from absl import flags, logging
from ml_collections import config_flags

from hetlora_jax import config as config_lib
from hetlora_jax import console, files, training
from hetlora_jax.methods import registry
from hetlora_jax.run import Run
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
VERBOSE = flags.DEFINE_bool(
  'verbose', False, "Show libraries' messages and the tracebacks of errors."
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


def arguments() -> list[str]:
  """Returns this call's flags as words, `--name value` joined to one."""
  words = []
  for word in sys.argv[1:]:
    if words and not word.startswith('-') and '=' not in words[-1]:
      words[-1] = f'{words[-1]}={word}'
    else:
      words.append(word)
  return words


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
    count = max(1, mesh.devices)
    jax.config.update('jax_num_cpu_devices', count)
  elif DISTRIBUTED.value and needed:
    _join_processes()


def dry_run(*points: config_lib.Config) -> None:
  """Prints what a program of some points would need."""
  report = dryrun.compile_for(points, CHIP.value)
  print(dryrun.render(report, CHIP.value))


def run(
  program: Callable[[config_lib.Config, pathlib.Path], None],
  dry_run: Callable[[config_lib.Config], None] = dry_run,
  needs_devices: Callable[[], bool] = lambda: True,
  config_of_run: bool = False,
) -> None:
  """Runs a program on the resolved config and the workdir.

  Args:
    program: what to do.
    dry_run: what to do instead with --dry_run.
    needs_devices: asked once flags are parsed; a program that only starts
      others leaves the devices to them.
    config_of_run: without --config, take that of the run in --workdir.
  """

  def main(argv):
    # First of all: checking the config already starts jax.
    # Libraries log the tracebacks of what they also raise.
    logging.set_verbosity(logging.INFO if VERBOSE.value else logging.FATAL)
    if len(argv) > 1:
      errors.fail(f'unexpected argument {argv[1]!r}: flags start with --')
    if LIST_METHODS.value:
      print(registry.table())
      return
    of_run = config_of_run and WORKDIR.value and CONFIG.value is None
    if CONFIG.value is None and not of_run:
      errors.fail('--config is missing: try --config=configs/tiny.py')
    try:
      for module in IMPORT.value:
        importlib.import_module(module)
      raw = CONFIG.value
      if of_run:
        raw = Run(WORKDIR.value).config
      _choose_devices(raw, needs_devices())
      config = config_lib.resolve(raw)
      if PRINT_CONFIG.value:
        print(config_lib.explain(config))
        return
      if DRY_RUN.value:
        dry_run(config)
        return
      if not WORKDIR.value:
        errors.fail('--workdir is missing: name a folder for the results')
      _keep_programs()
      console.guard = signals.stop_after_the_round
      program(config, pathlib.Path(WORKDIR.value))
    except (config_lib.ConfigError, ImportError, ValueError, OSError) as error:
      if VERBOSE.value:
        raise
      errors.fail(error)
    except MemoryError as error:
      if VERBOSE.value:
        raise
      errors.fail(
        f'there is not enough memory ({error}): take fewer clients at once, '
        'a smaller model, or look whether its files are damaged.'
      )
    except training.Interrupted as error:
      print(f'{error} The state is saved; to go on:\n  {command()}')
      sys.exit(console.SAVED)
    except KeyboardInterrupt:
      print('\nStopped before the first round; there was nothing to save.')
      sys.exit(signals.INTERRUPTED)

  if '--helpfull' in sys.argv:
    fields = config_lib.explain(config_lib.Config())
    program_module = sys.modules[program.__module__]
    about = f'{program_module.__doc__}\nFields and defaults:\n{fields}\n'
    program_module.__doc__ = about
  program_lib.start(main, program.__module__, __name__)
