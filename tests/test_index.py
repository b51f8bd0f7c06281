"""Indexes: exact ones give what exact search gives, approximate ones what they say; never another model's."""

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ernie_jax import index, topk
from ernie_jax.config import UserError

ABOUT = {"model": "a1" * 8, "corpus": "c1" * 8}


def content(count, about=ABOUT, seed=0, width=32):
  """Clustered unit vectors; the first of every hundred stands there a second time."""
  rng = np.random.default_rng(seed)
  centres = rng.standard_normal((40, width))
  vectors = centres[np.arange(count) % 40] + rng.standard_normal((count, width))
  vectors[50::100] = vectors[: len(vectors[50::100]) * 100 : 100]
  vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
  name = [str(i) for i in range(count)]
  return index.Content(vectors, name, [f"title {i}" for i in name], [f"text {i} \u00fc" for i in name], about)


def queries(of, count=20):
  rng = np.random.default_rng(5)
  return (of.vectors[rng.integers(0, len(of.vectors), count)] + 0.1 * rng.standard_normal((count, 32))).astype(
    np.float32
  )


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """The address of a Milvus server: Milvus Lite, which speaks the same protocol, on a port."""
  milvus = pytest.importorskip("milvus_lite.adapter.grpc.server")
  place = str(tmp_path_factory.mktemp("server") / "data.db")
  running, db, port = milvus.start_server_in_thread(data_dir=place, host="127.0.0.1", port=0)
  yield f"milvus:http://127.0.0.1:{port}"
  running.stop(grace=0)
  db.close()


def name_of(kind, tmp_path, request):
  if kind == "server":
    return request.getfixturevalue("server")
  return f"milvus:{tmp_path / 'lite.db'}" if kind == "lite" else kind


@pytest.mark.parametrize("kind", ["flat", "lite", "server"])
def test_exact_indexes_find_what_exact_search_finds(kind, tmp_path, request):
  of, name = content(700), name_of(kind, tmp_path, request)
  built = index.build(name, tmp_path, of)
  if kind != "server":  # on a server the index is a graph; Milvus Lite looks at all
    assert built.about["measured"] == [[0, 1.0, 1.0, pytest.approx(built.about["measured"][0][3])]]
  asked = queries(of)
  expected = topk.top_k(asked, of.vectors, 10)
  for found in (built.search(asked, 10), index.open(name, tmp_path, of).search(asked, 10)):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["hnsw", "ivfpq"])
def test_approximate_indexes_tell_their_recall_and_it_is_true(kind, tmp_path):
  of = content(2000)
  built = index.build(kind, tmp_path, of)
  *_, last = built.about["measured"]
  assert min(last[1:3]) >= index.ENOUGH
  assert built.table().splitlines()[-1].split()[1] == f"{last[1]:.3f}"
  opened = index.open(kind, tmp_path, of)
  rows = np.sort(np.random.default_rng(0).choice(2000, index.SAMPLE, replace=False, shuffle=False))
  exact, found = (own[1] for own in (topk.top_k(of.vectors[rows], of.vectors, 11), opened.search(of.vectors[rows], 11)))
  hits = [len((set(a) & set(b)) - {row}) / 10 for a, b, row in zip(exact.tolist(), found.tolist(), rows)]
  assert np.mean(hits) == pytest.approx(last[1], abs=0.03)  # there, equal scores count as found
  scores, rows = opened.search(queries(of), 5)
  np.testing.assert_allclose(scores, np.einsum("qh,qkh->qk", queries(of), of.vectors[rows]), rtol=1e-5)  # exact ones


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq", "lite"])
def test_a_corpus_that_grew_is_added(kind, tmp_path, request):
  whole, name = content(900), name_of(kind, tmp_path, request)
  part = index.Content(whole.vectors[:600], whole.ids[:600], whole.titles[:600], whole.texts[:600], ABOUT)
  grown = index.Content(whole.vectors, whole.ids, whole.titles, whole.texts, {**ABOUT, "corpus": ABOUT["corpus"]})
  index.build(name, tmp_path, part)
  with pytest.raises(UserError, match="600 of 900 passages"):
    index.open(name, tmp_path, grown)
  built = index.build(name, tmp_path, grown)
  assert len(built) == len(index.open(name, tmp_path, grown)) == 900
  found = built.search(whole.vectors[[650, 899]], 1)[1]
  assert found[:, 0].tolist() in ([600, 899], [650, 899])  # row 650 is a copy of row 600


@pytest.mark.parametrize(("total", "trained"), [(2000, 600), (2500, 2500)])
def test_growth_under_a_new_fingerprint_adds_and_another_corpus_begins_anew(tmp_path, total, trained):
  """What was there is known by its ids and vectors; ivfpq learns again when its lists are four times too few."""
  whole = content(total)
  part = index.Content(whole.vectors[:600], whole.ids[:600], whole.titles[:600], whole.texts[:600], ABOUT)
  grown = index.Content(whole.vectors, whole.ids, whole.titles, whole.texts, {**ABOUT, "corpus": "c2" * 8})
  index.build("ivfpq", tmp_path, part)
  with pytest.raises(UserError, match="of corpus c1c1c1c1c1c1, but the collection is of corpus c2c2c2c2c2c2"):
    index.open("ivfpq", tmp_path, grown)
  assert index.build("ivfpq", tmp_path, grown).about["trained"] == trained
  assert len(index.open("ivfpq", tmp_path, grown)) == total
  other = index.Content(whole.vectors, ["x", *whole.ids[1:]], whole.titles, whole.texts, ABOUT)
  assert index.build("ivfpq", tmp_path, other).about["trained"] == total


KILLED = """
import os, signal, sys
from pathlib import Path
import test_index
from ernie_jax import index

class Deadly(list):
  def __getitem__(self, row):
    if 550 in (range(*row.indices(len(self))) if isinstance(row, slice) else [row]):
      os.kill(os.getpid(), signal.SIGKILL)
    return super().__getitem__(row)

name, place, rows = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
of = test_index.content(rows)
ids, texts = (Deadly(of.ids), of.texts) if name in index.FAISS else (of.ids, Deadly(of.texts))
index.BLOCK, index.INSERTED = 256, 32
index.build(name, place, index.Content(of.vectors, ids, of.titles, texts, of.about))
"""


@pytest.mark.parametrize("kind", ["flat", "lite"])
def test_a_killed_build_leaves_what_was_there_and_the_next_one_completes_it(kind, tmp_path, request):
  name, of = name_of(kind, tmp_path, request), content(700)
  for rows, code in ((300, 0), (700, -signal.SIGKILL)):  # killed in the midst of a block
    command = [sys.executable, "-c", KILLED, name, str(tmp_path), str(rows)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
  with pytest.raises(UserError, match="300 of 700 passages, or not finished"):
    index.open(name, tmp_path, of)
  if kind == "lite":
    import pymilvus

    client = pymilvus.MilvusClient(name.removeprefix("milvus:"))
    (collection,) = client.list_collections()
    count = lambda: client.query(collection, output_fields=["count(*)"])[0]["count(*)"]
    assert count() == 300 + (550 - 300) // 32 * 32  # some of the block came in, and do not count
  built = index.build(name, tmp_path, of)
  np.testing.assert_array_equal(built.search(queries(of), 10)[1], topk.top_k(queries(of), of.vectors, 10)[1])
  assert built.about["measured"][0][1:3] == [1.0, 1.0]
  assert index.build("flat", tmp_path, of).about["digest"] == built.about["digest"]  # as if never interrupted
  if kind == "lite":
    assert count() == 700


def test_few_passages_fill_up_with_none(tmp_path):
  of = content(3)
  scores, rows = index.build("flat", tmp_path, of).search(queries(of, 2), 5)
  assert (rows[:, 3:] == -1).all()
  assert np.isneginf(scores[:, 3:]).all()
  assert sorted(rows[0, :3].tolist()) == [0, 1, 2]
  with pytest.raises(UserError, match="at least 256 passages, here are 3; take flat"):
    index.build("ivfpq", tmp_path, of)
  with pytest.raises(UserError, match="no passages"):
    index.build("flat", tmp_path, content(0))


@pytest.mark.parametrize("kind", ["flat", "lite", "server"])
def test_another_model_s_index_is_refused(kind, tmp_path, request):
  of, name = content(300, about={**ABOUT, "corpus": f"{kind:0>16}"}), name_of(kind, tmp_path, request)
  index.build(name, tmp_path, of)
  other = index.Content(of.vectors, of.ids, of.titles, of.texts, {**of.about, "model": "b2" * 8})
  with pytest.raises(UserError, match="of model a1a1a1a1a1a1, but the collection is of model b2b2b2b2b2b2") as error:
    index.open(name, tmp_path, other)
  assert "\n" not in str(error.value)
  index.open(name, tmp_path, of)


@pytest.mark.parametrize("how", ["cut", "empty", "missing", "garbage"])
@pytest.mark.parametrize("file", ["index.faiss", "about.json"])
def test_damage_is_one_line_and_building_mends_it(tmp_path, file, how):
  of = content(300)
  index.build("flat", tmp_path, of)
  path = tmp_path / "flat" / file
  raw = path.read_bytes()
  if how == "missing":
    path.unlink()
  else:
    path.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "garbage": b"\xff" * len(raw)}[how])
  if (file, how) == ("index.faiss", "garbage"):
    path.write_bytes(b"\xff" * len(raw))
  with pytest.raises(UserError, match="`ernie-jax index DIR --index flat` builds it") as error:
    index.open("flat", tmp_path, of)
  assert "\n" not in str(error.value)
  index.build("flat", tmp_path, of)
  index.open("flat", tmp_path, of)


def test_vectors_that_are_not_finite_leave_the_old_index(tmp_path):
  of = content(300)
  index.build("flat", tmp_path, of)
  bad = of.vectors.copy()
  bad[7, 3] = np.nan
  with pytest.raises(UserError, match="passage '7'"):
    index.build("flat", tmp_path, index.Content(bad, of.ids, of.titles, of.texts, {**ABOUT, "model": "x"}))
  assert len(index.open("flat", tmp_path, of)) == 300
  assert [path.name for path in tmp_path.iterdir()] == ["flat"]


def test_milvus_keeps_ids_titles_and_texts_beside_the_vectors(tmp_path):
  pymilvus = pytest.importorskip("pymilvus")
  of = content(300)
  long = "\u4e2d" * 30_000  # 90,000 bytes: more than Milvus takes, cut between characters
  texts = [long, *of.texts[1:]]
  index.build(f"milvus:{tmp_path / 'x.db'}", tmp_path, index.Content(of.vectors, of.ids, of.titles, texts, ABOUT))
  client = pymilvus.MilvusClient(str(tmp_path / "x.db"))
  (collection,) = client.list_collections()
  rows = client.query(collection, filter="row in [0, 299]", output_fields=["id", "title", "text"])
  found = {row["id"]: (row["title"], row["text"]) for row in rows}
  assert found == {"0": ("title 0", long[:21_845]), "299": ("title 299", "text 299 \u00fc")}
  about = json.loads(client.describe_collection(collection)["properties"]["ernie_jax"])
  assert (about["model"], about["corpus"], about["rows"]) == (ABOUT["model"], ABOUT["corpus"], 300)


@pytest.mark.parametrize(
  ("name", "says"),
  [
    ("scann", "known are flat, hnsw, ivfpq, milvus:PATH.db and milvus:http://HOST:19530"),
    ("milvus:", "no such index"),
    ("milvus:x", r"ends in \.db"),
    ("milvus:FILE.db", "no Milvus Lite database"),
    ("milvus:FILE.db/y.db", "cannot be made"),
  ],
)
def test_a_wrong_name_is_one_line(tmp_path, name, says):
  (tmp_path / "FILE.db").write_text("something else")
  with pytest.raises(UserError, match=says) as error:
    index.build(name.replace("FILE", str(tmp_path / "FILE")), tmp_path, content(10))
  assert "\n" not in str(error.value)
  assert (tmp_path / "FILE.db").read_text() == "something else"


def test_a_database_that_another_process_holds_is_one_line(tmp_path, capfd):
  lite = pytest.importorskip("milvus_lite.db")
  held = lite.MilvusLite(str(tmp_path / "x.db"))
  with pytest.raises(UserError, match=r"cannot open it: .*lock") as error:
    index.build(f"milvus:{tmp_path / 'x.db'}", tmp_path, content(10))
  held.close()
  assert "\n" not in str(error.value)
  assert "Traceback" not in "".join(capfd.readouterr())  # which Milvus Lite would print
  index.build(f"milvus:{tmp_path / 'x.db'}", tmp_path, content(10))


@pytest.mark.parametrize("package", ["pymilvus", "milvus_lite"])
def test_without_milvus_it_says_what_to_install(tmp_path, monkeypatch, package):
  monkeypatch.setitem(sys.modules, package, None)  # what an import finds that is not installed
  with pytest.raises(UserError, match=rf"needs {package}; pip install 'ernie-jax\[milvus\]'"):
    index.build(f"milvus:{tmp_path / 'x.db'}", tmp_path, content(10))


def test_a_server_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
  pytest.importorskip("pymilvus")
  monkeypatch.setattr(index, "CONNECT", 1)
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    found = []

    def ask():
      try:
        index.build(f"milvus:http://127.0.0.1:{port}", tmp_path, content(10))
      except UserError as error:
        found.append(str(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(30)
  assert len(found) == 1
  assert "no answer from Milvus" in found[0]
  assert "\n" not in found[0]
