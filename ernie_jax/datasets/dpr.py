"""Passages and questions in the files of DPR (github.com/facebookresearch/DPR, `dpr/data/download_data.py`).

  psgs_w100.tsv                   id, text, title under that header, quoted as csv: 21,015,324 passages of Wikipedia
  *train*.json, *dev*.json        biencoder-nq-train.json, nq-train.json, ...: one JSON list in each
  *test*.json                     optional

Each may end in .gz or .zst. Of an element, `question` is the query, `positive_ctxs` are its positives and
`hard_negative_ctxs` its negatives; both name passages by `passage_id` or `psg_id`, or where they have neither, by title
and text. Questions without positives are left out and counted, as DPR does. Without a test file, half of the dev
questions, chosen by their hash, are `test`. A question's id is its file and number.

Licence: CC BY-NC 4.0 (DPR's files); Natural Questions and Wikipedia, on which they rest, are CC BY-SA 3.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie_jax.config import Data, UserError
from ernie_jax.datasets import SPLITS, RetrievalBuilder, Row, Rows, files
from ernie_jax.datasets.files import Bad
from ernie_jax.datasets.rows import said, share

HEADER = ("id", "text", "title")


class Dpr(RetrievalBuilder):
  """The rows of the passages and of the lists of questions."""

  def rows(self, bad: Bad) -> Rows:
    corpus, splits = paths(self.data)
    rows: Rows = {"corpus": passages(corpus, bad)}
    for split in SPLITS:
      rows[split] = questions(splits[split], bad)
    if not splits["test"]:
      rows["dev"] = (row for row in questions(splits["dev"], bad) if share(row.text) < 0.5)
      rows["test"] = (row for row in questions(splits["dev"], bad, count=False) if share(row.text) >= 0.5)
    return rows


def passages(path: Path, bad: Bad) -> Iterator[Row]:
  for where, (name, text, title) in files.tsv(path, bad, 3, HEADER, quoted=True):
    yield Row(name, title, text, where=where)


def questions(paths: list[Path], bad: Bad, count: bool = True) -> Iterator[Row]:
  for path in paths:
    stem = "_".join(path.name.split(".json")[0].split())
    for number, (where, found) in enumerate(files.json_array(path, bad)):
      question, positives = found.get("question"), named(found.get("positive_ctxs"))
      negatives = named(found.get("hard_negative_ctxs", []))
      if not isinstance(question, str) or positives is None or negatives is None:
        text = '"question" must be a string, "positive_ctxs" and "hard_negative_ctxs" lists of passages'
        bad("wrong field", where, text)
      elif positives:
        yield Row(f"{stem}-{number}", "", question, positives, negatives, where)
      elif count:
        bad.left_out["questions without positives"] += 1


def named(contexts: Any) -> tuple[str, ...] | None:
  """What a list of passages is found by; None if it is none."""
  if not isinstance(contexts, list):
    return None
  result: list[str] = []
  for each in contexts:
    if not isinstance(each, dict):
      return None
    name = each.get("passage_id", each.get("psg_id"))
    title, text = each.get("title") or "", each.get("text")
    if isinstance(name, str | int) and not isinstance(name, bool) and str(name):
      result.append(str(name))
    elif name is None and isinstance(title, str) and isinstance(text, str):
      result.append(said(title, text))
    else:
      return None
  return tuple(result)


def paths(data: Data) -> tuple[Path, dict[str, list[Path]]]:
  folder = Path(data.folder).expanduser()
  corpus = files.need(folder, "psgs_w100.tsv")
  splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
  for path in sorted(path for suffix in files.SUFFIXES for path in folder.glob(f"*.json{suffix}")):
    if split := next((split for split in SPLITS if split in path.name), None):
      splits[split].append(path)
  for split in ("train", "dev"):
    if not splits[split]:
      raise UserError(f"data.folder={str(folder)!r}: no *{split}*.json; name a folder with DPR's files")
  return corpus, splits


def builder(data: Data, directory: Path) -> RetrievalBuilder:
  """The builder for the files in `data.folder`, with its own below `directory`; changed files make a new data set."""
  corpus, splits = paths(data)
  return Dpr.make(data, directory, files.signature([corpus, *(p for each in splits.values() for p in each)], "dpr 1"))
