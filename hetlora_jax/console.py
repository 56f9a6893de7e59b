"""What a person at the terminal sees of a run, and whether they want it to stop."""

import concurrent.futures
import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tqdm

from hetlora_jax.types import Row


def say(text: str) -> None:
  """Prints a line, above the bar if there is one; one process speaks for all."""
  if jax.process_index():
    return
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


SAVED = 75  # exit code: stopped after a saved round, try again (EX_TEMPFAIL)
_requests: list[int] = []  # signals by which somebody asked the run to stop


def request_stop(number: int) -> None:
  """Asks a run in this process to stop after its round; see launch/signals.py."""
  _requests.append(number)


def forget_requests() -> None:
  """Lets the next run in this process go on."""
  _requests.clear()


def stopping() -> bool:
  """Tells whether somebody asked the run to stop."""
  return bool(_requests)


# Entered while rounds run: what notices that somebody asks. A library leaves signals
# alone; launchers put `launch.signals.stop_after_the_round` here.
guard: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@contextlib.contextmanager
def not_left_alone() -> Iterator[None]:
  """Ends this process at once if a run of several has lost another one.

  To wait for it, in saving and at exit, would take minutes.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    print(
      f'Error: another process of this run failed ({str(error).splitlines()[0]})'
      ': start all of them again, and they go on after the last checkpoint.',
      file=sys.stderr,
      flush=True,
    )
    os._exit(SAVED)


@contextlib.contextmanager
def background() -> Iterator[Callable]:
  """Yields a way to call a function so that signals are noticed meanwhile.

  Python handles a signal between two steps of its main thread, and a round is
  one long step: it runs on another thread while the main one waits.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    yield lambda function, *args: pool.submit(function, *args).result()


def _span(rows: list[Row], name: str, digits: int) -> str:
  """Renders the value of one run, or the least and most of several."""
  least, most = (f(r[name] for r in rows) for f in (min, max))
  texts = dict.fromkeys(f'{value:.{digits}f}' for value in (least, most))
  return '..'.join(texts)


class Progress:
  """A bar on a terminal, plain lines elsewhere."""

  def __init__(self, first: int, last: int):
    self._bar = tqdm.tqdm(
      initial=first,
      total=last,
      unit='round',
      disable=not sys.stderr.isatty() or jax.process_index() > 0,
      dynamic_ncols=True,
    )
    self._last, self._perplexity, self._accuracy = last, {}, {}

  def update(self, rows: list[Row]) -> None:
    """Shows a round of one run, or of several that run together."""
    row = rows[0]
    for who in ('seen', 'unseen'):
      if f'eval/{who}/perplexity' in row:
        self._perplexity[who] = _span(rows, f'eval/{who}/perplexity', 2)
      if f'eval/{who}/accuracy' in row:
        self._accuracy[who] = _span(rows, f'eval/{who}/accuracy', 3)
    if 'train/loss' not in row:
      when = f'after round {row["round"]}' if row['round'] else 'before training'
      for name, of_sets in (
        ('perplexity', self._perplexity),
        ('accuracy', self._accuracy),
      ):
        if of_sets:
          say(f'{name} {when}: {", ".join(f"{k} {v}" for k, v in of_sets.items())}')
      return
    shown = {
      'loss': _span(rows, 'train/loss', 3),
      'rank': _span(rows, 'rank/mean', 1),
      'tok/s': f'{np.mean([r["time/tokens_per_s"] for r in rows]):.0f}',
      **{f'ppl {k}': v for k, v in self._perplexity.items()},
      **{f'acc {k}': v for k, v in self._accuracy.items()},
    }
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update()
    if self._bar.disable:
      stale = not any(k.startswith('eval/') for k in row)
      text = '  '.join(
        f'{k} {v}'
        for k, v in shown.items()
        if not (stale and k[:4] in ('ppl ', 'acc '))
      )
      seconds = sum(r['time/round_s'] for r in rows)
      say(f'round {row["round"]}/{self._last}  {text}  {seconds:.1f} s')

  def close(self) -> None:
    self._bar.close()
