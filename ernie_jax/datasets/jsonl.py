"""Your own data: a folder of JSON Lines files.

  corpus.jsonl   {"id": "p1", "title": "optional", "text": "a passage"}
  train.jsonl, dev.jsonl, test.jsonl   {"id": "q1", "text": "a query", "positives": ["p1", ...]}

Ids are strings without white space; every query has at least one positive, and every positive is in the corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from ernie_jax.config import Data, UserError
from ernie_jax.datasets import SPLITS, RetrievalBuilder, Row, Rows


@dataclasses.dataclass(eq=False)
class Folder(tfds.core.BuilderConfig):
  """A folder of JSON Lines files, named by their content."""

  folder: Path = Path()


class Jsonl(RetrievalBuilder):
  """The rows of a folder's four files, in their order."""

  def rows(self) -> Rows:
    folder = self.builder_config.folder
    passages = {row.id: row for row in read(folder / "corpus.jsonl", query=False)}
    rows: Rows = {"corpus": list(passages.values())}
    for split in SPLITS:
      path = folder / f"{split}.jsonl"
      rows[split] = queries = list(read(path, query=True))
      for number, row in enumerate(queries, 1):
        for positive in row.positives:
          if positive not in passages:
            raise UserError(f"{path}:{number}: positive {positive!r} is not in corpus.jsonl; add it there, or drop it")
    return rows


def read(path: Path, query: bool) -> Iterator[Row]:
  """The rows of one file. Whatever is wrong with a line is a `UserError` with `file:line`."""
  try:
    raw = path.read_bytes()
  except OSError as error:
    raise UserError(f"{path}: {error.strerror}; data.folder needs corpus, train, dev and test.jsonl") from error
  lines = raw.removeprefix(b"\xef\xbb\xbf").splitlines()
  if not lines:
    raise UserError(f"{path}: is empty; at least one line is needed")
  seen: dict[str, int] = {}
  for number, line in enumerate(lines, 1):
    try:
      row = parse(line, query)
    except ValueError as error:
      raise UserError(f"{path}:{number}: {error}") from error
    if row.id in seen:
      raise UserError(f"{path}:{number}: id {row.id!r} is already that of line {seen[row.id]}; ids must differ")
    seen[row.id] = number
    yield row


def parse(line: bytes, query: bool) -> Row:
  """One row; `ValueError` says what is wrong with it, and what to do."""
  try:
    found: Any = json.loads(line.decode())
  except UnicodeDecodeError as error:
    raise ValueError(f"byte {error.start} is not UTF-8; convert the file") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"not a JSON object ({error}); one object a line is needed") from error
  if not isinstance(found, dict):
    raise ValueError(f"a JSON {type(found).__name__}, not an object; one object a line is needed")
  for name, needed in (("id", True), ("title", False), ("text", True)):
    value = found.get(name, None if needed else "")
    if not isinstance(value, str) or (needed and not value.strip()):
      raise ValueError(f'"{name}" is {value!r}; a{" non-empty" if needed else ""} string is needed')
  if found["id"].split() != [found["id"]]:
    raise ValueError(f"id {found['id']!r} holds white space, which separates columns of run files; rename it")
  if not query:
    return Row(found["id"], found.get("title", ""), found["text"])
  positives = found.get("positives")
  if not isinstance(positives, list) or not positives or not all(isinstance(each, str) for each in positives):
    raise ValueError(f'"positives" is {positives!r}; a list of at least one passage id is needed')
  return Row(found["id"], "", found["text"], tuple(dict.fromkeys(positives)))


def builder(data: Data, directory: Path) -> Jsonl:
  """The builder for the files in `data.folder`, with its own below `directory`; changed files make a new data set."""
  folder = Path(data.folder).expanduser()
  digest = hashlib.sha256()
  for name in ("corpus", *SPLITS):
    try:
      digest.update((folder / f"{name}.jsonl").read_bytes() + b"\0")
    except OSError as error:
      raise UserError(
        f"{folder / name}.jsonl: {error.strerror}; data.folder needs corpus, train, dev and test"
      ) from error
  config = Folder(name=digest.hexdigest()[:16], description=str(folder), folder=folder)
  return Jsonl(data_dir=str(directory), config=config, file_format="array_record")
