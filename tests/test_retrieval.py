"""Encoding and re-ranking in packed rows, against one text at a time; fusion, against its definition."""

import functools
import operator

import jax
import numpy as np
import pytest
from conftest import WORDS

from ernie_jax import columns, config, mesh, retrieval, scores, step, templates, tokens

ABSENT = (-np.inf, -1)
DATA = config.Data(query_length=12, passage_length=40)


@pytest.fixture(scope="module")
def texts():
  """A tokenizer, 90 passages of 1 to 60 words (some are cut, some are alone in a row) and 7 queries."""
  rng = np.random.default_rng(0)
  text = lambda most: " ".join(rng.choice(WORDS, rng.integers(1, most)))
  passages, queries = [text(60) for _ in range(90)], [text(14) for _ in range(7)]
  tokenizer = tokens.Tokenizer.train(passages + queries, 120)
  return tokenizer, *(tokens.in_memory(own, tokenizer) for own in (passages, queries))


def made(tokenizer, **settings):
  """(model, parameters) for this vocabulary."""
  a = config.Architecture(
    vocabulary=len(tokenizer), width=16, layers=2, heads=2, inner=32, positions=64, special=tokenizer.special
  )
  model = config.Model(late_width=8, **settings)
  return model, step.init_params(model, a, a, jax.random.key(0))


SETTINGS = {
  "first token": ({}, {}),
  "mean, cosine, untied": ({"pooling": "mean", "cosine": True, "tied": False}, {}),
  "ColBERT": ({}, {"markers": True, "augment": True}),
  "RocketQA": ({}, {"template": "rocketqa"}),
}


@pytest.mark.parametrize("query", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_texts_are_encoded_as_each_alone(texts, name, query):
  settings, options = SETTINGS[name]
  tokenizer, passages, queries = texts
  model, params = made(tokenizer, **settings)
  template = templates.Template(tokenizer, config.Data(query_length=12, passage_length=40, **options))
  store = queries if query else passages
  if options.get("template"):
    sep = np.array([tokenizer.sep], np.int32)
    store = columns.ragged([np.concatenate([own[: len(own) // 3], sep, own[len(own) // 3 :]]) for own in store])
  with jax.set_mesh(mesh.make()):
    late = retrieval.encode(params["student"], model, store, template, query=query, late=True, progress="")
    only = retrieval.encode(params["student"], model, store, template, query=query, late=False, progress="")
  np.testing.assert_allclose(only.vectors, late.vectors, rtol=1e-5, atol=1e-6)
  assert only.tokens.size == 0
  sizes = (template.query_sizes if query else template.passage_sizes)(store.lengths)
  for i in range(0, len(store), 1 if query else 9):
    part, lay = (template.query, template.queries) if query else (template.passage, template.passages)
    alone = scores.embed(params["student"], model, lay([part(store[i])], int(sizes[i])), None, query)
    np.testing.assert_allclose(late.vectors[i], alone.vector[0], rtol=1e-4, atol=1e-5)
    own = late.tokens[late.offsets[i] : late.offsets[i + 1]]
    np.testing.assert_allclose(own, alone.tokens[0], atol=2e-3)  # kept as float16
    assert alone.mask.all()


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("longest", [9, 40, 512])
def test_units_hold_every_text_once_and_their_shapes_repeat(devices, longest):
  sizes = np.random.default_rng(longest).integers(2, longest + 1, 700)
  seen, shapes = [], set()
  for made in retrieval.units(sizes, longest, devices):
    assert len(made) == devices
    assert len({(unit.count, unit.length) for unit in made}) == 1
    for unit in {id(unit): unit for unit in made}.values():
      shapes.add((unit.count, unit.length))
      seen += unit.texts.tolist()
      own = sizes[unit.texts]
      taken = np.concatenate([np.arange(p, p + n) for p, n in zip(unit.places, own)])
      assert len(set(taken.tolist())) == len(taken)  # apart
      assert (unit.places // unit.length == (unit.places + own - 1) // unit.length).all()  # none over a row's end
      assert taken.min() >= 0
      assert taken.max() < unit.count * unit.length
      assert np.bincount(unit.places // unit.length).max() <= retrieval.SHARED
  assert sorted(seen) == list(range(700))
  assert len(shapes) <= 3


def test_late_interaction_is_three_loops_whatever_the_memory(texts, monkeypatch):
  rng = np.random.default_rng(1)
  some = lambda n: retrieval.Encoded(
    np.zeros((n, 4), np.float32),
    rng.standard_normal((5 * n, 4)).astype(np.float16),
    np.concatenate([[0], np.sort(rng.choice(np.arange(1, 5 * n), n - 1, replace=False)), [5 * n]]),
  )
  queries, passages = some(6), some(20)
  candidates = np.stack([rng.permutation(20)[:8] for _ in range(6)])
  candidates[2, 5:] = candidates[4] = -1
  expected = np.full((6, 8), -np.inf)
  wide = [[e.tokens[a:b].astype(float) for a, b in zip(e.offsets, e.offsets[1:])] for e in (queries, passages)]
  for i, row in np.ndindex(6, 8):
    if candidates[i, row] >= 0:
      expected[i, row] = sum(max(a @ b for b in wide[1][candidates[i, row]]) for a in wide[0][i])
  asked = []

  def fetch(rows):
    asked.append(len(rows))
    return retrieval.some(retrieval.whole(passages), rows)

  for memory in (2**31, 1200, 1):
    monkeypatch.setattr(retrieval, "MEMORY", memory)
    found = retrieval.rerank_late(queries, candidates, fetch, each=100)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert asked[0] > max(asked[1:]) >= 8  # less at once


def test_the_cross_encoder_scores_pairs_as_each_alone(texts):
  tokenizer, passages, queries = texts
  _, params = made(tokenizer)
  template = templates.Template(tokenizer, DATA)
  rng = np.random.default_rng(2)
  candidates = np.stack([rng.permutation(90)[:6] for _ in range(7)])
  candidates[3, 4:] = -1
  with jax.set_mesh(mesh.make()):
    found = retrieval.rerank_cross(params, queries, passages, candidates, template)
  assert np.isneginf(found[3, 4:]).all()
  for i, j in ((0, 0), (1, 5), (3, 3), (6, 2)):
    pair = template.pairs([template.query(queries[i])], [template.passage(passages[candidates[i, j]])], 51)
    assert found[i, j] == pytest.approx(float(scores.cross(params, pair, None)[0][0]), abs=1e-5)


def test_reordered_by_score_ties_as_they_were():
  values, rows = retrieval.reorder(np.array([[5, 3, 9, -1]]), np.array([[1.0, 2.0, 2.0, -np.inf]]))
  assert rows.tolist() == [[3, 9, 5, -1]]
  assert values.tolist() == [[2, 2, 1, -np.inf]]


def fuse_by_hand(rankings, k, c):
  """Of each query, (score, row) best first; a row's parts are added in the order of its ranks."""
  result = []
  for own in zip(*(found.tolist() for _, found in rankings)):
    ranks = {}
    for found in own:
      for rank, row in enumerate(found, 1):
        if row >= 0:
          ranks.setdefault(row, []).append(rank)
    total = lambda own: functools.reduce(operator.add, [1 / (c + rank) for rank in sorted(own)])
    best = sorted(((total(own), row) for row, own in ranks.items()), key=lambda item: (-item[0], item[1]))[:k]
    result.append(best + [ABSENT] * (k - len(best)))
  return result


def random_ranking(rng, queries, depth, passages):
  rows = np.stack([rng.permutation(passages)[:depth] for _ in range(queries)])
  for own in rows:
    own[rng.integers(depth + 1) :] = -1  # some found little, some nothing
  return rng.normal(size=rows.shape).astype(np.float32), rows


@pytest.mark.parametrize("seed", range(20))
def test_fusion_is_its_definition(seed):
  rng = np.random.default_rng(seed)
  depths = rng.integers(1, 30, size=rng.integers(1, 5))
  rankings = [random_ranking(rng, 7, depth, 40) for depth in depths]
  k, c = int(rng.integers(1, 60)), int(rng.choice([0, 1, 60]))
  scores, rows = retrieval.fuse(rankings, k, c)
  expected = fuse_by_hand(rankings, k, c)
  assert rows.tolist() == [[row for _, row in own] for own in expected]
  assert scores.tolist() == [[score for score, _ in own] for own in expected]


def test_the_paper_s_constant_and_ties():
  ranking = lambda *rows: (np.zeros((1, len(rows)), np.float32), np.array([rows]))
  scores, rows = retrieval.fuse([ranking(7, 3, 5), ranking(3, 7, 2)], 5)
  assert rows.tolist() == [[3, 7, 2, 5, -1]]
  assert scores[0] == pytest.approx([1 / 61 + 1 / 62] * 2 + [1 / 63] * 2 + [-np.inf])
  # The same three ranks from any rankings: exactly the same sum.
  cyclic = [ranking(*np.roll(np.arange(3), shift)) for shift in range(3)]
  scores, rows = retrieval.fuse(cyclic, 3)
  assert rows.tolist() == [[0, 1, 2]]
  assert len(set(scores[0].tolist())) == 1


def test_one_ranking_keeps_its_order_and_none_found_is_none():
  rows = np.array([[4, 0, 9, -1], [-1, -1, -1, -1]])
  scores, fused = retrieval.fuse([(np.zeros((2, 4)), rows)], 4)
  assert fused.tolist() == rows.tolist()
  assert scores[1].tolist() == [-np.inf] * 4
  nothing = np.zeros((0, 4), np.int64)
  assert retrieval.fuse([(nothing, nothing)], 3)[1].shape == (0, 3)
