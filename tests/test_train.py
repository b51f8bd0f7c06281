"""The loop: exact resumption, logs without repeats, and a loss that is not finite."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import TINY

from ernie_jax import batches, config, mesh, step, tokens
from ernie_jax import train as loop
from ernie_jax.config import Optimizer, Train, UserError

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


@pytest.fixture(scope="module", autouse=True)
def grid():
  with jax.set_mesh(mesh.make()):
    yield


@pytest.fixture(scope="module")
def texts():
  queries = [f"what is number {i}" for i in range(20)]
  passages = [f"number {i} is {i}, the one after {i - 1}" for i in range(20)]
  tokenizer = tokens.Tokenizer.train(queries + passages, 80)
  store = lambda texts: tokens.in_memory(texts, tokenizer)
  one = [np.array([i]) for i in range(20)]
  return batches.Texts(store(queries), store(passages), np.arange(20), one, [x[:0] for x in one], tokenizer)


@pytest.fixture(scope="module")
def params(texts):
  a = dataclasses.replace(TINY, vocabulary=len(texts.tokenizer), special=texts.tokenizer.special, layers=1)
  return mesh.whole(step.init_params(MODEL, a, a, jax.random.key(0)), mesh.make())


def run(directory, params, texts, stage=STAGE):
  return loop.train(directory, params, texts, MODEL, DATA, stage, seed=5)


def logged(directory):
  lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
  return [(line["step"], line["terms"], line["total"]) for line in lines]


@pytest.fixture(scope="module")
def whole(params, texts, tmp_path_factory):
  directory = tmp_path_factory.mktemp("whole")
  return directory, *run(directory, params, texts)


def test_every_term_is_logged_at_every_step_and_one_program_is_compiled(whole):
  directory, _, compilations = whole
  steps = logged(directory)
  assert [number for number, *_ in steps] == [1, 2, 3, 4]
  assert all(set(terms) == set(STAGE.weights.active) for _, terms, _ in steps)
  assert compilations == 1
  assert list((directory / "tensorboard").glob("events*"))


def test_stopped_and_continued_equals_uninterrupted_bit_for_bit(whole, params, texts, tmp_path, monkeypatch):
  """Ctrl-C after step 1, then a kill after step 3 (its checkpoint is of step 2), then to the end."""
  directory, expected, _ = whole
  real = loop.mesh.shard
  calls = []

  def interrupt(*arguments):
    calls.append(1)
    if len(calls) == 1:
      os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments)

  monkeypatch.setattr(loop.mesh, "shard", interrupt)
  with pytest.raises(loop.Interrupted, match="after step 1"):
    run(tmp_path, params, texts)
  assert [number for number, *_ in logged(tmp_path)] == [1]

  class Killed(BaseException):
    pass

  def kill(*arguments):
    calls.append(1)
    if len(calls) == 4:  # step 4: the last checkpoint is of step 2
      raise Killed
    return real(*arguments)

  monkeypatch.setattr(loop.mesh, "shard", kill)
  with pytest.raises(Killed):
    run(tmp_path, params, texts)
  assert [number for number, *_ in logged(tmp_path)] == [1, 2, 3]
  monkeypatch.setattr(loop.mesh, "shard", real)
  got, _ = run(tmp_path, params, texts)
  assert logged(tmp_path) == logged(directory)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_finished_stage_is_read_back(whole, params):
  directory, expected, _ = whole
  got = loop.finished(directory, params, MODEL, STAGE)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)


def test_the_given_parameters_stay(whole, params):
  assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_a_loss_that_is_not_finite_names_term_and_step(params, texts, tmp_path):
  spoilt = jax.tree.map(lambda x: x * np.nan, params["teacher"].head)
  broken = {**params, "teacher": jax.tree.map(lambda x: x, params["teacher"])}
  broken["teacher"].head = spoilt
  with pytest.raises(UserError, match=r"step 1: .*nll_ce.* is not finite"):
    run(tmp_path, broken, texts)


def test_a_gradient_that_is_not_finite_is_never_saved(params, texts, tmp_path, monkeypatch):
  real = loop.step.make_train_step

  def make(*arguments):
    apply = real(*arguments)

    def spoilt(state, batch, key):
      state, logs = apply(state, batch, key)
      return state, logs | {"gradient_norm": jax.numpy.inf}

    return spoilt

  monkeypatch.setattr(loop.step, "make_train_step", make)
  with pytest.raises(UserError, match="step 1: gradient_norm is not finite"):
    run(tmp_path, params, texts)
  assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]


def test_training_goes_on_after_a_damaged_checkpoint(whole, params, texts, tmp_path):
  """The last checkpoint is damaged: its stage is trained again from the one before, to the same end."""
  directory, expected, _ = whole
  shutil.copytree(directory, tmp_path / "copy")
  for path in (tmp_path / "copy" / "checkpoints" / "4").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")
  got, _ = run(tmp_path / "copy", params, texts)
  kept = loop.finished(tmp_path / "copy", params, MODEL, STAGE)
  for a, b, c in zip(*(jax.tree.leaves(x) for x in (got, kept, expected)), strict=True):
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, c)


def test_a_batch_that_does_not_divide_is_refused_with_good_sizes(params, texts, tmp_path):
  with pytest.raises(UserError, match=r"batch=12: .*use 8, 16"):
    run(tmp_path, params, texts, dataclasses.replace(STAGE, batch=12))
