"""Every source on small files in the format it documents, row for row; and what all of them leave out, or refuse."""

import gzip
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sources
import zstandard
from sources import QUERIES, TEXT, TITLE, dumps, hard, own, query

from ernie_jax import config, datasets
from ernie_jax.config import UserError
from ernie_jax.datasets import dpr, rows, squad

REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def read(tmp_path):
  """Writes files, and gives the rows of a source in them; a place of its own for every call."""
  count = iter(range(100))

  def read(name: str, files: dict[str, str | bytes], **more):
    place = tmp_path / str(next(count))
    return sources.checked(sources.settings(name, sources.write(place / "in", files), place / "cache", **more))

  return read


def refusal(read, *args, **more) -> str:
  with pytest.raises(UserError) as error:
    read(*args, **more)
  assert "\n" not in str(error.value)
  return str(error.value)


CORPUS = [(p, TITLE[p], text, [], []) for p, text in TEXT.items()]


def expected(split: str, negatives=hard, name=lambda split, i: query(i)[0]):
  return [(name(split, i), "", query(i)[1], own(i), negatives(i)) for i in QUERIES[split]]


def test_jsonl(read):
  found, left = read("jsonl", sources.jsonl())
  assert found == {"corpus": CORPUS, **{split: expected(split) for split in QUERIES}}
  assert left == {"skipped": {}, "left_out": {}}


@pytest.mark.parametrize("corpus", [True, False])
def test_jsonl_reads_the_fields_of_tevatron(read, corpus):
  passage = lambda p: {"docid": p, "title": TITLE[p], "text": TEXT[p]}
  files = {"corpus.jsonl": dumps(*map(passage, TEXT))} if corpus else {}
  for split, numbers in QUERIES.items():
    lists = lambda i: {"positive_passages": [*map(passage, own(i))], "negative_passages": [*map(passage, hard(i))]}
    files[f"{split}.jsonl"] = dumps(*({"query_id": query(i)[0], "query": query(i)[1], **lists(i)} for i in numbers))
  found, _ = read("jsonl", files)
  assert sorted(found["corpus"]) == sorted(CORPUS)  # without a corpus: in the order in which queries bring them
  assert {split: found[split] for split in QUERIES} == {split: expected(split) for split in QUERIES}


@pytest.mark.parametrize("corpus", [True, False])
def test_jsonl_reads_the_fields_of_flag_embedding(read, corpus):
  files = {"corpus.jsonl": dumps(*({"id": p, "text": text} for p, text in TEXT.items()))} if corpus else {}
  for split, numbers in QUERIES.items():
    lists = lambda i: {"pos": [TEXT[p] for p in own(i)], "neg": [TEXT[p] for p in hard(i)]}
    files[f"{split}.jsonl"] = dumps(*({"query": query(i)[1], **lists(i)} for i in numbers))
  found, _ = read("jsonl", files)
  assert sorted(text for _, _, text, _, _ in found["corpus"]) == sorted(TEXT.values())
  text = {name: text for name, _, text, _, _ in found["corpus"]}
  for split, numbers in QUERIES.items():
    assert [(q, [text[p] for p in a], [text[p] for p in b]) for _, _, q, a, b in found[split]] == [
      (query(i)[1], [TEXT[p] for p in own(i)], [TEXT[p] for p in hard(i)]) for i in numbers
    ]


def test_msmarco(read):
  found, left = read("msmarco", sources.msmarco())
  assert found["corpus"] == CORPUS
  assert found["test"] == expected("test", lambda i: [])
  # The dev split is a part of the training queries, by the hash of their ids.
  dev = {name for name, *_ in found["dev"]}
  assert dev == rows.carve([query(i)[0] for i in range(11)], 0.01)
  assert len(dev) == 1
  seen = expected("train") + expected("dev")
  assert found["train"] == [row for row in seen if row[0] not in dev]
  assert found["dev"] == [(*row[:4], []) for row in seen if row[0] in dev]
  assert left == {"skipped": {}, "left_out": {"queries without judgements": 1}}


@pytest.mark.parametrize(
  "line",
  ["{q}\t{p}\t{rank}", "{q}\t{p}\ta query\ta passage", "{q}\tQ0\t{p}\t{rank}\t1.5\tname", "{q} Q0 {p} {rank} 2 x"],
)
def test_msmarco_reads_negatives_from_any_ranking(read, line):
  files = {name: content for name, content in sources.msmarco().items() if not name.startswith("negatives")}
  listed = [(query(i)[0], p) for i in range(11) for p in (*hard(i), own(i)[0], hard(i)[0])]
  lines = (line.format(q=q, p=p, rank=n) + "\n" for n, (q, p) in enumerate(listed))
  found, _ = read("msmarco", files | {"negatives.train.x": "".join(lines)})
  whole, _ = read("msmarco", sources.msmarco())
  assert found == whole  # positives and repetitions in the ranking do not count


def test_negatives_are_cut_after_positives_are_taken_out(read):
  files = sources.jsonl()
  many = [{"id": f"x{i}", "text": f"passage {i}"} for i in range(300)]
  files["corpus.jsonl"] += dumps(*many)
  names = [each["id"] for each in many]
  files["dev.jsonl"] = dumps({"id": "q", "text": "many", "positives": ["x1"], "negatives": names})
  assert read("jsonl", files)[0]["dev"][0][4] == ["x0", *names[2:201]]


def test_beir(read):
  found, left = read("beir", sources.beir())
  assert found == {"corpus": CORPUS, **{split: expected(split, lambda i: []) for split in QUERIES}}
  assert left == {"skipped": {}, "left_out": {}}


def test_beir_without_dev_and_without_train(read):
  files = sources.beir()
  del files["qrels/dev.tsv"]
  found, left = read("beir", files)
  assert sorted(found["train"] + found["dev"]) == expected("train", lambda i: [])
  assert {row[0] for row in found["dev"]} == rows.carve([query(i)[0] for i in range(8)], 0.1)
  assert left["left_out"] == {"queries without judgements": 3}
  del files["qrels/train.tsv"]
  found, left = read("beir", files)
  assert (found["train"], found["dev"]) == ([], [])
  assert found["test"] == expected("test", lambda i: [])
  assert left["left_out"] == {"queries without judgements": 11}


def test_beir_reads_a_title_without_a_text_as_text(read):
  files = sources.beir()
  files["corpus.jsonl"] += dumps({"_id": "p6", "title": "Alone", "text": ""})
  assert read("beir", files)[0]["corpus"][-1] == ("p6", "", "Alone", [], [])


def test_dpr(read):
  found, _ = read("dpr", sources.dpr())
  stem = {"train": "biencoder-nq-train", "dev": "nq-dev", "test": "nq-test"}
  name = lambda split, i: f"{stem[split]}-{i - QUERIES[split][0]}"
  assert found == {"corpus": CORPUS, **{split: expected(split, name=name) for split in QUERIES}}


def test_dpr_without_a_test_file_divides_dev(read):
  files = sources.dpr()
  del files["nq-test.json"]
  elements = [
    {"question": f"question {i}", "positive_ctxs": [{"title": TITLE["p1"], "text": TEXT["p1"]}] if i else []}
    for i in range(40)
  ]
  found, left = read("dpr", files | {"nq-dev.json": dumps(elements)})
  assert left["left_out"] == {"questions without positives": 1}
  texts = {split: {text for _, _, text, _, _ in found[split]} for split in ("dev", "test")}
  assert texts["dev"] | texts["test"] == {f"question {i}" for i in range(1, 40)}
  assert not texts["dev"] & texts["test"]
  assert 10 < len(texts["dev"]) < 30
  assert {tuple(row[3]) for row in found["dev"]} == {("p1",)}  # found by its title and text


def test_dpr_reads_quotes_as_csv_has_them(tmp_path):
  content = 'id\ttext\ttitle\n1\t"He said ""pad"", and left"\t"""Left"" (song)"\n2\tno quotes\tTitle\n'
  path = tmp_path / "psgs_w100.tsv"
  path.write_text(content)
  found = [row[:3] for row in dpr.passages(path, datasets.Bad())]
  assert found == [("1", '"Left" (song)', 'He said "pad", and left'), ("2", "Title", "no quotes")]


def test_dureader(read):
  found, _ = read("dureader", sources.dureader())
  assert found["corpus"] == [(p, "", text, [], []) for p, text in TEXT.items()]
  assert found["train"] == expected("train", name=lambda split, i: f"train-{i}")
  held_out = expected("dev", lambda i: []) + expected("test", lambda i: [])
  assert sorted(found["dev"] + found["test"]) == sorted(held_out)
  assert found["dev"] == [row for row in held_out if rows.share(row[2]) < 0.5]


def test_dureader_without_the_map_finds_passages_by_their_texts(read):
  files = sources.dureader()
  del files["passage-collection/passage2id.map.json"]
  found, _ = read("dureader", files)
  whole, _ = read("dureader", sources.dureader())
  number = {p: str(i) for i, p in enumerate(TEXT)}
  for split in QUERIES:
    assert [row[3] for row in found[split]] == [[number[p] for p in row[3]] for row in whole[split]]


def test_dureader_counts_bad_lines_too(read):
  """Lines count over all parts; the map may be in any order."""
  files = {name: content.encode() for name, content in sources.dureader().items()}
  files["passage-collection/passage2id.map.json"] = json.dumps(
    {str(i): f"id{i}" for i in (7, 2, 0, 1, 5, 6, 3, 4)}
  ).encode()
  files["passage-collection/part-00"] += b"one column\n-\t-\tno UTF-8: \xff\t0"  # without an end of line
  files["dev/dev.json"] = dumps(
    {"question_id": "q", "question": "?", "answer_paragraphs": [{"paragraph_id": "id6"}]}
  ).encode()
  found, left = read("dureader", files, skip_bad=2)
  assert [row[0] for row in found["corpus"]] == ["id0", "id1", "id2", "id3", "id6", "id7"]
  assert (found["dev"] + found["test"])[0][3] == ["id6"]
  assert left["skipped"] == {"wrong number of columns": 1, "not UTF-8": 1}


def test_squad(read):
  found, _ = read("squad", sources.squad())
  names = {p: str(rows.said(TITLE[p], TEXT[p])).strip() for p in TEXT}
  assert found["corpus"] == [(names[p], *row) for p, *row in CORPUS]
  asked = {query(3 * n + i)[0]: names[p] for n, p in enumerate(TEXT) for i in range(3)}
  every = [row for split in QUERIES for row in found[split]]
  assert {name: (text, a) for name, _, text, a, _ in every} == {
    name: (f"what is number {name[1:]}?", [p]) for name, p in asked.items()
  }
  for split in QUERIES:  # whole articles
    inside = {row[3][0] for row in found[split]}
    assert {row[0] for row in found[split]} == {name for name, p in asked.items() if p in inside}


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 97])
def test_squad_divides_articles(count):
  found = list(squad.split({f"article {i}" for i in range(count)}).values())
  sizes = [found.count(split) for split in ("train", "dev", "test")]
  assert sum(sizes) == count
  assert sizes == {0: [0, 0, 0], 1: [1, 0, 0], 2: [1, 0, 1], 3: [1, 1, 1], 10: [8, 1, 1], 97: [77, 10, 10]}[count]


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real data sets are not here: {REAL}")
@pytest.mark.parametrize(
  ("pattern", "paragraphs", "asked", "empty"),
  [("squad-v2-dev-*.json", 1216, 11993, 0), ("cmrc2018-*.json", 1104, 4221, 2)],  # two of CMRC's questions are empty
)
def test_real_files(tmp_path, pattern, paragraphs, asked, empty):
  for path in REAL.glob(pattern):
    shutil.copy(path, tmp_path)
  data = datasets.load(sources.settings("squad", tmp_path, tmp_path / "cache", skip_bad=empty))
  assert data.summary["skipped"] == ({"empty text": empty} if empty else {})
  questions, titles = {}, {}
  for path in tmp_path.glob("*.json"):
    for article in json.loads(path.read_text())["data"]:
      for paragraph in article["paragraphs"]:
        titles[paragraph["context"]] = article["title"]
        questions |= {each["id"]: (each["question"], paragraph["context"]) for each in paragraph["qas"]}
  assert sum(len(q.ids) for q in data.queries.values()) == len(questions) - empty == asked - empty
  assert len(data.corpus.ids) == len(data.corpus.texts) == len(titles)
  assert abs(len(titles) - paragraphs) <= 5  # equal paragraphs are one
  texts = list(data.corpus.texts)
  assert dict(zip(texts, data.corpus.titles)) == titles
  article_of = {}
  for split, found in data.queries.items():
    assert 0.03 < len(found.ids) / asked < 0.95
    for name, text, positives in zip(found.ids, found.texts, found.positives, strict=True):
      assert questions[name] == (text, texts[positives[0]])
      assert article_of.setdefault(titles[texts[positives[0]]], split) == split


@pytest.mark.parametrize("name", sources.SAMPLES)
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_are_the_same(read, name, suffix):
  pack = gzip.compress if suffix == ".gz" else zstandard.compress
  files = sources.SAMPLES[name]()
  assert read(name, {path + suffix: pack(content.encode()) for path, content in files.items()}) == read(name, files)


@pytest.mark.parametrize("name", sources.SAMPLES)
def test_windows_files_are_the_same(read, name):
  files = sources.SAMPLES[name]()
  windows = {path: b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode() for path, content in files.items()}
  assert read(name, windows) == read(name, files)


@pytest.mark.parametrize("name", sources.SAMPLES)
def test_what_is_prepared_comes_back(tmp_path, name):
  """Written as records and index, and read back: the rows of the checks."""
  folder = sources.write(tmp_path / "in", sources.SAMPLES[name]())
  rows, _ = sources.checked(sources.settings(name, folder, tmp_path / "other"))
  data = datasets.load(sources.settings(name, folder, tmp_path / "cache"))
  ids = list(data.corpus.ids)
  assert list(zip(ids, data.corpus.titles, data.corpus.texts)) == [row[:3] for row in rows["corpus"]]
  for split, found in data.queries.items():
    named = [[[ids[p] for p in each] for each in column] for column in (found.positives, found.negatives)]
    assert list(zip(found.ids, found.texts, *named)) == [(q, text, a, b) for q, _, text, a, b in rows[split]]


@pytest.mark.parametrize("name", sources.SAMPLES)
def test_a_missing_or_wrong_folder_is_one_line(tmp_path, name):
  (tmp_path / "empty").mkdir()
  for folder in ("nowhere", "empty"):
    with pytest.raises(UserError, match=folder) as error:
      sources.checked(sources.settings(name, tmp_path / folder, tmp_path / "cache"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sources.SAMPLES)
def test_a_changed_file_is_another_data_set(tmp_path, name):
  folder = sources.write(tmp_path, sources.SAMPLES[name]())
  source = importlib.import_module(f"ernie_jax.datasets.{name}")
  builder = lambda **more: source.builder(sources.settings(name, folder, tmp_path / "cache", **more), tmp_path)
  before = builder().builder_config.name
  assert builder().builder_config.name == before
  assert builder(skip_bad=1).builder_config.name != before
  for path in sources.SAMPLES[name]():
    content = (folder / path).read_bytes()
    (folder / path).write_bytes(content + b" ")
    assert builder().builder_config.name != before, path
    (folder / path).write_bytes(content)


def test_bad_lines_are_skipped_and_counted(read):
  """The next one is an error that says how many of which kind there were."""
  files = {name: content.encode() for name, content in sources.msmarco().items()}
  whole, _ = read("msmarco", files)
  files["collection.tsv"] += (
    b"one column\np6\tno UTF-8: \xff\np0\tanother text\np0\t" + TEXT["p0"].encode() + b"\np7\t \n"
  )
  files["qrels.dev.small.tsv"] += b"q98\t0\tp1\t1\n"
  found, left = read("msmarco", files, skip_bad=5)
  assert found == whole
  kinds = ["wrong number of columns", "not UTF-8", "duplicate id", "empty text", "unknown query"]
  assert sorted(left["skipped"]) == sorted(kinds)
  assert set(left["skipped"].values()) == {1}
  message = refusal(read, "msmarco", files, skip_bad=4)
  assert "qrels.dev.small.tsv:5: " in message
  assert "--skip-bad" in message
  assert all(f"1 {kind}" in message for kind in kinds[:4])


def test_a_data_set_says_what_it_left_out(tmp_path, capsys):
  files = sources.msmarco()
  files["collection.tsv"] += "one column\n"
  settings = sources.settings("msmarco", sources.write(tmp_path / "in", files), tmp_path / "cache", skip_bad=3)
  for _ in range(2):  # prepared, and read back
    data = datasets.load(settings)
    assert data.summary["skipped"] == {"wrong number of columns": 1}
    assert data.summary["left_out"] == {"queries without judgements": 1}
    assert data.summary["rows"] == {"corpus": 6, "train": 10, "dev": 1, "test": 3}
  assert capsys.readouterr().err.splitlines() == [
    "  skipped: 1 wrong number of columns",
    "  left out: 1 queries without judgements",
  ]


def test_texts_are_identified_by_title_and_text(tmp_path):
  rows = [("a", "", "x"), ("b", "t", "x"), ("c", "", "x"), ("d", "t", "x"), ("e", "", "y")]
  files = {"corpus.jsonl": dumps(*({"id": i, "title": t, "text": x} for i, t, x in rows))}
  files |= {f"{s}.jsonl": dumps({"id": "q", "text": "?", "positives": ["c"]}) for s in QUERIES}
  data = datasets.load(sources.settings("jsonl", sources.write(tmp_path / "in", files), tmp_path / "cache"))
  assert data.corpus.identity.tolist() == [0, 1, 0, 1, 4]
  assert data.corpus.identity.dtype == np.int32
  assert list(data.corpus.passages) == ["x", "t: x", "x", "t: x", "y"]
  assert data.corpus.lookup(["d", "z", "a"]).tolist() == [3, -1, 0]


def test_settings_that_do_not_fit():
  with pytest.raises(UserError, match=r"data\.folder"):
    config.Data(name="squad")
  with pytest.raises(UserError, match=r"data\.skip_bad"):
    config.Data(skip_bad=-1)
