"""Masked language modelling's rows: texts laid end to end, whole words of them masked (Devlin et al. 2019).

Everything is drawn from the seed and a row's number, so rows are the same on any number of hosts, and after a restart.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

from ernie_jax import config, templates
from ernie_jax.columns import Ragged
from ernie_jax.config import UserError
from ernie_jax.scores import MaskedRows
from ernie_jax.tokens import Tokenizer

SHORTEST = 6  # tokens of a text's part, unless the text ends there
HELD_OUT, MOST_HELD_OUT = 0.05, 256  # share of the texts that training leaves out, and as many rows as they may fill


@dataclasses.dataclass(frozen=True)
class Plain:
  """N texts: of each, which store holds it, and which row of it."""

  stores: tuple[Ragged, ...]  # token ids, without special ones around them
  rows: np.ndarray  # [N, 2]

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, text: int) -> np.ndarray:
    store, row = self.rows[text]
    return self.stores[store][row]

  def size(self, text: int) -> int:
    store, row = self.rows[text]
    offsets = self.stores[store].offsets
    return int(offsets[row + 1] - offsets[row])


def held_out(stores: tuple[Ragged, ...], length: int) -> tuple[Plain, Plain]:
  """The texts of the stores to train on; and those to measure on, which a hash of their tokens chooses.

  So equal texts are on the same side, with any seed. Texts without tokens are left out. `UserError` if none is left to
  train on.
  """
  sizes = [store.lengths for store in stores]
  named = lambda i, n: np.stack([np.full(len(n), i, np.int32), np.arange(len(n), dtype=np.int32)], axis=1)[n > 0]
  rows = np.concatenate([named(i, n) for i, n in enumerate(sizes)])
  every = Plain(stores, rows)
  hashes = np.fromiter(
    (zlib.crc32(every[i].astype(np.int32).tobytes()) for i in range(len(every))), np.uint32, len(every)
  )
  order = np.argsort(hashes, kind="stable")
  filled = np.cumsum(np.concatenate([n[n > 0] for n in sizes])[order])
  count = min(int(HELD_OUT * len(every)), int(np.searchsorted(filled, MOST_HELD_OUT * length)))
  chosen = hashes <= hashes[order[max(count - 1, 0)]] if len(every) else hashes > 0
  if chosen.all():
    raise UserError("post.weights.mlm: no text is left beside those to measure on; use a larger corpus")
  return Plain(stores, rows[~chosen]), Plain(stores, rows[chosen])


class Masking:
  """Rows of masked text without end: each text once an epoch, in an order drawn from the seed.

  A row [CLS] text [SEP] [CLS] text [SEP] ... takes what fits; the rest of a text begins the next row. Its state is the
  next row's number, and where in the order of texts it begins: `row`, `text`, `begin`.
  """

  def __init__(self, texts: Plain, train: config.Train, tokenizer: Tokenizer, seed: int):
    self.texts, self.train, self.tokenizer, self.seed = texts, train, tokenizer, seed
    self.continues, self.special = tokenizer.continues(), np.zeros(len(tokenizer), bool)
    self.special[list(tokenizer.special)] = True
    self.ordinary = np.setdiff1d(list(tokenizer.backend.get_vocab().values()), tokenizer.special)
    self.row = self.text = self.begin = 0
    self.epoch, self.order = -1, np.zeros(0, np.int64)

  def at(self, place: int) -> int:
    """The text at a place in the endless order."""
    epoch, place = divmod(place, len(self.texts))
    if epoch != self.epoch:
      self.epoch, self.order = epoch, np.random.default_rng([epoch, self.seed, 1]).permutation(len(self.texts))
    return int(self.order[place])

  def next_row(self) -> tuple[int, list[tuple[int, int, int]]]:
    """The next row's number, and its parts: texts, each from one token to another."""
    parts, room = [], self.train.mlm_length - 2
    while True:
      text = self.at(self.text)
      size = self.texts.size(text)
      if room < min(size - self.begin, SHORTEST):
        break
      end = min(size, self.begin + room)
      parts.append((text, self.begin, end))
      room -= end - self.begin + 2
      self.text, self.begin = (self.text, end) if end < size else (self.text + 1, 0)
    self.row += 1
    return self.row - 1, parts

  def gather(self, planned: list[tuple[int, list[tuple[int, int, int]]]]) -> MaskedRows:
    """Planned rows, masked (numpy)."""
    length, counts = self.train.mlm_length, [len(parts) for _, parts in planned]
    pieces = [self.texts[text][begin:end] for _, parts in planned for text, begin, end in parts]
    sizes = np.array([len(piece) + 2 for piece in pieces])
    ends = np.cumsum(sizes) - sizes
    before = np.cumsum([0, *counts[:-1]])  # texts in the rows before
    places = ends - np.repeat(ends[before], counts) + np.repeat(np.arange(len(planned)) * length, counts)
    rows = templates.rows([(piece,) for piece in pieces], length, self.tokenizer, places=places, count=len(planned))
    segments = np.where(rows.segments > 0, rows.segments - before[:, None], 0).astype(np.int32)
    laid: Any = {"segments": segments, "starts": None}
    rows = dataclasses.replace(rows, **laid, unit=0, longest=0)
    made = [self.masked(tokens, own > 0, number) for tokens, own, (number, _) in zip(rows.tokens, segments, planned)]
    parts: Any = [np.stack(x) for x in zip(*made)]
    return MaskedRows(dataclasses.replace(rows, tokens=parts[0]), *parts[1:])

  def masked(self, tokens: np.ndarray, real: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row's tokens with some masked; at which places, [m]; and what stood there, [m] (-1: no place).

    Words are taken in an order drawn from the seed, one that would be too much is passed over, until `mlm_rate` of the
    tokens that are not special are predicted. Each token of a word on its own, as in BERT's whole-word masking, becomes
    [MASK] (80 %), any token that is not special (10 %), or stays (10 %).
    """
    rng = np.random.default_rng([number, self.seed, 0])
    content = real & ~self.special[tokens]
    begins = content & ~(self.continues[tokens] & np.concatenate([[False], content[:-1]]))
    words = np.where(content, np.cumsum(begins) - 1, -1)
    sizes = np.bincount(words[content])
    left = min(self.train.predicted, max(1, round(self.train.mlm_rate * content.sum())))
    taken = np.zeros(len(sizes) + 1, bool)  # the last is for what is no word, -1
    for word in rng.permutation(len(sizes)).tolist():
      if sizes[word] <= left:
        taken[word] = True
        left -= sizes[word]
      if not left:
        break
    chosen = np.flatnonzero(taken[words])
    places, stood = np.zeros(self.train.predicted, np.int32), np.full(self.train.predicted, -1, np.int32)
    places[: len(chosen)], stood[: len(chosen)] = chosen, tokens[chosen]
    kind, other = rng.random(len(chosen)), self.ordinary[rng.integers(len(self.ordinary), size=len(chosen))]
    tokens = tokens.copy()
    tokens[chosen] = np.where(kind < 0.8, self.tokenizer.mask, np.where(kind < 0.9, other, tokens[chosen]))
    return tokens, places, stood


def every_row(texts: Plain, train: config.Train, tokenizer: Tokenizer, multiple: int) -> MaskedRows:
  """Rows that hold each text once (the last is filled up with the first texts again), masked; numpy.

  Then copies of the last without masked places, up to a multiple of so many rows.
  """
  masking, planned = Masking(texts, train, tokenizer, 0), []
  while masking.text < len(texts):
    planned.append(masking.next_row())
  more = -len(planned) % multiple
  rows = masking.gather(planned + planned[-1:] * more)
  rows.tokens[len(planned) :] = -1
  return rows
