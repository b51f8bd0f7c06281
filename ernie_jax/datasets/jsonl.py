"""Your own data: a folder of JSON Lines files (each may end in .gz or .zst).

  corpus.jsonl   {"id": "p1", "title": "optional", "text": "a passage"}
  train.jsonl, dev.jsonl, test.jsonl   {"id": "q1", "text": "a query", "positives": ["p1", ...], "negatives": [...]}

Ids are strings without white space; every query has at least one positive; negatives are optional. A positive or a
negative is the id of a passage, or a passage itself: {"title": ..., "text": ...}. Two other trainers' fields are read
too, so that their files need no conversion:

  Tevatron        {"query_id", "query", "positive_passages": [{"docid", "title", "text"}, ...], "negative_passages"}
                  and a corpus of {"docid", "title", "text"}
  FlagEmbedding   {"query": ..., "pos": ["a text", ...], "neg": [...]}

Training needs queries of all three; encoding and searching a corpus, none.
With corpus.jsonl, every passage that a query names has to be in it. Without one, the corpus is made of the passages
that the queries bring. A query without an id gets one from its file and line, a passage from its content.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie_jax.config import Data, UserError
from ernie_jax.datasets import SPLITS, RetrievalBuilder, Row, Rows, files
from ernie_jax.datasets.files import Bad
from ernie_jax.datasets.rows import said

ID = ("id", "docid", "_id")
QUERY_ID = ("id", "query_id", "_id")
QUERY = ("text", "query")
POSITIVES = ("positives", "positive_passages", "pos")
NEGATIVES = ("negatives", "negative_passages", "neg")


class Wrong(ValueError):
  """(kind, what is wrong and what to do)"""


class Jsonl(RetrievalBuilder):
  """The rows of a folder's files, in their order."""

  def rows(self, bad: Bad) -> Rows:
    corpus, splits = paths(self.data)
    rows: Rows = {"corpus": passages(corpus, bad) if corpus else brought(splits, bad)}
    for split in SPLITS:
      rows[split] = queries(splits[split], split, bad) if split in splits else iter(())
    return rows


def passages(path: Path, bad: Bad) -> Iterator[Row]:
  for where, found in files.json_lines(path, bad):
    try:
      name, title = one(found, ID, "", True), one(found, ("title",), "", False)
      yield Row(name, title, one(found, ("text",), "", True), where=where)
    except Wrong as error:
      bad(error.args[0], where, error.args[1])


def queries(path: Path, split: str, bad: Bad) -> Iterator[Row]:
  for where, text, name, positives, negatives in records(path, split, bad):
    yield Row(name, "", text, tuple(map(reference, positives)), tuple(map(reference, negatives)), where)


def brought(splits: dict[str, Path], bad: Bad) -> Iterator[Row]:
  """The passages that queries bring, where there is no corpus: each once."""
  for split, path in splits.items():
    for where, _, _, positives, negatives in records(path, split, bad):
      for passage in (*positives, *negatives):
        if isinstance(passage, str):
          text = f"passage {passage!r} is named by its id, and there is no corpus.jsonl; add it, or give the passages"
          raise UserError(f"{where}: {text}")
        name, title, text = passage
        yield Row(name or str(said(title, text)).strip(), title, text, where=where)


def reference(passage: Any) -> str:
  """What the base finds a passage by: its id, or else what it says."""
  if isinstance(passage, str):
    return passage
  name, title, text = passage
  return name or said(title, text)


def records(path: Path, split: str, bad: Bad) -> Iterator[tuple[str, str, str, list[Any], list[Any]]]:
  """(where, text, id, positives, negatives) of the lines of a file; a passage is an id, or (id or "", title, text)."""
  for where, found in files.json_lines(path, bad):
    try:
      name = one(found, QUERY_ID, f"{split}-{where.rsplit(':', 1)[1]}", True)
      text = one(found, QUERY, "", True)
      positives, negatives = listed(found, POSITIVES), listed(found, NEGATIVES)
      if not positives:
        field = next((field for field in POSITIVES if field in found), POSITIVES[0])
        raise Wrong("query without positives", f'"{field}" is {found.get(field)!r:.80}; at least one passage is needed')
    except Wrong as error:
      bad(error.args[0], where, error.args[1])
      continue
    yield where, text, name, positives, negatives


def one(found: dict[str, Any], names: tuple[str, ...], default: str, needed: bool) -> str:
  """The string under the first of the names that is there."""
  name = next((name for name in names if name in found), names[0])
  value = found.get(name, default or ("" if not needed else None))
  if not isinstance(value, str) or (needed and not value.strip()):
    raise Wrong("wrong field", f'"{name}" is {value!r:.80}; a{" non-empty" if needed else ""} string is needed')
  return value


def listed(found: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
  """The passages under the first of the names that is there; none if none is."""
  field = next((name for name in names if name in found), None)
  if field is None:
    return []
  if not isinstance(found[field], list):
    raise Wrong("wrong field", f'"{field}" is {found[field]!r:.80}; a list of passages is needed')
  texts = field in ("pos", "neg")
  result: list[Any] = []
  for each in found[field]:
    if isinstance(each, str) and each.strip():
      result.append(("", "", each) if texts else each)
    elif isinstance(each, dict):
      name = one(each, ID, "", False)
      result.append((name, one(each, ("title",), "", False), one(each, ("text",), "", True)))
    else:
      raise Wrong("wrong field", f'"{field}" holds {each!r:.80}; ids or passages are needed')
  return result


def paths(data: Data) -> tuple[Path | None, dict[str, Path]]:
  """corpus.jsonl, and the files of train, dev and test: those that are there."""
  folder = Path(data.folder).expanduser()
  splits = {split: path for split in SPLITS if (path := files.find(folder, f"{split}.jsonl")) is not None}
  return files.find(folder, "corpus.jsonl") if splits else files.need(folder, "corpus.jsonl"), splits


def builder(data: Data, directory: Path) -> RetrievalBuilder:
  """The builder for the files in `data.folder`, with its own below `directory`; changed files make a new data set."""
  corpus, splits = paths(data)
  return Jsonl.make(data, directory, files.signature([*([corpus] if corpus else []), *splits.values()], "jsonl 1"))
