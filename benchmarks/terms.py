"""What each loss term costs: FLOPs of the compiled training step with all terms, without each, and with each alone.

python benchmarks/terms.py

Shapes of `configs/small_student.py`: three layers of width 384 under a cross-encoder of six; counted by the compiler
on a CPU, layers unrolled (it counts a loop's body once). "model" is `cost.flops`: the matrix products asked for.
"""

import dataclasses

import jax
import numpy as np

from ernie_jax import batches, cost, encoder, scores, step
from ernie_jax.config import Architecture, Data, Model, Train, Weights

STUDENT = Architecture(vocabulary=30522, width=384, layers=3, heads=12, inner=1536, dropout=0.1)
TEACHER = dataclasses.replace(STUDENT, layers=6)
DATA = Data(query_length=20, passage_length=64)
MODEL = Model(scan=False, late_width=None)
EVERY = Weights(nll_ce_fgm=1, margin_mse=1, kl_listwise=1, kl_bidirectional=1, virt=1)


def rows(count: int, length: int) -> encoder.Rows:
  return encoder.Rows(*(jax.ShapeDtypeStruct((count, length), np.int32) for _ in range(4)))


def measured(train: Train) -> tuple[float, float]:
  """FLOPs of a step: the compiler's, and the model's."""
  layout = batches.layout(DATA, train, 1).rows(train.batch)
  towers = {name: rows(*layout[name]) if name in layout else None for name in ("queries", "passages", "pairs")}
  size = train.batch * (1 + train.negatives)
  whole = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
  batch = scores.Batch(**towers, texts=whole(size), known=whole(train.batch, 2))
  params = jax.eval_shape(lambda: step.init_params(MODEL, STUDENT, TEACHER, jax.random.key(0)))
  state = jax.eval_shape(lambda p: step.init_state(p, MODEL, train), params)
  program = step.make_train_step(MODEL, train).lower(state, batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
  return program.cost_analysis()["flops"], cost.flops(STUDENT, TEACHER, MODEL, train, DATA, layout)


def line(name: str, weights: Weights, **fields: object) -> None:
  fields = {"teacher": "joint" if weights.trains_teacher else "frozen", **fields}
  compiled, model = measured(Train(batch=8, negatives=3, weights=weights, late_pool="global", **fields))
  first = FIRST or (compiled, model)
  FIRST[:] = first
  share = [100 * x / y for x, y in zip((compiled, model), first)]
  print(f"| {name} | {compiled / 1e9:.2f} | {share[0]:.1f} % | {model / 1e9:.2f} | {share[1]:.1f} % |", flush=True)


FIRST: list[float] = []
print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; 8 queries, lists of 4\n")
print("| terms | compiled, GFLOP | of the paper's | model, GFLOP | of the paper's |\n|---|---|---|---|---|")
line("the paper's nine", Weights())
off = lambda *terms: dataclasses.replace(Weights(), **dict.fromkeys(terms, 0.0))
for term in sorted(Weights().active, key=list(dataclasses.asdict(Weights())).index):
  line(f"without {term}", off(term))
line("without DualReg", off("dualreg_query", "dualreg_passage"))
line("without the cross-encoder's terms", off("nll_ce", "kl_ce_li", "kl_ce_de", "kl_attention"))
line("uniform teacher, no nll_ce", off("nll_ce"), teacher="uniform")
for term in dataclasses.asdict(Weights()):
  if term != "mlm":
    line(f"{term} alone", Weights.only(**{term: 1.0}))
line("all of these", EVERY)
