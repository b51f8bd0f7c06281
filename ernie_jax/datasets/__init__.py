"""What all retrieval data sets share: one form of rows, one TFDS builder (no TensorFlow), one way to load.

A source is one file beside this one; it says which rows there are. Everything else happens here: rows are
written once, as array_record files in the cache, and read back in the order in which the source gave them.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds
from absl import logging

from ernie_jax.config import Data, UserError, first_line

SPLITS = ("train", "dev", "test")  # of the queries; the passages are the split "corpus"


class Row(NamedTuple):
  """A passage (title and text) or a query (text, and the ids of the passages that answer it)."""

  id: str
  title: str
  text: str
  positives: tuple[str, ...] = ()


Rows = dict[str, Iterable[Row]]  # "corpus", "train", "dev", "test" -> rows


@dataclasses.dataclass(frozen=True)
class Corpus:
  """N passages: three lists of the same length."""

  ids: list[str]
  titles: list[str]
  texts: list[str]

  @functools.cached_property
  def passages(self) -> list[str]:
    """Each passage as an encoder reads it: "title: text", or the text alone if it has no title."""
    return [f"{title}: {text}" if title else text for title, text in zip(self.titles, self.texts)]


@dataclasses.dataclass(frozen=True)
class Queries:
  """The queries of a split: three lists of the same length; `positives` are passage ids, one or more each."""

  ids: list[str]
  texts: list[str]
  positives: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A corpus, the queries of train, dev and test, and a fingerprint of them all (16 hex digits)."""

  corpus: Corpus
  queries: dict[str, Queries]
  fingerprint: str

  def qrels(self, split: str) -> dict[str, dict[str, int]]:
    """{query id: {passage id: 1}} of train, dev or test."""
    queries = self.queries[split]
    return {query: dict.fromkeys(own, 1) for query, own in zip(queries.ids, queries.positives)}


class RetrievalBuilder(tfds.core.GeneratorBasedBuilder):
  """A TFDS builder whose subclass only says what its rows are."""

  VERSION = tfds.core.Version("1.0.0")
  # TFDS would seek checksums of downloads beside the code, through a package that it does not install.
  code_path = None

  @abc.abstractmethod
  def rows(self) -> Rows:
    """The rows of every split, always in the same order. Ids are unique within a split."""

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    features = {"id": text, "title": text, "text": text, "positives": tfds.features.Sequence(text)}
    # Keys are row numbers and nothing is shuffled: rows come back in their order.
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager) -> dict:
    splits = {}
    for split, rows in self.rows().items():
      rows = iter(rows)
      # TFDS cannot write a split without rows; a split that is not there is read as empty.
      if (first := next(rows, None)) is not None:
        splits[split] = self._generate_examples(itertools.chain([first], rows))
    return splits

  def _generate_examples(self, rows: Iterable[Row]) -> Iterator[tuple[int, dict]]:
    for number, row in enumerate(rows):
      yield number, {**row._asdict(), "positives": list(row.positives)}


def load(data: Data) -> Dataset:
  """Reads the data set from the cache; prepares it there first if need be.

  Safe to kill and safe to run in several processes: one of them prepares into a temporary folder that is
  renamed when it is whole, the others wait. Raises a `UserError` if the data set cannot be made or written.
  """
  source = importlib.import_module(f"ernie_jax.datasets.{data.name}")
  directory = Path(data.cache).expanduser() / "data"
  with _quiet():
    prepare(source.builder(data, directory), directory)
    # A builder looks at the disk when it is made: the first may have been made before another process wrote.
    builder = source.builder(data, directory)
    try:
      return read(builder)
    except Exception as error:  # the array_record reader and TFDS raise errors of many types
      raise UserError(
        f"{builder.data_dir}: cannot be read ({first_line(error)}); delete this folder, and it is made anew"
      ) from error


def prepare(builder: RetrievalBuilder, directory: Path) -> None:
  """Writes the data set of a builder below `directory`, unless it is there; a `UserError` if that fails."""
  place = Path(builder.data_dir)
  if place.is_dir():
    return
  try:
    directory.mkdir(parents=True, exist_ok=True)
    lock = open(directory / "lock", "w")  # noqa: SIM115
  except OSError as error:
    raise UserError(f"data.cache={str(directory.parent)!r}: cannot be written: {error.strerror}") from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if place.is_dir():  # another process was faster
      return
    # Whoever holds the lock is alone: what lies here unfinished was left by a process that was killed.
    for leftover in place.parent.glob("incomplete.*"):
      shutil.rmtree(leftover)
    builder.download_and_prepare()


def read(builder: RetrievalBuilder) -> Dataset:
  """The prepared data set of a builder, in the order of its rows."""
  digest = hashlib.sha256()
  columns: dict[str, list[list]] = {}
  for split in ("corpus", *SPLITS):
    columns[split] = [[], [], [], []]
    for row in _rows(builder, split):
      digest.update(json.dumps([split, *row]).encode())
      for column, value in zip(columns[split], row):
        column.append(value)
  queries = {}
  for split in SPLITS:
    ids, _, texts, positives = columns[split]
    queries[split] = Queries(ids, texts, positives)
  return Dataset(Corpus(*columns["corpus"][:3]), queries, digest.hexdigest()[:16])


def _rows(builder: RetrievalBuilder, split: str) -> Iterator[tuple[str, str, str, list[str]]]:
  if split not in builder.info.splits:
    return
  source = builder.as_data_source(split=split)
  for begin in range(0, len(source), 4096):
    for row in source.__getitems__(range(begin, min(begin + 4096, len(source)))):
      yield (
        *(row[name].decode() for name in ("id", "title", "text")),
        [each.decode() for each in row["positives"]],
      )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """TFDS's own messages and bars off: it writes to standard output, which is for results, and as warnings."""
  level = logging.get_verbosity()
  tfds.disable_progress_bar()
  try:
    logging.set_verbosity(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    logging.set_verbosity(level)
