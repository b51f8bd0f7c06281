"""Masked language modelling: what is masked, and what the loss of it is (Devlin et al. 2019)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, distance, make_batch

from ernie_jax import batches, columns, config, encoder, masking, mesh, scores, step, tokens
from ernie_jax.config import Train, UserError, Weights

WORDS = ["padding", "arrays", "of", "zeros", "returns", "the", "sum", "element", "matrix", "unit", "norm", "value"]
LENGTH = 32
STAGE = Train(
  steps=4,
  batch=8,
  weights=Weights.only(mlm=1),
  mlm_length=LENGTH,
)
MODEL = config.Model(late_width=8, dropout=0.1)
KEY = jax.random.key(7)


def text(rng) -> str:
  return " ".join(rng.choice(WORDS, rng.integers(3, 40)))


@pytest.fixture(scope="module")
def texts():
  rng = np.random.default_rng(0)
  some = [text(rng) for _ in range(60)]
  tokenizer = tokens.Tokenizer.train(some, 40)  # so few that words have several pieces
  train, _ = masking.held_out((tokens.in_memory(some, tokenizer),), LENGTH)
  return batches.Texts.unpaired(train, tokenizer)


@pytest.fixture(scope="module")
def params(texts):
  a = dataclasses.replace(TINY, vocabulary=len(texts.tokenizer), special=texts.tokenizer.special, layers=1)
  made = step.init_params(MODEL, a, a, jax.random.key(0))
  # Larger than at a start, so that rounding is small beside what is compared.
  return made | {"masked": jax.tree.map(lambda x: 5 * x + 0.1, scores.Masked(a, jax.random.key(1)))}


def reader(texts, train=STAGE, seed=0, rows=None):
  return batches.batches(texts, config.Data(), train, seed, batches.layout(config.Data(), train, 1), rows)


def original(masked):
  """The rows' tokens before they were masked."""
  found = masked.rows.tokens.copy()
  row, place = np.nonzero(masked.tokens >= 0)
  found[row, masked.places[row, place]] = masked.tokens[row, place]
  return found


# ---- Rows.


def test_rows_hold_every_text_once_an_epoch_end_to_end(texts):
  masker = masking.Masking(texts.plain, STAGE, texts.tokenizer, 3)
  t, read = texts.tokenizer, [[] for _ in range(len(texts.plain))]
  total = sum(texts.plain.size(i) for i in range(len(texts.plain)))
  used = parts = 0
  while masker.text < len(texts.plain):
    planned = [masker.next_row()]
    masked = masker.gather(planned)
    row, rows = original(masked)[0], masked.rows
    laid = []
    for text, begin, end in planned[0][1]:
      laid += [t.cls, *texts.plain[text][begin:end], t.sep]
      read[text] += texts.plain[text][begin:end].tolist()
    assert row.tolist() == laid + [t.pad] * (LENGTH - len(laid))
    sizes = [end - begin + 2 for _, begin, end in planned[0][1]]
    assert rows.segments[0, : sum(sizes)].tolist() == [s + 1 for s, n in enumerate(sizes) for _ in range(n)]
    assert rows.positions[0, : sum(sizes)].tolist() == [i for n in sizes for i in range(n)]
    used, parts = used + sum(sizes), parts + len(sizes)
  # The last row may begin the next epoch.
  assert all(read[i][: texts.plain.size(i)] == texts.plain[i].tolist() for i in range(len(texts.plain)))
  assert sum(map(len, read)) < total + LENGTH
  assert used >= total + 2 * parts - LENGTH
  assert used > 0.93 * masker.row * LENGTH


def test_what_is_measured_is_every_text_once_on_any_number_of_devices(texts):
  one, eight = (masking.every_row(texts.plain, STAGE, texts.tokenizer, multiple) for multiple in (1, 8))
  assert len(eight.tokens) % 8 == 0
  assert (eight.tokens[len(one.tokens) :] == -1).all()
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    np.testing.assert_array_equal(a, b[: len(a)])
  flat = original(one)[one.rows.segments > 0]
  words = flat[~np.isin(flat, texts.tokenizer.special)]
  every = np.concatenate([texts.plain[i] for i in range(len(texts.plain))])
  every = every[~np.isin(every, texts.tokenizer.special)]
  more = len(words) - len(every)  # the last row is filled up
  assert 0 <= more < LENGTH
  counts = np.bincount(words, minlength=100) - np.bincount(every, minlength=100)
  assert counts.min() >= 0
  assert counts.sum() == more


def test_masks_are_whole_words_as_many_as_asked_80_10_10_and_never_special(texts):
  """Within five standard deviations of the binomial; words that are pieces of one another are masked together."""
  masker = masking.Masking(texts.plain, STAGE, texts.tokenizer, 0)
  found = masker.gather([masker.next_row() for _ in range(1500)])
  before, t = original(found), texts.tokenizer
  real = (found.rows.segments > 0) & ~np.isin(before, t.special)
  chosen = np.zeros(before.shape, bool)
  row, at = np.nonzero(found.tokens >= 0)
  chosen[row, found.places[row, at]] = True
  assert len(row) == chosen.sum()  # no place twice
  assert not (chosen & ~real).any()
  # Whole words: a piece that continues the token before it is masked if and only if that is.
  follows = real[:, 1:] & real[:, :-1] & t.continues()[before[:, 1:]]
  assert follows.sum() > 1000
  assert (chosen[:, 1:] == chosen[:, :-1])[follows].all()
  # As many as asked: of the words that are left, none is short enough for what is left to mask.
  left = np.minimum(STAGE.predicted, np.maximum(1, np.round(STAGE.mlm_rate * real.sum(1)))) - chosen.sum(1)
  word = np.cumsum(~np.pad(follows, ((0, 0), (1, 0))), axis=1)
  sizes = np.stack([np.bincount(own, mask, LENGTH + 1)[own] for own, mask in zip(word, real)])
  assert left.min() == 0
  assert (np.where(real & ~chosen, sizes, LENGTH).min(1) > left).all()
  # What becomes of them. A token that is drawn may be the one that stood there.
  n, ordinary = chosen.sum(), len(t) - len(t.special)
  now, then = found.rows.tokens[chosen], before[chosen]
  for share, expected in (
    ((now == t.mask).mean(), 0.8),
    (((now != t.mask) & (now != then)).mean(), 0.1 * (1 - 1 / ordinary)),
    ((now == then).mean(), 0.1 * (1 + 1 / ordinary)),
  ):
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / n)
  drawn = now[(now != t.mask) & (now != then)]
  assert not np.isin(drawn, t.special).any()
  assert len(np.unique(drawn)) > 0.9 * ordinary
  assert (found.rows.tokens == before)[~chosen].all()


def test_every_word_is_as_likely_to_be_masked_as_another():
  """One-piece words at every place of a row: each within five standard deviations of the rate."""
  vocabulary = [*tokens.SPECIAL, *"abcdefgh"]
  some = tokens.Tokenizer.train(["a b c d e f g h"], len(vocabulary) + 2)
  store = tokens.in_memory(["a b c d e f g h " * 10] * 50, some)
  train = dataclasses.replace(STAGE, mlm_length=42)
  plain = masking.Plain((store,), np.stack([np.zeros(50, int), np.arange(50)], 1))
  masker = masking.Masking(plain, train, some, 0)
  found = masker.gather([(i, [(i % 50, 0, 40)]) for i in range(2000)])
  counts = np.bincount(found.places.ravel(), minlength=42)[1:41]
  assert (found.tokens >= 0).all()
  assert found.tokens.shape[1] == round(0.15 * 40)
  assert np.abs(counts / 2000 - 0.15).max() < 5 * math.sqrt(0.15 * 0.85 / 2000)


def test_a_character_is_a_word_where_nothing_continues():
  some = tokens.Tokenizer.train(["中文 词 表 数 组"] * 3, 40)
  assert not some.continues()[some.encode(["中文词表"])[0]].any()


def test_held_out_texts_are_the_same_with_any_order_and_no_copy_is_trained_on():
  rng = np.random.default_rng(1)
  rows = [rng.integers(5, 99, rng.integers(0, 9)).astype(np.int32) for _ in range(400)]
  rows += rows[:100]
  key = lambda plain: sorted({plain[i].tobytes() for i in range(len(plain))})
  train, held = masking.held_out((columns.ragged(rows[:250]), columns.ragged(rows[250:])), LENGTH)
  other, again = masking.held_out((columns.ragged(rows[::-1]),), LENGTH)
  assert key(held) == key(again)
  assert key(train) == key(other)
  assert not set(key(train)) & set(key(held))
  assert len(train) + len(held) == sum(len(row) > 0 for row in rows)
  assert 0.02 < len(held) / len(rows) < 0.1
  with pytest.raises(UserError, match="use a larger corpus"):
    masking.held_out((columns.ragged(rows[:1]),), LENGTH)


def test_rows_go_on_where_they_stopped_and_hosts_make_their_own(texts):
  whole = reader(texts)
  for _ in range(3):
    next(whole)
  position, expected = whole.get_state(), next(whole)
  for rows in (np.arange(8), np.arange(0, 8, 2), np.arange(5, 8)):
    host = reader(texts, rows=rows)
    host.set_state(position)
    for x, y in zip(jax.tree.leaves(next(host)), jax.tree.leaves(expected), strict=True):
      np.testing.assert_array_equal(x, y[rows])
  assert not np.array_equal(next(reader(texts, seed=1)).masked.rows.tokens, next(reader(texts)).masked.rows.tokens)


# ---- The loss.


def value_and_gradient(params, batch, train=STAGE, key=None):
  run = jax.jit(jax.value_and_grad(lambda p: step.loss(p, batch, MODEL, train, key), has_aux=True))
  (value, terms), gradient = run(params)
  return value, terms, gradient


@pytest.fixture(scope="module")
def batch(texts):
  return next(reader(texts)).masked


@pytest.fixture(scope="module")
def plain(params, batch):
  """Loss, terms and gradient without dropout."""
  return value_and_gradient(params, scores.Batch(masked=batch))


@pytest.fixture(scope="module")
def whole(params, batch):
  """With dropout, without any mesh."""
  return value_and_gradient(params, scores.Batch(masked=batch), key=KEY)


def test_the_loss_is_that_of_logits_over_the_whole_vocabulary_at_every_place(params, batch, plain):
  """NumPy, float64, on the encoder's hidden states."""
  hidden = np.asarray(params["student"].encoder(batch.rows)[0], np.float64)
  head, word = params["masked"], np.asarray(params["student"].encoder.word.embedding[...], np.float64)
  get = lambda x: np.asarray(x[...], np.float64)
  x = hidden @ get(head.dense.kernel) + get(head.dense.bias)
  x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + TINY.epsilon)
  logits = (x * get(head.norm.scale) + get(head.norm.bias)) @ word.T + get(head.bias)  # [rows, length, V]
  loss = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, original(batch)[..., None], -1)[..., 0]
  row, at = np.nonzero(batch.tokens >= 0)
  value, terms, _ = plain
  np.testing.assert_allclose(value, loss[row, batch.places[row, at]].mean(), rtol=1e-5)
  assert set(terms) == {"mlm"}


def test_texts_in_one_row_are_texts_in_rows_of_their_own(params, batch):
  """Loss and every gradient, with dropout off, and with dropout whose texts bring the same numbers."""
  pieces = [(r, s) for r in range(8) for s in range(1, batch.rows.segments[r].max() + 1)]
  take = lambda x, r, s: (x := x[r][batch.rows.segments[r] == s], np.pad(x, (0, LENGTH - len(x))))[1]
  fields = {name: np.stack([take(getattr(batch.rows, name), *piece) for piece in pieces]) for name in
            ("tokens", "positions", "types")}  # fmt: skip
  lengths = np.array([(batch.rows.segments[r] == s).sum() for r, s in pieces])
  rows = encoder.Rows(**fields, segments=(np.arange(LENGTH) < lengths[:, None]).astype(np.int32))
  places, stood = np.zeros((len(pieces), batch.places.shape[1]), np.int32), []
  for i, (r, s) in enumerate(pieces):
    own = (batch.tokens[r] >= 0) & (batch.rows.segments[r][batch.places[r]] == s)
    begin = int((batch.rows.segments[r] == s).argmax())
    places[i] = np.where(own, batch.places[r] - begin, 0)
    stood.append(np.where(own, batch.tokens[r], -1))
  apart = scores.MaskedRows(rows, places, np.stack(stood))
  numbers = np.array([r + encoder.ROWS * (s - 1) for r, s in pieces], np.uint32)
  seeds = encoder.seeds(jax.random.key(3), 2, 3)
  for noises in ((None, None), tuple(encoder.Noise(seeds, x, x) for x in (np.arange(8, dtype=np.uint32), numbers))):
    total = jax.jit(jax.value_and_grad(lambda p, own, noise: scores.masked(p, own, noise).sum()))
    (packed, gradient), (separate, other) = (total(params, x, n) for x, n in zip((batch, apart), noises))
    np.testing.assert_allclose(packed, separate, rtol=1e-5)
    assert distance(gradient, other) < 1e-4


def test_word_embeddings_learn_from_both_sides_of_the_tie(params, batch, plain):
  """The gradient is the sum of that through what is read and that through what is predicted; neither is 0."""

  def loss(read, predicted):
    def at(word):
      made = jax.tree.map(lambda x: x, params["student"])
      made.encoder.word.embedding = type(made.encoder.word.embedding)(word)
      return made.encoder

    hidden, _ = at(read)(batch.rows)
    logits = params["masked"](jnp.take_along_axis(hidden, batch.places[..., None], 1), at(predicted))
    there = batch.tokens >= 0
    chosen = jnp.take_along_axis(logits, jnp.maximum(batch.tokens, 0)[..., None], -1)[..., 0]
    return jnp.where(there, jax.nn.logsumexp(logits, -1) - chosen, 0).sum() / there.sum()

  word = params["student"].encoder.word.embedding[...]
  sides = jax.jit(jax.grad(loss, (0, 1)))(word, word)
  whole = plain[2]["student"].encoder.word.embedding[...]
  assert min(float(jnp.abs(side).max()) for side in sides) > 1e-3
  assert distance(whole, sides[0] + sides[1]) < 1e-5


@pytest.mark.parametrize(("devices", "chunk", "recompute"), [(2, None, True), (2, 2, True), (1, 2, False)])
def test_loss_and_gradients_do_not_depend_on_devices_or_chunks(params, batch, plain, whole, devices, chunk, recompute):
  """With dropout; rows have different numbers of masked tokens, so a mean of devices' means would be another."""
  assert abs(float(whole[0]) - float(plain[0])) > 1e-4  # dropout does something
  counts = (batch.tokens >= 0).sum(1)
  assert counts[:4].sum() != counts[4:].sum()
  train = dataclasses.replace(STAGE, chunk=chunk, recompute=recompute)
  grid = mesh.make(jax.devices()[:devices])
  with jax.set_mesh(grid):
    own = mesh.shard(scores.Batch(masked=batch), grid)
    value, _, gradient = jax.device_get(value_and_gradient(mesh.whole(params, grid), own, train, KEY))
  np.testing.assert_allclose(value, whole[0], rtol=1e-5)
  assert distance(gradient, whole[2]) < 1e-5


def test_only_the_encoder_and_the_head_learn_and_other_stages_leave_the_head(params, plain):
  names = jax.tree.leaves(step.names(params))
  groups = {name: step.group(name, MODEL, STAGE.weights) for name in names}
  assert all((groups[name] == "body") == name.startswith("student.encoder.") for name in names)
  assert all((groups[name] == "head") == name.startswith("masked.") for name in names)
  assert not any(step.group(name, MODEL, Weights()) != "frozen" for name in names if name.startswith("masked."))
  found = dict(zip(names, jax.tree.leaves(plain[2])))
  moved = {name for name in names if float(jnp.abs(found[name]).max()) > 0}
  assert moved == {name for name, kind in groups.items() if kind != "frozen"}


def test_beside_the_terms_on_pairs_both_parts_are_what_they_are_alone(texts, params, batch, whole):
  """One step, two losses: the sum, each as without the other, dropout on."""
  pairs = jax.tree.map(lambda x: x % len(texts.tokenizer) if x.ndim == 2 else x, make_batch(k=1))
  distil = Weights.only(nll_de=1, dualreg_query=1)
  alone = dataclasses.replace(STAGE, weights=distil, late_pool="global")
  both = dataclasses.replace(alone, weights=dataclasses.replace(distil, mlm=0.5))
  loss = lambda batch, train: jax.jit(lambda p: step.loss(p, batch, MODEL, train, KEY))(params)
  value, terms = loss(dataclasses.replace(pairs, masked=batch), both)
  first, second = whole[1], loss(pairs, alone)[1]
  for name, expected in (first | second).items():
    np.testing.assert_allclose(terms[name], expected, rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(value, sum(second.values()) + 0.5 * first["mlm"], rtol=1e-5)
