"""Pseudo-queries, for post-training on a corpus that nobody has asked anything yet (METHOD: training strategy).

title   a passage's title finds its text, from which the title is taken away
cloze   a sentence finds the passage that it was taken out of (the inverse cloze task, Lee et al. 2019)

Pairs are made once, from the seed, and kept beside the stage's checkpoints as columns of tokens: row i of the queries
belongs to row i of the passages.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from ernie_jax import columns, config
from ernie_jax.columns import Ragged
from ernie_jax.config import UserError
from ernie_jax.progress import Progress
from ernie_jax.templates import Template
from ernie_jax.tokens import Tokenizer

STOPS = (".", "!", "?", "。", "！", "？")
SENTENCE = 8  # tokens of a sentence, at least: a stop may stand within a name or a number
LEFT = 8  # tokens of a passage, at least, once the query is out


def sentences(text: np.ndarray, stops: np.ndarray) -> list[tuple[int, int]]:
  """Where the sentences of a text begin and end. The text is divided after stops, as soon as `SENTENCE` is reached."""
  ends = [0]
  for stop in np.flatnonzero(np.isin(text, stops)).tolist():
    if stop + 1 - ends[-1] >= SENTENCE:
      ends.append(stop + 1)
  if len(text) - ends[-1] >= SENTENCE:
    ends.append(len(text))
  return list(itertools.pairwise(ends))


def cloze(text: np.ndarray, stops: np.ndarray, longest: int, rng: np.random.Generator) -> tuple[int, int]:
  """One of the text's sentences, cut to `longest`; of a text that is one sentence, a quarter, anywhere."""
  found = sentences(text, stops)
  if len(found) > 1:
    begin, end = found[rng.integers(len(found))]
    return begin, min(end, begin + longest)
  size = min(len(text) // 4, longest)
  begin = int(rng.integers(len(text) - size + 1))
  return begin, begin + size


def pairs(
  place: Path,
  passages: Ragged,
  titles: Ragged,
  identity: np.ndarray,
  tokenizer: Tokenizer,
  data: config.Data,
  kind: Literal["title", "cloze"],
  seed: int,
) -> tuple[Ragged, Ragged, np.ndarray]:
  """Queries, passages, and of each passage the first one that counts as the same: made in `place`, or found there.

  `passages`, `titles` and `identity` are the corpus'. A passage that is too short gives no pair. Two passages count as
  the same where their queries are, or what is left of them, or what they were made of: then neither is a negative of
  the other's query. `UserError` if there are none.
  """
  if columns.matching(place / "passages") is None:  # which is written last
    place.mkdir(parents=True, exist_ok=True)
    try:
      found = drawn(passages, titles, tokenizer, data, kind, np.random.default_rng(seed))
      _write(place, found, passages, identity)
    except OSError as error:
      raise UserError(f"{place}: cannot be written ({error.strerror or error}); choose another place") from error
  queries, rests = (columns.matching(place / name) for name in ("queries", "passages"))
  if queries is None or rests is None:
    raise UserError(f"{place}: damaged; delete it, and it is made anew")
  return queries, rests, np.load(place / "identity.npy")


def drawn(
  passages: Ragged,
  titles: Ragged,
  tokenizer: Tokenizer,
  data: config.Data,
  kind: Literal["title", "cloze"],
  rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """A query and what is left, of each passage."""
  apart = int(data.template == "rocketqa")  # then a [SEP] stands before every text, also where there is no title
  stops = np.array([i for stop in STOPS if (i := tokenizer.backend.token_to_id(stop)) is not None], np.int64)
  longest = data.query_length - Template(tokenizer, data).around
  for passage, title in zip(passages, titles.lengths.tolist()):
    text = title + 1 if title or apart else 0  # after the title's ":" or [SEP]
    if title and kind == "title":
      yield passage[:title], passage[text - apart :]
    else:
      begin, end = (text + place for place in cloze(passage[text:], stops, longest, rng))
      yield passage[begin:end], np.concatenate([passage[:begin], passage[end:]])


def _write(place: Path, found: Iterator[tuple[np.ndarray, np.ndarray]], passages: Ragged, identity: np.ndarray) -> None:
  keys: list[tuple[bytes, bytes, int]] = []
  with (
    columns.Writer(place / "queries", passages.values.dtype) as queries,
    columns.Writer(place / "passages", passages.values.dtype) as rests,
    Progress("pseudo-queries", len(passages), "passages") as bar,
  ):
    for row, (query, rest) in enumerate(found):
      if len(query) and len(rest) >= LEFT:
        queries.append(query)
        rests.append(rest)
        one, other = (hashlib.blake2b(x.tobytes(), digest_size=8).digest() for x in (query, rest))
        keys.append((one, other, int(identity[row])))
      bar.advance(1)
    if not keys:
      raise UserError("post.weights: no passage is long enough for a pseudo-query; leave all but mlm at 0")
    np.save(place / "identity.npy", same(*zip(*keys)))
    queries.close()
    rests.close()


def same(*keys: Sequence) -> np.ndarray:
  """[N] the first of the rows that a chain of equal keys connects with each row; every row has each of the keys."""
  groups = [np.unique(np.array(key), return_inverse=True)[1] for key in keys]
  first = np.arange(len(groups[0]))
  while True:
    before = first
    for group in groups:
      least = np.full(len(first), len(first))
      np.minimum.at(least, group, first)
      first = least[group]
    if np.array_equal(before, first):
      return first.astype(np.int32)
