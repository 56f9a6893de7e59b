"""Time and memory of an evaluation as more people are evaluated at once.

python -m benchmarks.evaluation [--config=configs/study.py:chat] [--repeats=5]

The median seconds of both sets of people, in turn in one process, their ratio to
one person at a time, the summed loss, and the megabytes that the program needs
besides its arguments, beside those of a round with one client at a time.
"""

import statistics
import time
from unittest import mock

from benchmarks import machine
from hetlora_jax import config, heldout, points

machine.define_config()
_AT_ONCE = (1, 4, 8, 16, 48)


def _megabytes(program) -> float:
  return program.memory_analysis().temp_size_in_bytes / 1e6


def _a_round(c: config.Config):
  """Returns the compiled round of clients one after the other."""
  x = points.prepare(c.replace(**{'federated.clients_at_once': 1}))
  cohort = points.make_cohorts(x, 1)
  return x.run_rounds.lower(*points.arguments(x, x.initial_state, cohort)).compile()


class Evaluation:
  """The evaluations of an experiment, so many people at once."""

  def __init__(self, c: config.Config, at_once: int):
    with mock.patch.object(heldout, 'PEOPLE_AT_ONCE', at_once):
      x = points.prepare(c)
      self._arguments = {
        name: (x.base, x.initial_state, x.evaluation[name], x.hyper)
        for name in x.evaluators
      }
      programs = {
        name: x.evaluators[name].lower(*arguments).compile()
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


def measure() -> dict:
  """Times evaluations of so many people at once, in turn."""
  c = config.resolve(machine.config())
  at_once = _AT_ONCE[:2] if machine.smoke() else _AT_ONCE
  evaluations = {n: Evaluation(c, n) for n in at_once}
  for _ in range(machine.repeats()):
    for evaluation in evaluations.values():
      evaluation.times.append(evaluation.run()[1])
  one = statistics.median(evaluations[1].times)
  return {
    'model': c.model.source, 'data': c.data.name, 'people': c.eval.num_people,
    'round_mb': _megabytes(_a_round(c)),
    'at_once': [
      {
        'people': n, 'seconds': statistics.median(e.times),
        'ratio': one / statistics.median(e.times), 'temporary_mb': e.megabytes,
        'loss': e.loss,
      }
      for n, e in evaluations.items()
    ],
  }  # fmt: skip


def report(result: dict) -> str:
  """Tells the evaluations."""
  rows = [
    [str(row['people']), f'{row["seconds"]:.2f}', f'{row["ratio"]:.2f}',
     f'{row["temporary_mb"]:.0f}', f'{row["loss"]:.4f}']
    for row in result['at_once']
  ]  # fmt: skip
  head = 'people at once | s | times as fast | temporary MB | summed loss'
  return (
    f'{machine.table(head, rows)}\n\n{result["model"]} on {result["data"]}, '
    f'twice {result["people"]} people; a round of one client at a time needs '
    f'{result["round_mb"]:.0f} MB. {machine.told(result["machine"])}.'
  )


if __name__ == '__main__':
  machine.run('evaluation', measure, report)
