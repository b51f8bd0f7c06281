"""Damaged files of every source: each ends in one line that names a file, or in exactly the rows that are in it.

What is in a damaged file is said by readers of a few lines each, which know nothing of bad data: where they fail, the
sources have to refuse the file.
"""

import csv
import gzip
import json
import random
import re
import shutil

import pytest
import sources
import zstandard

from ernie_jax.config import UserError
from ernie_jax.datasets import rows

Files = dict[str, bytes]
TIMES = 50  # for each source


# ---- What is in the files --------------------------------------------------------------------------------------------


def plain(files: Files, name: str) -> str:
  for suffix, unpack in (("", bytes), (".gz", gzip.decompress), (".zst", zstandard.decompress)):
    if name + suffix in files:
      return unpack(files[name + suffix]).decode("utf-8-sig")
  raise KeyError(name)


def there(files: Files, name: str) -> bool:
  return any(path.startswith(name) for path in files)


def lines(files: Files, name: str) -> list[str]:
  found = plain(files, name).split("\n")
  return [line.removesuffix("\r") for line in (found if found[-1] else found[:-1])]


def table(files: Files, name: str, width: int) -> list[list[str]]:
  found = [line.split("\t") for line in lines(files, name)]
  assert {len(cells) for cells in found} == {width}
  return found


def objects(files: Files, name: str) -> list[dict]:
  return list(map(json.loads, lines(files, name)))


def query(name, text, positives, negatives=()):
  positives = list(dict.fromkeys(positives))
  return name, "", text, positives, [p for p in dict.fromkeys(negatives) if p not in positives]


def halves(asked: list) -> tuple[list, list]:
  return [q for q in asked if rows.share(q[2]) < 0.5], [q for q in asked if rows.share(q[2]) >= 0.5]


def jsonl(files: Files) -> sources.Rows:
  found = {"corpus": [(p["id"], p.get("title", ""), p["text"], [], []) for p in objects(files, "corpus.jsonl")]}
  for split in sources.QUERIES:
    numbered = enumerate(objects(files, f"{split}.jsonl"), 1)
    found[split] = [
      query(q.get("id", f"{split}-{n}"), q["text"], q["positives"], q.get("negatives", [])) for n, q in numbered
    ]
  return found


def judgements(table: list[list[str]]) -> dict[str, list[str]]:
  found: dict[str, list[str]] = {}
  for cells in table:
    if int(cells[-1]) > 0:
      found.setdefault(cells[0], []).append(cells[-2])
  return found


def msmarco(files: Files) -> sources.Rows:
  titled = table(files, "para.title.txt", 2) if there(files, "para.title.txt") else []
  titles = {p: title for p, title in titled if title.strip() not in ("-", "")}
  corpus = [(p, titles.get(p, ""), text, [], []) for p, text in table(files, "collection.tsv", 2)]
  train, test = (judgements(table(files, f"qrels.{name}.tsv", 4)) for name in ("train", "dev.small"))
  negatives: dict[str, list[str]] = {}
  for line in lines(files, "negatives.train.trec") if there(files, "negatives") else []:
    q, _, p, *_ = line.split()
    negatives.setdefault(q, []).append(p)
  dev = rows.carve(train, 0.01)
  asked = table(files, "queries.train.tsv", 2)
  return {
    "corpus": corpus,
    "train": [query(q, text, train[q], negatives.get(q, [])) for q, text in asked if q in train and q not in dev],
    "dev": [query(q, text, train[q]) for q, text in asked if q in dev],
    "test": [query(q, text, test[q]) for q, text in table(files, "queries.dev.small.tsv", 2) if q in test],
  }


def beir(files: Files) -> sources.Rows:
  found = {"corpus": []}
  for p in objects(files, "corpus.jsonl"):
    title, text = p.get("title") or "", p["text"]
    found["corpus"].append((p["_id"], title, text, [], []) if text.strip() else (p["_id"], "", title, [], []))
  asked = [(q["_id"], q["text"]) for q in objects(files, "queries.jsonl")]
  read = lambda split: judgements([cells for cells in table(files, f"qrels/{split}.tsv", 3) if cells[0] != "query-id"])
  qrels = {split: read(split) for split in sources.QUERIES if there(files, f"qrels/{split}")}
  if "dev" not in qrels:
    qrels["dev"] = {q: qrels["train"].pop(q) for q in rows.carve(qrels["train"], 0.1)}
  for split in sources.QUERIES:
    found[split] = [query(q, text, qrels[split][q]) for q, text in asked if q in qrels.get(split, {})]
  return found


def dpr(files: Files) -> sources.Rows:
  passages = [next(csv.reader([line], delimiter="\t")) for line in lines(files, "psgs_w100.tsv")]
  assert {len(cells) for cells in passages} == {3}
  found = {"corpus": [(p, title, text, [], []) for p, text, title in passages if p != "id"]}
  names = {(title, text): p for p, title, text, _, _ in reversed(found["corpus"])}
  known = lambda c: str(c.get("passage_id", c.get("psg_id", names.get((c.get("title") or "", c.get("text"))))))
  for split, name in (("train", "biencoder-nq-train"), ("dev", "nq-dev"), ("test", "nq-test")):
    if split == "test" and not there(files, name):
      found["dev"], found["test"] = halves(found["dev"])
      break
    found[split] = [
      query(f"{name}-{n}", q["question"], map(known, q["positive_ctxs"]), map(known, q.get("hard_negative_ctxs", [])))
      for n, q in enumerate(json.loads(plain(files, f"{name}.json")))
      if q["positive_ctxs"]
    ]
  return found


def dureader(files: Files) -> sources.Rows:
  passages = [cells[2] for part in "01" for cells in table(files, f"passage-collection/part-0{part}", 4)]
  mapped = there(files, "passage-collection/passage2id")
  names = json.loads(plain(files, "passage-collection/passage2id.map.json")) if mapped else list(range(len(passages)))
  found = {"corpus": [(names[str(n)] if mapped else str(n), "", text, [], []) for n, text in enumerate(passages)]}
  first = {text: name for name, _, text, _, _ in reversed(found["corpus"])}
  pairs: dict[str, tuple[list[str], list[str]]] = {}
  for q, _, positive, _, negative, _ in table(files, "train/dual.train.tsv", 6):
    positives, negatives = pairs.setdefault(q, ([], []))
    positives.append(first[positive])
    negatives += [first[negative]] if negative.strip() else []
  found["train"] = [query(f"train-{n}", q, *each) for n, (q, each) in enumerate(pairs.items())]
  asked = [
    query(
      q["question_id"],
      q["question"],
      [p["paragraph_id"] if mapped else first[p["paragraph_text"]] for p in q["answer_paragraphs"]],
    )
    for q in objects(files, "dev/dev.json")
  ]
  found["dev"], found["test"] = halves(asked)
  return found


def squad(files: Files) -> sources.Rows:
  found: sources.Rows = {"corpus": [], "train": [], "dev": [], "test": []}
  articles = []
  for name in sorted({path.split(".json")[0] for path in files}):
    for n, article in enumerate(json.loads(plain(files, f"{name}.json"))["data"]):
      articles.append((article.get("title") or f"{name} {n}", article))
  # In the order of their hashes: one of six to test, one to dev, as far as one is left to train.
  order = sorted({name for name, each in articles if each["paragraphs"]}, key=lambda name: (rows.share(name), name))
  held_out = ["test", "dev"][: len(order) - 1]
  for name, article in articles:
    split = dict(zip(order, held_out)).get(name, "train") if article["paragraphs"] else ""
    for paragraph in article["paragraphs"]:
      p = rows.said(article.get("title", ""), paragraph["context"]).strip()
      found["corpus"].append((p, article.get("title", ""), paragraph["context"], [], []))
      found[split] += [query(q["id"], q["question"], [p]) for q in paragraph["qas"]]
  return found


READERS = {"jsonl": jsonl, "msmarco": msmarco, "beir": beir, "dpr": dpr, "dureader": dureader, "squad": squad}


def once(found: sources.Rows) -> dict[str, list[str]]:
  """Written out, without repetitions; where one id has two rows that differ, neither would be right."""
  for given in found.values():
    kept = {row[0]: row for row in given}
    assert all(kept[row[0]] == row for row in given)
  return {split: list(dict.fromkeys(map(repr, given))) for split, given in found.items()}


# ---- Damage ----------------------------------------------------------------------------------------------------------


def cut(content: bytes, rng: random.Random) -> bytes:
  return content[: rng.randrange(len(content))]


def overwrite(content: bytes, rng: random.Random) -> bytes:
  at, length = rng.randrange(len(content)), rng.choice([1, 1, 1, 4, 40])
  return content[:at] + rng.randbytes(length) + content[at + length :]


def flip(content: bytes, rng: random.Random) -> bytes:
  at = rng.randrange(len(content))
  return content[:at] + rng.choice([b"x", b"7", b" ", b"\t", b"\n", b'"', b"{", b"]", b","]) + content[at + 1 :]


def insert(content: bytes, rng: random.Random) -> bytes:
  odd = [
    b"\0",
    b"\xff",
    b"\t",
    b"\n",
    b"\r\n",
    b'"',
    b"\\",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\xe2\x80\xa8",
    b"]",
    b"{}",
    b"1e999",
  ]
  at = rng.randrange(len(content) + 1)
  return content[:at] + rng.choice(odd) + content[at:]


def swap(content: bytes, rng: random.Random) -> bytes:
  """Two columns of a line, or two members of what JSON has on it."""
  given = content.split(b"\n")
  at = rng.randrange(len(given))
  mark = b"\t" if b"\t" in given[at] else b", " if b", " in given[at] else b" "
  cells = given[at].split(mark)
  i, j = rng.randrange(len(cells)), rng.randrange(len(cells))
  cells[i], cells[j] = cells[j], cells[i]
  given[at] = mark.join(cells)
  return b"\n".join(given)


def drop(content: bytes, rng: random.Random) -> bytes:
  given = content.splitlines(keepends=True)
  del given[rng.randrange(len(given))]
  return b"".join(given)


def repeat(content: bytes, rng: random.Random) -> bytes:
  given = content.splitlines(keepends=True)
  at = rng.randrange(len(given))
  given.insert(rng.randrange(len(given) + 1), given[at] if given[at].endswith(b"\n") else given[at] + b"\n")
  return b"".join(given)


def retype(content: bytes, rng: random.Random) -> bytes:
  """Another JSON type in place of a string or a list."""
  found = list(re.finditer(rb'"[^"\n]*"|\[[^\[\]]*\]|\b\d+\b', content))
  if not found:
    return flip(content, rng)
  place = rng.choice(found)
  other = rng.choice([b"3", b"null", b"[]", b"{}", b"true", b'""', b'" "', b'"p1"', b"NaN", b"-1"])
  return content[: place.start()] + other + content[place.end() :]


def blank(content: bytes, rng: random.Random) -> bytes:
  given = content.splitlines(keepends=True)
  given.insert(rng.randrange(len(given) + 1), rng.choice([b"\n", b" \n", b"\r\n"]))
  return b"".join(given)


DAMAGE = [cut, overwrite, flip, flip, insert, insert, swap, drop, repeat, retype, retype, blank]


def damaged(files: Files, rng: random.Random) -> tuple[Files, str]:
  """The files with one of them damaged, which is named."""
  name = rng.choice(sorted(files))
  how = rng.random()
  content = files[name]
  if how < 0.1:
    others = {other: each for other, each in files.items() if other != name}
    return others | {name: b""} if how < 0.07 else others, name
  if how < 0.3:
    pack, suffix = rng.choice([(gzip.compress, ".gz"), (zstandard.compress, ".zst")])
    harm = rng.choice([cut, overwrite, lambda content, rng: content])
    files = {other: each for other, each in files.items() if other != name}
    inside = rng.choice(DAMAGE)(content, rng) if rng.random() < 0.5 else content
    return files | {name + suffix: harm(pack(inside), rng)}, name
  return files | {name: rng.choice(DAMAGE)(content, rng)}, name


@pytest.mark.parametrize("name", READERS)
def test_the_readers_of_this_file_agree_with_the_sources(tmp_path, name):
  files = {path: content.encode() for path, content in sources.SAMPLES[name]().items()}
  folder = sources.write(tmp_path / "in", files)
  assert sources.checked(sources.settings(name, folder, tmp_path / "cache"))[0] == READERS[name](files)


@pytest.mark.parametrize("name", READERS)
def test_damage_is_told_or_does_no_harm(tmp_path, name):
  outcomes = {"refused": 0, "read": 0}
  for seed in range(TIMES):
    rng = random.Random(f"{name} {seed}")
    files, harmed = damaged({path: content.encode() for path, content in sources.SAMPLES[name]().items()}, rng)
    folder = sources.write(tmp_path / str(seed) / "in", files)
    if rng.random() < 0.02 and (folder / harmed).exists():
      (folder / harmed).unlink()
      (folder / harmed).mkdir()
      files[harmed] = b"\xff"
    refusal = ""
    try:
      found, left = sources.checked(sources.settings(name, folder, tmp_path / str(seed) / "cache"))
    except UserError as error:
      refusal = str(error)
    if refusal:
      assert "\n" not in refusal, seed
      assert str(folder) in refusal, seed
      outcomes["refused"] += 1
    else:
      assert left["skipped"] == {}, seed
      expected = once(READERS[name](files))
      assert {split: list(map(repr, given)) for split, given in found.items()} == expected, seed
      outcomes["read"] += 1
    shutil.rmtree(tmp_path / str(seed))
  assert min(outcomes.values()) >= 5, outcomes


@pytest.mark.parametrize("name", [name for name in READERS if name != "squad"])  # which has no lines
def test_what_is_left_when_bad_lines_are_skipped_is_right(tmp_path, name):
  """Lines that are not UTF-8 take what names them with them, and change nothing else."""

  def read(files: Files, place: str, **more) -> tuple[set, dict[str, set[str]], int]:
    folder = sources.write(tmp_path / place / "in", files)
    found, left = sources.checked(sources.settings(name, folder, tmp_path / place / "cache", **more))
    text = {row[0]: row[1:3] for row in found["corpus"]}
    asked = {row[2]: {text[p] for p in row[3]} for split in sources.QUERIES for row in found[split]}
    return set(text.values()), asked, sum(left["skipped"].values())

  files = {path: content.encode() for path, content in sources.SAMPLES[name]().items()}
  passages, asked, _ = read(files, "whole")
  lined = [path for path in sorted(files) if path.endswith((".tsv", ".jsonl", ".trec", "part-00", "dev/dev.json"))]
  for seed in range(10):
    rng = random.Random(f"{name} {seed}")
    harmed = dict(files)
    for _ in range(rng.randrange(1, 4)):
      path = rng.choice(lined)
      given = harmed[path].split(b"\n")
      at = rng.randrange(b"id\t" in given[0], len(given))  # a header is needed
      given[at] = given[at][: len(given[at]) // 2] + b"\xff" + given[at][len(given[at]) // 2 :]
      harmed[path] = b"\n".join(given)
    kept, answered, count = read(harmed, str(seed), skip_bad=1000)
    assert count > 0, seed
    assert kept <= passages, seed
    assert len(passages) - len(kept) <= count, seed
    assert all(answered[query] and answered[query] <= asked[query] for query in answered), seed
