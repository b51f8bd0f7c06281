"""Encoding and re-ranking: texts in packed rows, the longest first, each device its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax import config, mesh, scores
from ernie_jax.batches import first_fit
from ernie_jax.columns import Ragged
from ernie_jax.config import Interrupted
from ernie_jax.encoder import Rows, apart
from ernie_jax.progress import Progress
from ernie_jax.templates import Template, ranges

TOKENS = {"cpu": 1024}  # that a device encodes at once: what a layer makes of them stays in a CPU's cache
TOKENS_ELSEWHERE = 2**16
SHORTEST = 16  # tokens of a row
SHARED = 4  # most texts of a row
LAID = 2**15  # texts that are laid out in rows at once: the time that takes grows with their square
MEMORY = 2**31  # bytes of token vectors held at once where they are made as they are needed


@dataclasses.dataclass(frozen=True)
class Encoded:
  """N texts as the student sees them."""

  vectors: np.ndarray  # [N, H] float32
  tokens: np.ndarray  # [all tokens, D] float16; empty unless late interaction was asked for
  offsets: np.ndarray  # [N + 1]: text i has tokens[offsets[i]:offsets[i + 1]]


@dataclasses.dataclass(frozen=True)
class Unit:
  """Texts that a device encodes at once."""

  texts: np.ndarray  # [n] which
  places: np.ndarray  # [n] where each begins in the rows laid end to end
  count: int  # rows
  length: int  # tokens of a row


def units(sizes: np.ndarray, longest: int, devices: int) -> Iterator[list[Unit]]:
  """All texts, by their numbers of tokens, packed into units; a list holds units of one shape, one for each device.

  Rows are as long as the longest text, or a half or a quarter of that where two texts fit: attention costs what a row
  is long. Shapes repeat, so little is compiled; the last list of a shape repeats its last unit.
  """
  room = TOKENS.get(jax.default_backend(), TOKENS_ELSEWHERE)
  lengths = np.unique([max(SHORTEST, -(-longest // part)) for part in (4, 2, 1)])
  kind = np.searchsorted(lengths[:-1], 2 * sizes)
  for c in range(len(lengths))[::-1]:
    every, length = np.flatnonzero(kind == c), int(lengths[c])
    every = every[np.argsort(-sizes[every], kind="stable")]
    for start in range(0, len(every), LAID):
      members = every[start : start + LAID]
      places = first_fit(sizes[members], length, len(members), SHARED)
      assert places is not None  # a row for each would do
      order = np.argsort(places, kind="stable")
      members, places = members[order], places[order]
      rows = int(places[-1]) // length + 1
      count = min(max(1, room // length), 1 << (-(-rows // devices) - 1).bit_length())
      edges = np.searchsorted(places, np.arange(0, rows + count, count) * length)
      made = [
        Unit(members[a:b], places[a:b] - i * count * length, count, length)
        for i, (a, b) in enumerate(itertools.pairwise(edges))
      ]
      for begin in range(0, len(made), devices):
        some = made[begin : begin + devices]
        yield some + [some[-1]] * (devices - len(some))


def _each(
  sizes: np.ndarray,
  longest: int,
  make: Callable[..., Rows],
  apply: Callable[[Rows], Any],
  bar: Progress,
  devices: jax.sharding.Mesh,
) -> Iterator[tuple[np.ndarray, Any]]:
  """Applies a jitted function to all texts: (which, its result for them as numpy), unit by unit.

  `make(texts, length, places=..., units=1, count=..., longest=...)` gives the rows of a unit. While the devices
  compute, the next rows are made.
  """
  before: tuple[list[Unit], Any] | None = None

  def finished(made: list[Unit], result: Any) -> Iterator[tuple[np.ndarray, Any]]:
    arrays = jax.tree.map(np.asarray, result)
    several = {id(unit): i for i, unit in reversed(list(enumerate(made)))}  # one that is repeated counts once
    for i in several.values():
      first = i * made[i].count * SHARED
      own = jax.tree.map(lambda x: x[first : first + len(made[i].texts)], arrays)
      yield made[i].texts, own
      bar.advance(len(made[i].texts))

  together = devices.devices.size == jax.device_count()
  for made in units(sizes, longest, devices.devices.size):
    if together and mesh.asked_to_stop():  # else hosts do not come here equally often
      raise Interrupted(bar.label, signal.SIGTERM)
    parts = []
    for i in mesh.share(devices, len(made)):
      unit, most = made[i], made[i].count * SHARED
      layout = {"places": unit.places, "units": 1, "count": unit.count, "longest": unit.length}
      rows = make(unit.texts.tolist(), unit.length, **layout)
      starts = np.pad(np.asarray(rows.starts), (0, most - len(unit.texts)))
      parts.append(dataclasses.replace(rows, starts=starts, unit=most))  # type: ignore[arg-type]
    result = apply(mesh.shard(jax.tree.map(lambda *x: np.concatenate(x), *parts), devices))
    if before is not None:
      yield from finished(*before)
    before = made, result
  if before is not None:
    yield from finished(*before)


@functools.partial(jax.jit, static_argnames=("model", "query", "late"))
def embed(student: scores.Student, rows: Rows, model: config.Model, query: bool, late: bool):
  def local(student, rows):
    e = scores.embed(student, model, rows, None, query, late=late)
    return (e.vector, e.tokens.astype(jnp.float16)) if late else (e.vector,)

  return jax.tree.map(mesh.replicate, mesh.per_device(local, student, rows))


def placed(module: Any, devices: jax.sharding.Mesh) -> Any:
  """A student or a teacher as encoding takes it, complete on every device; one that is so already stays."""
  return mesh.whole(apart(module), devices)


def encode(
  student: scores.Student,
  model: config.Model,
  store: Ragged,
  template: Template,
  *,
  query: bool,
  late: bool,
  progress: str | Progress,
  devices: jax.sharding.Mesh | None = None,
) -> Encoded:
  """Encodes the texts of a store as queries or as passages. Call under `jax.set_mesh(devices)`; by default all of them.

  `progress` is a label, or the progress of a longer job.
  """
  devices = mesh.make() if devices is None else devices
  sizes = (template.query_sizes if query else template.passage_sizes)(store.lengths)
  longest = template.data.query_length if query else template.data.passage_length
  offsets = np.concatenate([[0], np.cumsum(sizes)])
  vectors = np.zeros((len(store), scores.dual_width(student)), np.float32)
  tokens = np.zeros((offsets[-1] if late else 0, scores.late_width(student)), np.float16)

  def make(texts: list[int], length: int, **layout: Any) -> Rows:
    if query:
      return template.queries([template.query(store[i]) for i in texts], length, **layout)
    return template.passages([template.passage(store[i]) for i in texts], length, **layout)

  held = placed(student, devices)
  apply = lambda rows: embed(held, rows, model, query, late)
  with (
    Progress(progress, len(store), "texts") if isinstance(progress, str) else contextlib.nullcontext(progress) as bar
  ):
    for texts, result in _each(sizes, longest, make, apply, bar, devices):
      vectors[texts] = result[0]
      if late:
        there = np.arange(result[1].shape[1]) < sizes[texts, None]
        tokens[ranges(offsets[texts], sizes[texts])] = result[1][there]
  return Encoded(vectors, tokens, offsets)


Tokens = Callable[[np.ndarray], Ragged]  # passage rows [n], ascending -> their token vectors, [all tokens, D]


def whole(encoded: Encoded) -> Ragged:
  """The token vectors of all texts."""
  return Ragged(encoded.tokens, encoded.offsets)


def some(vectors: Ragged, rows: np.ndarray) -> Ragged:
  """The token vectors of some texts."""
  sizes = vectors.offsets[rows + 1] - vectors.offsets[rows]
  return Ragged(vectors.values[ranges(vectors.offsets[rows], sizes)], np.concatenate([[0], np.cumsum(sizes)]))


def rerank_late(queries: Encoded, candidates: np.ndarray, tokens: Tokens, each: int) -> np.ndarray:
  """MaxSim of each query with its candidates (passage rows [Q, k]) -> scores [Q, k]; -inf for row -1.

  Token vectors are asked for once for as many queries as `MEMORY` allows, where a passage takes `each` bytes at most.
  """
  values = np.full(candidates.shape, -np.inf, np.float32)
  begin, count = 0, len(candidates)
  with Progress("re-rank (late interaction)", len(candidates), "queries") as bar:
    while begin < len(candidates):
      count = min(count, len(candidates) - begin)  # as many as before: to look at all again would take long
      while len(needed := np.unique(candidates[begin : begin + count])) * each > MEMORY and count > 1:
        count = -(-count // 2)
      needed = needed[needed >= 0]
      held = tokens(needed)
      for i in range(begin, begin + count):
        there = candidates[i] >= 0
        values[i, there] = maxsim(
          queries.tokens[queries.offsets[i] : queries.offsets[i + 1]],
          some(held, np.searchsorted(needed, candidates[i, there])),
        )
        bar.advance(1)
      begin += count
  return values


def maxsim(query: np.ndarray, passages: Ragged) -> np.ndarray:
  """[n] the sum over a query's token vectors [Lq, D] of the largest inner product with one of each passage's."""
  if not len(passages):
    return np.zeros(0, np.float32)
  similarity = query.astype(np.float32) @ passages.values.astype(np.float32).T
  return np.maximum.reduceat(similarity, passages.offsets[:-1], axis=1).sum(0)


@jax.jit
def _cross(params: scores.Params, rows: Rows) -> jax.Array:
  logits = lambda params, rows: scores.cross(params, rows, None, leads=True)[0]
  return mesh.replicate(mesh.per_device(logits, params, rows))


def rerank_cross(
  params: scores.Params,
  queries: Ragged,
  passages: Ragged,
  candidates: np.ndarray,
  template: Template,
) -> np.ndarray:
  """The cross-encoder's logit of each query with its candidates (passage rows [Q, k]) -> [Q, k]; -inf for row -1."""
  values = np.full(candidates.shape, -np.inf, np.float32)
  devices = mesh.make()
  held = {name: placed(module, devices) for name, module in params.items()}
  apply = lambda rows: _cross(held, rows)
  asked, place = np.nonzero(candidates >= 0)
  rows = candidates[asked, place]
  sizes = template.pair_sizes(queries.lengths[asked], passages.lengths[rows])

  def make(pairs: list[int], length: int, **layout: Any) -> Rows:
    read = [template.query(queries[int(asked[i])]) for i in pairs]
    return template.pairs(read, [template.passage(passages[int(rows[i])]) for i in pairs], length, **layout)

  with Progress("re-rank (cross-encoder)", len(rows), "pairs") as bar:
    for pairs, result in _each(sizes, template.data.pair_length, make, apply, bar, devices):
      values[asked[pairs], place[pairs]] = result
  return values


def reorder(candidates: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Candidates [Q, k] by new scores, best first; equal scores keep their order."""
  order = np.argsort(-values, axis=1, kind="stable")
  return np.take_along_axis(values, order, axis=1), np.take_along_axis(candidates, order, axis=1)


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
