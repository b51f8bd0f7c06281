"""An encoded corpus on disk: what is read is what was encoded, after interruptions too; damage and mix-ups are told."""

import dataclasses
import os
import resource

import jax
import numpy as np
import pytest
from test_retrieval import made, texts  # noqa: F401 (a fixture)

from ernie_jax import collection, config, mesh, retrieval, templates, topk
from ernie_jax.config import UserError

DATA = config.Data(query_length=12, passage_length=40)


@pytest.fixture
def written(texts, tmp_path, monkeypatch):  # noqa: F811
  """Writes the 90 passages in shards of 40: (what encoding them gives, a function that writes them to a folder)."""
  tokenizer, passages, _ = texts
  monkeypatch.setattr(collection, "SHARD", 40)
  model, params = made(tokenizer)
  template = templates.Template(tokenizer, DATA)
  ids = [f"p{i}" for i in range(90)]
  collection.write_texts(tmp_path, ids, [""] * 90, [f"text {i}" for i in range(90)], "abc")

  def write(place=tmp_path, params=params, corpus="abc", **settings):
    with jax.set_mesh(mesh.make()):
      collection.write(place, params["student"], model, passages, template, ".", corpus, **settings)

  with jax.set_mesh(mesh.make()):
    whole = retrieval.encode(params["student"], model, passages, template, query=False, late=True, progress="")
  return whole, write, tmp_path


@pytest.mark.parametrize(("late", "dtype"), [("no", "float32"), ("16", "float16"), ("8", "float32")])
def test_what_is_read_is_what_was_encoded(written, late, dtype):
  whole, write, place = written
  write(late=late, dtype=dtype)
  found = collection.load(place)
  assert np.diff(found.vectors.begins).tolist() == [40, 40, 10]
  # Shards are packed apart, so sums differ in their last digits, and rounding to float16 may go the other way.
  apart = 1e-6 + 1e-5 * np.abs(whole.vectors)
  assert (found.vectors[:] >= (whole.vectors - apart).astype(dtype)).all()
  assert (found.vectors[:] <= (whole.vectors + apart).astype(dtype)).all()
  assert (found.passages.ids[41], found.passages.texts[89]) == ("p41", "text 89")
  np.testing.assert_array_equal(found.passages.order, topk.trec_order([f"p{i}" for i in range(90)]))
  if late == "no":
    assert found.tokens is None
    return
  rows = np.array([2, 3, 39, 40, 80, 89])  # from all shards, over a boundary
  got, expected = found.tokens(rows), retrieval.some(retrieval.whole(whole), rows)
  np.testing.assert_array_equal(got.offsets, expected.offsets)
  error = 2e-3 if late == "16" else np.abs(expected.values.astype(np.float32)).max(1, keepdims=True) / 254 + 2e-3
  assert (np.abs(got.values.astype(np.float32) - expected.values) <= error).all()


def test_eight_bits_are_off_by_half_a_step_and_keep_zero():
  vectors = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float16)
  vectors[7] = 0
  scaled, scales = collection.eight_bits(vectors)
  assert (scaled.dtype, np.abs(scaled).max()) == (np.int8, 127)
  largest = np.abs(vectors.astype(np.float32)).max(1, keepdims=True)
  step = largest / 127
  # half a step, and what float16 rounds off the scale: 127 steps times 2^-11
  assert (np.abs(scaled * scales.astype(np.float32) - vectors) <= step * (0.5 + 127 * 2**-11) + 1e-6).all()
  assert not scaled[7].any()


def test_an_interrupted_call_continues_where_it_was(written, monkeypatch):
  _, write, place = written
  write(late="16")
  before = {path: path.read_bytes() for path in place.rglob("*.npy")}
  for name in ("tokens", "vectors"):  # killed after the first shard's vectors, while tokens of the next were written
    (place / name / "00002.npy").unlink()
  (place / "vectors" / "00001.npy").unlink()
  (place / "tokens" / "00001.npy").write_bytes(b"half")
  (place / "tokens" / "00001.npy.writing-1").write_bytes(b"half")
  with pytest.raises(UserError, match="shard 1 of 3 is missing"):
    collection.load(place)
  encoded, encode = [], retrieval.encode
  monkeypatch.setattr(retrieval, "encode", lambda *a, **k: encoded.append(len(a[2])) or encode(*a, **k))
  write(late="16")
  assert encoded == [40, 10]
  assert {path: path.read_bytes() for path in place.rglob("*.npy")} == before
  assert not list(place.rglob("*.writing-*"))
  write(late="16")
  assert encoded == [40, 10]  # nothing is left to do


def test_what_a_killed_call_left_and_a_lost_file_are_mended(written):
  _, write, place = written
  write(late="8")
  before = {path: path.read_bytes() for path in place.rglob("*.npy")}
  (place / "passages" / "ids.writing-7").mkdir()
  (place / "passages" / "ids.writing-7" / "values.bin").write_bytes(b"half")
  for name in ("tokens/00001.npy", "scales/00002.npy"):
    (place / name).unlink()
  ids = [f"p{i}" for i in range(90)]
  collection.write_texts(place, ids, [""] * 90, [f"text {i}" for i in range(90)], "abc")
  write(late="8")
  assert {path: path.read_bytes() for path in place.rglob("*.npy")} == before
  assert not list(place.rglob("*.writing-*"))


def test_more_shards_than_files_may_be_open(tmp_path):
  whole = np.arange(400.0).reshape(200, 2)
  files = [tmp_path / f"{i}.npy" for i in range(200)]
  for file, row in zip(files, whole):
    collection.save(file, row[None])
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  here = len(os.listdir("/proc/self/fd"))
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, here + collection.OPEN + 30), hard))
  try:
    np.testing.assert_array_equal(collection.Shards(files, range(201))[np.arange(200)], whole)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_another_model_corpus_or_setting_is_told(written, texts):  # noqa: F811
  _, write, place = written
  write()
  other = made(texts[0])[1]
  kernel = other["student"].projection.kernel
  kernel[...] = kernel[...] * 1.0001
  for settings, says in (
    ({"params": other}, "model="),
    ({"corpus": "def"}, "corpus='abc', not 'def'"),
    ({"late": "8"}, "late='no', not '8'"),
    ({"dtype": "float16"}, "dtype='float32', not 'float16'"),
  ):
    with pytest.raises(UserError, match=says) as error:
      write(**settings)
    assert "\n" not in str(error.value)
  with pytest.raises(UserError, match="holds the texts of another corpus"):
    collection.write_texts(place, ["a"], [""], ["b"], "def")
  collection.load(place)


@pytest.mark.parametrize(
  "name",
  [
    "collection.json",
    "vectors/00001.npy",
    "tokens/00000.npy",
    "offsets.npy",
    "passages/ids/values.bin",
    "passages/order.npy",
  ],
)
@pytest.mark.parametrize("how", ["cut", "empty", "missing", "garbage"])
def test_damage_is_one_line_that_names_the_file(written, name, how):
  _, write, place = written
  write(late="16")
  path = place / name
  raw = path.read_bytes()
  if how == "missing":
    path.unlink()
  else:
    path.write_bytes({"cut": raw[: len(raw) // 2], "empty": b"", "garbage": b"\xff" * 7}[how])
  with pytest.raises(UserError) as error:
    collection.load(place)
  message = str(error.value)
  assert "\n" not in message
  assert any(said in message for said in (path.parent.name, path.name, "shard 1 of 3"))


def test_a_fingerprint_is_of_all_that_decides_a_vector(texts):  # noqa: F811
  tokenizer = texts[0]
  model, params = made(tokenizer)
  of = lambda model=model, params=params, data=DATA: collection.fingerprint(
    params["student"], model, templates.Template(tokenizer, data)
  )
  again = made(tokenizer)[1]
  assert of() == of(params=again)
  bias = again["student"].encoder.norm.bias
  bias[...] = bias[...] + 1e-3
  others = [
    of(params=again),
    of(model=dataclasses.replace(model, cosine=True)),
    of(model=dataclasses.replace(model, pooling="mean")),
    of(data=dataclasses.replace(DATA, passage_length=30)),
    of(data=dataclasses.replace(DATA, template="rocketqa")),
  ]
  assert len({of(), *others}) == 6


def test_shards_read_as_one_array(tmp_path):
  rng = np.random.default_rng(0)
  whole, begins = rng.standard_normal((50, 3)), [0, 20, 20, 43, 50]
  files = [tmp_path / f"{i}.npy" for i in range(4)]
  for file, a, b in zip(files, begins, begins[1:]):
    collection.save(file, whole[a:b])
  found = collection.Shards(files, begins)
  assert (found.shape, len(found), found.dtype) == ((50, 3), 50, whole.dtype)
  for a, b in ((0, 50), (5, 19), (19, 21), (20, 43), (42, 50), (50, 60), (7, 7), (30, 10)):
    np.testing.assert_array_equal(found[a:b], whole[a:b])
  rows = rng.integers(0, 50, 200)
  np.testing.assert_array_equal(found[rows], whole[rows])
  with pytest.raises(UserError, match=r"1\.npy"):
    collection.Shards(files, [0, 20, 21, 43, 50])
