"""Random texts as batches, and our training step on them with its times: shared by cpu.py and gpu.py."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np

from ernie_jax import batches, mesh, scores, step, templates
from ernie_jax.config import Architecture, Data, Model, Train
from ernie_jax.encoder import Rows

CLS, SEP = 101, 102


class Texts:
  """Queries, each with its list of passages, and the pairs [CLS] query [SEP] passage [SEP] of the same words.

  `share` is the median length of a text as a share of the longest; lengths are log-normal around it, cut there.
  """

  def __init__(self, train: Train, data: Data, share: float, vocabulary: int = 30522, seed: int = 0):
    rng = np.random.default_rng(seed)
    self.train, self.data, size = train, data, 1 + train.negatives

    def draw(count: int, longest: int) -> list[np.ndarray]:
      lengths = np.clip(longest * share * np.exp(rng.normal(0, 0.4, count)), 4, longest).astype(int)
      words = lambda length: rng.integers(200, vocabulary, length - 2)
      return [np.array([CLS, *words(length), SEP], np.int32) for length in lengths]

    self.queries, self.passages = draw(train.batch, data.query_length), draw(train.batch * size, data.passage_length)
    owner = np.repeat(np.arange(train.batch), size)
    self.pairs = [np.concatenate([self.queries[q], p[1:]]) for q, p in zip(owner, self.passages)]
    self.seconds = [len(self.queries[q]) for q in owner]  # where a pair's second part begins

  @property
  def towers(self) -> dict[str, tuple[list[np.ndarray], int]]:
    """Texts and their greatest length, of the towers that the terms need."""
    d, on = self.data, self.train.on
    all_of = {"queries": (self.queries, d.query_length), "passages": (self.passages, d.passage_length)}
    found = all_of if on.needs_student else {}
    return found | ({"pairs": (self.pairs, d.pair_length)} if self.train.needs_cross else {})

  def batch(self, pack: int | None = None) -> scores.Batch:
    """A row for each text, or rows of `pack` tokens that hold several, queries beside passages."""
    made = {}
    for tower, (texts, longest) in self.towers.items():
      if pack is None or tower == "pairs":
        made[tower] = rows(texts, longest, pack, self.seconds if tower == "pairs" else None)
    if pack is not None and "queries" in self.towers:
      d, count = self.data, len(self.passages)
      places, shape = laid([*self.passages, *self.queries], max(d.passage_length, d.query_length), pack)
      p = placed(self.passages, d.passage_length, places[:count], shape)
      made["passages"], made["queries"] = templates.beside(
        p, placed(self.queries, d.query_length, places[count:], shape)
      )
    size = 1 + self.train.negatives
    return scores.Batch(
      **made,
      texts=np.arange(len(self.passages), dtype=np.int32),
      known=np.arange(self.train.batch, dtype=np.int32)[:, None] * size,
    )

  def shape(self) -> dict[str, tuple[int, int]]:
    """Padded rows and their tokens, by tower."""
    return {tower: (len(texts), longest) for tower, (texts, longest) in self.towers.items()}

  def real(self) -> float:
    """Share of the padded rows' tokens that are a text's."""
    found = [(sum(map(len, texts)), len(texts) * longest) for texts, longest in self.towers.values()]
    return sum(own for own, _ in found) / sum(whole for _, whole in found)


def rows(texts: list[np.ndarray], longest: int, pack: int | None, seconds: Sequence[int] | None = None) -> Rows:
  """A row for each text, or rows of `pack` tokens, or of so many times that as the longest needs."""
  if pack is not None:
    return placed(texts, longest, *laid(texts, longest, pack), seconds)
  places = np.arange(len(texts)) * longest
  made = placed(texts, longest, places, (len(texts), longest), seconds)
  return Rows(made.tokens, np.sign(made.segments), made.positions, made.types)


def laid(texts: list[np.ndarray], longest: int, pack: int) -> tuple[np.ndarray, tuple[int, int]]:
  """Where texts begin in packed rows laid end to end, and how many rows of how many tokens these are."""
  length = -(-longest // pack) * pack
  places = batches.first_fit(np.array([len(text) for text in texts]), length, len(texts))
  assert places is not None
  return places, (int(places.max()) // length + 1, length)


def placed(
  texts: list[np.ndarray],
  longest: int,
  places: np.ndarray,
  shape: tuple[int, int],
  seconds: Sequence[int] | None = None,
) -> Rows:
  """Packed rows, the texts at their places."""
  tokens, segments, positions, types = (np.zeros(shape[0] * shape[1], np.int32) for _ in range(4))
  for i, (text, place) in enumerate(zip(texts, places)):
    own = slice(place, place + len(text))
    tokens[own], segments[own], positions[own] = text, i + 1, np.arange(len(text))
    if seconds is not None:
      types[place + seconds[i] : place + len(text)] = 1
  arrays = [x.reshape(shape) for x in (tokens, segments, positions, types)]
  return Rows(*arrays, starts=places.astype(np.int32), unit=len(texts), longest=longest)


class Runner:
  """A step, its state and the times of one, in seconds of the processor and of the wall clock."""

  def __init__(self, model: Model, train: Train, params: scores.Params, batch: scores.Batch):
    one = mesh.make(jax.devices()[:1])
    self.batch = mesh.shard(batch, one)
    self.state = step.init_state(mesh.whole(params, one), model, train)
    self.step, self.loss, self.norm = step.make_train_step(model, train), 0.0, 0.0
    self.spent: list[tuple[float, float]] = []

  def __call__(self, count: int = 1) -> None:
    """So many steps, of which the last is waited for."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
      self.state, logs = self.step(self.state, self.batch, jax.random.key(0))
    self.loss, self.norm = float(logs["total"]), float(logs["gradient_norm"])
    jax.block_until_ready(self.state)
    self.spent.append(((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count))


def parameters(model: Model, student: Architecture, teacher: Architecture) -> scores.Params:
  return step.init_params(model, student, teacher, jax.random.key(0))


def agree(first: dict[str, tuple[float, float]], exact: Sequence[str]) -> None:
  """Ends the program unless each side's first loss and gradient norm are the first side's.

  Relative, within 0.02; where nothing is rounded to bfloat16 (`exact`), the loss within 1e-4 and the norm within 3e-4:
  the cascade's norm was 1.4e-4 off PyTorch's, most of it from late interaction's terms.
  """
  reference = next(iter(first.values()))
  for side, found in first.items():
    bounds = (1e-4, 3e-4) if side in exact else (0.02, 0.02)
    if not all(abs(own / other - 1) <= most for own, other, most in zip(found, reference, bounds)):
      raise SystemExit(f"loss and gradient norm {found} of {side} are not {reference}, those of {next(iter(first))}")
