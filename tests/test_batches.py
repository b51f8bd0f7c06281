"""Batches: layout, order, resumption, and negatives that are none."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import TINY, distance, make_batch

from ernie_jax import batches, columns, config, mesh, scores, step, tokens
from ernie_jax.config import UserError

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
  positives[4] = np.array([4, 23])
  negatives = [np.array([(i + 1) % 23, (i + 2) % 23, 25]) for i in range(23)]
  negatives[4] = np.array([24, 23, 4])  # nothing here may be served
  return batches.Texts(
    tokens.in_memory(QUERIES, tokenizer),
    tokens.in_memory(PASSAGES, tokenizer),
    np.array([*range(24), 23, 25]),  # row 24 has the text of row 23
    columns.ragged(positives),
    columns.ragged(negatives),
    tokenizer,
  )


def make(texts, data=DATA, train=TRAIN, seed=0, rows=None, tied=True):
  return batches.batches(texts, data, train, seed, batches.layout(data, train, 1, texts, tied), rows)


def take(iterator, count):
  return [next(iterator) for _ in range(count)]


def test_a_pair_holds_the_tokens_of_its_query_and_passage(texts):
  batch = next(make(texts))
  for i in range(len(batch.texts)):
    content = lambda rows, row: rows.tokens[row][rows.segments[row] > 0].tolist()
    query, passage = content(batch.queries, i // 3), content(batch.passages, i)
    assert content(batch.pairs, i) == query + passage[1:]
    assert len(passage) <= DATA.passage_length
    assert len(query) <= DATA.query_length


def test_the_order_follows_from_the_seed(texts):
  a, b, c = (take(make(texts, seed=seed), 7) for seed in (3, 3, 4))
  same = lambda x, y: all(np.array_equal(m, n) for m, n in zip(jax.tree.leaves(x), jax.tree.leaves(y)))
  assert same(a, b)
  assert not same(a, c)


def test_every_query_comes_once_an_epoch_in_a_new_order(texts):
  train = config.Train(steps=5, batch=23, negatives=1)
  epochs = [batch.known[:, 0].tolist() for batch in take(make(texts, train=train), 2)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(23))
  assert epochs[0] != epochs[1]


def test_a_restored_position_gives_the_very_next_batch(texts):
  iterator = make(texts)
  take(iterator, 4)  # past the end of the first epoch
  position = iterator.get_state()
  expected = take(iterator, 3)
  other = make(texts)
  other.set_state(position)
  for a, b in zip(expected, take(other, 3)):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
      np.testing.assert_array_equal(x, y)


def test_hosts_make_their_own_rows_of_one_global_batch_and_may_change_in_number(texts):
  """Rows of two hosts, also where the mesh does not give a host neighbouring rows, together are one host's batch."""
  whole = make(texts)
  take(whole, 3)
  position = whole.get_state()
  expected = take(whole, 2)
  lists = 1 + TRAIN.negatives
  for shares in (np.split(np.arange(TRAIN.batch), 2), (np.arange(0, TRAIN.batch, 2), np.arange(1, TRAIN.batch, 2))):
    for rows in shares:
      host = make(texts, rows=rows)
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


def test_of_a_querys_hard_negatives_the_first_can_be_asked_for(texts):
  listed = texts.negatives[0].tolist()
  for hardest in range(3):
    drawn = [batches.choose(texts, 0, 3, np.random.default_rng(seed), hardest)[1:].tolist() for seed in range(400)]
    assert all(set(listed[:hardest]) <= set(own) for own in drawn)
    assert {row for own in drawn for row in own} > set(listed)  # the others only by chance, as any passage


def test_known_positives_are_named_by_text(texts):
  units = [batches.Unit([batches.Example(0, q, np.array(own), {})], None) for q, own in ((4, [4, 1]), (0, [0, 24]))]
  batch = batches.gather(units, texts, DATA, batches.layout(DATA, TRAIN, 1), 2)
  assert batch.known.tolist() == [[4, 23], [0, -1]]
  assert batch.texts.tolist() == [4, 1, 0, 23]  # row 24 counts as row 23, whose text it has


# ---- Packing.


def test_packed_equals_padded(tiny_params):
  """Every term and every gradient, with dropout and its twins; packed in chunks on two devices, padded on one."""
  model, params = tiny_params
  peers = config.Weights(margin_mse=1, kl_listwise=1, kl_bidirectional=1, virt=1)
  train = config.Train(batch=8, negatives=2, weights=peers, late_pool="global")
  found = []
  packed = (2, 2, 4, True), (1, 2, 4, False)
  kinds = [(1, None, 0, True, False), *((*kind, together) for kind in packed for together in (False, True))]
  for devices, chunk, units, recompute, together in kinds:
    settings = dataclasses.replace(train, chunk=chunk, recompute=recompute)
    grid = mesh.make(jax.devices()[:devices])
    with jax.set_mesh(grid):
      loss = lambda p, b, settings=settings: step.loss(p, b, model, settings, jax.random.key(3))
      batch = mesh.shard(jax.tree.map(np.asarray, make_batch(units=units, together=together)), grid)
      assert (batch.queries.tokens is None) == together
      if not together:
        lengths = [rows.tokens.shape[1] for rows in (batch.queries, batch.passages)]
        assert (lengths[0] == lengths[1]) == (units > 0)  # packed, both go through the encoder in one pass
      found.append(jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(mesh.whole(params, grid), batch)))
  ((_, padded), padded_gradient), *others = found
  assert set(padded) == train.weights.active
  for (_, packed), packed_gradient in others:
    for term in padded:
      np.testing.assert_allclose(packed[term], padded[term], rtol=1e-5, atol=1e-6, err_msg=term)
    assert distance(packed_gradient, padded_gradient) < 1e-5


@pytest.mark.parametrize(("tied", "pooling"), [(True, "cls"), (True, "mean"), (False, "cls")])
def test_packed_texts_with_markers_and_masks_give_the_terms_of_padded_ones(texts, tied, pooling):
  """From the token store to every term, with dropout; queries with unread [MASK]s, beside passages or not."""
  data = dataclasses.replace(DATA, markers=True, augment=True, query_length=7)
  packed = dataclasses.replace(data, pack=24)
  train = dataclasses.replace(TRAIN, batch=4, late_pool="global")
  model = config.Model(late_width=8, tied=tied, pooling=pooling)
  a = dataclasses.replace(TINY, vocabulary=len(texts.tokenizer), special=texts.tokenizer.special, layers=1)
  params, rng = step.init_params(model, a, a, jax.random.key(0)), np.random.default_rng(0)
  shape = batches.layout(packed, train, 1, texts, tied)
  size, chosen = batches.sizes(texts, packed, shape.together), []
  for number, query in enumerate((0, 4, 7, 9)):
    own = batches.choose(texts, query, train.negatives, rng)
    chosen.append(batches.Example(number, query, own, size(query, own)))
  places, full = batches.fit(chosen, {tower: (count + 3, shape.length[tower]) for tower, count in shape.count.items()})
  assert full is None
  room = dataclasses.replace(shape, count={tower: count + 3 for tower, count in shape.count.items()})
  terms = []
  for way, layout, where in ((data, batches.layout(data, train, 1, texts, tied), None), (packed, room, places)):
    batch = batches.gather([batches.Unit(chosen, where)], texts, way, layout, 2)
    grid = mesh.make(jax.devices()[:1])
    with jax.set_mesh(grid):
      one = lambda p, b: step.loss(p, b, model, train, jax.random.key(3))[1]
      terms.append(jax.device_get(jax.jit(one)(mesh.whole(params, grid), mesh.shard(batch, grid))))
  assert set(terms[0]) == train.weights.active
  for term in terms[0]:
    np.testing.assert_allclose(terms[1][term], terms[0][term], rtol=1e-5, atol=1e-6, err_msg=term)


def test_packed_mean_pooling_equals_padded(tiny_params):
  model, params = dataclasses.replace(tiny_params[0], pooling="mean", cosine=True), tiny_params[1]
  embed = jax.jit(lambda rows: scores.embed(params["student"], model, rows, None, query=False))
  padded, packed = (embed(make_batch(units=units).passages) for units in (0, 1))
  np.testing.assert_array_equal(packed.mask, padded.mask)
  np.testing.assert_allclose(packed.vector, padded.vector, rtol=1e-4, atol=1e-6)
  there = np.asarray(padded.mask)
  np.testing.assert_allclose(packed.tokens[there], padded.tokens[there], rtol=1e-4, atol=1e-5)


def test_a_unit_of_another_size_is_refused(tiny_params):
  model, params = tiny_params
  train = config.Train(batch=8, negatives=2, late_pool="global", chunk=4)
  with pytest.raises(ValueError, match="units of 8 queries, encoded 4"):
    jax.eval_shape(lambda p, b: step.loss(p, b, model, train, None), params, make_batch(units=1))


def test_first_fit_keeps_texts_apart_and_fills_rows():
  rng = np.random.default_rng(0)
  for _ in range(50):
    sizes = rng.integers(1, 60, 40)
    count = 40
    places = batches.first_fit(sizes, 64, count)
    used = np.zeros(64 * count, int)
    for place, size in zip(places, sizes):
      assert place // 64 == (place + size - 1) // 64  # within one row
      used[place : place + size] += 1
    assert used.max() == 1
  assert batches.first_fit(np.array([40, 40]), 64, 1) is None
  assert batches.first_fit(np.array([40, 40, 40]), 64, 2) is None  # 120 tokens of 128, but no room for the third
  assert batches.first_fit(np.array([30, 34, 64]), 64, 2).tolist() == [98, 64, 0]


PACKED = dataclasses.replace(DATA, pack=24)
PARTS = ("queries", "passages", "pairs")


@pytest.mark.parametrize("tied", [True, False])
def test_packed_batches_hold_what_padded_ones_hold(texts, tied):
  """Every example once an epoch, its tokens those of the padded batch; none is lost where it had to wait."""
  train = dataclasses.replace(TRAIN, batch=8, chunk=4)
  shape = batches.layout(PACKED, train, 1, texts, tied)
  assert shape.unit == 4
  assert shape.together == tied
  iterator, state = make(texts, PACKED, train, tied=tied), []
  seen = []
  for batch in (next(iterator) for _ in range(23)):
    state.append(iterator.get_state())
    for tower, longest in (("queries", 8), ("passages", 10), ("pairs", 17)):
      rows = getattr(batch, tower)
      assert rows.longest == longest
      if tower == "queries" and tied:
        assert rows.tokens is rows.segments is None
      else:
        assert rows.tokens.shape == shape.rows(8)[tower]
    queries, before = (batch.passages, 12) if tied else (batch.queries, 0)  # texts of a unit before its queries
    for i, known in enumerate(batch.known[:, 0].tolist()):
      take = lambda rows, j, per, before=0: rows.tokens.reshape(2, -1)[j // per][
        rows.segments.reshape(2, -1)[j // per] == 1 + before + j % per
      ]
      query = take(queries, i, 4, before).tolist()
      begin = batch.queries.starts[i]
      assert queries.tokens.reshape(2, -1)[i // 4][begin : begin + len(query)].tolist() == query
      assert query == [2, *texts.queries[known].tolist()[:6], 3]
      for j in range(3 * i, 3 * i + 3):
        passage, pair = take(batch.passages, j, 12).tolist(), take(batch.pairs, j, 12).tolist()
        assert pair == query + passage[1:]
        begin = batch.passages.starts[j]
        assert batch.passages.positions.reshape(2, -1)[j // 12][begin : begin + len(passage)].tolist() == list(
          range(len(passage))
        )
      seen.append(known)
  waiting = [number for number in state[-1]["waiting"]]
  assert len(seen) + len(waiting) == state[-1]["next"]  # 184 examples are 8 epochs
  counts = np.bincount(seen, minlength=23)
  assert counts.max() - counts.min() <= 1 + len(waiting)


def test_rows_are_a_whole_number_of_packs(texts):
  """Those of a tower whose texts may be longer than one are two, here of pairs: 17 tokens."""
  for pack, length in ((10, {"queries": 10, "passages": 10, "pairs": 20}), (17, dict.fromkeys(PARTS, 17))):
    data = dataclasses.replace(DATA, pack=pack)
    assert batches.layout(data, TRAIN, 1, texts, tied=False).length == length
    together = batches.layout(data, TRAIN, 1, texts)
    assert together.length == {tower: length[tower] for tower in ("passages", "pairs")}


@pytest.mark.parametrize("tied", [True, False])
def test_packed_hosts_make_their_units_of_one_global_batch_and_go_on_where_one_stopped(texts, tied):
  train = dataclasses.replace(TRAIN, chunk=2)
  whole = make(texts, PACKED, train, tied=tied)
  take(whole, 3)
  position = whole.get_state()
  expected = take(whole, 3)
  for first in (0, 4):
    host = make(texts, PACKED, train, rows=np.arange(first, first + 4), tied=tied)
    host.set_state(position)
    for own, batch in zip(take(host, 3), expected, strict=True):
      for part, all_ in zip(jax.tree.leaves(own), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(part, np.split(all_, 2)[first // 4])


def test_long_examples_wait_and_none_for_ever():
  """A unit has room for one large example, three come together; a unit that cannot hold its queries says so."""
  draw = lambda n: batches.Example(n, n, np.zeros(0, int), {"passages": np.full(1, 40 if n % 16 < 3 else 8)})
  queue = batches.Queue(draw)
  seen = [e.number for _ in range(100) for e in queue.unit(4, {"passages": (1, 88)}).examples]
  assert queue.overflows["passages"] > 10
  assert len(queue.waiting) <= 4
  assert sorted(seen + [e.number for e in queue.waiting]) == list(range(queue.next))
  assert max(abs(place - number) for place, number in enumerate(seen)) <= 12
  with pytest.raises(UserError, match="too few to be packed together in rows of 24"):
    queue.unit(4, {"passages": (1, 24)})


@pytest.mark.parametrize("tied", [True, False])
def test_a_unit_has_room_for_the_largest_example_beside_small_ones(texts, tied):
  """One that the trial did not meet must not stop the run."""
  for unit in (2, 8):
    train = dataclasses.replace(TRAIN, chunk=unit)
    shape = batches.layout(PACKED, train, 1, texts, tied)
    small, largest = (
      batches.by_tower(*(np.full(n, x) for n, x in zip((1, 3, 3), own, strict=True)), together=tied)
      for own in ((5, 8, 10), (8, 10, 17))
    )
    chosen = [batches.Example(n, n, np.zeros(3, int), small if n else largest) for n in range(unit)]
    assert batches.fit(chosen, {tower: (n, shape.length[tower]) for tower, n in shape.count.items()})[1] is None
