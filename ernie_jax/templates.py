"""How texts become rows of tokens: BERT's form, RocketQA's titles, ColBERT's markers and masks; padded or packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ernie_jax import config
from ernie_jax.encoder import Rows
from ernie_jax.tokens import Tokenizer


def rows(
  parts: Sequence[Sequence[np.ndarray]],
  length: int,
  tokenizer: Tokenizer,
  *,
  marker: int | None = None,
  augment: int = 0,
  places: np.ndarray | None = None,
  units: int = 1,
  count: int = 0,
  longest: int = 0,
) -> Rows:
  """Texts as [CLS] part [SEP] part [SEP] ..., the second part of type 1; numpy [rows, length]. Padding has segment 0.

  Parts must fit: cut them first. `marker` is a token after [CLS]; texts are filled up with [MASK] to `augment` tokens,
  which read the text and are not read. Without `places`, each text is a row. Packed, `places` [N] says where each
  begins in the rows of its unit laid end to end: N texts are `units` units of `count` rows.
  """
  n, lead = len(parts), 1 if marker is None else 2
  each = n // units
  if places is None:
    begins, numbers, total = np.arange(n) * length, np.ones(n, np.int32), n
  else:
    begins, total = places + np.arange(n) // each * count * length, units * count
    numbers = np.arange(n, dtype=np.int32) % each + 1
  tokens, segments, positions, types = (np.zeros(total * length, np.int32) for _ in range(4))
  tokens[:] = tokenizer.pad
  tokens[begins] = tokenizer.cls
  if marker is not None:
    tokens[begins + 1] = marker
  end = np.full(n, lead)
  for kind, part in enumerate(zip(*parts, strict=True)):
    sizes = np.fromiter(map(len, part), np.int64, n)
    tokens[ranges(begins + end, sizes)] = np.concatenate(part)
    tokens[begins + end + sizes] = tokenizer.sep
    if kind:
      types[ranges(begins + end, sizes + 1)] = kind
    end += sizes + 1
  filled = ranges(begins, end)
  segments[filled] = np.repeat(numbers, end)
  if augment:
    masks = ranges(begins + end, augment - end)
    tokens[masks] = tokenizer.mask
    segments[masks] = -np.repeat(numbers, augment - end)
    end = np.full(n, augment)
    filled = ranges(begins, end)
  positions[filled] = ranges(np.zeros(n, np.int64), end)
  packed: Any = {} if places is None else {"starts": places.astype(np.int32), "unit": each, "longest": longest}
  laid: dict[str, Any] = {"tokens": tokens, "segments": segments, "positions": positions, "types": types}
  return Rows(**{name: x.reshape(total, length) for name, x in laid.items()}, **packed, lead=lead)


def beside(own: Rows, others: Rows) -> tuple[Rows, Rows]:
  """Packed rows as one, of which each leave free what the others fill; and the others, now without rows of their own.

  In each unit the others' texts are segments after the own ones (`encoder.joined`).
  """
  there = others.segments != 0
  moved = dataclasses.replace(others, segments=others.segments + own.unit * np.sign(others.segments))
  names = "tokens", "segments", "positions", "types"
  laid: dict[str, Any] = {name: np.where(there, getattr(moved, name), getattr(own, name)) for name in names}
  nowhere: dict[str, Any] = dict.fromkeys(names)
  return dataclasses.replace(own, **laid), dataclasses.replace(others, **nowhere)


def ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  """begins[0], begins[0] + 1, ... (sizes[0] numbers), begins[1], ..."""
  return np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


class Template:
  """How texts become rows of tokens, for a tokenizer and the lengths and options of `config.Data`."""

  def __init__(self, tokenizer: Tokenizer, data: config.Data):
    self.tokenizer, self.data = tokenizer, data
    self.markers = tokenizer.markers() if data.markers else (None, None)
    self.around = 3 if data.markers else 2  # [CLS], marker, [SEP]

  def query(self, tokens: np.ndarray) -> np.ndarray:
    return tokens[: self.data.query_length - self.around]

  def passage(self, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
    """A passage's parts: its tokens, or title and text apart."""
    tokens = tokens[: self.data.passage_length - self.around]
    if self.data.template == "bert":
      return (tokens,)
    apart = np.flatnonzero(tokens == self.tokenizer.sep)
    title = int(apart[0]) if len(apart) else len(tokens) - 1  # cut within the title: its last token gives way to [SEP]
    return tokens[:title], tokens[title + 1 :]

  def query_sizes(self, tokens: np.ndarray) -> np.ndarray:
    """How long rows of queries are, from their numbers of tokens."""
    if self.data.augment:
      return np.full(len(tokens), self.data.query_length)
    return np.minimum(tokens + self.around, self.data.query_length)

  def passage_sizes(self, tokens: np.ndarray) -> np.ndarray:
    return np.minimum(tokens + self.around, self.data.passage_length)

  def pair_sizes(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
    """From the numbers of tokens of both."""
    query = np.minimum(queries, self.data.query_length - self.around)
    apart = 0 if self.data.template == "bert" else 1  # no [SEP] between title and text in a pair
    return query + np.minimum(passages, self.data.passage_length - self.around) + 3 - apart

  def queries(self, parts: Sequence[np.ndarray], length: int, **layout: Any) -> Rows:
    """Rows of queries that were cut."""
    augment = self.data.query_length if self.data.augment else 0
    return rows([(part,) for part in parts], length, self.tokenizer, marker=self.markers[0], augment=augment, **layout)

  def passages(self, parts: Sequence[tuple[np.ndarray, ...]], length: int, **layout: Any) -> Rows:
    return rows(parts, length, self.tokenizer, marker=self.markers[1], **layout)

  def pairs(self, queries: Sequence[np.ndarray], passages: Sequence[tuple[np.ndarray, ...]], length: int, **layout):
    """Rows [CLS] query [SEP] passage [SEP] for the cross-encoder."""
    joined = [(q, p[0] if len(p) == 1 else np.concatenate(p)) for q, p in zip(queries, passages)]
    return rows(joined, length, self.tokenizer, **layout)
