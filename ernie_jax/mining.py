"""Hard negatives: what the student ranks high and is not known to be right, denoised by the cross-encoder."""

from __future__ import annotations

from typing import Any

import numpy as np

from ernie_jax import config, topk
from ernie_jax.columns import Ragged

BLOCK = 2**15  # queries at once


def mine(
  queries: np.ndarray,
  passages: Any,
  positives: Ragged,
  identity: np.ndarray,
  settings: config.Mine,
  *,
  order: np.ndarray | None = None,
  seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
  """Hard negatives of each query [Q, H] by the dual-encoder: scores and passage rows [Q, n], best first.

  Those at ranks `settings.first` to `settings.last` among passages that may be negatives, or `settings.sample` of them
  drawn from the seed. Known positives, and passages with the text of one, are left out before ranks are counted. At the
  end of a line, where there are too few, stand row -1 and score -inf.
  """
  count = settings.last - settings.first + 1
  values = np.full((len(queries), count), -np.inf, np.float32)
  rows = np.full((len(queries), count), -1, np.int64)
  copies = np.bincount(identity, minlength=len(identity))
  for begin in range(0, len(queries), BLOCK):
    here = range(begin, min(begin + BLOCK, len(queries)))
    known = [np.unique(identity[positives[i]]) for i in here]
    spare = max(int(copies[own].sum()) for own in known)
    scores, found = topk.top_k(queries[here.start : here.stop], passages, settings.last + spare, order=order)
    for i, own, line, score in zip(here, known, found, scores):
      may = np.flatnonzero(~np.isin(identity[line], own))[settings.first - 1 : settings.last]
      values[i, : len(may)], rows[i, : len(may)] = score[may], line[may]
  if settings.sample is None or settings.sample >= count:
    return values, rows
  drawn = np.random.default_rng(seed).random(rows.shape)
  drawn[rows < 0] = 2  # none is drawn where there are others
  chosen = np.sort(np.argsort(drawn, axis=1)[:, : settings.sample], axis=1)
  return np.take_along_axis(values, chosen, 1), np.take_along_axis(rows, chosen, 1)


def denoise(rows: np.ndarray, negatives: np.ndarray, positives: np.ndarray, settings: config.Mine) -> np.ndarray:
  """Rows [Q, n] with -1 in place of those that the cross-encoder takes for right, from its logits.

  `negatives` [Q, n]; `positives` [Q]: the largest logit of the query's known positives. A negative goes if its
  probability, sigmoid(logit), is above `settings.denoise` (RocketQA, section 3.2), or if it does not come
  `settings.margin` logits below the positive.
  """
  wrong = np.zeros(rows.shape, bool)
  if settings.denoise is not None:
    wrong |= 1 / (1 + np.exp(-negatives.astype(np.float64))) > settings.denoise
  if settings.margin is not None:
    wrong |= negatives > positives[:, None] - settings.margin
  return np.where(wrong, -1, rows)
