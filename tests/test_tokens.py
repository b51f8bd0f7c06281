"""Tokenizer and token store: round trips, reuse, and files cut short."""

import json

import numpy as np
import pytest

from ernie_jax import tokens
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


def test_store_holds_every_text(tokenizer, tmp_path):
  store = tokens.build(tmp_path / "s", TEXTS, tokenizer, block=2)
  memory = tokens.in_memory(TEXTS, tokenizer)
  assert len(store) == len(TEXTS)
  assert store.tokens.dtype == np.uint16
  for row, piece in enumerate(tokenizer.encode(TEXTS)):
    np.testing.assert_array_equal(store[row], piece)
    np.testing.assert_array_equal(memory[row], piece)
  np.testing.assert_array_equal(store.lengths, memory.lengths)


def test_store_of_nothing(tokenizer, tmp_path):
  assert len(tokens.build(tmp_path / "s", [], tokenizer)) == 0
  assert tokens.build(tmp_path / "t", [""], tokenizer).lengths.tolist() == [0]


def test_store_is_reused_when_equal_and_made_anew_when_not(tokenizer, tmp_path):
  tokens.build(tmp_path / "s", TEXTS, tokenizer)
  stamp = (tmp_path / "s" / "tokens.bin").stat().st_mtime_ns
  tokens.build(tmp_path / "s", TEXTS, tokenizer)
  assert (tmp_path / "s" / "tokens.bin").stat().st_mtime_ns == stamp
  changed = tokens.build(tmp_path / "s", [*TEXTS[:3], "zeros"], tokenizer)
  np.testing.assert_array_equal(changed[3], tokenizer.encode(["zeros"])[0])
  assert not list(tmp_path.glob("*.writing-*"))


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "store.json"])
@pytest.mark.parametrize("size", [0, 7])
def test_a_store_cut_short_is_made_anew(tokenizer, tmp_path, name, size):
  tokens.build(tmp_path / "s", TEXTS, tokenizer)
  path = tmp_path / "s" / name
  path.write_bytes(path.read_bytes()[:size])
  store = tokens.build(tmp_path / "s", TEXTS, tokenizer)
  for row, piece in enumerate(tokenizer.encode(TEXTS)):
    np.testing.assert_array_equal(store[row], piece)
