"""DuReader-retrieval, Chinese, in the files of its baseline (github.com/PaddlePaddle/RocketQA,
research/DuReader-Retrieval-Baseline, `script/download.sh`: dureader-retrieval-baseline-dataset.tar.gz).

  passage-collection/part-00, part-01, ...       4 columns, the third is a passage: 8,096,668 lines in all
  passage-collection/passage2id.map.json         {"line number over all parts, from 0": "passage id"}
  train/dual.train.tsv                           6 columns: query, -, a positive's text, -, a negative's text, -
  train/train.json                               in place of it, in the form of dev.json
  dev/dev.json                                   a line for each query: {"question_id", "question",
                                                 "answer_paragraphs": [{"paragraph_id", "paragraph_text"}, ...]}

Each may end in .gz or .zst. Training positives and negatives are texts, which are found in the collection. The test
set's answers are not published: half of the dev questions, chosen by their hash, are `test`. Without the map, passages
are numbered, and dev's are found by their texts.

Licence: Apache 2.0 (github.com/baidu/DuReader).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ernie_jax import columns
from ernie_jax.config import Data, UserError
from ernie_jax.datasets import RetrievalBuilder, Row, Rows, files
from ernie_jax.datasets.files import Bad
from ernie_jax.datasets.rows import said, share


class Dureader(RetrievalBuilder):
  """The rows of the collection, the training pairs and the questions."""

  def rows(self, bad: Bad) -> Rows:
    found = paths(self.data)
    parts = [path for name, path in found.items() if name.startswith("part")]
    by_id = "map" in found
    pairs = found["train"].name.startswith("dual")
    dev = lambda: questions(found["dev"], bad, by_id)
    return {
      "corpus": passages(parts, found.get("map"), self.scratch / "names", bad),
      "train": training(found["train"], bad) if pairs else questions(found["train"], bad, by_id),
      "dev": (row for row in dev() if share(row.text) < 0.5),
      "test": (row for row in dev() if share(row.text) >= 0.5),
    }


def passages(parts: list[Path], names: Path | None, scratch: Path, bad: Bad) -> Iterator[Row]:
  ids, row = named(names, scratch) if names else (None, np.zeros(0, np.int64))
  before = 0  # lines of the parts before
  for path in parts:
    for where, cells in files.tsv(path, bad, 4):
      number = before + int(where.rsplit(":", 1)[1]) - 1
      if ids is None:
        yield Row(str(number), "", cells[2], where=where)
      elif number >= len(row) or row[number] < 0:
        bad("passage without an id", where, f"passage {number} has no id in {names}; get both files again")
      else:
        yield Row(ids[int(row[number])], "", cells[2], where=where)
    if path != parts[-1]:
      # By themselves, for lines that are left out count too.
      last = b""
      for chunk in files.chunks(path):
        before, last = before + chunk.count(b"\n"), chunk[-1:]
      before += last != b"\n"


def named(path: Path, scratch: Path) -> tuple[columns.Strings, np.ndarray]:
  """The ids of the map, which is too large for memory, and [N] which of them each line has (-1: none)."""
  lines = array("q")
  with columns.Writer(scratch, np.uint8) as writer:
    for where, key, value in files.json_pairs(path):
      if not key.isdecimal() or not isinstance(value, str) or len(key) > 9:
        raise UserError(f"{where}: {key!r:.80}: {value!r:.80} is no line number with an id; get the file again")
      try:
        writer.append(value.encode())
      except UnicodeEncodeError as error:
        raise UserError(f"{where}: the id of line {key} is not UTF-8; get the file again") from error
      lines.append(int(key))
    writer.close()
  if max(lines, default=0) > 10 * len(lines):
    raise UserError(f"{path}: names line {max(lines)}, and has {len(lines)} ids; get the file again")
  row = np.full(max(lines, default=-1) + 1, -1, np.int32)
  row[np.frombuffer(lines, np.int64)] = np.arange(len(lines))
  return columns.Strings(columns.matching(scratch)), row  # type: ignore[arg-type]


def training(path: Path, bad: Bad) -> Iterator[Row]:
  """The queries of the pairs, each with all its passages; a query's lines need not stand together."""
  found: dict[str, tuple[str, dict[str, None], dict[str, None]]] = {}
  for where, cells in files.tsv(path, bad, 6):
    query, positive, negative = cells[0], cells[2], cells[4]
    if not query.strip() or not positive.strip():
      bad("empty text", where, "the query or its positive is empty")
      continue
    _, positives, negatives = found.setdefault(query, (where, {}, {}))
    positives[said("", positive)] = None
    if negative.strip():
      negatives[said("", negative)] = None
  for number, (query, (where, positives, negatives)) in enumerate(found.items()):
    yield Row(f"train-{number}", "", query, tuple(positives), tuple(negatives), where)


def questions(path: Path, bad: Bad, by_id: bool) -> Iterator[Row]:
  for where, found in files.json_lines(path, bad):
    name, text, answers = (found.get(field) for field in ("question_id", "question", "answer_paragraphs"))
    field = "paragraph_id" if by_id else "paragraph_text"
    answers = answers if isinstance(answers, list) else [None]
    named = [each[field] for each in answers if isinstance(each, dict) and isinstance(each.get(field), str)]
    if not isinstance(name, str) or not isinstance(text, str) or len(named) < len(answers):
      bad(
        "wrong field", where, f'"question_id" and "question" must be strings, "answer_paragraphs" a list with {field}'
      )
    else:
      yield Row(name, "", text, tuple(named if by_id else (said("", each) for each in named)), where=where)


def paths(data: Data) -> dict[str, Path]:
  folder = Path(data.folder).expanduser()
  parts = sorted(folder.glob("passage-collection/part-*"))
  files.need(folder, "passage-collection/part-00")
  found = {path.name: path for path in parts}
  found["train"] = files.need(folder, "train/dual.train.tsv", "train/train.json")
  found["dev"] = files.need(folder, "dev/dev.json")
  if names := files.find(folder, "passage-collection/passage2id.map.json"):
    found["map"] = names
  return found


def builder(data: Data, directory: Path) -> RetrievalBuilder:
  """The builder for the files in `data.folder`, with its own below `directory`; changed files make a new data set."""
  return Dureader.make(data, directory, files.signature([*paths(data).values()], "dureader 1"))
