"""Fusing rankings, against the definition with dictionaries."""

import functools
import operator

import numpy as np
import pytest

from ernie_jax import retrieval

ABSENT = (-np.inf, -1)


def fuse_by_hand(rankings, k, c):
  """Of each query, (score, row) best first; a row's parts are added in the order of its ranks."""
  result = []
  for own in zip(*(found.tolist() for _, found in rankings)):
    ranks = {}
    for found in own:
      for rank, row in enumerate(found, 1):
        if row >= 0:
          ranks.setdefault(row, []).append(rank)
    total = lambda own: functools.reduce(operator.add, [1 / (c + rank) for rank in sorted(own)])
    best = sorted(((total(own), row) for row, own in ranks.items()), key=lambda item: (-item[0], item[1]))[:k]
    result.append(best + [ABSENT] * (k - len(best)))
  return result


def random_ranking(rng, queries, depth, passages):
  rows = np.stack([rng.permutation(passages)[:depth] for _ in range(queries)])
  for own in rows:
    own[rng.integers(depth + 1) :] = -1  # some found little, some nothing
  return rng.normal(size=rows.shape).astype(np.float32), rows


@pytest.mark.parametrize("seed", range(20))
def test_fusion_is_its_definition(seed):
  rng = np.random.default_rng(seed)
  depths = rng.integers(1, 30, size=rng.integers(1, 5))
  rankings = [random_ranking(rng, 7, depth, 40) for depth in depths]
  k, c = int(rng.integers(1, 60)), int(rng.choice([0, 1, 60]))
  scores, rows = retrieval.fuse(rankings, k, c)
  expected = fuse_by_hand(rankings, k, c)
  assert rows.tolist() == [[row for _, row in own] for own in expected]
  assert scores.tolist() == [[score for score, _ in own] for own in expected]


def test_the_paper_s_constant_and_ties():
  ranking = lambda *rows: (np.zeros((1, len(rows)), np.float32), np.array([rows]))
  scores, rows = retrieval.fuse([ranking(7, 3, 5), ranking(3, 7, 2)], 5)
  assert rows.tolist() == [[3, 7, 2, 5, -1]]
  assert scores[0] == pytest.approx([1 / 61 + 1 / 62] * 2 + [1 / 63] * 2 + [-np.inf])
  # The same three ranks from any rankings: exactly the same sum.
  cyclic = [ranking(*np.roll(np.arange(3), shift)) for shift in range(3)]
  scores, rows = retrieval.fuse(cyclic, 3)
  assert rows.tolist() == [[0, 1, 2]]
  assert len(set(scores[0].tolist())) == 1


def test_one_ranking_keeps_its_order_and_none_found_is_none():
  rows = np.array([[4, 0, 9, -1], [-1, -1, -1, -1]])
  scores, fused = retrieval.fuse([(np.zeros((2, 4)), rows)], 4)
  assert fused.tolist() == rows.tolist()
  assert scores[1].tolist() == [-np.inf] * 4
  nothing = np.zeros((0, 4), np.int64)
  assert retrieval.fuse([(nothing, nothing)], 3)[1].shape == (0, 3)
