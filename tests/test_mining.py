"""Mining and denoising, against their definitions in plain Python; what is written is what is read."""

import collections
import math

import numpy as np
import pytest

from ernie_jax import columns, config, datasets, evaluate, mining
from ernie_jax.config import Mine, UserError
from ernie_jax.evaluate import read_run


def problem(seed, queries=23, passages=60):
  """Small whole numbers as vectors, so that scores are exact and many are equal; texts in several copies."""
  rng = np.random.default_rng(seed)
  texts = rng.integers(0, passages // 2, passages)
  identity = np.array([np.flatnonzero(texts == text)[0] for text in texts])
  own = [rng.choice(passages, rng.integers(1, 4), replace=False).astype(np.int32) for _ in range(queries)]
  vectors = rng.integers(-2, 3, (passages, 5)).astype(np.float32)
  return rng.integers(-2, 3, (queries, 5)).astype(np.float32), vectors, columns.ragged(own), identity


def by_hand(query, vectors, positives, identity, settings, order):
  """(score, row) at the wanted ranks; what stood before them."""
  known = {int(identity[row]) for row in positives}
  ranked = sorted(range(len(vectors)), key=lambda row: (-float(query @ vectors[row]), order[row]))
  dropped, allowed = collections.Counter(positive=0, text=0), []
  for row in ranked:
    if len(allowed) == settings.last:
      break
    if row in positives:
      dropped["positive"] += 1
    elif int(identity[row]) in known:
      dropped["text"] += 1
    else:
      allowed.append(row)
  return [(float(query @ vectors[row]), row) for row in allowed[settings.first - 1 :]], dropped


@pytest.mark.parametrize(("first", "last"), [(1, 10), (4, 9), (1, 1), (30, 60)])
@pytest.mark.parametrize("seed", range(5))
def test_mining_is_its_definition(seed, first, last):
  queries, vectors, positives, identity = problem(seed)
  order = np.random.default_rng(seed).permutation(len(vectors))
  settings = Mine(first, last)
  values, rows, dropped = mining.mine(
    queries, vectors, positives, identity, settings, np.random.default_rng(0), order=order
  )
  assert rows.shape == values.shape == (len(queries), settings.wanted)
  total = collections.Counter(positive=0, text=0)
  for i, query in enumerate(queries):
    expected, own = by_hand(query, vectors, positives[i].tolist(), identity, settings, order)
    missing = settings.wanted - len(expected)
    assert list(zip(values[i].tolist(), rows[i].tolist())) == expected + [(-math.inf, -1)] * missing
    total.update(own)
  assert dropped == total


def test_copies_of_a_positive_s_text_do_not_shorten_the_list():
  """For one query of forty, thirty copies stand before the rest, more than the first search looks at."""
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(100, 8)).astype(np.float32)
  queries = rng.normal(size=(40, 8)).astype(np.float32)
  vectors[50:80] = 9 * queries[7]
  identity = np.arange(100)
  identity[50:80] = 50
  positives = columns.ragged([np.array([i]) for i in range(40)])
  positives.values[7] = 64
  settings = Mine(1, 70)
  values, rows, dropped = mining.mine(queries, vectors, positives, identity, settings, rng)
  expected, own = by_hand(queries[7], vectors, [64], identity, settings, np.arange(100))
  assert rows[7].tolist() == [row for _, row in expected]
  assert own == {"positive": 1, "text": 29}
  assert dropped["text"] == 29
  assert (rows[:7] >= 0).all()
  assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("parts", [(23,), (1, 22), (10, 3, 10)])
def test_a_sample_is_drawn_from_the_ranks_the_same_in_blocks_of_any_size(parts):
  queries, vectors, positives, identity = problem(3)
  _, every, _ = mining.mine(queries, vectors, positives, identity, Mine(3, 40), np.random.default_rng(0))
  rng, begin, drawn = np.random.default_rng(5), 0, []
  for size in parts:
    own = slice(begin, begin + size)
    known = positives.part(begin, begin + size)
    drawn.append(mining.mine(queries[own], vectors, known, identity, Mine(3, 40, sample=6), rng)[1])
    begin += size
  sample = np.concatenate(drawn)
  whole = mining.mine(queries, vectors, positives, identity, Mine(3, 40, sample=6), np.random.default_rng(5))[1]
  other = mining.mine(queries, vectors, positives, identity, Mine(3, 40, sample=6), np.random.default_rng(6))[1]
  np.testing.assert_array_equal(sample, whole)
  assert (sample != other).any()
  for chosen, line in zip(sample.tolist(), every.tolist()):
    assert [row for row in line if row in chosen] == chosen  # in their order, each once
    assert len(chosen) == 6


def test_a_sample_takes_what_there_is():
  queries, vectors, positives, identity = problem(4)
  values, rows, _ = mining.mine(queries, vectors, positives, identity, Mine(55, 60, 3), np.random.default_rng(0))
  _, every, _ = mining.mine(queries, vectors, positives, identity, Mine(55, 60), np.random.default_rng(0))
  assert ((rows >= 0).sum(1) == np.minimum(3, (every >= 0).sum(1))).all()
  assert (np.isinf(values) == (rows < 0)).all()
  assert (rows < 0).any()


def test_samples_are_uniform():
  """Each of ten ranks is drawn in 3 of 10 cases, within five standard deviations."""
  vectors = np.arange(12, dtype=np.float32)[:, None]
  queries, positives = np.ones((4000, 1), np.float32), columns.ragged([np.array([11])] * 4000)
  _, rows, _ = mining.mine(queries, vectors, positives, np.arange(12), Mine(1, 10, 3), np.random.default_rng(0))
  counts = np.bincount(rows.ravel(), minlength=12)
  assert counts[0] == counts[11] == 0
  assert np.abs(counts[1:11] - 1200).max() < 5 * math.sqrt(4000 * 0.3 * 0.7)


@pytest.mark.parametrize(
  "settings",
  [Mine(), Mine(denoise=0.1), Mine(denoise=0.9), Mine(margin=0.0), Mine(margin=1.5), Mine(denoise=0.4, margin=-1.0)],
)
def test_denoising_is_its_definition(settings):
  rng = np.random.default_rng(1)
  rows = rng.integers(-1, 50, (30, 12))
  negatives = np.where(rows < 0, -np.inf, rng.normal(size=rows.shape) * 3).astype(np.float32)
  negatives[0, :2] = 1000, -1000
  positives = rng.normal(size=30).astype(np.float32)
  kept, dropped = mining.denoise(rows, negatives, positives, settings)
  expected, counts = [], collections.Counter()
  for line, logits, positive in zip(rows.tolist(), negatives.tolist(), positives.tolist()):
    for row, logit in zip(line, logits):
      probability = 0.0 if logit < -700 else 1 / (1 + math.exp(-logit))
      if row >= 0 and settings.denoise is not None and probability > settings.denoise:
        counts["denoise"] += 1
        row = -1
      if row >= 0 and settings.margin is not None and logit > positive - settings.margin:
        counts["margin"] += 1
        row = -1
      expected.append(row)
  assert kept.ravel().tolist() == expected
  assert +dropped == counts
  assert set(dropped) == {rule for rule in ("denoise", "margin") if getattr(settings, rule) is not None}


def data(queries=5, passages=8):
  ids = [f"p{i}" for i in range(passages)]
  corpus = datasets.Corpus(ids, ids, ids, ids, np.arange(passages), columns.Lookup.of(ids))
  none = columns.ragged([np.zeros(0, np.int32)] * queries)
  return corpus, datasets.Queries([f"q{i}" for i in range(queries)], ["?"] * queries, none, none)


def blocks():
  """Two, the second judged... by rows that are gone: what was read stays in the second file."""
  values = np.array([[3, 2, -np.inf], [9, 8, 7]], np.float32)
  yield mining.Block(0, values, np.array([[4, 0, -1], [-1, 2, 3]]), collections.Counter(positive=1))
  read, logits = np.array([[1, 5, -1]]), np.array([[0.5, 1.5, -np.inf]], np.float32)
  gone = collections.Counter(positive=2, margin=2)
  yield mining.Block(3, np.array([[6, 5]], np.float32), np.array([[-1, -1]]), gone, read, logits)


def test_what_is_written_is_read(tmp_path):
  corpus, queries = data()
  path = tmp_path / "negatives.trec"
  said = mining.write(path, blocks(), queries.ids, corpus.ids)
  assert said == {"negatives_per_query": 4 / 5, "fewer": 3, "dropped": {"positive": 3, "margin": 2}}
  assert read_run(path) == {"q0": {"p4": 3, "p0": 2}, "q1": {"p2": 8, "p3": 7}}
  assert read_run(tmp_path / "negatives.cross.trec") == {"q3": {"p1": 0.5, "p5": 1.5}}
  assert sorted(p.name for p in tmp_path.iterdir()) == ["negatives.cross.trec", "negatives.trec"]
  rows, scores = mining.read(path, queries, corpus)
  assert [own.tolist() for own in rows] == [[4, 0], [2, 3], [], [], []]
  assert scores.tolist() == [3, 2, 8, 7]
  (block,) = mining.reread(path, queries, corpus, Mine(1, 3))
  assert block.rows.tolist() == [[4, 0, -1], [2, 3, -1]] + [[-1] * 3] * 3
  assert block.values[:2].tolist() == [[3, 2, -math.inf], [8, 7, -math.inf]]


def test_blocks_and_lines_of_any_number_are_the_same(tmp_path, monkeypatch):
  corpus, queries = data(40, 100)
  rng = np.random.default_rng(0)
  run = {q: {f"p{i}": float(rng.normal()) for i in rng.choice(100, 7, replace=False)} for q in reversed(queries.ids)}
  evaluate.write_run(run, tmp_path / "run.trec", "tag")
  expected = [[int(p[1:]) for p in evaluate.ranked(run[q])] for q in queries.ids]
  for size in (1, 13, 1000):
    monkeypatch.setattr(mining, "LINES", size)
    monkeypatch.setattr(mining, "BLOCK", size)
    assert [own.tolist() for own in mining.read(tmp_path / "run.trec", queries, corpus)[0]] == expected
    again = [line for block in mining.reread(tmp_path / "run.trec", queries, corpus, Mine(1, 7)) for line in block.rows]
    assert [own.tolist() for own in again] == expected


def test_nothing_half_written(tmp_path):
  corpus, queries = data()
  path = tmp_path / "negatives.trec"

  def broken():
    yield from blocks()
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    mining.write(path, broken(), queries.ids, corpus.ids)
  empty = mining.Block(0, np.zeros((5, 2), np.float32), np.full((5, 2), -1), collections.Counter())
  with pytest.raises(UserError, match="no hard negative is left"):
    mining.write(path, [empty], queries.ids, corpus.ids)
  with pytest.raises(UserError, match="cannot be written"):
    mining.write(tmp_path / "no" / "folder.trec", blocks(), queries.ids, corpus.ids)
  assert not list(tmp_path.iterdir())


def test_passages_of_another_corpus_are_refused(tmp_path):
  corpus, queries = data()
  evaluate.write_run({"q0": {"p99": 1.0}}, tmp_path / "negatives.trec", "mined")
  with pytest.raises(UserError, match="names passages that the corpus lacks"):
    mining.read(tmp_path / "negatives.trec", queries, corpus)


@pytest.mark.parametrize(
  ("settings", "says"),
  [
    ({"first": 3, "last": 2}, "mine.first=3: must lie in 1..mine.last=2"),
    ({"sample": 0}, "mine.sample=0"),
    ({"denoise": 1.0}, "mine.denoise=1.0"),
    ({"margin": math.nan}, "mine.margin=nan"),
    ({"refresh": -1}, "mine.refresh=-1"),
    ({"use": "given", "margin": 0.0}, "mine.margin=0.0: is about mined negatives"),
    ({"use": "given", "refresh": 5}, "mine.refresh=5: is about mined negatives"),
  ],
)
def test_wrong_settings_are_named(settings, says):
  with pytest.raises(UserError, match=says):
    Mine(**settings)
  assert config.Mine(use="given").wanted == 30
