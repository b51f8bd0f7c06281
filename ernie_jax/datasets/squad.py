"""Questions on paragraphs in SQuAD's JSON, in any language: SQuAD 1.1 and 2.0 (rajpurkar.github.io/SQuAD-explorer),
CMRC 2018 (github.com/ymcui/cmrc2018), DRCD, KorQuAD, MLQA or XQuAD (one language in a folder), ...

  *.json    {"data": [{"title": ..., "paragraphs": [{"context": ..., "qas": [{"id": ..., "question": ...}]}]}]}

Every JSON file of the folder is read (each may end in .gz or .zst). A paragraph is a passage with its article's title;
a question's positive is its own paragraph, also where the paragraph does not answer it (`is_impossible`): it is still
what the question is about. Articles, not questions, are divided: in the order of the hashes of their titles, the first
tenth of them is `test`, the next `dev`, the rest `train`, so that no paragraph is known before it is asked for.

Licences: SQuAD, CMRC 2018: CC BY-SA 4.0; others name their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ernie_jax.config import Data, UserError
from ernie_jax.datasets import SPLITS, RetrievalBuilder, Row, Rows, files
from ernie_jax.datasets.files import Bad
from ernie_jax.datasets.rows import said, share


class Paragraph(NamedTuple):
  """A paragraph, and its questions as they stand in the file."""

  where: str
  article: str
  title: str
  text: str
  questions: list[Any]

  @property
  def id(self) -> str:
    return said(self.title, self.text).strip()


class Squad(RetrievalBuilder):
  """The rows of a folder's articles."""

  def rows(self, bad: Bad) -> Rows:
    found = [paragraph for path in paths(self.data) for paragraph in paragraphs(path, bad)]
    split_of = split({paragraph.article for paragraph in found})
    rows: Rows = {"corpus": (Row(p.id, p.title, p.text, where=p.where) for p in found)}
    for name in SPLITS:
      rows[name] = questions([p for p in found if split_of[p.article] == name], bad)
    return rows


def paragraphs(path: Path, bad: Bad) -> Iterator[Paragraph]:
  document = files.json_document(path)
  articles = document.get("data") if isinstance(document, dict) else None
  if not isinstance(articles, list):
    raise UserError(f'{path}: no SQuAD file, whose JSON is an object with a list called "data"')
  for i, article in enumerate(articles):
    where = f"{path}: data[{i}]"
    inside = article.get("paragraphs") if isinstance(article, dict) else None
    title = article.get("title", "") if isinstance(article, dict) else None
    if not isinstance(inside, list) or not isinstance(title, str):
      bad("wrong field", where, 'an article needs a string called "title" and a list called "paragraphs"')
      continue
    for j, paragraph in enumerate(inside):
      where = f"{path}: data[{i}].paragraphs[{j}]"
      text = paragraph.get("context") if isinstance(paragraph, dict) else None
      asked = paragraph.get("qas") if isinstance(paragraph, dict) else None
      if not isinstance(text, str) or not isinstance(asked, list):
        bad("wrong field", where, 'a paragraph needs a string called "context" and a list called "qas"')
        continue
      # The parts of an article may lie in several files: what has a title is one article by that title.
      yield Paragraph(where, title or f"{path.name.split('.json')[0]} {i}", title, text, asked)


def questions(paragraphs: list[Paragraph], bad: Bad) -> Iterator[Row]:
  for paragraph in paragraphs:
    for i, found in enumerate(paragraph.questions):
      where = f"{paragraph.where}.qas[{i}]"
      name, text = (found.get("id"), found.get("question")) if isinstance(found, dict) else (None, None)
      if not isinstance(name, str) or not isinstance(text, str):
        bad("wrong field", where, 'a question needs strings called "id" and "question"')
      else:
        yield Row(name, "", text, (paragraph.id,), where=where)


def split(articles: set[str]) -> dict[str, str]:
  """{article: split}: a tenth test, a tenth dev, and none of the three without an article if there are three."""
  order = sorted(articles, key=lambda article: (share(article), article))
  tenth = max(1, round(len(order) / 10))
  names = ["test"] * (tenth if len(order) > 1 else 0) + ["dev"] * (tenth if len(order) > 2 else 0)
  return dict(zip(order, names + ["train"] * len(order)))


def paths(data: Data) -> list[Path]:
  folder = Path(data.folder).expanduser()
  found = sorted(path for suffix in files.SUFFIXES for path in folder.glob(f"*.json{suffix}"))
  if not found:
    raise UserError(f"data.folder={str(folder)!r}: no *.json there; name a folder with SQuAD's files")
  return found


def builder(data: Data, directory: Path) -> RetrievalBuilder:
  """The builder for the files in `data.folder`, with its own below `directory`; changed files make a new data set."""
  return Squad.make(data, directory, files.signature(paths(data), "squad 1"))
