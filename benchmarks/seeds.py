"""Runs of several seeds as one table: mean and standard deviation over seeds of every system, and of each stage.

python benchmarks/seeds.py runs/seed0 runs/seed1 runs/seed2
"""

import json
import statistics
import sys
from pathlib import Path

MEASURES = ("MRR@10", "R@20", "nDCG@10", "R@100")

runs = [json.loads((Path(name) / "metrics.json").read_text()) for name in sys.argv[1:]]
manifests = [json.loads((Path(name) / "manifest.json").read_text()) for name in sys.argv[1:]]
data = {(m["data"]["fingerprint"], m["data"]["passages"], m["data"]["queries"]["test"]) for m in manifests}
assert len(data) == 1, f"runs on different data: {data}"
fingerprint, passages, queries = data.pop()

rows = {name: [run[name] for run in runs] for name in ("bm25", "zero_shot", "dual", "late", "cross")}
for stage in ("interaction", "cascade"):
  for system in ("dual", "late"):
    rows[f"{system} after {stage}"] = [run["stages"][stage][system] for run in runs]


def cell(values: list[float]) -> str:
  spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and len(set(values)) > 1 else ""
  return f"{statistics.mean(values):.3f}{spread}"


def difference(name: str, a: list[dict], b: list[dict]) -> None:
  values = [x["MRR@10"] - y["MRR@10"] for x, y in zip(a, b)]
  print(f"- {name}: MRR@10 {statistics.mean(values):+.3f} ({', '.join(f'{v:+.3f}' for v in values)})")


print(
  f"{len(runs)} seeds, {passages} passages, {queries} test queries, data {fingerprint}; mean ± standard deviation\n"
)
print("| system | " + " | ".join(MEASURES) + " |\n|---|" + "---|" * len(MEASURES))
for name, values in rows.items():
  print(f"| {name} | " + " | ".join(cell([row[measure] for row in values]) for measure in MEASURES) + " |")
print()
difference("dual − bm25", rows["dual"], rows["bm25"])
difference("late − dual", rows["late"], rows["dual"])
difference("cascade − interaction, dual", rows["dual after cascade"], rows["dual after interaction"])
difference("cascade − interaction, late", rows["late after cascade"], rows["late after interaction"])
kept = ", ".join(run["best_stage"] for run in runs)
print(f"- student kept (best on dev): {kept}")
checks = [m["teacher_check"] for m in manifests]
pairs = ", ".join(f"{c['teacher']['MRR@10']:.3f} / {c['student']['MRR@10']:.3f}" for c in checks)
where = f"{checks[0]['queries']} dev queries, top {checks[0]['depth']}"
print(f"- teacher / student before the cascade, MRR@10 on {where}: {pairs}")
print("\n| stage | seconds |\n|---|---|")
for stage in manifests[0]["stages"]:
  seconds = ", ".join(f"{m['stages'][stage]['seconds']:.0f}" for m in manifests)
  print(f"| {stage} | {seconds} |")
