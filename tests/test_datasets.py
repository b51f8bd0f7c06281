"""The docstrings of a small tree, row for row; the standard library's, from sources to cache and back."""

import dataclasses
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ernie_jax import datasets, tokens
from ernie_jax.config import Data, UserError
from ernie_jax.datasets import docstrings

BODY = "It walks the whole tree from its root to its leaves and counts what it meets on the way there."
OTHER = "A file that is missing raises an error which names the folder where it was sought and the time of day."


def body(word: str) -> str:
  """Fifteen words that share next to nothing with those of another word."""
  return " ".join(f"{word}{i}" for i in "abcdefghijklmno")


def write(root: Path, files: dict[str, str | bytes]) -> None:
  for name, text in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def named(root: Path) -> dict[str, str]:
  modules, _ = docstrings.parse(docstrings.tree(root))
  return dict(docstrings.name_docs(modules))


def docs(*rows: tuple[str, str, str]) -> list[docstrings.Doc]:
  return [docstrings.Doc(name, f"{summary}\n\n{text}") for name, summary, text in rows]


def queries(rows) -> dict[str, tuple[str, ...]]:
  return {row.text: row.positives for split in datasets.SPLITS for row in rows[split]}


def test_nesting_and_private_names(tmp_path):
  source = '''"""Module."""
class Tree:
  """Class."""
  class Node:
    """Inner class."""
    async def walk(self):
      """Method."""
      def local():
        """Local."""
  def _hidden(self):
    """Private method."""
if True:
  def choose():
    """Conditional."""
else:
  def choose():
    """Other branch."""
class _Secret:
  """Private class."""
  def method(self):
    """Method of a private class."""
def bare():
  pass
'''
  write(tmp_path, {"shop/__init__.py": "", "shop/trees.py": source, "shop/_inner.py": '"""Private."""'})
  write(tmp_path, {"shop/tests/test_trees.py": '"""Test."""', "shop/test_more.py": '"""Test."""'})
  assert named(tmp_path) == {
    "shop.trees": "Module.",
    "shop.trees.Tree": "Class.",
    "shop.trees.Tree.Node": "Inner class.",
    "shop.trees.Tree.Node.walk": "Method.",
    "shop.trees.choose": "Conditional.",
  }


def test_names_are_those_that_a_user_would_import(tmp_path):
  write(
    tmp_path,
    {
      "shop/__init__.py": "from ._impl import pad, _own\nfrom .trees import Tree\nfrom ._more import *",
      "shop/_impl.py": 'def pad():\n  "Pad."\ndef _own():\n  "Own."\ndef left_out():\n  "Out."',
      "shop/trees.py": 'from ._impl import left_out\nclass Tree:\n  "Tree."\n  def cut(self):\n    "Cut."',
      "shop/_more.py": '__all__ = ["norm"]\nclass gen:\n  "Norm."\nnorm = gen()\ndef other():\n  "Other."',
      "shop/deep/__init__.py": "from shop._impl import pad as pad",
    },
  )
  # `left_out` is only used by shop.trees, not offered by it; shop.pad is shorter than shop.deep.pad.
  assert named(tmp_path) == {
    "shop.pad": "Pad.",
    "shop.Tree": "Tree.",
    "shop.Tree.cut": "Cut.",
    "shop.norm": "Norm.",
  }


def test_add_newdoc(tmp_path):
  source = """
add_newdoc("shop._core", "array", "Make.")
add_newdoc("shop._core", "array", ("shape", "Size."))
extra.add_newdoc("shop._core", "array", [("T", "Turned."), ("flat", computed)])
add_newdoc("gamma", "Gamma.")
add_newdoc("shop._core", "skipped", computed)
"""
  write(tmp_path, {"shop/__init__.py": "from ._core import array", "shop/_docs.py": source})
  assert named(tmp_path) == {
    "shop.gamma": "Gamma.",
    "shop.array": "Make.",
    "shop.array.shape": "Size.",
    "shop.array.T": "Turned.",
  }


def test_files_that_do_not_parse_are_counted(tmp_path):
  write(
    tmp_path,
    {
      "bad.py": '"""Bad."""\ndef (:',
      "nul.py": b'"""Nul."""\0',
      "unknown.py": b'# coding: no-such\n"""Unknown."""',
      "undeclared.py": b'"""Caf\xe9."""',
      "latin.py": b'# -*- coding: latin-1 -*-\n"""Caf\xe9."""',
      "good.py": '"""Good \\d."""',
    },
  )
  modules, skipped = docstrings.parse(docstrings.tree(tmp_path))
  assert skipped == 4
  assert dict(docstrings.name_docs(modules)) == {"good": "Good \\d.", "latin": "Café."}


def test_divide():
  text = """pad(array, width)

    Pad an ``array`` with
    :func:`zeros <numpy.zeros>`, *quickly*.

    Notes
    -----
    More in :class:`~numpy.ndarray`, as in::

        code = here

    .. versionadded:: 1.2

    >>> pad(1)
    2

    The end.
    """
  summary, rest = docstrings.divide(text)
  assert summary == "Pad an array with zeros, quickly."
  assert rest == "Notes More in numpy.ndarray, as in. The end."
  assert docstrings.divide("Make a mock. It has these:\n\n  a") == ("Make a mock.", "It has these: a")


@pytest.mark.parametrize(
  ("summary", "good"),
  [
    ("Return the number of days.", True),
    ("Return the days.", False),
    ("word " * 41, False),
    ("Create one of these two things:", False),
    ("width (int): the number of columns", False),
    (":param width: the number of columns", False),
    ("TODO: find out what this does", False),
    ("Возвращает число дней в месяце года.", False),
    ("1 + 2 = 3 * 4 / 5 - 6", False),
  ],
)
def test_queries_are_what_a_person_could_type(summary, good):
  assert docstrings.is_query(summary.strip()) == good


def test_duplicates_collapse_and_summaries_gather_positives():
  rows = docstrings.make_rows(
    docs(
      ("a.one", "Count the leaves of trees.", BODY),
      ("a.two", "Count all leaves of forests.", BODY.replace("there.", "home.")),
      ("a.three", "count the leaves, of trees", OTHER),
      ("a.four", "Too short a body here.", "Not twelve words."),
    )
  )
  assert rows["corpus"] == [datasets.Row("a.one", "a.one", BODY), datasets.Row("a.three", "a.three", OTHER)]
  assert queries(rows) == {
    "Count the leaves of trees.": ("a.one", "a.three"),
    "Count all leaves of forests.": ("a.one",),
  }


def test_a_summary_of_too_many_bodies_is_dropped():
  rows = lambda count: docstrings.make_rows(
    docs(*((f"a.{word}", "Do what is usually done.", body(word)) for word in "pqrstuvwx"[:count]))
  )
  assert len(rows(8)["corpus"]) == 8
  assert queries(rows(8)) == {"Do what is usually done.": tuple(f"a.{word}" for word in "pqrstuvw")}
  assert not any(rows(9).values())


def test_unknown_package(tmp_path):
  with pytest.raises(UserError, match=r"data\.packages.*'no-such-package'.*pip install no-such-package"):
    datasets.load(Data(packages=("python", "no-such-package"), cache=str(tmp_path)))


def test_a_cache_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"data\.cache"):
    datasets.load(Data(packages=("optax",), cache=str(tmp_path / "file")))


def test_versions_name_the_data_set(tmp_path, monkeypatch):
  name = lambda: docstrings.builder(Data(packages=("python", "numpy")), tmp_path).builder_config.name
  before = name()
  assert before == name()
  assert before != docstrings.builder(Data(packages=("python",)), tmp_path).builder_config.name
  real = importlib.metadata.version
  upgraded = lambda package: "99" if package == "numpy" else real(package)
  monkeypatch.setattr(importlib.metadata, "version", upgraded)
  assert before != name()


LOAD = """
import json, sys
from ernie_jax import config, datasets
data = datasets.load(config.Data(packages=("python",), cache=sys.argv[1]))
print(json.dumps([data.fingerprint, "tensorflow" in sys.modules]))
"""


def command(cache: Path, seed: int) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", LOAD, str(cache)],
    env={**os.environ, "PYTHONHASHSEED": str(seed)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
  """(the data set of the standard library, its settings)"""
  settings = Data(packages=("python",), cache=str(tmp_path_factory.mktemp("cache")))
  return datasets.load(settings), settings


def test_standard_library(library):
  data, _ = library
  corpus = data.corpus
  assert 1000 < len(corpus.ids) < 6000
  assert len(set(corpus.ids)) == len(corpus.ids) == len(corpus.texts) == len(corpus.passages)
  row = corpus.lookup(["asyncio.run"])[0]
  assert corpus.passages[row].startswith("asyncio.run: This function runs the passed coroutine")
  every = [query for queries in data.queries.values() for query in queries.ids]
  assert len(set(every)) == len(every)
  assert 0.07 < len(data.queries["test"].ids) / len(every) < 0.13
  assert 0.03 < len(data.queries["dev"].ids) / len(every) < 0.07
  for split, queries in data.queries.items():
    assert data.qrels(split).keys() == set(queries.ids)
    for text, positives in zip(queries.texts, queries.positives, strict=True):
      assert docstrings.is_query(text)
      assert 0 < len(positives) == len(set(positives.tolist()))
      assert 0 <= min(positives) <= max(positives) < len(corpus.ids)
  assert all(docstrings.is_passage(text) for text in corpus.texts)


def test_no_summary_is_in_two_splits(library):
  data, _ = library
  summaries = {split: set(map(docstrings.normalise, queries.texts)) for split, queries in data.queries.items()}
  assert not summaries["train"] & summaries["test"]
  assert not summaries["dev"] & (summaries["train"] | summaries["test"])
  assert sum(map(len, summaries.values())) == sum(len(queries.ids) for queries in data.queries.values())


def test_a_second_load_reads_the_same(library, capfd):
  data, settings = library
  again = datasets.load(settings)
  assert again.fingerprint == data.fingerprint
  assert list(again.corpus.passages) == list(data.corpus.passages)
  assert again.qrels("dev") == data.qrels("dev")
  assert capfd.readouterr() == ("", "")


def test_fewer_training_queries_are_rows_of_the_whole(library):
  """Each with its own text, positives and tokens; those among few are among more; all else stays."""
  data, settings = library
  few, more = (datasets.load(dataclasses.replace(settings, train_queries=count)) for count in (40, 300))
  assert few.fingerprint == data.fingerprint
  assert few.qrels("test") == data.qrels("test")
  every, tokenizer = data.queries["train"], tokens.Tokenizer.train(data.corpus.passages, 500)
  whole = tokens.store(data, "train", tokenizer, settings)
  for found, count in ((few, 40), (more, 300)):
    own = found.queries["train"]
    rows = [every.ids.index(name) for name in own.ids]
    assert len(rows) == count
    assert rows == sorted(set(rows))
    assert rows != list(range(count))
    assert list(own.texts) == [every.texts[row] for row in rows]
    assert own.texts[3:5] == list(own.texts)[3:5]
    for mine, all_of_them in ((own.positives, every.positives), (own.negatives, every.negatives)):
      assert [x.tolist() for x in mine] == [all_of_them[row].tolist() for row in rows]
    stored = tokens.store(found, "train", tokenizer, dataclasses.replace(settings, train_queries=count))
    assert [x.tolist() for x in stored] == [whole[row].tolist() for row in rows]
  assert set(few.queries["train"].ids) < set(more.queries["train"].ids)


@pytest.mark.parametrize(("count", "says"), [(0, "must be at least 1"), (10**6, "there are ")])
def test_a_number_of_training_queries_that_cannot_be(library, count, says):
  with pytest.raises(UserError, match=f"data.train_queries={count}: {says}"):
    datasets.load(dataclasses.replace(library[1], train_queries=count))


def test_a_killed_preparation_is_done_again(library, tmp_path):
  """Another hash seed, killed midway, then two processes at once: the same rows, nothing left over."""
  first = command(tmp_path, 1)
  pattern = "data/docstrings/*/incomplete.*"
  while not list(tmp_path.glob(pattern)) and first.poll() is None:
    time.sleep(0.005)
  first.send_signal(signal.SIGKILL)
  assert first.wait() == -signal.SIGKILL
  assert list(tmp_path.glob(pattern))
  first.communicate()
  outputs = [process.communicate(timeout=60) for process in [command(tmp_path, 2), command(tmp_path, 3)]]
  assert [json.loads(out) for out, _ in outputs] == [[library[0].fingerprint, False]] * 2
  assert sorted(len(err.splitlines()) for _, err in outputs) == [
    0,
    2,
  ]  # one prepared, in two lines of its own
  assert not list(tmp_path.glob(pattern))


def test_fingerprint_depends_on_the_packages(tmp_path, library):
  data, settings = library
  other = datasets.load(dataclasses.replace(settings, packages=("optax",), cache=str(tmp_path)))
  assert other.fingerprint != data.fingerprint
