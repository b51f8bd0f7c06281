"""An encoded corpus in a folder: vectors and token vectors in shards, with ids, titles and texts beside them.

collection.json             of which model and corpus, how many passages, how they are stored
passages/{ids,titles,texts} columns; `order.npy`: the place of each id in trec_eval's order
vectors/00000.npy ...       [passages of the shard, H]
tokens/00000.npy ...        [their token vectors, D]; with 8 bits also scales/; `offsets.npy`: where each passage begins
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ernie_jax import columns, config, mesh, retrieval, tokens, topk
from ernie_jax.checkpoints import named
from ernie_jax.columns import Ragged, Strings
from ernie_jax.config import Interrupted, UserError
from ernie_jax.progress import Progress
from ernie_jax.scores import Student, dual_width, late_width
from ernie_jax.templates import Template

SHARD = 16_384  # passages
OPEN = 64  # shards of a kind that are mapped at once
SMALL = 4 * 2**30  # bytes of token vectors that a run keeps; of larger corpora it encodes what it re-ranks
FIELDS = ("texts", "model", "corpus", "count", "width", "dtype", "late", "late_width", "shard", "passages")
Late = Literal["no", "16", "8"]  # token vectors: none, float16, or 8 bits a number with a scale for each vector


class Shards:
  """Rows spread over files, read when they are asked for: `shape`, and slices and arrays of rows as of an array."""

  def __init__(self, files: Sequence[Path], begins: Sequence[int] | np.ndarray):
    """File i holds rows begins[i] to begins[i + 1]."""
    self.begins = np.asarray(begins)
    self.array = functools.lru_cache(OPEN)(lambda i: read(files[i]))  # each that is mapped is an open file
    first = self.array(0)
    for i, count in enumerate(np.diff(self.begins)):
      array = read(files[i])
      if len(array) != count or array.shape[1:] != first.shape[1:]:
        raise UserError(f"{files[i]}: holds {array.shape}, not {count} rows; delete it, and encode again")
    self.shape = (int(self.begins[-1]), *first.shape[1:])
    self.dtype = first.dtype

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    if isinstance(rows, slice):
      begin, end, _ = rows.indices(len(self))
      first = int(np.searchsorted(self.begins, begin, side="right")) - 1
      if begin < end <= self.begins[min(first + 1, len(self.begins) - 1)]:  # within a shard: a view
        return self.array(first)[begin - self.begins[first] : end - self.begins[first]]
      rows = np.arange(begin, max(begin, end))
    found = np.empty((len(rows), *self.shape[1:]), self.dtype)
    where = np.searchsorted(self.begins, rows, side="right") - 1
    for i in np.unique(where).tolist():
      found[where == i] = self.array(i)[rows[where == i] - self.begins[i]]
    return found


def read(path: Path) -> np.ndarray:
  """A memory-mapped array; a `UserError` if it is missing or cut."""
  try:
    return np.load(path, mmap_mode="r")
  except (FileNotFoundError, ValueError, EOFError) as error:
    raise UserError(f"{path}: missing or damaged; delete it if it is there, and encode again") from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path and its disk") from error


def save(path: Path, array: np.ndarray) -> None:
  """Under its name only when it is whole."""
  temporary = path.with_name(f"{path.name}.writing-{os.getpid()}")
  try:
    with open(temporary, "wb") as file:
      np.save(file, array)
      file.flush()
      os.fsync(file.fileno())  # that it is there says that it is whole, after a power cut too
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
  finally:
    temporary.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Passages:
  """N passages: sequences of the same length, the place of each in trec_eval's order, and the corpus' fingerprint."""

  ids: Sequence[str]
  titles: Sequence[str]
  texts: Sequence[str]
  order: np.ndarray
  fingerprint: str


@dataclasses.dataclass(frozen=True)
class Collection:
  """What a finished folder holds."""

  directory: Path
  about: dict[str, Any]
  passages: Passages
  vectors: Shards
  tokens: retrieval.Tokens | None  # passage rows -> token vectors; None if none are kept


def write_texts(
  directory: Path, ids: Sequence[str], titles: Sequence[str], texts: Sequence[str], fingerprint: str
) -> None:
  """Writes passages, or queries, unless they are there; a `UserError` if others are."""
  about = {"fingerprint": fingerprint}
  other = columns.matching(directory / "passages" / "ids")
  if other is not None and columns.matching(directory / "passages" / "ids", **about) is None:
    raise UserError(f"{directory}: holds the texts of another corpus; name another folder, or delete it")
  try:
    (directory / "passages").mkdir(parents=True, exist_ok=True)
    for leftover in (directory / "passages").glob("*.writing-*"):  # of a call that was killed
      shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for name, strings in {"ids": ids, "titles": titles, "texts": texts}.items():
      if columns.matching(directory / "passages" / name, **about) is None:
        with columns.Writer(directory / "passages" / name, np.uint8) as writer:
          for text in strings:
            writer.append(text.encode())
          writer.close(**about)
  except OSError as error:
    raise UserError(f"{directory}: cannot be written ({error.strerror or error}); choose another place") from error
  if not (directory / "passages" / "order.npy").is_file():
    save(directory / "passages" / "order.npy", topk.trec_order(ids))


def open_passages(directory: Path, fingerprint: str) -> Passages:
  """What `write_texts` wrote."""
  found = []
  for name in ("ids", "titles", "texts"):
    column = columns.matching(directory / "passages" / name, fingerprint=fingerprint)
    if column is None:
      raise UserError(f"{directory / 'passages' / name}: missing, damaged or of another corpus; encode again")
    found.append(Strings(column))
  order = read(directory / "passages" / "order.npy")
  if len(order) != len(found[0]):
    raise UserError(f"{directory / 'passages' / 'order.npy'}: of another corpus; delete it, and encode again")
  ids, titles, texts = found
  return Passages(ids, titles, texts, order, fingerprint)


def fingerprint(student: Student, model: config.Model, template: Template) -> str:
  """16 hex digits of all that decides a text's vector: weights, settings, tokenizer and template."""
  settings = {name: getattr(model, name) for name in ("pooling", "cosine", "late_width", "tied", "dtype")}
  texts = {name: getattr(template.data, name) for name in ("query_length", "passage_length", "template", "markers")}
  epsilon = student.encoder.architecture.epsilon
  settings |= {"epsilon": epsilon} if epsilon != config.Architecture.epsilon else {}
  said = json.dumps([settings, texts, template.data.augment, tokens.digest(template.tokenizer)])
  digest = hashlib.sha256(said.encode())
  for name, x in sorted(named(student).items()):
    digest.update(f"{name} {x.shape} {x.dtype}".encode())
    digest.update(np.asarray(x).tobytes())
  return digest.hexdigest()[:16]


def write(
  directory: Path,
  student: Student,
  model: config.Model,
  store: Ragged,
  template: Template,
  passages: str,
  corpus: str,
  *,
  query: bool = False,
  source: dict[str, Any] | None = None,
  late: Late = "no",
  dtype: Literal["float32", "float16"] = "float32",
) -> None:
  """Encodes a token store into a folder, shard by shard; shards that are there from an earlier, killed call stay.

  `passages` is the folder with the texts, as a path from `directory`; `corpus` their fingerprint. With `query` the
  texts are queries. `source` notes where model and texts come from (`source`). Several hosts share
  the folder: each encodes every so-many-th shard on its own devices. Raises `UserError` if the folder holds another
  corpus or other settings.
  """
  sizes = (template.query_sizes if query else template.passage_sizes)(store.lengths)
  texts = "queries" if query else "passages"
  about = {
    "texts": texts,
    "model": fingerprint(student, model, template),
    "corpus": corpus,
    "count": len(store),
    "width": dual_width(student),
    "dtype": dtype,
    "late": late,
    "late_width": late_width(student),
    "shard": SHARD,
    "passages": passages,
  }
  path = directory / "collection.json"
  if path.is_file() and (found := describe(directory)) != about:
    field = next(name for name in about if found.get(name) != about[name])
    raise UserError(
      f"{directory}: holds a corpus encoded with {field}={found.get(field)!r}, not {about[field]!r}; "
      "name another folder, or delete it"
    )
  kinds = {"no": ("vectors",), "16": ("vectors", "tokens"), "8": ("vectors", "tokens", "scales")}[late]
  try:
    for name in kinds:
      (directory / name).mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"{directory}: cannot be written ({error.strerror or error}); choose another place") from error
  if mesh.leads():
    for leftover in (found for kind in kinds for found in (directory / kind).glob("*.writing-*")):
      leftover.unlink()
    if late != "no":
      save(directory / "offsets.npy", np.concatenate([[0], np.cumsum(sizes)]))
    config.write(path, json.dumps(about | {"source": source}, indent=2))
  mesh.wait(str(path))
  begins = shards(len(store))
  there = [all(shard(directory, kind, i).is_file() for kind in kinds) for i in range(len(begins) - 1)]
  missing = np.flatnonzero(~np.array(mesh.told(there), bool)).tolist()
  left = sum(begins[i + 1] - begins[i] for i in missing)
  here = mesh.make(jax.local_devices())
  label = f"encode {texts}"
  with Progress(label, len(store), texts, done=len(store) - left) as bar, jax.set_mesh(here):
    for turn in range(0, len(missing), jax.process_count()):
      if turn + jax.process_index() < len(missing):
        i = missing[turn + jax.process_index()]
        part = store.part(begins[i], begins[i + 1])
        made = retrieval.encode(
          student, model, part, template, query=query, late=late != "no", progress=bar, devices=here
        )
        if late == "8":
          scaled, scales = eight_bits(made.tokens)
          save(shard(directory, "scales", i), scales)
          save(shard(directory, "tokens", i), scaled)
        elif late == "16":
          save(shard(directory, "tokens", i), made.tokens)
        save(shard(directory, "vectors", i), made.vectors.astype(dtype))
      if mesh.asked_to_stop():
        raise Interrupted(label, signal.SIGTERM)
  mesh.wait(f"{path} is whole")


def shards(count: int) -> list[int]:
  """Where the shards of so many passages begin, and where the last one ends."""
  return [*range(0, count, SHARD), count]


def shard(directory: Path, what: str, number: int) -> Path:
  return directory / what / f"{number:05}.npy"


def eight_bits(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Vectors [n, D] as int8 and a float16 scale for each [n, 1].

  Off by at most 1/254 of a vector's largest number, and what float16 rounds off the scale (1/2048).
  """
  largest = np.abs(vectors).max(1, keepdims=True).astype(np.float32)
  scales = np.maximum(largest / 127, np.finfo(np.float16).tiny).astype(np.float16)
  return np.clip(np.rint(vectors / scales.astype(np.float32)), -127, 127).astype(np.int8), scales


def describe(directory: Path) -> dict[str, Any]:
  """What `collection.json` says."""
  try:
    about = json.loads((directory / "collection.json").read_text())
    return {name: about[name] for name in FIELDS}
  except FileNotFoundError as error:
    raise UserError(
      f"{directory}: no encoded corpus here (collection.json is missing); `ernie-jax encode` makes one"
    ) from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{directory / 'collection.json'}: damaged; delete {directory}, and encode again") from error


def source(directory: Path) -> tuple[Path, config.Data]:
  """Where the model lies that encoded the folder, and of which data set the texts are."""
  try:
    said = json.loads((directory / "collection.json").read_text())["source"]
    return Path(said["model"]), config.Data(**(said["data"] | {"packages": tuple(said["data"]["packages"])}))
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f"{directory / 'collection.json'}: does not say whose it is; encode it with `ernie-jax`") from error


def load(directory: Path) -> Collection:
  """Opens a folder: nothing is read but what is asked for. `UserError` if it is not whole."""
  about = describe(directory)
  begins = shards(about["count"])
  files = lambda what: [shard(directory, what, i) for i in range(len(begins) - 1)]
  if missing := [i for i, file in enumerate(files("vectors")) if not file.is_file()]:
    raise UserError(
      f"{directory}: shard {missing[0]} of {len(begins) - 1} is missing; the same `ernie-jax encode` continues there"
    )
  vectors = Shards(files("vectors"), begins)
  if about["late"] == "no":
    held = None
  else:
    offsets = read(directory / "offsets.npy")
    spread = offsets[begins]
    whole = Shards(files("tokens"), spread)
    scales = Shards(files("scales"), spread) if about["late"] == "8" else None
    held = functools.partial(gather, whole, scales, offsets)
  return Collection(directory, about, open_passages(directory / about["passages"], about["corpus"]), vectors, held)


def gather(whole: Shards, scales: Shards | None, offsets: np.ndarray, rows: np.ndarray) -> Ragged:
  """Token vectors of some passages, in memory, as float16."""
  found = retrieval.some(Ragged(whole, offsets), rows)  # type: ignore[arg-type]  # all that is asked of it is rows
  if scales is None:
    return found
  own = retrieval.some(Ragged(scales, offsets), rows)  # type: ignore[arg-type]
  return Ragged(found.values.astype(np.float16) * own.values, found.offsets)
