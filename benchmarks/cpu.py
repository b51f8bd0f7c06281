"""The training step on a CPU beside PyTorch's and sentence-transformers', in one interleaved run.

  python benchmarks/cpu.py [--turns 6] [--steps dual interaction warmup cascade] [--sides mixed torch ...] [--chunk 16]

The quickstart's lengths, random tokens and weights, no dropout: all-MiniLM-L6-v2's shape, and in the cascade a student
of three such layers. Ours in each `model.dtype`, with padded rows and with rows of 64 tokens that hold several texts
(128 for pairs), which give the same losses; PyTorch's (peers.py) in float32 and under autocast to bfloat16;
sentence-transformers' loss on the dual-encoder alone. Those need `pip install -e .[interop]`. Before anything is timed,
the first loss and gradient norm must agree. Process time counts all cores. Only a CPU with products of bfloat16
(`amx_bf16`, `avx512_bf16`) gains from it. The command line asks for huge pages, this program runs as it is started: try
it with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` too. Encoding: benchmarks/encode.py.
"""

import argparse
import dataclasses
import importlib.util
from typing import Any

import jax
import numpy as np
import steps

from ernie_jax import mesh
from ernie_jax.config import Architecture, Data, Model, Temperatures, Train, Weights

DATA = Data(query_length=20, passage_length=64)
TEACHER = Architecture(vocabulary=30522, width=384, layers=6, heads=12, inner=1536, special=(0, steps.CLS, steps.SEP))
SMALL = dataclasses.replace(TEACHER, layers=3)
TEMPERATURE = Temperatures(dual=0.05, late=0.5)
STEPS = {
  "dual": (TEACHER, Train(batch=32, negatives=1, weights=Weights.only(nll_de=1), temperature=TEMPERATURE)),
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
PACK = 64  # tokens of a packed row
PADDED = ("float32", "mixed", "bfloat16")
OURS = PADDED + tuple(f"{dtype}, packed" for dtype in PADDED)
THEIRS = ("torch", "torch bfloat16", "sentence-transformers")
EXACT = ("float32", "float32, packed", "torch", "sentence-transformers")  # nothing is rounded to bfloat16


def runner(side: str, name: str, chunk: int | None) -> Any:
  """The step on that side; None where it has none."""
  student, train = STEPS[name]
  dtype, _, packed = side.partition(", ") if side in OURS else ("float32", "", "")
  model = Model(scan=False, late_width=None, pooling="mean", cosine=True, dropout=0.0, dtype=dtype)
  params = steps.parameters(model, student, TEACHER)
  batch = steps.Texts(train, DATA, share=0.7).batch(PACK if packed else None)
  if side in OURS:
    held = None if packed else chunk and min(chunk, train.batch)
    train = dataclasses.replace(train, chunk=held, recompute=False)
    return steps.Runner(model, train, params, batch)
  import peers

  if side == "sentence-transformers":
    return peers.SentenceTransformers(params, train, batch, "cpu", autocast=False) if name == "dual" else None
  return peers.Runner(params, train, batch, "cpu", autocast=side == "torch bfloat16", compiled=False)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--turns", type=int, default=6)
  parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
  torch = importlib.util.find_spec("torch") is not None
  parser.add_argument("--sides", nargs="+", choices=OURS + THEIRS, default=list(OURS + (THEIRS if torch else ())))
  parser.add_argument("--chunk", type=int, help="queries that ours, padded, encode at once; nothing is computed twice")
  chosen = parser.parse_args()
  base = "torch" if "torch" in chosen.sides else chosen.sides[0]
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {chosen.turns} steps each, in turns, "
        f"chunk {chosen.chunk}\n")  # fmt: skip
  print(f"| step | side | processor s | of {base}'s | wall s | of {base}'s | first loss | first gradient norm |")
  print("|---" * 8 + "|")
  for name in chosen.steps:
    with jax.set_mesh(mesh.make(jax.devices()[:1])):
      runners = {side: made for side in chosen.sides if (made := runner(side, name, chosen.chunk)) is not None}
      for one in runners.values():  # compiles
        one()
      first = {side: (one.loss, one.norm) for side, one in runners.items()}
      steps.agree(first, EXACT)
      for _ in range(chosen.turns):
        for one in runners.values():
          # The second counts: the first pays for memory that the side before it has just given back to the system.
          one()
          one.spent.pop()
          one()
    spent = {side: np.median(one.spent[1:], axis=0) for side, one in runners.items()}
    for side, seconds in spent.items():
      figures = [f"{now:.2f} | {now / then:.2f}" for now, then in zip(seconds, spent.get(base, seconds))]
      print(f"| {name} | {side} | {' | '.join(figures)} | {first[side][0]:.5f} | {first[side][1]:.5f} |", flush=True)


if __name__ == "__main__":
  main()
