"""Signals are noticed while a round runs, not after it."""

import hashlib
import os
import signal
import threading
import time

from hetlora_jax import console


def _one_long_step():
  """Works for some seconds without a step of Python, as XLA does."""
  hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 6_000_000)


def test_a_signal_is_noticed_during_a_long_step():
  noticed = []

  class Stop(console.StopSignal):
    def _note(self, number, frame):
      noticed.append(time.monotonic())
      super()._note(number, frame)

  kill = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
  with Stop() as stop, console.background() as in_background:
    start = time.monotonic()
    kill.start()
    in_background(_one_long_step)
    end = time.monotonic()
  kill.join()
  assert stop.received == signal.SIGINT
  assert end - start > 1  # else the step is too short to tell
  assert noticed[0] - start < (end - start) / 2


def test_handlers_are_put_back():
  before = signal.getsignal(signal.SIGINT)
  with console.StopSignal():
    assert signal.getsignal(signal.SIGINT) != before
  assert signal.getsignal(signal.SIGINT) == before
