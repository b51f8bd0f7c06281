"""Encoding, exact search, re-ranking and hard-negative mining."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax import checkpoints, config, mesh, scores
from ernie_jax.columns import Ragged
from ernie_jax.config import Interrupted, UserError
from ernie_jax.encoder import Rows
from ernie_jax.progress import Progress
from ernie_jax.templates import Template
from ernie_jax.tokens import Tokenizer, in_memory

ROWS = 64  # texts encoded at once, on each device
BUCKETS = 4  # row lengths compiled for: quarters of the longest


@dataclasses.dataclass(frozen=True)
class Encoded:
  """N texts as the student sees them."""

  vectors: np.ndarray  # [N, H] float32
  tokens: np.ndarray  # [all tokens, D] float16; empty unless late interaction was asked for
  offsets: np.ndarray  # [N + 1]: text i has tokens[offsets[i]:offsets[i + 1]]


def _batches(lengths: np.ndarray, longest: int) -> Iterator[tuple[np.ndarray, int]]:
  """Rows in order of length, with the row length they are padded to; shapes repeat, so little is compiled."""
  edges = [-(-longest * (i + 1) // BUCKETS) for i in range(BUCKETS)]
  bucket = np.searchsorted(edges, np.minimum(lengths, longest))
  size = ROWS * jax.device_count()
  for b, edge in enumerate(edges):
    members = np.flatnonzero(bucket == b)
    for start in range(0, len(members), size):
      yield members[start : start + size], edge


def _each(
  label: str,
  lengths: np.ndarray,
  longest: int,
  make: Callable[[list[int], int], Rows],
  apply: Callable,
) -> Iterator[tuple[np.ndarray, int, Any]]:
  """Applies a jitted function to all texts, batch by batch: (texts, row length, its result as numpy).

  `make(texts, length)` gives rows of that many tokens.
  """
  devices = mesh.make()
  size = ROWS * jax.device_count()
  mine = mesh.share(devices, size)
  with Progress(label, len(lengths), "texts") as bar:
    for members, edge in _batches(lengths, longest):
      if mesh.asked_to_stop():
        raise Interrupted(label, signal.SIGTERM)
      filled = np.resize(members, size)  # the last batch of a bucket is filled up by repeating texts
      rows = make(filled[mine].tolist(), edge)
      result = jax.tree.map(np.asarray, apply(mesh.shard(rows, devices)))
      yield members, edge, jax.tree.map(lambda x: x[: len(members)], result)
      bar.advance(len(members))


@functools.partial(jax.jit, static_argnames=("model", "query", "late"))
def embed(student: scores.Student, rows: Rows, model: config.Model, query: bool, late: bool):
  def local(student, rows):
    e = scores.embed(student, model, rows, None, query, late=late)
    return (e.vector, e.tokens.astype(jnp.float16)) if late else (e.vector,)

  return jax.tree.map(mesh.replicate, mesh.per_device(local, student, rows))


def encode(
  student: scores.Student,
  model: config.Model,
  store: Ragged,
  template: Template,
  *,
  query: bool,
  late: bool,
  label: str,
) -> Encoded:
  """Encodes the texts of a store as queries or as passages. Call under `jax.set_mesh(mesh.make())`."""
  lengths = (template.query_sizes if query else template.passage_sizes)(store.lengths)
  longest = template.data.query_length if query else template.data.passage_length
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  vectors = np.zeros((len(store), student.encoder.architecture.width), np.float32)
  width = model.late_width or student.encoder.architecture.width
  tokens = np.zeros((offsets[-1] if late else 0, width), np.float16)

  def make(texts: list[int], length: int) -> Rows:
    if query:
      return template.queries([template.query(store[i]) for i in texts], length)
    return template.passages([template.passage(store[i]) for i in texts], length)

  held = mesh.whole(student, mesh.make())
  apply = lambda rows: embed(held, rows, model, query, late)
  for members, _, result in _each(label, lengths, longest, make, apply):
    vectors[members] = result[0]
    if late:
      for i, row in zip(members, result[1]):
        tokens[offsets[i] : offsets[i + 1]] = row[: lengths[i]]
  return Encoded(vectors, tokens, offsets)


def top_k(queries: np.ndarray, passages: np.ndarray, k: int, block: int = 256) -> tuple[np.ndarray, np.ndarray]:
  """Exact search: scores and passage rows [Q, k], best first; equal scores in the order of the passages."""
  k = min(k, len(passages))
  found, values = [], []
  for start in range(0, len(queries), block):
    s = queries[start : start + block] @ passages.T
    order = np.argsort(-s, axis=1, kind="stable")[:, :k]
    found.append(order)
    values.append(np.take_along_axis(s, order, axis=1))
  return np.concatenate(values), np.concatenate(found)


def fuse(rankings: Sequence[tuple[np.ndarray, np.ndarray]], k: int, c: float = 60) -> tuple[np.ndarray, np.ndarray]:
  """Reciprocal rank fusion (Cormack, Clarke, Buettcher 2009) of rankings (scores, passage rows), each [Q, any].

  A passage's score is the sum of 1 / (c + rank) over the rankings that hold it, ranks from 1. A ranking's own scores
  do not count, nor do rows of -1; it holds a passage once. Gives scores float64 and rows [Q, k], best first, equal
  scores in the order of the passages; where fewer are found, score -inf and row -1 at the end, as `BM25.search` does.
  """
  rows = np.concatenate([found for _, found in rankings], axis=1)
  ranks = np.concatenate([np.arange(found.shape[1]) for _, found in rankings]) + 1
  # A passage's places side by side, by rank: sums of the same ranks are equal, whichever rankings they are from.
  order = np.lexsort((np.broadcast_to(ranks, rows.shape), rows))
  rows, parts = np.take_along_axis(rows, order, axis=1), 1 / (c + ranks[order])
  sums = parts.copy()
  for step in range(1, len(rankings)):
    sums[:, :-step] += np.where(rows[:, step:] == rows[:, :-step], parts[:, step:], 0)
  nothing = rows < 0
  nothing[:, 1:] |= rows[:, 1:] == rows[:, :-1]  # the sum stands at a passage's first place
  missing = ((0, 0), (0, max(0, k - rows.shape[1])))
  sums = np.pad(np.where(nothing, -np.inf, sums), missing, constant_values=-np.inf)
  rows = np.pad(np.where(nothing, -1, rows), missing, constant_values=-1)
  order = np.argsort(-sums, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(sums, order, axis=1), np.take_along_axis(rows, order, axis=1)


@jax.jit
def _maxsim(query: jax.Array, query_mask: jax.Array, passages: jax.Array, mask: jax.Array) -> jax.Array:
  similarity = jnp.einsum("qd,kpd->kqp", query, passages, preferred_element_type=jnp.float32)
  return scores.maxsim(similarity, jnp.broadcast_to(query_mask, similarity.shape[:2]), mask)


def rerank_late(queries: Encoded, passages: Encoded, candidates: np.ndarray) -> np.ndarray:
  """MaxSim of each query with its candidates (passage rows [Q, k]) -> scores [Q, k]."""
  q_longest, p_longest = (int(np.diff(e.offsets).max()) for e in (queries, passages))
  values = []

  def padded(e: Encoded, rows: Sequence[int], longest: int) -> tuple[np.ndarray, np.ndarray]:
    out = np.zeros((len(rows), longest, e.tokens.shape[1]), np.float32)
    there = np.zeros((len(rows), longest), bool)
    for i, row in enumerate(rows):
      own = e.tokens[e.offsets[row] : e.offsets[row + 1]]
      out[i, : len(own)], there[i, : len(own)] = own, True
    return out, there

  with Progress("re-rank (late interaction)", len(candidates), "queries") as bar:
    for i, rows in enumerate(candidates):
      (query,), (query_mask,) = padded(queries, [i], q_longest)
      values.append(np.asarray(_maxsim(query, query_mask, *padded(passages, rows, p_longest))))
      bar.advance(1)
  return np.stack(values)


@jax.jit
def _cross(params: scores.Params, rows: Rows) -> jax.Array:
  return mesh.replicate(mesh.per_device(lambda params, rows: scores.cross(params, rows, None)[0], params, rows))


def rerank_cross(
  params: scores.Params,
  queries: Ragged,
  passages: Ragged,
  candidates: np.ndarray,
  template: Template,
) -> np.ndarray:
  """The cross-encoder's logit of each query with its candidates (passage rows [Q, k]) -> scores [Q, k]."""
  where = np.repeat(np.arange(len(candidates)), candidates.shape[1])
  flat = candidates.reshape(-1)
  lengths = template.pair_sizes(queries.lengths[where], passages.lengths[flat])
  values = np.zeros(len(flat), np.float32)

  def make(pairs: list[int], length: int) -> Rows:
    asked = [template.query(queries[int(where[i])]) for i in pairs]
    return template.pairs(asked, [template.passage(passages[int(flat[i])]) for i in pairs], length)

  held = mesh.whole(params, mesh.make())
  apply = lambda rows: _cross(held, rows)
  longest = template.data.pair_length
  for members, _, result in _each("re-rank (cross-encoder)", lengths, longest, make, apply):
    values[members] = result
  return values.reshape(candidates.shape)


def reorder(candidates: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Candidates [Q, k] by new scores, best first; equal scores keep their order."""
  order = np.argsort(-values, axis=1, kind="stable")
  return np.take_along_axis(values, order, axis=1), np.take_along_axis(candidates, order, axis=1)


def mine(
  queries: np.ndarray,
  passages: np.ndarray,
  positives: list[np.ndarray],
  identity: np.ndarray,
  settings: config.Mine,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Hard negatives of each query: passage rows and scores at ranks first..last among passages that may be negatives.

  Known positives, and passages with the text of one, are left out before ranks are counted.
  """
  spare = max(len(p) for p in positives) + 8  # equal texts may take more places than there are positives
  values, found = top_k(queries, passages, settings.last + spare)
  rows, kept = [], []
  for i, own in enumerate(positives):
    allowed = ~np.isin(identity[found[i]], identity[own])
    rows.append(found[i][allowed][settings.first - 1 : settings.last])
    kept.append(values[i][allowed][settings.first - 1 : settings.last])
  return rows, kept


def load(path: Path) -> np.ndarray:
  """An array of the run."""
  try:
    return np.load(path)
  except (OSError, ValueError, EOFError) as error:
    raise UserError(f"{path}: missing or damaged; delete {path.parent}, and the run makes it again") from error


class Searcher:
  """Dual-encoder search over the corpus of a finished run."""

  def __init__(self, directory: Path):
    if not (directory / "model" / "model.json").is_file():
      raise UserError(f"{directory}: no finished run here (model/model.json is missing); `ernie-jax run` makes one")
    self.params, self.model, self.about = checkpoints.load_model(directory / "model")
    self.tokenizer = Tokenizer.load(directory / "model" / "tokenizer")
    data = self.about["data"]
    self.template = Template(self.tokenizer, config.Data(**(data | {"packages": tuple(data["packages"])})))
    self.vectors = load(directory / self.about["corpus"])
    path = directory / "prepare" / "corpus.jsonl"
    try:
      self.corpus = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
      raise UserError(f"{path}: missing or damaged; delete {path.parent} and run the recipe again") from error
    if len(self.corpus) != len(self.vectors):
      raise UserError(f"{path}: {len(self.corpus)} passages, but {len(self.vectors)} vectors; run the recipe again")

  def __call__(self, query: str, k: int = 10) -> list[tuple[float, dict[str, str]]]:
    """The k best passages, best first: (score, {"id", "title", "text"})."""
    store = in_memory([query], self.tokenizer)
    rows = self.template.queries([self.template.query(store[0])], self.template.data.query_length)
    vectors, *_ = embed(self.params["student"], rows, self.model, True, False)
    values, found = top_k(np.asarray(vectors), self.vectors, k)
    return [(float(value), self.corpus[row]) for value, row in zip(values[0], found[0])]
