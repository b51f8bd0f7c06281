"""The training step on a CPU in each `model.dtype`, side by side in one interleaved run.

  python benchmarks/cpu.py [--turns 6] [--steps interaction warmup cascade] [--dtypes float32 mixed bfloat16]

The quickstart's lengths, random tokens and weights, no dropout: all-MiniLM-L6-v2's shape, and in the cascade a student
of three such layers. Process time counts all cores. Only a CPU with AMX (`amx_bf16`) gains from bfloat16.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np

from ernie_jax import batches, encoder, mesh, scores, step
from ernie_jax.config import Architecture, Data, Model, Temperatures, Train, Weights

DATA = Data(query_length=20, passage_length=64)
TEACHER = Architecture(vocabulary=30522, width=384, layers=6, heads=12, inner=1536, special=(0, 101, 102))
SMALL = dataclasses.replace(TEACHER, layers=3)
TEMPERATURE = Temperatures(dual=0.05, late=0.5)
STEPS = {
  "interaction": (
    TEACHER,
    Train(batch=64, weights=Weights.only(nll_de=1, nll_li=1, kl_li_de=1), temperature=TEMPERATURE, late_pool="global"),
  ),
  "warmup": (TEACHER, Train(batch=8, negatives=3, weights=Weights.only(nll_ce=1))),
  "cascade": (
    SMALL,
    Train(
      batch=32,
      negatives=3,
      weights=Weights(dualreg_query=0, dualreg_passage=0),
      temperature=TEMPERATURE,
      late_pool="global",
    ),
  ),
}


def batch_of(train: Train) -> scores.Batch:
  """Random texts of random lengths, seven in ten as long as their rows."""
  rng = np.random.default_rng(0)
  layout = batches.layout(DATA, train, 1).rows(train.batch)

  def rows(tower: str) -> encoder.Rows | None:
    if tower not in layout:
      return None
    count, length = layout[tower]
    ends = np.where(rng.random(count) < 0.7, length, rng.integers(length // 2, length + 1, count))
    segments = (np.arange(length) < ends[:, None]).astype(np.int32)
    tokens = rng.integers(200, 30000, (count, length)).astype(np.int32) * segments
    types = np.zeros_like(tokens)
    if tower == "pairs":
      types[:, 15:] = segments[:, 15:]
    return encoder.Rows(tokens, segments, np.tile(np.arange(length, dtype=np.int32), (count, 1)), types)

  size = 1 + train.negatives
  return scores.Batch(
    *(rows(tower) for tower in ("queries", "passages", "pairs")),
    texts=np.arange(train.batch * size, dtype=np.int32),
    known=np.arange(train.batch, dtype=np.int32)[:, None] * size,
  )


class Runner:
  """A step and its state."""

  def __init__(self, student: Architecture, train: Train, dtype: str):
    model = Model(scan=False, late_width=None, pooling="mean", cosine=True, dropout=0.0, dtype=dtype)
    params = step.init_params(model, student, TEACHER, jax.random.key(0))
    self.batch = mesh.shard(batch_of(train), mesh.make())
    self.state = step.init_state(mesh.whole(params, mesh.make()), model, train)
    self.step, self.spent, self.loss = step.make_train_step(model, train), [], 0.0

  def __call__(self) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    self.state, logs = self.step(self.state, self.batch, jax.random.key(0))
    self.loss = float(logs["total"])
    jax.block_until_ready(self.state)
    self.spent.append((time.process_time() - cpu, time.perf_counter() - wall))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--turns", type=int, default=6)
  parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
  parser.add_argument("--dtypes", nargs="+", default=["float32", "mixed", "bfloat16"])
  chosen = parser.parse_args()
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {chosen.turns} steps each, in turns\n")
  print("| step | dtype | processor s | ratio | wall s | ratio | loss after |\n|---|---|---|---|---|---|---|")
  for name in chosen.steps:
    with jax.set_mesh(mesh.make(jax.devices()[:1])):
      runners = {dtype: Runner(*STEPS[name], dtype) for dtype in chosen.dtypes}
      for _ in range(chosen.turns + 1):  # the first turn compiles
        for runner in runners.values():
          runner()
    base = np.median(runners[chosen.dtypes[0]].spent[1:], axis=0)
    for dtype, runner in runners.items():
      spent = np.median(runner.spent[1:], axis=0)
      figures = [f"{now:.2f} | {now / then:.2f}" for now, then in zip(spent, base)]
      print(f"| {name} | {dtype} | {' | '.join(figures)} | {runner.loss:.5f} |", flush=True)


if __name__ == "__main__":
  main()
