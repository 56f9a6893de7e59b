"""Ctrl-C and SIGTERM: a run stops after its round, or passes them on to its children."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from hetlora_jax import console

INTERRUPTED = 130  # exit code: stopped without saving, as shells report Ctrl-C


@contextlib.contextmanager
def handled_by(handler: Callable) -> Iterator[None]:
  """Gives both signals to a handler for a while."""
  before = {n: signal.signal(n, handler) for n in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, earlier in before.items():
      signal.signal(number, earlier)


@contextlib.contextmanager
def stop_after_the_round() -> Iterator[None]:
  """Lets a run end with a saved state; a second signal ends the process at once.

  Checkpoints appear whole or not at all, so nothing is left to clean up.
  """

  def note(number, frame):
    del frame
    if console.stopping():
      os._exit(128 + number)
    console.request_stop(number)
    # Not print: the signal may have come while the same stream is being written.
    os.write(1, b'\nStopping after this round; once more to stop now.\n')

  try:
    with handled_by(note):
      yield
  finally:
    console.forget_requests()


def end_with_parent() -> None:
  """Ends this process at once when the one that holds its stdin has ended."""

  def wait():
    while os.read(0, 1):
      pass
    os._exit(INTERRUPTED)

  threading.Thread(target=wait, daemon=True).start()
