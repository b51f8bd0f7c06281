"""The loop: exact resumption, logs without repeats, and a loss that is not finite."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from conftest import TINY, distance, shared

from ernie_jax import batches, columns, config, mesh, step, tokens, verbs
from ernie_jax import train as loop
from ernie_jax.config import Interrupted, Optimizer, Train, UserError

DATA = config.Data(query_length=8, passage_length=10)
MODEL = config.Model(late_width=8, dropout=0.1)
STAGE = Train(
  steps=4,
  batch=8,
  negatives=1,
  late_pool="global",
  optimizer=Optimizer(learning_rate=1e-3),
  checkpoint_every=2,
)

LIGHT = dataclasses.replace(STAGE, weights=config.Weights.only(nll_ce=1, nll_de=1))  # where the terms do not matter


@pytest.fixture(scope="module", autouse=True)
def grid():
  with jax.set_mesh(mesh.make()):
    yield


@pytest.fixture(scope="module", autouse=True)
def one_program():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step, "make_train_step", shared(step.make_train_step))
    yield


@pytest.fixture(scope="module")
def texts():
  queries = [f"what is number {i}" for i in range(20)]
  passages = [f"number {i} is {i}, the one after {i - 1}" for i in range(20)]
  tokenizer = tokens.Tokenizer.train(queries + passages, 80)
  store = lambda texts: tokens.in_memory(texts, tokenizer)
  one = [np.array([i]) for i in range(20)]
  none = columns.ragged([x[:0] for x in one])
  return batches.Texts(store(queries), store(passages), np.arange(20), columns.ragged(one), none, tokenizer)


@pytest.fixture(scope="module")
def params(texts):
  a = dataclasses.replace(TINY, vocabulary=len(texts.tokenizer), special=texts.tokenizer.special, layers=1)
  return mesh.whole(step.init_params(MODEL, a, a, jax.random.key(0)), mesh.make())


def run(directory, params, texts, stage=STAGE, measure=None):
  return loop.train(directory, params, texts, MODEL, DATA, stage, 5, measure, "MRR@10")


def logged(directory):
  lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
  return [(line["step"], line["terms"], line["total"]) for line in lines]


def same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def whole(params, texts, tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  return directory, run(directory, params, texts)


def test_every_term_is_logged_at_every_step_and_one_program_is_compiled(whole):
  directory, found = whole
  steps = logged(directory)
  assert [number for number, *_ in steps] == [1, 2, 3, 4]
  assert all(set(terms) == set(STAGE.weights.active) for _, terms, _ in steps)
  assert (found.compilations, found.step) == (1, 4)


def test_tensorboard_has_terms_weights_rate_and_speed(whole):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  board = EventAccumulator(str(whole[0] / "tensorboard"))
  board.Reload()
  names = {f"train/{t}" for t in STAGE.weights.active} | {f"weight/{t}" for t in STAGE.weights.active}
  names |= {f"train/{name}" for name in ("total", "gradient_norm", "learning_rate", "skipped", "skipped_in_a_row")}
  names |= {f"speed/{name}" for name in ("queries_per_second", "tokens_per_second", "real_tokens")}
  assert set(board.Tags()["scalars"]) == names
  assert [e.step for e in board.Scalars("train/total")] == [1, 2, 3, 4]
  np.testing.assert_allclose([e.value for e in board.Scalars("train/total")], [x for *_, x in logged(whole[0])], 1e-5)
  assert all(0 < e.value < 1 for e in board.Scalars("speed/real_tokens"))


def test_rates_count_every_token_that_is_computed(texts):
  batch = next(batches.batches(texts, DATA, STAGE, 0, batches.layout(DATA, STAGE, 8)))
  found = loop.rates(batch, STAGE, 2.0, 1e9)
  pairs, passages, queries = 16 * DATA.pair_length, 16 * DATA.passage_length, 8 * DATA.query_length
  assert found["tokens_per_second"] == (pairs + passages + queries) / 2
  assert found["queries_per_second"] == 4
  real = sum((rows.segments > 0).sum() for rows in (batch.queries, batch.passages, batch.pairs))
  assert found["real_tokens"] == real / (pairs + passages + queries)
  student = dataclasses.replace(STAGE, weights=config.Weights.only(nll_de=1))
  batch = next(batches.batches(texts, DATA, student, 0, batches.layout(DATA, student, 8)))
  assert loop.rates(batch, student, 2.0, 1e9)["tokens_per_second"] == (passages + queries) / 2
  packed = dataclasses.replace(DATA, pack=20)
  shape = batches.layout(packed, student, 1, texts)
  batch = next(batches.batches(texts, packed, student, 0, shape))
  found = loop.rates(batch, student, 2.0, 1e9)  # queries stand in the rows of passages
  assert found["tokens_per_second"] == shape.count["passages"] * 20 / 2
  sizes = batches.sizes(texts, packed, together=False)
  drawn = [sizes(int(row), np.array([row])) for row in range(20)]
  shortest = sum(sorted(int(own["queries"].sum() + 2 * own["passages"].min()) for own in drawn)[:8])
  assert shortest / (shape.count["passages"] * 20) <= found["real_tokens"] < 1


class Killed(BaseException):
  pass


def test_a_stage_goes_on_with_its_layers_unrolled_and_recomputed(params, texts, tmp_path, monkeypatch):
  """What memory asked for in the middle of a stage: the state and its place in the data are restored, by rounding."""
  plain = run(tmp_path / "plain", params, texts, LIGHT)
  real, calls = loop.mesh.shard, []

  def shard(*arguments):
    calls.append(1)
    if len(calls) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments)

  monkeypatch.setattr(loop.mesh, "shard", shard)
  with pytest.raises(Interrupted, match="after step 2"):
    run(tmp_path / "other", params, texts, LIGHT)
  other, tall = dataclasses.replace(MODEL, scan=False, remat=True), params["student"].encoder.architecture
  given = mesh.whole(step.init_params(other, tall, tall, jax.random.key(1)), mesh.make())  # other values: not read
  found = loop.train(tmp_path / "other", given, texts, other, DATA, LIGHT, 5)
  assert found.params["student"].encoder.remat
  assert not found.params["student"].encoder.scan
  (*_, before), (*_, after) = logged(tmp_path / "plain"), logged(tmp_path / "other")
  assert after[0] == before[0] == 4
  assert after[2] == pytest.approx(before[2], rel=1e-6)
  for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(plain.params), strict=True):
    assert distance(x, y) < 1e-5


def test_stopped_and_continued_equals_uninterrupted_bit_for_bit(whole, params, texts, tmp_path, monkeypatch):
  """Ctrl-C in step 1, SIGTERM in step 2, a kill in step 4 (its checkpoint is of step 2), Ctrl-C after it, the end."""
  directory, expected = whole
  real = loop.mesh.shard

  def at(call, act):
    """Acts when a step gets its batch: the first or a later one from here on."""
    calls = []

    def shard(*arguments):
      calls.append(1)
      if len(calls) == call:
        act()
      return real(*arguments)

    monkeypatch.setattr(loop.mesh, "shard", shard)

  def kill():
    raise Killed

  for number, name in enumerate((signal.SIGINT, signal.SIGTERM), 1):
    at(1, lambda: os.kill(os.getpid(), name))
    with pytest.raises(Interrupted, match=f"after step {number}") as stopped:
      run(tmp_path, params, texts)
    assert stopped.value.signal == name
    assert [step for step, *_ in logged(tmp_path)] == list(range(1, number + 1))
  at(2, kill)  # step 4: the last checkpoint is of step 2
  with pytest.raises(Killed):
    run(tmp_path, params, texts)
  assert [number for number, *_ in logged(tmp_path)] == [1, 2, 3]
  monkeypatch.setattr(loop.mesh, "shard", real)
  close = loop.Checkpoints.__exit__
  asked = lambda *arguments: (os.kill(os.getpid(), signal.SIGINT), close(*arguments))
  with monkeypatch.context() as patch:
    patch.setattr(loop.Checkpoints, "__exit__", asked)  # when no step is left to answer it
    with pytest.raises(Interrupted):
      run(tmp_path, params, texts)
  got = run(tmp_path, params, texts)
  assert logged(tmp_path) == logged(directory)
  same(got.params, expected.params)


def refreshing(folder, texts):
  """Hard negatives that hang on the parameters; a stage that continues finds them in a file."""
  calls = []

  def refresh(params, done):
    path = folder / f"negatives-{done}.npy"
    calls.append((done, params is not None))
    if not path.is_file():
      weights = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params["student"])]).astype(np.float64)
      np.save(path, np.argsort(np.sin(1e6 * weights[: 20 * 20].reshape(20, 20)), axis=1)[:, :2])
    return dataclasses.replace(texts, negatives=columns.ragged(list(np.load(path))))

  return refresh, calls


@pytest.mark.parametrize("pack", [None, 24])
def test_negatives_mined_on_the_way_also_after_interruptions(params, texts, tmp_path, monkeypatch, pack):
  """Every 2 of 6 steps. Killed in the step after the first mining, stopped one later, killed in the second mining."""
  stage = dataclasses.replace(LIGHT, steps=6, checkpoint_every=100, chunk=1)
  data = dataclasses.replace(DATA, pack=pack)
  go = lambda folder, refresh: loop.train(
    folder, params, texts, MODEL, data, stage, 5, refresh=refresh, every=2 if refresh else 0
  )
  for name in ("whole", "broken", "never"):
    (tmp_path / name).mkdir()
  never = go(tmp_path / "never", None)
  refresh, calls = refreshing(tmp_path / "whole", texts)
  expected = go(tmp_path / "whole", refresh)
  assert calls == [(2, True), (4, True)]  # not after the last step
  assert expected.compilations == never.compilations  # tests share programs: this run compiled none of its own
  without, found = logged(tmp_path / "never"), logged(tmp_path / "whole")
  assert without[:2] == found[:2]
  assert all(a != b for a, b in zip(without[2:], found[2:], strict=True))

  again, calls = refreshing(tmp_path / "broken", texts)
  real, kinds = loop.mesh.shard, iter([None, None, "kill", "stop"])

  def shard(*arguments):
    match next(kinds, None):
      case "kill":
        raise Killed
      case "stop":
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)

  def killed_while_mining(params, done):
    if done == 4:
      raise Killed
    return again(params, done)

  monkeypatch.setattr(loop.mesh, "shard", shard)
  with pytest.raises(Killed):
    go(tmp_path / "broken", again)
  with pytest.raises(Interrupted, match="after step 3"):
    go(tmp_path / "broken", again)
  with pytest.raises(Killed):
    go(tmp_path / "broken", killed_while_mining)
  got = go(tmp_path / "broken", again)
  assert calls == [(2, True), (2, True), (2, False), (4, True)]
  assert logged(tmp_path / "broken") == logged(tmp_path / "whole")
  same(got.params, expected.params)


def test_ctrl_c_is_answered_while_negatives_are_mined(params, texts, tmp_path):
  """By its own exception, not after the mining; the step before is saved."""
  stage = dataclasses.replace(LIGHT, checkpoint_every=100)

  def refresh(params, done):
    signal.raise_signal(signal.SIGINT)
    raise AssertionError("went on")

  with pytest.raises(KeyboardInterrupt):
    loop.train(tmp_path, params, texts, MODEL, DATA, stage, 5, refresh=refresh, every=2)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_finished_stage_is_read_back(whole, params):
  directory, expected = whole
  same(loop.finished(directory, params, MODEL, STAGE, expected.step), expected.params)


def test_the_given_parameters_stay(whole, params):
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_the_best_measured_step_is_the_result_also_after_an_interruption(params, texts, tmp_path):
  """Measured at steps 2, 4, 6: step 2 is the best, and outlives newer checkpoints; ties go to the earlier step."""
  stage = dataclasses.replace(LIGHT, steps=6, measure_every=2, keep=1)
  values, seen = iter([0.5, 0.3, 0.5]), {}

  def measure(params):
    seen[len(seen)] = jax.device_get(params)
    if len(seen) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return {"MRR@10": next(values)}

  with pytest.raises(Interrupted, match="after step 4"):
    run(tmp_path, params, texts, stage, measure)
  found = run(tmp_path, params, texts, stage, measure)
  assert (found.step, found.best) == (2, {"step": 2, "metrics": {"MRR@10": 0.5}})
  same(found.params, seen[0])
  assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 6]
  same(loop.finished(tmp_path, params, MODEL, stage, 2), seen[0])
  lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
  assert [(line["step"], line["dev"]["MRR@10"]) for line in lines if "dev" in line] == [(2, 0.5), (4, 0.3), (6, 0.5)]


def test_ten_steps_without_a_finite_gradient_end_with_the_terms_named(params, texts, tmp_path, capsys):
  broken = {**params, "teacher": jax.tree.map(lambda x: x, params["teacher"])}
  broken["teacher"].head = jax.tree.map(lambda x: x * np.nan, params["teacher"].head)
  stage = dataclasses.replace(STAGE, steps=12, weights=config.Weights.only(nll_ce=1, nll_de=1, kl_ce_de=1))
  with pytest.raises(UserError, match=r"step 10: kl_ce_de, nll_ce is not finite, 10 steps in a row"):
    run(tmp_path, broken, texts, stage)
  assert "step 9 skipped: kl_ce_de, nll_ce is not finite" in capsys.readouterr().err
  kept = loop.finished(tmp_path, params, MODEL, stage, 8)
  same(kept["student"], params["student"])  # nothing of the ten was applied


def test_training_goes_on_after_a_damaged_checkpoint(whole, params, texts, tmp_path):
  """The last checkpoint is damaged: its stage is trained again from the one before, to the same end."""
  directory, expected = whole
  shutil.copytree(directory, tmp_path / "copy")
  for path in (tmp_path / "copy" / "checkpoints" / "4").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  got = run(tmp_path / "copy", params, texts)
  same(got.params, expected.params)
  same(loop.finished(tmp_path / "copy", params, MODEL, STAGE, 4), expected.params)


@pytest.mark.parametrize(
  ("batch", "chunk", "words"),
  [
    (12, None, "over 8 devices; use 8 or 16"),
    (4, None, "over 8 devices; use 8"),
    (24, 2, "over 8 devices in chunks of 2 queries; use 16 or 32, or chunk=1"),
    (48, 4, "use 32 or 64, or chunk=3"),
  ],
)
def test_a_batch_that_does_not_divide_is_refused_with_good_sizes(params, texts, tmp_path, batch, chunk, words):
  with pytest.raises(UserError, match=f"batch={batch}: does not divide .*{words}"):
    run(tmp_path, params, texts, dataclasses.replace(STAGE, batch=batch, chunk=chunk))


def test_sigterm_to_one_of_two_processes_stops_both_at_one_step_and_they_continue(params, texts, tmp_path):
  """Then the two end where one process with 8 devices does."""
  directory = tmp_path / "one"
  expected = run(directory, params, texts, LIGHT)
  settings = {"texts": texts, "params": jax.device_get(params), "model": MODEL, "data": DATA, "stage": LIGHT}
  text, number = processes.run("train", tmp_path, directory=tmp_path / "run", stop=2, **settings)
  assert number == signal.SIGTERM
  stopped = int(text.split()[-1])
  assert 2 <= stopped < LIGHT.steps
  assert [number for number, *_ in logged(tmp_path / "run")] == list(range(1, stopped + 1))
  got, last = processes.run("train", tmp_path, directory=tmp_path / "run", stop=0, **settings)
  assert last == LIGHT.steps
  np.testing.assert_allclose([x for *_, x in logged(tmp_path / "run")], [x for *_, x in logged(directory)], 1e-5)
  # Adam's first moves are as long for every gradient: rounding makes those of a key's bias and the cross-encoder's, of
  # which softmax knows nothing, and shows where others are near 0 (seen: 1e-4 of the typical one, off by 3e-4).
  names, apart = jax.tree.leaves(step.names(got)), []
  for name, x, y in zip(names, jax.tree.leaves(got), jax.tree.leaves(expected.params), strict=True):
    if not name.endswith(("key.bias", "teacher.head.bias")):
      assert distance(x, y) < 1e-3, name
      apart.append(np.abs(x - y).ravel() > 1e-4 * np.abs(y).max())
  assert np.concatenate(apart).mean() < 1e-3


def test_sigterm_while_measuring_finishes_the_measurement(params, texts, tmp_path):
  """With several processes it arrives inside of the measurement, as an exception."""
  stage = dataclasses.replace(LIGHT, measure_every=2)
  calls = []

  def measure(params):
    calls.append(1)
    if len(calls) == 1:
      raise Interrupted("encode", signal.SIGTERM)
    return {"MRR@10": 0.5}

  with pytest.raises(Interrupted, match="stopped and saved after step 2") as stopped:
    run(tmp_path, params, texts, stage, measure)
  assert stopped.value.signal == signal.SIGTERM
  assert run(tmp_path, params, texts, stage, measure).best == {"step": 2, "metrics": {"MRR@10": 0.5}}
  assert len(calls) == 3


def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints(params, texts, tmp_path):
  """The file size limit stands in for the disk's end: writing fails in the same places, in a real process."""
  import resource

  before = run(tmp_path, params, texts, LIGHT)
  longer = dataclasses.replace(LIGHT, steps=6)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  try:
    with pytest.raises(UserError, match="File too large") as error:
      run(tmp_path, params, texts, longer)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "\n" not in str(error.value)
  same(loop.finished(tmp_path, params, MODEL, LIGHT, 4), before.params)


@pytest.fixture
def alone(monkeypatch):
  """One device: the next step is given to it before a step's logs are read. Calling it switches that off."""
  one = mesh.make(jax.devices()[:1])
  monkeypatch.setattr(mesh, "make", lambda: one)
  monkeypatch.setattr(jax, "local_device_count", lambda: 1)
  with jax.set_mesh(one):
    yield lambda: monkeypatch.setattr(jax, "local_device_count", lambda: 8)


def test_logs_are_read_after_the_next_step_was_given_and_are_those_of_steps_one_by_one(
  params, texts, tmp_path, monkeypatch, alone
):
  """The same lines and parameters, bit for bit, also after a signal and a kill; none is saved before it is read."""
  stage = dataclasses.replace(LIGHT, steps=6, checkpoint_every=3, measure_every=3)
  measure = lambda params: {"MRR@10": float(jnp.sum(params["student"].encoder.norm.bias[...]))}
  events, give, write = [], loop.mesh.shard, loop._Log.write
  stops = {}  # what happens as a step is given

  def given(*arguments):
    events.append(("given", sum(kind == "given" for kind, _ in events) + 1))
    stops.pop(events[-1][1], lambda: None)()
    return give(*arguments)

  monkeypatch.setattr(loop.mesh, "shard", given)
  monkeypatch.setattr(
    loop._Log, "write", lambda log, number, *x: (events.append(("read", number)), write(log, number, *x))
  )
  found = run(tmp_path / "ahead", params, texts, stage, measure)
  g, r = ([(kind, n) for n in range(1, 7)] for kind in ("given", "read"))
  assert events == [g[0], g[1], r[0], g[2], r[1], r[2], g[3], g[4], r[3], g[5], r[4], r[5]]

  events.clear()
  stops[2] = lambda: os.kill(os.getpid(), signal.SIGTERM)
  with pytest.raises(Interrupted, match="after step 2"):
    run(tmp_path / "stopped", params, texts, stage, measure)
  assert [number for number, *_ in logged(tmp_path / "stopped")] == [1, 2]

  def kill():
    raise Killed

  events.clear()
  stops[4] = kill  # as step 6 is given: the last checkpoint is of step 3, step 5 was not read
  with pytest.raises(Killed):
    run(tmp_path / "stopped", params, texts, stage, measure)
  assert [number for number, *_ in logged(tmp_path / "stopped")] == [1, 2, 3, 4]
  continued = run(tmp_path / "stopped", params, texts, stage, measure)
  alone()
  plain = run(tmp_path / "plain", params, texts, stage, measure)
  for directory, other in (("ahead", found), ("stopped", continued)):
    assert logged(tmp_path / directory) == logged(tmp_path / "plain")
    same(other.params, plain.params)
    assert (other.step, other.best) == (plain.step, plain.best)


def test_ten_steps_without_a_finite_gradient_end_so_too_where_logs_are_read_later(params, texts, tmp_path, alone):
  broken = {**params, "teacher": jax.tree.map(lambda x: x, params["teacher"])}
  broken["teacher"].head = jax.tree.map(lambda x: np.asarray(x) * np.nan, params["teacher"].head)
  stage = dataclasses.replace(LIGHT, steps=12, checkpoint_every=20)
  with pytest.raises(UserError, match=r"step 10: nll_ce is not finite, 10 steps in a row"):
    run(tmp_path, broken, texts, stage)
  assert [number for number, *_ in logged(tmp_path)] == list(range(1, 10))


def test_a_device_s_full_memory_is_one_line_and_no_other_error_is():
  full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17.46GiB")
  ways = step.less_memory(MODEL, STAGE, "warmup", 2, packed=False)
  said = r"--warmup\.chunk 2, --model\.remat, or --model\.dtype bfloat16, a smaller --warmup\.batch in a new run"
  with pytest.raises(UserError, match=f"memory is too small for batch=8; try {said}$"), loop._room("warmup", 8, *ways):
    raise full
  with pytest.raises(UserError, match=r"try more devices$"), loop._room("warmup", 8, [], []):
    raise full
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), loop._room("warmup", 8, *ways):
    raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_of_what_needs_less_memory_a_run_hears_what_it_may_go_on_with():
  """A chunk that divides a device's queries; packed, that is another run; where chunks are held, they need not be."""
  small = dataclasses.replace(MODEL, dtype="bfloat16", remat=True)
  ways = lambda model=small, devices=1, packed=False, **more: step.less_memory(
    model, dataclasses.replace(STAGE, **more), "cascade", devices, packed
  )
  other = ["a smaller --cascade.batch"]
  assert ways() == (["--cascade.chunk 4"], other)
  assert ways(chunk=4) == (["--cascade.chunk 2"], other)
  assert ways(packed=True) == ([], ["--cascade.chunk 4", *other])
  assert ways(chunk=4, recompute=False) == (["--cascade.recompute"], other)
  assert ways(devices=8) == ([], [])  # a query on each
  assert ways(MODEL, chunk=1) == (["--model.remat"], ["--model.dtype bfloat16", *other])
  for flag in ("--cascade.chunk 4", "--cascade.recompute", "--model.remat", "--model.dtype bfloat16"):
    for verb in ("run", "plan"):  # as it stands there, each is one
      verbs.parse(config.Config, verb, flag.split(), default=config.Config())
