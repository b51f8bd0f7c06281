"""Writes files in the formats that ernie_jax reads, of any size, with texts as long as MS MARCO's.

  python benchmarks/corpora.py msmarco DIR --passages 1000000 --queries 57000

Words are made up, their frequencies Zipf's. A passage has 56 words on average and in 1 of 100 cases more than 130, a
query 6. A query has one positive and eight negatives, drawn at random: speed can be measured here, quality cannot.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BLOCK = 10_000


def vocabulary(size: int = 50_000) -> np.ndarray:
  """Words of 1 to 4 syllables, the short ones first, as frequent words are."""
  rng = np.random.default_rng(0)
  syllables = [c + v + e for c in "bcdfghklmnprstvwz" for v in "aeiou" for e in ("", "n", "r", "s", "l")]
  words = dict.fromkeys("".join(rng.choice(syllables, 1 + min(3, i * 6 // size))) for i in range(3 * size))
  return np.array(list(words)[:size])


class Maker:
  """Texts by number: the same number, the same text."""

  def __init__(self, seed: int):
    self.words = vocabulary()
    self.cumulated = np.cumsum(1 / np.arange(2, len(self.words) + 2))
    self.cumulated /= self.cumulated[-1]
    self.seed = seed

  def texts(self, count: int, mean: float, shape: float, kind: int) -> Iterator[str]:
    """Lengths are gamma distributed: at shape 5, the 99th percentile is 2.3 times the mean."""
    for begin in range(0, count, BLOCK):
      rng = np.random.default_rng((self.seed, kind, begin))
      lengths = np.maximum(1, rng.gamma(shape, mean / shape, min(BLOCK, count - begin)).round().astype(int))
      drawn = self.words[np.searchsorted(self.cumulated, rng.random(lengths.sum()))]
      for end, length in zip(np.cumsum(lengths), lengths):
        yield " ".join(drawn[end - length : end]).capitalize() + "."

  def passages(self, count: int) -> Iterator[tuple[str, str, str]]:
    """(id, title, text)"""
    titles = self.texts(count, 3, 4, 1)
    for number, (title, text) in enumerate(zip(titles, self.texts(count, 56, 5, 0))):
      yield str(number), title, text

  def queries(self, count: int, passages: int, split: str) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """(id, text, positives, negatives)"""
    kind = {"train": 2, "dev": 3, "test": 4}[split]
    rng = np.random.default_rng((self.seed, kind))
    for number, text in enumerate(self.texts(count, 6, 4, kind)):
      own, *others = rng.integers(passages, size=9).tolist()
      yield f"{kind}{number:07}", text, [str(own)], [str(x) for x in dict.fromkeys(others) if x != own]


def lines(path: Path, content: Iterator[str]) -> None:
  with open(path, "w", encoding="utf-8") as file:
    file.writelines(line + "\n" for line in content)


def msmarco(make: Maker, place: Path, passages: int, sizes: dict[str, int]) -> None:
  lines(place / "collection.tsv", (f"{i}\t{text}" for i, _, text in make.passages(passages)))
  lines(place / "para.title.txt", (f"{i}\t{title}" for i, title, _ in make.passages(passages)))
  for split, name in (("train", "train"), ("test", "dev.small")):
    rows = lambda split=split: make.queries(sizes[split], passages, split)
    lines(place / f"queries.{name}.tsv", (f"{i}\t{text}" for i, text, *_ in rows()))
    lines(place / f"qrels.{name}.tsv", (f"{i}\t0\t{p}\t1" for i, _, own, _ in rows() for p in own))
  ranked = (
    f"{i} Q0 {p} {rank} {1 / rank:.4f} bm25"
    for i, _, _, others in make.queries(sizes["train"], passages, "train")
    for rank, p in enumerate(others, 1)
  )
  lines(place / "negatives.train.trec", ranked)


def dpr(make: Maker, place: Path, passages: int, sizes: dict[str, int]) -> None:
  with open(place / "psgs_w100.tsv", "w", encoding="utf-8", newline="") as file:
    table = csv.writer(file, delimiter="\t")
    table.writerow(["id", "text", "title"])
    table.writerows([i, text, title] for i, title, text in make.passages(passages))
  for split in ("train", "dev"):
    with open(place / f"nq-{split}.json", "w", encoding="utf-8") as file:
      for number, (_, text, own, others) in enumerate(make.queries(sizes[split], passages, split)):
        context = lambda ids: [{"title": "", "text": "", "passage_id": i} for i in ids]
        row = {"question": text, "answers": [], "positive_ctxs": context(own), "hard_negative_ctxs": context(others)}
        file.write(("[" if number == 0 else ",") + "\n" + json.dumps(row | {"negative_ctxs": []}, indent=4))
      file.write("\n]\n")


def beir(make: Maker, place: Path, passages: int, sizes: dict[str, int]) -> None:
  rows = ({"_id": i, "title": title, "text": text} for i, title, text in make.passages(passages))
  lines(place / "corpus.jsonl", map(json.dumps, rows))
  all_queries = lambda: ((split, row) for split in sizes for row in make.queries(sizes[split], passages, split))
  lines(place / "queries.jsonl", (json.dumps({"_id": row[0], "text": row[1]}) for _, row in all_queries()))
  (place / "qrels").mkdir(exist_ok=True)
  for split in sizes:
    content = ["query-id\tcorpus-id\tscore"]
    content += [f"{i}\t{p}\t1" for i, _, own, _ in make.queries(sizes[split], passages, split) for p in own]
    lines(place / "qrels" / f"{split}.tsv", iter(content))


def jsonl(make: Maker, place: Path, passages: int, sizes: dict[str, int]) -> None:
  rows = ({"id": i, "title": title, "text": text} for i, title, text in make.passages(passages))
  lines(place / "corpus.jsonl", map(json.dumps, rows))
  for split in sizes:
    rows = (
      {"id": i, "text": text, "positives": own, "negatives": others}
      for i, text, own, others in make.queries(sizes[split], passages, split)
    )
    lines(place / f"{split}.jsonl", map(json.dumps, rows))


def dureader(make: Maker, place: Path, passages: int, sizes: dict[str, int]) -> None:
  """The words are no Chinese; texts are held in memory, for the training pairs repeat them."""
  texts = [text for _, _, text in make.passages(passages)]
  for folder in ("passage-collection", "train", "dev"):
    (place / folder).mkdir(exist_ok=True)
  half = -(-passages // 2)
  for part in range(2):
    lines(place / f"passage-collection/part-0{part}", (f"-\t-\t{text}\t0" for text in texts[part * half :][:half]))
  (place / "passage-collection/passage2id.map.json").write_text(json.dumps({str(i): f"p{i}" for i in range(passages)}))
  pairs = (
    f"{text}\t-\t{texts[int(own[0])]}\t-\t{texts[int(other)]}\t0"
    for _, text, own, others in make.queries(sizes["train"], passages, "train")
    for other in others[:4]
  )
  lines(place / "train/dual.train.tsv", pairs)
  answer = lambda p: {"paragraph_id": f"p{p}", "paragraph_text": texts[int(p)]}
  asked = (
    json.dumps({"question_id": i, "question": text, "answer_paragraphs": [answer(p) for p in own]})
    for i, text, own, _ in make.queries(sizes["dev"] + sizes["test"], passages, "dev")
  )
  lines(place / "dev/dev.json", asked)


FORMATS = {"msmarco": msmarco, "dpr": dpr, "beir": beir, "dureader": dureader, "jsonl": jsonl}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("format", choices=FORMATS)
  parser.add_argument("directory", type=Path)
  parser.add_argument("--passages", type=int, default=100_000)
  parser.add_argument("--queries", type=int, default=5_000, help="for training; dev and test have 500 each")
  parser.add_argument("--seed", type=int, default=0)
  chosen = parser.parse_args()
  chosen.directory.mkdir(parents=True, exist_ok=True)
  sizes = {"train": chosen.queries, "dev": 500, "test": 500}
  FORMATS[chosen.format](Maker(chosen.seed), chosen.directory, chosen.passages, sizes)


if __name__ == "__main__":
  main()
