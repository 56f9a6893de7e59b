"""Evaluates a run's newest checkpoint: python -m launch.evaluate."""

import json
import pathlib

from hetlora_jax import config as config_lib
from hetlora_jax import training
from launch import flags


def evaluate(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Prints the evaluation of the newest checkpoint as one JSON object."""
  print(json.dumps(training.evaluate_checkpoint(config, workdir)))


if __name__ == '__main__':
  flags.run(evaluate)
