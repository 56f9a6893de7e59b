"""What is written of the runs of a program, and shown, as they go."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from hetlora_jax import console, curves, files, points, rows, stopping, tracking
from hetlora_jax.config import Config, to_dict
from hetlora_jax.metrics import Metric, own_columns
from hetlora_jax.points import Points
from hetlora_jax.run import Run, anywhere
from hetlora_jax.types import Row, ServerState


class Point(NamedTuple):
  """A run: what, where, and how to repeat it."""

  config: Config
  workdir: pathlib.Path
  command: str = ''


class Record:
  """Everything that is written of the runs of a program, and shown."""

  def __init__(
    self,
    x: Points,
    runs: Sequence[Run],
    chosen: Sequence[Point],
    first: int,
    on_round: Callable[[Row], Any] | None,
    started: float,
    metrics: Mapping[str, Metric],
  ):
    """Opens the folders, of which the first process alone writes.

    Args:
      x: the runs together, those that fill up a mesh included.
      runs: those that are written.
      chosen: their configurations and commands.
      first: rounds done; rows up to there were written before its checkpoint.
      on_round: called with every row.
      started: when, in seconds, the program began with them.
      metrics: of one's own.
    """
    self._x, self._runs, self._chosen, self._started = x, runs, chosen, started
    self._metrics = metrics
    self._on_round = on_round or (lambda row: None)
    self.running = list(range(len(runs)))  # those that have not been stopped
    self._told_to_stop: set[int] = set()  # by `on_round`
    self._writes = jax.process_index() == 0
    histories = [run.history for run in runs]
    again = max(h[-1]['round'] if h else 0 for h in histories)
    if again > first:
      console.say(f'Rounds {first + 1} to {again} were not saved: they are run again.')
    for point in chosen if self._writes else ():
      files.write_json(point.workdir / 'config.json', to_dict(point.config))
    self._writers = [
      tracking.Writer(
        run.folder, [r for r in history if first and r['round'] <= first], self._writes
      )
      for run, history in zip(runs, histories, strict=True)
    ]
    self._compiling: Row = {}  # what the next rows tell of it
    self._last = x.config.federated.num_rounds
    self._progress = console.Progress(min(first, self._last), self._last)

  def __enter__(self) -> Record:
    return self

  def __exit__(self, *exc) -> None:
    self._progress.close()
    for writer in self._writers:
      writer.close()

  @property
  def evaluated(self) -> bool:
    """Whether all have been evaluated once."""
    return all(any('eval/seen/loss' in r for r in w.rows) for w in self._writers)

  def compiled(self, seconds: float) -> None:
    """Says how long compiling took, as the next rows do; a run's share of it."""
    console.say(f'Compiled in {seconds:.1f} s, which no round counts as its own.')
    self._compiling = {'time/compile_s': seconds / len(self._x.configs)}

  def evaluation(self, state: ServerState, done: int) -> list[Row]:
    """Evaluates all, writes people.json and returns the parts of their rows."""
    x, found = self._x, points.evaluate(self._x, state)
    out = [rows.evaluation_row(of_run) for of_run in found]
    for k in self.running:
      told = rows.people(x.experiment, x.initial_rank[k], found[k])
      self._writers[k].write_people({'round': done, **told})
      out[k] |= own_columns(self._metrics, x, state, done, found[k], k)
    return out

  def round(
    self, found: Sequence[dict], done: int, seconds: float, waited: float
  ) -> list[Row]:
    """Returns the rows of a finished round; times are those of one run."""
    out = [
      rows.round_row(self._x.experiment, c, done, of_run, seconds, waited)
      for c, of_run in zip(self._x.configs, found, strict=True)
    ]
    for row, writer in zip(out, self._writers, strict=False):
      rows.cumulate(row, writer.rows)
    return out

  def write(self, of_runs: list[Row]) -> None:
    """Writes and shows the rows of a round."""
    for k in self.running:
      of_runs[k] |= self._compiling
      self._writers[k].write(of_runs[k])
      answer = self._on_round(of_runs[k])
      if isinstance(answer, str) and answer == stopping.STOP:
        self._told_to_stop.add(k)
    self._compiling = {}
    self._progress.update([of_runs[k] for k in self.running])

  @property
  def best(self) -> list[int | None]:
    """The best round of every run, where it is to be kept."""
    keeps = self._x.config.checkpoint.keep_best
    return [judged.round if keeps and judged else None for judged in self._judged()]

  def _judged(self) -> list[stopping.Judged | None]:
    return [stopping.judge(w.rows, self._x.config.eval) for w in self._writers]

  def ending(self, done: int) -> dict[int, dict[str, Any]]:
    """Returns which runs end with a round before the last, and why."""
    e, out = self._x.config.eval, {}
    for k, judged in enumerate(self._judged()) if done < self._last else ():
      told = anywhere(k in self._told_to_stop)
      if k in self.running and (told or (judged and judged.stop is not None)):
        by, why = (
          'on_round',
          f'on_round returned {stopping.STOP!r}; delete summary.json',
        )
        if not told:
          by, why = 'eval.patience', f'{stopping.why(judged, e)}; raise it'
        out[k] = {'round': done, 'by': by, 'why': f'{why} to go on'}
    return out

  def sync(self) -> None:
    """Makes sure that the rows outlive the machine, before a checkpoint does."""
    for writer in self._writers:
      writer.sync()

  def finish(
    self, which: Sequence[int], stopped: Mapping[int, dict[str, Any]] | None = None
  ) -> None:
    """Writes summary.json and curves.png of runs that end.

    Args:
      which: their numbers.
      stopped: of those that end early, when and why.
    """
    c, judged = self._x.config, self._judged()
    seconds = (time.time() - self._started) / len(self._runs)
    for k in which if self._writes else ():
      run, found = self._runs[k], self._writers[k].rows
      summary = rows.summarise(
        self._x.experiment, found, seconds, self._chosen[k].command
      )
      best = judged[k]
      summary |= {
        'points_together': len(self._runs),
        'best': best and {'round': best.round, c.eval.metric: best.value},
        'stopped': stopped and stopped[k],
      }
      files.write_json(run.folder / 'summary.json', summary)
      title = f'{c.method}: {c.model.source} on {c.data.name}'
      curves.plot(found, title).savefig(run.folder / 'curves.png', dpi=110)
    for k, told in (stopped or {}).items():
      console.say(
        f'{self._runs[k].folder} stops after round {told["round"]}: {told["why"]}.'
      )
    self.running = [k for k in self.running if k not in which]
