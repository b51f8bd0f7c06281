"""The one training step: devices, retraces, what is trained, what is frozen."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
from conftest import TINY, distance, make_batch
from flax import nnx

from ernie_jax import config, cost, encoder, losses, mesh, plan, scores, step
from ernie_jax.config import Optimizer, Train, Weights

PEERS = Weights(margin_mse=1, kl_listwise=1, kl_bidirectional=1, virt=1)  # beside the paper's terms
FULL = Train(steps=4, batch=8, negatives=2, weights=PEERS, late_pool="global", optimizer=Optimizer(learning_rate=1e-3))


def gradients(model, train, params, batch, key):
  return jax.jit(jax.value_and_grad(lambda p: step.loss(p, batch, model, train, key), has_aux=True))(params)


@pytest.fixture(scope="module")
def alone(tiny_params):
  """Loss, terms and gradients without any mesh: every term on, dropout on, hard negatives there."""
  model, params = tiny_params
  return gradients(model, FULL, params, make_batch(), jax.random.key(7))


@pytest.mark.parametrize(
  ("devices", "chunk", "recompute", "scan"),
  [
    (2, 1, True, True),
    (2, 2, False, False),
    (1, 4, False, True),
    (8, None, True, True),
    ("2 processes", 2, True, True),
  ],
)
def test_loss_and_gradients_do_not_depend_on_devices_hosts_or_chunks(
  tiny_params, alone, devices, chunk, recompute, scan, tmp_path, monkeypatch
):
  """Every term, hard negatives, dropout and its twins, the global pool: one result for one global batch."""
  model, params = tiny_params
  if not scan:
    model = dataclasses.replace(model, scan=False)
    params = step.init_params(model, TINY, TINY, jax.random.key(0))
  tile = 8 * 8 * 6 * 9  # MaxSim over the pool takes several turns on every number of devices
  monkeypatch.setattr(scores, "TILE", tile)
  train = dataclasses.replace(FULL, chunk=chunk, recompute=recompute)
  if devices == "2 processes":
    got = processes.run("gradients", tmp_path, model=model, train=train, tile=tile)
  else:
    grid = mesh.make(jax.devices()[:devices])
    with jax.set_mesh(grid):
      batch = mesh.shard(jax.tree.map(np.asarray, make_batch()), grid)
      got = gradients(model, train, mesh.whole(params, grid), batch, jax.random.key(7))
      jax.block_until_ready(got)
  (value, terms), gradient = jax.device_get(got)
  (expected, expected_terms), expected_gradient = jax.device_get(alone)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert set(terms) == PEERS.active
  for name in terms:
    np.testing.assert_allclose(terms[name], expected_terms[name], rtol=1e-5, err_msg=name)
  assert distance(gradient, expected_gradient) < 1e-5


# All that teaches and nothing else that learns: the paper's terms, and others'.
TAUGHT = Weights(margin_mse=1, virt=1)
FIRST = dataclasses.replace(
  FULL,
  weights=TAUGHT,
  final_weights=dataclasses.replace(TAUGHT, nll_ce=3),
  temperature=config.Temperatures(cross=0.5),
  final_temperature=config.Temperatures(cross=0.25, dual=2),
)


def larger(params, by=10):
  """As made, the teacher gives all passages nearly the same logit, and its gradient is what rounding leaves of it."""
  large = lambda name, x: by * x if name.endswith((".kernel", ".embedding")) else x
  return jax.tree.map(large, step.names(params), params)


@pytest.mark.parametrize(
  ("devices", "chunk", "units", "together", "weights"),
  [
    (1, None, 0, False, TAUGHT),
    (1, 2, 0, False, TAUGHT),
    (2, 2, 4, False, TAUGHT),
    (2, 2, 4, True, TAUGHT),
    (8, None, 0, False, TAUGHT),
    ("2 processes", 2, 0, False, TAUGHT),
    (2, 1, 0, False, Weights.only(nll_ce=1)),
  ],
)
def test_the_teacher_before_the_student_is_the_gradient_of_the_loss(
  tiny_params, tmp_path, devices, chunk, units, together, weights
):
  """Dropout and its twins, weights and temperatures on their way; padded or packed, and the warm-up."""
  model, params = tiny_params[0], larger(tiny_params[1], 4)
  train, key, at = dataclasses.replace(FIRST, weights=weights), jax.random.key(7), 0.3
  if weights != TAUGHT:
    train = dataclasses.replace(train, final_weights=None)
  assert train.teaches_first
  if devices == "2 processes":  # they take the parameters as made, in the stage's first step
    params, at = tiny_params[1], 0.0
  whole = jax.jit(lambda p, at: jax.value_and_grad(step.loss, has_aux=True)(p, make_batch(), model, train, key, at))
  (value, terms), slope = jax.device_get(whole(params, at))
  train = dataclasses.replace(train, chunk=chunk)
  if devices == "2 processes":
    (found, parts), gradient = processes.run("gradients", tmp_path, model=model, train=train, tile=scores.TILE)
  else:
    grid = mesh.make(jax.devices()[:devices])
    with jax.set_mesh(grid):
      batch = mesh.shard(jax.tree.map(np.asarray, make_batch(units=units, together=together)), grid)
      if not train.on.needs_student:
        batch = batch.replace(queries=None, passages=None)  # as the warm-up's are
      first = jax.jit(lambda p, batch, at: step.gradient(p, batch, model, train, key, at))
      given = mesh.whole(params, grid), batch, jax.device_put(jnp.float32(at), jax.NamedSharding(grid, jax.P()))
      (found, parts), gradient = jax.device_get(jax.block_until_ready(first(*given)))
  np.testing.assert_allclose(found, value, rtol=1e-5)
  assert set(parts) == set(terms) == weights.active
  for name in terms:
    np.testing.assert_allclose(parts[name], terms[name], rtol=1e-5, err_msg=name)
  if train.on.needs_student:
    assert distance(gradient["student"], slope["student"]) < 1e-5
  else:
    assert not any(x.any() for x in jax.tree.leaves((gradient["student"], slope["student"])))
  assert max(apart(gradient["teacher"], slope["teacher"]).values()) < 1e-5


def apart(teacher, other):
  """The distance of each parameter's gradient alone, but for two that softmax ignores: rounding's."""
  pairs = zip(jax.tree.leaves(step.names(other)), jax.tree.leaves(teacher), jax.tree.leaves(other), strict=True)
  return {name: distance(x, y) for name, x, y in pairs if not name.endswith(("key.bias", "head.bias"))}


@pytest.mark.parametrize("term", ["nll_ce_fgm", "kl_listwise", "kl_bidirectional", "residual", "share_encoder"])
def test_a_teacher_that_learns_from_others_too_does_not_go_first(tiny_params, term):
  """Then the gradient is that of the loss as a whole."""
  model, params = tiny_params[0], larger(tiny_params[1], 4)
  train = dataclasses.replace(FIRST, weights=Weights(), final_weights=None, steps=1)
  if term == "residual":
    train = dataclasses.replace(train, residual=True)
  elif term == "share_encoder":
    model = dataclasses.replace(model, share_encoder=True)
    params = step.init_params(model, TINY, TINY, jax.random.key(0))
  else:
    train = dataclasses.replace(train, weights=Weights(**{term: 1}))
  (value, terms), slope = gradients(model, train, params, make_batch(), jax.random.key(7))
  first = jax.jit(lambda p: step.gradient(p, make_batch(), model, train, jax.random.key(7)))
  (found, parts), gradient = first(params)
  np.testing.assert_allclose(found, value, rtol=1e-6)
  assert set(parts) == set(terms)
  assert distance(gradient, slope) < 1e-6


def lowered(function, a, train, b):
  """A function of (params, batch, model, train, key) for B queries with 4 passages, layers not in a loop; lowered."""
  model = config.Model(scratch=a, dropout=0.0, scan=False)
  params = jax.eval_shape(lambda: step.init_params(model, a, a, jax.random.key(0)))
  batch = jax.eval_shape(lambda: make_batch(b=b, k=4, lq=8, lp=56))
  return jax.jit(lambda p, batch: function(p, batch, model, train, None)).lower(params, batch)


def test_the_teacher_before_the_student_takes_less_memory_and_in_chunks_fewer_flops():
  """Activations of one encoder at a time; and no forward pass of the cross-encoder again: one chunk's is counted."""
  a = dataclasses.replace(TINY, layers=3, width=128, inner=512, positions=64)
  on = dataclasses.replace(Weights(), dualreg_query=0, dualreg_passage=0)
  train = dataclasses.replace(FULL, batch=16, negatives=3, weights=on, late_pool="own")
  whole, first = (lowered(one, a, train, 16) for one in (jax.value_and_grad(step.loss, has_aux=True), step.gradient))
  memory = lambda program: program.compile().memory_analysis().temp_size_in_bytes
  assert memory(first) < 0.7 * memory(whole)
  train = dataclasses.replace(train, chunk=4)
  flops = [
    lowered(one, a, train, 16).cost_analysis()["flops"]
    for one in (jax.value_and_grad(step.loss, has_aux=True), step.gradient)
  ]
  pairs = cost.forward(a, 4 * 4, 8 + 56 - 1)
  assert 0.95 < (flops[0] - flops[1]) / pairs < 1.1


def test_chunks_that_are_held_are_computed_once_and_recomputed_ones_take_less_memory():
  """Held, they take the FLOPs of no chunks at all. (Of recomputed ones the compiler counts one turn of the loop.)

  And each stack's gradient is joined from its layers' once, not once for each chunk.
  """
  a = dataclasses.replace(TINY, layers=3, width=128, inner=512, positions=64)
  whole = dataclasses.replace(FULL, batch=16, negatives=3, weights=Weights.only(nll_de=1))
  grad = jax.value_and_grad(step.loss, has_aux=True)
  programs = {
    name: lowered(grad, a, dataclasses.replace(whole, chunk=chunk, recompute=name == "recomputed"), 16)
    for name, chunk in [("whole", None), ("held", 4), ("recomputed", 4)]
  }
  stacks = {name: len(re.findall(r"concatenate.*-> tensor<3x", p.as_text())) for name, p in programs.items()}
  assert stacks["held"] == 16 <= stacks["whole"]  # as many as arrays of a layer
  made = {name: program.compile() for name, program in programs.items()}
  flops, memory = (
    {name: read(program) for name, program in made.items()}
    for read in (lambda p: p.cost_analysis()["flops"], lambda p: p.memory_analysis().temp_size_in_bytes)
  )
  assert flops["held"] == pytest.approx(flops["whole"], rel=0.01)
  assert memory["recomputed"] < 0.6 * memory["held"]


def test_unrolled_and_rematerialised_equals_scanned(tiny_params, alone):
  model, _ = tiny_params
  other = dataclasses.replace(model, scan=False, remat=True)
  tree = step.init_params(other, TINY, TINY, jax.random.key(0))
  (value, _), gradient = gradients(other, FULL, tree, make_batch(), jax.random.key(7))
  np.testing.assert_allclose(value, alone[0][0], rtol=1e-5)
  assert distance(gradient, alone[1]) < 1e-5


def test_one_compilation_and_a_donated_state(tiny_params):
  model, params = tiny_params
  train_step = step.make_train_step(model, FULL)
  state = step.init_state(jax.tree.map(jnp.copy, params), model, FULL)
  first = jax.tree.leaves(state.params)[0]
  rates = []
  for seed in range(3):
    state, logs = train_step(state, make_batch(seed), jax.random.key(0))
    rates.append(float(logs["learning_rate"]))
  assert train_step._cache_size() == 1
  assert first.is_deleted()
  assert int(state.step) == 3
  assert set(logs) == PEERS.active | {"total", "gradient_norm", "learning_rate", "skipped", "skipped_in_a_row"}
  np.testing.assert_allclose(logs["total"], sum(logs[t] for t in PEERS.active), rtol=1e-5)


def test_a_step_without_a_finite_gradient_changes_nothing_but_its_number(tiny_params):
  """Then training goes on as if that step had not been: the same moments, the same rate."""
  model, params = tiny_params
  train = dataclasses.replace(FULL, weights=Weights.only(nll_ce=1, nll_de=1))
  train_step = step.make_train_step(model, train)
  fresh = lambda: jax.tree.map(jnp.copy, step.init_state(params, model, train))
  state, _ = train_step(fresh(), make_batch(), jax.random.key(0))
  expected = jax.device_get(state)

  def replaced(state, name, value):
    return jax.tree.map(lambda n, x: value if n == name else jnp.copy(x), step.names(state), state)

  bias = "params.teacher.head.bias"
  spoilt = replaced(expected, bias, jnp.full((1,), jnp.nan, jnp.float32))  # not weakly typed, as what a step returns
  spoilt, logs = train_step(spoilt, make_batch(1), jax.random.key(0))
  assert (int(logs["skipped"]), int(logs["skipped_in_a_row"])) == (1, 1)
  assert not np.isfinite(logs["nll_ce"])
  assert not np.isfinite(logs["gradient_norm"])
  assert np.isfinite(logs["nll_de"])
  assert int(spoilt.step) == 2
  healed = replaced(spoilt, bias, jnp.asarray(expected.params["teacher"].head.bias[...]))
  assert distance(healed.params, expected.params) == 0
  assert distance(healed.optimizer.inner_state, expected.optimizer.inner_state) == 0
  again, logs = train_step(healed, make_batch(1), jax.random.key(0))
  assert (int(logs["skipped"]), int(logs["skipped_in_a_row"])) == (1, 0)
  np.testing.assert_allclose(logs["learning_rate"], step.schedule(1e-3, train)(1), rtol=1e-6)
  assert distance(again.params, expected.params) > 1e-3


@pytest.mark.parametrize("factor", [0.0, 1e-30, 0.1, 1.0, 30.0])
def test_clipping_by_a_given_norm_is_optax_clipping(factor):
  tree = {"a": factor * jnp.arange(-3.0, 4.0), "b": jnp.full((2, 2), factor)}
  own, _ = step.clip_by(1.5).update(tree, optax.EmptyState(), norm=optax.tree.norm(tree))
  expected, _ = optax.clip_by_global_norm(1.5).update(tree, optax.EmptyState())
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), own, expected)


@pytest.mark.parametrize("devices", [1, 8])
def test_an_update_is_that_of_optax_whether_finite_or_not(tiny_params, devices):
  """Parameters, which later moments tell of too, and counts; and the state is the same tree."""
  model, params = tiny_params
  train = dataclasses.replace(FULL, optimizer=Optimizer(learning_rate=1e-2, clip=0.5))
  own = step.make_optimizer(model, train)
  adamw = optax.adamw(
    step.schedule(1e-2, train), weight_decay=0.01, mask=lambda t: jax.tree.map(step.decays, step.names(t))
  )
  theirs = optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(0.5), adamw), step.MOST_SKIPPED)
  grid = mesh.make(jax.devices()[:devices])
  with jax.set_mesh(grid):
    params = mesh.whole(params, grid)
    given = step.shares(params, model, train)
    state, other, expected = step.init_state(params, model, train).optimizer, theirs.init(given), given
    ours = jax.jit(lambda *rest: step.updated(own, *rest))
    wait = jax.block_until_ready  # programs with collectives that run at once may wait for each other
    for spoilt in (False, True, True, False, False):
      gradient = wait(
        jax.jit(lambda t, bad=spoilt: jax.tree.map(lambda x: jnp.where(bad, jnp.nan, 1 + jnp.sin(x)), t))(given)
      )
      updates, other = wait(jax.jit(theirs.update)(gradient, other, expected))
      expected = wait(jax.jit(optax.apply_updates)(expected, updates))
      given, state = wait(ours(gradient, wait(jax.jit(optax.tree.norm)(gradient)), state, given))
    assert distance(given, expected) < 1e-5
    assert (int(state.total_notfinite), int(state.notfinite_count)) == (2, 0)
    assert (int(other.total_notfinite), int(other.notfinite_count)) == (2, 0)
    wrapped = optax.apply_if_finite(own, step.MOST_SKIPPED).init(given)
    assert jax.tree.structure(state) == jax.tree.structure(wrapped)


def test_an_update_in_shares_makes_the_same_step_with_less_memory(tiny_params, monkeypatch):
  model, params = tiny_params
  grid = mesh.make()
  train = dataclasses.replace(FULL, weights=Weights.only(nll_ce=1))
  made, held = [], []
  with jax.set_mesh(grid):
    for shares in (lambda tree, *_: tree, step.shares):
      monkeypatch.setattr(step, "shares", shares)
      state = step.init_state(jax.tree.map(jnp.copy, mesh.whole(params, grid)), model, train)
      train_step = step.make_train_step(model, train)
      for seed in range(2):
        batch = mesh.shard(jax.tree.map(np.asarray, make_batch(seed)), grid)
        state, logs = jax.block_until_ready(train_step(state, batch, jax.random.key(0)))
      assert train_step._cache_size() == 1
      made.append(jax.device_get((state.params, logs, state.optimizer.inner_state)))
      held.append(sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.optimizer)))
  # A thousandth of what a step moves. An entry whose gradient is nearly 0 (3.7e-7 here) is moved as far as any other,
  # and so is what rounding changes of it.
  apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), made[1][0], made[0][0])
  assert max(jax.tree.leaves(apart)) < 1e-3 * FULL.optimizer.learning_rate
  np.testing.assert_allclose(made[1][1]["gradient_norm"], made[0][1]["gradient_norm"], rtol=1e-5)
  assert distance(made[1][2], made[0][2]) < 1e-5  # the moments
  assert held[1] < held[0] / 4


def test_what_is_frozen_is_neither_summed_over_devices_nor_gathered(tiny_params):
  """The dual-encoder under a frozen cross-encoder: no more is sent than the student's gradient and parameters."""
  model, params = tiny_params
  grid = mesh.make()
  train = dataclasses.replace(FULL, weights=Weights.only(kl_ce_de=1))
  with jax.set_mesh(grid):
    state = step.init_state(mesh.whole(params, grid), model, train)
    batch = mesh.shard(jax.tree.map(np.asarray, make_batch()), grid)
    program = step.make_train_step(model, train).lower(state, batch, jax.random.key(0)).compile().as_text()
  found = plan.collectives(*plan.computations(program), grid.size)
  sent = lambda kind: sum(c.bytes * c.times for c in found if c.kind == kind)
  student, teacher = (sum(x.nbytes for x in jax.tree.leaves(params[name])) for name in ("student", "teacher"))
  few = 1000  # losses and norms, vectors and texts of the pool
  assert 0.7 * student < sent("all-gather") < student + few < student + teacher / 2
  assert 0.7 * student < sent("all-reduce") < student + few


@pytest.mark.parametrize("dtype", ["mixed", "bfloat16"])
def test_rounded_terms_are_near_those_of_float32_and_all_but_products_is_float32(tiny_params, alone, dtype):
  model, _ = tiny_params
  half = dataclasses.replace(model, dtype=dtype)
  tree = step.init_params(half, TINY, TINY, jax.random.key(0))
  (_, terms), gradient = gradients(half, FULL, tree, make_batch(), jax.random.key(7))
  assert all(
    x.dtype == jnp.float32 for x in jax.tree.leaves((terms, gradient, step.init_state(tree, half, FULL).params))
  )
  found = jax.eval_shape(lambda p: scores.score(p, make_batch(), half, FULL, jax.random.key(7)), tree)
  assert all(x.dtype in (jnp.float32, jnp.bool_) for x in jax.tree.leaves(found))
  for name, value in terms.items():
    np.testing.assert_allclose(value, alone[0][1][name], rtol=0.05, err_msg=name)


def test_the_gradient_of_every_term_is_that_of_finite_differences_in_float64(tiny_params, monkeypatch):
  """The whole step's loss, dropout and twins on, in ten directions through all parameters and one through each array.

  What stands under stop_gradient is held at its first value while parameters move, which is what it means.
  """
  model, params = tiny_params
  held, given = [], None
  model = dataclasses.replace(model)
  object.__setattr__(model, "dtype", "float64")  # not a choice of the user's

  def constant(tree):
    def one(x):
      held.append(x)
      return x if given is None else given[len(held) - 1]

    return jax.tree.map(one, tree)

  with jax.enable_x64(True):
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), jax.device_get(params))
    for module in (wide["student"].encoder, wide["teacher"].encoder):
      module.dtype = "float64"
      for part in nnx.iter_modules(module):
        if isinstance(part[1], nnx.Linear | nnx.LayerNorm | nnx.Embed):
          part[1].dtype = jnp.float64
    batch, key = make_batch(), jax.random.key(7)
    stood = jnp.where(jnp.arange(2) < jnp.arange(8)[:, None] % 3, batch.queries.tokens[:, :2], -1)  # 0 to 2 of a row
    batch = batch.replace(masked=scores.MaskedRows(batch.queries, jnp.zeros_like(stood) + jnp.arange(2), stood))
    wide["masked"] = jax.tree.map(lambda x: 5 * x.astype(jnp.float64) + 0.1, scores.Masked(TINY, jax.random.key(1)))
    train = dataclasses.replace(FULL, weights=dataclasses.replace(PEERS, nll_ce_fgm=1, mlm=1))
    value = lambda p: step.loss(p, batch, model, train, key)[0]
    slope = jax.jit(jax.grad(value))(wide)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(slope))
    monkeypatch.setattr(jax.lax, "stop_gradient", constant)
    constants = jax.jit(lambda p: (value(p), list(held))[1])(wide)

    def moved(p, constants):
      nonlocal given
      given = constants
      held.clear()
      return value(p)

    at = jax.jit(moved)
    leaves, tree = jax.tree.flatten(wide)
    rng = np.random.default_rng(0)
    draw = lambda some: [rng.standard_normal(x.shape) * (i in some) for i, x in enumerate(leaves)]
    every = range(len(leaves))
    for direction in [draw(every) for _ in range(10)] + [draw({i}) for i in every]:
      norm = np.sqrt(sum((d**2).sum() for d in direction))
      reach = 1e-5 / norm
      ends = [tree.unflatten([x + sign * reach * d for x, d in zip(leaves, direction)]) for sign in (1, -1)]
      found = (at(ends[0], constants) - at(ends[1], constants)) / (2 * reach)
      expected = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(slope), direction))
      np.testing.assert_allclose(found / norm, expected / norm, rtol=1e-5, atol=1e-8)


def test_groups_are_batches_of_their_own(tiny_params):
  """Queries that see the passages of their group alone have the loss of a smaller batch."""
  model, params = tiny_params
  on = Weights.only(nll_de=1, nll_li=1, kl_li_de=1)
  terms = lambda batch, train: jax.jit(lambda p: step.loss(p, batch, model, train, None)[1])(params)
  train = dataclasses.replace(FULL, weights=on, in_batch=4)
  batch = make_batch()
  half = dataclasses.replace(train, batch=4, in_batch=None)
  whole = terms(batch, train)
  parts = [terms(jax.tree.map(lambda x: jnp.split(x, 2)[i], batch), half) for i in range(2)]
  for term in on.active:
    np.testing.assert_allclose(whole[term], (parts[0][term] + parts[1][term]) / 2, rtol=1e-5, err_msg=term)
  other = terms(batch, dataclasses.replace(train, in_batch=None))
  assert all(float(other[term]) > float(whole[term]) for term in ("nll_de", "nll_li"))
  grid = mesh.make()  # 8 devices, four of them for a group
  with jax.set_mesh(grid):
    spread = mesh.shard(jax.tree.map(np.asarray, batch), grid)
    found = jax.jit(lambda p, b: step.loss(p, b, model, train, None)[1])(mesh.whole(params, grid), spread)
    for term in on.active:
      np.testing.assert_allclose(found[term], whole[term], rtol=1e-5, err_msg=term)


def test_the_last_step_has_the_last_weights(tiny_params):
  model, params = tiny_params
  plan = {"weights": Weights.only(nll_de=1), "final_weights": Weights.only(nll_de=3), "steps": 3}
  train = dataclasses.replace(FULL, **plan)
  state = step.init_state(jax.tree.map(jnp.copy, params), model, train)
  train_step = step.make_train_step(model, train)
  for weight in (1, 2, 3):
    state, logs = train_step(state, make_batch(), jax.random.key(0))
    np.testing.assert_allclose(logs["total"], weight * logs["nll_de"], rtol=1e-6)
  assert train_step._cache_size() == 1


def test_fgm_moves_the_word_embeddings_by_its_radius_along_the_gradient(tiny_params):
  """On one device, and in chunks on two; the gradient after the move is added to that before it."""
  model, params = tiny_params[0], larger(tiny_params[1])

  def heard(tree):  # softmax ignores the other two
    names = jax.tree.leaves(step.names(tree["teacher"]))
    return [
      x for name, x in zip(names, jax.tree.leaves(tree["teacher"])) if not name.endswith(("key.bias", "head.bias"))
    ]

  train = dataclasses.replace(FULL, weights=Weights.only(nll_ce=1, nll_ce_fgm=1), fgm_radius=0.5)
  alone = dataclasses.replace(train, weights=Weights.only(nll_ce=1))
  plain = jax.jit(jax.value_and_grad(lambda p: step.loss(p, make_batch(), model, alone, None)[0]))
  _, slope = plain(params)
  table = slope["teacher"].encoder.word.embedding[...]
  further = lambda name, x: x + 0.5 * table / jnp.linalg.norm(table) if name == "teacher.encoder.word.embedding" else x
  value, after = plain(jax.tree.map(further, step.names(params), params))
  (_, terms), both = gradients(model, train, params, make_batch(), None)
  np.testing.assert_allclose(terms["nll_ce_fgm"], value, rtol=1e-5)
  assert float(terms["nll_ce_fgm"]) > float(terms["nll_ce"])
  assert distance(heard(both), heard(jax.tree.map(jnp.add, slope, after))) < 1e-5
  grid = mesh.make(jax.devices()[:2])
  with jax.set_mesh(grid):
    batch = mesh.shard(jax.tree.map(np.asarray, make_batch()), grid)
    chunked = dataclasses.replace(train, chunk=2, measure_every=1, weights=dataclasses.replace(train.weights, nll_de=1))
    (_, spread), gradient = gradients(model, chunked, mesh.whole(params, grid), batch, None)
    np.testing.assert_allclose(spread["nll_ce_fgm"], value, rtol=1e-5)
    assert distance(heard(jax.device_get(gradient)), heard(both)) < 1e-5


def test_fgm_asks_for_no_gradient_of_a_gradient(tiny_params, monkeypatch):
  """cuDNN's attention has none; nor have callbacks, which stand for it here."""
  model, params = tiny_params
  opaque = lambda x: jax.pure_callback(lambda x: x, x, x)

  @jax.custom_vjp
  def attention(query, keyed, value):
    return opaque(query)

  attention.defvjp(
    lambda *given: (opaque(given[0]), given), lambda given, slope: (opaque(slope), *map(jnp.zeros_like, given[1:]))
  )
  monkeypatch.setattr(encoder, "_attend", lambda rate, query, keyed, value, mask, noise: attention(query, keyed, value))
  train = dataclasses.replace(FULL, weights=Weights.only(nll_ce=1, nll_ce_fgm=1))
  found = jax.eval_shape(jax.grad(lambda p: step.loss(p, make_batch(), model, train, None)[0]), params)
  assert jax.tree.structure(found) == jax.tree.structure(params)


def test_a_uniform_teacher_is_a_cross_encoder_that_gives_all_the_same(tiny_params):
  """Its terms are those of equal scores and even attention, and no cross-encoder is run."""
  model, params = tiny_params
  on = Weights.only(kl_ce_li=1, kl_ce_de=1, kl_attention=1)
  train = dataclasses.replace(FULL, weights=on, teacher="uniform")
  batch = make_batch()
  found = jax.jit(lambda p: step.loss(p, batch.replace(pairs=None), model, train, None)[1])(params)
  real = dataclasses.replace(train, teacher="frozen")
  given = jax.jit(lambda p: scores.score(p, batch, model, real, None))(params)
  even = given.replace(cross=0 * given.cross, attention=0 * given.attention + 1)
  for term, value in losses.terms(even, real).items():
    np.testing.assert_allclose(found[term], value, rtol=1e-5, err_msg=term)


def moved(model, train, params):
  """Names of parameters that one step changes."""
  before = jax.device_get(params)
  state = step.init_state(jax.tree.map(jnp.copy, params), model, train)
  state, _ = step.make_train_step(model, train)(state, make_batch(), jax.random.key(0))
  names = jax.tree.leaves(step.names(before))
  pairs = zip(names, jax.tree.leaves(before), jax.tree.leaves(state.params))
  return {name for name, old, new in pairs if not np.array_equal(old, new)}


ONE = Optimizer(learning_rate=1e-3, warmup=0.0)


def test_warming_up_the_teacher_leaves_the_student_alone(tiny_params):
  model, params = tiny_params
  train = Train(steps=4, batch=8, negatives=2, weights=Weights.only(nll_ce=1), optimizer=ONE)
  changed = moved(model, train, params)
  assert changed
  assert all(name.startswith("teacher.") for name in changed)


def test_interaction_distillation_leaves_the_teacher_alone(tiny_params):
  model, params = tiny_params
  weights = Weights.only(nll_de=1, nll_li=1, kl_li_de=1)
  train = Train(steps=4, batch=8, negatives=2, weights=weights, late_pool="global", optimizer=ONE)
  changed = moved(model, train, params)
  assert "student.projection.kernel" in changed
  assert all(name.startswith("student.") for name in changed)


def test_a_frozen_teacher_teaches_and_stays(tiny_params):
  model, params = tiny_params
  weights = dataclasses.replace(Weights(), nll_ce=0)
  train = Train(steps=4, batch=8, negatives=2, weights=weights, teacher="frozen", optimizer=ONE)
  changed = moved(model, train, params)
  assert changed
  assert all(name.startswith("student.") for name in changed)


def test_the_teacher_learns_only_from_its_own_loss(tiny_params):
  """Its gradient under all terms is its gradient under nll_ce alone (without dropout, keys differ)."""
  model, params = tiny_params[0], larger(tiny_params[1])
  alone = dataclasses.replace(FULL, weights=Weights.only(nll_ce=1))
  _, full = gradients(model, dataclasses.replace(FULL, weights=Weights()), params, make_batch(), None)
  _, own = gradients(model, alone, params, make_batch(), None)
  names = jax.tree.leaves(step.names(own["teacher"]))
  for name, x, y in zip(names, jax.tree.leaves(full["teacher"]), jax.tree.leaves(own["teacher"]), strict=True):
    if name.endswith(("key.bias", "head.bias")):  # softmax ignores them
      assert max(float(jnp.abs(x).max()), float(jnp.abs(y).max())) < 1e-7, name
    else:
      assert distance(x, y) < 1e-5, name
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(own["student"])) == 0.0


def test_a_term_of_weight_0_costs_nothing(tiny_params):
  model, params = tiny_params

  def flops(weights):
    train = dataclasses.replace(FULL, weights=weights)
    state = step.init_state(params, model, train)
    program = step.make_train_step(model, train).lower(state, make_batch(), jax.random.key(0))
    return program.cost_analysis()["flops"]  # as written: the compiler need not find what is left out

  assert flops(Weights()) < flops(PEERS)
  only_dual = flops(Weights.only(nll_de=1))
  assert only_dual < flops(Weights.only(nll_de=1, nll_li=1)) < flops(Weights())


def test_learning_rate_goes_up_then_down():
  train = Train(steps=100, negatives=1, optimizer=Optimizer(learning_rate=1.0, warmup=0.1))
  rate = np.array([float(step.schedule(1.0, train)(n)) for n in range(100)])
  np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
  np.testing.assert_allclose(rate[10:], np.arange(90, 0, -1) / 90, rtol=1e-6)
  whole = Train(steps=3, negatives=1, optimizer=Optimizer(learning_rate=1.0, warmup=0.0))
  assert float(step.schedule(1.0, whole)(0)) == 1.0


def test_no_decay_on_norms_and_biases(tiny_params):
  _, params = tiny_params
  names = jax.tree.leaves(step.names(params))
  kept = {name for name in names if not step.decays(name)}
  assert "student.encoder.layers.attention_norm.scale" in kept
  assert "student.encoder.norm.bias" in kept
  assert "teacher.head.bias" in kept
  assert {name for name in names if name.endswith((".kernel", ".embedding"))} == set(names) - kept


def test_head_learning_rate_is_the_heads(tiny_params):
  model, params = tiny_params
  heads = {name for name in jax.tree.leaves(step.names(params)) if step.group(name, model, Weights()) == "head"}
  assert heads == {"student.projection.kernel", "teacher.head.kernel", "teacher.head.bias"}
  assert config.Optimizer().head_learning_rate is None


def test_every_part_moves_at_its_own_rate(tiny_params):
  """Adam's first step moves every entry that has a gradient by the rate, whatever the gradient."""
  model, params = tiny_params
  rates = {"learning_rate": 1e-3, "head_learning_rate": 3e-3, "teacher_learning_rate": 5e-4}
  optimizer = Optimizer(**rates, warmup=0.0, weight_decay=0.0, clip=1e9)
  train = dataclasses.replace(FULL, weights=Weights.only(nll_ce=1, nll_de=1, nll_li=1), optimizer=optimizer)
  made = step.make_optimizer(model, train)
  ones = jax.tree.map(jnp.ones_like, params)
  moves, _ = made.update(ones, made.init(params), params, norm=1.0)
  found = dict(zip(jax.tree.leaves(step.names(moves)), (float(-x.max()) for x in jax.tree.leaves(moves))))
  for name, move in found.items():
    head = name.startswith(("student.projection", "teacher.head"))
    expected = 3e-3 if head else 5e-4 if name.startswith("teacher") else 1e-3
    np.testing.assert_allclose(move, expected, rtol=1e-4, err_msg=name)


def test_names_are_unique_and_keep_parts_called_value(tiny_params):
  model, params = tiny_params
  names = jax.tree.leaves(step.names(step.init_state(params, model, FULL)))
  assert len(names) == len(set(names))
  assert "params.student.encoder.layers.value.kernel" in names
