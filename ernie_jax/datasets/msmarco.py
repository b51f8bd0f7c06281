"""MS MARCO passage ranking, in the files that Microsoft publishes (microsoft.github.io/msmarco).

  collection.tsv                            passage id, text: 8,841,823 lines
  queries.train.tsv, qrels.train.tsv        query id, text; query id, 0, passage id, 1
  queries.dev.small.tsv, qrels.dev.small.tsv    the 6,980 queries that papers report; else the whole dev set:
  queries.dev.tsv, qrels.dev.tsv
  para.title.txt                            optional: passage id, title ("-" for none), as RocketQA gives them
  negatives.train.*                         optional hard negatives: a TREC run, an MS MARCO run or top1000.train.txt

Each may end in .gz or .zst. `collectionandqueries.tar.gz` holds all but qrels.dev.tsv and the optional ones. The test
set's judgements are not published: the published dev set is `test` here, and about 1 % of the training queries, chosen
by the hash of their id, are `dev`. Queries without judgements are left out and counted.

Licence: for non-commercial research only, under Microsoft's terms at the address above.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ernie_jax import columns
from ernie_jax.config import Data, UserError
from ernie_jax.datasets import RetrievalBuilder, Row, Rows, files, judged
from ernie_jax.datasets.files import Bad
from ernie_jax.datasets.rows import BLOCK, blocks, carve

DEV = 0.01  # of the training queries


class Msmarco(RetrievalBuilder):
  """The rows of the collection and of the judged queries."""

  def rows(self, bad: Bad) -> Rows:
    found = paths(self.data)
    train = judged.read(found["qrels.train"], bad, 4)
    test = judged.read(found["qrels.dev"], bad, 4)
    dev = carve(train, DEV)
    own = {query: each for query, each in train.items() if query not in dev}
    # Read when the training queries are asked for: while the corpus is written, they would only take memory.
    negatives = lambda: judged.ranked(found["negatives"], bad, own) if "negatives" in found else {}

    def training() -> Iterator[Row]:
      queries = read(found["queries.train"], bad)
      yield from judged.rows(queries, own, found["qrels.train"], bad, negatives(), train)

    carved = {query: train[query] for query in dev}
    return {
      "corpus": passages(found["collection"], found.get("titles"), self.scratch, bad),
      "train": training(),
      "dev": judged.rows(read(found["queries.train"], bad), carved, found["qrels.train"], bad),
      "test": judged.rows(read(found["queries.dev"], bad), test, found["qrels.dev"], bad),
    }


def read(path: Path, bad: Bad) -> Iterator[judged.Query]:
  return (judged.Query(where, *cells) for where, cells in files.tsv(path, bad, 2))


def passages(path: Path, titles: Path | None, scratch: Path, bad: Bad) -> Iterator[Row]:
  """The passages, with the titles that another file has, in any order: they wait below `scratch`."""
  lines = files.tsv(path, bad, 2)
  if titles is None:
    yield from (Row(name, "", text, where=where) for where, (name, text) in lines)
    return
  with columns.Writer(scratch / "title-ids", np.uint8) as ids, columns.Writer(scratch / "titles", np.uint8) as texts:
    for _, (name, title) in files.tsv(titles, bad, 2):
      if title.strip() not in ("", "-"):
        ids.append(name.encode())
        texts.append(title.encode())
    ids.close()
    texts.close()
  names, known = (columns.Strings(columns.matching(scratch / what)) for what in ("title-ids", "titles"))  # type: ignore[arg-type]
  lookup = columns.Lookup.of(names)
  for block in blocks(lines, BLOCK):
    found = lookup([name for _, (name, _) in block])
    for (where, (name, text)), row in zip(block, found.tolist()):
      yield Row(name, known[row] if row >= 0 else "", text, where=where)


def paths(data: Data) -> dict[str, Path]:
  folder = Path(data.folder).expanduser()
  dev = "dev.small" if files.find(folder, "queries.dev.small.tsv") else "dev"
  found = {
    "collection": files.need(folder, "collection.tsv"),
    "queries.train": files.need(folder, "queries.train.tsv"),
    "qrels.train": files.need(folder, "qrels.train.tsv"),
    "queries.dev": files.need(folder, f"queries.{dev}.tsv"),
    "qrels.dev": files.need(folder, f"qrels.{dev}.tsv"),
  }
  if titles := files.find(folder, "para.title.txt"):
    found["titles"] = titles
  negatives = sorted(folder.glob("negatives.train*"))
  if len(negatives) > 1:
    raise UserError(f"{negatives[1]}: beside {negatives[0].name}; leave one file of negatives in the folder")
  return found | ({"negatives": negatives[0]} if negatives else {})


def builder(data: Data, directory: Path) -> RetrievalBuilder:
  """The builder for the files in `data.folder`, with its own below `directory`; changed files make a new data set."""
  return Msmarco.make(data, directory, files.signature([*paths(data).values()], "msmarco 1"))
