"""Columns on disk: rows of any length, memory-mapped, so that memory does not grow with the corpus.

A column is a folder: `values.bin` holds all rows one after the other, `offsets.npy` where each begins, `about.json`
the type of the values and whatever its writer says of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_jax.config import UserError


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
  """Whether of all processes this one alone has the lock file; with `wait`, when it has. A killed process has none."""
  with open(path, "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
      mine = True
    except BlockingIOError:
      mine = False
    yield mine


@contextlib.contextmanager
def alone(directory: Path) -> Iterator[None]:
  """One process at a time in a folder of the cache, which is made if need be; others wait.

  Whoever is alone may take away what lies there unfinished: a process that was killed left it.
  """
  with contextlib.ExitStack() as end:
    try:
      directory.mkdir(parents=True, exist_ok=True)
      end.enter_context(locked(directory / "lock"))
    except OSError as error:
      raise UserError(f"data.cache={str(directory.parent)!r}: cannot be written: {error.strerror}") from error
    yield


@dataclasses.dataclass(frozen=True)
class Ragged:
  """N rows of integers as one flat array: row i is `values[offsets[i]:offsets[i + 1]]`."""

  values: np.ndarray
  offsets: np.ndarray

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    return self.values[self.offsets[row] : self.offsets[row + 1]]

  def __iter__(self) -> Iterator[np.ndarray]:
    return (self[row] for row in range(len(self)))

  @property
  def lengths(self) -> np.ndarray:
    """[N] how long each row is."""
    return np.diff(self.offsets)

  def part(self, begin: int, end: int) -> Ragged:
    """Some neighbouring rows: a view."""
    offsets = self.offsets[begin : end + 1]
    return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

  def take(self, rows: np.ndarray) -> Ragged:
    """Some rows, in memory."""
    return ragged([self[row] for row in rows])


def ragged(pieces: Sequence[np.ndarray]) -> Ragged:
  """Rows in memory."""
  values = np.concatenate([np.zeros(0, np.int32), *pieces])
  return Ragged(values, np.cumsum([0, *map(len, pieces)], dtype=np.int64))


class Strings(Sequence[str]):
  """N strings, as UTF-8 in a column of bytes."""

  def __init__(self, column: Ragged):
    self.column = column

  def __len__(self) -> int:
    return len(self.column)

  def __getitem__(self, row: Any) -> Any:
    """One string, or the list of a slice."""
    if isinstance(row, slice):
      return [self[i] for i in range(*row.indices(len(self)))]
    if not -len(self) <= row < len(self):
      raise IndexError(row)
    return self.column[row % len(self)].tobytes().decode()

  def __iter__(self) -> Iterator[str]:
    return (self[i] for i in range(len(self)))


class Writer:
  """Writes a column row by row, into a temporary folder that is renamed when the column is whole.

  One writer for a column at a time: where several processes may come, they take turns (`tokens.store`).
  """

  def __init__(self, directory: Path, dtype: Any):
    self.directory, self.dtype = directory, np.dtype(dtype)
    self.temporary = directory.with_name(f"{directory.name}.writing-{os.getpid()}")
    shutil.rmtree(self.temporary, ignore_errors=True)
    self.temporary.mkdir(parents=True)
    self.file = open(self.temporary / "values.bin", "wb")  # noqa: SIM115 (closed by `close`)
    self.offsets = array("q", [0])

  def append(self, row: np.ndarray | bytes) -> None:
    content = row if isinstance(row, bytes) else row.astype(self.dtype).tobytes()
    self.file.write(content)
    self.offsets.append(self.offsets[-1] + len(content) // self.dtype.itemsize)

  def close(self, **about: Any) -> None:
    """The column, with what is to be known of it, under its name; one that was there before is replaced."""
    self.file.close()
    np.save(self.temporary / "offsets.npy", np.frombuffer(self.offsets, np.int64))
    (self.temporary / "about.json").write_text(json.dumps({"dtype": self.dtype.name, **about}))
    shutil.rmtree(self.directory, ignore_errors=True)
    os.replace(self.temporary, self.directory)

  def __enter__(self) -> Writer:
    return self

  def __exit__(self, kind, value, trace) -> None:
    """Without `close`, nothing is left."""
    self.file.close()
    shutil.rmtree(self.temporary, ignore_errors=True)


def matching(directory: Path, **about: Any) -> Ragged | None:
  """The column in a folder if it is whole and says `about` of itself; a cut file does not count."""
  try:
    found = json.loads((directory / "about.json").read_text())
    offsets = np.load(directory / "offsets.npy", mmap_mode="r")
    size = (directory / "values.bin").stat().st_size
    dtype = np.dtype(found["dtype"])
    if size != offsets[-1] * dtype.itemsize or any(found.get(name) != value for name, value in about.items()):
      return None
    values = np.memmap(directory / "values.bin", dtype=dtype, mode="r") if size else np.zeros(0, dtype)
  except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError):
    return None
  return Ragged(values, offsets)


def passage(title: str, text: str) -> str:
  """A passage as an encoder reads it."""
  return f"{title}: {text}" if title else text


def number(text: str) -> int:
  """A 64-bit hash of a string."""
  return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Lookup:
  """The rows of strings that are unique: found by their hashes, 16 bytes a string, and compared."""

  def __init__(self, strings: Sequence[str], hashes: np.ndarray, order: np.ndarray):
    """`hashes` [N] sorted, `order` [N] the row of each (`Lookup.sort` makes both)."""
    self.strings, self.hashes, self.order = strings, hashes, order

  @staticmethod
  def sort(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes [N] of rows in their order -> sorted hashes, and whose they are."""
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order

  @classmethod
  def of(cls, strings: Sequence[str]) -> Lookup:
    return cls(strings, *cls.sort(np.fromiter(map(number, strings), np.uint64, len(strings))))

  def __call__(self, strings: Sequence[str]) -> np.ndarray:
    """[n] the row of each string; -1 where there is none."""
    wanted = np.fromiter(map(number, strings), np.uint64, len(strings))
    rows = np.full(len(strings), -1, np.int64)
    first, last = (np.searchsorted(self.hashes, wanted, side) for side in ("left", "right"))
    for i in np.flatnonzero(last > first).tolist():
      for row in self.order[first[i] : last[i]].tolist():  # more than one only where hashes collide
        if self.strings[row] == strings[i]:
          rows[i] = row
    return rows
