"""The training step on TPUs that nobody owns: the compiler's cycles, useful MFU, and the source lines they go to.

  python benchmarks/tpu.py                                  (every case; about four minutes each)
  python benchmarks/tpu.py --steps cascade --teachers base --topologies v5e:4x4 --rows packed --top 10

Needs `pip install -e .[tpu]`, no TPU. MS MARCO's lengths: queries of 32 tokens, passages of 128, lists of 8. Useful
MFU counts the FLOPs of real tokens alone: `FULL` is how full rows are at these lengths (loader.py). Everything is an
estimate of the compiler's, as if nothing overlapped, and the same in every run.
"""

import argparse
import dataclasses

import jax

from ernie_jax import plan
from ernie_jax.config import Architecture, Config, Data, Model, Train, UserError, Weights

BASE = Architecture(vocabulary=30522, width=768, layers=12, heads=12, inner=3072, positions=512, types=4)
LARGE = Architecture(vocabulary=30522, width=1024, layers=24, heads=16, inner=4096, positions=512, types=4)
TEACHERS = {"base": BASE, "large": LARGE}
FULL = {"padded": 0.57, "packed": 0.96}
STEPS = {
  "dual": ("cascade", Weights.only(nll_de=1)),
  "interaction": ("interaction", Weights.only(nll_de=1, nll_li=1, kl_li_de=1)),
  "cascade": ("cascade", dataclasses.replace(Weights(), dualreg_query=0, dualreg_passage=0)),
}


def configuration(step: str, teacher: str, rows: str, chosen: argparse.Namespace, chips: int) -> Config:
  """The stage that `STEPS` names, with the batch per chip that was chosen; other stages are not looked at."""
  stage, weights = STEPS[step]
  train = Train(
    batch=chosen.queries * chips,
    negatives=0 if stage == "interaction" else chosen.passages - 1,
    chunk=chosen.chunk,
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
  parser.add_argument("--rows", nargs="+", choices=FULL, default=list(FULL))
  parser.add_argument("--queries", type=int, default=64, help="of a chip")
  parser.add_argument("--passages", type=int, default=8, help="of a query")
  parser.add_argument("--pack", type=int, default=256, help="tokens of a packed row")
  parser.add_argument("--chunk", type=int)
  parser.add_argument("--dropout", type=float, default=0.1)
  parser.add_argument("--layers", type=int, help="of every encoder, for a quick look")
  parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--top", type=int, default=0, help="source lines shown of each case")
  parser.add_argument("--most", type=float, help="cycles; a case that needs more ends the program with code 1")
  chosen = parser.parse_args()
  print(f"jax {jax.__version__}; {chosen.queries} queries x {chosen.passages} passages a chip, chunk {chosen.chunk}, "
        f"scan {chosen.scan}, remat {chosen.remat}, dropout {chosen.dropout}\n")  # fmt: skip
  print(
    "| step | teacher | slice | rows | cycles | GiB | step, s | collectives | MFU | useful MFU |\n" + "|---" * 10 + "|"
  )
  for topology in chosen.topologies:
    for step in chosen.steps:
      for teacher in chosen.teachers if step == "cascade" else chosen.teachers[:1]:
        for rows in chosen.rows:
          about = f"| {step} | {teacher if step == 'cascade' else '-'} | {topology} | {rows} |"
          settings = configuration(step, teacher, rows, chosen, plan.slice_of(topology))
          try:
            made = plan.plan(settings, STEPS[step][0], topology)
          except UserError as error:
            if chosen.most is not None:
              raise SystemExit(f"{about} {error}") from error
            print(f"{about} {error} |", flush=True)
            continue
          print(f"{about} {made.cycles:.3e} | {sum(made.memory.values()) / plan.GIB:.2f} | {made.step_time:.3f} | "
                f"{made.communicating / made.step_time:.1%} | {made.mfu:.3f} | {made.mfu * FULL[rows]:.3f} |",
                flush=True)  # fmt: skip
          for line in made.operations[: chosen.top]:
            print(f"    {line.cycles / made.cycles:6.1%}  {line.where:24} {line.name}", flush=True)
          if chosen.most is not None and made.cycles > chosen.most:
            raise SystemExit(f"{made.cycles:.4e} cycles: more than {chosen.most:.4e}")


if __name__ == "__main__":
  main()
