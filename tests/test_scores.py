"""The scorers against loops, padding and masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SPECIAL, TINY, distance, make_batch, make_rows

from ernie_jax import config, encoder, scores, step
from ernie_jax.encoder import Encoder

rng = np.random.default_rng(0)
EVERYTHING = config.Train(batch=8, negatives=2, late_pool="global")


def score(model, params, batch, train=EVERYTHING, key=None):
  return jax.jit(lambda p, b: scores.score(p, b, model, train, key))(params, batch)


def test_maxsim_equals_three_loops():
  q, p = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 5, 3))
  q_mask, p_mask = rng.random((2, 4)) < 0.7, rng.random((2, 5)) < 0.7
  p_mask[:, 0] = True
  got = scores.maxsim(
    jnp.einsum("bqd,bpd->bqp", q, p, preferred_element_type=jnp.float32), jnp.array(q_mask), jnp.array(p_mask)
  )
  for b in range(2):
    expected = 0.0
    for i in range(4):
      if q_mask[b, i]:
        best = -np.inf
        for j in range(5):
          if p_mask[b, j]:
            best = max(best, float(q[b, i] @ p[b, j]))
        expected += best
    np.testing.assert_allclose(got[b], expected, rtol=1e-5)


def test_a_masked_token_does_not_beat_a_negative_similarity():
  got = scores.maxsim(jnp.array([[-0.5, 0.0]]), jnp.array([True]), jnp.array([True, False]))
  np.testing.assert_allclose(got, -0.5)


def test_pool_maxsim_equals_own_maxsim_and_so_does_its_gradient(tiny_params, monkeypatch):
  monkeypatch.setattr(scores, "TILE", 5 * 8 * 6 * 9)  # 4 of the 24 passages at a time
  model, params = tiny_params
  batch = make_batch()
  b, k = batch.known.shape[0], 3

  def both(student):
    q = scores.embed(student, model, batch.queries, None, query=True)
    p = scores.embed(student, model, batch.passages, None, query=False)
    chunked = scores.maxsim_pool(q, p)
    whole = scores.maxsim(
      jnp.einsum("bqd,npd->bnqp", q.tokens, p.tokens, preferred_element_type=jnp.float32),
      q.mask[:, None],
      p.mask[None],
    )
    return chunked, whole

  chunked, whole = jax.jit(both)(params["student"])
  np.testing.assert_allclose(chunked, whole, rtol=1e-6)
  own = np.stack([np.asarray(whole)[i, i * k : (i + 1) * k] for i in range(b)])
  np.testing.assert_allclose(score(model, params, batch).late, own, rtol=1e-5)
  gradients = jax.jit(lambda s: [jax.grad(lambda s, i=i: (both(s)[i] ** 2).sum())(s) for i in (0, 1)])(
    params["student"]
  )
  assert distance(*gradients) < 1e-5


def test_in_bfloat16_the_queries_gradient_does_not_depend_on_the_number_of_turns(monkeypatch):
  """It is summed over the turns: in bfloat16, hundreds of turns would lose digits."""
  rng = np.random.default_rng(0)
  tokens = lambda *size: scores.unit(jnp.asarray(rng.normal(size=(*size, 16)), jnp.float32)).astype(jnp.bfloat16)
  there = lambda *size: jnp.ones(size, bool)
  q = scores.Embeddings(jnp.zeros((4, 1)), there(4, 6), there(4, 6), tokens(4, 6))
  p = scores.Embeddings(jnp.zeros((512, 1)), there(512, 9), there(512, 9), tokens(512, 9))
  weight = jnp.asarray(rng.normal(size=(4, 512)), jnp.float32)
  found = []
  for turn in (512, 1):
    monkeypatch.setattr(scores, "TILE", turn * 4 * 6 * 9)
    loss = lambda x: (scores.maxsim_pool(dataclasses.replace(q, tokens=x), p) * weight).sum()
    found.append(np.asarray(jax.jit(jax.grad(loss))(q.tokens), np.float32))
  assert distance(found[1], found[0]) < 0.01


def test_dual_scores_are_dot_products_of_first_tokens(tiny_params):
  model, params = tiny_params
  batch = make_batch()
  hidden = lambda rows: np.asarray(jax.jit(lambda e, r: e(r)[0])(params["student"].encoder, rows))[:, 0]
  q, p = hidden(batch.queries), hidden(batch.passages)
  whole = q @ p.T
  found = score(model, params, batch)
  np.testing.assert_allclose(found.dual, np.stack([whole[i, 3 * i : 3 * i + 3] for i in range(8)]), rtol=1e-4)
  known = (np.asarray(batch.known)[:, :, None] == np.asarray(batch.texts)).any(1)
  assert known.sum() == 8 + 4  # the own positive of each, and a further one of every second query
  expected = np.concatenate([np.diagonal(whole[:, ::3])[:, None], np.where(known, -np.inf, whole)], 1)
  np.testing.assert_allclose(found.dual_pool, expected, rtol=1e-4)
  np.testing.assert_array_equal(np.isinf(found.late_pool), np.isinf(expected))


def test_a_passage_with_the_text_of_a_known_positive_is_never_a_negative(tiny_params):
  model, params = tiny_params
  batch = make_batch()
  texts = batch.texts.at[5].set(batch.texts[0])  # the second query's list holds a copy of the first one's positive
  pool = score(model, params, dataclasses.replace(batch, texts=texts)).dual_pool
  assert np.isinf(pool[0, 1 + 5])
  assert np.isfinite(pool[1, 1 + 5])


@pytest.mark.parametrize("units", [0, 1])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("noisy", [False, True])
def test_one_pass_over_queries_and_passages_equals_two(tiny_params, units, copies, noisy):
  """Vectors, tokens, twins and hidden states of every layer, on rows that are alike; untied, there are two passes."""
  model, params = tiny_params
  batch = make_batch(lq=6, lp=9, units=units) if units else make_batch(lq=9, lp=9)
  rows = batch.queries, batch.passages
  assert rows[0].tokens.shape[1] == rows[1].tokens.shape[1]
  seeds = encoder.seeds(jax.random.key(0), TINY.layers + 1, 3) if noisy else None
  numbers = jnp.arange(8, dtype=jnp.uint32) * 2 + 1, jnp.arange(24, dtype=jnp.uint32) * 2
  settings = {"late": True, "copies": copies, "every": True}

  def apart(student):
    noise = [None if seeds is None else encoder.Noise(seeds, n, jnp.zeros_like(n)) for n in numbers]
    return tuple(scores.embed(student, model, *x, **settings) for x in zip(rows, noise, (True, False)))

  student = params["student"]
  one_pass = lambda rows: jax.jit(lambda student: scores.embed_both(student, model, rows, seeds, numbers, **settings))
  both = one_pass(rows)
  ways = [both(student)]
  if units:
    mixed = make_batch(lq=6, lp=9, units=units, together=True)
    assert mixed.queries.tokens is None
    ways.append(one_pass((mixed.queries, mixed.passages))(student))
  expected_both = jax.jit(apart)(student)
  for found, expected in ((own, other) for way in ways for own, other in zip(way, expected_both, strict=True)):
    there = np.asarray(expected.mask)
    for name in ("vector", "twin"):
      if getattr(expected, name) is not None:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)
    for name in ("tokens", "hidden"):
      got, wanted = (np.asarray(getattr(x, name))[there] for x in (found, expected))
      np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
  untied = dataclasses.replace(model, tied=False)
  other = step.init_params(untied, TINY, TINY, jax.random.key(1))["student"]
  other.query_encoder = student.encoder
  q, _ = both(other)
  np.testing.assert_allclose(q.vector, apart(student)[0].vector, rtol=1e-4, atol=1e-5)
  if units:
    with pytest.raises(ValueError, match="an encoder of their own"):
      one_pass((mixed.queries, mixed.passages))(other)


def test_mean_pooling_cosine_and_untied_towers():
  model = config.Model(pooling="mean", cosine=True, late_width=None, tied=False)
  params = step.init_params(model, TINY, TINY, jax.random.key(1))
  assert distance(params["student"].encoder, params["student"].query_encoder) == 0
  rows = make_batch().queries
  e = jax.jit(lambda s, r: scores.embed(s, model, r, None, query=True))(params["student"], rows)
  hidden = np.asarray(jax.jit(lambda e, r: e(r)[0])(params["student"].query_encoder, rows))
  for i, there in enumerate(rows.segments > 0):
    mean = hidden[i][there].mean(0)
    np.testing.assert_allclose(e.vector[i], mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-6)
    unit = hidden[i] / np.linalg.norm(hidden[i], axis=-1, keepdims=True)
    np.testing.assert_allclose(e.tokens[i], unit, rtol=1e-4, atol=1e-5)


def test_dual_vectors_are_reduced_and_token_vectors_are_not():
  model = config.Model(dual_width=5, late_width=8)
  params = step.init_params(model, TINY, TINY, jax.random.key(1))
  student, rows = params["student"], make_batch().queries
  e, whole = (jax.jit(lambda s, r, m=m: scores.embed(s, m, r, None, query=True)) for m in (model, config.Model()))
  e = e(student, rows)
  hidden = np.asarray(jax.jit(lambda e, r: e(r)[0])(student.encoder, rows))
  kernel, bias = np.asarray(student.reduction.kernel[...]), np.asarray(student.reduction.bias[...])
  np.testing.assert_allclose(e.vector, hidden[:, 0] @ kernel + bias, rtol=1e-4, atol=1e-5)
  student.reduction = None
  np.testing.assert_array_equal(e.tokens, whole(student, rows).tokens)


def test_padding_changes_no_score(tiny_params):
  model, params = tiny_params
  short, long = (score(model, params, make_batch(pad=pad)) for pad in (0, 3))
  for field in ("cross", "dual", "dual_pool", "late", "late_pool"):
    np.testing.assert_allclose(getattr(long, field), getattr(short, field), rtol=1e-4, atol=1e-5, err_msg=field)


def test_order_of_queries_changes_no_score(tiny_params):
  model, params = tiny_params
  batch, order = make_batch(), np.array([3, 1, 7, 0, 2, 6, 5, 4])
  passages = (order[:, None] * 3 + np.arange(3)).reshape(-1)
  pick = lambda rows, index: jax.tree.map(lambda x: x[index], rows)
  moved = scores.Batch(
    queries=pick(batch.queries, order),
    passages=pick(batch.passages, passages),
    pairs=pick(batch.pairs, passages),
    texts=batch.texts[passages],
    known=batch.known[order],
  )
  a, b = score(model, params, batch), score(model, params, moved)
  for field in ("cross", "dual", "late"):
    np.testing.assert_allclose(getattr(b, field), np.asarray(getattr(a, field))[order], rtol=1e-4, atol=1e-5)


def test_pair_attention_reads_the_same_tokens(tiny_params):
  """Attention of a pair is found by the tokens' places, for queries and passages of every length."""
  _, params = tiny_params
  batch = make_batch()
  _, attention = jax.jit(lambda p, r: scores.cross(p, r, None))(params, batch.pairs)
  got = np.asarray(scores.pair_attention(attention, batch.pairs, batch.passages, 6)).reshape(8, 3, 6, 9)
  attention = np.asarray(attention).reshape(8, 3, *attention.shape[1:])
  content = lambda rows: (np.asarray(rows.segments) > 0) & ~np.isin(rows.tokens, SPECIAL)
  query_content, passage_content = content(batch.queries), content(batch.passages).reshape(8, 3, -1)
  compared = 0
  for i in range(8):
    for j in range(3):
      pair = np.asarray(batch.pairs.tokens)[3 * i + j]
      middle = np.flatnonzero(pair == 2)[0]  # [SEP] after the query
      for t in np.flatnonzero(query_content[i]):
        assert pair[t] == batch.queries.tokens[i, t]
        for u in np.flatnonzero(passage_content[i, j]):
          assert pair[middle + u] == batch.passages.tokens[3 * i + j, u]
          assert got[i, j, t, u] == attention[i, j, t, middle + u]
          compared += 1
  assert compared > 200


def test_special_tokens_are_no_content(tiny_params):
  model, params = tiny_params
  rows = jax.tree.map(jnp.asarray, make_rows(rng, [[np.array([7, 8], np.int32)]], 6))
  e = jax.jit(lambda s: scores.embed(s, model, rows, None, query=True))(params["student"])
  np.testing.assert_array_equal(e.content, [[False, True, True, False, False, False]])


def test_what_no_term_asks_for_is_not_scored(tiny_params):
  model, params = tiny_params
  train = config.Train(batch=8, weights=config.Weights.only(nll_de=1))
  found = score(model, params, make_batch(), train)
  assert all(getattr(found, name) is None for name in ("cross", "late", "late_pool", "twins", "attention"))
  train = config.Train(batch=8, negatives=2, weights=config.Weights.only(nll_ce=1))
  found = score(model, params, make_batch(), train)
  assert [f.name for f in dataclasses.fields(found) if getattr(found, f.name) is not None] == ["cross"]
  train = config.Train(batch=8, negatives=2, weights=config.Weights.only(kl_ce_li=1))
  found = score(model, params, make_batch(), train)
  assert found.late is not None
  assert all(getattr(found, name) is None for name in ("dual", "dual_pool", "twins"))


def test_shared_encoder_and_raw_first_token():
  model = config.Model(share_encoder=True, teacher_pooler=False)
  params = step.init_params(model, TINY, TINY, jax.random.key(1))
  assert params["teacher"].encoder is None
  rows = make_batch().pairs
  got, _ = jax.jit(lambda p, r: scores.cross(p, r, None))(params, rows)
  hidden = jax.jit(lambda e, r: e(r)[0])(params["student"].encoder, rows)[:, 0]
  head = params["teacher"].head
  np.testing.assert_allclose(got, (hidden @ head.kernel[...] + head.bias[...])[:, 0], rtol=1e-5, atol=1e-6)


def test_unit_has_length_1_and_a_finite_gradient_at_0():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
  np.testing.assert_allclose(scores.unit(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
  assert jnp.isfinite(jax.grad(lambda x: scores.unit(x).sum())(x)).all()


def test_twins_differ_only_by_dropout(tiny_params):
  model, params = tiny_params
  still = score(model, params, make_batch(), key=None)
  np.testing.assert_array_equal(*still.twins)
  noisy = score(model, params, make_batch(), key=jax.random.key(0))
  assert np.abs(noisy.twins[0] - noisy.twins[1]).max() > 1e-3


def test_encoder_is_what_a_tower_uses(tiny_params):
  _, params = tiny_params
  assert isinstance(params["student"].encoder, Encoder)
  assert params["student"].query_encoder is None
