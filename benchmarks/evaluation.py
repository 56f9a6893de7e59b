"""Time and memory of an evaluation as more people are evaluated at once.

python -m benchmarks.evaluation [--config=configs/study.py:chat] [--repeats=5]

Prints the median seconds of both sets of people, in turn in one process, their
ratio to one person at a time, the summed loss, and the megabytes that the program
needs besides its arguments, below those of a round with one client at a time.
"""

import statistics
import time
from unittest import mock

from absl import flags

from benchmarks import machine
from hetlora_jax import config, experiment, sweep
from hetlora_jax.evaluation import perplexity

_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed evaluations of each.', 1)
_CONFIG = machine.define_config()
_AT_ONCE = (1, 4, 8, 16, 48)


def _megabytes(program) -> float:
  return program.memory_analysis().temp_size_in_bytes / 1e6


def _a_round(c: config.Config):
  """Returns the compiled round of clients one after the other."""
  x = experiment.prepare(sweep.with_fields(c, {'federated.clients_at_once': 1}))
  cohort = experiment.make_cohorts(x, 1)
  return x.run_rounds.lower(x.base, x.initial_state, cohort, x.hyper).compile()


class Evaluation:
  """The evaluations of an experiment, so many people at once."""

  def __init__(self, c: config.Config, at_once: int):
    with mock.patch.object(perplexity, 'PEOPLE_AT_ONCE', at_once):
      x = experiment.prepare(c)
      self._arguments = {
        name: (x.base, x.initial_state, x.evaluation[name], x.hyper)
        for name in x.evaluate
      }
      programs = {
        name: x.evaluate[name].lower(*arguments).compile()
        for name, arguments in self._arguments.items()
      }
    self._programs = programs
    self.megabytes = max(map(_megabytes, programs.values()))
    self.loss, _ = self.run()
    self.times = []

  def run(self) -> tuple[float, float]:
    """Returns the summed loss and the seconds that it took."""
    start, loss = time.perf_counter(), 0.0
    for name, program in self._programs.items():
      losses_KE, _ = program(*self._arguments[name])
      loss += float(losses_KE.sum())
    return loss, time.perf_counter() - start


def main() -> None:
  c = config.resolve(_CONFIG.value)
  print(f'a round, one client at a time: {_megabytes(_a_round(c)):.0f} MB')
  evaluations = {n: Evaluation(c, n) for n in _AT_ONCE}
  for _ in range(_REPEATS.value):
    for evaluation in evaluations.values():
      evaluation.times.append(evaluation.run()[1])
  one = statistics.median(evaluations[1].times)
  print(f'{"at once":>8}{"s":>8}{"ratio":>8}{"MB":>8}{"summed loss":>14}')
  for n, e in evaluations.items():
    median = statistics.median(e.times)
    ratio = one / median
    print(
      f'{n:>8}{median:>8.2f}{ratio:>8.2f}{e.megabytes:>8.0f}{e.loss:>14.4f}'
    )


if __name__ == '__main__':
  machine.run(main)
