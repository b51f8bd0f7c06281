"""Model FLOPs against a sum by hand and against XLA's count."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
from conftest import make_batch

from ernie_jax import batches, cost, encoder, step
from ernie_jax.config import Architecture, Data, Model, Train, Weights

SMALL = Architecture(vocabulary=50, width=4, layers=2, heads=2, inner=8)
LARGE = Architecture(vocabulary=50, width=6, layers=3, heads=2, inner=10)
MODEL = Model(late_width=3)
DATA = Data(query_length=4, passage_length=6)  # pairs of 9
LIST = Train(batch=2, negatives=2)  # a pool of 6


def rows(train, data=DATA):
  return batches.layout(data, train, 1).rows(train.batch)


def total(weights, model=MODEL, **train):
  train = dataclasses.replace(LIST, weights=weights, **train)
  return cost.flops(SMALL, LARGE, model, train, DATA, rows(train))


# By hand: a layer's products over one token, then over the row's tokens, times tokens.
QUERIES = 2 * 4 * 2 * (2 * (4 * 16 + 2 * 32) + 4 * 4 * 4)
PASSAGES = 6 * 6 * 2 * (2 * (4 * 16 + 2 * 32) + 4 * 6 * 4)
PAIRS = 6 * 9 * 3 * (2 * (4 * 36 + 2 * 60) + 4 * 9 * 6)
MASKED = 2 * 12 * 2 * (2 * (4 * 16 + 2 * 32) + 4 * 12 * 4)
HEAD = 2 * 3 * 2 * 4 * (4 + 50)
STUDENT = QUERIES + PASSAGES
POOLER, LOGIT = 6 * 2 * 36, 6 * 2 * 6
PROJECTION = (2 * 4 + 6 * 6) * 2 * 4 * 3
MAXSIM = 2 * 4 * 6 * 3  # of one query with one passage
DOT = 2 * 4


@pytest.mark.parametrize(
  ("weights", "train", "expected"),
  [
    ({"nll_ce": 1}, {}, 3 * (PAIRS + POOLER + LOGIT)),
    ({"nll_de": 1}, {}, 3 * (STUDENT + DOT * (6 + 2 * 6))),
    ({"nll_de": 1}, {"dual_pool": "own"}, 3 * (STUDENT + DOT * 6)),
    ({"nll_li": 1}, {}, 3 * (STUDENT + PROJECTION + 6 * MAXSIM)),
    ({"nll_li": 1}, {"late_pool": "global"}, 3 * (STUDENT + PROJECTION + (6 + 2 * 6) * MAXSIM)),
    (
      {"nll_de": 1, "dualreg_query": 1, "dualreg_passage": 1},
      {},
      3 * (2 * STUDENT + DOT * (6 + 2 * 2 * 6)),
    ),
    ({"kl_ce_de": 1}, {"teacher": "frozen"}, PAIRS + POOLER + LOGIT + 3 * (STUDENT + DOT * 6)),
    ({"kl_ce_de": 1}, {}, PAIRS + POOLER + LOGIT + 3 * (STUDENT + DOT * 6)),
    ({"kl_ce_li": 1}, {}, PAIRS + POOLER + LOGIT + 3 * (STUDENT + PROJECTION + 6 * MAXSIM)),
    # Masked: 2 rows of 12 tokens; round(0.3 * 10) = 3 of them go through the head, and are compared with all words.
    ({"mlm": 1}, {"mlm_length": 12, "mlm_rate": 0.3}, 3 * (MASKED + HEAD)),
    (
      {"mlm": 1, "nll_de": 1},
      {"mlm_length": 12, "mlm_rate": 0.3, "dual_pool": "own"},
      3 * (MASKED + HEAD + STUDENT + DOT * 6),
    ),
  ],
)
def test_the_sum_by_hand(weights, train, expected):
  assert total(Weights.only(**weights), **train) == expected


def test_heads_follow_the_configuration():
  ce, li = Weights.only(nll_ce=1), Weights.only(nll_li=1)
  assert total(ce) - total(ce, Model(teacher_pooler=False)) == 3 * POOLER
  shared = cost.flops(SMALL, LARGE, Model(share_encoder=True), dataclasses.replace(LIST, weights=ce), DATA, rows(LIST))
  assert shared == cost.flops(SMALL, SMALL, Model(), dataclasses.replace(LIST, weights=ce), DATA, rows(LIST))
  assert total(li, Model(late_width=None)) == 3 * (STUDENT + 6 * 2 * 4 * 6 * 4)
  de, narrow = Weights.only(nll_de=1), Model(dual_width=1)
  assert total(de, narrow) == 3 * (STUDENT + 2 * 4 * (2 + 6) * 1 + 2 * 1 * (6 + 2 * 6))


def test_packed_queries_count_in_the_rows_of_passages():
  """Two queries and six passages in rows of 12, as if all were the longest: three rows, and one of both queries."""
  data = dataclasses.replace(DATA, pack=12)
  train = dataclasses.replace(LIST, weights=Weights.only(nll_li=1))
  shape = rows(train, data)
  assert shape == {"passages": (4, 12)}
  row = 12 * 2 * (2 * (4 * 16 + 2 * 32) + 4 * 12 * 4)
  late = 4 * 12 * 2 * 4 * 3 + 6 * 2 * 4 * 6 * 3
  assert cost.flops(SMALL, LARGE, MODEL, train, data, shape) == 3 * (4 * row + late)


def test_recomputation_is_not_counted():
  weights = Weights.only(nll_ce=1, nll_li=1)
  assert total(weights) == total(weights, dataclasses.replace(MODEL, remat=True))


def counted(lowered) -> float:
  return lowered.cost_analysis()["flops"]


def test_forward_agrees_with_xla():
  """XLA also counts element-wise operations: 2.4 % here, where layers are wide."""
  a = Architecture(vocabulary=50, width=512, layers=3, heads=8, inner=2048, positions=64)
  rows = encoder.Rows(*[jax.ShapeDtypeStruct((4, 32), jax.numpy.int32)] * 4)
  module = jax.eval_shape(lambda: encoder.Encoder(a, jax.random.key(0), scan=False))
  ours = cost.forward(a, 4, 32)
  assert ours <= counted(jax.jit(lambda m, r: m(r)[0]).lower(module, rows)) < 1.03 * ours


def test_the_whole_step_agrees_with_xla():
  """All terms, three architectures, forward and backward: 3.4 % above, for softmax, dropout, AdamW and the like."""
  a = Architecture(vocabulary=50, width=256, layers=3, heads=4, inner=1024, positions=64)
  model = Model(scan=False, late_width=128)
  train = Train(batch=8, negatives=3, weights=Weights())
  data = Data(query_length=16, passage_length=32)
  batch = jax.eval_shape(lambda: make_batch(b=8, k=4, lq=16, lp=32))
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(lambda key: step.init_state(step.init_params(model, a, a, key), model, train), key)
  ours = cost.flops(a, a, model, train, data, rows(train, data))
  assert ours <= counted(step.make_train_step(model, train).lower(state, batch, key)) < 1.06 * ours


def test_mfu_is_the_share_of_the_peak(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="TPU v5 lite")])
  assert cost.mfu(197e12 * 4, 2.0, 4) == pytest.approx(0.5)


def test_mfu_is_unknown_on_a_cpu():
  assert cost.mfu(1e12, 1.0, 1) is None
