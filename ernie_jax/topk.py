"""Exact search by inner product: a corpus in tiles over the mesh, in an order that float64 and TREC's rule decide."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ernie_jax import mesh
from ernie_jax.config import UserError

SPARE = 32  # candidates beyond k: what float32 cannot tell apart at place k is looked at in float64
SCORES = {"cpu": 2**22}  # scores that a device computes at once, for a short list: they stay in a CPU's cache
SCORES_ELSEWHERE = 2**26
LARGEST = 2**25  # scores at once, for long lists: 128 MiB
TILE = 2**24  # numbers of a device's tile: 64 MiB
QUERIES = 2**15  # searched in one pass over the corpus
GATHERED = 2**24  # numbers of float64 held at once when candidates are scored again: 128 MiB


def trec_order(ids: Sequence[str]) -> np.ndarray:
  """[N] the place of each id among all, the largest string first: of equal scores, trec_eval ranks that one first."""
  places = np.empty(len(ids), np.int32)
  places[sorted(range(len(ids)), key=list(ids).__getitem__, reverse=True)] = np.arange(len(ids), dtype=np.int32)
  return places


def top_k(
  queries: np.ndarray,
  vectors: Any,
  k: int,
  *,
  order: np.ndarray | None = None,
  recall: float | None = None,
  tile: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """The k best of N vectors for each of Q queries: scores float32 and rows int64 [Q, min(k, N)], best first.

  `vectors` [N, H] is an array, or anything with `shape` that gives arrays for slices and for arrays of rows; it is read
  a tile at a time, so memory does not grow with N. Candidates are found in float32, each device in its part of a tile,
  and scored again in float64: the result is that of float64 throughout. It is certain, because no other row can reach
  place k by more than float32's largest possible error, or else more candidates are taken. Equal scores: the smaller
  `order` [N] first; by default the smaller row (`trec_order` gives trec_eval's rule).

  With `recall` (0.95, say), TPUs search with `jax.lax.approx_max_k`, which finds that share of the k best on average,
  in the default matmul precision; scores are float32 and nothing is scored again. Other devices have no such
  operation: there only the second half holds. Raises `UserError` for vectors that are not finite.
  """
  total, width = vectors.shape
  k = min(k, total)
  queries = np.asarray(queries, np.float32)
  if k == 0 or not len(queries):
    return np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
  if not np.isfinite(queries).all():
    raise UserError("a query's vector is not finite: check the model that made it")
  values, rows = np.zeros((len(queries), k), np.float32), np.zeros((len(queries), k), np.int64)
  asked, wanted = np.arange(len(queries)), k if recall is not None else k + SPARE
  while len(asked):
    some, unsure = min(wanted, total), []
    for part in np.array_split(asked, -(-len(asked) // max(1, min(QUERIES, LARGEST // some)))):
      found, at, norm = candidates(queries[part], vectors, some, tile, recall)
      if recall is not None:
        values[part], rows[part] = found, at
        continue
      best, ranked = rescored(queries[part], vectors, at, k, order)
      # |float32 - exact| <= H u |q| |p| / (1 - H u), for sums in any order; twice that for what u leaves out
      error = 2 * width * 2.0**-24 * np.linalg.norm(queries[part].astype(np.float64), axis=1) * norm
      certain = (best[:, -1] > found[:, -1] + error) | (some == total)
      values[part[certain]], rows[part[certain]] = best[certain], ranked[certain]
      unsure.append(part[~certain])
    asked, wanted = np.concatenate([np.zeros(0, np.int64), *unsure]), 4 * wanted
  return values, rows


def rescored(
  queries: np.ndarray, vectors: Any, rows: np.ndarray, k: int, order: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """The k best of each query's candidates (rows [Q, n], -1 for none): scores float64 and rows [Q, k], ties by `order`.

  Where there are fewer, the rest is row -1 with score -inf.
  """
  values, found = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1, np.int64)
  step = max(1, GATHERED // max(1, rows.shape[1] * vectors.shape[1]))
  for begin in range(0, len(queries), step):
    own = rows[begin : begin + step]
    wide = vectors[np.maximum(own, 0).ravel()].astype(np.float64).reshape(*own.shape, -1)
    # Not a BLAS product: there a sum's order depends on its place, and equal vectors would differ in the last digit.
    scores = np.einsum("qnh,qh->qn", wide, queries[begin : begin + step].astype(np.float64))
    scores[own < 0] = -np.inf
    best = np.lexsort((own if order is None else order[own], -scores))[:, :k]
    values[begin : begin + step, : best.shape[1]] = np.take_along_axis(scores, best, 1)
    found[begin : begin + step, : best.shape[1]] = np.take_along_axis(own, best, 1)
  return values, found


def candidates(
  queries: np.ndarray, vectors: Any, k: int, tile: int | None, recall: float | None
) -> tuple[np.ndarray, np.ndarray, float]:
  """The k best by float32 scores [Q, k], best first, their rows, and the largest norm of a vector."""
  total, width = vectors.shape
  devices = mesh.make()
  count = devices.devices.size
  size = -(-(1 << (len(queries) - 1).bit_length()) // count) * count  # shapes repeat, so little is compiled
  asked = np.zeros((size, width), np.float32)
  asked[: len(queries)] = queries
  if tile is None:
    room = SCORES.get(jax.default_backend(), SCORES_ELSEWHERE)
    most = min(max(room // size, min(32 * k, LARGEST // size)), TILE // width, -(-total // count))
    tile = 1 << (max(most, k).bit_length() - 1)
  with jax.set_mesh(devices):
    held = mesh.whole(asked, devices)
    state = mesh.shard(_nothing(devices, size, k), devices)
    largest = mesh.shard(_nothing(devices, 1, 1)[0][:, 0], devices)  # of one number for each device
    before = state
    mine = mesh.share(devices, tile * count)
    for begin in range(0, total, tile * count):
      own = begin + mine
      part = np.zeros((len(own), width), vectors.dtype)
      for i in range(0, len(own), tile):  # a device's part is one slice
        piece = vectors[own[i] : min(own[i] + tile, total)] if own[i] < total else part[:0]
        part[i : i + len(piece)] = piece
      placed = mesh.shard((part, np.where(own < total, own, -1).astype(np.int32)), devices)
      jax.block_until_ready(before)  # no more than two tiles at a time
      before = state
      *state, largest = _search(held, *state, largest, *placed, recall)
    values, rows, norm = (np.asarray(x) for x in _gathered(*state, largest))
  if not np.isfinite(norm):
    raise UserError("a passage's vector is not finite: check the model that made it, and encode again")
  return values[: len(queries)], rows[: len(queries)].astype(np.int64), float(norm)


def _nothing(devices: jax.sharding.Mesh, size: int, k: int) -> tuple[np.ndarray, np.ndarray]:
  """No candidates: this host's part of the scores and rows [devices * Q, k]."""
  here = len(mesh.share(devices, devices.devices.size * size))
  return np.full((here, k), -np.inf, np.float32), np.zeros((here, k), np.int32)


@functools.partial(jax.jit, static_argnames=("recall",))
def _search(queries, values, found, largest, tile, rows, recall):
  """Each device's candidates so far and its part of a tile -> its candidates, and the largest norm yet."""

  def local(queries, values, found, largest, tile, rows):
    tile = tile.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if recall is None else jax.lax.Precision.DEFAULT
    scores = jnp.where(rows >= 0, jnp.einsum("qh,nh->qn", queries, tile, precision=precision), -jnp.inf)
    some = min(values.shape[1], len(rows))
    if recall is None or jax.default_backend() != "tpu":
      best, at = jax.lax.top_k(scores, some)
    else:
      best, at = jax.lax.approx_max_k(scores, some, recall_target=recall)
    values, found = jnp.concatenate([values, best], 1), jnp.concatenate([found, rows[at]], 1)
    best, at = jax.lax.top_k(values, values.shape[1] - some)
    norm = jnp.sqrt(jnp.max(jnp.sum(tile * tile, axis=1)))
    return best, jnp.take_along_axis(found, at, axis=1), jnp.maximum(largest, norm)

  return mesh.per_device(local, queries, values, found, largest, tile, rows)


@jax.jit
def _gathered(values, found, largest):
  """The candidates of all devices [devices * Q, k] -> the k best [Q, k]; and the largest norm."""

  def local(_, values, found):
    turned = lambda x: jax.lax.all_to_all(x, "data", 0, 1, tiled=True)  # all candidates of a part of the queries
    best, at = jax.lax.top_k(turned(values), values.shape[1])
    return best, jnp.take_along_axis(turned(found), at, axis=1)

  best, rows = mesh.per_device(local, (), values, found)
  return mesh.replicate(best), mesh.replicate(rows), mesh.replicate(largest).max()
