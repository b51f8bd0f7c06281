"""Hard negatives: what the student ranks high and is not known to be right, denoised by the cross-encoder.

They are found, judged and written query by query, in blocks: memory does not grow with the queries. A list of them is a
TREC run; beside it, where the cross-encoder judged, lie its logits of all that it read.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_jax import columns, config, datasets, evaluate, mesh, retrieval, topk
from ernie_jax.collection import Collection
from ernie_jax.columns import Ragged
from ernie_jax.config import UserError
from ernie_jax.datasets.rows import blocks
from ernie_jax.scores import Params
from ernie_jax.templates import Template

BLOCK = 2**15  # queries at once
LINES = 2**16  # of a run, read at once


@dataclasses.dataclass(frozen=True)
class Block:
  """Hard negatives of neighbouring queries."""

  begin: int  # the first query's row
  values: np.ndarray  # float32 [q, n] the dual-encoder's scores
  rows: np.ndarray  # int64 [q, n] passages, best first; -1: none
  dropped: collections.Counter[str]  # passages, by the rule that dropped them
  judged: np.ndarray | None = None  # [q, n + m] passages that the cross-encoder read: found ones, known positives
  logits: np.ndarray | None = None  # float32 [q, n + m] what it said


def mine(
  queries: np.ndarray,
  passages: Any,
  positives: Ragged,
  identity: np.ndarray,
  settings: config.Mine,
  rng: np.random.Generator,
  *,
  order: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, collections.Counter[str]]:
  """Hard negatives of each query [Q, H] by the dual-encoder: scores and passage rows [Q, n], best first.

  Those at ranks `settings.first` to `settings.last` among passages that may be negatives, or `settings.sample` of them
  drawn from `rng`: the same ones whether queries come together or, in their order, in parts. Known positives, and
  passages with the text of one, are left out before ranks are counted; how many stood in the way is counted. At the end
  of a line, where there are too few, stand row -1 and score -inf. `order` as in `topk.top_k`.
  """
  total, count = len(identity), settings.last - settings.first + 1
  values = np.full((len(queries), count), -np.inf, np.float32)
  rows = np.full((len(queries), count), -1, np.int64)
  dropped = collections.Counter(positive=0, text=0)
  # A query and a passage, or a query and a text, as one number.
  owner = np.repeat(np.arange(len(positives)), positives.lengths) * total
  known = owner + positives.values
  alike = np.unique(owner + identity[positives.values])
  copies = np.bincount(identity, minlength=total)
  deep = settings.last + np.bincount(alike // total, copies[alike % total], len(queries)).astype(np.int64)  # enough
  asked = np.arange(len(queries))
  k = int(np.quantile(deep, 0.95, method="higher")) if len(asked) else 0
  while len(asked):
    scores, found = topk.top_k(queries[asked], passages, k, order=order)
    own = asked[:, None] * total
    barred = np.isin(own + identity[found], alike)
    rank = np.cumsum(~barred, axis=1)
    done = (rank[:, -1] >= settings.last) | (deep[asked] <= k)  # for few, many copies stand before the rest
    i, j = np.nonzero(~barred & (rank >= settings.first) & (rank <= settings.last) & done[:, None])
    values[asked[i], rank[i, j] - settings.first] = scores[i, j]
    rows[asked[i], rank[i, j] - settings.first] = found[i, j]
    before = barred & (rank < settings.last) & done[:, None]
    positive = before & np.isin(own + found, known)
    dropped.update(positive=int(positive.sum()), text=int((before & ~positive).sum()))
    asked = asked[~done]
    k = int(deep[asked].max(initial=0))
  if settings.sample is not None and settings.sample < count:
    drawn = rng.random(rows.shape)
    drawn[rows < 0] = 2  # none is drawn where there are others
    chosen = np.sort(np.argsort(drawn, axis=1)[:, : settings.sample], axis=1)
    values, rows = np.take_along_axis(values, chosen, 1), np.take_along_axis(rows, chosen, 1)
  return values, rows, dropped


def denoise(
  rows: np.ndarray, negatives: np.ndarray, positives: np.ndarray, settings: config.Mine
) -> tuple[np.ndarray, collections.Counter[str]]:
  """Rows [Q, n] with -1 in place of those that the cross-encoder takes for right, from its logits; how many, by rule.

  `negatives` [Q, n]; `positives` [Q]: the largest logit of the query's known positives. A negative goes if its
  probability, sigmoid(logit), is above `settings.denoise` (RocketQA, section 3.2), or if it does not come
  `settings.margin` logits below the positive.
  """
  there, dropped = rows >= 0, collections.Counter[str]()
  for rule, threshold in (
    ("denoise", None if settings.denoise is None else math.log(settings.denoise / (1 - settings.denoise))),
    ("margin", None if settings.margin is None else positives[:, None].astype(np.float64) - settings.margin),
  ):
    if threshold is not None:
      wrong = there & (negatives > threshold)
      dropped[rule] = int(wrong.sum())
      there &= ~wrong
  return np.where(there, rows, -1), dropped


def search(
  encode: Callable[[Ragged], np.ndarray],
  queries: Ragged,
  corpus: Collection,
  positives: Ragged,
  identity: np.ndarray,
  settings: config.Mine,
  seed: int | list[int],
) -> Iterator[Block]:
  """Mines for the tokens of all queries, which `encode` turns into vectors [q, H], in an encoded corpus."""
  rng = np.random.default_rng(seed)
  for begin in range(0, len(queries), BLOCK):
    end = min(begin + BLOCK, len(queries))
    vectors = encode(queries.part(begin, end))
    own, order = positives.part(begin, end), corpus.passages.order
    yield Block(begin, *mine(vectors, corpus.vectors, own, identity, settings, rng, order=order))


def judge(
  found: Iterable[Block],
  params: Params,
  queries: Ragged,
  passages: Ragged,
  positives: Ragged,
  template: Template,
  settings: config.Mine,
) -> Iterator[Block]:
  """Each block denoised, with the cross-encoder's logits of what was found and of the known positives.

  Queries and passages are token stores, whose rows the blocks name. Call under `jax.set_mesh(mesh.make())`.
  """
  held = mesh.whole(params, mesh.make())
  for block in found:
    begin, end, n = block.begin, block.begin + len(block.rows), block.rows.shape[1]
    read = np.concatenate([block.rows, table(positives.part(begin, end), -1)], axis=1)
    logits = retrieval.rerank_cross(held, queries.part(begin, end), passages, read, template)
    rows, dropped = denoise(block.rows, logits[:, :n], logits[:, n:].max(1, initial=-np.inf), settings)
    dropped.update(block.dropped)
    yield dataclasses.replace(block, rows=rows, dropped=dropped, judged=read, logits=logits)


def table(ragged: Ragged, nothing: float, width: int = 0) -> np.ndarray:
  """[N, longest or `width`] the rows of a ragged array, filled up at their ends."""
  lengths = ragged.lengths
  made = np.full((len(lengths), max(width, int(lengths.max(initial=0)))), nothing, ragged.values.dtype)
  made[np.arange(made.shape[1]) < lengths[:, None]] = ragged.values
  return made


def write(path: Path, found: Iterable[Block], queries: Sequence[str], passages: Sequence[str]) -> dict[str, Any]:
  """Writes hard negatives as they come, as a TREC run; what there is to say of them.

  Of judged ones, the cross-encoder's logits of all that it read become another run, `beside(path)`. Both get their
  names when they are whole. Process 0 writes, all call it. `queries` and `passages` are ids. Raises `UserError` if the
  files cannot be written, and if nothing is left to write.
  """
  dropped, lines, fewer = collections.Counter[str](), 0, 0
  with contextlib.ExitStack() as files:
    opened = {path: files.enter_context(config.writing(path))} if mesh.leads() else {}  # now, not after hours

    def put(path: Path, tag: str, begin: int, rows: np.ndarray, values: np.ndarray) -> None:
      if path not in opened:
        opened[path] = files.enter_context(config.writing(path))
      for i, (own, scores) in enumerate(zip(rows, values)):
        named = {passages[row]: float(x) for row, x in zip(own.tolist(), scores) if row >= 0}
        opened[path].writelines(line.encode() for line in evaluate.lines(queries[begin + i], named, path, tag))

    for block in found:
      there = (block.rows >= 0).sum(1)
      dropped.update(block.dropped)
      lines += int(there.sum())
      fewer += int((there < block.rows.shape[1]).sum())
      if mesh.leads():
        put(path, "mined", block.begin, block.rows, block.values)
        if block.judged is not None and block.logits is not None:
          put(beside(path), "cross", block.begin, block.judged, block.logits)
    if not lines:
      said = ", ".join(f"{rule} {count:,}" for rule, count in dropped.items())
      raise UserError(
        f"{path}: no hard negative is left (dropped: {said}); raise last, or lower margin; in place of denoise take "
        "margin: lists trained this cross-encoder, so only differences of its logits count"
      )
  mesh.wait(str(path))
  return {"negatives_per_query": lines / len(queries), "fewer": fewer, "dropped": dict(dropped)}


def summary(result: dict[str, Any]) -> str:
  """What `write` says, in words."""
  names = {"positive": "known positives", "text": "their texts", "denoise": "by probability", "margin": "by margin"}
  dropped = ", ".join(
    f"{result['dropped'][rule]:,} {words}" for rule, words in names.items() if rule in result["dropped"]
  )
  return (
    f"{result['negatives_per_query']:.1f} hard negatives a query, {result['fewer']:,} queries have fewer than wanted; "
    f"dropped: {dropped or 'none'}"
  )


def beside(path: Path) -> Path:
  """negatives.trec -> negatives.cross.trec, for the cross-encoder's logits."""
  return path.with_suffix(".cross" + path.suffix)


def read(path: Path, queries: datasets.Queries, corpus: datasets.Corpus) -> tuple[Ragged, np.ndarray]:
  """Hard negatives from a run: of each query passage rows, in the order of the lines; and the scores of them all.

  Raises `UserError` for a file that is no run of this corpus.
  """
  places = {name: i for i, name in enumerate(queries.ids)}
  parts: list[tuple[np.ndarray, ...]] = [tuple(np.zeros(0, dtype) for dtype in (np.int32, np.int32, np.float32))]
  for lines in blocks(evaluate.scored(path), LINES):
    _, names, ids, scores = zip(*lines)
    rows = corpus.lookup(ids)
    if (rows < 0).any():
      raise UserError(f"{path}: names passages that the corpus lacks; delete {path.parent}, and the run makes it again")
    own = np.array([places.get(name, -1) for name in names], np.int32)
    parts.append(tuple(x[own >= 0] for x in (own, rows.astype(np.int32), np.array(scores, np.float32))))
  owners, found, values = (np.concatenate(each) for each in zip(*parts))
  order = np.argsort(owners, kind="stable")
  offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(places)))])
  return Ragged(found[order], offsets), values[order]


def reread(path: Path, queries: datasets.Queries, corpus: datasets.Corpus, settings: config.Mine) -> Iterator[Block]:
  """What `write` wrote, as blocks again."""
  rows, scores = read(path, queries, corpus)
  for begin in range(0, len(rows), BLOCK):
    own = rows.part(begin, min(begin + BLOCK, len(rows)))
    values = Ragged(scores[rows.offsets[begin] : rows.offsets[begin + len(own)]], own.offsets)
    width = settings.wanted
    yield Block(begin, table(values, -np.inf, width), table(own, -1, width).astype(np.int64), collections.Counter())


def joined(mined: Ragged, given: Ragged) -> Ragged:
  """Of each query both, each passage once."""
  return columns.ragged([np.array([*dict.fromkeys([*own, *more])], np.int32) for own, more in zip(mined, given)])
