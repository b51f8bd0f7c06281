"""The user's own files: read as they are, or one line on what is wrong and where."""

import json

import pytest

from ernie_jax import config, datasets
from ernie_jax.config import UserError

FILES = {
  "corpus": [
    {"id": "p1", "title": "Padding", "text": "Zeros around an array."},
    {"id": "p2", "text": "Ünïcode, 中文."},
  ],
  "train": [{"id": "q1", "text": "pad?", "positives": ["p1", "p2", "p1"]}],
  "dev": [{"id": "q2", "text": "what?", "positives": ["p2"]}],
  "test": [{"id": "q3", "text": "how?", "positives": ["p1"]}],
}


@pytest.fixture
def folder(tmp_path):
  for name, rows in FILES.items():
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
  return tmp_path


def load(folder):
  return datasets.load(config.Data(name="jsonl", folder=str(folder), cache=str(folder / "cache")))


def test_rows_come_back_as_they_are(folder):
  data = load(folder)
  assert list(data.corpus.ids) == ["p1", "p2"]
  assert list(data.corpus.passages) == ["Padding: Zeros around an array.", "Ünïcode, 中文."]
  assert [own.tolist() for own in data.queries["train"].positives] == [[0, 1]]
  assert data.qrels("test") == {"q3": {"p1": 1}}
  assert load(folder).fingerprint == data.fingerprint


def test_a_changed_file_is_another_data_set(folder):
  before = load(folder).fingerprint
  path = folder / "dev.jsonl"
  path.write_text(path.read_text().replace("what", "which"))
  after = load(folder)
  assert after.fingerprint != before
  assert after.queries["dev"].texts[:] == ["which?"]


def test_a_byte_order_mark_and_windows_lines_are_read(folder):
  path = folder / "train.jsonl"
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
  assert load(folder).queries["train"].texts[:] == ["pad?"]


@pytest.mark.parametrize(
  ("name", "line", "says"),
  [
    ("corpus", b"{", "not a JSON object"),
    ("corpus", b"", "not a JSON object"),
    ("corpus", b"[" * 100_000, "not a JSON object"),
    ("corpus", b"[1]", "a JSON list"),
    ("corpus", b'{"id": "p3", "text": "caf\xe9"}', "not UTF-8"),
    ("corpus", b'{"id": "p3"}', '"text" is None'),
    ("corpus", b'{"id": "p3", "text": " "}', "\"text\" is ' '"),
    ("corpus", b'{"id": 3, "text": "x"}', '"id" is 3'),
    ("corpus", b'{"id": "p 3", "text": "x"}', "white space"),
    ("corpus", b'{"id": "p3", "title": 1, "text": "x"}', '"title" is 1'),
    ("corpus", b'{"id": "p1", "text": "x"}', "already that of"),
    ("train", b'{"id": "q9", "text": "x"}', '"positives" is None'),
    ("train", b'{"id": "q9", "text": "x", "positives": []}', '"positives" is []'),
    ("train", b'{"id": "q9", "text": "x", "positives": "p1"}', "\"positives\" is 'p1'"),
    ("train", b'{"id": "q9", "text": "x", "positives": ["p9"]}', "'p9' is not in the corpus"),
    ("train", b'{"id": "q1", "text": "x", "positives": ["p1"]}', "already that of"),
  ],
)
def test_a_bad_line_is_named(folder, name, line, says):
  path = folder / f"{name}.jsonl"
  path.write_bytes(path.read_bytes() + line + b"\n")
  number = len(path.read_bytes().splitlines())
  with pytest.raises(UserError) as error:
    load(folder)
  assert f"{name}.jsonl:{number}: " in str(error.value)
  assert says in str(error.value)
  assert "\n" not in str(error.value)
  assert not list((folder / "cache").rglob("*.array_record*"))


@pytest.mark.parametrize("harm", ["cut", "emptied", "taken away"])
def test_a_damaged_cache_is_one_line(folder, harm):
  """Whichever of its files is damaged; those that hold nothing cannot be cut."""
  whole = load(folder)
  for path in sorted(p for p in (folder / "cache").rglob("*") if p.is_file() and p.name != "lock"):
    content = path.read_bytes()
    path.unlink()
    if harm != "taken away":
      path.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    if path.exists() and path.read_bytes() == content:
      continue
    message = ""
    try:
      again = load(folder)
    except UserError as error:
      message = str(error)
    if message or path.name != "features.json":  # which TFDS does without
      assert "delete this folder" in message, path
      assert "\n" not in message
    else:
      assert list(again.corpus.passages) == list(whole.corpus.passages)
    path.write_bytes(content)
  assert load(folder).qrels("train") == whole.qrels("train")


def test_damage_within_a_file_is_one_line_when_it_is_read(folder):
  data = load(folder)
  for path in (folder / "cache").rglob("*corpus.array_record*"):
    path.write_bytes(bytes(len(path.read_bytes())))
  for texts in (lambda: load(folder).corpus.texts[0], lambda: list(load(folder).corpus.passages)):
    with pytest.raises(UserError, match="delete this folder") as error:
      texts()
    assert "\n" not in str(error.value)
  assert list(data.corpus.ids) == ["p1", "p2"]


def test_a_corpus_alone_is_a_data_set_without_queries(folder):
  for split in ("train", "dev", "test"):
    (folder / f"{split}.jsonl").unlink()
  found = load(folder)
  assert list(found.corpus.ids) == ["p1", "p2"]
  assert [len(found.queries[split].ids) for split in ("train", "dev", "test")] == [0, 0, 0]
  (folder / "corpus.jsonl").unlink()
  with pytest.raises(UserError, match=r"corpus\.jsonl"):
    load(folder)


@pytest.mark.parametrize(
  ("name", "how"),
  [("corpus", "missing"), ("corpus", "empty"), ("corpus", "directory"), ("dev", "empty"), ("dev", "directory")],
)
def test_a_file_that_is_none_is_named(folder, name, how):
  path = folder / f"{name}.jsonl"
  path.unlink()
  if how == "empty":
    path.write_text("")
  if how == "directory":
    path.mkdir()
  with pytest.raises(UserError, match=f"{name}.jsonl") as error:
    load(folder)
  assert "\n" not in str(error.value)
