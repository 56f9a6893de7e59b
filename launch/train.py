"""Trains: python -m launch.train --config=configs/tiny.py --workdir=DIR."""

import pathlib

from hetlora_jax import config as config_lib
from hetlora_jax import console, results, training
from launch import flags


def train(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Runs or continues the experiment and prints perplexity before and after."""
  summary = training.run(config, workdir, flags.command())
  console.say(f'\n{results.table(summary)}\n\nResults are in {workdir}/')


if __name__ == '__main__':
  flags.run(train)
