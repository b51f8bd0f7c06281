"""Pseudo-queries: what was taken out, what is left, and what counts as the same."""

import dataclasses
import itertools

import numpy as np
import pytest

from ernie_jax import columns, config, pseudo, tokens
from ernie_jax.config import UserError

DATA = config.Data(query_length=14, passage_length=64)
SENTENCES = ["Pad an array with zeros on every side of it.", "Is the sum of all the elements what you want?"]
SENTENCES += ["Version 3.14 of it has more of the same names!", "And here stands what no stop ever ends, at length"]
TITLES = ["pad", "", "sum of all", "", "pad"]
TEXTS = [" ".join(SENTENCES), " ".join(SENTENCES[1:]), SENTENCES[0] + " " + SENTENCES[1], "Too short.", SENTENCES[2]]
TEXTS[4] += " " + SENTENCES[3]
ROWS = np.arange(5, dtype=np.int32)


@pytest.fixture(scope="module")
def tokenizer():
  return tokens.Tokenizer.train([*TEXTS, *TITLES, "title: [SEP]"], 400)


def stores(tokenizer, template="bert"):
  titles, texts = tokenizer.encode(TITLES), tokenizer.encode(TEXTS)
  joint, sep = tokenizer.encode([":"])[0], np.array([tokenizer.sep])
  apart = template == "rocketqa"
  whole = [np.concatenate([a, sep if apart else joint if len(a) else a, b]) for a, b in zip(titles, texts)]
  if not apart:  # so is a passage as a data set has it
    for own, title, text in zip(whole, TITLES, TEXTS):
      assert own.tolist() == tokenizer.encode([columns.passage(title, text)])[0].tolist()
  return columns.ragged(whole), columns.ragged(titles), texts


def made(place, tokenizer, kind, template="bert", seed=0, identity=ROWS):
  passages, titles, texts = stores(tokenizer, template)
  data = dataclasses.replace(DATA, template=template)
  found = pseudo.pairs(place, passages, titles, identity, tokenizer, data, kind, seed)
  return [[row.tolist() for row in store] for store in found[:2]], found[2].tolist(), passages, titles, texts


def without(whole, part):
  """Where the part was taken out of the whole: what is left in each case."""
  places = range(len(whole) - len(part) + 1)
  return [whole[:i] + whole[i + len(part) :] for i in places if whole[i : i + len(part)] == part]


@pytest.mark.parametrize("template", ["bert", "rocketqa"])
def test_a_title_finds_its_text_without_it(tokenizer, tmp_path, template):
  (queries, passages), _, whole, titles, texts = made(tmp_path, tokenizer, "title", template)
  sep = [tokenizer.sep] if template == "rocketqa" else []
  titled = [row for row in ROWS if TITLES[row]]
  expected = [(titles[row].tolist(), sep + texts[row].tolist()) for row in titled]
  assert [pair for pair in zip(queries, passages)] != []
  cloze = [pair for pair in zip(queries, passages) if pair not in expected]
  assert len(cloze) == 1  # of the two without a title one is too short
  assert len(queries) == len(expected) + 1
  assert cloze[0][1] in without(whole[1].tolist(), cloze[0][0])


@pytest.mark.parametrize("template", ["bert", "rocketqa"])
def test_a_sentence_is_taken_out_of_its_passage(tokenizer, tmp_path, template):
  """Always a whole sentence up to the longest query, never of the title; another seed takes others."""
  seen = set()
  for seed in range(12):
    (queries, passages), _, whole, titles, texts = made(tmp_path / str(seed), tokenizer, "cloze", template, seed)
    assert len(queries) == 4
    for row, query, passage in zip((0, 1, 2, 4), queries, passages):
      assert passage in without(whole[row].tolist(), query)
      assert passage[: titles.lengths[row]] == titles[row].tolist()
      text = texts[row].tolist()
      begins = {begin for begin, _ in pseudo.sentences(texts[row], tokenizer.encode([". ! ?"])[0])}
      assert any(text[begin : begin + len(query)] == query for begin in begins)
      assert 0 < len(query) <= DATA.query_length - 2
      seen.add((row, tuple(query)))
  assert {len({query for r, query in seen if r == row}) for row in (0, 2)} == {4, 2}


def test_sentences_are_neighbours_and_a_stop_in_a_number_ends_none(tokenizer):
  stops = tokenizer.encode([". ! ?"])[0]
  found = pseudo.sentences(tokenizer.encode([TEXTS[0]])[0], stops)
  ends = np.cumsum([len(own) for own in tokenizer.encode(SENTENCES)]).tolist()
  assert found == list(itertools.pairwise([0, *ends]))


def test_a_text_of_one_sentence_gives_a_quarter_of_it():
  text, rng = np.arange(100, 140), np.random.default_rng(0)
  found = {pseudo.cloze(text, np.array([5]), 32, rng) for _ in range(400)}
  assert {end - begin for begin, end in found} == {10}
  assert {begin for begin, _ in found} == set(range(31))


def test_what_has_the_same_title_text_or_origin_is_no_negative(tokenizer, tmp_path):
  _, identity, *_ = made(tmp_path / "title", tokenizer, "title")
  assert identity == [0, 1, 2, 0]  # both are called "pad"
  copies = np.array([0, 1, 1, 3, 4], np.int32)
  _, identity, *_ = made(tmp_path / "copies", tokenizer, "title", identity=copies)
  assert identity == [0, 1, 1, 0]
  assert pseudo.same([0, 1, 2, 3, 4], [7, 8, 8, 9, 6], [1, 2, 3, 3, 4]).tolist() == [0, 1, 1, 1, 4]


def test_pairs_are_made_once_and_a_killed_attempt_again(tokenizer, tmp_path):
  first = made(tmp_path, tokenizer, "cloze", seed=1)[:2]
  assert made(tmp_path, tokenizer, "cloze", seed=2)[:2] == first
  (tmp_path / "passages" / "about.json").unlink()
  assert made(tmp_path, tokenizer, "cloze", seed=1)[:2] == first


def test_a_corpus_without_a_pair_is_refused(tokenizer, tmp_path):
  short = columns.ragged([np.arange(5, 9, dtype=np.int32)])
  with pytest.raises(UserError, match="no passage is long enough for a pseudo-query"):
    pseudo.pairs(tmp_path, short, columns.ragged([short[0][:0]]), ROWS[:1], tokenizer, DATA, "cloze", 0)
  assert not list(tmp_path.iterdir())
