"""A small folder of every source, in the format that its docstring documents, and a reader that writes no records."""

import importlib
import json
from pathlib import Path

from ernie_jax import config

TEXT = {
  "p0": "Zeros around an array, or ones.",
  "p1": "Ünïcode, 中文 and ☃.",
  "p2": 'He said "pad" and left.',
  "p3": "Rows of a matrix",
  "p4": "Columns of a matrix",
  "p5": "Nothing but words",
}
TITLE = {"p0": "Padding", "p1": "", "p2": "Quotes", "p3": "", "p4": "Columns", "p5": ""}
QUERIES = {"train": range(8), "dev": range(8, 11), "test": range(11, 14)}


def query(i: int) -> tuple[str, str]:
  return f"q{i}", f"what is number {i}?"


def own(i: int) -> list[str]:
  """The positives of a query."""
  return [f"p{i % 6}", f"p{(i + 1) % 6}"] if i % 3 == 0 else [f"p{i % 6}"]


def hard(i: int) -> list[str]:
  return [f"p{(i + 3) % 6}", f"p{(i + 4) % 6}"]


def dumps(*rows, indent=None) -> str:
  return "".join(json.dumps(row, ensure_ascii=False, indent=indent) + "\n" for row in rows)


def tsv(*rows) -> str:
  return "".join("\t".join(map(str, row)) + "\n" for row in rows)


def jsonl() -> dict[str, str]:
  files = {"corpus.jsonl": dumps(*({"id": p, "title": TITLE[p], "text": text} for p, text in TEXT.items()))}
  for split, rows in QUERIES.items():
    lines = ({"id": query(i)[0], "text": query(i)[1], "positives": own(i), "negatives": hard(i)} for i in rows)
    files[f"{split}.jsonl"] = dumps(*lines)
  return files


def msmarco() -> dict[str, str]:
  seen = [*QUERIES["train"], *QUERIES["dev"]]
  qrels = lambda rows: tsv(*((query(i)[0], 0, p, 1) for i in rows for p in own(i)))
  return {
    "collection.tsv": tsv(*TEXT.items()),
    "para.title.txt": tsv(*((p, title or "-") for p, title in reversed(TITLE.items()) if p != "p5")),
    "queries.train.tsv": tsv(*map(query, seen), ("q99", "never judged")),
    "qrels.train.tsv": qrels(seen),
    "queries.dev.small.tsv": tsv(*map(query, QUERIES["test"])),
    "qrels.dev.small.tsv": qrels(QUERIES["test"]),
    "negatives.train.trec": "".join(
      f"{query(i)[0]} Q0 {p} {n} 1.5 bm25\n" for i in seen for n, p in enumerate(hard(i))
    ),
  }


def beir() -> dict[str, str]:
  corpus = [{"_id": p, "title": TITLE[p], "text": text, "metadata": {}} for p, text in TEXT.items()]
  files = {
    "corpus.jsonl": dumps(*corpus),
    "queries.jsonl": dumps(*({"_id": query(i)[0], "text": query(i)[1]} for rows in QUERIES.values() for i in rows)),
  }
  for split, rows in QUERIES.items():
    judged = [(query(i)[0], p, 1) for i in rows for p in own(i)] + [(query(i)[0], hard(i)[0], 0) for i in rows]
    files[f"qrels/{split}.tsv"] = tsv(("query-id", "corpus-id", "score"), *judged)
  return files


def dpr() -> dict[str, str]:
  quote = lambda text: '"' + text.replace('"', '""') + '"'
  passages = ((p, quote(text), TITLE[p]) for p, text in TEXT.items())
  contexts = lambda names, key: [{"title": TITLE[p], "text": TEXT[p], "score": 1.5, key: p} for p in names]
  files = {"psgs_w100.tsv": tsv(("id", "text", "title"), *passages)}
  for split, name in (("train", "biencoder-nq-train.json"), ("dev", "nq-dev.json"), ("test", "nq-test.json")):
    key = "psg_id" if split == "dev" else "passage_id"
    lists = lambda i: {"positive_ctxs": contexts(own(i), key), "hard_negative_ctxs": contexts(hard(i), key)}
    elements = [{"question": query(i)[1], "answers": ["x"], "negative_ctxs": [], **lists(i)} for i in QUERIES[split]]
    files[name] = dumps(elements, indent=4)
  return files


def dureader() -> dict[str, str]:
  names = list(TEXT)
  pairs = ((query(i)[1], "-", TEXT[p], "-", TEXT[n], 0) for i in QUERIES["train"] for p in own(i) for n in hard(i))
  answers = lambda i: [{"paragraph_id": p, "paragraph_text": TEXT[p]} for p in own(i)]
  dev = [*QUERIES["dev"], *QUERIES["test"]]
  return {
    "passage-collection/part-00": tsv(*(("-", "-", TEXT[p], 0) for p in names[:4])),
    "passage-collection/part-01": tsv(*(("-", "-", TEXT[p], 0) for p in names[4:])),
    "passage-collection/passage2id.map.json": json.dumps({str(i): p for i, p in enumerate(names)}),
    "train/dual.train.tsv": tsv(*pairs),
    "dev/dev.json": dumps(
      *({"question_id": query(i)[0], "question": query(i)[1], "answer_paragraphs": answers(i)} for i in dev)
    ),
  }


def squad() -> dict[str, str]:
  def article(p: str, rows: range) -> dict:
    asked = [{"id": query(i)[0], "question": query(i)[1], "answers": [], "is_impossible": i % 2 == 0} for i in rows]
    return {"title": TITLE[p], "paragraphs": [{"context": TEXT[p], "qas": asked}]}

  articles = [article(p, range(3 * n, 3 * n + 3)) for n, p in enumerate(TEXT)]
  return {
    "a.json": json.dumps({"version": "v2.0", "data": articles[:4]}),
    "b.json": dumps({"data": articles[4:]}, indent=1),
  }


SAMPLES = {"jsonl": jsonl, "msmarco": msmarco, "beir": beir, "dpr": dpr, "dureader": dureader, "squad": squad}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
  for name, content in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  return folder


def settings(name: str, folder: Path, cache: Path, **more) -> config.Data:
  return config.Data(name=name, folder=str(folder), cache=str(cache), **more)


Rows = dict[str, list[tuple[str, str, str, list[str], list[str]]]]


def checked(data: config.Data) -> tuple[Rows, dict[str, dict[str, int]]]:
  """{split: [(id, title, text, positives, negatives)]} as they would be written, and what was left out."""
  source = importlib.import_module(f"ernie_jax.datasets.{data.name}")
  builder = source.builder(data, Path(data.cache))
  try:
    rows = {
      split: [tuple(example.values()) for _, example in examples]
      for split, examples in builder._split_generators(None).items()
    }
    bad = builder.index.bad
    return rows, {"skipped": dict(bad.skipped), "left_out": dict(bad.left_out)}
  finally:
    if hasattr(builder, "index"):
      del builder.index  # TFDS keeps builders, and this one open files
