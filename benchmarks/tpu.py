"""The training step on TPUs that nobody owns: the compiler's cycles, useful MFU, and the source lines they go to.

  python benchmarks/tpu.py                                  (every case; about four minutes each)
  python benchmarks/tpu.py --steps cascade --teachers base --topologies v5e:4x4 --rows packed --top 10

Needs `pip install -e .[tpu]`, no TPU. Texts are as long as MS MARCO's, cut at 32 and 128 tokens, in lists of 8. Useful
MFU counts the FLOPs of real tokens alone, attention within their own text. Everything is an estimate of the compiler's,
as if nothing overlapped, and the same in every run.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np

from ernie_jax import batches, cost, plan
from ernie_jax.config import Architecture, Config, Data, Model, Train, UserError, Weights

BASE = Architecture(vocabulary=30522, width=768, layers=12, heads=12, inner=3072, positions=512, types=4)
LARGE = Architecture(vocabulary=30522, width=1024, layers=24, heads=16, inner=4096, positions=512, types=4)
TEACHERS = {"base": BASE, "large": LARGE}
ROWS = ("padded", "packed")
TOKENS = (10.6, 80)  # of queries and passages: corpora.py's texts fill 33 and 60 % of 32 and 128 (loader.py)
STEPS = {
  "dual": ("cascade", Weights.only(nll_de=1)),
  "interaction": ("interaction", Weights.only(nll_de=1, nll_li=1, kl_li_de=1)),
  "cascade": ("cascade", dataclasses.replace(Weights(), dualreg_query=0, dualreg_passage=0)),
}


def useful(settings: Config, train: Train, texts: batches.Texts) -> float:
  """Model FLOPs of a step if each text were a row of its own length."""
  size, rng = batches.sizes(texts, settings.data, together=False), np.random.default_rng(0)
  drawn = [size(i, batches.choose(texts, i, train.negatives, rng)) for i in range(1024)]
  mean = {tower: np.concatenate([own[tower] for own in drawn]).mean() for tower in batches.used(train)}
  number = {tower: train.batch * (1 if tower == "queries" else 1 + train.negatives) for tower in mean}
  rows: Any = {tower: (number[tower], mean[tower]) for tower in mean}
  return cost.flops(*plan.architectures(settings.model), settings.model, train, settings.data, rows)


def configuration(step: str, teacher: str, rows: str, chosen: argparse.Namespace, chips: int) -> Config:
  """The stage that `STEPS` names, with the batch per chip that was chosen; other stages are not looked at."""
  stage, weights = STEPS[step]
  train = Train(
    batch=chosen.queries * chips,
    negatives=0 if stage == "interaction" else chosen.passages - 1,
    chunk=chosen.chunk,
    recompute=chosen.recompute,
    weights=weights,
    late_pool="global" if stage == "interaction" else "own",
  )
  return dataclasses.replace(
    Config(
      data=Data(query_length=32, passage_length=128, pack=chosen.pack if rows == "packed" else None),
      model=Model(
        scratch=dataclasses.replace(BASE, layers=chosen.layers or BASE.layers),
        teacher_scratch=dataclasses.replace(TEACHERS[teacher], layers=chosen.layers or TEACHERS[teacher].layers),
        dtype="bfloat16",
        dropout=chosen.dropout,
        scan=chosen.scan,
        remat=chosen.remat,
      ),
    ),
    **{stage: train},
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
  parser.add_argument("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS))
  parser.add_argument("--topologies", nargs="+", default=["v5e:16x16", "v5p:4x8x8", "v6e:16x16"])
  parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
  parser.add_argument("--queries", type=int, default=64, help="of a chip")
  parser.add_argument("--passages", type=int, default=8, help="of a query")
  parser.add_argument("--pack", type=int, default=128, help="tokens of a packed row")
  parser.add_argument("--chunk", type=int)
  parser.add_argument("--recompute", action=argparse.BooleanOptionalAction, default=True, help="of a chunk")
  parser.add_argument("--dropout", type=float, default=0.1)
  parser.add_argument("--layers", type=int, help="of every encoder, for a quick look")
  parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--top", type=int, default=0, help="source lines shown of each case")
  parser.add_argument("--most", type=float, help="cycles; a case that needs more ends the program with code 1")
  chosen = parser.parse_args()
  print(f"jax {jax.__version__}; {chosen.queries} queries x {chosen.passages} passages a chip, chunk {chosen.chunk}, "
        f"recompute {chosen.recompute}, scan {chosen.scan}, remat {chosen.remat}, "
        f"dropout {chosen.dropout}\n")  # fmt: skip
  print(
    "| step | teacher | slice | rows | cycles | GiB | step, s | collectives | MFU | useful MFU |\n" + "|---" * 10 + "|"
  )
  texts = plan.typical(*TOKENS)
  for topology in chosen.topologies:
    for step in chosen.steps:
      for teacher in chosen.teachers if step == "cascade" else chosen.teachers[:1]:
        for rows in chosen.rows:
          about = f"| {step} | {teacher if step == 'cascade' else '-'} | {topology} | {rows} |"
          settings = configuration(step, teacher, rows, chosen, plan.slice_of(topology))
          try:
            made = plan.plan(settings, STEPS[step][0], topology, texts)
          except UserError as error:
            if chosen.most is not None:
              raise SystemExit(f"{about} {error}") from error
            print(f"{about} {error} |", flush=True)
            continue
          real = made.mfu * useful(settings, made.train, texts) / made.flops
          print(f"{about} {made.cycles:.3e} | {sum(made.memory.values()) / plan.GIB:.2f} | {made.step_time:.3f} | "
                f"{made.communicating / made.step_time:.1%} | {made.mfu:.3f} | {real:.3f} |",
                flush=True)  # fmt: skip
          for line in made.operations[: chosen.top]:
            print(f"    {line.cycles / made.cycles:6.1%}  {line.where:24} {line.name}", flush=True)
          if chosen.most is not None and made.cycles > chosen.most:
            raise SystemExit(f"{made.cycles:.4e} cycles: more than {chosen.most:.4e}")


if __name__ == "__main__":
  main()
