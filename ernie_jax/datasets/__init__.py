"""What all retrieval data sets share: one form of rows, one TFDS builder (no TensorFlow), one way to load.

A source is one file beside this one; it says which rows there are (`rows.py` has their form and all checks that do
not hang on a file's format, `files.py` the readers). Everything else happens here: rows are written once, as
array_record files in the cache with an index beside them, and read back when they are asked for, in the order in which
the source gave them. Loading takes no time and no memory to speak of, however large the corpus.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import importlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from ernie_jax import columns
from ernie_jax.config import Data, UserError, first_line
from ernie_jax.datasets.files import Bad
from ernie_jax.datasets.rows import BLOCK, SPLITS, Index, Row, Rows, blocks, column, passages
from ernie_jax.progress import SECONDS_BETWEEN_LINES, say

__all__ = ["SPLITS", "Corpus", "Dataset", "Queries", "RetrievalBuilder", "Row", "Rows", "Settings", "load"]

PER_FILE = 2**20  # rows of an array_record file


class Texts(Sequence[str]):
  """N texts, each made of a row of a prepared split: read when they are asked for, `BLOCK` at a time in a loop.

  `rows` are those of the split that are among them; None: all.
  """

  def __init__(
    self, source: Any, make: Callable[[dict[str, Any]], str], place: Path, rows: Sequence[int] | None = None
  ):
    self.source, self.make, self.place = source, make, place
    self.rows = range(len(source)) if rows is None else rows

  def __len__(self) -> int:
    return len(self.rows)

  def take(self, rows: np.ndarray) -> Texts:
    """Some of them, as they are asked for, too."""
    return Texts(self.source, self.make, self.place, [self.rows[row] for row in rows.tolist()])

  def __getitem__(self, row: Any) -> Any:
    """One text, or the list of a slice."""
    if isinstance(row, slice):
      return self._read(range(*row.indices(len(self))))
    if not -len(self) <= row < len(self):
      raise IndexError(row)
    return self._read([int(row) % len(self)])[0]

  def __iter__(self) -> Iterator[str]:
    for begin in range(0, len(self), BLOCK):
      yield from self[begin : begin + BLOCK]

  def _read(self, rows: Sequence[int]) -> list[str]:
    if not len(rows):
      return []
    try:
      return [self.make(row) for row in self.source.__getitems__([self.rows[row] for row in rows])]
    except Exception as error:  # the array_record reader and TFDS raise errors of many types
      raise _damaged(self.place, error) from error


def _title(row: dict[str, Any]) -> str:
  return row["title"].decode()


def _text(row: dict[str, Any]) -> str:
  return row["text"].decode()


def _passage(row: dict[str, Any]) -> str:
  return columns.passage(_title(row), _text(row))


@dataclasses.dataclass(frozen=True)
class Corpus:
  """N passages: sequences of the same length."""

  ids: Sequence[str]
  titles: Sequence[str]
  texts: Sequence[str]
  passages: Sequence[str]  # as an encoder reads them: "title: text", or the text alone if it has no title
  identity: np.ndarray  # int32 [N]: the row of the first passage with the same title and text
  lookup: columns.Lookup  # ids -> rows


@dataclasses.dataclass(frozen=True)
class Queries:
  """The queries of a split: sequences of the same length; of each, rows of passages (int32) in the data set's order."""

  ids: Sequence[str]
  texts: Sequence[str]
  positives: columns.Ragged  # one or more each: the passages that answer it
  negatives: columns.Ragged  # passages that the data set brings as hard negatives; may be none

  def some(self, count: int) -> Queries:
    """So many of them in their order, drawn always alike: whatever is among few is among more."""
    assert isinstance(self.texts, Texts)
    rows = np.sort(np.random.default_rng(0).permutation(len(self.ids))[:count])
    ids = [self.ids[row] for row in rows]
    return Queries(ids, self.texts.take(rows), self.positives.take(rows), self.negatives.take(rows))


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A corpus, the queries of train, dev and test, a fingerprint of them all (16 hex digits), and what was left out."""

  corpus: Corpus
  queries: dict[str, Queries]
  fingerprint: str
  summary: dict[str, Any] = dataclasses.field(default_factory=dict)  # "folder", "rows", "skipped", "left_out"

  def qrels(self, split: str) -> dict[str, dict[str, int]]:
    """{query id: {passage id: 1}} of train, dev or test."""
    queries, ids = self.queries[split], self.corpus.ids
    return {query: {ids[row]: 1 for row in own.tolist()} for query, own in zip(queries.ids, queries.positives)}


@dataclasses.dataclass(eq=False)
class Settings(tfds.core.BuilderConfig):
  """What a data set is made from; `name` changes whenever that does."""

  data: Data = dataclasses.field(default_factory=Data)


class Info(tfds.core.DatasetInfo):
  """What TFDS says of a data set; not from the network, where it would look first and leave a temporary folder."""

  def initialize_from_bucket(self) -> None:
    pass


class RetrievalBuilder(tfds.core.GeneratorBasedBuilder):
  """A TFDS builder whose subclass only says what its rows are."""

  VERSION = tfds.core.Version("2.0.0")
  # TFDS would seek checksums of downloads beside the code, through a package that it does not install.
  code_path = None

  @abc.abstractmethod
  def rows(self, bad: Bad) -> Rows:
    """The rows of every split, always in the same order, the corpus first; lines that are no rows go to `bad`.

    Of a row a source checks no more than it must to make one: `rows.Index` does the rest.
    """

  @classmethod
  def make(cls, data: Data, directory: Path, name: str, description: str = "") -> RetrievalBuilder:
    """The builder of these settings with its files below `directory`; `name` names what it reads."""
    name += f"-skip{data.skip_bad}" if data.skip_bad else ""
    config = Settings(name=name, description=description or data.folder, data=data)
    try:
      return cls(data_dir=str(directory), config=config, file_format="array_record")
    except Exception as error:  # TFDS reads what is there already
      raise _damaged(directory / cls.name / name, error) from error

  @property
  def scratch(self) -> Path:
    """A folder for what a source needs only while it is prepared."""
    return Path(self.data_dir) / "scratch"

  @property
  def data(self) -> Data:
    return self.builder_config.data

  def _info(self) -> Info:
    text = tfds.features.Text()
    ids = tfds.features.Sequence(text)
    features = {"id": text, "title": text, "text": text, "positives": ids, "negatives": ids}
    return Info(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager) -> dict:
    bad = Bad(self.data.skip_bad)
    self.index = Index(Path(self.data_dir) / "index", bad)
    rows = self.rows(bad)
    return {split: self._generate_examples(split, rows[split]) for split in ("corpus", *SPLITS)}

  def _generate_examples(self, split: str, rows: Iterable[Row]) -> Iterator[tuple[int, dict]]:
    said = time.monotonic()
    for number, row in enumerate(self.index(split, rows)):
      example = row._asdict() | {"positives": list(row.positives), "negatives": list(row.negatives)}
      del example["where"]
      yield number, example
      if time.monotonic() - said > SECONDS_BETWEEN_LINES:
        said = time.monotonic()
        say(f"  {split}: {number + 1} rows")

  def _download_and_prepare(self, dl_manager, download_config=None) -> None:
    """Writes rows as they come.

    TFDS's own way keeps a gigabyte of a split in memory to sort it, and beyond that needs TensorFlow. Here rows are in
    order already.
    """
    info = self._info()  # of the temporary folder, which TFDS renames when all is there
    writer = tfds.core.SequentialWriter(info, PER_FILE, file_format="array_record")
    for split, examples in self._split_generators(dl_manager).items():
      for block in blocks(examples, BLOCK):
        writer.initialize_splits([split], fail_if_exists=False)  # a split without rows would have no files
        writer.add_examples({split: [example for _, example in block]})
      writer.close_splits([split] if split in info.splits else [])
      if split == "corpus" and split not in info.splits:
        raise UserError(f"data.name={self.data.name!r}: no passages; name a folder that has some, or other packages")
    self.info.set_splits(info.splits)
    shutil.rmtree(self.scratch, ignore_errors=True)
    self.index.close()
    about: dict[str, Any] = {
      "fingerprint": self.index.digest.hexdigest()[:16],
      "rows": self.index.counts,
      "skipped": dict(self.index.bad.skipped),
      "left_out": dict(self.index.bad.left_out),
      "sizes": {path.name: path.stat().st_size for path in Path(self.data_dir).glob("*.array_record*")},
    }
    (self.index.directory / "about.json").write_text(json.dumps(about, indent=2))
    del self.index  # TFDS keeps builders, and an index keeps files open
    for what, counts in (("skipped", about["skipped"]), ("left out", about["left_out"])):
      if counts:
        say(f"  {what}: {', '.join(f'{count} {kind}' for kind, count in counts.items())}")


def load(data: Data) -> Dataset:
  """Opens the data set in the cache; prepares it there first if need be. The fingerprint is that of the whole.

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
      found = read(builder)
    except Exception as error:  # the array_record reader and TFDS raise errors of many types
      raise _damaged(Path(builder.data_dir), error) from error
  wanted, train = data.train_queries, found.queries["train"]
  if wanted is None:
    return found
  if wanted > len(train.ids):
    raise UserError(f"data.train_queries={wanted}: there are {len(train.ids)}; name at most as many, or None for all")
  return dataclasses.replace(found, queries=found.queries | {"train": train.some(wanted)})


def _damaged(place: Path, error: Exception) -> UserError:
  return UserError(f"{place}: cannot be read ({first_line(error)}); delete this folder, and it is made anew")


def prepare(builder: RetrievalBuilder, directory: Path) -> None:
  """Writes the data set of a builder below `directory`, unless it is there; a `UserError` if that fails."""
  place = Path(builder.data_dir)
  if place.is_dir():
    return
  with columns.alone(directory):
    if place.is_dir():  # another process was faster
      return
    for leftover in place.parent.glob("incomplete.*"):
      shutil.rmtree(leftover)
    try:
      builder.download_and_prepare()
    except UserError:
      raise
    except Exception as error:  # the array_record writer raises errors of its own where a disk is full
      raise UserError(f"data.cache={str(directory.parent)!r}: cannot be written ({first_line(error)})") from error


def read(builder: RetrievalBuilder) -> Dataset:
  """The prepared data set of a builder, in the order of its rows. Raises whatever damaged files make happen."""
  place = Path(builder.data_dir)
  index = place / "index"
  about = json.loads((index / "about.json").read_text())
  for name, size in about["sizes"].items():
    if (place / name).stat().st_size != size:
      raise UserError(f"{name} is cut")
  texts = lambda split, make: Texts(builder.as_data_source(split=split), make, place)
  ids, lookup = passages(index / "corpus")
  identity = np.load(index / "corpus" / "identity.npy", mmap_mode="r")
  titles, bodies, whole = (texts("corpus", make) for make in (_title, _text, _passage))
  corpus = Corpus(ids, titles, bodies, whole, identity, lookup)
  queries = {}
  for split in SPLITS:
    if about["rows"].get(split):
      named = (column(index / split / name) for name in ("ids", "positives", "negatives"))
      queries[split] = Queries(columns.Strings(next(named)), texts(split, _text), *named)
    else:
      queries[split] = Queries([], [], columns.ragged([]), columns.ragged([]))
  summary = {"folder": str(place), **{name: about[name] for name in ("rows", "skipped", "left_out")}}
  return Dataset(corpus, queries, about["fingerprint"], summary)


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
