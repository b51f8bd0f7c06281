"""Ctrl-C and SIGTERM, which Python and its libraries can lose."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from typing import Any

from ernie_jax.config import Interrupted

GRACE = 5.0  # seconds in which a verb that was asked to end must have ended


def leave(number: int, _: Any = None) -> None:
  """Ends the process now; whatever it was at is safe against that."""
  os.write(2, b"\nernie-jax: interrupted; give the same command again\n")
  os._exit(128 + number)


class Signals:
  """Ctrl-C and SIGTERM while a verb is at work: an exception, so that it ends in order; but exceptions can get lost.

  Python drops those that are raised where nothing could catch them (`__del__`, callbacks of weak references and of the
  garbage collector) and only tells `sys.unraisablehook`: the signal is then sent again. Libraries drop others (JAX has
  `except:` where it traces) or turn them into errors of theirs: an error after the signal counts as the signal, and a
  verb that is still at work GRACE seconds after it, or at a second one, is ended at once.
  """

  def __init__(self):
    self.asked, self.verbs, self.before = 0, 0, {}

  def __enter__(self) -> Signals:
    self.asked = 0
    self.hook, sys.unraisablehook = sys.unraisablehook, self._dropped
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):  # else another's, or ignored
      self.take(signal.SIGINT)
    return self

  def take(self, number: int) -> None:
    self.before[number] = signal.signal(number, self._raise)

  def _raise(self, number: int, _: Any) -> None:
    if self.asked:
      leave(number)
    self.asked = number
    self._again(number, GRACE)
    raise Interrupted("", number)

  def _dropped(self, what: sys.UnraisableHookArgs) -> None:
    if not isinstance(what.exc_value, KeyboardInterrupt):
      return self.hook(what)
    self.asked = 0
    self._again(getattr(what.exc_value, "signal", signal.SIGINT), 0.1)

  def _again(self, number: int, seconds: float) -> None:
    verb = self.verbs

    def later() -> None:
      time.sleep(seconds)
      if verb == self.verbs:
        os.kill(os.getpid(), number)

    _thread.start_new_thread(later, ())  # `threading` takes locks, which the interrupted code may hold

  def __exit__(self, kind, value, trace) -> None:
    self.verbs += 1
    sys.unraisablehook = self.hook
    while self.before:
      signal.signal(*self.before.popitem())
    if self.asked and isinstance(value, Exception):
      raise Interrupted("", self.asked) from value


SIGNALS = Signals()
