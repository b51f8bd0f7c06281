"""Queries in one file, judgements in another: what MS MARCO and BEIR have in common."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ernie_jax.datasets import files
from ernie_jax.datasets.files import Bad
from ernie_jax.datasets.rows import NEGATIVES, Row


class Query(NamedTuple):
  """A line of a file of queries."""

  where: str
  id: str
  text: str


class Judged(NamedTuple):
  """The positives of a query."""

  line: int  # of the first of them
  passages: str  # their ids, a tab between two: half a million lists would take several times the memory

  def add(self, passage: str) -> Judged:
    return Judged(self.line, f"{self.passages}\t{passage}" if self.passages else passage)


Qrels = dict[str, Judged]


def read(path: Path, bad: Bad, columns: int, header: tuple[str, ...] = ()) -> Qrels:
  """The positives in a file of judgements: query first, score last, passage before it; scores above 0 count."""
  found: Qrels = {}
  for where, cells in files.tsv(path, bad, columns, header):
    query, passage, score = cells[0], cells[-2], cells[-1]
    try:
      positive = int(score) > 0
    except ValueError:
      bad("wrong score", where, f"the score is {score!r:.80}, not a whole number")
      continue
    if not query or not passage:
      bad("empty id", where, "an id is empty; a judgement needs a query's and a passage's")
    elif positive:
      line = int(where.rsplit(":", 1)[1])
      found[query] = found.get(query, Judged(line, "")).add(passage)
  return found


def rows(
  queries: Iterable[Query],
  own: Qrels,
  path: Path,
  bad: Bad,
  negatives: Mapping[str, str] = {},
  judged: Collection[str] | None = None,
) -> Iterator[Row]:
  """The queries that are judged in `own`, read from `path`; the others are left out.

  `judged`: all queries that have a judgement in some split; with it, those that have none are counted.
  """
  missing = set(own)
  for where, query, text in queries:
    if judged is not None and query not in judged:
      bad.left_out["queries without judgements"] += 1
    if query in own:
      missing.discard(query)
      line, passages = own[query]
      others = negatives.get(query, "")
      yield Row(
        query,
        "",
        text,
        tuple(passages.split("\t")),
        tuple(others.split("\t")) if others else (),
        f"{where} ({path.name}:{line})",
      )
  for query in own:
    if query in missing:
      bad("unknown query", f"{path}:{own[query].line}", f"query {query!r} is not among the queries; add it, or drop it")


def ranked(path: Path, bad: Bad, own: Qrels) -> dict[str, str]:
  """{query: ids of its passages, a tab between two} of the queries in `own`, in the order of a ranking's lines.

  A line is one of a TREC run (query, Q0, passage, rank, score, name), of an MS MARCO run (query, passage, rank), or of
  MS MARCO's top-1000 files (query, passage, and the texts of both).
  """
  found: dict[str, str] = {}
  counts: dict[str, int] = {}
  for where, line in files.lines(path, bad):
    cells = line.split("\t")
    if len(cells) in (3, 4):
      query, passage = cells[:2]
    elif len(cells := line.split()) == 6:
      query, passage = cells[0], cells[2]
    else:
      bad("wrong number of columns", where, "no line of a TREC run, an MS MARCO run or a top-1000 file")
      continue
    if query.split() != [query] or passage.split() != [passage]:
      bad("white space in an id", where, f"{query!r:.80} and {passage!r:.80} are no ids; is this line damaged?")
      continue
    # The positives stand in such lists too, and do not count.
    if query in own and counts.get(query, 0) < NEGATIVES + own[query].passages.count("\t") + 1:
      counts[query] = counts.get(query, 0) + 1
      found[query] = f"{found[query]}\t{passage}" if query in found else passage
  return found
