"""What a person at the terminal sees of a run, and how they stop it."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tqdm

from hetlora_jax import metrics


def say(text: str) -> None:
  """Prints a line, above the bar if there is one; one process speaks for all."""
  if jax.process_index():
    return
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


SAVED = 75  # exit code: stopped after a saved round, try again (EX_TEMPFAIL)
INTERRUPTED = 130  # exit code: stopped without saving, as shells report Ctrl-C


class PassSignals:
  """Passes Ctrl-C and SIGTERM on to processes, which end by themselves."""

  def __init__(self):
    self.processes: list[subprocess.Popen] = []
    self.received = None

  def __enter__(self):
    self._before = {
      number: signal.signal(number, self._pass)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def _pass(self, number, frame):
    del frame
    self.received = number
    for process in self.processes:
      process.send_signal(number)

  def __exit__(self, *exc):
    for number, handler in self._before.items():
      signal.signal(number, handler)


def end_with_parent() -> None:
  """Ends this process at once when the one that holds its stdin has ended."""

  def wait():
    while os.read(0, 1):
      pass
    os._exit(INTERRUPTED)

  threading.Thread(target=wait, daemon=True).start()


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


class StopSignal:
  """Notes Ctrl-C and SIGTERM; a second one ends the process at once.

  Checkpoints appear whole or not at all, so nothing is left to clean up.
  """

  def __enter__(self):
    self.received = None
    self._before = {
      number: signal.signal(number, self._note)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def _note(self, number, frame):
    del frame
    if self.received:
      os._exit(128 + number)
    self.received = number
    print('\nStopping after this round; once more to stop now.', flush=True)

  def __exit__(self, *exc):
    for number, handler in self._before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def background() -> Iterator[Callable]:
  """Yields a way to call a function so that signals are noticed meanwhile.

  Python handles a signal between two steps of its main thread, and a round is
  one long step: it runs on another thread while the main one waits.
  """
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    yield lambda function, *args: pool.submit(function, *args).result()


def _span(rows: list[metrics.Row], name: str, digits: int) -> str:
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
    self._last, self._perplexity = last, {}

  def update(self, rows: list[metrics.Row]) -> None:
    """Shows a round of one run, or of several that run together."""
    row = rows[0]
    for who in ('seen', 'unseen'):
      if f'eval/{who}/perplexity' in row:
        self._perplexity[who] = _span(rows, f'eval/{who}/perplexity', 2)
    if 'train/loss' not in row:
      text = ', '.join(f'{k} {v}' for k, v in self._perplexity.items())
      when = f'after round {row["round"]}' if row['round'] else 'before training'
      say(f'perplexity {when}: {text}')
      return
    shown = {
      'loss': _span(rows, 'train/loss', 3),
      'rank': _span(rows, 'rank/mean', 1),
      'tok/s': f'{np.mean([r["time/tokens_per_s"] for r in rows]):.0f}',
      **{f'ppl {k}': v for k, v in self._perplexity.items()},
    }
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update()
    if self._bar.disable:
      stale = not any(k.startswith('eval/') for k in row)
      text = '  '.join(
        f'{k} {v}' for k, v in shown.items() if not (stale and 'ppl' in k)
      )
      seconds = sum(r['time/round_s'] for r in rows)
      say(f'round {row["round"]}/{self._last}  {text}  {seconds:.1f} s')

  def close(self) -> None:
    self._bar.close()
