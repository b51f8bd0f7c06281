"""Any data set in BEIR's layout (github.com/beir-cellar/beir, or your own): each file may end in .gz or .zst.

  corpus.jsonl     {"_id": "p1", "title": "...", "text": "..."}
  queries.jsonl    {"_id": "q1", "text": "..."}, of all splits
  qrels/train.tsv, qrels/dev.tsv, qrels/test.tsv    with the header query-id, corpus-id, score

Scores above 0 are positives, the others are not used. A passage with a title and no text is read as that text (several
of BEIR's have only titles). Without dev.tsv, a tenth of the training queries, chosen by the hash of their id, are
`dev`; without train.tsv, as in most of BEIR, there are no training queries. Queries without judgements are left out
and counted.

Licences differ from data set to data set: BEIR's page names each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ernie_jax.config import Data
from ernie_jax.datasets import SPLITS, RetrievalBuilder, Row, Rows, files, judged
from ernie_jax.datasets.files import Bad
from ernie_jax.datasets.rows import carve

DEV = 0.1  # of the training queries, where there is no dev.tsv
HEADER = ("query-id", "corpus-id", "score")


class Beir(RetrievalBuilder):
  """The rows of the corpus and of the judged queries."""

  def rows(self, bad: Bad) -> Rows:
    found = paths(self.data)
    qrels = {split: judged.read(found[split], bad, 3, HEADER) for split in SPLITS if split in found}
    if "train" in qrels and "dev" not in qrels:
      found["dev"] = found["train"]
      dev = carve(qrels["train"], DEV)
      qrels["dev"] = {query: qrels["train"].pop(query) for query in sorted(dev)}
    every = {query for own in qrels.values() for query in own}
    rows: Rows = {"corpus": passages(found["corpus"], bad)}
    for split in SPLITS:
      count = every if split == next(iter(qrels)) else None  # once, though the file is read for each split
      own = (
        judged.rows(queries(found["queries"], bad), qrels[split], found[split], bad, judged=count)
        if split in qrels
        else ()
      )
      rows[split] = own
    return rows


def passages(path: Path, bad: Bad) -> Iterator[Row]:
  for where, found in files.json_lines(path, bad):
    name, title, text = (found.get(field) for field in ("_id", "title", "text"))
    title = "" if title is None else title
    if not isinstance(name, str) or not isinstance(title, str) or not isinstance(text, str):
      bad("wrong field", where, '"_id", "title" and "text" must be strings')
    elif not text.strip():
      yield Row(name, "", title, where=where)
    else:
      yield Row(name, title, text, where=where)


def queries(path: Path, bad: Bad) -> Iterator[judged.Query]:
  for where, found in files.json_lines(path, bad):
    name, text = found.get("_id"), found.get("text")
    if not isinstance(name, str) or not isinstance(text, str):
      bad("wrong field", where, '"_id" and "text" must be strings')
    else:
      yield judged.Query(where, name, text)


def paths(data: Data) -> dict[str, Path]:
  folder = Path(data.folder).expanduser()
  found = {"corpus": files.need(folder, "corpus.jsonl"), "queries": files.need(folder, "queries.jsonl")}
  found["test"] = files.need(folder, "qrels/test.tsv")
  for split in ("train", "dev"):
    if path := files.find(folder, f"qrels/{split}.tsv"):
      found[split] = path
  return found


def builder(data: Data, directory: Path) -> RetrievalBuilder:
  """The builder for the files in `data.folder`, with its own below `directory`; changed files make a new data set."""
  found = paths(data)
  return Beir.make(data, directory, files.signature([*found.values()], "beir 1", sorted(found)))
