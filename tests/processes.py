"""One of several processes of two devices that run a few methods together.

python tests/processes.py PROCESS COUNT PORT FOLDER METHOD...
"""

import pathlib
import sys

import devices_test
import jax

from hetlora_jax import training


def main() -> None:
  process, count, port, folder, *methods = sys.argv[1:]
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{port}', int(count), int(process))
  for method in methods:
    config = devices_test.many_rounds(method, (1, int(count), 2))
    training.train(config, pathlib.Path(folder, method))


if __name__ == '__main__':
  main()
