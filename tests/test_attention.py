"""Attention maps against the scorers' own computation, one pair at a time and without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WORDS

from ernie_jax import attention, config, scores, step, templates, tokens

DATA = config.Data(query_length=9, passage_length=48)
TEMPERATURE = 0.25
CROSS = jax.jit(lambda params, rows: scores.cross(params, rows, None)[1])
EMBED = jax.jit(
  lambda student, rows, model, query: scores.embed(student, model, rows, None, query).tokens, static_argnums=(2, 3)
)


@pytest.fixture(scope="module")
def pairs():
  """A tokenizer, 2 queries with a passage each: of one pair both are cut, of the other all tokens are kept."""
  rng = np.random.default_rng(0)
  queries = [" ".join(rng.choice(WORDS, n)) for n in (20, 3)]
  passages = [" ".join(rng.choice(WORDS, n)) for n in (60, 6)]
  tokenizer = tokens.Tokenizer.train(queries + passages, 120)
  return tokenizer, *(list(tokens.in_memory(own, tokenizer)) for own in (queries, passages))


def made(tokenizer, seed, **settings):
  """(model, parameters) for this vocabulary."""
  a = config.Architecture(
    vocabulary=len(tokenizer), width=16, layers=2, heads=2, inner=32, positions=64, special=tokenizer.special
  )
  model = config.Model(late_width=8, **settings)
  params = step.init_params(model, a, a, jax.random.key(seed))
  return model, jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, params)  # far from uniform


def alone(params, model, query, passage, tokenizer):
  """(cross-encoder's, late interaction's) map of one pair, from a row without padding."""
  query, passage = query[: DATA.query_length - 2], passage[: DATA.passage_length - 2]
  nq, n = len(query), len(passage)
  joined = templates.rows([(query, passage)], nq + n + 3, tokenizer)
  looked = CROSS(params, jax.tree.map(jnp.asarray, joined))
  block = np.asarray(looked, np.float64)[0][1 : 1 + nq, nq + 2 : nq + 2 + n]  # [CLS] query [SEP] passage [SEP]
  row = lambda text: jax.tree.map(jnp.asarray, templates.rows([(text,)], len(text) + 2, tokenizer))
  left, right = (EMBED(params["student"], row(text), model, text is query)[0, 1:-1] for text in (query, passage))
  matched = np.asarray(left @ right.T, np.float64)
  exps = np.exp(matched / TEMPERATURE)
  return block / block.sum(1, keepdims=True), exps / exps.sum(1, keepdims=True)


@pytest.mark.parametrize("settings", [{}, {"share_encoder": True, "tied": False}])
def test_maps_are_the_scorers_own(pairs, settings):
  tokenizer, queries, passages = pairs
  model, params = made(tokenizer, 0, **settings)
  found = attention.maps(params, model, queries, passages, templates.Template(tokenizer, DATA), TEMPERATURE)
  for i, (query, passage) in enumerate(zip(queries, passages)):
    cross, late = alone(params, model, query, passage, tokenizer)
    where = np.ix_(found.query_content[i], found.passage_content[i])
    np.testing.assert_allclose(found.cross[i][where], cross, atol=1e-5)
    np.testing.assert_allclose(found.late[i][where], late, atol=1e-5)
    assert np.ptp(cross) > 0.05  # else a wrong place would not show
    assert np.ptp(late) > 0.05
    kl = (cross * np.log(cross / late)).sum(1).mean()
    assert found.divergence[i] == pytest.approx(kl, rel=1e-4)
    assert found.cross[i].sum() == pytest.approx(len(cross), abs=1e-4)  # nothing stands elsewhere


def test_a_record_is_the_maps_cut_to_their_first_tokens(pairs):
  tokenizer, queries, passages = pairs
  template = templates.Template(tokenizer, DATA)
  trained = {name: made(tokenizer, seed)[1] for name, seed in (("before", 0), ("after", 1))}
  model = made(tokenizer, 0)[0]
  record = attention.record(trained, model, queries, passages, template, TEMPERATURE)
  words = lambda own: [tokenizer.backend.id_to_token(int(t)) for t in own]
  for name, params in trained.items():
    for pair, query, passage in zip(record, queries, passages, strict=True):
      assert pair["query_tokens"] == words(query[: DATA.query_length - 2])
      assert pair["passage_tokens"] == words(passage[: DATA.passage_length - 2])[: attention.TOKENS]
      assert pair["more"] == max(0, min(len(passage), DATA.passage_length - 2) - attention.TOKENS)
      for system, whole in zip(("cross", "late"), alone(params, model, query, passage, tokenizer)):
        values = np.array(pair[name][system])
        np.testing.assert_allclose(values.sum(1), 1, atol=0.0005 * (attention.TOKENS + 1))
        np.testing.assert_allclose(values[:, : attention.TOKENS], whole[:, : attention.TOKENS], atol=0.00051)
        rest = whole[:, attention.TOKENS :].sum(1)
        assert values.shape[1] == min(whole.shape[1], attention.TOKENS) + bool(pair["more"])
        if pair["more"]:
          np.testing.assert_allclose(values[:, -1], rest, atol=0.00051)
  assert {bool(pair["more"]) for pair in record} == {True, False}
  assert record[0]["before"] != record[0]["after"]
