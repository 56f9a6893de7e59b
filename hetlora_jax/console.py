"""What a person at the terminal sees of a run, and how they stop it."""

import concurrent.futures
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

import tqdm

from hetlora_jax import metrics


def say(text: str) -> None:
  """Prints a line, above the bar if there is one."""
  tqdm.tqdm.write(text, file=sys.stdout)
  sys.stdout.flush()


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


class Progress:
  """A bar on a terminal, plain lines elsewhere."""

  def __init__(self, first: int, last: int):
    self._bar = tqdm.tqdm(
      initial=first,
      total=last,
      unit='round',
      disable=not sys.stderr.isatty(),
      dynamic_ncols=True,
    )
    self._last, self._perplexity = last, {}

  def update(self, row: metrics.Row) -> None:
    for who in ('seen', 'unseen'):
      if f'eval/{who}/perplexity' in row:
        self._perplexity[who] = f'{row[f"eval/{who}/perplexity"]:.2f}'
    if 'train/loss' not in row:
      text = ', '.join(f'{k} {v}' for k, v in self._perplexity.items())
      when = (
        f'after round {row["round"]}' if row['round'] else 'before training'
      )
      say(f'perplexity {when}: {text}')
      return
    shown = {
      'loss': f'{row["train/loss"]:.3f}',
      'rank': f'{row["rank/mean"]:.1f}',
      'tok/s': f'{row["time/tokens_per_s"]:.0f}',
      **{f'ppl {k}': v for k, v in self._perplexity.items()},
    }
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update()
    if self._bar.disable:
      stale = not any(k.startswith('eval/') for k in row)
      text = '  '.join(
        f'{k} {v}' for k, v in shown.items() if not (stale and 'ppl' in k)
      )
      seconds = row['time/round_s']
      say(f'round {row["round"]}/{self._last}  {text}  {seconds:.1f} s')

  def close(self) -> None:
    self._bar.close()
