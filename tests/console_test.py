"""Signals are noticed while a round runs, not after it."""

import hashlib
import os
import signal
import sys
import threading
import time

from hetlora_jax import console
from launch import signals


def _one_long_step():
  """Works for some seconds without a step of Python, as XLA does."""
  hashlib.pbkdf2_hmac('sha256', b'password', b'salt', 6_000_000)


def test_a_signal_is_noticed_during_a_long_step(capfd):
  noticed = []

  def watch():
    while not console.stopping():
      time.sleep(0.01)
    noticed.append(time.monotonic())

  kill = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
  watcher = threading.Thread(target=watch)
  with signals.stop_after_the_round(), console.background() as in_background:
    start = time.monotonic()
    watcher.start()
    kill.start()
    in_background(_one_long_step)
    end = time.monotonic()
    watcher.join()
    assert console.stopping()
  assert 'Stopping after this round' in capfd.readouterr().out
  assert end - start > 1  # else the step is too short to tell
  assert noticed[0] - start < (end - start) / 2


def test_a_signal_may_come_while_output_is_written(monkeypatch, capfd):
  monkeypatch.setattr(sys, 'stdout', None)  # as busy as one that is being written
  with signals.stop_after_the_round():
    os.kill(os.getpid(), signal.SIGINT)
    assert console.stopping()
  assert 'Stopping after this round' in capfd.readouterr().out


def test_handlers_are_put_back_and_requests_forgotten():
  before = signal.getsignal(signal.SIGINT)
  with signals.stop_after_the_round():
    assert signal.getsignal(signal.SIGINT) != before
    console.request_stop(signal.SIGTERM)
  assert signal.getsignal(signal.SIGINT) == before
  assert not console.stopping()
