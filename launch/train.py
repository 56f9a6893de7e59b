"""Trains: python -m launch.train --config=configs/tiny.py --workdir=DIR."""

import pathlib

import jax
from absl import flags as absl_flags

from hetlora_jax import config as config_lib
from hetlora_jax import console, rows, training
from launch import flags

BRANCH_FROM = absl_flags.DEFINE_string(
  'branch_from',
  None,
  'Start a new run from the state of another after a round, DIR@ROUND, whatever '
  'its configuration; the base model and shapes must be the same.',
)


def train(config: config_lib.Config, workdir: pathlib.Path) -> None:
  """Runs or continues the experiment and prints perplexity before and after."""
  branch = BRANCH_FROM.value and training.parse_branch(BRANCH_FROM.value)
  run = training.train(config, workdir, branch=branch or None, command=flags.command())
  if jax.process_index() == 0:
    console.say(f'\n{rows.table(run.summary)}\n\nResults are in {workdir}/')


def main() -> None:
  """Starts the program, hetlora-train too."""
  flags.run(train)


if __name__ == '__main__':
  main()
