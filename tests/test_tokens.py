"""Tokenizer and token store: round trips, reuse, and files cut short."""

import dataclasses
import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest

from ernie_jax import config, tokens
from ernie_jax.config import UserError

TEXTS = ["Pad an array with zeros.", "Return the sum of all elements.", "", "pad, pad, pad"]


@pytest.fixture(scope="module")
def tokenizer():
  return tokens.Tokenizer.train(TEXTS * 3, 200)


def test_a_vocabulary_from_a_corpus_loses_nothing(tokenizer):
  ids = tokenizer.encode(["pad an array"])[0]
  assert tokenizer.backend.decode(ids.tolist()) == "pad an array"
  assert not set(ids.tolist()) & set(tokenizer.special)
  assert tokenizer.backend.id_to_token(tokenizer.cls) == "[CLS]"


def test_the_same_corpus_gives_the_same_vocabulary(tokenizer):
  again = tokens.Tokenizer.train(TEXTS * 3, 200)
  assert again.backend.to_str() == tokenizer.backend.to_str()


def test_saved_and_loaded_tokenizers_are_equal(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "t")
  loaded = tokens.Tokenizer.load(tmp_path / "t")
  assert loaded.backend.get_vocab() == tokenizer.backend.get_vocab()
  for a, b in zip(loaded.encode(TEXTS), tokenizer.encode(TEXTS)):
    np.testing.assert_array_equal(a, b)


def test_vocab_txt_alone_is_enough(tmp_path):
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pad", "an", "array"]
  (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
  loaded = tokens.Tokenizer.load(tmp_path)
  assert len(loaded) == len(words)
  assert loaded.encode(["Pad an ARRAY"])[0].tolist() == [5, 6, 7]


def test_settings_left_in_a_released_tokenizer_do_not_cut_texts(tokenizer, tmp_path):
  tokenizer.save(tmp_path)
  settings = json.loads((tmp_path / "tokenizer.json").read_text())
  settings["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
  (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
  assert len(tokens.Tokenizer.load(tmp_path).encode(["pad an array with zeros"])[0]) >= 5


@pytest.mark.parametrize("damage", ["missing", "not json", "no special tokens"])
def test_a_directory_without_a_usable_tokenizer(tmp_path, damage):
  if damage == "not json":
    (tmp_path / "tokenizer.json").write_text("{")
  if damage == "no special tokens":
    (tmp_path / "vocab.txt").write_text("[UNK]\na\nb\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
  with pytest.raises(UserError, match=str(tmp_path)) as error:
    tokens.Tokenizer.load(tmp_path)
  assert "\n" not in str(error.value)


def dataset(texts, fingerprint="f", titles=None):
  corpus = SimpleNamespace(titles=titles or [""] * len(texts), texts=texts, passages=texts)
  return SimpleNamespace(corpus=corpus, queries={"dev": SimpleNamespace(texts=texts[:2])}, fingerprint=fingerprint)


def test_store_holds_every_text(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(tokens, "BLOCK", 2)
  data = config.Data(cache=str(tmp_path))
  store = tokens.store(dataset(TEXTS), "corpus", tokenizer, data)
  memory = tokens.in_memory(TEXTS, tokenizer)
  assert len(store) == len(TEXTS)
  assert store.values.dtype == np.uint16
  for row, piece in enumerate(tokenizer.encode(TEXTS)):
    np.testing.assert_array_equal(store[row], piece)
    np.testing.assert_array_equal(memory[row], piece)
  np.testing.assert_array_equal(store.lengths, memory.lengths)
  assert len(tokens.store(dataset(TEXTS), "dev", tokenizer, data)) == 2


@pytest.mark.parametrize("texts", [[], [""]])
def test_store_of_nothing(tokenizer, tmp_path, texts):
  found = tokens.store(dataset(texts), "corpus", tokenizer, config.Data(cache=str(tmp_path)))
  assert found.lengths.tolist() == [0] * len(texts)


def test_store_is_reused_when_equal_and_made_anew_when_not(tokenizer, tmp_path, monkeypatch):
  """Another data set, another vocabulary or titles kept apart make another store."""
  written = []
  write = tokens.write
  monkeypatch.setattr(tokens, "write", lambda *args: written.append(1) or write(*args))
  data = config.Data(cache=str(tmp_path))
  other = tokens.Tokenizer.train(TEXTS, 60)
  for texts, name, own, settings in (
    (TEXTS, "f", tokenizer, data),
    ([*TEXTS[:3], "zeros"], "g", tokenizer, data),
    (TEXTS, "f", other, data),
    (TEXTS, "f", tokenizer, dataclasses.replace(data, template="rocketqa")),
  ):
    for _ in range(2):
      made = tokens.store(dataset(texts, name), "corpus", own, settings)
      before = len(written)
    assert len(written) == before
    assert len(made) == len(texts)
  assert len(written) == 4
  assert not list((tmp_path / "tokens").glob("*.writing-*"))


def test_a_store_cut_short_is_made_anew(tokenizer, tmp_path):
  data = config.Data(cache=str(tmp_path))
  tokens.store(dataset(TEXTS), "corpus", tokenizer, data)
  (folder,) = (path for path in (tmp_path / "tokens").iterdir() if path.is_dir())
  for path in sorted(folder.iterdir()):
    path.write_bytes(path.read_bytes()[:7])
    store = tokens.store(dataset(TEXTS), "corpus", tokenizer, data)
    for row, piece in enumerate(tokenizer.encode(TEXTS)):
      np.testing.assert_array_equal(store[row], piece)


def test_titles_are_kept_apart_by_a_sep_that_no_text_can_forge(tokenizer, tmp_path):
  data = config.Data(cache=str(tmp_path), template="rocketqa")
  own = dataset(["pad an [SEP] array", "zeros"], titles=["array [SEP]", ""])
  store = tokens.store(own, "corpus", tokenizer, data)
  title, text, other = tokenizer.encode(["array [SEP]", "pad an [SEP] array", "zeros"])
  assert tokenizer.sep not in np.concatenate([title, text])
  assert store[0].tolist() == [*title, tokenizer.sep, *text]
  assert store[1].tolist() == [tokenizer.sep, *other]


def test_lines_of_files_are_texts_kept_by_their_content(tokenizer, tmp_path):
  """Plain and packed; lines without text are none. One that is no UTF-8 is named, or left out where that is allowed."""
  first, second, data = tmp_path / "a.txt", tmp_path / "b.txt.gz", config.Data(cache=str(tmp_path / "cache"))
  first.write_text("pad an array\n\n  \nzeros\n")
  second.write_bytes(gzip.compress(b"sum of all\r\npad"))
  for _ in range(2):
    found = tokens.store_lines([first, second], tokenizer, data)
    expected = tokenizer.encode(["pad an array", "zeros", "sum of all", "pad"])
    assert [row.tolist() for row in found] == [row.tolist() for row in expected]
  assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2  # one column, and the lock
  first.write_bytes(b"zeros\npad \xff\n")
  with pytest.raises(UserError, match=r"a\.txt:2: byte 5 of the line is not UTF-8"):
    tokens.store_lines([first], tokenizer, data)
  assert len(tokens.store_lines([first], tokenizer, dataclasses.replace(data, skip_bad=1))) == 1
  with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read"):
    tokens.store_lines([tmp_path / "nowhere.txt"], tokenizer, data)


def test_titles_have_a_store_of_their_own(tokenizer, tmp_path):
  found = tokens.store(
    dataset(["pad", "sum"], titles=["zeros", ""]), "titles", tokenizer, config.Data(cache=str(tmp_path))
  )
  assert [row.tolist() for row in found] == [tokenizer.encode(["zeros"])[0].tolist(), []]


def test_what_a_killed_process_left_is_taken_away(tokenizer, tmp_path):
  left = tmp_path / "tokens" / "0123456789abcdef.writing-4711"
  left.mkdir(parents=True)
  tokens.store(dataset(TEXTS), "corpus", tokenizer, config.Data(cache=str(tmp_path)))
  assert not left.exists()


def test_a_vocabulary_with_a_line_twice_is_as_long_as_its_numbers_say(tmp_path):
  (tmp_path / "vocab.txt").write_text("\n".join([*tokens.SPECIAL, "pad", "pad", "zeros"]) + "\n")
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
  loaded = tokens.Tokenizer.load(tmp_path)
  assert loaded.encode(["zeros"])[0].tolist() == [7]
  assert len(loaded) == 8
