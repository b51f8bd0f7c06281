"""Progress of long jobs: a bar with rate and remaining time on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

SECONDS_BETWEEN_LINES = 15.0
_silent = False


def silence() -> None:
  """From here on nothing is shown: of several processes, process 0 speaks."""
  global _silent
  _silent = True


def say(text: str) -> None:
  """One line to the user, on standard error: standard output is for results."""
  if not _silent:
    print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
  """93.4 -> 1:33"""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
  """`with Progress("encode", 7508, "passages") as bar: bar.advance(64, "loss 1.2")`."""

  def __init__(self, label: str, total: int, unit: str, done: int = 0):
    self.label, self.total, self.unit, self.done, self.first = label, total, unit, done, done
    self.start = self.said = time.monotonic()
    self.bar = None

  def __enter__(self) -> Progress:
    if sys.stderr.isatty() and not _silent:
      from tqdm import tqdm

      self.bar = tqdm(total=self.total, initial=self.done, desc=self.label, unit=f" {self.unit}", leave=False)
    return self

  def advance(self, count: int, note: str = "") -> None:
    self.done += count
    now = time.monotonic()
    if self.bar is not None:
      self.bar.set_postfix_str(note, refresh=False)
      self.bar.update(count)
    elif now - self.said >= SECONDS_BETWEEN_LINES and self.done < self.total:
      self.said = now
      rate = (self.done - self.first) / (now - self.start)
      left = clock((self.total - self.done) / rate) if rate else "?"
      say(f"  {self.label}: {self.done}/{self.total} {self.unit}, {rate:.2f}/s, {left} left{note and ', ' + note}")

  def __exit__(self, kind, value, trace) -> None:
    if self.bar is not None:
      self.bar.close()
    if kind is None and self.total > 1:  # one query that a user waits for is no long job
      spent = time.monotonic() - self.start
      say(f"  {self.label}: {self.done} {self.unit} in {clock(spent)}")
