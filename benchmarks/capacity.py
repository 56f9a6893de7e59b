"""How many clients a round fit on pods, by dry runs: a table for docs/scaling.md.

python -m benchmarks.capacity [--models=gemma3_1b,...] [--devices=64,256]
  [--chips=v5e,...]

Every cell compiles the round of --config with 1 and with 9 clients on each slice of
the clients axis, one at once; memory is linear in the clients that wait, so two
compilations tell the most that fit. TPU chips are compiled by libtpu if it is
installed; the others for fake CPU devices, whose temporaries are an upper bound:
CPUs compute bfloat16 products by way of float32.
"""

import jax
from absl import flags

from benchmarks import machine
from hetlora_jax import config, dryrun

_CONFIG = machine.define_config()
_MODELS = flags.DEFINE_list(
  'models',
  ['gemma3_1b', 'gemma3_4b', 'llama32_3b'],
  'Keys of models/shapes.py.',
)
_DEVICES = flags.DEFINE_list('devices', ['64', '256'], 'Of the pods.')
_MODEL_AXIS = flags.DEFINE_integer(
  'model_axis', 4, 'Devices that share a base.'
)
_CHIPS = flags.DEFINE_list('chips', list(dryrun.CHIPS), 'Chips.')
_OUT = flags.DEFINE_string('out', 'benchmarks/results/capacity.json', 'Result.')
_FEW, _MORE = 1, 9  # clients on each slice of the clients axis


def compiled(
  model: str, devices: int, chip: str, clients: int
) -> dryrun.Report:
  """Compiles a round of so many clients on each slice of the clients axis."""
  raw = _CONFIG.value.copy_and_resolve_references()
  slices = devices // _MODEL_AXIS.value
  raw.model.source = model
  raw.mesh.clients, raw.mesh.model = slices, _MODEL_AXIS.value
  raw.federated.clients_per_round = clients * slices
  raw.federated.clients_at_once = 1
  return dryrun.compile_for([config.resolve(raw)], chip)


def measure(model: str, devices: int, chip: str) -> dict:
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


def main() -> None:
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', max(map(int, _DEVICES.value)))
  result: dict = {'machine': machine.describe(), 'cells': []}
  print('| model | devices | chip | base | state | temporaries | a waiting '
        'client | most clients a round | compiled in |')  # fmt: skip
  print('|---|---:|---|---:|---:|---:|---:|---:|---:|')
  for model in _MODELS.value:
    for devices in map(int, _DEVICES.value):
      done: dict = {}
      for chip in _CHIPS.value:
        compiler = dryrun.compiler_of(chip)
        if compiler not in done:
          done[compiler] = measure(model, devices, chip)
        cell = done[compiler] | {'chip': chip}
        cell['most_clients'] = most(cell, dryrun.CHIPS[chip].memory)
        result['cells'].append(cell)
        base = cell['arguments']['base']
        print(
          f'| {model} | {devices} | {chip} | {base / 1e9:.2f} GB '
          f'| {(cell["argument_bytes"] - base) / 1e6:.0f} MB '
          f'| {cell["temporary_bytes"] / 1e9:.2f} GB '
          f'| {cell["a_client_bytes"] / 1e6:.1f} MB '
          f'| {cell["most_clients"]:,} | {cell["seconds"]:.0f} s |',
          flush=True,
        )
        machine.write(_OUT.value, result)


if __name__ == '__main__':
  machine.run(main)
