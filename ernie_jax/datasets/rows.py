"""Rows on their way from a source to the disk: every check that holds for all data sets, in memory that hardly grows.

While rows stream through, an index is written beside them (`Index`), so that a prepared data set opens at once:

  corpus/ids  corpus/hashes.npy  corpus/order.npy   the ids, and where each stands (`columns.Lookup`)
  corpus/identity.npy                               [N] the first passage with the same title and text
  <split>/ids  <split>/positives  <split>/negatives the queries' ids, and rows of their passages

A passage takes about 70 bytes of memory while it is prepared, however long it is: 8,841,823 of them took 630 MiB at the
peak, mapped files included.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from ernie_jax import columns
from ernie_jax.config import UserError
from ernie_jax.datasets.files import Bad

T = TypeVar("T")

SPLITS = ("train", "dev", "test")  # of the queries; the passages are the split "corpus"
NEGATIVES = 200  # most negatives of a query that are kept, the first ones
BLOCK = 4096  # passages looked at together
QUERIES = 512  # queries looked at together: each may name many passages


class Row(NamedTuple):
  """A passage (title and text) or a query (text, and passages that answer it or, though alike, do not).

  `positives` and `negatives` name passages by their ids, or by what they say (`Said`). `where` is "file:line", for
  error messages; it is not stored.
  """

  id: str
  title: str
  text: str
  positives: tuple[str, ...] = ()
  negatives: tuple[str, ...] = ()
  where: str = ""


Rows = dict[str, Iterable[Row]]  # "corpus", "train", "dev", "test" -> rows, in this order


class Said(str):
  """Names a passage by its title and text: their hash in 32 hex digits, after a space, which no id has (`said`)."""


def said(title: str, text: str) -> Said:
  # JSON may bring halves of surrogate pairs: such a row is refused later, with its place.
  content = f"{title}\0{text}".encode(errors="surrogatepass")
  return Said(" " + hashlib.blake2b(content, digest_size=16).hexdigest())


def share(text: str) -> float:
  """A number in [0, 1) that hangs on the text alone: the same on every machine."""
  return int(hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:8], 16) / 2**32


def carve(names: Iterable[str], part: float) -> set[str]:
  """About so large a part of the names, those with the smallest hashes; of two or more, at least one and never all."""
  order = sorted((share(name), name) for name in set(names))
  count = sum(place < part for place, _ in order)
  return {name for _, name in order[: max(0, min(max(count, 1), len(order) - 1))]}


class Hashes:
  """Which rows have a 64-bit hash: sorted blocks, merged as they grow, 12 bytes a row."""

  def __init__(self) -> None:
    self.blocks: list[tuple[np.ndarray, np.ndarray]] = []  # (sorted hashes, their rows), the largest first

  def add(self, hashes: np.ndarray, rows: np.ndarray) -> None:
    order = np.argsort(hashes, kind="stable")
    self.blocks.append((hashes[order], rows[order].astype(np.int32)))
    while len(self.blocks) > 1 and len(self.blocks[-2][0]) <= 2 * len(self.blocks[-1][0]):
      self._merge()

  def _merge(self) -> None:
    last, first = self.blocks.pop(), self.blocks.pop()
    hashes, rows = (np.concatenate(pair) for pair in zip(first, last))
    order = np.argsort(hashes, kind="stable")
    self.blocks.append((hashes[order], rows[order]))

  def whole(self) -> tuple[np.ndarray, np.ndarray]:
    """All hashes in order, and their rows."""
    while len(self.blocks) > 1:
      self._merge()
    return self.blocks[0] if self.blocks else (np.zeros(0, np.uint64), np.zeros(0, np.int32))

  def find(self, hashes: np.ndarray) -> dict[int, list[int]]:
    """{place in `hashes`: rows with that hash}, of those that there are."""
    found: dict[int, list[int]] = {}
    for known, rows in self.blocks:
      first, last = (np.searchsorted(known, hashes, side) for side in ("left", "right"))
      for i in np.flatnonzero(last > first).tolist():
        found.setdefault(i, []).extend(rows[first[i] : last[i]].tolist())
    return found


class Unique:
  """The rows of a split without those that were there before; their ids become a column.

  A row with the id and the content of an earlier one is left out; with the id of another one it is bad.
  """

  def __init__(self, directory: Path, bad: Bad):
    self.bad = bad
    self.hashes = Hashes()
    self.ids = columns.Writer(directory / "ids", np.uint8)
    self.written = open(self.ids.temporary / "values.bin", "rb")  # noqa: SIM115 (closed by `close`)
    self.path = directory / "contents.bin"  # 16 bytes a row
    self.contents: BinaryIO = open(self.path, "w+b")  # noqa: SIM115
    self.count = 0

  def __call__(self, rows: list[tuple[Row, bytes]]) -> Iterator[Row]:
    """Of a block of rows, each with a hash of its content (16 bytes), the new ones."""
    hashes = np.fromiter((columns.number(row.id) for row, _ in rows), np.uint64, len(rows))
    known = self.hashes.find(hashes)
    here: dict[str, bytes] = {}
    kept: list[int] = []
    for i, (row, content) in enumerate(rows):
      before = here.get(row.id)
      if before is None and i in known:
        before = next((self._content(j) for j in known[i] if self._id(j) == row.id), None)
      if before is None:
        here[row.id] = content
        kept.append(i)
      elif before != content:
        self.bad(
          "duplicate id", row.where, f"id {row.id!r} is already that of an earlier, different row; ids must differ"
        )
    for i in kept:
      self.ids.append(rows[i][0].id.encode())
      self.contents.write(rows[i][1])
    self.hashes.add(hashes[kept], np.arange(self.count, self.count + len(kept)))
    self.count += len(kept)
    return (rows[i][0] for i in kept)

  def _id(self, row: int) -> str:
    self.ids.file.flush()
    begin, end = self.ids.offsets[row], self.ids.offsets[row + 1]
    return os.pread(self.written.fileno(), end - begin, begin).decode()

  def _content(self, row: int) -> bytes:
    self.contents.flush()
    return os.pread(self.contents.fileno(), 16, 16 * row)

  def __enter__(self) -> Unique:
    return self

  def __exit__(self, *_) -> None:
    self.contents.close()
    self.written.close()
    self.ids.__exit__(None, None, None)

  def close(self) -> np.ndarray:
    """[N, 2] the hashes of all contents, memory-mapped; the ids lie in their place."""
    self.contents.close()
    self.ids.close()
    if not self.count:
      return np.zeros((0, 2), np.uint64)
    return np.memmap(self.path, np.uint64, "r").reshape(-1, 2)


def identities(contents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """From the passages' content hashes [N, 2]: the first row of each one's content [N]; halves in order, and their rows.

  Equal is what agrees in both halves, 128 bits.
  """
  halves, order = columns.Lookup.sort(np.array(contents[:, 0]))
  order = order.astype(np.int32)
  identity = np.arange(len(order), dtype=np.int32)
  same = halves[1:] == halves[:-1]
  alike = order[np.concatenate([[False], same]) | np.concatenate([same, [False]])] if len(order) else order
  first, second = np.array(contents[alike, 0]), np.array(contents[alike, 1])
  by = np.lexsort((alike, second, first))
  alike, first, second = alike[by], first[by], second[by]
  begins = np.concatenate([[True], (first[1:] != first[:-1]) | (second[1:] != second[:-1])])[: len(alike)]
  identity[alike] = alike[np.flatnonzero(begins)][np.cumsum(begins) - 1]
  return identity, halves, order


class Index:
  """Checks rows, block by block, and writes the index of what passes. First the corpus, then queries."""

  def __init__(self, directory: Path, bad: Bad):
    self.directory, self.bad = directory, bad
    self.digest = hashlib.sha256()
    self.counts: dict[str, int] = {}

  def __call__(self, split: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of a split that are good; what they name by `Said` is named by its id."""
    directory = self.directory / split
    directory.mkdir(parents=True)
    self.counts[split] = 0
    with Unique(directory, self.bad) as unique:
      for row in self._corpus(rows, unique) if split == "corpus" else self._queries(rows, unique, directory):
        named = [row.positives, row.negatives] if row.negatives else [row.positives]
        self.digest.update(json.dumps([split, row.id, row.title, row.text, *named]).encode())
        self.counts[split] += 1
        yield row
      contents = unique.close()
    if split == "corpus":
      hashes, order = unique.hashes.whole()
      np.save(directory / "hashes.npy", hashes)
      np.save(directory / "order.npy", order)
      unique.hashes = Hashes()
      self.contents = contents
      self.identity, self.halves, self.order = identities(contents)
      np.save(directory / "identity.npy", self.identity)
      self.ids, self.lookup = passages(directory)
    else:
      unique.path.unlink()

  def close(self) -> None:
    """Takes away what only the preparation needs."""
    (self.directory / "corpus" / "contents.bin").unlink()

  def _corpus(self, rows: Iterable[Row], unique: Unique) -> Iterator[Row]:
    for block in blocks(filter(self._is_row, rows), BLOCK):
      yield from unique([(row, bytes.fromhex(said(row.title, row.text))) for row in block])

  def _queries(self, rows: Iterable[Row], unique: Unique, directory: Path) -> Iterator[Row]:
    with columns.Writer(directory / "positives", np.int32) as positives:
      with columns.Writer(directory / "negatives", np.int32) as negatives:
        for block in blocks(filter(self._is_row, rows), QUERIES):
          found = self._passages({name for row in block for name in (*row.positives, *row.negatives)})
          good = [row for row in block if self._is_query(row, found)]
          content = lambda row: bytes.fromhex(said(row.text, json.dumps([row.positives, row.negatives])))
          for row in unique([(row, content(row)) for row in good]):
            own = dict.fromkeys(found[name] for name in row.positives)
            # A ranked list of negatives has the positives in it too.
            others = [p for p in dict.fromkeys(found[name] for name in row.negatives) if p not in own][:NEGATIVES]
            positives.append(np.array([*own], np.int32))
            negatives.append(np.array(others, np.int32))
            names = [tuple(self.ids[p] for p in each) for each in (own, others)]
            yield row._replace(positives=names[0], negatives=names[1])
        negatives.close()
      positives.close()

  def _is_row(self, row: Row) -> bool:
    """Whether what a row itself says is in order."""
    try:
      for text in row[:3]:
        text.encode()
      for name in (*row.positives, *row.negatives):
        name.encode()
    except UnicodeEncodeError:
      self.bad("not Unicode", row.where, "holds half a surrogate pair, which is no character; repair the text")
    else:
      if not row.id.strip():
        self.bad("empty id", row.where, "the id is empty; every row needs one")
      elif row.id.split() != [row.id]:
        text = f"id {row.id!r} holds white space, which separates columns of run files; rename it"
        self.bad("white space in an id", row.where, text)
      elif not row.text.strip():
        self.bad("empty text", row.where, f"the text of {row.id!r} is empty; drop the row, or fill it in")
      else:
        return True
    return False

  def _is_query(self, row: Row, found: dict[str, int]) -> bool:
    """Whether a query's passages are there."""
    if not row.positives:
      text = f"query {row.id!r} has no positives; every query needs at least one"
      self.bad("query without positives", row.where, text)
      return False
    for what, names in (("positive", row.positives), ("negative", row.negatives)):
      for name in names:
        if found[name] < 0:
          called = "with the text given here" if isinstance(name, Said) else repr(name)
          self.bad("unknown passage", row.where, f"{what} {called} is not in the corpus; add it there, or drop it")
          return False
    return True

  def _passages(self, names: set[str]) -> dict[str, int]:
    """The rows of named passages; -1 where there is none."""
    ids = sorted(name for name in names if not isinstance(name, Said))
    found = dict(zip(ids, self.lookup(ids).tolist()))
    texts = sorted(name for name in names if isinstance(name, Said))
    wanted = np.frombuffer(b"".join(map(bytes.fromhex, texts)), np.uint64).reshape(-1, 2)
    first, last = (np.searchsorted(self.halves, wanted[:, 0], side) for side in ("left", "right"))
    for i, text in enumerate(texts):
      rows = self.order[first[i] : last[i]]
      same = rows[self.contents[rows, 1] == wanted[i, 1]]
      found[text] = int(same.min()) if len(same) else -1
    return found


def blocks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
  rows = iter(rows)
  while block := list(itertools.islice(rows, size)):
    yield block


def passages(directory: Path) -> tuple[columns.Strings, columns.Lookup]:
  """Ids of the passages and their lookup, memory-mapped, from the corpus' part of an index."""
  ids = columns.Strings(column(directory / "ids"))
  hashes, order = (np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("hashes", "order"))
  return ids, columns.Lookup(ids, hashes, order)


def column(directory: Path) -> columns.Ragged:
  """A column of an index; `UserError` if it is not whole."""
  if (found := columns.matching(directory)) is None:
    raise UserError(f"{directory}: damaged")
  return found
