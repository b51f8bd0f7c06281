"""Batches: layout, order, resumption, and negatives that are none."""

import jax
import numpy as np
import pytest

from ernie_jax import batches, config, tokens

QUERIES = [f"query number {i}" for i in range(23)]
PASSAGES = [f"passage {i} answers query number {i} at some length" for i in range(23)] + [
  "a copy",
  "a copy",
  "other",
]
DATA = config.Data(query_length=8, passage_length=10)
TRAIN = config.Train(steps=5, batch=8, negatives=2)


@pytest.fixture(scope="module")
def texts():
  tokenizer = tokens.Tokenizer.train(QUERIES + PASSAGES, 300)
  positives = [np.array([i]) for i in range(23)]
  positives[4] = np.array([4, 23])  # row 24 has the text of row 23
  negatives = [np.array([(i + 1) % 23, (i + 2) % 23, 25]) for i in range(23)]
  negatives[4] = np.array([24, 23, 4])  # nothing here may be served
  return batches.Texts(
    tokens.in_memory(QUERIES, tokenizer),
    tokens.in_memory(PASSAGES, tokenizer),
    batches.identities(PASSAGES),
    positives,
    negatives,
    tokenizer,
  )


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def test_identities_name_the_first_copy():
  assert batches.identities(["a", "b", "a", "c", "b"]).tolist() == [0, 1, 0, 3, 1]


def test_rows_are_laid_out_as_bert_reads_them(texts):
  t = texts.tokenizer
  rows = batches.rows([[np.array([9, 8]), np.array([7])], [np.array([6])]], 7, t)
  assert rows.tokens.tolist() == [[t.cls, 9, 8, t.sep, 7, t.sep, t.pad], [t.cls, 6, t.sep] + [t.pad] * 4]
  assert rows.types.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0] * 7]
  assert rows.segments.tolist() == [[1] * 6 + [0], [1] * 3 + [0] * 4]
  assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2] + [0] * 4]


def test_a_pair_holds_the_tokens_of_its_query_and_passage(texts):
  batch = next(batches.batches(texts, DATA, TRAIN, 0))
  for i in range(len(batch.texts)):
    content = lambda rows, row: rows.tokens[row][rows.segments[row] > 0].tolist()
    query, passage = content(batch.queries, i // 3), content(batch.passages, i)
    assert content(batch.pairs, i) == query + passage[1:]
    assert len(passage) <= DATA.passage_length
    assert len(query) <= DATA.query_length


def test_the_order_follows_from_the_seed(texts):
  a, b, c = (take(batches.batches(texts, DATA, TRAIN, seed), 7) for seed in (3, 3, 4))
  same = lambda x, y: all(np.array_equal(m, n) for m, n in zip(jax.tree.leaves(x), jax.tree.leaves(y)))
  assert same(a, b)
  assert not same(a, c)


def test_every_query_comes_once_an_epoch_in_a_new_order(texts):
  train = config.Train(steps=5, batch=23, negatives=1)
  epochs = [batch.known[:, 0].tolist() for batch in take(batches.batches(texts, DATA, train, 0), 2)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(23))
  assert epochs[0] != epochs[1]


def test_a_restored_position_gives_the_very_next_batch(texts):
  iterator = batches.batches(texts, DATA, TRAIN, 0)
  take(iterator, 4)  # past the end of the first epoch
  position = iterator.get_state()
  expected = take(iterator, 3)
  other = batches.batches(texts, DATA, TRAIN, 0)
  other.set_state(position)
  for a, b in zip(expected, take(other, 3)):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
      np.testing.assert_array_equal(x, y)


def test_hosts_make_their_own_rows_of_one_global_batch_and_may_change_in_number(texts):
  """Rows of two hosts, also where the mesh does not give a host neighbouring rows, together are one host's batch."""
  whole = batches.batches(texts, DATA, TRAIN, 0)
  take(whole, 3)
  position = whole.get_state()
  expected = take(whole, 2)
  lists = 1 + TRAIN.negatives
  for shares in (np.split(np.arange(TRAIN.batch), 2), (np.arange(0, TRAIN.batch, 2), np.arange(1, TRAIN.batch, 2))):
    for rows in shares:
      host = batches.batches(texts, DATA, TRAIN, 0, rows)
      host.set_state(position)
      for own, batch in zip(take(host, 2), expected, strict=True):
        passages = (rows[:, None] * lists + np.arange(lists)).ravel()
        np.testing.assert_array_equal(own.queries.tokens, batch.queries.tokens[rows])
        np.testing.assert_array_equal(own.known, batch.known[rows])
        np.testing.assert_array_equal(own.texts, batch.texts[passages])
        np.testing.assert_array_equal(own.pairs.tokens, batch.pairs.tokens[passages])


def test_no_known_positive_and_no_copy_of_one_is_a_negative(texts):
  for seed in range(40):
    for query in range(23):
      own = batches.choose(texts, query, 4, np.random.default_rng(seed))
      assert own[0] in texts.positives[query]
      assert len(set(own.tolist())) == 5
      known = texts.identity[texts.positives[query]]
      assert not np.isin(texts.identity[own[1:]], known).any()


def test_hard_negatives_are_served_before_random_ones(texts):
  own = batches.choose(texts, 0, 3, np.random.default_rng(0))
  assert sorted(own[1:].tolist()) == [1, 2, 25]


def test_known_positives_are_named_by_text(texts):
  batch = batches.gather([(4, np.array([4, 1])), (0, np.array([0, 24]))], texts, DATA, 2)
  assert batch.known.tolist() == [[4, 23], [0, -1]]
  assert batch.texts.tolist() == [4, 1, 0, 23]  # row 24 counts as row 23, whose text it has
