"""The encoder: packing, padding, dropout, and parity with reference implementations (stored, see fixtures/)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, distance, make_batch, make_rows
from flax import nnx

from ernie_jax import config, encoder, step, templates
from ernie_jax.encoder import (
  Encoder,
  Noise,
  Rows,
  apart,
  attend,
  drop,
  drop_attention,
  first,
  owned,
  seeds,
  split_last,
  unstack,
  with_dropout,
)

rng = np.random.default_rng(0)
ENCODER = Encoder(TINY, jax.random.key(0))
encode = jax.jit(lambda rows, noise=None: ENCODER(rows, noise))


def noise(seed: int, numbers: list[int] | np.ndarray) -> Noise:
  texts = jnp.asarray(numbers, jnp.uint32)
  return Noise(seeds(jax.random.key(seed), TINY.layers + 1, 3), texts, jnp.zeros_like(texts))


def rows(texts: list[list[np.ndarray]], length: int) -> Rows:
  """Rows that each hold several texts, one segment each."""
  tokens, segments, positions = (np.zeros((len(texts), length), np.int32) for _ in range(3))
  for r, row in enumerate(texts):
    end = 0
    for number, text in enumerate(row, 1):
      tokens[r, end : end + len(text)] = text
      segments[r, end : end + len(text)] = number
      positions[r, end : end + len(text)] = np.arange(len(text))
      end += len(text)
  return jax.tree.map(jnp.asarray, Rows(tokens, segments, positions, tokens % 2))


def test_packed_rows_equal_padded_rows():
  texts = [rng.integers(1, 50, n) for n in (3, 5, 2, 4, 6, 1)]
  packed, _ = encode(rows([texts[:3], texts[3:]], 12))
  padded, _ = encode(rows([[t] for t in texts], 12))
  expected = [padded[i, : len(t)] for i, t in enumerate(texts)]
  np.testing.assert_allclose(packed[0, :10], np.concatenate(expected[:3]), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(packed[1, :11], np.concatenate(expected[3:]), rtol=1e-4, atol=1e-5)


def test_a_text_that_ends_with_its_unit_has_each_token_once():
  """Places after the end of all rows show the last token again: it must not count."""
  texts = [rng.integers(4, 50, size) for size in (4, 2, 6)]  # 6 + 4 and 8 tokens with [CLS] and [SEP], in rows of 8
  ids = type("Ids", (), {"pad": 0, "cls": 1, "sep": 2, "mask": 3})
  counts = lambda rows: (owned(jax.tree.map(jnp.asarray, rows)) != 0).sum(1).tolist()
  layout = {"places": np.array([0, 8, 16]), "units": 1, "count": 3, "longest": 8}
  packed = templates.rows([(text,) for text in texts], 8, ids, **layout)
  assert counts(packed) == [6, 4, 8]
  late = templates.rows([(text,) for text in texts], 8, ids, **layout | {"places": np.array([16, 0, 8])})
  assert counts(late) == [6, 4, 8]
  short = templates.rows([(texts[1],)], 8, ids, **layout | {"places": np.array([4]), "count": 1})
  assert counts(short) == [4]


@pytest.mark.parametrize("packed", [False, True])
def test_the_last_layer_for_first_tokens_alone(packed):
  parts = [[rng.integers(4, 50, size)] for size in (5, 2, 3, 1)]
  texts = make_rows(np.random.default_rng(0), parts, 7, pack=(1, 14) if packed else (0, 0))
  texts = jax.tree.map(jnp.asarray, texts)
  whole, _ = encode(texts)
  alone, own = jax.jit(lambda rows: ENCODER(rows, leads=True))(texts)
  np.testing.assert_allclose(alone[:, 0], first(jnp.asarray(whole), texts), rtol=1e-5, atol=1e-6)
  assert alone.shape[1] == own.shape[1] == 1


def test_attention_is_a_distribution_over_the_own_segment():
  texts = [rng.integers(1, 50, n) for n in (3, 5)]
  packed = rows([texts], 10)
  _, attention = encode(packed)
  same = packed.segments[0][:, None] == packed.segments[0][None, :]
  real = np.asarray(packed.segments[0] > 0)
  np.testing.assert_allclose(np.asarray(attention[0])[real].sum(-1), 1, rtol=1e-5)
  assert float(jnp.where(same, 0, attention[0]).max(initial=0, where=real[:, None])) == 0.0


def test_no_noise_no_dropout_and_the_same_noise_the_same_dropout():
  text = rows([[rng.integers(1, 50, 5)]], 6)
  np.testing.assert_array_equal(encode(text)[0], encode(text)[0])
  one, same, seed, row = (encode(text, noise(k, [n]))[0] for k, n in ((1, 4), (1, 4), (2, 4), (1, 5)))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - seed).max() > 1e-3
  assert np.abs(one - row).max() > 1e-3


def test_a_rows_noise_is_its_own_wherever_it_stands():
  texts = rows([[rng.integers(1, 50, 5)] for _ in range(4)], 6)
  order = np.array([2, 0, 3])
  some = jax.tree.map(lambda x: x[order], texts)
  whole, part = encode(texts, noise(1, np.arange(4)))[0], encode(some, noise(1, order))[0]
  np.testing.assert_allclose(part, np.asarray(whole)[order], rtol=1e-5, atol=1e-6)


def test_dropout_is_fair_and_independent_between_rows_places_and_seeds():
  """Shares and correlations within five standard errors of a fair coin's, for rows and places that are neighbours."""
  rate, (n, m) = 0.1, (400, 2500)
  words = lambda *x: jnp.array(x, jnp.uint32)
  texts, place = jnp.divmod(jnp.arange(n, dtype=jnp.uint32), 20)
  drops = lambda seed: np.asarray(drop(jnp.ones((n, m)), rate, Noise(words(seed, 9), texts, place)))
  np.testing.assert_allclose(np.unique(drops(0)), [0, 1 / 0.9], rtol=1e-6)
  one, other = drops(0) == 0, drops(1) == 0
  error = 5 * np.sqrt(rate * (1 - rate))
  assert abs(one.mean() - rate) < error / np.sqrt(n * m)
  assert np.abs(one.mean(0) - rate).max() < error * 1.2 / np.sqrt(n)
  assert np.abs(one.mean(1) - rate).max() < error * 1.2 / np.sqrt(m)
  pairs = {"seeds": (one, other), "tokens": (one[1:], one[:-1]), "places": (one[:, 1:], one[:, :-1])}
  pairs |= {
    "texts": (one[20:], one[:-20]),
    "texts far apart": (one[320:], one[:-320]),
    "places a power of 2 apart": (one[:, 1024:], one[:, :-1024]),
  }
  for name, (a, b) in pairs.items():
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size), name


def test_task_embeddings_add_row_0():
  a = dataclasses.replace(TINY, tasks=3)
  encoder = Encoder(a, jax.random.key(0))
  text = rows([[rng.integers(1, 50, 5)]], 6)
  zeroed = jax.tree.map(lambda x: x, encoder)
  zeroed.type.embedding[...] = zeroed.type.embedding[...] + zeroed.task.embedding[...][0]
  zeroed.task = None
  run = jax.jit(lambda e: e(text)[0])
  np.testing.assert_allclose(run(encoder), run(zeroed), rtol=1e-5, atol=1e-6)


def test_stacks_come_apart_and_gradients_flow_back():
  stack = {"a": jnp.arange(6.0).reshape(3, 2)}
  body, last = split_last(stack, 3)
  assert [x["a"].tolist() for x in unstack(body, 2)] == [[0, 1], [2, 3]]
  assert last["a"].tolist() == [4, 5]
  gradient = jax.grad(lambda s: unstack(s, 3)[1]["a"].sum())(stack)
  assert distance(gradient, {"a": jnp.array([[0.0, 0], [1, 1], [0, 0]])}) == 0


def test_bfloat16_computes_near_float32():
  half = Encoder(TINY, jax.random.key(0), dtype="bfloat16")
  text = rows([[rng.integers(1, 50, 5)]], 6)
  x, _ = jax.jit(lambda: half(text))()
  assert x.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))
  np.testing.assert_allclose(x.astype(jnp.float32), encode(text)[0], atol=0.06)


def test_dropout_of_the_checkpoint_or_the_configuration():
  assert with_dropout(TINY, None) == TINY
  assert with_dropout(TINY, 0.0).attention_dropout == 0.0


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("leads", [True, False])
def test_layers_apart_give_the_same(scan, leads):
  """Parameters as arrays of their own: the same program without the cuts."""
  model = config.Model(scan=scan, tied=False)
  student = step.init_params(model, TINY, TINY, jax.random.key(0))["student"]
  rows = make_batch().passages
  run = jax.jit(lambda encoder: encoder(rows, leads=leads))
  for one, other in ((student.encoder, apart(student).encoder), (student.query_encoder, apart(student).query_encoder)):
    for x, y in zip(run(one), run(other)):
      np.testing.assert_allclose(y, x, atol=2e-6)
  assert not isinstance(student.encoder.layers, nnx.List)  # it is a copy


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-6), ("bfloat16", 0.02)])
@pytest.mark.parametrize("reading", ["rows", "leads"])
def test_attention_s_gradient_is_that_of_its_formula(reading, dtype, within, rate):
  """For any gradient of both outputs, of packed rows and padding, where a row that reads nothing moves nothing."""
  rng, (n, length, heads, d) = np.random.default_rng(0), (3, 10, 2, 4)
  segments = jnp.array([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3, [0] * 10])
  mask = ((segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :])[:, None]
  mask = mask[:, :, :1] if reading == "leads" else mask
  count = mask.shape[2]
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  given = draw(n, count, heads, d), draw(n, length, heads, d), draw(n, length, heads, d)
  texts = jnp.broadcast_to(jnp.arange(n, dtype=jnp.uint32)[:, None], (n, length))
  places = jnp.broadcast_to(jnp.arange(length), (n, length))
  noise = Noise(jnp.array([5, 7], jnp.uint32), texts, places) if reading == "rows" else None

  def formula(query, keyed, value):
    logits = jnp.einsum("nqad,nkad->naqk", query, keyed) * d**-0.5
    attention = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
    return jnp.einsum("naqk,nkad->nqad", drop_attention(attention, rate, noise), value), attention

  slopes = draw(n, count, heads, d), jnp.asarray(rng.normal(size=(n, heads, count, length)), jnp.float32)
  found, back = jax.vjp(lambda *x: attend(*x, mask, rate, noise), *given)
  wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  expected, back_too = jax.vjp(formula, *wide(given))
  for one, other in zip([*found, *back(slopes)], [*expected, *back_too(wide(slopes))], strict=True):
    assert np.abs(np.asarray(one.astype(jnp.float32)) - other).max() < within * np.abs(other).max()
  assert all(x.dtype == jnp.dtype(dtype) for x in back(slopes))


def test_what_attention_s_gradient_loses_to_a_rounded_output_is_bounded():
  """In bfloat16, of peaked attention over values that have much in common: the worst that RESULTS.md names."""
  rng, shape = np.random.default_rng(0), (2, 128, 4, 64)
  draw = lambda scale, common: jnp.asarray(scale * rng.normal(size=shape) + common, "bfloat16")
  given = draw(4, 0), draw(1, 0), draw(1, 3 * rng.normal(size=shape[-1]))
  slope, mask = draw(1, 0), jnp.ones((2, 1, 128, 128), bool)
  ours = jax.vjp(lambda *x: attend(*x, mask, 0.0, None)[0], *given)[1](slope)
  *wide, wide_slope = [np.asarray(x.astype(jnp.float32), np.float64) for x in (*given, slope)]
  with jax.enable_x64(True):
    formula = lambda q, k, v: jnp.einsum("naqk,nkad->nqad", jax.nn.softmax(jnp.einsum("nqad,nkad->naqk", q, k) / 8), v)
    exact = [np.asarray(x) for x in jax.vjp(formula, *wide)[1](wide_slope)]
  assert exact[0].dtype == np.float64
  error = [np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y) for x, y in zip(ours, exact)]
  assert all(one < most for one, most in zip(error, (0.015, 0.014, 0.003))), error


@pytest.fixture
def library(monkeypatch):
  """JAX's own attention in the place of cuDNN's; gives a list of its calls."""
  calls, plain = [], jax.nn.dot_product_attention

  def attention(*given, implementation, **more):
    calls.append(implementation)
    return plain(*given, implementation="xla", **more)

  monkeypatch.setattr(encoder, "_has_cudnn", lambda: True)
  monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
  return calls


def test_attention_by_a_gpu_s_library_is_the_same_for_tokens_that_read_something(library):
  rng, (n, length, heads, d) = np.random.default_rng(0), (3, 10, 2, 8)
  segments = jnp.array([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3, [1] * 10])
  mask = ((segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :])[:, None]
  reads = (segments > 0)[..., None, None]
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  given, slope = tuple(draw(n, length, heads, d) for _ in range(3)), jnp.where(reads, draw(n, length, heads, d), 0)
  found, back = jax.vjp(lambda *x: attend(*x, mask, 0.0, None)[0], *given)
  expected, back_too = jax.vjp(lambda *x: encoder._attend(0.0, *x, mask, None), *given)
  assert library == ["cudnn"]
  wide = lambda x: np.asarray(x.astype(jnp.float32))
  for one, other in zip((found, *back(slope)), (expected, *back_too(slope)), strict=True):
    assert np.abs((wide(one) - wide(other)) * np.asarray(reads)).max() < 0.02 * np.abs(wide(other)).max()


def test_a_gpu_s_library_is_asked_where_it_can_do_it(library):
  query = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
  noise = Noise(jnp.array([5, 7], jnp.uint32), jnp.zeros((1, 4), jnp.uint32), jnp.arange(4)[None])
  mask = jnp.ones((1, 1, 4, 4), bool)
  for rate, own, keyed, there in [
    (0.0, query, query, True),
    (0.1, query, query, False),  # dropout is by a token's own noise
    (0.0, query.astype(jnp.float32), query.astype(jnp.float32), False),
    (0.0, query[:, :1], query, False),  # the first tokens alone
    (0.0, query[:, :3], query[:, :3], False),  # an odd length has no gradient there
  ]:
    before = len(library)
    attend(own, keyed, keyed, mask[:, :, : own.shape[1], : keyed.shape[1]], rate, noise)
    assert len(library) - before == there


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("scan", [True, False])
def test_an_encoder_whose_attention_is_a_library_s_gives_the_same(library, scan, remat):
  rows = make_batch().passages
  rows = jax.tree.map(lambda x: x[:, : x.shape[1] // 2 * 2], rows)  # an even length
  made = Encoder(TINY, jax.random.key(0), dtype="bfloat16", scan=scan, remat=remat)
  read = (rows.segments > 0)[..., None]
  loss = lambda made: jnp.square(jnp.where(read, made(rows)[0].astype(jnp.float32), 0)).sum()
  found = jax.value_and_grad(loss)(made)
  assert library
  library.clear()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(encoder, "_has_cudnn", lambda: False)
    expected = jax.value_and_grad(loss)(made)
  assert not library
  assert distance(found, expected) < 0.05
