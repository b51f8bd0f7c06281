"""BM25 against its formula, against bm25s used in the plain way, and against what it must find."""

import math
import resource
import shutil

import bm25s
import numpy as np
import pytest
import Stemmer
from bm25s.stopwords import STOPWORDS_EN

from ernie_jax import columns
from ernie_jax.bm25 import BM25, words
from ernie_jax.config import UserError


def test_words():
  split = lambda text: set(words(text))
  assert split("numpy.linalg.lstsqSolver_x") == {
    "numpy", "linalg", "lstsq", "solver", "x", "lstsqsolver_x"
  }  # fmt: skip
  assert split("parse HTTPServer") == {"parse", "http", "server", "httpserver"}
  assert words("__init__ float32, Plain") == ["init", "float32", "plain"]
  assert words("... __") == []
  assert words("战国无双3的 numpy，我") == ["战国", "国无", "无双", "3", "的", "numpy", "我"]


PASSAGES = [
  "numpy.linalg.lstsqSolver_x: least squares by singular values of the matrix",
  "json.dumps: a string made of the object, with indented lines",
  "os.path.joinAll: one path from several parts of a path",
  "",
  "the of and",
]


def test_the_passage_itself_comes_first():
  _, rows = BM25.build(PASSAGES).search(PASSAGES[:3], 5)
  assert rows[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
  ("query", "best"),
  [("solver", 0), ("lstsqsolver_x", 0), ("SOLVERS", 0), ("indenting an objects", 1), ("join", 2)],
)
def test_identifiers_are_split_and_words_stemmed(query, best):
  scores, rows = BM25.build(PASSAGES).search([query], 3)
  assert rows.tolist() == [[best, -1, -1]]
  assert scores[0, 0] > 0
  assert scores[0, 1:].tolist() == [-math.inf] * 2


def test_nothing_to_find():
  index = BM25.build(PASSAGES)
  for query in ("the", "zebra", "", "..."):
    scores, rows = index.search([query], 100)
    assert set(rows[0].tolist()) == {-1}, query
    assert set(scores[0].tolist()) == {-math.inf}
  scores, rows = index.search([], 3)
  assert scores.shape == rows.shape == (0, 3)
  assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
  for empty in ([], ["the", ""]):
    with pytest.raises(UserError, match=f"no word in any of {len(empty)} passages"):
      BM25.build(empty)
  with pytest.raises(ValueError, match="k=0"):
    index.search(["path"], 0)


def test_the_score_is_the_formula():
  """Lucene's form: idf * tf / (tf + k1 (1 - b + b length / mean length))."""
  scores, rows = BM25.build(["red red blue", "blue", "green green green green"]).search(["red"], 3)
  idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
  assert rows.tolist() == [[0, -1, -1]]
  assert scores[0, 0] == pytest.approx(idf * 2 / (2 + 1.5 * (0.25 + 0.75 * 3 / (8 / 3))))


def test_equal_scores_come_in_the_order_of_passages():
  rng = np.random.default_rng(0)
  kinds = ["red", "red blue", "blue blue", "green"]  # three different scores for "red blue"
  drawn = rng.integers(4, size=500)
  index = BM25.build([kinds[kind] for kind in drawn])
  all_scores, all_rows = index.search(["red blue"], 600)
  found = int((drawn != 3).sum())
  score = dict(zip(all_rows[0].tolist(), all_scores[0].tolist()))
  expected = sorted(np.flatnonzero(drawn != 3).tolist(), key=lambda row: (-score[row], row))
  assert all_rows[0, :found].tolist() == expected
  assert set(all_rows[0, found:].tolist()) == {-1}
  assert len({score[row] for row in expected}) == 3
  for k in (1, 7, 100, 200, found - 1, found):  # the beginning of the same order, wherever it is cut
    scores, rows = index.search(["red blue"], k)
    assert rows[0].tolist() == expected[:k]
    assert scores[0].tolist() == all_scores[0, :k].tolist()


def docstrings(count: int) -> list[str]:
  """Of functions and classes that are installed here."""
  import inspect
  import statistics
  import subprocess
  import textwrap

  found = [
    f"{name}: {text}"
    for module in (np, np.linalg, inspect, shutil, statistics, subprocess, textwrap, math)
    for name, thing in sorted(vars(module).items())
    if (text := inspect.getdoc(thing)) and (callable(thing) or inspect.ismodule(thing))
  ]
  assert len(found) >= count
  return found[:count]


CHINESE = ["战国无双3是一款游戏", "游戏的评分 numpy", "国无 双", "東京タワーの高さは333m", "高さ制限"]


def test_scores_are_those_of_bm25s_used_in_the_plain_way():
  """Lists of strings in, its own matrix, all passages out: the same scores bit for bit, for every pair."""
  passages = docstrings(400) + CHINESE
  queries = [text.split("\n")[0] for text in passages[::5]] + [
    "无双 游戏",
    "numpy 高さ",
    "array array of arrays",
    "the",
  ]
  stemmer = Stemmer.Stemmer("english")
  stems = lambda text: stemmer.stemWords([word for word in words(text) if word not in STOPWORDS_EN])
  plain = bm25s.BM25(k1=1.5, b=0.75, method="lucene", backend="numpy")
  plain.index([stems(passage) for passage in passages], show_progress=False)
  rows, scores = plain.retrieve(
    [stems(query) for query in queries], k=len(passages), show_progress=False, backend_selection="numpy"
  )
  expected = [
    {row: score for row, score in zip(*own) if score > 0} for own in zip(rows.tolist(), scores.tolist(), strict=True)
  ]
  for k in (10, len(passages)):
    values, found = BM25.build(passages).search(queries, k)
    for i, there in enumerate(expected):
      best = sorted(there, key=lambda row: (-there[row], row))[:k]
      assert found[i].tolist() == best + [-1] * (k - len(best))
      assert values[i, : len(best)].tolist() == [there[row] for row in best]
  assert sum(map(len, expected)) > 1000


def test_an_index_that_was_kept_finds_the_same(tmp_path):
  passages = docstrings(50) + CHINESE
  with columns.Writer(tmp_path / "texts", np.uint8) as writer:
    for passage in passages:
      writer.append(passage.encode())
    writer.close()
  texts = columns.Strings(columns.matching(tmp_path / "texts"))
  built = BM25.build(texts, tmp_path / "index")
  kept = BM25.open(tmp_path / "index")
  assert len(built) == len(kept) == len(passages)
  assert isinstance(kept.index.scores["data"], np.memmap)
  for mine, theirs in zip(built.search(passages, 60), kept.search(passages, 60)):
    assert np.array_equal(mine, theirs)
  BM25.build(["only this"], tmp_path / "index")  # in its place
  assert len(BM25.open(tmp_path / "index")) == 1
  assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "texts"]


def test_a_damaged_index_is_told_in_one_line(tmp_path):
  place = tmp_path / "index"
  with pytest.raises(UserError, match="no whole index of words"):
    BM25.open(place)
  BM25.build(PASSAGES, place)
  for path in sorted(place.iterdir()):
    content = path.read_bytes()
    for damage in (None, b"", content[: len(content) // 2], content[:-1], content + b"\0"):
      path.unlink(missing_ok=True)
      if damage is not None:
        path.write_bytes(damage)
      with pytest.raises(UserError) as error:
        BM25.open(place)
      assert str(error.value).startswith(f"{place}: no whole index of words (")
      assert "\n" not in str(error.value)
    path.write_bytes(content)
  assert len(BM25.open(place)) == len(PASSAGES)


def test_a_failed_build_leaves_the_older_index_and_nothing_else(tmp_path):
  place = tmp_path / "index"
  BM25.build(["older"], place)

  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as on a full disk
  try:
    with pytest.raises(UserError, match=f"{place}: cannot be written"):
      BM25.build([f"word{i}" for i in range(2000)], place)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  with pytest.raises(UserError, match="no word"):
    BM25.build(["the"], place)
  (tmp_path / "file").touch()
  for impossible in (tmp_path / "file", tmp_path):  # a folder that holds other things is not taken away
    with pytest.raises(UserError, match="holds no index of words"):
      BM25.build(PASSAGES, impossible)
  with pytest.raises(UserError, match="cannot be written"):
    BM25.build(PASSAGES, tmp_path / "file" / "index")
  assert BM25.open(place).search(["older"], 1)[1].tolist() == [[0]]
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "index"]
