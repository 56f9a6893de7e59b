"""How many clients a round fit on pods, by dry runs: a table for docs/scaling.md.

python -m benchmarks.capacity [--models=gemma3_1b,...] [--devices=64,256]
  [--chips=v5e,...]

Every cell compiles the round of --config with 1 and with 9 clients on each slice of
the clients axis, one at once; memory is linear in the clients that wait, so two
compilations tell the most that fit. TPU chips are compiled by libtpu if it is
installed; the others for fake CPU devices, whose temporaries are an upper bound:
CPUs compute bfloat16 products by way of float32.
"""

import contextlib

import jax
from absl import flags

from benchmarks import machine
from hetlora_jax import config
from hetlora_jax.tools import chips, dryrun

machine.define_config()
_MODELS = flags.DEFINE_list(
  'models',
  ['gemma3_1b', 'gemma3_4b', 'llama32_3b'],
  'Keys of models/shapes.py.',
)
_DEVICES = flags.DEFINE_list('devices', ['64', '256'], 'Of the pods.')
_MODEL_AXIS = flags.DEFINE_integer('model_axis', 4, 'Devices that share a base.')
_CHIPS = flags.DEFINE_list('chips', list(chips.CHIPS), 'Chips.')
_FEW, _MORE = 1, 9  # clients on each slice of the clients axis


def compiled(model: str, devices: int, chip: str, clients: int) -> dryrun.Report:
  """Compiles a round of so many clients on each slice of the clients axis."""
  raw = machine.config()
  slices = devices // _MODEL_AXIS.value
  raw.model.source = model
  raw.mesh.clients, raw.mesh.model = slices, _MODEL_AXIS.value
  raw.federated.clients_per_round = clients * slices
  raw.federated.clients_at_once = 1
  return dryrun.compile_for([config.resolve(raw)], chip)


def cell(model: str, devices: int, chip: str) -> dict:
  """Returns a device's bytes, and the most clients a round by them."""
  few, more = (compiled(model, devices, chip, n) for n in (_FEW, _MORE))
  each = (more.peak - few.peak) / (_MORE - _FEW)
  return {
    'model': model, 'devices': devices, 'compiler': few.compiler,
    'seconds': few.seconds + more.seconds, 'arguments': few.arguments,
    'argument_bytes': few.argument, 'temporary_bytes': few.temporary,
    'a_client_bytes': each, 'moved': few.moved, 'flops': few.flops,
    'peak_bytes': few.peak, 'clients_axis': devices // _MODEL_AXIS.value,
  }  # fmt: skip


def most(cell: dict, memory: float) -> int:
  """Returns the most clients a round that fit, 0 if not even one does."""
  room = (memory - cell['peak_bytes']) / cell['a_client_bytes']
  return max(0, int(_FEW + room)) * cell['clients_axis'] if room >= 0 else 0


def measure() -> dict:
  """Compiles all cells, keeping each as it comes."""
  models, devices = _MODELS.value, [int(n) for n in _DEVICES.value]
  names = _CHIPS.value
  if machine.smoke():
    models, devices, names = ['random'], [8], ['h100', 'h200']
  jax.config.update('jax_platforms', 'cpu')
  with contextlib.suppress(RuntimeError):  # there are some already
    jax.config.update('jax_num_cpu_devices', max(devices))
  result: dict = {'cells': []}
  for model in models:
    for count in devices:
      done: dict = {}
      for chip in names:
        compiler = chips.compiler_of(chip)
        if compiler not in done:
          done[compiler] = cell(model, count, chip)
        found = done[compiler] | {'chip': chip}
        found['most_clients'] = most(found, chips.CHIPS[chip].memory)
        result['cells'].append(found)
        print(
          f'{model}, {count} {chip}: {found["most_clients"]:,} clients',
          flush=True,
        )
        machine.save('capacity', result)
  return result


def report(result: dict) -> str:
  """Tells the cells, a row each."""
  rows = []
  for c in result['cells']:
    base = c['arguments']['base']
    rows.append([
      c['model'], str(c['devices']), c['chip'], f'{base / 1e9:.2f} GB',
      f'{(c["argument_bytes"] - base) / 1e6:.0f} MB',
      f'{c["temporary_bytes"] / 1e9:.2f} GB',
      f'{c["a_client_bytes"] / 1e6:.1f} MB', f'{c["most_clients"]:,}',
      f'{c["seconds"]:.0f} s',
    ])  # fmt: skip
  head = (
    'model | devices | chip | base | state | temporaries | a waiting client | '
    'most clients a round | compiled in'
  )
  return (
    f'{machine.table(head, rows)}\n\nCompiled, twice a row ("compiled in" is '
    f'both), on {machine.told(result["machine"])}.'
  )


if __name__ == '__main__':
  machine.run('capacity', measure, report)
