"""Indexes of an encoded corpus: FAISS in a folder, Milvus in a file or on a server; build, add, search.

  flat             FAISS, exact: every vector is looked at
  hnsw             FAISS, a graph: milliseconds for millions, and as much memory as the vectors
  ivfpq            FAISS, lists of codes: 1/16 of the memory; candidates are scored again with the vectors on disk
  milvus:PATH.db   Milvus Lite in this process, exact
  milvus:URL       a Milvus server or cluster, HNSW; the same code. MILVUS_TOKEN is its token, if it wants one

The score is the inner product. What an approximate index finds of what exact search finds is measured when it is built,
and the parameter that trades time for it is raised until that is enough.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_jax import topk
from ernie_jax.config import UserError, first_line
from ernie_jax.progress import Progress

FAISS = ("flat", "hnsw", "ivfpq")
BLOCK = 16_384  # vectors that are read at once
SPARE = 32  # candidates beyond k: what float32 cannot tell apart at place k is scored again in float64
OVERFETCH = 10  # ivfpq: candidates of each result, for codes rank roughly
SAMPLE = 200  # passages that are queries when recall is measured
ENOUGH = 0.95  # recall@10 and @100 at which the parameter is not raised any further
LINKS, BREADTH = 32, 200  # HNSW's M and efConstruction
EF = (64, 128, 256, 512, 1024)
CODES = 256  # values of a code of one byte: ivfpq learns so many centroids, and needs as many vectors
TRAINING = 64  # vectors that each list of ivfpq is learned from
TRAINING_NUMBERS = 2**28  # but no more numbers in all: 1 GiB
OUTGROWN = 4  # times as many passages as it was trained for: ivfpq is made anew
TIMEOUT = 60  # seconds that Milvus has for an answer
CONNECT = 10  # seconds to connect
QUIET = 300_000  # milliseconds between signs of life: Milvus Lite hangs up on a client that asks more often
LONGEST = 65_535  # bytes of a text that Milvus takes
INSERTED = 256  # passages of one message: 34 MB where all texts are that long, and a server takes 64
MOST = 16_384  # results of a query that Milvus gives


@dataclasses.dataclass(frozen=True)
class Content:
  """N encoded passages."""

  vectors: Any  # [N, H] float16 or float32: an array, or what has `shape` and gives arrays for slices and rows
  ids: Sequence[str]
  titles: Sequence[str]
  texts: Sequence[str]
  about: dict[str, str]  # "model" and "corpus": digests of what made the vectors, and of what


class Index:
  """`len(index)` passages in the order of their rows; `build` and `open` give one.

  `about` is stored with it: "model", "corpus", "rows", "digest" (of the ids and vectors), "setting" (the value of
  `parameter` that searches use) and "measured", one [setting, recall@10, recall@100, milliseconds a query] each.
  """

  parameter = ""  # what trades time for recall; exact indexes have none
  place: Path | str

  def __init__(self, name: str):
    self.name = name
    self.about: dict[str, Any] = {}

  def __len__(self) -> int:
    return self.about.get("rows", 0)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best passages of each query [Q, H]: scores float32 and rows int64 [Q, k], best first.

    Where fewer are found, the rest is row -1 with score -inf. FAISS: scores are exact, and equal ones come in the order
    of their rows (which of more than 32 equal passages are found at place k is not said). Milvus: its own scores, and
    equal ones of those found in the order of their rows.
    """
    raise NotImplementedError

  def holds(self, content: Content) -> bool:
    """Whether nothing is missing."""
    rows = content.vectors.shape[0]
    return "measured" in self.about and self.about == self.about | content.about | {"rows": rows}

  def add(self, content: Content) -> None:
    """Adds the passages from row `len(index)` on, and measures again.

    All begins anew if the rows before are not those that were added, by their ids and vectors, if another model made
    them, or if ivfpq's lists were made for a corpus of a quarter the size.
    """
    if self.holds(content):
      return
    total = content.vectors.shape[0]
    digest = hashlib.blake2b(digest_size=16)
    same = self.about.get("model") == content.about["model"] and len(self) <= total
    same = same and total <= OUTGROWN * self.about.get("trained", total)
    if same:
      for _ in _blocks(content, 0, len(self), digest):
        pass
    if same and digest.hexdigest() == self.about["digest"]:
      self.about.pop("measured", None)
      self.extend()
    else:
      digest = hashlib.blake2b(digest_size=16)
      self.about = content.about | {"rows": 0, "digest": digest.hexdigest(), "setting": 0}
      self.create(content)
    self.about |= content.about
    with Progress(f"index {self.name}", total, "passages", done=len(self)) as bar:
      for start, block in _blocks(content, len(self), total, digest):
        self.about |= {"rows": start + len(block), "digest": digest.hexdigest()}
        self.put(start, block, content)
        bar.advance(len(block))
    self.settle()
    self.about["measured"] = self.measure(content)
    self.save()

  def measure(self, content: Content) -> list[list[float]]:
    """Raises the parameter until recall is enough: one [setting, recall@10, recall@100, ms a query] for each."""
    truth = Truth.of(content)
    measured: list[list[float]] = []
    for setting in self.settings():
      self.set(setting)
      measured.append([setting, *truth.recall(self)])
      if min(measured[-1][1:3]) >= ENOUGH:
        break
    return measured

  def set(self, setting: int) -> None:
    self.about["setting"] = setting

  def table(self) -> str:
    """What was measured when the index was built; the last line is what searches use."""
    lines = [
      f"{self.name}: {len(self):,} passages; recall against exact search,"
      f" of {min(SAMPLE, len(self))} passages as queries, each without itself",
      f"{self.parameter or 'exact':>9}  recall@10  recall@100  ms a query, all at once",
    ]
    for setting, at10, at100, spent in self.about["measured"]:
      lines.append(f"{setting or '':>9}  {at10:9.3f}  {at100:10.3f}  {spent:10.3f}")
    return "\n".join(lines)

  # What FAISS and Milvus do differently.

  def create(self, content: Content) -> None:
    """An empty index for such vectors, in place of what is there."""
    raise NotImplementedError

  def extend(self) -> None:
    """Prepares what is there for more."""
    raise NotImplementedError

  def put(self, start: int, block: np.ndarray, content: Content) -> None:
    """Adds passages from row `start` on, with their vectors [n, H]; `about` counts them already."""
    raise NotImplementedError

  def settle(self) -> None:
    """All is added: makes it ready for searches."""

  def settings(self) -> Sequence[int]:
    """Values of `parameter`, the fastest first."""
    raise NotImplementedError

  def save(self) -> None:
    raise NotImplementedError


def build(name: str, directory: Path, content: Content) -> Index:
  """Makes the index `name` or brings it up to date, see `Index.add`. FAISS' files lie in `directory`.

  `print(index.table())` shows its recall. A build that is killed leaves nothing that `open` would take: FAISS' files
  get their name when they are whole; Milvus counts what it has, and the next build continues.
  """
  if not content.vectors.shape[0]:
    raise UserError(f"index {name}: the collection has no passages; encode a corpus first")
  index = _index(name, directory, content, create=True)
  index.add(content)
  return index


def open(name: str, directory: Path, content: Content) -> Index:
  """The index `name` that `build` made of this content; else `UserError` says what is wrong with it."""
  index = _index(name, directory, content, create=False)
  remedy = f"`ernie-jax index DIR --index {name}`"
  if not index.about:
    damaged = isinstance(index.place, Path) and index.place.exists()
    raise UserError(f"{index.place}: {'damaged or cut' if damaged else f'no index {name} here'}; {remedy} builds it")
  for what in ("model", "corpus"):
    if index.about[what] != content.about[what]:
      other, own = index.about[what][:12], content.about[what][:12]
      raise UserError(
        f"{index.place}: an index of {what} {other}, but the collection is of {what} {own}; {remedy} builds it"
      )
  if not index.holds(content):
    total = content.vectors.shape[0]
    raise UserError(f"{index.place}: {len(index)} of {total} passages, or not finished; {remedy} adds the others")
  return index


def _index(name: str, directory: Path, content: Content, create: bool) -> Index:
  if name in FAISS:
    return Faiss(name, directory, content)
  if name.startswith("milvus:") and name != "milvus:":
    return Milvus(name, content, create)
  raise UserError(
    f"--index {name}: no such index; known are {', '.join(FAISS)}, milvus:PATH.db and milvus:http://HOST:19530"
  )


def _blocks(content: Content, start: int, stop: int, digest: Any) -> Iterator[tuple[int, np.ndarray]]:
  """(row of the first, vectors [n, H] float32) of all in between, which `digest` sees, with their ids."""
  for begin in range(start, stop, BLOCK):
    end = min(begin + BLOCK, stop)
    block = np.ascontiguousarray(content.vectors[begin:end], np.float32)
    if not np.isfinite(block).all():
      row = begin + int(np.flatnonzero(~np.isfinite(block).all(axis=1))[0])
      raise UserError(f"passage {content.ids[row]!r} (row {row}): its vector is not finite; encode the corpus again")
    for text, vector in zip(content.ids[begin:end], block):  # so that it does not depend on where blocks begin
      digest.update(text.encode() + b"\0")
      digest.update(vector)
    yield begin, block


@dataclasses.dataclass(frozen=True)
class Truth:
  """Some passages as queries, and the scores of those that exact search finds for them."""

  rows: np.ndarray  # [Q] which passages
  queries: np.ndarray  # [Q, H]
  scores: np.ndarray  # [Q, up to 100] best first; the passage itself is not among them
  vectors: Any

  @classmethod
  def of(cls, content: Content) -> Truth:
    total = content.vectors.shape[0]
    rows = np.sort(np.random.default_rng(0).choice(total, min(SAMPLE, total), replace=False, shuffle=False))
    queries = content.vectors[rows].astype(np.float32)
    scores, found = topk.top_k(queries, content.vectors, 101)
    return cls(rows, queries, without(rows, scores, found)[0], content.vectors)

  def recall(self, index: Index) -> tuple[float, float, float]:
    """recall@10, recall@100 and milliseconds a query. A passage that scores as well as the one at place k is right."""
    index.search(self.queries[:1], 1)  # what the first search takes longer is not counted
    start = time.perf_counter()
    scores, found = index.search(self.queries, 101)
    spent = 1000 * (time.perf_counter() - start) / len(self.rows)
    _, found = without(self.rows, scores, found)
    if not self.scores.size:
      return 1.0, 1.0, spent  # one passage has no others
    exact, _ = topk.rescored(self.queries, self.vectors, found, found.shape[1])
    slack = 1e-5 * np.abs(self.scores).max()
    share = []
    for k in (10, 100):
      place = self.scores[:, :k]
      share.append(float(np.mean((exact[:, : place.shape[1]] >= place[:, -1:] - slack).sum(1) / place.shape[1])))
    return share[0], share[1], spent


def without(own: np.ndarray, scores: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Scores and rows [Q, k] -> [Q, k - 1]: without the row `own` [Q], or where it is not there, without the last."""
  out = found == own[:, None]
  out[:, -1] |= ~out.any(axis=1)
  shape = (len(found), found.shape[1] - 1)
  return scores[~out].reshape(shape), found[~out].reshape(shape)


def _faiss() -> Any:
  # FAISS begins and ends parallel work often. OpenMP's threads spin while they wait, which where other threads want the
  # cores too (JAX has its own) makes it slower than one thread; this is read when the library is loaded.
  os.environ.setdefault("OMP_WAIT_POLICY", "passive")
  import faiss

  return faiss


class Faiss(Index):
  """The folder `directory/name`: index.faiss, about.json. Candidates are scored again with the collection's vectors."""

  place: Path

  def __init__(self, name: str, directory: Path, content: Content):
    super().__init__(name)
    self.place, self.vectors = directory / name, content.vectors
    self.parameter = {"hnsw": "efSearch", "ivfpq": "nprobe"}.get(name, "")
    faiss = _faiss()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RuntimeError):  # FAISS raises the last
      about = json.loads((self.place / "about.json").read_text())
      if about.pop("bytes") == (self.place / "index.faiss").stat().st_size:
        # Mapped, not read: a large index opens at once. The two flags are for different kinds.
        flag = faiss.IO_FLAG_MMAP if name == "ivfpq" else faiss.IO_FLAG_MMAP_IFC
        self.index = faiss.read_index(str(self.place / "index.faiss"), flag)
        self.about = about
        self.set(about["setting"])

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    queries = np.ascontiguousarray(queries, np.float32)
    wanted = min(len(self), max(k + SPARE, OVERFETCH * k if self.name == "ivfpq" else 0))
    scores, rows = topk.rescored(queries, self.vectors, self.index.search(queries, wanted)[1], k)
    return scores.astype(np.float32), rows

  def create(self, content: Content) -> None:
    faiss = _faiss()
    width = content.vectors.shape[1]
    if self.name == "flat":
      self.index = faiss.IndexFlatIP(width)
    elif self.name == "hnsw":
      self.index = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
      self.index.hnsw.efConstruction = BREADTH
    else:
      self.index = self.trained(content)

  def trained(self, content: Content) -> Any:
    """4 sqrt(N) lists of codes of about H/4 bytes, learned from a sample."""
    faiss = _faiss()
    total, width = content.vectors.shape
    if total < CODES:
      raise UserError(f"--index ivfpq: learns its codes from at least {CODES} passages, here are {total}; take flat")
    lists = int(4 * total**0.5)
    size = max(part for part in range(1, max(width // 4, 1) + 1) if width % part == 0)
    # "np": without the training that lets codes be compared bit by bit, which nothing here does and takes minutes
    index = faiss.index_factory(width, f"IVF{lists},PQ{size}np", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # else FAISS warns on standard output
    index.cp.max_points_per_centroid = TRAINING
    index.pq.cp.niter = index.cp.niter
    count = min(total, max(CODES, TRAINING * lists), TRAINING_NUMBERS // width)
    rows = np.sort(np.random.default_rng(0).choice(total, count, replace=False, shuffle=False))
    with Progress("learn ivfpq's lists and codes", count, "passages") as bar:
      index.train(np.ascontiguousarray(content.vectors[rows], np.float32))
      bar.advance(count)
    self.about["trained"] = total
    return index

  def extend(self) -> None:
    self.index = _faiss().read_index(str(self.place / "index.faiss"))  # a mapped one cannot grow

  def put(self, start: int, block: np.ndarray, content: Content) -> None:
    self.index.add(block)

  def settings(self) -> Sequence[int]:
    if self.name == "ivfpq":
      return [2**i for i in range(self.index.nlist.bit_length())]
    return EF if self.name == "hnsw" else (0,)

  def set(self, setting: int) -> None:
    super().set(setting)
    if self.parameter:
      _faiss().ParameterSpace().set_index_parameter(self.index, self.parameter, setting)

  def save(self) -> None:
    """Under a temporary name, then renamed: what was there before stays until then."""
    temporary = self.place.with_name(f"{self.name}.writing-{os.getpid()}")
    try:
      shutil.rmtree(temporary, ignore_errors=True)
      temporary.mkdir(parents=True)
      _faiss().write_index(self.index, str(temporary / "index.faiss"))
      size = (temporary / "index.faiss").stat().st_size
      (temporary / "about.json").write_text(json.dumps(self.about | {"bytes": size}))
      shutil.rmtree(self.place, ignore_errors=True)
      os.replace(temporary, self.place)
    except (OSError, RuntimeError) as error:  # FAISS raises the second
      raise UserError(
        f"{self.place}: cannot be written ({first_line(error)}); make room or choose another place"
      ) from error
    finally:
      shutil.rmtree(temporary, ignore_errors=True)


class Milvus(Index):
  """A Milvus collection with fields row, id, title, text, vector; what `about` says is its property "ernie_jax".

  Its name comes from the digests of corpus and model, so those of other models and corpora live beside it.
  """

  place: str

  def __init__(self, name: str, content: Content, create: bool):
    super().__init__(name)
    self.place = name
    where = name.removeprefix("milvus:")
    self.remote = "://" in where
    self.parameter = "ef" if self.remote else ""
    prefix = f"ernie_jax_{content.about['corpus'][:16]}_"
    self.collection = prefix + content.about["model"][:16]
    if not self.remote and not create and not Path(where).exists():
      return
    self.client = _connect(name, where, self.remote)
    with _answers(name):
      found = [x for x in self.client.list_collections(timeout=TIMEOUT) if x.startswith(prefix)]
      for collection in sorted(found, key=lambda x: x != self.collection)[:1]:  # its own, or that of another model
        properties = self.client.describe_collection(collection, timeout=TIMEOUT)["properties"]
        if collection == self.collection or not create:
          self.about = json.loads(properties.get("ernie_jax", "{}"))
      if self.collection in found and self.about.get("measured"):
        self.client.load_collection(self.collection, timeout=TIMEOUT)

  def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    if k > MOST:
      raise UserError(f"{self.name}: Milvus gives at most {MOST} results, not {k}; take flat")
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int64)
    parameters = {"metric_type": "IP", "params": {"ef": max(k, self.about["setting"])} if self.remote else {}}
    for begin in range(0, len(queries), INSERTED):
      asked = np.asarray(queries[begin : begin + INSERTED], np.float32)
      with _answers(self.name):
        found = self.client.search(
          self.collection,
          data=list(asked),
          limit=k,
          anns_field="vector",
          output_fields=["row"],
          search_params=parameters,
          timeout=TIMEOUT,
        )
      for i, hits in enumerate(found, begin):
        best = sorted((-hit["distance"], hit["row"]) for hit in hits)
        scores[i, : len(best)] = [-score for score, _ in best]
        rows[i, : len(best)] = [row for _, row in best]
    return scores, rows

  def create(self, content: Content) -> None:
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("row", DataType.INT64, is_primary=True)
    for field in ("id", "title", "text"):
      schema.add_field(field, DataType.VARCHAR, max_length=LONGEST)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=content.vectors.shape[1])
    # Lite looks at every vector: it is for what one process holds. A server is for what no longer is.
    index = MilvusClient.prepare_index_params()
    graph = {"M": LINKS, "efConstruction": BREADTH} if self.remote else {}
    index.add_index("vector", index_type="HNSW" if self.remote else "FLAT", metric_type="IP", params=graph)
    with _answers(self.name):
      self.client.drop_collection(self.collection, timeout=TIMEOUT)
      self.client.create_collection(
        self.collection,
        schema=schema,
        consistency_level="Strong",  # a search sees all that was added before
        properties={"ernie_jax": json.dumps(self.about)},
        timeout=TIMEOUT,
      )
      self.client.create_index(self.collection, index, timeout=TIMEOUT)

  def extend(self) -> None:
    """Takes away rows of a block that is not counted, which a killed build left: a server would keep them twice."""
    rows = list(range(len(self), len(self) + BLOCK))
    with _answers(self.name):
      for begin in range(0, BLOCK, 4096):
        self.client.delete(self.collection, ids=rows[begin : begin + 4096], timeout=TIMEOUT)
    self.save()  # from here on it is not finished

  def put(self, start: int, block: np.ndarray, content: Content) -> None:
    short = lambda text: text.encode()[:LONGEST].decode(errors="ignore")
    for begin in range(0, len(block), INSERTED):
      own = range(start + begin, start + min(begin + INSERTED, len(block)))
      rows = [
        {
          "row": row,
          "id": short(content.ids[row]),
          "title": short(content.titles[row]),
          "text": short(content.texts[row]),
          "vector": block[row - start],
        }
        for row in own
      ]
      with _answers(self.name):
        self.client.insert(self.collection, rows, timeout=TIMEOUT)
    self.save()

  def settle(self) -> None:
    with _answers(self.name):
      self.client.flush(self.collection, timeout=10 * TIMEOUT)
      with Progress(f"{self.name} makes its index", len(self), "passages") as bar:
        while left := self.client.describe_index(self.collection, "vector", timeout=TIMEOUT)["pending_index_rows"]:
          bar.advance(len(self) - left - bar.done)
          time.sleep(0.5)
        bar.advance(len(self) - bar.done)
      self.client.load_collection(self.collection, timeout=10 * TIMEOUT)

  def settings(self) -> Sequence[int]:
    return EF if self.remote else (0,)

  def save(self) -> None:
    with _answers(self.name):
      self.client.alter_collection_properties(self.collection, {"ernie_jax": json.dumps(self.about)}, timeout=TIMEOUT)


@contextlib.contextmanager
def _answers(name: str) -> Iterator[None]:
  """Milvus' errors in one line."""
  import grpc
  from pymilvus import MilvusException

  try:
    yield
  except MilvusException as error:
    raise UserError(f"{name}: Milvus: {first_line(Exception(error.message))}") from error
  except grpc.RpcError as error:
    raise UserError(f"{name}: Milvus does not answer: {first_line(error)}") from error


class _Kept(logging.Handler):
  """Milvus Lite logs why it cannot start, with a traceback, and tells nobody else."""

  reason: object = "see its log"

  def emit(self, record: logging.LogRecord) -> None:
    self.reason = record.exc_info[1] if record.exc_info else record.getMessage()


def _connect(name: str, where: str, remote: bool) -> Any:
  """A client of a server, or of Milvus Lite in this process."""
  _faiss()  # which Milvus Lite loads too
  try:
    from pymilvus import MilvusClient, MilvusException

    if not remote:
      import milvus_lite  # noqa: F401
  except ImportError as error:
    raise UserError(f"--index {name}: needs {error.name}; pip install 'ernie-jax[milvus]'") from error
  logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises too
  kept, log = _Kept(), logging.getLogger("milvus_lite.server_manager")
  log.addHandler(kept)
  log.propagate = False
  path = Path(where)
  if not remote:
    if path.suffix != ".db":
      raise UserError(f"--index {name}: name a file that ends in .db, or the http://HOST:19530 of a server")
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / "collections").is_dir()):
      raise UserError(f"--index {name}: there is something there that is no Milvus Lite database; name another file")
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"--index {name}: {path.parent} cannot be made: {error.strerror}") from error
  try:
    return MilvusClient(
      where,
      token=os.environ.get("MILVUS_TOKEN", ""),
      timeout=CONNECT,
      grpc_options={"grpc.keepalive_time_ms": QUIET},
    )
  except MilvusException as error:
    if not remote:
      raise UserError(f"--index {name}: Milvus Lite cannot open it: {first_line(Exception(kept.reason))}") from error
    reason = first_line(Exception(error.message))
    raise UserError(
      f"--index {name}: no answer from Milvus ({reason}); is the server running, and its port open?"
    ) from error
  finally:
    log.removeHandler(kept)
