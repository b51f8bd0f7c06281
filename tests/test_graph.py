"""ONNX graphs against our own scorers, in ONNX Runtime."""

import dataclasses
import functools
import sys

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import TINY, make_rows

from ernie_jax import config, graph, scores, step
from ernie_jax.config import UserError
from ernie_jax.encoder import Rows

ERNIE = dataclasses.replace(TINY, tasks=3, activation="relu", epsilon=1e-2)
SHAPES = ((1, 4), (3, 11), (5, 25))  # texts, tokens


def perturbed(model: config.Model, student=TINY, teacher=TINY):
  """Random parameters without zeros and ones: a lost bias or scale shows. No two encoders are the same."""
  params = step.init_params(model, student, teacher, jax.random.key(0))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), params)


def texts(count: int, length: int, parts: int = 1) -> Rows:
  """Random texts of several lengths, the first as long as can be."""
  rng = np.random.default_rng(count)
  longest = length - 1 - parts
  sizes = [longest, *rng.integers(parts, longest, count - 1, endpoint=True)]
  words = [rng.integers(3, TINY.vocabulary, size).astype(np.int32) for size in sizes]
  return make_rows(rng, [np.array_split(own, parts) for own in words], length)


def session(made: onnx.ModelProto) -> onnxruntime.InferenceSession:
  onnx.checker.check_model(made, full_check=True)
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads, options.log_severity_level = 1, 4  # it prints the errors that it raises
  return onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, rows: Rows) -> np.ndarray:
  feed = {"input_ids": rows.tokens, "attention_mask": rows.segments > 0, "token_type_ids": rows.types}
  return session.run(None, {name: np.asarray(x, np.int64) for name, x in feed.items()})[0]


@functools.partial(jax.jit, static_argnames=("model", "query"))
def embed(student, model, rows, query):
  return scores.embed(student, model, rows, None, query)


cross = jax.jit(lambda params, rows: scores.cross(params, rows, None)[0])


def agree(found, expected):
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("architecture", "model", "query"),
  [
    (TINY, config.Model(late_width=8), False),
    (TINY, config.Model(late_width=None, pooling="mean", cosine=True, dual_width=5, tied=False), False),
    (TINY, config.Model(late_width=None, pooling="mean", cosine=True, dual_width=5, tied=False), True),
    (ERNIE, config.Model(late_width=8, cosine=True, dual_width=5), True),
    (ERNIE, config.Model(late_width=None, pooling="mean"), False),
    (dataclasses.replace(TINY, layers=1), config.Model(late_width=8), False),
  ],
)
def test_dual_and_late_equal_our_own_at_any_batch_size_and_length(architecture, model, query):
  student = perturbed(model, architecture)["student"]
  dual = session(graph.dual(student, model, query=query))
  late = session(graph.late(student, query=query))
  for count, length in SHAPES:
    rows = texts(count, length)
    ours = embed(student, model, rows, query)
    agree(run(dual, rows), ours.vector)
    agree(run(late, rows)[rows.segments > 0], ours.tokens[rows.segments > 0])
    if not model.tied:
      assert np.abs(run(dual, rows) - embed(student, model, rows, not query).vector).max() > 0.1


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("pooler", [False, True])
def test_cross_equals_our_own_at_any_batch_size_and_length(shared, pooler):
  model = config.Model(share_encoder=shared, teacher_pooler=pooler)
  params = perturbed(model, ERNIE, TINY)
  made = session(graph.cross(params))
  for count, length in SHAPES:
    pairs = texts(count, length + 1, parts=2)
    assert set(np.unique(pairs.types)) == {0, 1}
    agree(run(made, pairs), cross(params, pairs))


def test_the_type_of_what_flows_through_the_encoders_does_not_matter():
  """What a model in bfloat16 was trained with is float32 too."""
  made = []
  for dtype in ("float32", "bfloat16"):
    model = config.Model(dtype=dtype)
    made.append(graph.dual(perturbed(model)["student"], model))
  assert made[0] == made[1]


def test_padding_changes_nothing():
  model = config.Model(late_width=8, pooling="mean")
  params = perturbed(model)
  rows = texts(3, 11, parts=2)
  # What stands where nothing is read does not matter either.
  pad = lambda x, value: np.pad(x, ((0, 0), (0, 7)), constant_values=value)
  more = Rows(pad(rows.tokens, 9), pad(rows.segments, 0), pad(rows.positions, 0), pad(rows.types, 1))
  student = params["student"]
  for made in (graph.dual(student, model), graph.late(student), graph.cross(params)):
    short, long = (run(session(made), x) for x in (rows, more))
    if short.ndim == 3:
      short, long = short[rows.segments > 0], long[more.segments > 0]
    agree(long, short)


def test_masks_of_an_augmented_query_read_the_text_and_are_not_read():
  """ColBERT's: with `attention_mask` 0 they have the vectors that late interaction scores."""
  model = config.Model(late_width=8)
  student = perturbed(model)["student"]
  rows = texts(3, 11)
  rows = Rows(rows.tokens, np.where(rows.segments, 1, -1), np.tile(np.arange(11, dtype=np.int32), (3, 1)), rows.types)
  assert (rows.segments < 0).any()
  agree(run(session(graph.late(student)), rows), embed(student, model, rows, True).tokens)


def test_a_text_with_more_tokens_than_positions_is_an_error():
  model = config.Model()
  student = perturbed(model)["student"]
  made = session(graph.dual(student, model))
  rows = texts(2, TINY.positions)
  agree(run(made, rows), embed(student, model, rows, False).vector)
  with pytest.raises(Exception, match="64 by 65"):
    run(made, texts(2, TINY.positions + 1))


def test_runtimes_of_2022_read_it():
  made = graph.cross(perturbed(config.Model()))
  assert made.ir_version == 8
  assert [(used.domain, used.version) for used in made.opset_import] == [("", 17)]


def test_what_an_onnx_file_cannot_hold_is_said_before_anything_is_made(monkeypatch):
  model = config.Model()
  params = perturbed(model)
  size = len(graph.dual(params["student"], model).SerializeToString())
  monkeypatch.setattr(graph, "MOST", size)
  graph.dual(params["student"], model)
  monkeypatch.setattr(graph, "MOST", size // 2)
  with pytest.raises(UserError, match="GB of weights"):
    graph.dual(params["student"], model)
  with pytest.raises(UserError, match="GB of weights"):
    graph.cross(params)


def test_without_onnx_the_user_is_told_what_to_install(monkeypatch):
  model = config.Model()
  student = perturbed(model)["student"]
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(UserError, match=r"onnx is not installed; pip install 'ernie-jax\[onnx\]'"):
    graph.late(student)
