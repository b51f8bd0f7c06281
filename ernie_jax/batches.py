"""Examples as integers into a token store; Grain shuffles them and gathers fixed-shape batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ernie_jax import config
from ernie_jax.encoder import Rows
from ernie_jax.scores import Batch
from ernie_jax.tokens import Store, Tokenizer


def rows(parts: Sequence[Sequence[np.ndarray]], length: int, tokenizer: Tokenizer) -> Rows:
  """One text a row, numpy [N, length]: [CLS] part [SEP] part [SEP] ..., the second part of type 1.

  Parts must fit: cut them first (`cut`). Padding has segment 0.
  """
  tokens: Any = np.full((len(parts), length), tokenizer.pad, np.int32)
  types: Any = np.zeros((len(parts), length), np.int32)
  segments: Any = np.zeros((len(parts), length), np.int32)
  for row, texts in enumerate(parts):
    tokens[row, 0] = tokenizer.cls
    end = 1
    for kind, text in enumerate(texts):
      start, end = end, end + len(text) + 1
      tokens[row, start : end - 1] = text
      tokens[row, end - 1] = tokenizer.sep
      types[row, start:end] = kind
    segments[row, :end] = 1
  positions: Any = np.where(segments > 0, np.arange(length, dtype=np.int32), 0)
  return Rows(tokens, segments, positions, types)


def cut(text: np.ndarray, length: int) -> np.ndarray:
  """The text's first tokens, so that it fits `length` with [CLS] and [SEP]."""
  return text[: length - 2]


@dataclasses.dataclass(frozen=True)
class Texts:
  """Everything that a batch is gathered from. Row numbers count queries and passages as the stores do."""

  queries: Store
  passages: Store
  identity: np.ndarray  # [passages] the first row with the same text: equal texts are one
  positives: list[np.ndarray]  # of each query: rows of its known positives
  negatives: list[np.ndarray]  # of each query: rows of its hard negatives, best first; may be empty
  tokenizer: Tokenizer


def identities(passages: Sequence[str]) -> np.ndarray:
  """[N] the row of each passage's first copy."""
  first: dict[str, int] = {}
  return np.array([first.setdefault(text, row) for row, text in enumerate(passages)], np.int32)


def choose(texts: Texts, query: int, negatives: int, rng: np.random.Generator) -> np.ndarray:
  """[1 + negatives] passage rows: one positive, then hard negatives, filled up with random passages.

  No known positive and no passage of a known positive's text is ever among the negatives.
  """
  known = set(texts.identity[texts.positives[query]].tolist())
  hard = [row for row in texts.negatives[query] if int(texts.identity[row]) not in known]
  chosen = rng.permutation(hard)[:negatives].tolist() if hard else []
  while len(chosen) < negatives:
    row = int(rng.integers(len(texts.passages)))
    if int(texts.identity[row]) not in known and row not in chosen:
      chosen.append(row)
  return np.array([rng.choice(texts.positives[query]), *chosen], np.int32)


def gather(chosen: Sequence[tuple[int, np.ndarray]], texts: Texts, data: config.Data, known: int) -> Batch:
  """The batch (numpy) of some (query row, passage rows [K]); `known` is the width m of the positives' table."""
  queries = [cut(texts.queries[query], data.query_length) for query, _ in chosen]
  passages = [cut(texts.passages[row], data.passage_length) for _, own in chosen for row in own]
  size = len(passages) // len(queries)
  table: Any = np.full((len(chosen), known), -1, np.int32)
  for row, (query, _) in enumerate(chosen):
    mine = texts.identity[texts.positives[query]]
    table[row, : len(mine)] = mine
  return Batch(
    queries=rows([[q] for q in queries], data.query_length, texts.tokenizer),
    passages=rows([[p] for p in passages], data.passage_length, texts.tokenizer),
    pairs=rows([[queries[i // size], p] for i, p in enumerate(passages)], data.pair_length, texts.tokenizer),
    texts=texts.identity[np.concatenate([own for _, own in chosen])],
    known=table,
  )


@dataclasses.dataclass(frozen=True)
class _Share:
  """Of every `size` elements of a sequence, those at `rows`."""

  whole: Any
  size: int
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.whole) // self.size * len(self.rows)

  def __getitem__(self, i: int) -> Any:
    turn, place = divmod(i, len(self.rows))
    return self.whole[turn * self.size + int(self.rows[place])]


def batches(texts: Texts, data: config.Data, train: config.Train, seed: int, rows: np.ndarray | None = None) -> Any:
  """An endless Grain iterator of `Batch`es: each query once an epoch, in an order drawn from the seed.

  `rows` are the places in the global batch that this host makes (`mesh.share`); by default all. Which queries and
  passages stand at a place depends on neither hosts nor devices. `get_state()` and `set_state(...)` continue at the
  very next batch, with any number of hosts. Epochs follow one another without a ragged batch.
  """
  import grain

  known = max(len(p) for p in texts.positives)
  rows = np.arange(train.batch) if rows is None else rows
  examples = (
    grain.MapDataset.range(len(texts.queries))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(lambda query, rng: (int(query), choose(texts, int(query), train.negatives, rng)))
  )
  data_set = grain.MapDataset.source(_Share(examples, train.batch, rows)).batch(
    len(rows), batch_fn=lambda chosen: gather(chosen, texts, data, known)
  )
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(data_set.to_iter_dataset(read_options=options))
