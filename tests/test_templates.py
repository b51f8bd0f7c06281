"""Rows of tokens as BERT, RocketQA and ColBERT read them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Ids

from ernie_jax import batches, config, scores, templates, tokens

DATA = config.Data(query_length=8, passage_length=10)


@pytest.fixture(scope="module")
def t():
  return tokens.Tokenizer.train(["a few words of no meaning"], 60)


def test_rows_are_laid_out_as_bert_reads_them(t):
  rows = templates.rows([[np.array([9, 8]), np.array([7])], [np.array([6]), np.array([], int)]], 7, t)
  assert rows.tokens.tolist() == [[t.cls, 9, 8, t.sep, 7, t.sep, t.pad], [t.cls, 6, t.sep, t.sep] + [t.pad] * 3]
  assert rows.types.tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]]
  assert rows.segments.tolist() == [[1] * 6 + [0], [1] * 4 + [0] * 3]
  assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3] + [0] * 3]


def words(*tokens: int) -> np.ndarray:
  return np.array(tokens, np.int32)


def test_titles_apart_are_rows_as_rocketqa_reads_them(t):
  """[CLS] title [SEP] text [SEP], the text of type 1; with the query, [CLS] query [SEP] title text [SEP]."""
  template = templates.Template(t, dataclasses.replace(DATA, template="rocketqa"))
  stored = [
    words(20, 21, t.sep, 22, 23),
    words(t.sep, 24),
    words(*range(20, 29), t.sep, 30),
    words(*range(20, 32), t.sep),
  ]
  parts = [template.passage(tokens) for tokens in stored]
  rows = template.passages(parts, 10)
  assert rows.tokens[0].tolist() == [t.cls, 20, 21, t.sep, 22, 23, t.sep, t.pad, t.pad, t.pad]
  assert rows.types[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0]
  assert rows.tokens[1].tolist() == [t.cls, t.sep, 24, t.sep] + [t.pad] * 6  # no title
  assert rows.types[1].tolist() == [0, 0, 1, 1] + [0] * 6
  assert rows.tokens[3].tolist() == [t.cls, *range(20, 27), t.sep, t.sep]  # cut within the title
  assert rows.types[3].tolist() == [0] * 9 + [1]
  pairs = template.pairs([words(9)] * 4, parts, 17)
  assert pairs.tokens[0].tolist() == [t.cls, 9, t.sep, 20, 21, 22, 23, t.sep] + [t.pad] * 9
  assert pairs.types[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1] + [0] * 9
  lengths = np.array([len(tokens) for tokens in stored])
  np.testing.assert_array_equal(template.passage_sizes(lengths), (rows.segments > 0).sum(1))
  np.testing.assert_array_equal(template.pair_sizes(np.ones(4, int), lengths), (pairs.segments > 0).sum(1))


def test_markers_and_masks_are_rows_as_colbert_reads_them(t):
  template = templates.Template(t, dataclasses.replace(DATA, markers=True, augment=True))
  query, passage = t.markers()
  rows = template.queries([words(9), template.query(words(*range(20, 40)))], 8)
  assert rows.tokens.tolist() == [[t.cls, query, 9, t.sep] + [t.mask] * 4, [t.cls, query, *range(20, 25), t.sep]]
  assert rows.segments.tolist() == [[1, 1, 1, 1, -1, -1, -1, -1], [1] * 8]
  assert rows.positions.tolist() == [list(range(8))] * 2
  assert template.passages([template.passage(words(9))], 10).tokens[0, :4].tolist() == [t.cls, passage, 9, t.sep]
  assert template.query_sizes(np.array([1, 20])).tolist() == [8, 8]
  assert set(t.markers()) <= set(t.special)


def test_masks_read_and_score_and_are_not_read(tiny_params):
  """Late interaction scores [MASK]s, what they stand beside does not change, packed or not."""
  model, params = tiny_params
  embed = jax.jit(lambda rows: scores.embed(params["student"], model, rows, None, query=True))
  parts = [[words(7, 8)], [words(9)], [words(10, 11, 12)]]
  plain, filled = embed(templates.rows(parts, 6, Ids)), embed(templates.rows(parts, 6, Ids, augment=6))
  places = batches.first_fit(np.full(3, 6), 12, 2)
  packed = embed(templates.rows(parts, 12, Ids, augment=6, places=places, count=2, longest=6))
  np.testing.assert_allclose(filled.vector, plain.vector, rtol=1e-5, atol=1e-6)
  there = np.asarray(plain.mask)
  np.testing.assert_allclose(filled.tokens[there], plain.tokens[there], rtol=1e-5, atol=1e-6)
  assert filled.mask.all()
  np.testing.assert_array_equal(filled.content & there, plain.content)
  for name in ("vector", "tokens", "mask"):
    np.testing.assert_allclose(getattr(packed, name), getattr(filled, name), rtol=1e-4, atol=1e-5)


def test_pair_attention_finds_tokens_beside_markers_and_titles(t):
  """Token by token, whatever stands around it in the student's rows and is not in the pair."""
  data = dataclasses.replace(DATA, template="rocketqa", markers=True, passage_length=12)
  template = templates.Template(t, data)
  query, stored = words(20, 21), [words(30, 31, t.sep, 32, 33, 34), words(t.sep, 35), words(36, t.sep, 37)]
  parts = [template.passage(tokens) for tokens in stored]
  places = batches.first_fit(template.pair_sizes(np.full(3, 2), np.array([6, 2, 3])), 24, 2)
  packed = template.pairs([query] * 3, parts, 24, places=places, count=2, longest=data.pair_length)
  queries, passages = template.queries([query], 8), template.passages(parts, 12)
  for pairs in (template.pairs([query] * 3, parts, data.pair_length), packed):
    read, there = pairs.tokens[:, :, None], pairs.tokens[:, None, :]
    attention = jnp.asarray(1000.0 * read + there)  # names both tokens
    found = np.asarray(scores.pair_attention(attention, *jax.tree.map(jnp.asarray, (pairs, passages)), 8))
    for i in range(3):
      for a in (2, 3):
        for b in np.flatnonzero(passages.tokens[i] >= 30):
          assert found[i, a, b] == 1000.0 * queries.tokens[0, a] + passages.tokens[i, b]
