"""Time and memory of an evaluation as more people are evaluated at once.

python -m benchmarks.evaluation [--config=configs/study.py:chat] [--repeats=5]

Prints the median seconds of both sets of people, in turn in one process, their
ratio to one person at a time, the summed loss, and the megabytes that the program
needs besides its arguments, below those of a round with one client at a time.
"""

from unittest import mock

import jax
import numpy as np
from absl import flags

from benchmarks import machine
from hetlora_jax import config, experiment, sweep
from hetlora_jax.evaluation import perplexity

_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed evaluations of each.')
_CONFIG = machine.define_config()
_AT_ONCE = (1, 4, 8, 16, 48)


def _compiled(x: experiment.Experiment) -> dict[str, jax.stages.Compiled]:
  return {
    name: evaluate.lower(
      x.base, x.initial_state, x.evaluation[name], x.hyper
    ).compile()
    for name, evaluate in x.evaluate.items()
  }


def _prepared(c: config.Config, at_once: int):
  """Returns an experiment and its compiled evaluations."""
  with mock.patch.object(perplexity, 'PEOPLE_AT_ONCE', at_once):
    x = experiment.prepare(c)
    return x, _compiled(x)


def _megabytes(program: jax.stages.Compiled) -> float:
  return program.memory_analysis().temp_size_in_bytes / 1e6


def main() -> None:
  c = config.resolve(_CONFIG.value)
  one = sweep.with_fields(
    config.build(_CONFIG.value), {'federated.clients_at_once': 1}
  )
  x = experiment.prepare(one)
  cohort = experiment.make_cohorts(x, 1)
  a_round = x.run_rounds.lower(
    x.base, x.initial_state, cohort, x.hyper
  ).compile()
  print(f'a round, one client at a time: {_megabytes(a_round):.0f} MB')
  runs = {n: _prepared(c, n) for n in _AT_ONCE}
  times = {n: [] for n in runs}
  for _ in range(_REPEATS.value + 1):  # the first warms up
    for n, (x, programs) in runs.items():
      times[n].append(
        sum(
          machine.seconds(
            run, x.base, x.initial_state, x.evaluation[name], x.hyper
          )
          for name, run in programs.items()
        )
      )
  first = np.median(times[1][1:])
  print(f'{"at once":>8}{"s":>8}{"ratio":>8}{"MB":>8}{"summed loss":>14}')
  for n, (x, programs) in runs.items():
    median = np.median(times[n][1:])
    loss = sum(
      float(e.loss_KE.sum())
      for e in experiment.evaluate(x, x.initial_state).values()
    )
    most = max(map(_megabytes, programs.values()))
    print(
      f'{n:>8}{median:>8.2f}{first / median:>8.2f}{most:>8.0f}{loss:>14.4f}'
    )


if __name__ == '__main__':
  machine.run(main)
