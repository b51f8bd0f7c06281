"""Temporary memory of the training step by batch size, as the TPU compiler allocates it for one v5e chip.

  python benchmarks/memory.py            (needs `pip install -e .[tpu]`, no TPU)

ERNIE-base student and cross-encoder, every term, lengths 32 and 128, 8 passages a query, `chunk` fixed: with gradient
caching the batch is bounded by time. Without it, the last row, the smallest of the batches needs more than the largest.
"""

import argparse

import jax

from ernie_jax import config, cost, mesh, plan, step

BASE = config.Architecture(vocabulary=30522, width=768, layers=12, heads=12, inner=3072)


def temporaries(batch: int, chunk: int | None, pool: str) -> int:
  """Bytes on the chip beside parameters, optimizer state and batch; where they do not fit, what would be needed."""
  train = config.Train(steps=100, batch=batch, negatives=7, chunk=chunk, late_pool=pool)
  model = config.Model(scratch=BASE, dtype="bfloat16", remat=True)
  settings = config.Config(data=config.Data(query_length=32, passage_length=128), model=model)
  grid = mesh.make(plan.devices("v5e:2x2")[:1])
  with jax.set_mesh(grid), plan.telling(f"batch {batch}, chunk {chunk}, late_pool {pool}"):
    state, example, key = plan.arguments(settings, train, grid)
    try:
      compiled = step.make_train_step(model, train).lower(state, example, key).compile()
    except jax.errors.JaxRuntimeError as error:
      needed, _ = plan.out_of_memory(str(error))
      stats = plan.held(state) + plan.held(example)
      return int(needed) - stats
  return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batches", type=int, nargs="+", default=[64, 256, 1024])
  parser.add_argument("--chunk", type=int, default=16)
  parser.add_argument("--pools", nargs="+", default=["own", "global"])
  chosen = parser.parse_args()
  print(f"{'batch':>6} {'passages':>8} {'chunk':>6} {'late_pool':>9} {'temporaries GiB':>16} {'ratio':>6}")
  first: dict[str, int] = {}
  rows = [(batch, chosen.chunk, pool) for pool in chosen.pools for batch in chosen.batches]
  for batch, chunk, pool in [*rows, (chosen.batches[0], None, chosen.pools[0])]:
    found = temporaries(batch, chunk, pool)
    base = first.setdefault(pool, found)
    print(f"{batch:6} {batch * 8:8} {chunk!s:>6} {pool:>9} {found / cost.GIB:16.2f} {found / base:6.2f}", flush=True)


if __name__ == "__main__":
  main()
