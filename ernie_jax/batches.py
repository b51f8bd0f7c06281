"""Examples as integers into a token store, drawn with Grain, and batches of fixed shape gathered from them.

Packed (`data.pack`), a row holds several texts: a device's part of a batch, or a chunk of it, is a unit with a fixed
number of rows. Queries stand beside passages, where one encoder reads both. An example that does not fit its unit waits
for the next one, and is first in line there.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ernie_jax import columns, config
from ernie_jax.columns import Ragged
from ernie_jax.config import UserError
from ernie_jax.masking import Masking, Plain
from ernie_jax.scores import Batch
from ernie_jax.templates import Template, beside
from ernie_jax.tokens import Tokenizer

PATIENCE = 4  # times as many examples as a unit holds are looked at before it takes the smallest
MARGIN = 0.01  # packed rows that a trial begins with beyond what units need on average, rounded
SIMULATED = 16384  # passages of the trial that tells how many rows a unit needs


def first_fit(sizes: np.ndarray, length: int, count: int, most: int | None = None) -> np.ndarray | None:
  """[n] where each text begins in `count` rows laid end to end: the longest first, each in the first row with room.

  `most` (2 or more) is how many a row may hold. None if they do not all fit.
  """
  order = np.argsort(-sizes, kind="stable")
  large = int(np.count_nonzero(sizes > length // 2))  # no two of them share a row
  if large > count or sizes.sum() > length * count:
    return None
  free = np.full(count, length)
  held = [1] * large + [0] * (count - large)
  places = np.empty(len(sizes), np.int64)
  places[order[:large]] = np.arange(large) * length
  free[:large] -= sizes[order[:large]]
  for i in order[large:].tolist():
    size = sizes[i]
    row = (free >= size).argmax()
    if free[row] < size:
      return None
    places[i] = row * length + length - free[row]
    held[row] += 1
    # Full, from here on: its free tokens are not looked at again, and what it holds is placed.
    free[row] = 0 if held[row] == most else free[row] - size
  return places


@dataclasses.dataclass(frozen=True)
class Texts:
  """Everything that a batch is gathered from. Row numbers count queries and passages as the stores do."""

  queries: Ragged
  passages: Ragged
  identity: np.ndarray  # [passages] the first row with the same text: equal texts are one
  positives: Ragged  # of each query: rows of its known positives
  negatives: Ragged  # of each query: rows of its hard negatives; may be empty
  tokenizer: Tokenizer
  plain: Plain | None = None  # for masked language modelling, which uses none of the others

  @classmethod
  def unpaired(cls, plain: Plain | None, tokenizer: Tokenizer) -> Texts:
    """Without queries and passages."""
    none = columns.ragged([])
    return cls(none, none, np.zeros(0, np.int32), none, none, tokenizer, plain)


def choose(
  texts: Texts, query: int, negatives: int, rng: np.random.Generator, hardest: int | None = None
) -> np.ndarray:
  """[1 + negatives] passage rows: one positive, then hard negatives, filled up with random passages.

  Hard ones are drawn from the first `hardest` of the query's; None: from all. No known positive and no passage of a
  known positive's text is ever among the negatives.
  """
  known = set(texts.identity[texts.positives[query]].tolist())
  hard = [row for row in texts.negatives[query].tolist() if int(texts.identity[row]) not in known][:hardest]
  chosen = rng.permutation(hard)[:negatives].tolist() if hard else []
  while len(chosen) < negatives:
    row = int(rng.integers(len(texts.passages)))
    if int(texts.identity[row]) not in known and row not in chosen:
      chosen.append(row)
  return np.array([rng.choice(texts.positives[query]), *chosen], np.int32)


def used(train: config.Train) -> tuple[str, ...]:
  """The parts of a batch that go through an encoder for some term that compares queries with passages."""
  return (*(("queries", "passages") if train.on.needs_student else ()), *(("pairs",) if train.needs_cross else ()))


@dataclasses.dataclass(frozen=True)
class Layout:
  """The shape of batches: queries of a unit (1 unless packed); by tower in use, rows of a unit and tokens of a row.

  "queries" are not there where they stand in the rows of "passages".
  """

  unit: int
  count: dict[str, int]
  length: dict[str, int]
  packed: bool
  masked: int = 0  # tokens of a row of masked text; 0: there is none

  @property
  def together(self) -> bool:
    """Whether queries stand in the rows of passages."""
    return "passages" in self.count and "queries" not in self.count

  def rows(self, batch: int) -> dict[str, tuple[int, int]]:
    """Rows of a global batch, and their tokens, by tower; those of masked text as "masked"."""
    rows = {tower: (count * batch // self.unit, self.length[tower]) for tower, count in self.count.items()}
    return rows | ({"masked": (batch, self.masked)} if self.masked else {})


@dataclasses.dataclass
class Example:
  """A query with its list, as drawn."""

  number: int  # in the endless order of examples
  query: int
  passages: np.ndarray  # [K]
  sizes: dict[str, np.ndarray]  # tokens, by tower


@dataclasses.dataclass
class Unit:
  """Examples that are encoded together, and where their texts begin (None: a row for each)."""

  examples: list[Example]
  places: dict[str, np.ndarray] | None


class Queue:
  """Examples in their order, those that wait first."""

  def __init__(self, draw: Callable[[int], Example]):
    self.draw, self.next, self.waiting = draw, 0, collections.deque[Example]()
    self.overflows = collections.Counter[str]()  # by tower

  def take(self) -> Example:
    if self.waiting:
      return self.waiting.popleft()
    self.next += 1
    return self.draw(self.next - 1)

  def unit(self, size: int, room: dict[str, tuple[int, int]]) -> Unit:
    """The next `size` examples that fit together into `room`: rows and their tokens, by tower. Others wait."""
    chosen, late, patience = [self.take() for _ in range(size)], list[Example](), PATIENCE * size
    while (found := fit(chosen, room))[1] is not None:
      self.overflows[found[1]] += 1
      tokens = lambda example, tower=found[1]: int(example.sizes[tower].sum())
      if patience > 50 * PATIENCE * size:
        raise UserError(
          f"data.pack: {size} queries are too few to be packed together in rows of {room[found[1]][1]}; raise chunk"
        )
      # The first stays: it may have waited before, and so none waits for ever.
      if len(late) < patience:
        late.append(chosen.pop(max(range(1, size), key=lambda i: tokens(chosen[i]))))
        chosen.append(self.take())
      else:  # many large ones have come together: the smallest of all that were looked at
        patience += PATIENCE * size
        pool = sorted(chosen[1:] + late, key=tokens)
        chosen, late = [chosen[0], *pool[: size - 1]], pool[size - 1 :]
    self.waiting.extendleft(sorted(late, key=lambda e: -e.number))
    return Unit(chosen, found[0])


def fit(chosen: Sequence[Example], room: dict[str, tuple[int, int]]) -> tuple[dict[str, np.ndarray], str | None]:
  """Where texts begin, by tower; or the tower in which they do not fit."""
  places = {}
  for tower, (count, length) in room.items():
    found = first_fit(np.concatenate([e.sizes[tower] for e in chosen]), length, count)
    if found is None:
      return {}, tower
    places[tower] = found
  return places, None


def layout(
  data: config.Data, train: config.Train, devices: int, texts: Texts | None = None, tied: bool = True
) -> Layout:
  """How batches are laid out over so many devices; packed, as the lengths of `texts` ask for (None: all the longest).

  A unit gets about the rows that its texts need on average, and more until, in a trial, few examples wait. Queries
  stand in the rows of passages, unless they have an encoder of their own (not `tied`).
  A unit is what a device encodes at once: its part of the batch, or a chunk. To have the same examples in a batch on
  any number of devices with packing, set `train.chunk`.
  """
  masked = train.mlm_length if train.on.mlm else 0
  if not train.needs_pairs:
    return Layout(1, {}, {}, False, masked)
  unit, lists = 1 if data.pack is None else train.chunk or train.batch // devices, 1 + train.negatives
  together = tied and data.pack is not None
  full = np.full(1, data.query_length), np.full(lists, data.passage_length), np.full(lists, data.pair_length)
  longest = {tower: own for tower, own in by_tower(*full, together).items() if tower in used(train)}
  most = {tower: int(own.max()) for tower, own in longest.items()}
  if data.pack is None:
    return Layout(unit, {tower: len(own) for tower, own in longest.items()}, most, False, masked)
  length = {tower: math.ceil(most[tower] / data.pack) * data.pack for tower in longest}
  if texts is None:
    count = {tower: _rows(np.tile(own, unit), length[tower]) for tower, own in longest.items()}
    return Layout(unit, count, length, True, masked)
  rng = np.random.default_rng(0)
  size = sizes(texts, data, together)

  def example(number: int) -> Example:
    query = int(rng.integers(len(texts.queries)))
    own = choose(texts, query, train.negatives, rng, train.hardest)
    return Example(number, query, own, size(query, own))

  drawn = [example(number) for number in range(max(64, SIMULATED // (unit * lists)) * unit)]
  count = {}
  for tower in longest:
    whole = [np.concatenate([e.sizes[tower] for e in own]) for own in np.reshape(np.array(drawn, object), (-1, unit))]
    mean = np.mean([_rows(own, length[tower]) for own in whole])
    # The largest that there could be has room beside small ones: it must not wait for ever.
    tenth = len(drawn) // 10
    small = sorted((e.sizes[tower] for e in drawn), key=np.sum)[tenth - unit + 1 : tenth]
    least = _rows(np.concatenate([longest[tower], *small]), length[tower])
    count[tower] = max(round(mean * (1 + MARGIN)), least)
  while True:
    queue = Queue(lambda number: drawn[number % len(drawn)])
    with contextlib.suppress(UserError):  # so few rows that some unit cannot be filled
      while queue.next < 2 * len(drawn) and len(queue.waiting) <= 4 * unit:
        queue.unit(unit, {tower: (count[tower], length[tower]) for tower in longest})
      if len(queue.waiting) <= unit // 8 + 1:
        return Layout(unit, count, length, True, masked)
    count[queue.overflows.most_common(1)[0][0]] += 1


def _rows(sizes: np.ndarray, length: int) -> int:
  """How many rows first-fit needs."""
  places = first_fit(sizes, length, len(sizes))
  assert places is not None  # a row for each would do
  return int(places.max()) // length + 1


def by_tower(query: np.ndarray, passages: np.ndarray, pairs: np.ndarray, together: bool) -> dict[str, np.ndarray]:
  """Tokens of an example's texts by tower; `together` with the passages its query, as the last."""
  if together:
    return {"passages": np.concatenate([passages, query]), "pairs": pairs}
  return {"queries": query, "passages": passages, "pairs": pairs}


def sizes(texts: Texts, data: config.Data, together: bool) -> Callable[[int, np.ndarray], dict[str, np.ndarray]]:
  """A function: tokens that an example (query row, passage rows) takes, `by_tower`."""
  template = Template(texts.tokenizer, data)
  queries, passages = texts.queries.offsets, texts.passages.offsets

  def size(query: int, own: np.ndarray) -> dict[str, np.ndarray]:
    asked = np.array([queries[query + 1] - queries[query]])
    found = passages[own + 1] - passages[own]
    texts_of = template.query_sizes(asked), template.passage_sizes(found), template.pair_sizes(asked, found)
    return by_tower(*texts_of, together)

  return size


def gather(units: Sequence[Unit], texts: Texts, data: config.Data, shape: Layout, known: int) -> Batch:
  """The batch (numpy) of some units; `known` is the width m of the table of positives."""
  template = Template(texts.tokenizer, data)
  examples = [example for unit in units for example in unit.examples]
  queries = [template.query(texts.queries[e.query]) for e in examples]
  passages = [template.passage(texts.passages[row]) for e in examples for row in e.passages.tolist()]
  lists = len(passages) // len(queries)
  table: Any = np.full((len(examples), known), -1, np.int32)
  for row, example in enumerate(examples):
    mine = texts.identity[texts.positives[example.query]]
    table[row, : len(mine)] = mine

  places: dict[str, np.ndarray] = {}
  for tower in shape.count if shape.packed else ():
    places[tower] = np.concatenate([unit.places[tower] for unit in units if unit.places is not None])
  counts, lengths = shape.count, shape.length
  if shape.together:
    by_example = places["passages"].reshape(len(queries), lists + 1)  # the query's is the last, as in `by_tower`
    places |= {"passages": by_example[:, :-1].ravel(), "queries": by_example[:, -1]}
    counts, lengths = (own | {"queries": own["passages"]} for own in (counts, lengths))

  def placed(tower: str, longest: int) -> dict[str, Any]:
    if not shape.packed:
      return {"length": lengths[tower]}
    return {
      "length": lengths[tower],
      "places": places[tower],
      "units": len(units),
      "count": counts[tower],
      "longest": longest,
    }

  made: dict[str, Any] = {"queries": None, "passages": None, "pairs": None}
  if "pairs" in shape.count:
    repeated = list(itertools.chain.from_iterable(itertools.repeat(q, lists) for q in queries))
    made["pairs"] = template.pairs(repeated, passages, **placed("pairs", data.pair_length))
  if "passages" in shape.count:
    made["queries"] = template.queries(queries, **placed("queries", data.query_length))
    made["passages"] = template.passages(passages, **placed("passages", data.passage_length))
  if shape.together:
    made["passages"], made["queries"] = beside(made["passages"], made["queries"])
  return Batch(**made, texts=texts.identity[np.concatenate([e.passages for e in examples])], known=table)


def batches(
  texts: Texts, data: config.Data, train: config.Train, seed: int, shape: Layout, rows: np.ndarray | None = None
) -> Any:
  """An endless Grain iterator of `Batch`es: each query once an epoch, in an order drawn from the seed; rows of masked
  text likewise.

  `rows` are the places in the global batch that this host makes (`mesh.share`); by default all. Which queries and
  passages stand at a place depends on neither hosts nor devices (packed: only on `shape.unit`). `get_state()` and
  `set_state(...)` continue at the very next batch, with any number of hosts. Epochs follow one another without a ragged
  batch.
  """
  import grain

  known = int(texts.positives.lengths.max(initial=0))
  size = sizes(texts, data, shape.together)
  here = np.arange(train.batch) if rows is None else rows
  mine = here[:: shape.unit] // shape.unit
  room = {tower: (count, shape.length[tower]) for tower, count in shape.count.items()}
  examples = (
    grain.MapDataset.range(len(texts.queries))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(lambda query, rng: (int(query), choose(texts, int(query), train.negatives, rng, train.hardest)))
  )

  def draw(number: int) -> Example:
    query, own = examples[number]
    return Example(number, query, own, size(query, own))

  class Iterator(grain.DatasetIterator):
    """Its state: the next example, and those that wait, by number; of masked text, the next row and where it begins."""

    def __init__(self):
      super().__init__()
      self.queue = Queue(draw)
      self.masking = None
      if shape.masked and texts.plain is not None:
        self.masking = Masking(texts.plain, train, texts.tokenizer, seed)

    def __next__(self) -> Batch:
      batch = self.pairs() if shape.count else Batch()
      if self.masking is None:
        return batch
      every = [self.masking.next_row() for _ in range(train.batch)]
      return dataclasses.replace(batch, masked=self.masking.gather([every[i] for i in here.tolist()]))

    def pairs(self) -> Batch:
      if shape.packed:  # every host plans the whole batch: what waits is the same everywhere
        planned = [self.queue.unit(shape.unit, room) for _ in range(train.batch // shape.unit)]
        units = [planned[i] for i in mine]
      else:
        units = [Unit([draw(self.queue.next + i)], None) for i in mine.tolist()]
        self.queue.next += train.batch
      return gather(units, texts, data, shape, known)

    def get_state(self) -> dict[str, Any]:
      state: dict[str, Any] = {"next": self.queue.next, "waiting": [e.number for e in self.queue.waiting]}
      if self.masking is not None:
        state["masked"] = [self.masking.row, self.masking.text, self.masking.begin]
      return state

    def set_state(self, state: dict[str, Any]) -> None:
      self.queue.next, self.queue.waiting = state["next"], collections.deque(map(draw, state["waiting"]))
      if self.masking is not None:
        self.masking.row, self.masking.text, self.masking.begin = state["masked"]

  class Source(grain.IterDataset):
    def __iter__(self) -> Iterator:
      return Iterator()

  return iter(grain.experimental.ThreadPrefetchIterDataset(Source(), prefetch_buffer_size=2))
