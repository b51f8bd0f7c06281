"""Search: an encoded corpus and its model, and the rankings that they give, with hits as people read them."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np

from ernie_jax import checkpoints, collection, columns, config, hub, mesh, pretrained, retrieval, scores, step, topk
from ernie_jax import index as indexes
from ernie_jax.bm25 import BM25
from ernie_jax.collection import Collection
from ernie_jax.columns import Ragged
from ernie_jax.config import UserError
from ernie_jax.progress import say
from ernie_jax.templates import Template
from ernie_jax.tokens import Tokenizer, in_memory

RECALL = 0.95  # of the approximate top-k
BLOCK = 4096  # texts tokenised at once
How = Literal["bm25", "dual", "late", "cross", "hybrid"]


@dataclasses.dataclass(frozen=True)
class Model:
  """A trained model, for use."""

  params: checkpoints.Params
  settings: config.Model
  template: Template
  digest: str  # of all that decides a vector
  about: dict

  @classmethod
  def load(cls, directory: Path) -> Model:
    """From a run's folder, or its folder `model/`."""
    place = directory / "model" if (directory / "model" / "model.json").is_file() else directory
    if not (place / "model.json").is_file():
      raise UserError(f"{directory}: no finished run here (model/model.json is missing); `ernie-jax run` makes one")
    params, settings, about = checkpoints.load_model(place)
    data = about["data"]
    template = Template(
      Tokenizer.load(place / "tokenizer"), config.Data(**(data | {"packages": tuple(data["packages"])}))
    )
    return cls(params, settings, template, collection.fingerprint(params["student"], settings, template), about)

  @functools.cached_property
  def student(self) -> scores.Student:
    """As encoding takes it, on the devices."""
    return retrieval.placed(self.params["student"], mesh.make())

  @functools.cached_property
  def ready(self) -> scores.Params:
    """Both, as re-ranking takes them: who only encodes has no cross-encoder on the devices."""
    return {"student": self.student, "teacher": retrieval.placed(self.params["teacher"], mesh.make())}

  @property
  def crosses(self) -> bool:
    """Whether there is a trained cross-encoder; an imported model may have none."""
    return not any(name.startswith("teacher.") for name in self.about.get("random", ()))

  def before(self) -> Model | None:
    """The model as its training began, from a checkpoint; None if that was random, or cannot be had."""
    s = self.settings
    cache = Path(self.template.data.cache).expanduser()
    if not s.start:
      return None
    try:
      checkpoint = pretrained.load(*hub.locate(s.start, cache)).with_layers(s.start_layers, "model.start_layers")
    except hub.Unreachable as error:
      say(f"{error}: no zero-shot ranking")
      return None
    shapes = (dataclasses.replace(checkpoint.architecture, special=self.template.tokenizer.special),) * 2
    student = dataclasses.replace(s, share_encoder=True, teacher_start="", teacher_scratch=None)  # it alone is needed
    params = step.init_params(student, *shapes, jax.random.key(0))
    return dataclasses.replace(self, params=pretrained.assign(params, checkpoint, None)[0])

  def encode(self, store: Ragged, *, query: bool, late: bool) -> retrieval.Encoded:
    what = "encode queries" if query else "encode passages"
    with jax.set_mesh(mesh.make()):
      return retrieval.encode(self.student, self.settings, store, self.template, query=query, late=late, progress=what)


@dataclasses.dataclass(frozen=True)
class Hit:
  """A passage that was found, by its row in the corpus."""

  row: int
  score: float
  id: str
  title: str
  text: str


@dataclasses.dataclass(frozen=True)
class Matches:
  """What late interaction sees: the tokens of a query and of a passage, and the inner products of their vectors."""

  query: list[str]
  passage: list[str]
  similarity: np.ndarray  # float32 [Lq, Lp]

  @property
  def score(self) -> float:
    """MaxSim."""
    return float(self.similarity.max(1).sum())


class Searcher:
  """Searches a finished run, or a folder of `ernie-jax encode`."""

  def __init__(self, directory: Path, model: Path | None = None, index: str = ""):
    """`model` is by default the run's, or the one that encoded the folder; another one is a `UserError`.

    `index` is the name of one that `build` has built; without one, search is exact and needs none. "approx" needs none
    either: a TPU's approximate top-k, with `RECALL`.
    """
    run = (directory / "model" / "model.json").is_file()
    if not run and not (directory / "collection.json").is_file():
      raise UserError(
        f"{directory}: no finished run here (model/model.json is missing) and no encoded corpus (collection.json); "
        "`ernie-jax run` and `ernie-jax encode` make them"
      )
    about = checkpoints.describe_model(directory / "model")["about"] if run else {}
    if run and "corpus" not in about:
      raise UserError(
        f"{directory}: an imported model without a corpus; `ernie-jax encode {directory} NAME --from DIR`"
      )
    place = directory / str(about["corpus"]) if run else directory
    self.corpus: Collection = collection.load(place)
    if self.corpus.about["texts"] != "passages":
      raise UserError(f"{directory}: holds queries; search a folder of passages")
    self.directory, source = directory, model or (directory if run else collection.source(directory)[0])
    self.model = Model.load(source)
    if self.corpus.about["model"] != self.model.digest:
      raise UserError(
        f"{self.corpus.directory}: was encoded with model {self.corpus.about['model']}, but {source} is "
        f"{self.model.digest}; encode again with it, or name the right one with --model"
      )
    self.approximate = index == "approx"
    opened = bool(index) and not self.approximate
    self.index = indexes.open(index, self.corpus.directory, self.content()) if opened else None
    self.about = {**self.corpus.about, "passages": len(self.corpus.vectors), "data": self.data.name}

  @property
  def data(self) -> config.Data:
    """The data set of the passages."""
    own = self.corpus.directory != self.directory  # a run's
    return self.model.template.data if own else collection.source(self.directory)[1]

  def search(self, queries: Sequence[str], k: int, how: How = "dual", depth: int = 100) -> list[list[Hit]]:
    """The k best passages of each query, best first (fewer where BM25 finds fewer)."""
    found = zip(*self.rank(queries, k, how, depth))
    return [[self.hit(int(row), float(score)) for score, row in zip(*own) if row >= 0] for own in found]

  def hit(self, row: int, score: float) -> Hit:
    p = self.corpus.passages
    return Hit(row, score, p.ids[row], p.titles[row], p.texts[row])

  def rank(self, queries: Sequence[str], k: int, how: How = "dual", depth: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Scores and passage rows [Q, min(k, N)], best first; row -1 where fewer are found.

    `late` and `cross` re-rank the dual-encoder's `depth` best, at least k; `hybrid` is the reciprocal rank fusion of
    the dual-encoder's and BM25's.
    """
    if how not in get_args(How):
      raise UserError(f"--with {how}: known are {', '.join(get_args(How))}")
    try:
      "".join(queries).encode()
    except UnicodeEncodeError as error:
      raise UserError(f"query {error.object!r:.80}: is not UTF-8; set the terminal to it") from error
    k = min(k, len(self.corpus.vectors))
    if how == "bm25":
      return self.bm25.search(queries, k)
    store = in_memory(queries, self.model.template.tokenizer)
    asked = self.model.encode(store, query=True, late=how == "late")
    values, rows = self.nearest(asked.vectors, k if how == "dual" else max(k, depth))
    if how == "hybrid":
      return retrieval.fuse([(values, rows), self.bm25.search(queries, max(k, depth))], k)
    if how == "late":
      values, rows = self.late(asked, rows)
    elif how == "cross":
      values, rows = self.cross(store, rows)
    return values[:, :k], rows[:, :k]

  def systems(self, queries: Sequence[str], k: int, depth: int) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """The ranking of each system, k deep; of the re-rankers `depth` deep, over the dual-encoder's."""
    yield "bm25", self.bm25.search(queries, k)
    store = in_memory(queries, self.model.template.tokenizer)
    if (before := self.model.before()) is not None:
      yield "zero_shot", self.untrained(before, store, k)
    asked = self.model.encode(store, query=True, late=True)
    values, rows = self.nearest(asked.vectors, max(k, depth))
    yield "dual", (values, rows)
    yield "late", self.late(asked, rows[:, :depth])
    if self.model.crosses:
      yield "cross", self.cross(store, rows[:, :depth])

  def untrained(self, before: Model, store: Ragged, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The ranking by the weights that training began with: the corpus is encoded with them, in memory."""
    passages = before.encode(self.tokens(np.arange(len(self.corpus.vectors))), query=False, late=False)
    queries = before.encode(store, query=True, late=False)
    return topk.top_k(queries.vectors, passages.vectors, k, order=self.corpus.passages.order)

  def late(self, asked: retrieval.Encoded, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Passage rows [Q, n] re-ranked by late interaction."""
    return retrieval.reorder(rows, retrieval.rerank_late(asked, rows, self.token_vectors, self.each))

  def cross(self, store: Ragged, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Passage rows [Q, n] re-ranked by the cross-encoder, for the tokens of queries."""
    if not self.model.crosses:
      raise UserError(f"{self.directory}: its model has no cross-encoder; import one: `ernie-jax import ... --cross`")
    needed = np.unique(rows[rows >= 0])
    local = np.where(rows >= 0, np.searchsorted(needed, rows), -1)
    with jax.set_mesh(mesh.make()):
      logits = retrieval.rerank_cross(self.model.ready, store, self.tokens(needed), local, self.model.template)
    return retrieval.reorder(rows, logits)

  def as_run(self, ids: Sequence[str], values: np.ndarray, rows: np.ndarray) -> dict[str, dict[str, float]]:
    """Scores and passage rows [Q, k] by the queries' and the passages' ids."""
    names = self.corpus.passages.ids
    found = zip(ids, values, rows)
    return {query: {names[row]: float(x) for x, row in zip(*own) if row >= 0} for query, *own in found}

  def content(self) -> indexes.Content:
    """What an index is built over."""
    p, about = self.corpus.passages, {name: self.corpus.about[name] for name in ("model", "corpus")}
    return indexes.Content(self.corpus.vectors, p.ids, p.titles, p.texts, about)

  def build(self, name: str) -> indexes.Index:
    """Builds an index, or adds to it what it lacks."""
    return indexes.build(name, self.corpus.directory, self.content())

  def nearest(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The dual-encoder's ranking."""
    k = min(k, len(self.corpus.vectors))
    if self.index is not None:
      return self.index.search(vectors, k)
    recall = RECALL if self.approximate else None
    return topk.top_k(vectors, self.corpus.vectors, k, order=self.corpus.passages.order, recall=recall)

  @functools.cached_property
  def bm25(self) -> BM25:
    """Made at its first use, and kept beside the texts."""
    place = self.corpus.directory / self.corpus.about["passages"] / "bm25"
    if place.is_dir():
      try:
        found = BM25.open(place)
        if len(found) == len(self.corpus.vectors):
          return found
      except UserError as error:
        say(f"{error}: it is built anew")
      shutil.rmtree(place)
    p = self.corpus.passages
    keep = os.access(place.parent, os.W_OK)  # else another user's run
    return BM25.build(Joined(p.titles, p.texts), place if keep else None)

  @property
  def each(self) -> int:
    """Bytes of a passage's token vectors, at most."""
    return 2 * self.model.template.data.passage_length * self.corpus.about["late_width"]

  def token_vectors(self, rows: np.ndarray) -> Ragged:
    """Of some passages: those that are kept, or made now."""
    if self.corpus.tokens is not None:
      return self.corpus.tokens(rows)
    return retrieval.whole(self.model.encode(self.tokens(rows), query=False, late=True))

  def tokens(self, rows: np.ndarray) -> Ragged:
    """The tokens of some passages, as `tokens.store` has them."""
    p, tokenizer, found = self.corpus.passages, self.model.template.tokenizer, []
    sep = np.array([tokenizer.sep], np.int32)
    for begin in range(0, len(rows), BLOCK):
      both = [[column[int(row)] for row in rows[begin : begin + BLOCK]] for column in (p.titles, p.texts)]
      if self.model.template.data.template == "bert":
        found += tokenizer.encode([columns.passage(*own) for own in zip(*both)])
      else:
        found += [np.concatenate([title, sep, text]) for title, text in zip(*map(tokenizer.encode, both))]
    return columns.ragged(found)

  def match(self, query: str, row: int) -> Matches:
    """Which of a passage's tokens each of a query's tokens matches."""
    template = self.model.template
    store = in_memory([query], template.tokenizer)
    asked = self.model.encode(store, query=True, late=True)
    own = self.tokens(np.array([row]))
    vectors = self.token_vectors(np.array([row])).values.astype(np.float32)
    rows = (
      template.queries([template.query(store[0])], len(asked.tokens)),
      template.passages([template.passage(own[0])], len(vectors)),
    )
    words = [[template.tokenizer.backend.id_to_token(int(t)) or "" for t in np.asarray(r.tokens)[0]] for r in rows]
    return Matches(words[0], words[1], asked.tokens.astype(np.float32) @ vectors.T)


class Joined(Sequence[str]):
  """Passages as an encoder reads them, from their titles and texts."""

  def __init__(self, titles: Sequence[str], texts: Sequence[str]):
    self.titles, self.texts = titles, texts

  def __len__(self) -> int:
    return len(self.titles)

  def __getitem__(self, row):
    if isinstance(row, slice):
      return [columns.passage(*both) for both in zip(self.titles[row], self.texts[row])]
    return columns.passage(self.titles[row], self.texts[row])
